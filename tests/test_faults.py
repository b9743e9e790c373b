"""A 303 is a promise, and nobody waits on a dead database: real faults in real processes, under load.

Each test ends in `verify`, which compares what the visitors were told with the rows.
"""

import itertools
import os
import signal
import socket
import subprocess
import time
from bisect import bisect
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import which
from statistics import median

import psutil
import psycopg
import pytest
from conftest import missing
from load import Load
from local.postgres import ROOT, LocalPostgres, apply_schema, spawn
from local.service import Service, free_port

numbers = itertools.count()


@pytest.fixture(scope="module")
def server():
    """A server that waits for the disk, as one in production does, and that tests may stop."""
    with LocalPostgres(durable=True) as server:
        yield server


@pytest.fixture
def database(server):
    """URL of a database with the schema and no votes, for one test."""
    server.start()
    return new_database(server)


def new_database(server):
    """Make a database with the schema; return its URL."""
    name = f"catvote_{next(numbers)}"
    sql(server.url(), f"CREATE DATABASE {name}")
    apply_schema(server.url(name))
    return server.url(name)


def sql(url, statement, *parameters):
    """Run a statement on a connection of its own; return its rows."""
    with psycopg.connect(url, autocommit=True, connect_timeout=2) as connection:
        cursor = connection.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def backends(url, condition="true"):
    """Return the ids of the server processes that the service has in that database."""
    statement = f"""
        SELECT pid FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'catvote'
        AND pid <> pg_backend_pid() AND {condition}
    """
    return [pid for (pid,) in sql(url, statement)]


def wait_until(happened, seconds=10):
    """Return once a function returns something true, and return that; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (result := happened()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return result


def freeze(pid):
    """Stop a process and all its children by SIGSTOP; return them."""
    parent = psutil.Process(pid)
    parent.suspend()  # first, so that no child comes later
    family = [parent, *parent.children(recursive=True)]
    for process in family:
        process.suspend()
    return family


@contextmanager
def frozen(pid):
    """Keep a process and all its children stopped for a while."""
    family = freeze(pid)
    try:
        yield
    finally:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def kill(server):
    """Kill all processes of a server, by SIGKILL."""
    for process in freeze(server.server_pid):
        process.kill()
    server.crash()  # which only finds it dead


def recovery(load, healed_at):
    """Return how long after that moment the last vote failed; many have succeeded since."""
    failed_at = max([vote.ended_at for vote in load.votes if vote.status != 303], default=healed_at)
    assert sum(vote.sent_at > failed_at for vote in load.acknowledged) > 50
    return max(failed_at - healed_at, 0)


@pytest.fixture
def verify(record_property):
    """Return a function that compares what the visitors were told with the rows, once the service has ended.

    statuses -- those that are no surprise
    page_seconds -- how long a page or file may take
    figures -- more to report
    """

    def verify(load, service, statuses=(200, 303, 503), page_seconds=8, **figures):
        assert service.process.returncode == 0
        assert "Traceback" not in service.log
        assert {answer.status for answer in load.answers} <= {*statuses}

        for answer in load.answers:
            assert answer.seconds < {"/add": 8, "/healthz": 8}.get(answer.path, page_seconds), answer
            if answer.status == 503:
                assert answer.headers["Retry-After"].isdigit()
                assert not answer.cat or answer.not_counted or answer.unconfirmed

        # Pages show every vote that was acknowledged a second before, and after a vote also the last ones.
        acknowledged_at = sorted(vote.ended_at for vote in load.acknowledged)
        for page in load.answers:
            if "data-votes" in page.text and not page.outdated:
                age = 0 if "voted" in page.path else 1
                assert page.total >= bisect(acknowledged_at, page.sent_at - age)

        url = service.environment["DATABASE_URL"]
        wait_until(lambda: not backends(url, "state <> 'idle'"))  # none is busy with a vote that its visitor gave up
        count = "SELECT vote, votes, (SELECT count(*) FROM votes WHERE votes.vote = vote_totals.vote) FROM vote_totals"
        for cat, counted, stored in sql(url, count):
            assert counted == stored
            votes = [vote for vote in load.votes if vote.cat == cat]
            acknowledged = sum(vote.status == 303 for vote in votes)
            unknown = sum(vote.unconfirmed or vote.status == 0 for vote in votes)
            assert acknowledged <= stored <= acknowledged + unknown

        figures |= {
            "acknowledged": len(load.acknowledged),
            "unconfirmed": sum(vote.unconfirmed for vote in load.votes),
            "not counted": sum(vote.not_counted for vote in load.votes),
            "unanswered": sum(answer.status == 0 for answer in load.answers),
            "slowest vote": f"{max(vote.seconds for vote in load.votes):.1f} s",
            "slowest page": f"{max(answer.seconds for answer in load.answers if not answer.cat):.1f} s",
        }
        record_property("figures", ", ".join(f"{name}: {figure}" for name, figure in figures.items()))
        return figures

    return verify


# The server


@pytest.mark.parametrize("stop", [kill, LocalPostgres.terminate], ids=["killed", "restarted"])
def test_no_vote_is_lost_and_pages_go_on_when_the_server_is(server, database, verify, stop):
    with Service(database) as service, Load(service, watchers=8) as load:
        time.sleep(2)
        failing_at = time.monotonic()
        stop(server)
        down_at = time.monotonic()
        time.sleep(3)
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
            wait_until(lambda: len(backends(database)) >= 4)  # all of a worker's, if not of both
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
            time.sleep(15)
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
            time.sleep(15)
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


def workers(service):
    """Return the worker processes of the service."""
    return psutil.Process(service.process.pid).children()


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


# What lies between


@contextmanager
def pgbouncer(server, database):
    """PgBouncer in transaction mode before a database; yields its URL and that of its console.

    With few connections of its own, since one that just logs in when told to RECONNECT is a failed login to it,
    after which it refuses visitors for server_login_retry = 15 seconds.
    """
    program = which("pgbouncer", path=os.environ["PATH"] + ":/usr/sbin")
    if not program:
        missing("no PgBouncer: apt-get install pgbouncer")
    port = free_port()
    settings = Path(server.base_dir, "pgbouncer.ini")
    settings.write_text(f"""
