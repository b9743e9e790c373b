"""Each step beyond one machine, as tests/scale/README.md tells of it, with the engines themselves."""

import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPSConnection
from itertools import count, cycle
from pathlib import Path
from select import POLLIN, poll
from urllib.request import urlopen

import psutil
import psycopg
import pytest
from client import Answer
from conftest import missing, new_database
from faults import backends, freeze, frozen, kill, recovery, sql, wait_until, workers
from load import Load
from local.postgres import ROOT, LocalPostgres, apply_schema, spawn
from local.service import Service, free_port
from scale.nginx import Nginx, find_program

FOLDER = ROOT / "tests/scale"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
EVERYBODYS = ("/", "/tally.json")


def readme(name):
    """Return the code block of that name from tests/scale/README.md."""
    return re.search(rf"^```\w+ {name}\n(.+?)^```", (FOLDER / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]


# A proxy in front


def need(program):
    """Skip the test if a program is not installed."""
    try:
        find_program(program)
    except RuntimeError as error:
        missing(str(error))


def request(connection, method, path, body=None, headers=None):
    """Send a request, and end the connection; return the Answer."""
    with closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def connect(server, address="127.0.0.1"):
    """Return a connection to a Service or Nginx for a visitor from that address."""
    return HTTPConnection("127.0.0.1", server.port, timeout=30, source_address=(address, 0))


def get(server, path="/", **headers):
    """GET a path; a header If_None_Match="..." is sent as If-None-Match. Return the Answer."""
    return request(
        connect(server), "GET", path, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )


def vote(server, body="vote=Pita", address="127.0.0.1", **headers):
    """Vote as the page's form does; return the Answer."""
    return request(connect(server, address), "POST", "/add", body, FORM | headers)


class Households(Load):
    """Visitors who each have an address of their own, and take a new connection, as browsers do, if theirs was closed."""

    numbers = count()

    def visitor(self, service):
        return connect(service, f"127.1.{next(self.numbers) // 250}.{next(self.numbers) % 250 + 1}")

    def ask(self, visitor, path, cat=""):
        if visitor.sock and said_something([visitor.sock]):
            visitor.close()
        return super().ask(visitor, path, cat)


def reload(nginx, settings):
    """Give nginx other settings, and return when its old workers have ended."""
    before = workers(nginx)
    (nginx.folder / "nginx.conf").write_text(settings)
    subprocess.run([*nginx.command(), "-s", "reload"], check=True, capture_output=True)
    assert not psutil.wait_procs(before, timeout=15)[1]


@pytest.fixture(scope="module")
def shared_services(shared_database):
    """Two services on `shared_database`, for tests that leave them as they are."""
    need("nginx")
    with Service(shared_database) as first, Service(shared_database) as second:
        yield first, second


@pytest.fixture(scope="module")
def shared_nginx(shared_services):
    """nginx before them."""
    with Nginx(*shared_services) as nginx:
        yield nginx


@pytest.fixture
def new_nginx(shared_services):
    """nginx before them with nothing in its cache yet."""
    with Nginx(*shared_services) as nginx:
        yield nginx


@pytest.fixture
def services(database):
    """Two services on `database`, for a test that stops or loads them."""
    need("nginx")
    with Service(database) as first, Service(database) as second:
        yield first, second


@pytest.fixture
def nginx(services):
    """nginx before them."""
    with Nginx(*services) as nginx:
        yield nginx


def test_a_vote_through_nginx_is_stored_and_shown_to_its_voter_at_once(shared_nginx, stored):
    total = sum(get(shared_nginx).votes.values())
    for votes in range(1, 6):
        answer = vote(shared_nginx)
        assert (answer.status, answer.headers["Location"]) == (303, "/?voted=Pita")
        page = get(shared_nginx, "/?voted=Pita")
        assert "Thank you" in page.text
        assert sum(page.votes.values()) >= total + votes
    assert stored() == ["Pita"] * 5


def test_nginx_keeps_host_by_which_votes_of_other_sites_are_refused(shared_nginx, stored):
    assert vote(shared_nginx, Origin=shared_nginx.url).status == 303
    assert vote(shared_nginx, Origin="http://other.example").status == 403
    assert vote(shared_nginx, **{"Sec-Fetch-Site": "cross-site"}).status == 403
    assert stored() == ["Pita"]


@pytest.mark.parametrize(
    ("body", "status"),
    [("vote=Nobody", 400), ("", 400), ("vote=Pita&vote=Pita", 400), (f"vote={4091 * 'x'}", 400), (5000 * "x", 413)],
    ids=["nobody", "empty", "two", "as long as may be", "too long"],
)
def test_nginx_leaves_refusals_to_the_service(shared_nginx, shared_services, stored, body, status):
    answer = vote(shared_nginx, body)
    assert answer.status == status
    assert answer.body == vote(shared_services[0], body).body
    assert not stored()


def test_nginx_itself_refuses_a_form_that_is_much_too_long(shared_nginx, stored):
    answer = vote(shared_nginx, 20_000 * "x")
    assert answer.status == 413
    assert answer.headers["Permissions-Policy"] is None  # which all answers of the service have
    assert "none was counted" in answer.text
    assert not stored()


def test_https(shared_services, stored):
    with Nginx(*shared_services, https=True) as nginx:
        trust = ssl.create_default_context(cafile=nginx.folder / "certificate.pem")

        def ask(*arguments):
            return request(HTTPSConnection("127.0.0.1", nginx.https_port, context=trust), *arguments)

        plain, page, again = get(nginx), ask("GET", "/"), ask("GET", "/")
        assert vote(nginx).headers["Strict-Transport-Security"] is None
        voted = ask("POST", "/add", "vote=Pita", FORM | {"Origin": f"https://127.0.0.1:{nginx.https_port}"})
    assert plain.headers["Strict-Transport-Security"] is None
    assert again.headers["X-Cache"] == "HIT"
    for answer in page, again, voted:
        assert "max-age" in answer.headers["Strict-Transport-Security"]
    assert (voted.status, voted.headers["Location"]) == (303, "/?voted=Pita")
    assert stored() == ["Pita", "Pita"]
    assert f"http://127.0.0.1:{nginx.https_port}" not in page.text  # what names this site at all says https


def test_an_address_has_so_many_votes_and_others_do_not_feel_it(shared_nginx, stored):
    answers = [vote(shared_nginx, address="127.0.0.2") for _ in range(150)]
    others = [vote(shared_nginx, address=f"127.0.0.{number}") for number in range(3, 8)]
    assert {answer.status for answer in answers[:100]} == {303}
    refused = [answer for answer in answers if answer.status != 303]
    assert refused
    for answer in refused:
        assert answer.status == 429
        assert "this one was not counted" in answer.text
        assert answer.headers["Retry-After"].isdigit()
    assert {answer.status for answer in others} == {303}
    assert request(connect(shared_nginx, "127.0.0.2"), "GET", "/").status == 200
    assert len(stored()) == len(answers) - len(refused) + len(others)
    time.sleep(1)
    assert vote(shared_nginx, address="127.0.0.2").status == 303


@pytest.mark.parametrize("path", EVERYBODYS)
def test_everybodys_pages_are_asked_for_once_a_second_whatever_host_visitors_name(new_nginx, path):
    started_at = time.monotonic()
    answers = [get(new_nginx, path, Host=f"{number}.example") for number in range(200)]
    seconds = time.monotonic() - started_at
    asked = [answer for answer in answers if answer.headers["X-Cache"] != "HIT"]
    assert {answer.status for answer in answers} == {200}
    assert 1 <= len(asked) <= seconds + 1


@pytest.mark.parametrize("path", EVERYBODYS)
def test_many_who_ask_at_once_for_a_page_that_nobody_has_yet_cost_one_request(new_nginx, shared_services, path):
    with ThreadPoolExecutor(max_workers=20) as visitors:
        with frozen(shared_services[0].process.pid), frozen(shared_services[1].process.pid):
            answers = [visitors.submit(get, new_nginx, path) for _ in range(20)]
            time.sleep(0.5)
        caches = sorted(answer.result().headers["X-Cache"] for answer in answers)
    assert caches == 19 * ["HIT"] + ["MISS"]


@pytest.mark.parametrize("path", EVERYBODYS)
def test_who_has_a_page_already_is_told_so_from_the_cache(new_nginx, path):
    tag = get(new_nginx, path).headers["ETag"]
    unchanged = get(new_nginx, path, If_None_Match=tag)
    assert (unchanged.status, unchanged.headers["X-Cache"], unchanged.headers["ETag"]) == (304, "HIT", tag)
    assert unchanged.headers["Cache-Control"] == "no-cache"
    vote(new_nginx)
    wait_until(lambda: get(new_nginx, path, If_None_Match=tag).status == 200, seconds=4)


def test_a_tag_never_makes_the_cache_keep_what_has_no_body(new_nginx, shared_services):
    tag = get(shared_services[0]).headers["ETag"]
    assert get(new_nginx, If_None_Match=tag).status in (200, 304)
    assert "</html>" in get(new_nginx).text


def test_a_voters_own_page_is_never_kept(new_nginx):
    for _ in range(3):
        total = sum(get(new_nginx, "/?voted=Pita").votes.values())
        vote(new_nginx)
        own = get(new_nginx, "/?voted=Pita")
        assert sum(own.votes.values()) > total
        assert own.headers["X-Cache"] is None
        assert "Thank you" not in get(new_nginx).text


def test_the_first_visitor_after_a_quiet_time_sees_the_present(nginx):
    get(nginx)
    vote(nginx)
    time.sleep(3)
    page = get(nginx)
    assert (page.headers["X-Cache"], page.votes["Pita"]) == ("EXPIRED", 1)


@pytest.mark.parametrize(
    ("method", "path", "host"),
    [
        ("GET", "/", "other.example"),
        ("GET", "/tally.json", "other.example"),
        ("HEAD", "/", "other.example"),
        ("GET", "http://other.example/", "other.example"),
        ("GET", "/?voted=Pita", None),
        ("GET", "/?other.example", None),
        ("GET", "/?0", None),
        ("GET", "/tally.json?other.example", None),
        ("GET", "/%3Fvoted=Pita", None),
        ("GET", "/history/..", None),
        ("GET", "//", None),
        ("GET", "/%2e/", None),
        ("GET", "/%74ally.json", None),
        ("GET", "/static/../tally.json", None),
        ("POST", "/", None),
    ],
)
def test_what_a_visitor_sends_is_on_nobody_elses_page(new_nginx, shared_services, method, path, host):
    request(connect(new_nginx), method, path, headers={"Host": host} if host else {})
    for everybodys in EVERYBODYS:
        answer = get(new_nginx, everybodys)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == get(shared_services[0], everybodys).headers["Content-Type"]
        assert answer.body
        assert b"other.example" not in answer.body
        assert b"Thank you" not in answer.body


@pytest.mark.parametrize("path", ["//", "/history/..", "/%2e/", "/static/../"])
def test_a_path_that_means_the_page_gets_the_page(new_nginx, path):
    assert get(new_nginx, path).body == get(new_nginx).body


def test_a_thousand_slow_visitors_delay_nobody_and_slow_heads_are_sent_away(nginx, services, verify):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    addresses = [f"127.2.{number // 250}.{number % 250 + 1}" for number in range(1000)]
    visitors = [socket.create_connection(("127.0.0.1", nginx.port), source_address=(each, 0)) for each in addresses]
    heads, bodies = visitors[:500], visitors[500:]
    for visitor in bodies:
        head = ["POST /add HTTP/1.1", "Host: catvote.example", "Content-Type: application/x-www-form-urlencoded"]
        visitor.send("\r\n".join([*head, "Content-Length: 1000", "", ""]).encode())
    with Households(nginx, voters=8, watchers=4, pause=0.1) as load:
        for second in range(12):
            for visitor in visitors:
                with suppress(OSError):  # it was sent away
                    visitor.send(b"POST /add HTTP"[second : second + 1])
            time.sleep(1)
    sent_away = [len(said_something(group)) for group in (heads, bodies)]
    for visitor in visitors:
        visitor.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for service in services:
        service.stop()
    figures = verify(load, services[0], statuses=(200, 303), fresh=3)
    assert float(figures["slowest page"].split()[0]) < 2
    assert float(figures["slowest vote"].split()[0]) < 2
    assert sent_away == [500, 0]


def said_something(connections):
    """Return those on which an answer, or good-bye, has come."""
    sockets = poll()
    for connection in connections:
        sockets.register(connection, POLLIN)
    return sockets.poll(0)


def test_pages_go_on_while_no_service_answers(nginx, services):
    vote(nginx)
    wait_until(lambda: all(b"1" in get(nginx, path).body for path in EVERYBODYS), seconds=4)
    before = {path: get(nginx, path) for path in EVERYBODYS}
    for service in services:
        service.stop()
    time.sleep(2)
    for path in EVERYBODYS:
        answer = get(nginx, path)
        assert (answer.status, answer.headers["X-Cache"]) == (200, "STALE")
        assert answer.body == before[path].body
        assert int(answer.headers["Age"]) > 1  # by which the page tells its reader
        assert get(nginx, path, If_None_Match=answer.headers["ETag"]).status == 304
    lost, history = vote(nginx), get(nginx, "/history")
    assert (lost.status, history.status) == (502, 502)
    assert "could not be confirmed" in lost.text
    assert "vote" not in history.text.replace("catvote", "")
    assert lost.headers["Retry-After"].isdigit()
    with services[0], services[1]:
        assert wait_until(lambda: vote(nginx).status == 303, seconds=3)
        page = wait_until(lambda: get(nginx).votes["Pita"] >= 2 and get(nginx), seconds=4)
        assert page.headers["Age"] is None


def test_pages_go_on_while_services_have_no_database(new_nginx, shared_services, service_without_database):
    before = {path: get(new_nginx, path).body for path in EVERYBODYS}
    settings = (new_nginx.folder / "nginx.conf").read_text()
    for service in shared_services:
        settings = settings.replace(f":{service.port}", f":{service_without_database.port}")
    reload(new_nginx, settings)
    time.sleep(2)
    for path in EVERYBODYS:
        answer = get(new_nginx, path)
        assert (answer.status, answer.headers["X-Cache"], answer.body) == (200, "STALE", before[path])


def test_a_frozen_service_holds_up_a_page_for_three_seconds_and_only_for_who_asks_for_a_new_one(
    nginx, services, verify
):
    with Households(nginx, voters=4, watchers=20, pause=0.2) as load:
        time.sleep(1)
        with frozen(services[0].process.pid):
            time.sleep(5)
    for service in services:
        service.stop()
    verify(load, services[0], statuses=(200, 303), fresh=6)
    slow = [page.seconds for page in load.answers if page.path == "/" and page.seconds > 1]
    assert len(slow) <= 2
    assert all(seconds < 4 for seconds in slow)


def test_a_rolling_restart_loses_no_request(nginx, services, verify):
    with Households(nginx) as load:
        for service in services:
            time.sleep(0.5)
            before = workers(service)
            service.process.send_signal(signal.SIGHUP)  # the workers of the new release take over the port
            assert not psutil.wait_procs(before, timeout=10)[1]
        time.sleep(0.5)
    for service in services:
        service.stop()
    verify(load, services[0], statuses=(200, 303), fresh=3)


@contextmanager
def taken_out(nginx, service):
    """Keep a service out of nginx's settings for a while."""
    settings = (nginx.folder / "nginx.conf").read_text()
    reload(nginx, settings.replace(f"server 127.0.0.1:{service.port}", f"server 127.0.0.1:{service.port} down"))
    yield
    reload(nginx, settings)


def test_a_service_that_is_taken_out_may_stop_and_start(database, nginx, services, verify):
    with Households(nginx) as load:
        for service in services:
            time.sleep(0.5)
            with taken_out(nginx, service):
                assert service.stop() == 0
                service.__enter__()
        time.sleep(0.5)
    for service in services:
        service.stop()
    verify(load, services[0], statuses=(0, 200, 303), fresh=3)
    # A reload closes connections that rest. Some visitor may just be sending on one, and browsers send that again on
    # another: so nothing that was sent so may have been stored.
    assert all(answer.kept for answer in load.answers if answer.status == 0)
    assert sql(database, "SELECT count(*) FROM votes") == [(len(load.acknowledged),)]


def test_a_vote_that_a_dying_service_has_is_not_sent_to_the_other(database, nginx, services, verify):
    with Households(nginx, watchers=0) as load:
        wait_until(lambda: load.acknowledged)
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            wait_until(lambda: len(backends(database, "wait_event_type = 'Lock'")) >= 4)
            family = freeze(services[0].process.pid)
            for process in family:
                process.kill()  # PostgreSQL has its votes, and will store them
            wait_until(lambda: any(vote.unconfirmed for vote in load.votes))
        assert not psutil.wait_procs(family, timeout=5)[1]
        time.sleep(0.2)  # by then nginx knows
        dead_at = time.monotonic()
        time.sleep(2.5)
    services[1].stop()
    figures = verify(load, services[1], statuses=(200, 303, 502, 503))
    assert figures["unconfirmed"] > 0
    assert all(vote.status == 303 for vote in load.votes if vote.sent_at > dead_at)  # the other one took them


# More processes and machines


def test_services_share_the_tally_and_each_shows_the_own_vote_at_once(database):
    with Service(database) as first, Service(database) as second, Service(database) as third:
        services = cycle([first, second, third])
        for votes in range(1, 20):
            location = vote(next(services)).headers["Location"]
            assert sum(get(next(services), location).votes.values()) == votes
        time.sleep(1)
        for service in first, second, third:
            assert get(service).votes == {"Gummi": 0, "Pita": 19}


def test_two_services_keep_within_twenty_connections(database, verify):
    with Service(database) as first, Service(database) as second, Load(first, second, voters=200) as load:
        time.sleep(1)
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")  # so that all are in use at once
            time.sleep(0.5)
            connections = len(backends(database))
        time.sleep(0.5)
    verify(load, first, statuses=(200, 303), connections=connections)
    assert connections <= 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_make_scale_serves_on_one_port_and_leaves_nothing_behind(database, number):
    need("nginx")
    port = free_port()
    environment = {**os.environ, "DATABASE_URL": database, "PORT": str(port), "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    command = [sys.executable, "-m", "scale.nginx"]  # as the Makefile starts it
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        printed = ""
        while "Ctrl-C ends" not in printed:
            assert process.poll() is None, printed
            printed += process.stdout.readline()
        assert f"Open http://127.0.0.1:{port} " in printed
        with urlopen(f"http://127.0.0.1:{port}") as page:
            assert page.headers["X-Cache"] == "MISS"
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        printed += process.stdout.read()
    assert process.returncode == 0
    assert "Traceback" not in printed
    assert not psutil.wait_procs(family, timeout=5)[1]
    assert not Path(re.search(r"are in (\S+);", printed)[1]).exists()


def test_make_scale_without_nginx_says_what_to_install(tmp_path):
    program = "from scale import nginx; nginx.SBIN = ''; nginx.main()"
    environment = {"PATH": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "nginx is not installed: apt-get install nginx\n"


# Connections


@contextmanager
def pgbouncer(server, database, pool_size=8):
    """PgBouncer by pgbouncer.ini before a database; yields its URL and that of its console."""
    need("pgbouncer")
    port = free_port()
    users = Path(server.base_dir, "users.txt")
    users.write_text(f'"postgres" "{server.password}"\n')
    settings = (FOLDER / "pgbouncer.ini").read_text()
    for text, replacement in {
        "port=5432": f"port={server.settings['port']}",
        "listen_port = 6432": f"listen_port = {port}",
        "auth_file = users.txt": f"auth_file = {users}",
        "default_pool_size = 8": f"default_pool_size = {pool_size}",
    }.items():
        assert text in settings
        settings = settings.replace(text, replacement)
    file = Path(server.base_dir, "pgbouncer.ini")
    file.write_text(settings)
    process = spawn([find_program("pgbouncer"), "--quiet", file])
    try:
        url = database.replace(f":{server.settings['port']}/", f":{port}/")
        console = url.rpartition("/")[0] + "/pgbouncer"

        def ready():
            with suppress(psycopg.OperationalError):
                return sql(console, "SHOW VERSION")

        wait_until(ready)
        yield url, console
    finally:
        process.terminate()
        process.wait()


SLOW_VOTES = """
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.05); RETURN NULL; END';
    CREATE TRIGGER votes_wait BEFORE INSERT ON votes FOR EACH STATEMENT EXECUTE FUNCTION wait();
"""


def test_twenty_workers_share_eight_server_connections(server, database, verify):
    sql(database, SLOW_VOTES)  # so that many are under way at once
    most = 0
    with pgbouncer(server, database) as (url, _):
        with Service(url, WEB_CONCURRENCY="20") as service:
            wait_until(lambda: service.log.count("Booting worker") == 20, seconds=30)
            with Load(service, voters=60) as load:
                for _ in range(25):
                    time.sleep(0.1)
                    most = max(most, len(backends(database)))
            assert len(workers(service)) == 20
        verify(load, service, statuses=(200, 303), server_connections=most)
    assert most == 8


def test_pgbouncer_may_reconnect_at_any_time(server, database, verify):
    with pgbouncer(server, database, pool_size=2) as (url, console):
        with Service(url) as service, Load(service) as load:
            for _ in range(3):
                time.sleep(0.5)
                # One that is just logging in when told to RECONNECT is a failed login to PgBouncer, after which it
                # refuses visitors for server_login_retry seconds: so all must be there.
                wait_until(lambda: len(backends(database)) == 2)
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


# The server that dies


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
        for statement in readme("synchronous").split(";")[:-1]:
            sql(primary.url(), statement)
        wait_until(lambda: sql(primary.url(), "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
        yield standby


@pytest.fixture
def both(primary, standby):
    """URL of a database on whichever of the two takes votes."""
    addresses = [f"127.0.0.1:{server.settings['port']}" for server in (primary, standby)]
    with new_database(primary) as url:
        apply_schema(url)
        yield url.replace(addresses[0], ",".join(addresses)) + "?target_session_attrs=read-write"


def test_a_promoted_standby_has_every_acknowledged_vote(primary, standby, both, verify):
    with Service(both) as service, Load(service) as load:
        time.sleep(2)
        kill(primary)
        sql(standby.url(), readme("promote"))
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
