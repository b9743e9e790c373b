"""What the service does to those who do not play by the rules; nothing here may cost a 5xx, a vote or a secret."""

import re
import select
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from urllib.parse import parse_qsl, quote

import psutil
import pytest
from client import FORM, HOST, ask, chunked, get, listen, read, talk, vote, write
from faults import workers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local.postgres import ROOT
from local.service import Service


@pytest.fixture(scope="module")
def broken_service(shared_database, tmp_path_factory):
    """The service with a mistake in its page."""
    copy = tmp_path_factory.mktemp("copy") / "catvote"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "tests"))
    (copy / "views/index.tpl").write_text("{{1 / 0}}")
    with Service(shared_database, WEB_CONCURRENCY="1", GUNICORN_CMD_ARGS=f"--chdir={copy}") as service:
        yield service


# Votes from pages of other sites: as https://pkg.go.dev/net/http#CrossOriginProtection

OWN, FOREIGN = f"Origin: http://{HOST}", "Origin: https://evil.example"
PASSES, REFUSED = 303, 403
SITES = {
    "no browser": ([], PASSES),
    "same-origin": (["Sec-Fetch-Site: same-origin"], PASSES),
    "none": (["Sec-Fetch-Site: none"], PASSES),
    "cross-site": (["Sec-Fetch-Site: cross-site"], REFUSED),
    "same-site": (["Sec-Fetch-Site: same-site"], REFUSED),
    "unheard of": (["Sec-Fetch-Site: next-door"], REFUSED),
    "in capitals": (["Sec-Fetch-Site: SAME-ORIGIN"], REFUSED),
    "cross-site, own Origin": (["Sec-Fetch-Site: cross-site", OWN], REFUSED),
    "same-origin, foreign Origin": (["Sec-Fetch-Site: same-origin", FOREIGN], PASSES),
    "none, foreign Origin": (["Sec-Fetch-Site: none", FOREIGN], PASSES),
    "empty, foreign Origin": (["Sec-Fetch-Site:", FOREIGN], REFUSED),
    "twice": (["Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"], REFUSED),
    "by another name": (["Sec_Fetch_Site: same-origin", FOREIGN], REFUSED),
    "own Origin": ([OWN], PASSES),
    "own Origin by HTTPS": ([f"Origin: https://{HOST}"], PASSES),
    "own Origin in capitals": ([f"Origin: http://{HOST.upper()}"], PASSES),
    "own host in capitals": ([f"Host: {HOST.upper()}", OWN], PASSES),
    "own port": ([f"Host: {HOST}:8000", f"{OWN}:8000"], PASSES),
    "own IPv6 address": (["Host: [::1]:8000", "Origin: http://[::1]:8000"], PASSES),
    "foreign Origin": ([FOREIGN], REFUSED),
    "null": (["Origin: null"], REFUSED),
    "another port": ([f"Host: {HOST}:8000", f"{OWN}:8001"], REFUSED),
    "port in Host only": ([f"Host: {HOST}:8000", OWN], REFUSED),
    "port in Origin only": ([f"{OWN}:80"], REFUSED),
    "host above": (["Origin: http://example"], REFUSED),
    "host below": ([f"Origin: http://evil.{HOST}"], REFUSED),
    "host that begins alike": ([f"{OWN}.evil.example"], REFUSED),
    "host that ends alike": ([f"Origin: http://evil{HOST}"], REFUSED),
    "own host as user": ([f"{OWN}@evil.example"], REFUSED),
    "own host as password": ([f"Origin: http://evil:{HOST}@evil.example"], REFUSED),
    "own host as path": ([f"Origin: https://evil.example/{HOST}"], REFUSED),
    "own host as query": ([f"Origin: https://evil.example?//{HOST}"], REFUSED),
    "no URL": ([f"Origin: {HOST}"], REFUSED),
    "no URL that Python can read": (["Origin: http://["], REFUSED),
    "not UTF-8": ([f"{OWN}\xff"], REFUSED),
    "two Origins, own first": ([OWN, FOREIGN], REFUSED),
    "two Origins, own last": ([FOREIGN, OWN], REFUSED),
    "forwarded host": ([FOREIGN, "X-Forwarded-Host: evil.example", "Forwarded: host=evil.example"], REFUSED),
    "foreign Referer alone": (["Referer: https://evil.example/"], PASSES),
}


