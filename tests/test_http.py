"""What the service answers: pages, votes, files, what browsers keep, and how old a tally may be."""

import mimetypes
import re
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from wsgiref.util import setup_testing_defaults

import bottle
import psycopg
import pytest
from client import FORM, ask, chunked, get, vote
from conftest import unsurprised
from faults import WAITING_FOR_A_LOCK, backends, end_sessions
from local import ROOT
from local.processes import wait_until
from local.service import Service, free_port

# Pages


def test_the_page_shows_the_votes_and_is_always_asked_for_again(application, shared_connection):
    shared_connection.execute("INSERT INTO votes (vote) SELECT 'Gummi' FROM generate_series(1, 1234)")
    answer = get(application, "/")
    assert answer.status == 200
    assert answer.votes == {"Gummi": 1234, "Pita": 0}
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(("voted", "thanked"), [("Pita", True), ("Garfield", False)])
def test_who_has_voted_for_a_known_cat_is_thanked_and_nobody_else(application, voted, thanked):
    answer = get(application, f"/?voted={voted}")
    assert answer.status == 200
    assert bool(re.search('role="status".*Pita', answer.text)) == thanked
    assert ('role="status"' in answer.text) == thanked


def test_tally_json_is_the_tally(application, shared_connection):
    shared_connection.execute("INSERT INTO votes (vote) VALUES ('Pita'), ('Pita')")
    answer = get(application, "/tally.json")
    assert answer.text == '{"Gummi": 0, "Pita": 2}'
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Age"] is None


def test_errors_of_tally_json_are_json(application):
    answer = ask(application, "POST", "/tally.json")
    assert answer.status == 405
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.text == '{"error": "405 Method Not Allowed"}'


def test_healthz_is_ok_while_tally_and_history_can_be_read(application):
    answer = get(application, "/healthz")
    assert (answer.status, answer.text) == (200, "ok\n")
    assert answer.headers["Content-Type"] == "text/plain"
    assert answer.headers["Cache-Control"] == "no-store"


def test_without_a_database_the_answer_is_503(serve, caplog):
    application = serve(f"postgresql://127.0.0.1:{free_port()}/catvote")
    with ThreadPoolExecutor(2) as visitors:  # one tries to read, one waits for that
        for answer in visitors.map(lambda _: get(application, "/"), range(2)):
            assert answer.status == 503
            assert "We had no answer from our database in time" in answer.text
            assert "your vote was not counted" not in answer.text  # whoever only looks has cast none
            assert int(answer.headers["Retry-After"]) > 0
    assert "the database is away, or connecting to it takes too long" in caplog.text


