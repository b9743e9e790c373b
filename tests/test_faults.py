"""A 303 is a promise, and nobody waits on a dead database: real faults in real processes, under load.

Those under load end in `assert_kept`, which compares what the visitors were told with the rows.
"""

import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread

import psycopg
import pytest
from client import get, vote
from conftest import missing, new_database, swift_server, template_of, unsurprised
from faults import WAITING_FOR_A_LOCK, Network, at_each_vote, backends, end_sessions, frozen, kill, recovery, sql
from load import Load, assert_kept
from local.processes import server_account, wait_until
from local.service import Service

import catvote


@pytest.fixture(scope="module")
def server():
    """A server that tests may stop: a LocalPostgres."""
    with swift_server() as server:
        yield server


@pytest.fixture
def database(server):
    """URL of a database with the schema and no votes, for one test."""
    server.start()
    with new_database(server, template_of(server)) as url:
        yield url


@pytest.fixture
def application(serve, database):
    """The application on `database`, in this process: an InProcess."""
    return serve(database)


# The server


@pytest.mark.alone
def test_no_vote_is_lost_and_pages_go_on_when_the_server_is_killed(server, database):
    with Service(database, WEB_CONCURRENCY="2") as service, Load(service, watchers=8) as load:
        load.go_on(votes=100)
        failing_at = time.monotonic()
        kill(server)
        down_at = time.monotonic()
        time.sleep(3)
        outage = down_at + 1, time.monotonic()
        server.start()
        up_at = time.monotonic()
        load.go_on(votes=200)
    recovered = recovery(load, up_at)
    assert_kept(load, service)
    assert recovered < 3
    assert {health.status for health in load.pages("/healthz", *outage)} == {503}
    known = sum(vote.ended_at < failing_at - 1 for vote in load.acknowledged)
    pages = load.pages("/", *outage)
    assert median(page.seconds for page in pages) < 0.1  # one visitor tries to read, others do not wait for that
    for page in pages:
        assert page.status == 200
        assert page.outdated
        assert page.total >= known
    assert not any(page.outdated for page in load.pages("/", up_at + 3, time.monotonic()))


def test_a_restart_that_nobody_noticed_fails_no_vote(server, database):
    with Service(database) as service:
        with Load(service, pause=0) as load, psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            wait_until(lambda: len(backends(database)) >= 2)
            connection.rollback()
        server.terminate()
        server.start()
        with Load(service) as later:
            later.go_on(votes=100)
    load.answers += later.answers
    assert_kept(load, service, statuses=(200, 303))


def test_the_service_starts_before_its_server(server, database):
    server.terminate()
    with unsurprised(Service(database)) as service:
        assert [get(service, path).status for path in ("/", "/history", "/healthz")] == [503] * 3
        time.sleep(5)  # the pool tries less and less often, unless it begins anew
        server.start()
        wait_until(lambda: vote(service).status == 303, seconds=4)
        wait_until(lambda: get(service, "/healthz").status == 200, seconds=4)


@pytest.mark.alone
def test_a_frozen_server_holds_nobody_up(server, database):
    with Service(database, WEB_CONCURRENCY="2") as service, Load(service, voters=100) as load:
        load.go_on(votes=200)
        with frozen(server.server_pid):
            time.sleep(5)  # longer than a vote may take
        thawed_at = time.monotonic()
        load.go_on(votes=400)
    recovered = recovery(load, thawed_at)
    assert_kept(load, service)
    assert recovered < 3
    assert load.unconfirmed
    assert load.not_counted


def test_a_frozen_server_process_holds_nobody_up(database):
    with Service(database) as service, Load(service, voters=1, watchers=0) as load:
        load.go_on(votes=1)
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            (pid,) = wait_until(lambda: backends(database, WAITING_FOR_A_LOCK))
            with frozen(pid):
                wait_until(lambda: load.votes[-1].unconfirmed)
        load.go_on(votes=1)
    assert_kept(load, service)


def test_a_reading_whose_server_process_is_frozen_holds_its_visitor_for_less_than_two_seconds(application, database):
    assert get(application, "/").status == 200
    time.sleep(1)  # then that is not fresh any more
    with psycopg.connect(database) as connection, ThreadPoolExecutor() as executor:
        connection.execute("LOCK TABLE tally")
        started_at = time.monotonic()
        visitor = executor.submit(get, application, "/")
        (pid,) = wait_until(lambda: backends(database, WAITING_FOR_A_LOCK))
        with frozen(pid):
            assert visitor.result().outdated
            assert time.monotonic() - started_at < 2.5  # 1.7, and room for a busy machine