@pytest.mark.parametrize(("headers", "status"), SITES.values(), ids=SITES)
def test_votes_from_pages_of_other_sites_are_refused(shared_service, stored, headers, status):
    assert vote(shared_service, *headers).status == status
    assert stored() == ["Pita"] * (status == PASSES)


HOSTS = {
    "no Origin": ([], PASSES),
    "an Origin": ([OWN], REFUSED),
    "no host in Origin": (["Origin: x"], REFUSED),
}


@pytest.mark.parametrize(("headers", "status"), HOSTS.values(), ids=HOSTS)
def test_without_a_host_no_origin_is_our_own(shared_service, headers, status):
    request = write("POST", "/add", FORM, *headers, body=b"vote=Pita")
    request = request.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: catvote.example\r\n", b"")
    assert [answer.status for answer in talk(shared_service, request)] == [status]


def test_the_log_names_host_when_a_proxy_does_not_hand_it_on(shared_service):
    before = len(shared_service.log)

    def logged():
        return [line for line in shared_service.log[before:].splitlines() if "refused a vote" in line]

    assert vote(shared_service, "Host: 127.0.0.1:8000", OWN).status == 403
    (line,) = logged()
    assert f"Origin 'http://{HOST}', Host '127.0.0.1:8000'" in line
    assert "a proxy in front has to hand on the visitor's Host" in line
    vote(shared_service, "Host: a", "Origin: http://b\xff'")
    assert len(logged()) == 2


@pytest.mark.parametrize("target", ["/", "/?voted=Pita", "/tally.json", "/static/pita.svg"])
def test_other_sites_may_link_to_us(shared_service, target):
    assert get(shared_service, target, "Sec-Fetch-Site: cross-site", FOREIGN).status == 200


# Headers on every answer

ANSWERS = {
    "page": ("GET", "/", [], b"", 200),
    "page for a voter": ("GET", "/?voted=Pita", [], b"", 200),
    "tally": ("GET", "/tally.json", [], b"", 200),
    "history": ("GET", "/history", [], b"", 200),
    "health": ("GET", "/healthz", [], b"", 200),
    "static file": ("GET", "/static/pita.svg", [], b"", 200),
    "part of a static file": ("GET", "/static/pita.svg", ["Range: bytes=0-3"], b"", 206),
    "vote": ("POST", "/add", [FORM], b"vote=Pita", 303),
    "not modified": ("GET", "/static/pita.svg", ["If-Modified-Since: Fri, 31 Dec 9999 23:59:59 GMT"], b"", 304),
    "bad vote": ("POST", "/add", [FORM], b"vote=Garfield", 400),
    "broken form": ("POST", "/add", ["Content-Type: multipart/form-data; boundary"], b"vote=Pita", 400),
    "foreign vote": ("POST", "/add", [FORM, FOREIGN], b"vote=Pita", 403),
    "unknown address": ("GET", "/nope", [], b"", 404),
    "unknown file": ("GET", "/static/nope", [], b"", 404),
    "wrong method": ("DELETE", "/", [], b"", 405),
    "long vote": ("POST", "/add", [FORM], b"vote=" + b"a" * 9999, 413),
    "part that does not exist": ("GET", "/static/pita.svg", ["Range: bytes=99999999-"], b"", 416),
    "our own mistake": ("GET", "/", [], b"", 500),
    "no database": ("GET", "/", [], b"", 503),
}


