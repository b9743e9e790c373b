"""A 303 is a promise, and nobody waits on a dead database: real faults in real processes, under load.

Each test ends in `verify`, which compares what the visitors were told with the rows.
"""

import os
import signal
import socket
import subprocess
import time
from statistics import median

import psutil
import psycopg
import pytest
from conftest import new_database
from faults import backends, frozen, kill, recovery, sql, wait_until, workers
from load import Load
from local.postgres import ROOT, LocalPostgres, apply_schema
from local.service import Service


@pytest.fixture(scope="module")
def server():
    """A server that waits for the disk, as one in production does, and that tests may stop."""
    with LocalPostgres(durable=True) as server:
        yield server


@pytest.fixture
def database(server):
    """URL of a database with the schema and no votes, for one test."""
    server.start()
    with new_database(server) as url:
        apply_schema(url)
        yield url


# The server


@pytest.mark.parametrize("stop", [kill, LocalPostgres.terminate], ids=["killed", "restarted"])
def test_no_vote_is_lost_and_pages_go_on_when_the_server_is(server, database, verify, stop):
    with Service(database) as service, Load(service, watchers=8) as load:
        time.sleep(2)
        failing_at = time.monotonic()
        stop(server)
        down_at = time.monotonic()
        time.sleep(4)
        outage = down_at + 1, time.monotonic()
        server.start()
        up_at = time.monotonic()
        time.sleep(4)
    recovered = recovery(load, up_at)
    verify(load, service, page_seconds=2, recovered=f"{recovered:.1f} s")
    assert recovered < 3
    assert {health.status for health in load.pages("/healthz", *outage)} == {503}
    known = sum(vote.ended_at < failing_at - 1 for vote in load.acknowledged)
    pages = load.pages("/", *outage)
    assert median(page.seconds for page in pages) < 0.1  # one visitor tries to read, others do not wait for that
    for page in pages:
        assert page.status == 200
        assert page.outdated
        assert page.total >= known > 0
    assert not any(page.outdated for page in load.pages("/", up_at + 3, time.monotonic()))


def test_a_restart_that_nobody_noticed_fails_no_vote(server, database, verify):
    with Service(database) as service:
        with Load(service, pause=0) as load, psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            # Two for votes and one for pages, of a worker if not of both.
            wait_until(lambda: len(backends(database)) >= 3)
            connection.rollback()
        server.terminate()
        server.start()
        with Load(service) as later:
            time.sleep(2)
    load.answers += later.answers
    verify(load, service, statuses=(200, 303))


def test_the_service_starts_before_its_server(server, database, verify):
    server.terminate()
    started_at = time.monotonic()
    with Service(database) as service, Load(service, watchers=30) as load:
        listening_at = time.monotonic()
        time.sleep(4)
        outage = started_at, time.monotonic()
        server.start()
        up_at = time.monotonic()
        time.sleep(4)
    recovered = recovery(load, up_at)
    verify(load, service, page_seconds=4, recovered=f"{recovered:.1f} s")
    assert listening_at - started_at < 10
    assert recovered < 3
    assert {health.status for health in load.pages("/healthz", *outage)} == {503}
    pages = load.pages("/", *outage)
    assert pages
    assert all(page.status == 503 and "</html>" in page.text for page in pages)


def test_a_frozen_server_holds_nobody_up(server, database, verify):
    with Service(database) as service, Load(service, voters=100) as load:
        time.sleep(2)
        with frozen(server.server_pid):
            time.sleep(9)  # longer than a vote may take
        thawed_at = time.monotonic()
        time.sleep(4)
    recovered = recovery(load, thawed_at)
    figures = verify(load, service, page_seconds=2, recovered=f"{recovered:.1f} s")
    assert recovered < 3
    assert figures["unconfirmed"] > 0
    assert figures["not counted"] > 0


def test_a_locked_table_delays_votes_only_and_stores_none_later(database, verify):
    with Service(database) as service, Load(service) as load:
        time.sleep(1)
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            locked_at = time.monotonic()
            time.sleep(9)  # longer than a vote may take
        freed_at = time.monotonic()
        time.sleep(2)
    recovered = recovery(load, freed_at)
    figures = verify(load, service, page_seconds=2, recovered=f"{recovered:.1f} s")
    assert recovered < 1
    assert figures["unconfirmed"] == 0
    assert not any(page.outdated for page in load.pages("/", locked_at, freed_at))
    assert "canceling statement" in service.log


def test_a_read_only_server_counts_no_vote(server, database, verify):
    with Service(database) as service, Load(service) as load:
        time.sleep(1)
        sql(server.url(), "ALTER SYSTEM SET default_transaction_read_only = on")
        sql(server.url(), "SELECT pg_reload_conf()")
        time.sleep(2)
        read_only = load.votes[-100:]
        sql(server.url(), "ALTER SYSTEM RESET default_transaction_read_only")
        sql(server.url(), "SELECT pg_reload_conf()")
        writable_at = time.monotonic()
        time.sleep(3)
    recovered = recovery(load, writable_at)
    verify(load, service, recovered=f"{recovered:.1f} s")
    assert recovered < 3
    assert all(vote.not_counted for vote in read_only)