def test_a_worker_has_one_connection_for_votes_one_for_the_tally_and_one_for_the_history(application, database):
    assert vote(application).status == 303
    assert len(backends(database)) == 1  # none before it is needed
    with ThreadPoolExecutor(30) as visitors, psycopg.connect(database) as connection:
        connection.execute("LOCK TABLE votes, tally")
        for _ in range(10):
            visitors.submit(vote, application)
            visitors.submit(get, application, "/")
            visitors.submit(get, application, "/history")
        wait_until(lambda: len(backends(database, WAITING_FOR_A_LOCK)) == 3)
        most = 3
        while backends(database, WAITING_FOR_A_LOCK):
            time.sleep(0.05)
            most = max(most, len(backends(database)))
    assert most == 3


# Sessions that began under settings which have changed since


def test_votes_count_soon_after_the_database_takes_them_again(server, application, database):
    alter = f"ALTER DATABASE {database.rpartition('/')[2]}"
    sql(server.url(), f"{alter} SET default_transaction_read_only = on")
    assert vote(application).not_counted
    assert get(application, "/healthz").status == 200
    stale = {*backends(database)}
    sql(server.url(), f"{alter} RESET default_transaction_read_only")
    wait_until(lambda: vote(application).status == 303, seconds=5)
    for target in "/?voted=Pita", "/healthz", "/history":
        assert get(application, target).status == 200
    assert [vote(application).status for _ in range(3)] == [303, 303, 303]
    assert not stale & {*backends(database)}  # pages have left them, too: they may be another server's


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
def test_a_vote_that_lost_against_another_is_tried_again(application, database, sqlstate):
    sql(database, "CREATE SEQUENCE tries")
    at_each_vote(database, f"IF nextval('public.tries') = 1 THEN RAISE 'lost' USING ERRCODE = '{sqlstate}'; END IF")
    assert vote(application).status == 303
    assert sql(database, "SELECT vote FROM votes") == [("Pita",)]


def test_a_vote_that_always_loses_is_tried_a_hundred_times_a_second_and_not_cancelled(
    application, database, monkeypatch
):
    cancelled = []
    monkeypatch.setattr(application.catvote.Connection, "cancel_safe", lambda *_, **__: cancelled.append(1))
    sql(database, "CREATE SEQUENCE tries")
    at_each_vote(database, "PERFORM nextval('public.tries'); RAISE 'lost' USING ERRCODE = '40001'")
    assert vote(application).not_counted
    assert 10 < sql(database, "SELECT last_value FROM tries")[0][0] <= 201  # in two seconds
    assert len(cancelled) <= 1  # the last one may be late


# The way to the server


def test_a_network_that_forgets_and_connects_slowly_costs_nobody_anything(serve, database, caplog):
    with Network(database, delay=0.7, forgets_after=1.5) as network, ThreadPoolExecutor(2) as visitors:
        application = serve(network.url)
        application.catvote.UNUSED_TOO_LONG = 2
        for votes in 1, 2:
            page = visitors.submit(get, application, "/")
            history = visitors.submit(get, application, "/history")
            started_at = time.monotonic()
            assert vote(application).status == 303
            assert get(application, "/?voted=Pita").votes["Pita"] == votes
            for answer in page.result(), history.result():
                assert answer.status == 200
                assert not answer.outdated
            assert time.monotonic() - started_at < 2
            if votes == 1:
                time.sleep(3)
                assert network.forgotten
    assert "database: " not in caplog.text


def test_a_connection_is_kept_while_it_is_used(application, database):
    application.catvote.UNUSED_TOO_LONG = 2
    used = set()
    for pause in 1.1, 1.1, 1.1, 2.2:
        assert vote(application).status == 303
        used |= {*backends(database)}
        assert len(used) == 1
        time.sleep(pause)
    assert vote(application).status == 303
    assert not used & {*backends(database)}


def test_no_connection_is_kept_for_more_than_five_minutes_since_its_server_may_have_become_a_standby(application):
    assert application.catvote.pool().max_lifetime == 300


def test_a_server_that_never_answered_is_asked_again(database):
    with (
        Network(database, delay=40) as network,
        unsurprised(Service(network.url)) as service,
    ):
        for target in "/", "/history":
            assert get(service, target).status == 503
        assert vote(service).not_counted
        network.delay = 0
        wait_until(lambda: vote(service).status == 303, seconds=10)