@pytest.fixture
def answer(request, method, target, headers, body, status, shared_service):
    """An answer of ANSWERS, from a service that has reason for it."""
    services = {500: "broken_service", 503: "service_without_database"}
    service = request.getfixturevalue(services[status]) if status in services else shared_service
    # The second reaches the same process, which may have found a shorter way by then.
    answers = talk(service, 2 * write(method, target, *headers, body=body), method)
    assert [answer.status for answer in answers] == [status, status]
    return answers[-1]


ERRORS = {name: row for name, row in ANSWERS.items() if row[-1] >= 400}
every_answer = pytest.mark.parametrize(("method", "target", "headers", "body", "status"), ANSWERS.values(), ids=ANSWERS)
every_error = pytest.mark.parametrize(("method", "target", "headers", "body", "status"), ERRORS.values(), ids=ERRORS)


@every_answer
def test_every_answer_tells_browsers_to_be_careful(answer):
    policy = dict(directive.split(" ", 1) for directive in answer.headers["Content-Security-Policy"].split("; "))
    assert policy.pop("default-src") == policy.pop("base-uri") == policy.pop("frame-ancestors") == "'none'"
    assert {"form-action", "img-src", "style-src", "connect-src"} <= policy.keys()
    assert set(policy.values()) == {"'self'"}
    for name, value in {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    }.items():
        assert answer.headers.get_all(name) == [value]


@every_answer
def test_no_answer_tells_what_it_was_made_with(answer):
    assert answer.headers["Server"] in (None, "gunicorn")
    assert answer.headers["X-Powered-By"] is None


@every_error
def test_every_error_is_a_page_for_people_that_nobody_keeps(answer, status):
    assert answer.headers["Content-Type"].lower() == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert answer.text.rstrip().endswith("</html>")
    for element in ("title", "h1"):
        (content,) = re.findall(f"<{element}.*?>(.+?)</{element}>", answer.text)
        assert content.strip()


@every_error
def test_no_error_shows_how_the_service_works(answer):
    telling = "Traceback|psycopg|bottle|python|[.]py|[.]tpl|division|SELECT|127[.]0"
    assert not re.search(telling, answer.text, re.IGNORECASE)


def test_our_own_mistakes_are_in_the_log(broken_service):
    get(broken_service, "/")
    assert "ZeroDivisionError" in broken_service.log


@pytest.mark.parametrize(
    ("header", "expected"),
    [("X-Forwarded-Proto: https", "max-age=31536000"), ("X-Forwarded-Proto: http", None), ("X: https", None)],
)
@pytest.mark.parametrize("target", ["/", "/nope", "/static/pita.svg"])
def test_browsers_are_told_to_stay_with_https_only_over_https(shared_service, target, header, expected):
    assert get(shared_service, target, header).headers["Strict-Transport-Security"] == expected


# Secrets


@pytest.mark.parametrize("fault", ["password", "database"])
def test_no_password_is_told_when_the_database_cannot_be_reached(shared_database, fault):
    credentials, _, place = shared_database.partition("@")
    user, _, password = credentials.rpartition(":")
    url = {
        "password": f"{user}:sugar%20{password}@{place}",
        "database": shared_database + "_of_another_baker",
    }[fault]
    with Service(url, WEB_CONCURRENCY="1") as service:
        answers = [get(service, "/"), get(service, "/healthz"), vote(service)]
        assert [answer.status for answer in answers] == [503, 503, 503]
        told = service.log + "".join(answer.text for answer in answers)
    assert "connection" in service.log
    assert password not in told
    assert "sugar" not in told


READINGS = {
    "as it is": lambda path: path,
    "%2F": lambda path: path.replace("/", "%2F"),
    "%2e": lambda path: path.replace(".", "%2e"),
    "%2e%2f": lambda path: path.replace(".", "%2e").replace("/", "%2f"),
    "%252e%252f": lambda path: path.replace(".", "%252e").replace("/", "%252f"),
    "backslash": lambda path: path.replace("/", "\\"),
    "%5C": lambda path: path.replace("/", "%5C"),
    "doubled": lambda path: path.replace("../", "....//"),
    "overlong UTF-8": lambda path: path.replace(".", "%C0%AE").replace("/", "%C0%AF"),
    "full width": lambda path: path.replace(".", "%EF%BC%8E").replace("/", "%EF%BC%8F"),
    "NUL": lambda path: path + "%00.svg",
}