def test_a_vote_whose_server_process_died_could_not_be_confirmed(server, database, verify):
    with Service(database) as service, Load(service, voters=1, watchers=0) as load:
        wait_until(lambda: load.acknowledged)
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            (pid,) = wait_until(lambda: backends(database, "wait_event_type = 'Lock'"))
            psutil.Process(pid).suspend()
        psutil.Process(pid).kill()  # it has the vote and may have stored it: only the server knows
        wait_until(lambda: load.votes[-1].status != 303)
        died = load.votes[-1]
        wait_until(lambda: load.votes[-1].status == 303)
    verify(load, service)
    assert died.unconfirmed


def test_a_frozen_server_process_holds_nobody_up(database, verify):
    with Service(database) as service, Load(service, voters=1, watchers=0) as load:
        wait_until(lambda: load.acknowledged)
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            (pid,) = wait_until(lambda: backends(database, "wait_event_type = 'Lock'"))
            with frozen(pid):
                wait_until(lambda: load.votes[-1].unconfirmed)
        wait_until(lambda: load.votes[-1].status == 303)
    figures = verify(load, service)
    assert float(figures["slowest vote"].split()[0]) < 4


def test_votes_that_are_stored_together_share_their_fate(database, verify):
    with Service(database, WEB_CONCURRENCY="1") as service, Load(service, voters=16, watchers=0) as load:
        wait_until(lambda: load.acknowledged)
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            wait_until(lambda: len(backends(database, "wait_event_type = 'Lock'")) == 2)
            for pid in backends(database, "wait_event_type = 'Lock'"):
                sql(database, "SELECT pg_terminate_backend(%s)", pid)
            wait_until(lambda: any(vote.unconfirmed for vote in load.votes))
        wait_until(lambda: load.votes[-1].status == 303)
    assert verify(load, service)["unconfirmed"] > 2


def test_make_initdb_runs_three_times_under_load(database, verify):
    with Service(database) as service, Load(service) as load:
        for _ in range(3):
            time.sleep(1)
            variables = {**os.environ, "DATABASE_URL": database}
            subprocess.run(["make", "initdb"], cwd=ROOT, env=variables, capture_output=True, check=True)
        time.sleep(1)
    verify(load, service, statuses=(200, 303))
    assert sql(database, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]


# The service


def test_killed_workers_are_replaced(database, verify):
    with Service(database) as service, Load(service) as load:
        for _ in range(3):
            time.sleep(2)
            workers(service)[0].kill()
        killed_at = time.monotonic()
        time.sleep(2)
        wait_until(lambda: len(workers(service)) == 2)
    recovered = recovery(load, killed_at)
    verify(load, service, statuses=(0, 200, 303), recovered=f"{recovered:.1f} s")
    assert recovered < 3


def test_sigterm_lets_every_request_have_its_answer(database, verify):
    with Service(database) as service, Load(service) as load:
        time.sleep(1)
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            wait_until(lambda: len(backends(database, "wait_event_type = 'Lock'")) >= 2)
            service.process.terminate()
            time.sleep(0.5)
        asked_at = time.monotonic()
        assert service.stop() == 0
        seconds = time.monotonic() - asked_at
        wait_until(lambda: not backends(database), seconds=2)
    figures = verify(load, service, statuses=(-1, 0, 200, 303, 503), ended=f"{seconds:.1f} s")
    assert seconds < 30
    assert figures["unconfirmed"] == 0
    # Connections that nobody had accepted yet were broken off; no vote was stored that came so.
    assert not [answer for answer in load.answers if answer.status == 0 and answer.kept]
    assert sql(database, "SELECT count(*) FROM votes") == [(len(load.acknowledged),)]


def test_a_reload_and_a_second_instance_fail_no_request_and_share_the_tally(database, verify):
    with Service(database) as service, Service(database) as second, Load(service, second) as load:
        before = workers(service) + workers(second)
        for instance in service, second:
            time.sleep(1)
            instance.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not {*before} & {*workers(service), *workers(second)})
        time.sleep(1)
    verify(load, service, statuses=(200, 303))


def test_two_hundred_votes_at_once(database, verify):
    most = 0
    with Service(database) as service, Load(service, voters=200, pause=0.001) as load:
        for _ in range(30):
            time.sleep(0.1)
            most = max(most, len(backends(database)))
    verify(load, service, backends=most)
    assert most <= 8


def test_slow_visitors_keep_nobody_waiting(database, verify):
    with Service(database) as service:
        slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(50)]
        with Load(service, voters=8, watchers=4) as load:
            for second in range(6):
                for visitor in slow:
                    visitor.send(b"POST /add"[second : second + 1])
                time.sleep(1)
        for visitor in slow:
            visitor.close()
    verify(load, service, statuses=(200, 303))
    pages = sorted(page.seconds for page in load.answers if page.path == "/")
    assert pages[int(0.95 * len(pages))] < 2
