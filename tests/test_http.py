"""What the service answers: pages, votes, caching, freshness. Over sockets, except where WSGI itself is the subject."""

import importlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from itertools import pairwise, product
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from threading import Lock, Thread
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import psycopg
import pytest
from altered import AlteredService
from client import FORM, HOST, ask, chunked, get, talk, vote, write
from conftest import new_database
from faults import frozen, wait_until, workers
from local.postgres import ROOT
from local.service import Service


@pytest.fixture(scope="module")
def quiet_service(server, template):
    """The service on a database of its own, where nobody votes; one worker, whose readings can be counted."""
    with new_database(server, template) as url:
        log_statements(url)
        with Service(url, WEB_CONCURRENCY="1") as service:
            yield service


# The page


def test_the_page_is_html_that_is_always_asked_for_again(shared_service):
    answer = get(shared_service, "/")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"


def test_the_page_has_one_form_with_a_button_for_each_cat(shared_service):
    text = get(shared_service, "/").text
    assert re.findall('<form.* method="post" action="(.*?)">', text) == ["/add"]
    assert re.findall('<button type="submit" name="vote" value="(.*?)">', text) == ["Gummi", "Pita"]


def test_the_page_shows_the_votes_for_each_cat(prompt_service, rows):
    rows.execute("INSERT INTO votes (vote) SELECT 'Gummi' FROM generate_series(1, 1234)")
    assert get(prompt_service, "/").votes == {"Gummi": 1234, "Pita": 0}


def test_a_voter_is_thanked(shared_service):
    assert re.search('role="status".*Pita', get(shared_service, "/?voted=Pita").text)


@pytest.mark.parametrize("target", ["/", "/?voted=", "/?voted=Garfield", "/?voted=%FF", "/?voted=%00", "/?other=Pita"])
def test_nobody_else_is_thanked(shared_service, target):
    answer = get(shared_service, target)
    assert answer.status == 200
    assert 'role="status"' not in answer.text


def test_no_cookie_is_set_or_needed(prompt_service, rows):
    with_cookie = get(prompt_service, "/", "Cookie: a=b; \xff==")
    without = get(prompt_service, "/")
    assert with_cookie.body == without.body
    assert without.headers["Set-Cookie"] is vote(prompt_service).headers["Set-Cookie"] is None


# Other addresses


def test_tally_json_is_the_tally(prompt_service, rows):
    rows.execute("INSERT INTO votes (vote) VALUES ('Pita'), ('Pita')")
    answer = get(prompt_service, "/tally.json")
    assert answer.status == 200
    assert answer.text == '{"Gummi": 0, "Pita": 2}'
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(("method", "status"), [("GET", 503), ("POST", 405)])
def test_errors_of_tally_json_are_json(service_without_database, method, status):
    answer = ask(service_without_database, method, "/tally.json")
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    assert str(status) in json.loads(answer.text)["error"]
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Content-Security-Policy"]


def test_history_is_a_page(shared_service):
    answer = get(shared_service, "/history")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"


def test_healthz_is_ok_while_the_database_answers(shared_service):
    answer = get(shared_service, "/healthz")
    assert (answer.status, answer.text) == (200, "ok\n")
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("target", ["/healthz", "/", "/?voted=Pita", "/tally.json", "/history"])
def test_without_a_database_the_answer_is_503(service_without_database, target):
    start = time.monotonic()
    answer = get(service_without_database, target)
    assert time.monotonic() - start < 8
    assert answer.status == 503
    assert answer.headers["Cache-Control"] == "no-store"
    assert int(answer.headers["Retry-After"]) > 0
    assert "does not answer: your vote" not in answer.text


def test_without_a_database_a_voter_is_told_that_the_vote_was_not_counted(service_without_database):
    answer = vote(service_without_database)
    assert answer.status == 503
    assert "your vote was not counted" in answer.text
    assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize(
    "target", ["/nope", "/index.html", "/add/", "//add", "/ADD", "/static/", "/%3F", "/%FF", "/tally.json%FF"]
)
def test_an_unknown_address_is_404(shared_service, target):
    answer = get(shared_service, target)
    assert answer.status == 404
    assert answer.headers["Cache-Control"] == "no-store"


READABLE = ["/", "/tally.json", "/history", "/healthz", "/static/pita.svg"]
OTHER_METHODS = ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "MEOW"]


@pytest.mark.parametrize(
    ("method", "target", "allowed"),
    [
        *[(method, target, {"GET", "HEAD"}) for method, target in product(["POST", *OTHER_METHODS], READABLE)],
        *[(method, "/add", {"POST"}) for method in ["GET", "HEAD", *OTHER_METHODS]],
    ],
)
def test_a_wrong_method_is_405_with_the_right_ones(shared_service, stored, method, target, allowed):
    answer = ask(shared_service, method, target)
    assert answer.status == 405
    assert answer.headers["Allow"].split(", ") == sorted(allowed)
    assert stored() == []