def test_without_the_address_of_a_database_a_vote_is_not_counted_and_the_log_says_why(application, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setenv("DATABASE_URL", "")
        assert vote(application).not_counted
    assert "DATABASE_URL is not set" in caplog.text


@pytest.mark.parametrize("target", ["/static/../catvote.py", "/static/nope?v=1", "/%FF"])
def test_an_unknown_address_is_404(application, target):
    assert get(application, target).status == 404


@pytest.mark.parametrize(("method", "target", "allowed"), [("POST", "/", "GET, HEAD"), ("GET", "/add", "POST")])
def test_a_wrong_method_is_405_with_the_right_ones(application, method, target, allowed):
    for _ in range(2):
        answer = ask(application, method, target)
        assert answer.status == 405
        assert answer.headers["Allow"] == allowed
        get(application, target)  # so that the answer to GET is in memory


@pytest.mark.parametrize("target", ["/", "{newest}"])
def test_head_is_get_without_the_body(application, target):
    target, heads = target.format(newest=application.catvote.static_url("pita.svg")), {}
    for method in "GET", "HEAD":
        answer = ask(application, method, target)
        assert answer.status == 200
        heads[method] = {name: value for name, value in answer.headers.items() if name != "Date"}
    assert heads["GET"] == heads["HEAD"]


def test_a_server_may_leave_out_an_empty_path(application):
    environ, statuses = {}, []
    setup_testing_defaults(environ)
    del environ["PATH_INFO"]
    application.catvote.app(environ, lambda status, *_: statuses.append(status))
    assert statuses == ["200 OK"]


# What browsers keep


@pytest.mark.parametrize("target", ["/", "/?voted=Pita", "/static/pita.svg?v=0"])
def test_who_has_the_latest_gets_304(application, target):
    first = get(application, target)
    tag = first.headers["ETag"]
    assert re.fullmatch('"[0-9a-f]+"', tag)
    for known in tag, f"W/{tag}", f'"other", {tag}', "*":
        answer = get(application, target, f"If-None-Match: {known}")
        assert answer.status == 304
        assert answer.headers["ETag"] == tag
        assert answer.headers["Cache-Control"] == first.headers["Cache-Control"] == "no-cache"
    assert get(application, target, 'If-None-Match: "other"').status == 200


def links(page):
    """Return the addresses of the static files that a page names."""
    return set(re.findall('(?:src|href)="(/static/.*?)"', page.text))


def test_the_page_names_static_files_by_their_present_version_which_is_kept_for_a_year(application):
    names = links(get(application, "/"))
    assert any("pita.svg?v=" in name for name in names)
    for name in names:
        answer = get(application, name)
        assert answer.status == 200
        assert answer.headers["Cache-Control"] == "max-age=31536000, immutable"


@pytest.fixture(scope="module")
def changed_service(shared_database, tmp_path_factory):
    """The service of a copy of the project, with another picture: in a folder, of an odd name, and of no known type."""
    copy = tmp_path_factory.mktemp("copy") / "catvote"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "tests"))
    (copy / "static/donuts").mkdir()
    (copy / "static/donuts/żółw #1").write_text("<svg/>")
    module = (copy / "catvote.py").read_text()
    (copy / "catvote.py").write_text(module.replace('"pita.svg"', '"donuts/żółw #1"'))
    with unsurprised(Service(shared_database, folder=copy)) as service:
        yield service


def test_a_static_file_may_have_any_name_and_lie_in_a_folder(changed_service):
    (name,) = [name for name in links(get(changed_service, "/")) if "donuts" in name]
    answer = get(changed_service, name)
    assert (answer.status, answer.text) == (200, "<svg/>")
    assert answer.headers["Content-Type"] == "application/octet-stream"


def test_a_static_file_has_the_type_of_its_name_whatever_this_machine_knows(serve, shared_database, monkeypatch):
    monkeypatch.setitem(mimetypes.types_map, ".svg", "text/plain")
    assert get(serve(shared_database), "/static/pita.svg").headers["Content-Type"] == "image/svg+xml"


def test_the_version_of_static_files_changes_with_their_content(application, changed_service):
    assert not links(get(application, "/")) & links(get(changed_service, "/"))


def test_the_version_is_the_same_on_machines_that_list_files_in_another_order(application, tmp_path):
    for name in "dbface":
        (tmp_path / name).touch()
    assert application.catvote.visible_files(tmp_path) == [tmp_path / name for name in "abcdef"]


def test_hidden_files_are_no_static_files(application, tmp_path):
    folder = tmp_path / ".clones/static"  # where the project itself lies does not matter
    (folder / ".git").mkdir(parents=True)
    for name in "pita.svg", ".DS_Store", ".git/config":
        (folder / name).touch()
    assert application.catvote.visible_files(folder) == [folder / "pita.svg"]


# Votes

MULTIPART = "Content-Type: multipart/form-data; boundary=icing"
CHUNKED = "Transfer-Encoding: chunked"
PART = b'--icing\r\nContent-Disposition: form-data; name="vote"\r\n\r\nPita\r\n'
END = b"--icing--\r\n"

GOOD_VOTES = {
    "as long as it may be": ([FORM], b"vote=Pita&a=".ljust(4096, b"a")),
    "chunked": ([FORM, CHUNKED], chunked(b"vote=Pita")),
}


@pytest.mark.parametrize(("headers", "body"), GOOD_VOTES.values(), ids=GOOD_VOTES)
def test_a_vote_is_stored_once_and_answered_with_303_to_the_page(shared_service, take_votes, headers, body):
    answer = ask(shared_service, "POST", "/add", *headers, body=body)
    assert answer.status == 303
    assert answer.headers["Location"] == "/?voted=Pita"
    assert answer.headers["Cache-Control"] == "no-store"
    assert take_votes() == ["Pita"]


