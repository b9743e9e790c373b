"""A 303 is a promise, and nobody waits on a dead database: real faults in real processes, under load.

Those under load end in `verify`, which compares what the visitors were told with the rows.
"""

import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread

import psycopg
import pytest
from client import get, vote
from conftest import missing, new_database, unsurprised
from faults import Network, at_each_vote, backends, frozen, kill, recovery, sql
from load import Load
from local.postgres import LocalPostgres
from local.processes import server_account, wait_until
from local.service import Service

import catvote


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
        catvote.initdb(url)
        yield url


@pytest.fixture
def worker(database):
    """The service on `database`, as one worker: a Service."""
    with unsurprised(Service(database, WEB_CONCURRENCY="1")) as service:
        yield service


WAITING = "wait_event_type = 'Lock'"

# The server


@pytest.mark.alone
def test_no_vote_is_lost_and_pages_go_on_when_the_server_is_killed(server, database, verify):
    with Service(database) as service, Load(service, watchers=8) as load:
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
    verify(load, service)
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


def test_a_restart_that_nobody_noticed_fails_no_vote(server, database, verify):
    with Service(database) as service:
        with Load(service, pause=0) as load, psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            wait_until(lambda: len(backends(database)) >= 3)  # so more than one of a worker
            connection.rollback()
        server.terminate()
        server.start()
        with Load(service) as later:
            later.go_on(votes=100)
    load.answers += later.answers
    verify(load, service, statuses=(200, 303))


@pytest.mark.alone
def test_a_frozen_server_holds_nobody_up(server, database, verify):
    with Service(database) as service, Load(service, voters=100) as load:
        load.go_on(votes=100)
        with frozen(server.server_pid):
            time.sleep(5)  # longer than a statement and its cancel may take
        thawed_at = time.monotonic()
        load.go_on(votes=300)
    recovered = recovery(load, thawed_at)
    verify(load, service)
    assert recovered < 3
    assert load.unconfirmed
    assert load.not_counted


def test_a_frozen_server_process_holds_nobody_up(worker, database):
    with psycopg.connect(database) as connection, ThreadPoolExecutor(1) as voters:
        connection.execute("LOCK TABLE votes")
        answer = voters.submit(vote, worker)
        (pid,) = wait_until(lambda: backends(database, WAITING))
        with frozen(pid):
            assert answer.result().unconfirmed
    assert vote(worker).status == 303


def test_a_worker_has_one_connection_for_votes_one_for_the_tally_and_one_for_the_history(worker, database):
    assert vote(worker).status == 303
    assert len(backends(database)) == 1  # none before it is needed
    with psycopg.connect(database) as connection, ThreadPoolExecutor(3) as visitors:
        connection.execute("LOCK TABLE votes, tally")
        visitors.submit(vote, worker)
        visitors.submit(get, worker, "/")
        visitors.submit(get, worker, "/history")
        wait_until(lambda: len(backends(database, WAITING)) == 3)
        connection.rollback()


def test_votes_count_soon_after_the_database_takes_them_again(server, worker, database):
    alter = f"ALTER DATABASE {database.rpartition('/')[2]}"
    sql(server.url(), f"{alter} SET default_transaction_read_only = on")
    assert vote(worker).not_counted
    assert get(worker, "/healthz").status == 200
    stale = {*backends(database)}
    sql(server.url(), f"{alter} RESET default_transaction_read_only")
    wait_until(lambda: vote(worker).status == 303, seconds=5)
    for target in "/?voted=Pita", "/healthz", "/history":
        assert get(worker, target).status == 200
    assert not stale & {*backends(database)}  # pages have left them, too: they may be another server's


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
def test_a_vote_that_lost_against_another_is_tried_again(worker, database, sqlstate):
    sql(database, "CREATE SEQUENCE tries")
    at_each_vote(database, f"IF nextval('tries') = 1 THEN RAISE 'lost' USING ERRCODE = '{sqlstate}'; END IF")
    assert vote(worker).status == 303
    assert sql(database, "SELECT vote FROM votes") == [("Pita",)]


# The way to the server


def test_a_network_that_forgets_and_connects_slowly_costs_nobody_anything(database, serve, caplog):
    with Network(database, delay=0.7, forgets_after=1.5) as network, ThreadPoolExecutor(2) as visitors:
        application = serve(network.url)
        application.catvote.UNUSED_TOO_LONG = 1
        for votes in 1, 2:
            started_at = time.monotonic()
            pages = [visitors.submit(get, application, target) for target in ("/", "/history")]
            assert vote(application).status == 303
            assert get(application, "/?voted=Pita").votes["Pita"] == votes
            for page in pages:
                assert page.result().status == 200
                assert not page.result().outdated
            assert time.monotonic() - started_at < 2
            wait_until(lambda: network.forgotten)
    assert not caplog.text


def test_a_connection_is_kept_while_it_is_used(application, shared_database):
    application.catvote.UNUSED_TOO_LONG = 1
    used = set()
    for _ in range(3):
        assert vote(application).status == 303
        used |= {*backends(shared_database)}
        time.sleep(0.6)
    assert len(used) == 1


def test_a_server_that_never_answered_is_asked_again(database):
    with Network(database, delay=40) as network, unsurprised(Service(network.url, WEB_CONCURRENCY="1")) as service:
        assert vote(service).not_counted
        network.delay = 0
        wait_until(lambda: vote(service).status == 303, seconds=10)


@pytest.fixture(scope="module")
def tls_server():
    """A server that speaks TLS, and does not wait for the disk: a LocalPostgres."""
    if not shutil.which("openssl"):
        missing("no openssl: apt-get install openssl")
    with TemporaryDirectory(dir="/tmp") as folder:
        key, certificate = Path(folder, "key"), Path(folder, "certificate")
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=catvote.example"]
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        if account := server_account():
            for path in folder, key, certificate:
                os.chown(path, account["user"], account["group"])
        options = {"ssl": "on", "ssl_key_file": str(key), "ssl_cert_file": str(certificate)}
        with LocalPostgres(options=options) as server:
            yield server


def test_the_way_to_the_database_is_encrypted_whatever_is_in_home(tls_server, tmp_path):
    (tmp_path / ".postgresql").mkdir()
    for name in "postgresql.crt", "postgresql.key":  # nobody can read them, not even root: they lead nowhere
        (tmp_path / ".postgresql" / name).symlink_to(name)
    with new_database(tls_server) as url:
        catvote.initdb(url)
        with unsurprised(Service(url, WEB_CONCURRENCY="1", HOME=str(tmp_path))) as service:
            assert vote(service).status == 303
            encrypted = "pid IN (SELECT pid FROM pg_stat_ssl WHERE ssl)"
            assert backends(url) == backends(url, encrypted) != []


# The service


def test_a_worker_that_lacked_threads_reaches_the_database_when_it_has_them(application, take_votes, monkeypatch):
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
    assert take_votes() == ["Pita"]
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("catvote")]
    assert len(names) == len({*names})  # those that did start have ended again


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
