"""What the service does to those who do not play by the rules; nothing here may cost a 5xx, a vote or a secret."""

import re
from wsgiref.util import setup_testing_defaults

import pytest
from client import FORM, HOST, ask, get, talk, vote, write

# Votes from pages of other sites: as https://pkg.go.dev/net/http#CrossOriginProtection

OWN, FOREIGN = f"Origin: http://{HOST}", "Origin: https://evil.example"
PASSES, REFUSED = 303, 403
SITES = {
    "no browser": ([], PASSES),
    "none": (["Sec-Fetch-Site: none"], PASSES),
    "cross-site, own Origin": (["Sec-Fetch-Site: cross-site", OWN], REFUSED),
    "same-origin, foreign Origin": (["Sec-Fetch-Site: same-origin", FOREIGN], PASSES),
    "own Origin in capitals": ([f"Origin: HTTP://{HOST.upper()}"], PASSES),
    "own host in capitals": ([f"Host: {HOST.upper()}", OWN], PASSES),
    "default port in Host": ([f"Host: {HOST}:80", OWN], PASSES),
    "default port of https in Origin": ([f"Origin: https://{HOST}:443"], PASSES),
    "port of https with http": ([f"Host: {HOST}:443", OWN], REFUSED),
    "another port": ([f"Host: {HOST}:8000", f"{OWN}:8001"], REFUSED),
    "Origin of a sandbox": (["Origin: null"], REFUSED),
    "host that begins alike": ([f"{OWN}.evil.example"], REFUSED),
    "no Host, empty Origin": (["Host:", "Origin: http://"], REFUSED),
}


@pytest.mark.parametrize(("headers", "status"), SITES.values(), ids=SITES)
def test_votes_from_pages_of_other_sites_are_refused(shared_service, take_votes, headers, status):
    assert vote(shared_service, *headers).status == status
    assert take_votes() == ["Pita"] * (status == PASSES)


def test_the_log_names_host_when_a_proxy_does_not_hand_it_on(application, caplog):
    assert vote(application, "Host: 127.0.0.1:8000", OWN).status == 403
    assert f"Origin 'http://{HOST}', Host '127.0.0.1:8000'; if both are this site, a proxy" in caplog.text


# Headers on every answer

ANSWERS = {
    "page": ("GET", "/", [], b"", 200),
    "unknown address": ("GET", "/nope", [], b"", 404),
    "our own mistake": ("GET", "/history", [], b"", 500),
}


@pytest.fixture(params=ANSWERS)
def answer(request, application, monkeypatch):
    """An answer of ANSWERS, from an application that has reason for it."""
    method, target, headers, body, status = ANSWERS[request.param]
    monkeypatch.setattr(application.catvote.history, "latest_reading", lambda: 1 / 0)
    for _ in range(2):  # what it has found out before, it may answer by a shorter way
        answer = ask(application, method, target, *headers, body=body)
        assert answer.status == status
    return answer


def test_every_answer_tells_browsers_to_be_careful(answer):
    policy = dict(directive.split(" ", 1) for directive in answer.headers["Content-Security-Policy"].split("; "))
    assert policy.pop("default-src") == policy.pop("base-uri") == policy.pop("frame-ancestors") == "'none'"
    assert {"form-action", "img-src", "style-src", "script-src", "connect-src"} == policy.keys()
    assert set(policy.values()) == {"'self'"}
    for name, value in {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    }.items():
        assert answer.headers.get_all(name) == [value]


@pytest.mark.parametrize("answer", [name for name, row in ANSWERS.items() if row[-1] >= 400], indirect=True)
def test_every_error_is_a_page_for_people_that_nobody_keeps_and_that_tells_nothing_about_the_service(answer):
    assert answer.headers["Content-Type"].lower() == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.text.startswith('<!DOCTYPE html>\n<html lang="en">')
    for element in ("title", "h1"):
        (content,) = re.findall(f"<{element}.*?>(.+?)</{element}>", answer.text)
        assert content.strip()
    telling = "Traceback|psycopg|bottle|python|[.]py|[.]tpl|division|SELECT|127[.]0"
    assert not re.search(telling, answer.text, re.IGNORECASE)


def test_only_the_card_for_links_is_shown_on_pages_of_other_sites(application):
    assert get(application, "/static/card.png?v=1").headers["Cross-Origin-Resource-Policy"] == "cross-origin"


@pytest.mark.parametrize(("scheme", "expected"), [("https", "max-age=31536000"), ("http", None)])
def test_browsers_are_told_to_stay_with_https_only_over_https(shared_service, scheme, expected):
    answer = get(shared_service, "/", f"X-Forwarded-Proto: {scheme}")
    assert answer.headers["Strict-Transport-Security"] == expected


# Too much


def test_a_body_that_is_too_long_is_413_and_costs_at_most_the_connection(shared_service, take_votes):
    too_long = write("POST", "/add", FORM, body=b"vote=Pita&a=".ljust(4097, b"a"))
    answers = [answer.status for answer in talk(shared_service, too_long + write("GET", "/tally.json"))]
    assert answers in ([413], [413, 200])
    assert take_votes() == []


LENGTHS = {
    "20 MB": ({"CONTENT_LENGTH": "20000000"}, "413"),
    "chunked": ({"HTTP_TRANSFER_ENCODING": "chunked"}, "413"),
    "none": ({}, "400"),
}


@pytest.mark.parametrize(("length", "status"), LENGTHS.values(), ids=LENGTHS)
def test_no_more_of_a_flood_is_read_than_a_vote_may_have(application, length, status):
    sizes, statuses = [], []

    class Flood:
        def read(self, size):
            sizes.append(size)
            return b"a" * size

    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/add", "wsgi.input": Flood(), **length}
    setup_testing_defaults(environ)
    application.catvote.app(environ, lambda status, *_: statuses.append(status))
    assert statuses[0].startswith(status)
    assert all(0 <= size < 5000 for size in sizes)  # a negative one would mean all