[databases]
* = host=127.0.0.1 port={server.settings["port"]} user=postgres password={server.password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
admin_users = postgres
pool_mode = transaction
default_pool_size = 4
""")
    process = spawn([program, "--quiet", settings])
    try:
        url = database.replace(f":{server.settings['port']}/", f":{port}/")
        console = f"postgresql://postgres@127.0.0.1:{port}/pgbouncer"

        def ready():
            with suppress(psycopg.OperationalError):
                return sql(console, "SHOW VERSION")

        wait_until(ready)
        yield url, console
    finally:
        process.terminate()
        process.wait()


def test_pgbouncer_may_reconnect_at_any_time(server, database, verify):
    with pgbouncer(server, database) as (url, console):
        with Service(url) as service, Load(service) as load:
            for _ in range(3):
                time.sleep(1)
                sql(console, "RECONNECT")
            time.sleep(1)
        verify(load, service, statuses=(200, 303))


def test_verdicts_through_pgbouncer(server, database, verify):
    with pgbouncer(server, database) as (url, _):
        with Service(url) as service, Load(service, voters=1, watchers=0) as load:
            wait_until(lambda: len(load.acknowledged) > 10)
            with psycopg.connect(database) as connection:
                connection.execute("LOCK TABLE votes")
                wait_until(lambda: load.votes[-1].not_counted)
                (pid,) = wait_until(lambda: backends(database, "wait_event_type = 'Lock'"))
                sql(database, "SELECT pg_terminate_backend(%s)", pid)
                wait_until(lambda: load.votes[-1].unconfirmed)
            wait_until(lambda: load.votes[-1].status == 303)
        verify(load, service)


# A standby


@pytest.fixture
def primary():
    with LocalPostgres(durable=True) as primary:
        yield primary


@pytest.fixture
def standby(primary):
    """A server that has all of `primary`, which waits for it at every commit."""
    folder = Path(primary.base_dir, "standby")
    copy = [primary.bindir / "pg_basebackup", "--dbname", primary.url(), "--pgdata", folder / "data"]
    assert spawn([*copy, "--write-recovery-conf", "--checkpoint=fast"]).wait() == 0
    (folder / "password").write_text(primary.password)
    with LocalPostgres(base_dir=folder, bindir=primary.bindir, durable=True) as standby:
        sql(primary.url(), "ALTER SYSTEM SET synchronous_standby_names = '*'")
        sql(primary.url(), "SELECT pg_reload_conf()")
        wait_until(lambda: sql(primary.url(), "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
        yield standby


@pytest.fixture
def both(primary, standby):
    """URL of a database on whichever of the two takes votes."""
    url = new_database(primary)
    addresses = [f"127.0.0.1:{server.settings['port']}" for server in (primary, standby)]
    return url.replace(addresses[0], ",".join(addresses)) + "?target_session_attrs=read-write"


def test_a_promoted_standby_has_every_acknowledged_vote(primary, standby, both, verify):
    with Service(both) as service, Load(service) as load:
        time.sleep(2)
        kill(primary)
        sql(standby.url(), "SELECT pg_promote()")
        promoted_at = time.monotonic()
        time.sleep(4)
    recovered = recovery(load, promoted_at)
    verify(load, service, recovered=f"{recovered:.1f} s")
    assert recovered < 10


def test_a_host_that_never_answers_is_passed_over(database, verify):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = database.replace("@", f"@127.0.0.1:{silent.getsockname()[1]},")
        with Service(url) as service, Load(service) as load:
            started_at = time.monotonic()
            time.sleep(4)
        recovered = recovery(load, started_at)
        verify(load, service, recovered=f"{recovered:.1f} s")
    assert recovered < 4


def test_no_vote_is_acknowledged_that_the_standby_does_not_have(primary, standby, both, verify):
    with Service(both) as service, Load(service) as load:
        time.sleep(1)
        with frozen(standby.server_pid):
            frozen_at = time.monotonic()
            for pid in wait_until(lambda: backends(both, "wait_event = 'SyncRep'")):
                sql(both, "SELECT pg_terminate_backend(%s)", pid)
            time.sleep(5)
            thawed_at = time.monotonic()
        time.sleep(3)
    assert not [vote for vote in load.acknowledged if frozen_at < vote.sent_at < vote.ended_at < thawed_at]
    recovered = recovery(load, thawed_at)
    figures = verify(load, service, recovered=f"{recovered:.1f} s")
    assert recovered < 3
    assert figures["unconfirmed"] > 0