BAD_VOTES = {
    "two": ([FORM], b"vote=Pita&vote=Gummi"),
    "not UTF-8": ([FORM], b"vote=%FF"),
    "multipart, broken off in the next part": ([MULTIPART], PART + PART[:-6]),
    "multipart, unknown charset": (
        [MULTIPART],
        PART.replace(b"\r\n\r\n", b"\r\nContent-Type: a/b; charset=no\r\n\r\n") + END,
    ),
    "chunked, broken off": ([FORM, CHUNKED], b"9\r\nvote=Pita\r\n"),
    "shorter than its Content-Length": ([FORM, "Content-Length: 10"], b"vote=Pita"),
}


@pytest.mark.parametrize(("headers", "body"), BAD_VOTES.values(), ids=BAD_VOTES)
def test_a_bad_vote_is_400_and_not_stored(shared_service, take_votes, headers, body):
    assert ask(shared_service, "POST", "/add", *headers, body=body).status == 400
    assert take_votes() == []


@contextmanager
def votes_held_up(application, database, cats):
    """Cast votes for these cats while the first of them is held up: for the block, which gets their futures."""
    with ThreadPoolExecutor(len(cats)) as voters, psycopg.connect(database) as connection:
        connection.execute("LOCK TABLE votes")
        answers = [voters.submit(vote, application, body=f"vote={cats[0]}".encode())]
        wait_until(application.catvote.vote_store.turn.locked)
        answers += [voters.submit(vote, application, body=f"vote={cat}".encode()) for cat in cats[1:]]
        wait_until(lambda: len(application.catvote.vote_store.next_batch.votes) == len(cats) - 1)
        yield connection, answers


def test_votes_that_come_while_one_is_stored_are_stored_together(application, shared_database, shared_connection):
    with votes_held_up(application, shared_database, ["Pita"] * 20) as (connection, answers):
        connection.rollback()
    assert {answer.result().status for answer in answers} == {303}
    together = shared_connection.execute("SELECT count(*) FROM votes GROUP BY xmin::text ORDER BY 1").fetchall()
    assert together == [(1,), (19,)]


def test_votes_that_are_stored_together_share_their_fate(application, shared_database):
    with votes_held_up(application, shared_database, ["Pita"] * 5) as (_, answers):
        for _ in range(2):  # the first, then the others
            wait_until(lambda: backends(shared_database, WAITING_FOR_A_LOCK))
            end_sessions(shared_database)  # they have the votes, and nobody says whether they stored them
    assert [answer.result().unconfirmed for answer in answers] == [True] * 5


def test_votes_that_join_slowly_are_stored_once_each(application, take_votes):
    class SlowVotes(list):
        def append(self, vote):
            time.sleep(0.2)
            super().append(vote)

    application.catvote.vote_store.next_batch.votes = SlowVotes()
    with ThreadPoolExecutor(2) as voters:
        with application.catvote.vote_store.turn:
            answers = [voters.submit(vote, application) for _ in range(2)]
            time.sleep(0.3)  # the first leads, and could close the batch while the second joins it
        assert [answer.result().status for answer in answers] == [303, 303]
    assert take_votes() == ["Pita"] * 2


def test_a_cat_that_is_gone_spoils_no_other_vote(serve, database, connection):
    application, cats = serve(database), ["Gummi", "Pita"] * 8
    connection.execute("ALTER TABLE votes DROP CONSTRAINT votes_vote_is_a_cat, ADD CHECK (vote = 'Gummi')")
    assert vote(application).status == 400
    with votes_held_up(application, database, cats) as (lock, answers):
        time.sleep(0.5)  # a refused vote does not make those who wait impatient
        lock.rollback()
    assert [answer.result().status for answer in answers] == [303, 400] * 8


def test_votes_that_are_tried_by_themselves_keep_to_the_deadline_that_they_had_together(serve, database, connection):
    application = serve(database)
    connection.execute("""
        ALTER TABLE votes DROP CONSTRAINT votes_vote_is_a_cat, ADD CHECK (vote = 'Gummi');
        CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.7); RETURN NULL; END $$;
        CREATE TRIGGER dawdle BEFORE INSERT ON votes FOR EACH STATEMENT EXECUTE FUNCTION dawdle();
    """)
    troubles = application.catvote.insert(["Gummi", "Pita"])
    assert troubles == {"Gummi": None, "Pita": application.catvote.Trouble.NOT_IN_TIME}