@pytest.mark.parametrize("encode", READINGS.values(), ids=READINGS)
def test_static_files_are_all_that_can_be_read(shared_service, encode):
    ways = ["", "../", "./../", "nope/../../", "../static/../", "/", "//", "../" * 20, "/" + "../" * 20]
    places = ["catvote.py", str(ROOT / "catvote.py"), "etc/passwd", "/etc/passwd", "proc/self/environ"]
    for way, place in product(ways, places):
        answer = get(shared_service, "/static/" + encode(way + place).replace(" ", "%20"))
        assert answer.status in (403, 404)
        assert answer.headers["Content-Type"].startswith("text/html")
        assert not re.search("import|root:|DATABASE_URL", answer.text)


# Echoes

MARKUP = "'\"><b id=evil>"


ECHOES = {
    "path": ("GET", "/" + MARKUP, [], b""),
    "path, encoded": ("GET", "/" + quote(MARKUP), [], b""),
    "static path": ("GET", "/static/" + quote(MARKUP), [], b""),
    "query": ("GET", "/?" + quote(MARKUP), [], b""),
    "voted": ("GET", "/?voted=" + quote(MARKUP), [], b""),
    "version": ("GET", "/static/pita.svg?v=" + quote(MARKUP), [], b""),
    "Host": ("GET", "/", [f"Host: {MARKUP}"], b""),
    "X-Forwarded-Host": ("GET", "/", [f"X-Forwarded-Host: {MARKUP}"], b""),
    "User-Agent": ("GET", "/nope", [f"User-Agent: {MARKUP}", f"Cookie: {MARKUP}"], b""),
    "method": ("EVIL'&", "/", [], b""),
    "vote": ("POST", "/add", [FORM], b"vote=" + quote(MARKUP).encode()),
    "field": ("POST", "/add", [FORM], quote(MARKUP).encode() + b"=Pita"),
    "Content-Type": ("POST", "/add", [f"Content-Type: {MARKUP}"], b"vote=Pita"),
    "Origin": ("POST", "/add", [FORM, f"Origin: {MARKUP}"], b"vote=Pita"),
    "broken request line": ("GET", f"/ {MARKUP}", [], b""),
    "broken header": ("GET", "/", [f"{MARKUP}: x"], b""),
    "broken Expect": ("GET", "/", [f"Expect: {MARKUP}"], b""),
    "broken Transfer-Encoding": ("POST", "/add", [f"Transfer-Encoding: {MARKUP}"], b""),
}


@pytest.mark.parametrize(("method", "target", "headers", "body"), ECHOES.values(), ids=ECHOES)
def test_markup_of_visitors_is_never_sent_back(shared_service, method, target, headers, body):
    answer = ask(shared_service, method, target, *headers, body=body)
    assert "<b" not in answer.text.replace("<body", "").replace("<button", "")
    assert "evil>" not in answer.text


INJECTIONS = {
    "path": ("GET", "/%0D%0AX-Evil:%201", [], b""),
    "static path": ("GET", "/static/pita.svg%0D%0AX-Evil:%201", [], b""),
    "voted": ("GET", "/?voted=Pita%0D%0AX-Evil:%201", [], b""),
    "vote": ("POST", "/add", [FORM], b"vote=Pita%0D%0AX-Evil:%201"),
    "vote, line feed": ("POST", "/add", [FORM], b"vote=Pita%0AX-Evil:%201"),
    "carriage return": ("GET", "/", ["X: 1\rX-Evil: 1"], b""),
    "line feed": ("GET", "/", ["X: 1\nX-Evil: 1"], b""),
}