def test_head_is_get_without_the_body(quiet_service):
    for target in READABLE:
        heads = {}
        for method in ("GET", "HEAD"):
            answer = ask(quiet_service, method, target)
            assert answer.status == 200
            heads[method] = {name: value for name, value in answer.headers.items() if name != "Date"}
        assert heads["GET"] == heads["HEAD"]


# What clients keep


def test_who_has_the_latest_gets_304(quiet_service):
    for target in ("/", "/?voted=Pita", "/tally.json", "/history"):
        tag = get(quiet_service, target).headers["ETag"]
        assert re.fullmatch('"[0-9a-f]+"', tag)
        for known in (tag, f"W/{tag}", f'"other", {tag}', f'W/"other",W/{tag}', "*"):
            answer = get(quiet_service, target, f"If-None-Match: {known}")
            assert answer.status == 304
            assert answer.headers["ETag"] == tag
            assert answer.headers["Cache-Control"] == "no-cache"
        assert get(quiet_service, target, 'If-None-Match: "other"').status == 200


@pytest.mark.parametrize("target", ["/?voted=Pita", "/tally.json"])
def test_who_has_an_older_tally_gets_the_new_one(prompt_service, rows, target):
    old = get(prompt_service, target)
    vote(prompt_service)
    new = get(prompt_service, target, "If-None-Match: " + old.headers["ETag"])
    assert new.status == 200
    assert new.body != old.body


def test_the_page_names_static_files_by_their_present_version(shared_service):
    links = set(re.findall('(?:src|href)="(/static/.*?)"', get(shared_service, "/").text))
    assert links
    for link in links:
        answer = get(shared_service, link)
        assert answer.status == 200
        assert answer.headers["Cache-Control"].startswith("max-age=31536000")


@pytest.mark.parametrize("query", ["", "?v=", "?v=0", "?w=1"])
def test_static_files_by_another_version_are_always_asked_for_again(shared_service, query):
    assert get(shared_service, "/static/pita.svg" + query).headers["Cache-Control"] == "no-cache"


@pytest.fixture(scope="module")
def changed_service(shared_database, tmp_path_factory):
    """The service of a copy of the project, with another picture, and with folders under static/."""
    copy = tmp_path_factory.mktemp("copy") / "catvote"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "tests"))
    (copy / "static/pita.svg").write_text("<svg/>")
    (copy / "static/donuts/empty").mkdir(parents=True)
    (copy / "static/donuts/plain.svg").write_text("<svg/>")
    with Service(shared_database, WEB_CONCURRENCY="1", GUNICORN_CMD_ARGS=f"--chdir={copy}") as service:
        yield service


def test_the_version_of_static_files_changes_with_their_content(shared_service, changed_service):
    links = [re.search('"(/static/pita.svg.*?)"', get(each, "/").text)[1] for each in (shared_service, changed_service)]
    assert links[0] != links[1]


def test_who_has_a_static_file_gets_304(shared_service):
    answer = get(shared_service, "/static/pita.svg")
    assert answer.headers["Content-Type"] == "image/svg+xml"
    modified = "If-Modified-Since: " + answer.headers["Last-Modified"]
    assert get(shared_service, "/static/pita.svg", modified).status == 304
    assert get(shared_service, "/static/pita.svg", "If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT").status == 200


# RFC 9110, section 13.1: what a client has is decided by the tag if it shows one, and by the date only if not.
LONG_AGO, LATER = "Thu, 01 Jan 1970 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 GMT"
CONDITIONS = {
    "own tag": (["If-None-Match: {tag}"], 304),
    "own tag, weak": (["If-None-Match: W/{tag}"], 304),
    "own tag among others": (['If-None-Match: "other", {tag}'], 304),
    "any": (["If-None-Match: *"], 304),
    "another tag": (['If-None-Match: "other"'], 200),
    "own tag, older date": (["If-None-Match: {tag}", f"If-Modified-Since: {LONG_AGO}"], 304),
    "another tag, later date": (['If-None-Match: "other"', f"If-Modified-Since: {LATER}"], 200),
    "later date": ([f"If-Modified-Since: {LATER}"], 304),
    "older date": ([f"If-Modified-Since: {LONG_AGO}"], 200),
}