def test_whatever_goes_wrong_every_voter_hears_of_it(application, shared_database, monkeypatch):
    with monkeypatch.context() as patch:
        with votes_held_up(application, shared_database, ["Pita"] * 5) as (connection, answers):
            patch.setattr(application.catvote, "insert", lambda votes: 1 / 0)
            connection.rollback()
        told = Counter(answer.result().unconfirmed for answer in answers if answer.result().status != 303)
    assert told == {True: 3, False: 1}  # the leader gets 500
    assert vote(application).status == 303


def test_votes_wait_for_a_turn_for_a_while_and_hardly_after_one_has_failed(application, shared_database, take_votes):
    started_at = time.monotonic()
    with (
        votes_held_up(application, shared_database, ["Pita"] * 5) as (lock, answers),
        ThreadPoolExecutor(1) as voters,
    ):
        for answer in answers:
            assert "We had no answer from our database in time: your vote was not counted" in answer.result().text
        assert time.monotonic() - started_at < 3.5  # no second statement was tried meanwhile
        first = voters.submit(vote, application)
        wait_until(application.catvote.vote_store.turn.locked)
        started_at = time.monotonic()
        assert vote(application).not_counted
        assert time.monotonic() - started_at < 1.4
        lock.rollback()
        assert first.result().status == 303
    with votes_held_up(application, shared_database, ["Pita"] * 2) as (lock, answers):
        time.sleep(0.5)
        lock.rollback()
    assert [answer.result().status for answer in answers] == [303, 303]
    assert take_votes() == ["Pita"] * 3  # those that were not counted are not stored later either


# Fresh enough, and honest


def test_a_voter_sees_votes_that_another_worker_has_stored(application, shared_connection):
    get(application, "/")
    shared_connection.execute("INSERT INTO votes (vote) VALUES ('Pita')")
    assert get(application, "/?voted=Pita").votes["Pita"] == 1


def test_thanks_beside_a_tally_that_may_lack_the_vote_say_that_it_is_old(application):
    get(application, "/")
    application.catvote.tally.statement = "SELECT 1 / 0"
    assert get(application, "/?voted=Pita").outdated


def test_no_tally_is_older_than_a_second(application, shared_connection):
    assert get(application, "/").votes["Pita"] == 0
    shared_connection.execute("INSERT INTO votes (vote) VALUES ('Pita')")
    time.sleep(1)
    assert get(application, "/").votes["Pita"] == 1


@pytest.fixture
def readings(application, monkeypatch):
    """Moments at which the application, in this process, has read the tally."""
    moments, read = [], application.catvote.tally.read
    monkeypatch.setattr(
        application.catvote.tally, "read", lambda deadline: moments.append(time.monotonic()) or read(deadline)
    )
    return moments