@pytest.fixture
def voter(server, database):
    """Name of a role that may only vote and read, but has no connection left; `database` is its as well."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            """
            CREATE ROLE voter LOGIN PASSWORD 'donut' CONNECTION LIMIT 0;
            GRANT INSERT ON votes TO voter;
            GRANT SELECT ON vote_totals, votes_by_hour TO voter;
            """
        )
        yield "voter"
        end_sessions(database)
        connection.execute("DROP OWNED BY voter; DROP ROLE voter")


def test_a_server_that_has_no_connection_left_is_said_to_and_used_as_soon_as_it_has(database, voter):
    place = database.partition("@")[2]
    with unsurprised(Service(f"postgresql://{voter}:donut@{place}")) as service:
        assert vote(service).not_counted
        assert get(service, "/").status == 503
        assert "too many connections" in service.log
        sql(database, "ALTER ROLE voter CONNECTION LIMIT 3")
        wait_until(lambda: vote(service).status == 303, seconds=5)
        wait_until(lambda: get(service, "/?voted=Pita").votes == {"Gummi": 0, "Pita": 1}, seconds=5)


@pytest.fixture(scope="module")
def tls_server():
    """A server that speaks TLS: a LocalPostgres."""
    if not shutil.which("openssl"):
        missing("no openssl: apt-get install openssl")
    with TemporaryDirectory(dir="/tmp") as folder:
        key, certificate = Path(folder, "key"), Path(folder, "certificate")
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=catvote.example"]
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        if account := server_account():
            for path in folder, key, certificate:
                os.chown(path, account["user"], account["group"])
        with swift_server(ssl="on", ssl_key_file=str(key), ssl_cert_file=str(certificate)) as server:
            yield server


@pytest.fixture
def unreadable_home(tmp_path):
    """A HOME whose certificate cannot be read, as that of a user one is not; not even by root, since it leads nowhere."""
    (tmp_path / ".postgresql").mkdir()
    for name in "postgresql.crt", "postgresql.key":
        (tmp_path / ".postgresql" / name).symlink_to(name)
    return str(tmp_path)


@pytest.mark.parametrize("mode", ["", "?sslmode=require"])
def test_the_way_to_the_database_is_encrypted_whatever_is_in_home(tls_server, unreadable_home, mode, monkeypatch):
    monkeypatch.setenv("HOME", unreadable_home)
    with new_database(tls_server) as url:
        catvote.initdb(url + mode)
        with unsurprised(Service(url + mode, HOME=unreadable_home)) as service:
            assert vote(service).status == 303
            assert get(service, "/healthz").status == 200
            encrypted = "pid IN (SELECT pid FROM pg_stat_ssl WHERE ssl)"
            assert backends(url) == backends(url, encrypted) != []


def test_a_certificate_that_the_environment_names_is_shown_to_the_database(monkeypatch):
    monkeypatch.setenv("PGSSLCERT", "own.crt")
    assert "sslcert=own.crt" in catvote.connection_settings("")


# The service


def test_a_worker_that_lacked_threads_reaches_the_database_when_it_has_them(application, database, monkeypatch):
    def start(thread, start=Thread.start):
        if not thread.name.endswith("scheduler"):  # the pool's first
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", start)
        assert vote(application).not_counted
        assert get(application, "/").status == 503
    wait_until(lambda: get(application, "/").status == 200, seconds=5)
    assert vote(application).status == 303
    assert sql(database, "SELECT vote FROM votes") == [("Pita",)]


def test_visitors_who_come_first_together_share_a_pool(application, monkeypatch):
    pools, open_pool = [], application.catvote.open_pool

    def open_slowly():
        time.sleep(0.2)
        pools.append(open_pool())
        return pools[-1]

    monkeypatch.setattr(application.catvote, "open_pool", open_slowly)
    with ThreadPoolExecutor(3) as visitors:
        answers = visitors.map(lambda target: get(application, target), ["/", "/history", "/healthz"])
        assert [answer.status for answer in answers] == [200] * 3
    assert len(pools) == 1


def test_a_worker_that_has_asked_the_database_ends_at_once(service):
    assert get(service, "/").status == 200
    started_at = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started_at < 4


def test_sigterm_lets_every_request_have_its_answer(database):
    with Service(database, WEB_CONCURRENCY="2") as service, Load(service) as load:
        load.go_on(votes=50)
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            wait_until(lambda: len(backends(database, WAITING_FOR_A_LOCK)) == 2)
            service.process.terminate()
            wait_until(lambda: load.answers[-1].status < 200)  # it has stopped listening
        assert service.stop() == 0
        wait_until(lambda: not backends(database), seconds=2)
    assert_kept(load, service, statuses=(-1, 0, 200, 303, 503))
    assert not load.unconfirmed
    # Connections that nobody had accepted yet were broken off; no vote was stored that came so.
    assert not [answer for answer in load.answers if answer.status == 0 and answer.kept]
    assert sql(database, "SELECT count(*) FROM votes") == [(len(load.acknowledged),)]


def test_a_reload_and_a_second_instance_fail_no_request_and_share_the_tally(database):
    with (
        Service(database, WEB_CONCURRENCY="2") as service,
        Service(database, WEB_CONCURRENCY="2") as second,
        Load(service, second) as load,
    ):
        before = {*service.workers(), *second.workers()}
        for instance in service, second:
            load.go_on(votes=50)
            instance.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not before & {*service.workers(), *second.workers()})
        load.go_on(votes=100)
    assert_kept(load, service, statuses=(200, 303))