@pytest.mark.parametrize(("method", "target", "headers", "body"), INJECTIONS.values(), ids=INJECTIONS)
def test_visitors_add_no_headers(shared_service, stored, method, target, headers, body):
    answer = ask(shared_service, method, target, *headers, body=body)
    assert answer.headers["X-Evil"] is None
    assert stored() == []


# Requests hidden in others

HIDDEN = write("POST", "/add", FORM, body=b"vote=Gummi")
POST = ["POST", "/add", FORM]
AMBIGUOUS = {
    "Content-Length and chunked": write(*POST, "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunked and Content-Length": write(*POST, "Transfer-Encoding: chunked", "Content-Length: 5") + b"0\r\n\r\n",
    "two lengths": write(*POST, "Content-Length: 9", "Content-Length: 0") + b"vote=Pita",
    "two equal lengths": write(*POST, "Content-Length: 9", "Content-Length: 9") + b"vote=Pita",
    "list of lengths": write(*POST, "Content-Length: 9, 9") + b"vote=Pita",
    "negative length": write(*POST, "Content-Length: -1"),
    "signed length": write(*POST, "Content-Length: +9") + b"vote=Pita",
    "hexadecimal length": write(*POST, "Content-Length: 0x9") + b"vote=Pita",
    "length in other digits": write(*POST, "Content-Length: \xb2") + b"a=",
    "length and a space": write(*POST, "Content-Length : 9") + b"vote=Pita",
    "header on two lines": write(*POST, "X: 1\r\n 2", "Content-Length: 9") + b"vote=Pita",
    "length on a second line": write(*POST, "Content-Length:\r\n 9") + b"vote=Pita",
    "length after a line feed": write(*POST, "X: 1\nContent-Length: 9") + b"vote=Pita",
    "length after a carriage return": write(*POST, "X: 1\rContent-Length: 9") + b"vote=Pita",
    "xchunked": write(*POST, "Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "chunked twice": write(*POST, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunked, identity": write(*POST, "Transfer-Encoding: chunked, identity") + b"0\r\n\r\n",
    "gzip": write(*POST, "Transfer-Encoding: gzip", "Content-Length: 9") + b"vote=Pita",
    "identity": write(*POST, "Transfer-Encoding: identity", "Content-Length: 9") + b"vote=Pita",
    "chunked and a space": write(*POST, "Transfer-Encoding : chunked") + b"0\r\n\r\n",
    "chunked after a vertical tab": write(*POST, "Transfer-Encoding: \vchunked") + b"0\r\n\r\n",
    "chunked, HTTP/1.0": write(*POST, "Transfer-Encoding: chunked").replace(b"/1.1", b"/1.0") + b"0\r\n\r\n",
    "chunk of signed size": write(*POST, "Transfer-Encoding: chunked") + b"+9\r\nvote=Pita\r\n0\r\n\r\n",
    "chunk of hexadecimal size": write(*POST, "Transfer-Encoding: chunked") + b"0x9\r\nvote=Pita\r\n0\r\n\r\n",
    "chunk longer than its size": write(*POST, "Transfer-Encoding: chunked") + b"4\r\nvote=Pita\r\n0\r\n\r\n",
    "chunk after a line feed": write(*POST, "Transfer-Encoding: chunked") + b"9\nvote=Pita\r\n0\r\n\r\n",
    "length in a trailer": write(*POST, "Transfer-Encoding: chunked") + b"0\r\nContent-Length: 9\r\n\r\n",
    "line feeds only": write(*POST).replace(b"\r\n", b"\n"),
    "header that begins with a space": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "header without a name": write("GET", "/", ": chunked"),
    "NUL in a header": write("GET", "/", "X: \0"),
    "two hosts": write("GET", "/", "Host: a", "Host: b"),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1": b"GET / HTTP/1\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tunnel": write("CONNECT", "/add"),
}


@pytest.mark.parametrize("data", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_nothing_behind_an_ambiguous_request_is_served(shared_service, stored, data):
    (answer,) = talk(shared_service, data + HIDDEN)
    assert answer.status in (400, 405, 501)
    assert stored() == []


BODIES = {
    "GET": ("GET", "/", [], 200),
    "unknown address": ("POST", "/nope", [], 404),
    "wrong method": ("POST", "/", [], 405),
    "foreign vote": ("POST", "/add", [FOREIGN], 403),
    "bad vote": ("POST", "/add", [FORM], 400),
}


@pytest.mark.parametrize(("method", "target", "headers", "status"), BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("coding", ["Content-Length", "chunked"])
def test_a_body_is_never_read_as_a_request(shared_service, stored, method, target, headers, status, coding):
    if coding == "chunked":
        request = write(method, target, *headers, "Transfer-Encoding: chunked", body=chunked(HIDDEN))
    else:
        request = write(method, target, *headers, body=HIDDEN)
    (answer,) = talk(shared_service, request, method)
    assert answer.status == status
    assert stored() == []


# Too much

PARTS = b'--icing\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 10_000
MULTIPART = "Content-Type: multipart/form-data; boundary=icing"
CHUNKED = "Transfer-Encoding: chunked"
LONG_BODIES = {
    "long field": ([FORM], b"vote=Pita&a=" + b"a" * 5000),
    "long vote": ([FORM], b"vote=" + b"a" * 5000),
    "10,000 fields": ([FORM], b"a=&" * 10_000 + b"vote=Pita"),
    "10,000 parts": ([MULTIPART], PARTS),
    "long multipart": ([MULTIPART], b"-" * 5000),
    "chunked": ([FORM, CHUNKED], chunked(b"vote=Pita&a=" + b"a" * 5000)),
    "chunked 10,000 parts": ([MULTIPART, CHUNKED], chunked(PARTS)),
    "chunked, a byte at a time": ([FORM, CHUNKED], b"1\r\na\r\n" * 5000 + b"0\r\n\r\n"),
    "hidden request": ([FORM], b"a" * 5000 + HIDDEN),
    "not whole": ([FORM, "Content-Length: 5000000"], b"vote=Pita&a=" + b"a" * 5000),
}


@pytest.mark.parametrize(("headers", "body"), LONG_BODIES.values(), ids=LONG_BODIES)
def test_a_body_that_is_too_long_is_413_and_costs_at_most_the_connection(shared_service, stored, headers, body):
    request = write("POST", "/add", *headers, body=body)
    answers = [answer.status for answer in talk(shared_service, request + write("GET", "/tally.json"))]
    assert answers in ([413], [413, 200])
    assert stored() == []


def test_a_vote_may_come_with_a_few_kilobytes(shared_service):
    assert vote(shared_service, body=b"vote=Pita&a=" + b"a" * 3000).status == 303


LONG_HEADS = {
    "long address": ("/" + "a" * 10_000, "X: 1", 414),
    "long header": ("/", "X: " + "a" * 10_000, 431),
    "many headers": ("/", "X: 1\r\n" * 200 + "X: 1", 431),
}


@pytest.mark.parametrize(("target", "header", "status"), LONG_HEADS.values(), ids=LONG_HEADS)
def test_a_head_that_is_too_long_is_refused(shared_service, target, header, status):
    assert get(shared_service, target, header).status == status


def memory(service):
    """Return how many bytes all processes of the service have in memory."""
    master = psutil.Process(service.process.pid)
    return sum(process.memory_info().rss for process in [master, *workers(service)])


def flood(service, head, piece):
    """Send a head, then 20 MB unless the service hangs up; return its answers, and the seconds to the first."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        start, answered = time.monotonic(), None
        with suppress(OSError):
            connection.sendall(head)
            for _ in range(20_000_000 // len(piece)):
                connection.sendall(piece)
                if not answered and select.select([connection], [], [], 0)[0]:
                    answered = time.monotonic() - start
            connection.shutdown(socket.SHUT_WR)
        return read(listen(connection)), answered or time.monotonic() - start


FLOOD = write("POST", "/add", FORM).removesuffix(b"\r\n")
FLOODS = {
    "20 MB": (FLOOD + b"Content-Length: 20000000\r\n\r\n", b"a" * 10_000),
    "chunks": (FLOOD + b"Transfer-Encoding: chunked\r\n\r\n", b"2710\r\n" + b"a" * 10_000 + b"\r\n"),
    "a chunk": (FLOOD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFF\r\n", b"a" * 10_000),
    "the size of a chunk": (FLOOD + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * 10_000),
    "a trailer": (FLOOD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a" * 10_000),
    "trailers": (FLOOD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: 1\r\n" * 2000),
    "a header": (FLOOD + b"X: ", b"a" * 10_000),
    "headers": (FLOOD, b"X: 1\r\n" * 2000),
    "a request line": (b"GET /", b"a" * 10_000),
}


@pytest.mark.parametrize(("head", "piece"), FLOODS.values(), ids=FLOODS)
def test_a_flood_is_refused_and_not_kept(shared_service, stored, head, piece):
    before, growth = memory(shared_service), [0]
    with ThreadPoolExecutor(8) as pool:
        floods = [pool.submit(flood, shared_service, head, piece) for _ in range(8)]
        while not all(each.done() for each in floods):
            growth.append(memory(shared_service) - before)
            time.sleep(0.01)
    assert max(growth) < 50_000_000
    for each in floods:
        (answer,), seconds = each.result()
        assert 400 <= answer.status < 500
        assert seconds < 5
    assert stored() == []


def test_visitors_who_do_not_hang_up_hold_up_nobody(shared_service):
    refused = [
        write("GET", "/", "Connection: close"),
        b"nonsense\r\n\r\n",
        write("POST", "/add", FORM, body=b"a" * 99_999),
    ]
    idle = [socket.create_connection(("127.0.0.1", shared_service.port)) for _ in range(30)]
    try:
        for number, connection in enumerate(idle):
            connection.sendall(refused[number % 3])
        start = time.monotonic()
        for _ in range(10):
            assert get(shared_service, "/").status == 200
        assert time.monotonic() - start < 2
    finally:
        for connection in idle:
            connection.close()


# Anything at all

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CATS = ("Gummi", "Pita")


def soup(pieces):
    """Return a strategy for bytes, mostly of these pieces, which spaces separate."""
    pieces = st.sampled_from([piece.encode("latin-1") for piece in pieces.split(" ")])
    return st.lists(st.one_of(pieces, pieces, pieces, st.binary(max_size=3)), max_size=4).map(b"".join)


def asked_for(body):
    """Return the votes that a urlencoded body asks for, by the standard library's reading of it."""
    try:
        fields = [
            tuple(text.encode("latin-1").decode() for text in field)
            for field in parse_qsl(body.decode("latin-1"), keep_blank_values=True, encoding="latin-1")
        ]
    except UnicodeDecodeError:
        return []
    votes = [value for name, value in fields if name == "vote"]
    return votes if len(votes) == 1 and votes[0] in CATS else []


FIELDS = soup("vote vote= Pita Gummi = & + %50 %00 %FF % ; \xc3\xa4")


@FUZZ
@given(before=FIELDS, after=FIELDS)
def test_any_urlencoded_body_counts_as_it_asks(shared_service, collect, before, after):
    collect()
    body = before + b"vote=Pita" + after
    answer = vote(shared_service, body=body)
    assert collect() == asked_for(body)
    assert answer.status == (303 if asked_for(body) else 400)


BOUNDARY = "; boundary=icing"
BOUNDARIES = ["", "; boundary", "; boundary=", '; boundary="icing"', f"; charset=utf-16{BOUNDARY}"]
CHARSETS = st.sampled_from(["utf-8", "utf-7", "utf-16", "unicode_escape", "hex", "nope", "", '"'])
PART_HEADERS = st.one_of(
    CHARSETS.map(lambda charset: f"Content-Type: text/plain; charset={charset}".encode()),
    st.sampled_from([b"Content-Length: 4", b"Content-Length: 0", b"Content-Length: zz", b"Content-Disposition: ;"]),
    soup(': ; = " \r\n --icing name filename vote * \xff Content-Disposition form-data'),
)
PART_BODIES = soup("Pita Gummi +2AA- \\ud800 --icing --icing-- = % \xff\xfe \0 \r\n")


@FUZZ
@given(
    boundary=st.one_of(st.just(BOUNDARY), st.sampled_from(BOUNDARIES)),
    headers=st.lists(PART_HEADERS, max_size=2),
    value=st.one_of(st.just(b"Pita"), PART_BODIES),
    cut=st.one_of(st.just((0, 0)), st.tuples(st.integers(0, 150), st.integers(0, 30))),
)
def test_no_multipart_body_counts_for_more_than_it_asks(shared_service, collect, boundary, headers, value, cut):
    collect()
    field = b'Content-Disposition: form-data; name="vote"'
    body = b"\r\n".join([b"--icing", field, *headers, b"", value, b"--icing--", b""])
    body = body[: cut[0]] + body[sum(cut) :]
    answer = ask(shared_service, "POST", "/add", "Content-Type: multipart/form-data" + boundary, body=body)
    votes = collect()
    assert (answer.status, votes) in ((400, []), (303, ["Pita"]), (303, ["Gummi"]))
    assert not votes or votes[0].encode() in body


KINDS = soup('multipart/ form-data application/ json text/plain ; boundary= icing " = \xff')


@FUZZ
@given(kind=KINDS)
def test_any_type_that_no_form_has_is_refused(shared_service, collect, kind):
    collect()
    kind = re.sub(r"[\0-\x1f\x7f]", "", kind.decode("latin-1"))
    answer = ask(shared_service, "POST", "/add", f"Content-Type: {kind}", body=b"vote=Pita")
    assert answer.status == 400
    assert collect() == []


TARGETS = soup("/ static/ pita.svg add tally.json ? voted= v= % %FF %00 .. %2F # http://")
NAMES = ["Host", "Origin", "Sec-Fetch-Site", "If-None-Match", "If-Modified-Since", "Range", "Expect", "Content-Length"]
VALUES = soup('" W/ , ; : = bytes= 0- -1 99999999999999999999 http:// [ ] null \xff \0 1 Jan 1970')


@FUZZ
@given(
    method=st.sampled_from([b"GET", b"POST", b"DELETE", b"get", b"", b"\xff"]),
    target=TARGETS,
    headers=st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=3),
)
def test_any_request_gets_an_answer_or_none(shared_service, collect, method, target, headers):
    lines = [b"%s /%s HTTP/1.1" % (method, target), *(b"%s: %s" % (name.encode(), value) for name, value in headers)]
    answers = talk(shared_service, b"\r\n".join([*lines, b"", b""]))
    assert all(answer.status < 500 for answer in answers)
    assert collect() == []


@FUZZ
@given(data=st.binary(max_size=200))
def test_any_bytes_get_an_answer_or_none(shared_service, data):
    assert all(answer.status < 500 for answer in talk(shared_service, data))


@FUZZ
@given(path=st.binary(max_size=30), query=st.binary(max_size=30))
def test_any_address_is_an_address(shared_service, path, query):
    for target in (f"/{quote(path)}", f"/static/{quote(path)}"):
        assert get(shared_service, target).status in (200, 403, 404, 405)
    for target in (f"/?voted={quote(query)}", f"/?{quote(query)}", f"/static/pita.svg?v={quote(query)}"):
        assert get(shared_service, target).status == 200


def test_nothing_of_all_this_has_surprised_the_service(shared_service):
    assert "Traceback" not in shared_service.log