def test_more_visitors_do_not_read_the_database_more_often(application, readings):
    started_at = time.monotonic()
    with ThreadPoolExecutor(8) as visitors:
        answers = list(visitors.map(lambda number: get(application, f"/?utm_source={number}"), range(200)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1
    assert 1 <= len(readings) <= 1 + (time.monotonic() - started_at) / 0.8


def test_voters_who_come_together_share_a_reading_also_after_one_that_failed(application, readings):
    statement = application.catvote.tally.statement
    application.catvote.tally.statement = "SELECT 1 / 0"
    assert get(application, "/").status == 503
    application.catvote.tally.statement = f"{statement} WHERE (SELECT pg_sleep(0.2)) IS NOT NULL"
    wait_until(lambda: get(application, "/").status == 200)
    readings.clear()
    with ThreadPoolExecutor(20) as visitors:
        pages = list(visitors.map(lambda _: get(application, "/?voted=Pita"), range(20)))
    assert not any(page.outdated for page in pages)
    assert len(readings) <= 4


@pytest.mark.parametrize("target", ["/", "/?voted=Pita"])
def test_a_page_is_made_once_for_each_reading_and_once_more_when_that_is_outdated(
    application, readings, monkeypatch, target
):
    made, render = [], application.catvote.render

    def count(*name, **values):
        made.append(name)
        time.sleep(0.1)  # so that others come meanwhile
        return render(*name, **values)

    monkeypatch.setattr(application.catvote, "render", count)
    for outdated in False, True:
        with ThreadPoolExecutor(8) as visitors:
            pages = list(visitors.map(lambda _: get(application, target), range(30)))
        assert all(page.outdated == outdated for page in pages)
        if not outdated:
            assert len(made) <= len(readings)
            application.catvote.tally.statement = "SELECT 1 / 0"
            time.sleep(1)
            made.clear()
    assert len(made) == 1


def test_pages_that_are_fresh_and_files_are_sent_again_without_routing(application, monkeypatch):
    application.catvote.tally.fresh = 60
    targets = ["/", "/tally.json", "/history", application.catvote.static_url("pita.svg")]
    for target in targets:
        get(application, target)
    monkeypatch.setattr(application.catvote, "routes", lambda *_: 1 / 0)
    assert [get(application, target).status for target in targets] == [200] * 4


def test_a_template_is_compiled_once(application):
    get(application, "/nope")
    compiled = [*bottle.TEMPLATES.values()]
    get(application, "/nope")
    assert compiled == [*bottle.TEMPLATES.values()]


def test_while_somebody_reads_a_fresh_tally_will_do_for_all_but_voters(application):
    tally = application.catvote.tally
    tally.fresh = 60
    get(application, "/")
    with tally.turn:
        started_at = time.monotonic()
        assert not get(application, "/?utm_source=1").outdated
        assert time.monotonic() - started_at < 0.8
        assert get(application, "/?voted=Pita").outdated


@pytest.mark.alone
def test_while_a_reading_hangs_one_visitor_waits_and_the_others_get_the_last_one(application, shared_database):
    known = get(application, "/").votes
    assert get(application, "/healthz").status == 200
    with psycopg.connect(shared_database) as connection, ThreadPoolExecutor(10) as visitors:
        connection.execute("LOCK TABLE tally")
        time.sleep(1)
        for others_wait in 1, 0.4:  # as long as they do not know that an attempt has failed, and then
            seconds = []

            def visit(_, seconds=seconds):
                started_at = time.monotonic()
                page = get(application, "/")
                seconds.append(time.monotonic() - started_at)
                return page

            for page in visitors.map(visit, range(10)):
                assert page.outdated
                assert page.votes == known
            *others, slowest = sorted(seconds)
            assert 1 < slowest < 2
            assert max(others) < others_wait
        assert get(application, "/healthz").status == 503
        outdated = get(application, "/tally.json")
        assert outdated.headers["Content-Type"] == "application/json"
        assert int(outdated.headers["Age"]) >= 1
        assert outdated.headers["Cache-Control"] == "no-store"
    wait_until(lambda: not get(application, "/").outdated, seconds=2)


def test_what_took_long_to_read_is_marked_and_no_reason_to_call_the_service_ill(application, shared_connection):
    shared_connection.execute("INSERT INTO votes (vote) VALUES ('Pita')")
    history = application.catvote.history
    history.fresh = 0.2
    history.statement = f"SELECT * FROM ({history.statement}) AS rows WHERE (SELECT pg_sleep(0.4)) IS NOT NULL"
    assert get(application, "/history").outdated
    assert get(application, "/healthz").status == 200


def test_an_error_is_not_met_with_again_at_each_visit(serve, empty_database, caplog):
    application, started_at = serve(empty_database), time.monotonic()
    for _ in range(5):
        assert get(application, "/").status == 503
    assert 1 <= caplog.text.count("database: ") <= 1 + (time.monotonic() - started_at) / 0.2


# Settings


def test_previews_in_chats_name_the_address_that_is_set(serve, shared_database):
    page = get(serve(shared_database, SITE_URL=" https://cats.example/\n"), "/").text
    assert 'property="og:url" content="https://cats.example/"' in page
    assert 'property="og:image" content="https://cats.example/static/card.png?' in page


@pytest.mark.parametrize(("value", "shown"), [("TRUE", True), ("0", False)])
def test_only_developers_see_a_traceback(serve, shared_database, monkeypatch, value, shown):
    application = serve(shared_database, DEVELOPMENT=value)
    monkeypatch.setattr(application.catvote.tally, "latest_reading", lambda: 1 / 0)
    answer = get(application, "/")
    assert answer.status == 500
    assert ("ZeroDivisionError" in answer.text) == shown
    assert "There is no such page" in get(application, "/nope").text  # our page, which developers want to see