@pytest.mark.parametrize(("headers", "status"), CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("version", ["", "?v=0", "present"])
def test_the_tag_that_a_client_shows_wins_over_the_date(shared_service, version, headers, status):
    target = "/static/pita.svg" + version
    if version == "present":
        (target,) = re.findall('src="(/static/pita.svg.*?)"', get(shared_service, "/").text)
    first = get(shared_service, target)
    if version == "present" and not any("If-None-Match" in header for header in headers):
        status = 200  # its address changes with it, so a browser asks by that alone
    answer = get(shared_service, target, *[header.format(tag=first.headers["ETag"]) for header in headers])
    assert answer.status == status
    assert answer.headers["ETag"] == first.headers["ETag"]
    assert answer.headers["Cache-Control"] == first.headers["Cache-Control"]
    assert answer.body == (first.body if status == 200 else b"")


def test_static_files_may_lie_in_folders(changed_service):
    (version,) = set(re.findall(r"\?v=\w+", get(changed_service, "/").text))
    for query in ("", version):
        answer = get(changed_service, f"/static/donuts/plain.svg{query}")
        assert (answer.status, answer.text) == (200, "<svg/>")
        assert answer.headers["Content-Type"] == "image/svg+xml"
        assert get(changed_service, "/static/donuts/plain.svg", "If-None-Match: *").status == 304
    for folder in ("donuts", "donuts/", "donuts/empty"):
        assert get(changed_service, f"/static/{folder}{version}").status in (403, 404)


@pytest.mark.parametrize(
    ("wanted", "part"), [("bytes=0-3", slice(4)), ("bytes=4-", slice(4, None)), ("bytes=-4", slice(-4, None))]
)
def test_a_part_of_a_static_file_can_be_had(shared_service, wanted, part):
    answer = get(shared_service, "/static/pita.svg", f"Range: {wanted}")
    assert answer.status == 206
    assert answer.body == (ROOT / "static/pita.svg").read_bytes()[part]


def test_a_part_that_a_static_file_does_not_have_is_416(shared_service):
    assert get(shared_service, "/static/pita.svg", "Range: bytes=99999999-").status == 416


# Votes

MULTIPART = "Content-Type: multipart/form-data; boundary=icing"
FIELD = 'Content-Disposition: form-data; name="vote"'


def part(*headers, body=b"Pita"):
    """Return one part of a multipart body: the field `vote` unless `headers` say otherwise."""
    return "\r\n".join(["--icing", *(headers or [FIELD]), "", ""]).encode("latin-1") + body + b"\r\n"


def multipart(*headers, body=b"Pita"):
    """Return a multipart body with this one part."""
    return part(*headers, body=body) + b"--icing--\r\n"


GOOD_VOTES = {
    "urlencoded": ([FORM], b"vote=Pita"),
    "urlencoded, with a charset": ([FORM + "; charset=UTF-8"], b"vote=Pita"),
    "URLENCODED": (["Content-Type: APPLICATION/X-WWW-FORM-URLENCODED"], b"vote=Pita"),
    "percent-encoded": ([FORM], b"%76%6f%74%65=%50%69%74%61"),
    "among other fields": ([FORM], "a=ä&&b&vote=Pita&c=%C3%A4".encode()),
    "as long as it may be": ([FORM], b"vote=Pita&a=".ljust(4096, b"a")),
    "beside a field that is not UTF-8": ([FORM], b"vote=Pita&a=%FF"),
    "Content-Length with a zero": ([FORM, "Content-Length: 09"], b"vote=Pita"),
    "multipart": ([MULTIPART], multipart()),
    "MULTIPART": (["Content-Type: MULTIPART/FORM-DATA; BOUNDARY=icing"], multipart()),
    "multipart, boundary in quotes": (['Content-Type: multipart/form-data; boundary="icing"'], multipart()),
    "multipart, among other fields": ([MULTIPART], part('Content-Disposition: form-data; name="a"') + multipart()),
    "multipart, part with a type": ([MULTIPART], multipart(FIELD, "Content-Type: text/plain; charset=utf-8")),
    "chunked": ([FORM, "Transfer-Encoding: chunked"], chunked(b"vote=Pita")),
    "chunked multipart": ([MULTIPART, "Transfer-Encoding: Chunked"], chunked(multipart())),
}


@pytest.mark.parametrize(("headers", "body"), GOOD_VOTES.values(), ids=GOOD_VOTES)
def test_a_vote_is_stored_once_and_answered_with_303_to_the_page(shared_service, stored, headers, body):
    answer = ask(shared_service, "POST", "/add", *headers, body=body)
    assert answer.status == 303
    assert answer.headers["Location"] == "/?voted=Pita"
    assert answer.headers["Cache-Control"] == "no-store"
    assert stored() == ["Pita"]


def test_votes_that_come_while_the_database_is_busy_are_stored_by_the_eight(shared_service, shared_database, rows):
    with ThreadPoolExecutor(40) as pool, psycopg.connect(shared_database) as connection:
        connection.execute("LOCK TABLE votes")
        answers = [pool.submit(vote, shared_service) for _ in range(40)]
        time.sleep(0.7)
        connection.rollback()
        assert {answer.result().status for answer in answers} == {303}
        transactions = connection.execute("SELECT count(*) FROM votes GROUP BY xmin::text").fetchall()
    sizes = [votes for (votes,) in transactions]
    assert sum(sizes) == 40
    assert 1 < max(sizes) <= 8


def test_a_vote_does_not_wait_for_the_one_before(shared_service):
    seconds = []
    for _ in range(20):
        start = time.monotonic()
        assert vote(shared_service).status == 303
        seconds.append(time.monotonic() - start)
    assert median(seconds) < 0.1


def test_a_cat_that_is_gone_spoils_no_other_vote(database):
    with Service(database, WEB_CONCURRENCY="1") as service, ThreadPoolExecutor(24) as pool:
        get(service, "/")
        with psycopg.connect(database) as connection:
            connection.execute("ALTER TABLE votes DROP CONSTRAINT votes_vote_is_a_cat, ADD CHECK (vote = 'Gummi')")
            answers = [pool.submit(vote, service, body=f"vote={cat}".encode()) for cat in ["Gummi", "Pita"] * 12]
            time.sleep(0.5)
        assert [answer.result().status == 303 for answer in answers] == [True, False] * 12


@pytest.mark.parametrize("cat", ["Gummi", "Pita"])
def test_each_cat_can_be_voted_for(shared_service, stored, cat):
    assert vote(shared_service, body=f"vote={cat}".encode()).headers["Location"] == f"/?voted={cat}"
    assert stored() == [cat]


def test_a_client_that_waits_for_100_continue_gets_it(shared_service):
    request = write("POST", "/add", FORM, "Expect: 100-continue", body=b"vote=Pita")
    assert [answer.status for answer in talk(shared_service, request)] == [100, 303]


def test_votes_may_share_a_connection(shared_service, stored):
    requests = write("POST", "/add", FORM, body=b"vote=Pita") + write("POST", "/add", MULTIPART, body=multipart())
    assert [answer.status for answer in talk(shared_service, requests)] == [303, 303]
    assert stored() == ["Pita", "Pita"]


HOSTILE_HEADERS = {
    "Host": ["Host: evil.example"],
    "no Host": ["Host:"],
    "X-Forwarded-Host": ["X-Forwarded-Host: evil.example"],
    "X-Forwarded-Proto": ["X-Forwarded-Proto: https"],
    "Forwarded": ["Forwarded: host=evil.example;proto=https"],
    "X-Script-Name": ["X-Script-Name: /evil"],
    "SCRIPT_NAME": ["SCRIPT_NAME: /evil"],
    "SCRIPT_NAME of the path": ["SCRIPT_NAME: /add"],
    "PATH_INFO": ["PATH_INFO: /evil"],
}


@pytest.mark.parametrize("headers", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_no_header_changes_where_a_voter_is_sent(shared_service, headers):
    answer = vote(shared_service, *headers)
    assert answer.status == 303
    assert answer.headers["Location"] == "/?voted=Pita"


BAD_VOTES = {
    "unknown cat": ([FORM], b"vote=Garfield"),
    "cat in lower case": ([FORM], b"vote=pita"),
    "cat and a space": ([FORM], b"vote=Pita+"),
    "SQL": ([FORM], b"vote=Pita'); DROP TABLE votes; --"),
    "missing": ([FORM], b"cat=Pita"),
    "field in capitals": ([FORM], b"VOTE=Pita"),
    "empty": ([FORM], b"vote="),
    "no body": ([FORM], b""),
    "two votes": ([FORM], b"vote=Pita&vote=Gummi"),
    "the same vote twice": ([FORM], b"vote=Pita&vote=Pita"),
    "a bad vote and a good one": ([FORM], b"vote=&vote=Pita"),
    "NUL": ([FORM], b"vote=%00"),
    "cat and NUL": ([FORM], b"vote=Pita%00"),
    "not UTF-8": ([FORM], b"vote=%FF"),
    "not UTF-8, not encoded": ([FORM], b"vote=\xff"),
    "no type": ([], b"vote=Pita"),
    "text": (["Content-Type: text/plain"], b"vote=Pita"),
    "JSON": (["Content-Type: application/json"], b'{"vote": "Pita"}'),
    "type not UTF-8": (["Content-Type: \xff"], b"vote=Pita"),
    "urlencoded, says multipart": ([MULTIPART], b"vote=Pita"),
    "multipart, says urlencoded": ([FORM], multipart()),
    "multipart, other kind": (["Content-Type: multipart/mixed; boundary=icing"], multipart()),
    "multipart, unknown cat": ([MULTIPART], multipart(body=b"Garfield")),
    "multipart, two votes": ([MULTIPART], part() + multipart()),
    "multipart, not UTF-8": ([MULTIPART], multipart(body=b"\xff")),
    "multipart, NUL": ([MULTIPART], multipart(body=b"Pita\0")),
    "multipart, no boundary": (["Content-Type: multipart/form-data"], multipart()),
    "multipart, boundary without =": (["Content-Type: multipart/form-data; boundary"], multipart()),
    "multipart, empty boundary": (["Content-Type: multipart/form-data; boundary="], multipart()),
    "multipart, wrong boundary": (["Content-Type: multipart/form-data; boundary=fondant"], multipart()),
    "multipart, not closed": ([MULTIPART], part()),
    "multipart, broken off in the next part": ([MULTIPART], part() + part()[:-6]),
    "multipart, closed half": ([MULTIPART], part() + b"--icing-"),
    "multipart, no part": ([MULTIPART], b"--icing--\r\n"),
    "multipart, unknown charset": ([MULTIPART + "; charset=nope"], multipart()),
    "part of unknown charset": ([MULTIPART], multipart(FIELD, "Content-Type: text/plain; charset=nope")),
    "part of a charset that is none": ([MULTIPART], multipart(FIELD, "Content-Type: text/plain; charset=hex")),
    "part with a character that has no UTF-8": (
        [MULTIPART],
        multipart(FIELD, "Content-Type: text/plain; charset=utf-7", body=b"+2AA-"),
    ),
    "part with Content-Length: zz": ([MULTIPART], multipart(FIELD, "Content-Length: zz")),
    "part longer than its Content-Length": ([MULTIPART], multipart(FIELD, "Content-Length: 3")),
    "part header not UTF-8": ([MULTIPART], multipart(FIELD, "X: \xff")),
    "part header without a colon": ([MULTIPART], multipart(FIELD, "X")),
    "part without a name": ([MULTIPART], multipart("Content-Disposition: form-data")),
    "part with an odd name": ([MULTIPART], multipart("Content-Disposition: ;")),
    "file instead of field": ([MULTIPART], multipart(FIELD + '; filename="pita.svg"')),
    "chunked, no body": ([FORM, "Transfer-Encoding: chunked"], b"0\r\n\r\n"),
    "chunked, broken off": ([FORM, "Transfer-Encoding: chunked"], b"9\r\nvote=Pita\r\n"),
    "chunked, broken off in a chunk": ([FORM, "Transfer-Encoding: chunked"], b"A\r\nvote=Pita"),
    "chunked, size is no number": ([FORM, "Transfer-Encoding: chunked"], b"z\r\nvote=Pita\r\n0\r\n\r\n"),
    "shorter than its Content-Length": ([FORM, "Content-Length: 10"], b"vote=Pita"),
    "Content-Length is no number": ([FORM, "Content-Length: nine"], b"vote=Pita"),
}


@pytest.mark.parametrize(("headers", "body"), BAD_VOTES.values(), ids=BAD_VOTES)
def test_a_bad_vote_is_400_and_not_stored(shared_service, stored, headers, body):
    assert ask(shared_service, "POST", "/add", *headers, body=body).status == 400
    assert stored() == []


def test_a_vote_in_the_address_is_400_and_not_stored(shared_service, stored):
    assert ask(shared_service, "POST", "/add?vote=Pita", FORM, body=b"a=b").status == 400
    assert stored() == []


# Fresh enough, and honest


@contextmanager
def only(worker, processes):
    """Stop the other of two workers for a while, so that this one answers."""
    (other,) = {*processes} - {worker}
    with frozen(other.pid):
        yield


def test_a_voter_sees_the_own_vote_from_whichever_worker(shared_service, rows):
    processes = wait_until(lambda: len(workers(shared_service)) == 2 and workers(shared_service))
    for number, (voted_at, seen_at) in enumerate(product(processes, processes), start=1):
        with only(seen_at, processes):
            get(shared_service, "/")
        with only(voted_at, processes):
            location = vote(shared_service).headers["Location"]
        with only(seen_at, processes):
            assert get(shared_service, location).votes["Pita"] == number


def test_of_many_voters_each_sees_all_votes_acknowledged_before(shared_service, rows):
    acknowledged, lock = Counter(), Lock()

    def vote_and_look(number):
        cat = ["Gummi", "Pita"][number % 2]
        answer = vote(shared_service, "Cookie: a=b", body=f"vote={cat}".encode())
        with lock:
            acknowledged[cat] += 1
            least = acknowledged.copy()
        shown = get(shared_service, answer.headers["Location"]).votes
        return all(shown[cat] >= least[cat] for cat in least)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(vote_and_look, range(200)))
    assert acknowledged == get(shared_service, "/?voted=Pita").votes


@pytest.mark.parametrize("target", ["/", "/tally.json"])
def test_no_tally_is_older_than_a_second(shared_service, shared_connection, target):
    for _ in range(30):
        get(shared_service, "/?voted=Pita")  # whichever worker has it reads the tally anew
    before = get(shared_service, target).body
    # More than earlier tests left, or took away within this second.
    shared_connection.execute("INSERT INTO votes (vote) SELECT 'Pita' FROM generate_series(1, 1000)")
    time.sleep(1)
    assert all(get(shared_service, target).body != before for _ in range(30))


def log_statements(database):
    """Let the server log what sessions in this database ask it from now on."""
    with psycopg.connect(database) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET log_statement = 'all'")


def readings(server):
    """Return how many statements have read the tally, of all that the server has logged."""
    return Path(server.base_dir, f"{server.name}.log").read_text().count("vote_totals")


def most(seconds, workers):
    """Return how many readings so many workers may take in that time, whoever comes."""
    return workers * (seconds / 0.5 + 1)


def test_more_visitors_do_not_read_the_database_more_often(server, database):
    log_statements(database)
    with Service(database) as service:
        before, start = readings(server), time.monotonic()

        def visit(_):
            pages = 0
            while time.monotonic() - start < 2:
                pages += get(service, "/").status == 200
            return pages

        with ThreadPoolExecutor(16) as pool:
            pages = sum(pool.map(visit, range(16)))
        read = readings(server) - before
        assert 0 < read <= most(time.monotonic() - start, workers=2)
        assert pages > 10 * read


MADE_UP = {
    "no cat": ("/?voted=Garfield", []),
    "a cat in lower case": ("/?voted=pita", []),
    "no name": ("/?voted", []),
    "a cat and more": ("/?voted=Pita%20", []),
    "another parameter": ("/?utm_source={}", []),
    "another Host": ("/", ["Host: {}.example"]),
    "another scheme": ("/", ["X-Forwarded-Proto: https", "X-Forwarded-Host: {}.example"]),
}


@pytest.mark.parametrize(("target", "headers"), MADE_UP.values(), ids=MADE_UP)
def test_nothing_made_up_forces_a_reading_or_changes_the_page(server, quiet_service, target, headers):
    before, start = readings(server), time.monotonic()
    get(quiet_service, "/?voted=Pita")  # one reading is certain
    plain = get(quiet_service, "/").body
    for number in range(100):
        answer = get(quiet_service, target.format(number), *[header.format(number) for header in headers])
        assert answer.body == plain
    assert 0 < readings(server) - before <= 1 + most(time.monotonic() - start, workers=1)


@pytest.mark.parametrize(("age", "a_visitor_waits"), [(0.6, False), (1.4, True)])
def test_a_visitor_waits_for_a_new_reading_only_if_the_last_is_too_old(application, age, a_visitor_waits):
    statement = "SELECT now(), pg_sleep(0.3)"
    reader = sys.modules["catvote"].Reader(statement, patience=2, refreshed_after=0.4, fresh=1.2)
    old = reader.latest()
    time.sleep(old.begun_at + age - time.monotonic())
    assert (reader.latest().number > old.number) == a_visitor_waits
    time.sleep(0.5)
    assert reader.if_fresh() not in (None, old)


def test_a_reading_that_failed_is_made_again_for_the_next_visitor(application, shared_connection):
    catvote = sys.modules["catvote"]
    reader = catvote.Reader("SELECT 1 FROM public.later", patience=2, refreshed_after=20, fresh=50)
    with pytest.raises(catvote.Unavailable):
        reader.latest()
    shared_connection.execute("CREATE TABLE public.later (number int)")
    assert reader.latest().rows == []


def test_visitors_and_operator_hear_of_a_reading_that_failed_by_surprise(application, monkeypatch, caplog):
    catvote = sys.modules["catvote"]
    monkeypatch.setattr(catvote, "execute", lambda *_: 1 / 0)
    started_at = time.monotonic()
    for _ in range(3):
        with pytest.raises(catvote.Unavailable):
            catvote.tally_reader.latest()
    assert time.monotonic() - started_at < catvote.FIRST_WAIT
    assert "ZeroDivisionError" in caplog.text


def test_a_tally_that_took_long_to_read_is_marked_and_no_reason_to_call_the_service_ill(application):
    catvote = sys.modules["catvote"]
    catvote.tally_reader.statement += " WHERE pg_sleep(0.5) IS NOT NULL"
    catvote.tally_reader.patience = 5
    assert catvote.tally_reader.latest().outdated
    assert not catvote.history_reader.latest().outdated
    assert catvote.healthz().status_code == 200


def test_who_comes_late_to_a_slow_reading_does_not_wait_for_it_but_for_the_next(application, shared_connection):
    catvote = sys.modules["catvote"]
    shared_connection.execute("CREATE TABLE public.pause AS SELECT 0 AS seconds")
    reader = catvote.Reader("SELECT pg_sleep(seconds) FROM public.pause", patience=5, refreshed_after=0.1, fresh=0.1)
    reader.latest()
    shared_connection.execute("UPDATE pause SET seconds = 2")
    time.sleep(0.2)
    waits = []
    for _ in range(3):
        asked_at = time.monotonic()
        assert reader.latest().outdated
        waits.append(time.monotonic() - asked_at)
    assert waits[0] == pytest.approx(catvote.PAGE_WAIT, abs=0.2)
    assert max(waits[1:]) < 0.2
    shared_connection.execute("UPDATE pause SET seconds = 0")
    wait_until(lambda: not reader.latest().outdated)


def test_without_a_thread_to_open_connections_with_a_vote_is_certainly_not_counted(application, monkeypatch):
    catvote = sys.modules["catvote"]

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", start)
    with pytest.raises(catvote.Unavailable) as error:
        catvote.vote_store.store("Pita")
    assert error.value.trouble is catvote.Trouble.AWAY


def test_a_connection_that_gave_up_is_not_used_again(application):
    catvote = sys.modules["catvote"]
    process = "SELECT pg_backend_pid()"
    before = catvote.execute(catvote.page_pool, 2, process)
    with pytest.raises(catvote.HTTPError):
        catvote.execute(catvote.page_pool, 0.2, "SELECT pg_sleep(9)")
    assert catvote.execute(catvote.page_pool, 2, process) != before


def test_whatever_goes_wrong_every_voter_hears_of_it(application, monkeypatch):
    catvote, told = sys.modules["catvote"], SimpleQueue()
    monkeypatch.setattr(catvote, "execute", lambda *_: time.sleep(0.3) or 1 / 0)

    def voter():
        with pytest.raises((ZeroDivisionError, catvote.Unavailable)):
            catvote.vote_store.store("Pita")
        told.put(True)

    for _ in range(5):
        Thread(target=voter, daemon=True).start()
    for _ in range(5):
        told.get(timeout=5)


# An application that tells which thread it runs in.
WHO_AM_I = """
import threading, time

def app(environ, start_response):
    if environ["PATH_INFO"] == "/slowly":
        time.sleep(0.3)
    start_response("200 OK", [("Content-Length", "20")])
    return [b"%20d" % threading.get_ident()]
"""


def test_a_thread_waits_for_its_visitors_next_request(shared_database):
    with AlteredService(shared_database, WHO_AM_I) as service:
        visitors = [HTTPConnection("127.0.0.1", service.port, timeout=10) for _ in range(8)]
        for visitor in visitors:
            visitor.request("GET", "/slowly")
        others = {visitor.getresponse().read() for visitor in visitors}
        assert len(others) > 4  # threads that are free in a moment, and could serve the next request as well
        time.sleep(0.2)

        served_by = []
        for _ in range(30):
            visitors[0].request("GET", "/")
            served_by.append(visitors[0].getresponse().read())
            time.sleep(0.02)
        for visitor in visitors:
            visitor.close()  # else the service would wait for them as it ends
        stayed = sum(before == after for before, after in pairwise(served_by))
        assert stayed > 20  # a busy machine may be late now and then


# Settings


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
def test_both_schemes_of_database_urls_work(shared_database, stored, scheme):
    with Service(shared_database.replace("postgresql://", f"{scheme}://"), WEB_CONCURRENCY="1") as service:
        assert vote(service).status == 303
    assert stored() == ["Pita"]


PREVIEW = ['property="og:url" content="{}/"', 'property="og:image" content="{}/static/card.png?']


@pytest.mark.parametrize("site_url", ["https://cats.example", " https://cats.example/ ", "https://cats.example/\n"])
def test_previews_in_chats_name_the_address_that_is_set(shared_database, site_url):
    with Service(shared_database, WEB_CONCURRENCY="1", SITE_URL=site_url) as service:
        page = get(service, "/", "Host: evil.example", "X-Forwarded-Host: evil.example").text
    assert all(tag.format("https://cats.example") in page for tag in PREVIEW)
    assert "evil" not in page


def test_without_an_address_there_are_no_previews_and_no_host_is_in_the_page(shared_service):
    for target in ("/", "/?voted=Pita", "/history", "/nope"):
        page = get(shared_service, target, "Host: evil.example", "X-Forwarded-Host: evil.example").text
        assert "og:" not in page
        assert "twitter:" not in page
        assert "evil" not in page
        assert "://" not in page


# WSGI, for any other server


class Waitress(Service):
    """The application under another server, with as many threads."""

    command = "waitress-serve --listen=127.0.0.1:$PORT --threads=16 catvote:app"


@pytest.fixture(scope="module")
def waitress(shared_database):
    """The service under Waitress, for all tests of a module."""
    with Waitress(shared_database) as service:
        yield service


OTHER_SERVERS = {
    "page": ("GET", "/", [], b"", 200),
    "head of the page": ("HEAD", "/", [], b"", 200),
    "history": ("GET", "/history", [], b"", 200),
    "tally": ("GET", "/tally.json", [], b"", 200),
    "health": ("GET", "/healthz", [], b"", 200),
    "static file": ("GET", "/static/pita.svg", [], b"", 200),
    "part of a static file": ("GET", "/static/pita.svg", ["Range: bytes=0-3"], b"", 206),
    "what one has": ("GET", "/", ["If-None-Match: *"], b"", 304),
    "vote": ("POST", "/add", [FORM], b"vote=Pita", 303),
    "chunked vote": ("POST", "/add", [FORM, "Transfer-Encoding: chunked"], chunked(b"vote=Pita"), 303),
    "bad vote": ("POST", "/add", [FORM], b"vote=Garfield", 400),
    "no body": ("POST", "/add", [FORM], b"", 400),
    "foreign vote": ("POST", "/add", [FORM, "Sec-Fetch-Site: cross-site"], b"vote=Pita", 403),
    "unknown address": ("GET", "/%FF", [], b"", 404),
    "long vote": ("POST", "/add", [FORM], b"vote=" + b"a" * 9999, 413),
}


@pytest.mark.parametrize(("method", "target", "headers", "body", "status"), OTHER_SERVERS.values(), ids=OTHER_SERVERS)
def test_another_server_serves_the_same(waitress, stored, method, target, headers, body, status):
    for _ in range(2):  # what it has found out before, it may answer by a shorter way
        answer = ask(waitress, method, target, "Connection: close", *headers, body=body)
        assert answer.status == status
        assert answer.headers["Content-Security-Policy"]
    assert stored() == ["Pita"] * 2 * (status == 303)


def test_another_server_stores_no_vote_that_is_broken_off(waitress, stored):
    for header in ("Content-Length: 10", "Transfer-Encoding: chunked"):
        talk(waitress, write("POST", "/add", FORM, header, body=b"9\r\nvote=Pita"[-9 if "Length" in header else 0 :]))
    assert get(waitress, "/", "Connection: close").status == 200
    assert stored() == []
    assert "Traceback" not in waitress.log


def test_importing_the_application_connects_to_nothing():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)  # all that came is there already
        url = f"postgresql://127.0.0.1:{listener.getsockname()[1]}/catvote"
        for variables in ({}, {"DATABASE_URL": url}):
            command = [sys.executable, "-c", "import threading, catvote; print(threading.active_count())"]
            output = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
            assert (output.stdout, output.stderr) == ("1\n", "")
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.fixture
def application(shared_database, monkeypatch):
    """The application in this process, wrapped by what the standard library has to check WSGI."""
    monkeypatch.setenv("DATABASE_URL", shared_database)
    monkeypatch.delitem(sys.modules, "catvote", raising=False)
    catvote = importlib.import_module("catvote")
    yield validator(catvote.app)
    catvote.vote_pool.close()
    catvote.page_pool.close()


WSGI_REQUESTS = {
    "page": ("GET", "/", {}, b"", 200),
    "head of the page": ("HEAD", "/", {}, b"", 200),
    "page for a voter": ("GET", "/", {"QUERY_STRING": "voted=Pita"}, b"", 200),
    "history": ("GET", "/history", {}, b"", 200),
    "tally": ("GET", "/tally.json", {}, b"", 200),
    "health": ("GET", "/healthz", {}, b"", 200),
    "static file": ("GET", "/static/pita.svg", {}, b"", 200),
    "head of a static file": ("HEAD", "/static/pita.svg", {}, b"", 200),
    "part of a static file": ("GET", "/static/pita.svg", {"HTTP_RANGE": "bytes=0-3"}, b"", 206),
    "not modified": ("GET", "/static/pita.svg", {"HTTP_IF_MODIFIED_SINCE": "Fri, 31 Dec 9999 23:59:59 GMT"}, b"", 304),
    "vote": ("POST", "/add", {}, b"vote=Pita", 303),
    "bad vote": ("POST", "/add", {}, b"vote=Garfield", 400),
    "foreign vote": ("POST", "/add", {"HTTP_SEC_FETCH_SITE": "cross-site"}, b"vote=Pita", 403),
    "unknown address": ("GET", "/nope", {}, b"", 404),
    "wrong method": ("GET", "/add", {}, b"", 405),
    "long vote": ("POST", "/add", {}, b"vote=" + b"a" * 9999, 413),
}


@pytest.mark.parametrize(("method", "target", "variables", "body", "status"), WSGI_REQUESTS.values(), ids=WSGI_REQUESTS)
def test_the_application_keeps_to_wsgi(application, method, target, variables, body, status):
    form = {"CONTENT_TYPE": FORM.partition(": ")[2], "CONTENT_LENGTH": str(len(body))} if body else {}
    environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": target, "QUERY_STRING": "", "HTTP_HOST": HOST}
    environ |= form | variables
    setup_testing_defaults(environ)
    started = []
    for _ in range(2):  # what it has found out before, it may answer by a shorter way
        environ["wsgi.input"] = io.BytesIO(body)
        with closing(application(environ.copy(), lambda *arguments: started.append(arguments))) as answer:
            content = b"".join(answer)
        reason, headers, *_ = started.pop()
        assert not started
        assert int(reason.split()[0]) == status
        assert len(content) == (0 if method == "HEAD" or status == 304 else int(dict(headers)["Content-Length"]))
