"""Each step beyond one machine, as tests/scale/README.md tells of it, with the engines themselves."""

import os
import re
import signal
import socket
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from select import POLLIN, poll
from types import SimpleNamespace

import psutil
import psycopg
import pytest
from checkout import Running, make, nothing_runs_in, only_line
from client import Answer
from conftest import missing, new_database
from faults import backends, freeze, frozen, kill, sql
from load import Load
from local import ROOT
from local.postgres import LocalPostgres
from local.processes import spawn, wait_until
from local.service import Service, free_port
from psycopg.rows import dict_row
from scale.nginx import Nginx, find_program

import catvote

FOLDER = ROOT / "tests/scale"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
EVERYBODYS = ("/", "/tally.json")


def guide(name):
    """Return the code block of that name from tests/scale/README.md."""
    return re.search(rf"^```\w+ {name}\n(.+?)^```", (FOLDER / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]


def need(program):
    """Skip the test if a program is not installed."""
    try:
        find_program(program)
    except RuntimeError as error:
        missing(str(error))


# Visitors. nginx takes those of `client`, who stop sending before they have the answer, for visitors who have left.


def ask(connection, method, path, body=None, headers=None):
    """Send a request, and end the connection; return the Answer."""
    with closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def visitor(server, address="127.0.0.1"):
    """Return a connection to a Service for a visitor from that address."""
    return HTTPConnection("127.0.0.1", server.port, timeout=30, source_address=(address, 0))


def get(server, path="/", **headers):
    """GET a path; return the Answer."""
    return ask(visitor(server), "GET", path, headers=headers)


def vote(server, body="vote=Pita", address="127.0.0.1", **headers):
    """Vote as the page's form does; return the Answer."""
    return ask(visitor(server, address), "POST", "/add", body, FORM | headers)


# A proxy in front


@pytest.fixture(scope="module")
def services(shared_database):
    """Two services on `shared_database`, for tests that leave them as they are."""
    need("nginx")
    with (
        Service(shared_database, WEB_CONCURRENCY="1") as first,
        Service(shared_database, WEB_CONCURRENCY="1") as second,
    ):
        yield first, second


@pytest.fixture
def nginx(services):
    """nginx before them, with nothing in its cache yet."""
    with Nginx(*services) as nginx:
        yield nginx


@pytest.fixture
def own_service(database):
    """A service on `database`, for a test that stops it."""
    need("nginx")
    with Service(database, WEB_CONCURRENCY="1") as service:
        yield service


def test_a_vote_through_nginx_is_stored_and_shown_to_its_voter_alone_and_at_once(nginx, take_votes):
    for votes in range(1, 6):
        voted = vote(nginx)
        assert (voted.status, voted.headers["Location"]) == (303, "/?voted=Pita")
        own = get(nginx, "/?voted=Pita")
        assert (own.votes["Pita"], own.headers["X-Cache"]) == (votes, "BYPASS")
        assert "Thank you" in own.text
        assert "Thank you" not in get(nginx).text
    assert len(list((nginx.folder / "cache").iterdir())) == 1  # whatever visitors add to the address
    assert take_votes() == ["Pita"] * 5


def test_nginx_keeps_host_by_which_votes_of_other_sites_are_refused(nginx, take_votes):
    assert vote(nginx, Origin=nginx.url).status == 303
    assert vote(nginx, Origin="http://other.example").status == 403
    assert take_votes() == ["Pita"]


def test_a_form_that_is_too_long_is_refused_by_the_service_and_a_much_longer_one_by_nginx(nginx, services, take_votes):
    assert vote(nginx, 5_000 * "x").body == vote(services[0], 5_000 * "x").body
    refused = vote(nginx, 20_000 * "x")
    assert refused.status == 413
    assert refused.headers["Retry-After"] == "10"  # which the service asks for after a 503 only
    assert "none was counted" in refused.text
    assert not take_votes()


def test_the_service_learns_of_https_and_everybodys_page_tells_by_what_way_it_came(services, take_votes, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    port = free_port()
    files = {"certificate.pem": str(certificate), "key.pem": str(key)}
    https = {"127.0.0.1:8443": f"127.0.0.1:{port}", "#listen": "listen", "#ssl_": "ssl_", **files}
    with Nginx(*services, replace=https) as nginx:
        trust = ssl.create_default_context(cafile=certificate)
        secure = HTTPSConnection("127.0.0.1", port, context=trust)
        plain, page, again = get(nginx), ask(secure, "GET", "/"), ask(secure, "GET", "/")
        voted = ask(secure, "POST", "/add", "vote=Pita", FORM | {"Origin": f"https://127.0.0.1:{port}"})
        secure.connect()
        assert secure.sock.version() == "TLSv1.3"
        secure.close()
    assert plain.headers["Strict-Transport-Security"] is None
    assert again.headers["X-Cache"] == "HIT"
    for answer in page, again, voted:
        assert "max-age" in answer.headers["Strict-Transport-Security"]
    assert take_votes() == ["Pita"]


def test_an_address_has_so_many_votes_and_others_do_not_feel_it(nginx, take_votes):
    started_at = time.monotonic()
    answers = [vote(nginx, address="127.0.0.2") for _ in range(200)]
    seconds = time.monotonic() - started_at
    refused = [answer for answer in answers if answer.status == 429]
    assert {answer.status for answer in answers[:100]} == {303}
    assert len(answers) - len(refused) <= 101 + 10 * seconds
    assert refused
    assert "this one was not counted" in refused[0].text
    assert vote(nginx, address="127.0.0.3").status == 303
    assert len(take_votes()) == len(answers) - len(refused) + 1
    wait_until(lambda: vote(nginx, address="127.0.0.2").status == 303)


@pytest.mark.parametrize("path", EVERYBODYS)
def test_everybodys_pages_are_asked_for_once_a_second_whatever_host_visitors_name(nginx, path):
    started_at = time.monotonic()
    answers = [get(nginx, path, Host=f"{number}.example") for number in range(100)]
    seconds = time.monotonic() - started_at
    asked = [answer for answer in answers if answer.headers["X-Cache"] != "HIT"]
    assert 1 <= len(asked) <= seconds + 1
    assert not any(b".example" in answer.body for answer in answers)


def test_many_who_ask_at_once_for_a_page_that_nobody_has_yet_cost_one_request(nginx, services):
    with ThreadPoolExecutor(max_workers=20) as visitors:
        with frozen(services[0].process.pid), frozen(services[1].process.pid):
            answers = [visitors.submit(get, nginx) for _ in range(20)]
            time.sleep(0.5)
        caches = sorted(answer.result().headers["X-Cache"] for answer in answers)
    assert caches == 19 * ["HIT"] + ["MISS"]


def test_the_first_visitor_after_a_quiet_time_sees_the_present(nginx):
    before = get(nginx)
    vote(nginx)
    time.sleep(3)
    page = get(nginx)
    assert (page.headers["X-Cache"], page.votes["Pita"]) == ("EXPIRED", before.votes["Pita"] + 1)


@pytest.mark.alone
def test_slow_visitors_by_the_hundred_hold_up_nobody_and_are_sent_away(services):
    patience = {f"client_{part}_timeout 10s": f"client_{part}_timeout 3s" for part in ("header", "body")}
    nginx = Nginx(*services, replace={"worker_processes auto": "worker_processes 1", **patience})
    nginx.command = f"sh -c 'ulimit -Sn 500; exec {nginx.command}'"
    with nginx, ExitStack() as stack:
        address = ("127.0.0.1", nginx.port)
        visitors = [stack.enter_context(socket.create_connection(address)) for _ in range(600)]
        head = b"POST /history HTTP/1.1\r\nHost: catvote.example\r\nContent-Length: 1000"
        for slow_head, slow_body in zip(visitors[::2], visitors[1::2]):
            slow_head.send(head)
            slow_body.send(head + b"\r\n\r\n")
        assert (vote(nginx).status, get(nginx).status) == (303, 200)
        assert not any(said_something(each) for each in visitors)
        wait_until(lambda: all(said_something(each) for each in visitors))


def said_something(connection):
    """Return whether an answer, or good-bye, has come."""
    waiting = poll()
    waiting.register(connection, POLLIN)
    return bool(waiting.poll(0))


def test_nginx_needs_no_root_and_writes_into_its_folder_alone(services):
    nginx = Nginx(*services)
    if os.geteuid() == 0:
        os.chown(nginx.folder, uid=65534, gid=65534)
        nginx.command = f"setpriv --reuid=65534 --regid=65534 --clear-groups {nginx.command}"
    with nginx:
        assert get(nginx).status == 200
        assert nginx.log == ""


def asked_anew(nginx, path="/"):
    """Ask for a page until it does not come from the cache; return the first such Answer."""

    def not_kept():
        answer = get(nginx, path)
        return answer.headers["X-Cache"] != "HIT" and answer

    return wait_until(not_kept)


def test_nginx_keeps_a_connection_to_a_service_for_less_time_than_a_service_that_ends(nginx, services):
    def kept():
        connections = [each for process in nginx.workers() for each in process.net_connections()]
        ports = [each.raddr.port for each in connections if each.raddr and each.status == psutil.CONN_ESTABLISHED]
        return {service.port for service in services} & {*ports}

    get(nginx, "/history")
    assert kept()
    wait_until(lambda: not kept(), seconds=15)


def test_pages_go_on_while_no_service_answers_and_votes_count_again_soon_after(own_service):
    with Nginx(own_service, own_service) as nginx:
        before = {path: get(nginx, path).body for path in EVERYBODYS}
        own_service.stop()
        for path in EVERYBODYS:
            answer = asked_anew(nginx, path)
            assert (answer.status, answer.headers["X-Cache"], answer.body) == (200, "STALE", before[path])
            assert int(answer.headers["Age"]) > 1  # by which the page tells its reader
        lost, history = vote(nginx), get(nginx, "/history")
        assert (lost.status, history.status) == (502, 502)
        assert "could not be confirmed" in lost.text
        assert "Please try again" in history.text
        for name in "Content-Security-Policy", "Retry-After", "X-Content-Type-Options":
            assert lost.headers[name]
        assert (lost.headers["Server"], lost.headers.get_content_type()) == ("nginx", "text/html")
        with own_service:
            wait_until(lambda: vote(nginx).status == 303, seconds=5)
            wait_until(lambda: get(nginx).headers["Age"] is None)


def test_pages_go_on_while_services_have_no_database(nginx, services, service_without_database):
    before = {path: get(nginx, path).body for path in EVERYBODYS}
    settings = nginx.settings
    for service in services:
        settings = settings.replace(f":{service.port}", f":{service_without_database.port}")
    reload(nginx, settings)
    for path in EVERYBODYS:
        answer = asked_anew(nginx, path)
        assert (answer.status, answer.headers["X-Cache"], answer.body) == (200, "STALE", before[path])


def test_a_tally_that_the_service_calls_outdated_is_called_so_by_nginx(server, database, own_service):
    name = database.rpartition("/")[2]
    with Nginx(own_service, own_service) as nginx:
        assert get(nginx, "/tally.json").headers["Age"] is None
        sql(server.url(), f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        sql(server.url(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        outdated = wait_until(lambda: get(nginx, "/tally.json").headers.get_all("Age"))
    assert len(outdated) == 1


def reload(nginx, settings):
    """Give nginx other settings, as the guide says, and return when its old workers have ended."""
    get(nginx)  # its workers come after its port
    before = nginx.workers()
    (nginx.folder / "nginx.conf").write_text(settings)
    command = guide("reload").replace("nginx", find_program("nginx"), 1).replace("FOLDER", str(nginx.folder))
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert not psutil.wait_procs(before, timeout=30)[1]


def test_a_page_of_a_frozen_service_is_waited_for_by_one_visitor_while_others_get_the_last_one(services):
    with Nginx(*services, replace={"proxy_read_timeout 3s": "proxy_read_timeout 1s"}) as nginx:
        get(nginx)
        with ThreadPoolExecutor() as visitors, frozen(services[0].process.pid), frozen(services[1].process.pid):
            answers = [visitors.submit(asked_anew, nginx) for _ in range(2)]
            assert {answer.result().headers["X-Cache"] for answer in answers} == {"STALE", "UPDATING"}


def test_a_vote_that_a_frozen_service_has_could_not_be_confirmed_and_is_stored_once(services, take_votes):
    with Nginx(*services, replace={"proxy_read_timeout 15s": "proxy_read_timeout 1s"}) as nginx:
        with frozen(services[0].process.pid), frozen(services[1].process.pid):
            answer = vote(nginx)
        assert answer.status == 504
        assert "could not be confirmed" in answer.text
    late = wait_until(take_votes)
    for service in services:
        vote(service, "vote=Gummi")  # queues behind whatever else nginx has sent
    assert late + take_votes() == ["Pita", "Gummi", "Gummi"]


def test_a_vote_that_a_dying_service_has_is_not_sent_to_the_other(database, own_service):
    with (
        Service(database, WEB_CONCURRENCY="1") as first,
        Nginx(first, own_service) as nginx,
        ThreadPoolExecutor() as visitors,
    ):
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            lost = visitors.submit(vote, nginx)
            wait_until(lambda: backends(database, "wait_event_type = 'Lock'"))
            for process in freeze(first.process.pid):  # nginx begins with the first
                process.kill()
        assert "could not be confirmed" in lost.result().text
        assert {vote(nginx).status for _ in range(10)} == {303}  # the other takes them
        wait_until(lambda: not backends(database, "state <> 'idle'"))
    assert sql(database, "SELECT count(*) FROM votes") == [(11,)]  # PostgreSQL had it already


def test_a_vote_passes_over_a_machine_that_does_not_answer(own_service):
    silent = socket.create_server(("127.0.0.1", 0), backlog=0)
    address = silent.getsockname()
    fill = socket.create_connection(address)  # which leaves no room for another
    with silent, fill, Nginx(SimpleNamespace(port=address[1]), own_service) as nginx:
        assert vote(nginx).status == 303


def test_one_failure_tells_all_workers_of_nginx_which_service_is_away(own_service):
    away = SimpleNamespace(port=free_port())
    many_workers = {"worker_processes auto": "worker_processes 8"}
    with Nginx(away, own_service, replace=many_workers) as nginx, ThreadPoolExecutor(max_workers=8) as visitors:
        started_at = time.monotonic()
        assert {get(nginx, "/history").status for _ in range(2)} == {200}
        assert {answer.status for answer in visitors.map(get, 64 * [nginx], 64 * ["/history"])} == {200}
        seconds = time.monotonic() - started_at
        assert 1 <= nginx.log.count("connect() failed") <= seconds + 1


@pytest.mark.alone
def test_a_new_release_loses_no_request(database, verify):
    need("nginx")
    no_limit = {"rate=10r/s": "rate=1000r/s", "burst=100 ": "burst=1000 "}
    with (
        Service(database) as first,
        Service(database) as second,
        Nginx(first, second, replace=no_limit) as nginx,
        Load(nginx, voters=8) as load,
    ):
        wait_until(lambda: len(load.acknowledged) > 20)
        for service in first, second:
            before = service.workers()
            service.process.send_signal(signal.SIGHUP)  # workers of the new release take over the port
            assert not psutil.wait_procs(before, timeout=40)[1]
    verify(load, first, statuses=(200, 303), fresh=3)


def test_a_machine_that_is_taken_out_may_stop(nginx, services):
    for service in services:
        reload(nginx, nginx.settings.replace(f"127.0.0.1:{service.port}", f"127.0.0.1:{service.port} down"))
        with frozen(service.process.pid):
            assert {vote(nginx).status for _ in range(4)} == {303}


def test_a_reload_waits_for_a_slow_visitor_for_so_long_only(services):
    limits = {
        "worker_shutdown_timeout 10s": "worker_shutdown_timeout 1s",
        "client_body_timeout 10s": "client_body_timeout 60s",
    }
    with (
        Nginx(*services, replace=limits) as nginx,
        socket.create_connection(("127.0.0.1", nginx.port)) as slow,
    ):
        slow.send(b"POST /add HTTP/1.1\r\nHost: catvote.example\r\nContent-Length: 1000\r\n\r\n")
        reload(nginx, nginx.settings)


def test_make_scale_serves_on_one_port_says_so_and_leaves_nothing_behind(project, database):
    need("nginx")
    (project / ".env").write_text(f"DATABASE_URL={database}\nGUNICORN_CMD_ARGS=--bind=127.0.0.1:1\n")
    with Running(project, "make scale", "Ctrl-C ends") as scale:
        printed = re.search(
            rf"Open {scale.url} in a browser: nginx before (http://127.0.0.1:\d+) and (http://127.0.0.1:\d+)\.\n"
            r"Its settings and cache are in (/tmp/\S+); Ctrl-C ends all three\.\n",
            scale.log,
        )
        assert printed, scale.log
        assert vote(scale).status == 303
        assert get(scale).headers["X-Cache"] == "MISS"
    assert sql(database, "SELECT count(*) FROM votes") == [(1,)]
    assert nothing_runs_in(project)
    assert not Path(printed[3]).exists()


def test_make_scale_says_in_one_line_that_its_port_is_in_use(project):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = make(project, "scale", PORT=str(taken.getsockname()[1]))
    assert result.returncode != 0
    assert "is in use" in only_line(result.stderr)


def test_a_program_is_found_in_the_folder_for_servers_which_is_not_on_everybodys_path(monkeypatch):
    need("nginx")
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_program("nginx")


def test_a_program_that_is_not_installed_is_named_with_its_package():
    with pytest.raises(RuntimeError, match="no-such-program is not installed: apt-get install no-such-program"):
        find_program("no-such-program")


# Connections


@pytest.fixture
def pgbouncer(server, database):
    """PgBouncer by pgbouncer.ini, with two server connections, before `database`: its URL."""
    need("pgbouncer")
    port, folder = free_port(), Path(server.base_dir)
    settings = (FOLDER / "pgbouncer.ini").read_text()
    for text, replacement in {
        "port=5432": f"port={server.settings['port']}",
        "listen_port = 6432": f"listen_port = {port}",
        "auth_file = users.txt": f"auth_file = {folder}/users.txt",
        "default_pool_size = 8": "default_pool_size = 2",
    }.items():
        assert text in settings, f"not in pgbouncer.ini: {text}"
        settings = settings.replace(text, replacement)
    (folder / "pgbouncer.ini").write_text(settings)
    (folder / "users.txt").write_text(f'"postgres" "{server.password}"\n')
    process = spawn([find_program("pgbouncer"), "--quiet", folder / "pgbouncer.ini"])
    url = database.replace(f":{server.settings['port']}/", f":{port}/")
    try:
        wait_until(lambda: pools(url))
        yield url
    finally:
        process.terminate()
        process.wait()


def pools(url):
    """Return the lines of SHOW POOLS, by database, as dictionaries; none if PgBouncer cannot be asked."""
    with suppress(psycopg.OperationalError):
        console = url.rpartition("/")[0] + "/pgbouncer"
        with psycopg.connect(console, autocommit=True, row_factory=dict_row) as connection:
            return {pool["database"]: pool for pool in connection.execute("SHOW POOLS")}


def test_many_workers_share_few_server_connections(database, pgbouncer, verify):
    sql(database, SLOW_VOTES)
    with Service(pgbouncer, WEB_CONCURRENCY="4") as service, Load(service, voters=16) as load:
        wait_until(lambda: len(load.acknowledged) > 200)
        pool = pools(pgbouncer)[database.rpartition("/")[2]]
    verify(load, service, statuses=(200, 303))
    # PgBouncer keeps a server connection for ten minutes: these are all that it has made.
    assert sum(number for name, number in pool.items() if name.startswith("sv_")) == 2


# So that more statements are under way at once than there are connections.
SLOW_VOTES = """
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.05); RETURN NULL; END';
    CREATE TRIGGER votes_wait BEFORE INSERT ON votes FOR EACH STATEMENT EXECUTE FUNCTION wait();
"""


def test_a_password_reaches_pgbouncer_by_no_weaker_way_than_the_server(pgbouncer):
    assert sql(f"{pgbouncer}?require_auth=scram-sha-256", "SELECT 1") == [(1,)]


def test_what_a_voter_is_told_behind_pgbouncer_is_true(database, pgbouncer):
    with Service(pgbouncer, WEB_CONCURRENCY="1") as service, ThreadPoolExecutor() as visitors:
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            assert "was not counted" in vote(service).text
            lost = visitors.submit(vote, service)
            (pid,) = wait_until(lambda: backends(database, "wait_event_type = 'Lock'"))
            sql(database, "SELECT pg_terminate_backend(%s)", pid)
            assert "could not be confirmed" in lost.result().text
        wait_until(lambda: vote(service).status == 303)
    assert sql(database, "SELECT count(*) FROM votes") == [(1,)]


def test_pgbouncer_tries_again_soon_after_a_login_that_failed(server, database, pgbouncer):
    name = database.rpartition("/")[2]
    sql(server.url(), f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    with pytest.raises(psycopg.OperationalError):
        sql(pgbouncer, "SELECT 1")
    sql(server.url(), f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

    def answers():
        with suppress(psycopg.OperationalError):
            return sql(pgbouncer, "SELECT 1")

    wait_until(answers, seconds=8)


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
        for statement in guide("synchronous").split(";")[:-1]:
            sql(primary.url(), statement)
        wait_until(lambda: sql(primary.url(), "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
        yield standby


@pytest.fixture
def both(primary, standby):
    """URL of a database on whichever of the two takes votes, as the guide has it."""
    addresses = [f"127.0.0.1:{server.settings['port']}" for server in (primary, standby)]
    with new_database(primary) as url:
        catvote.initdb(url)
        yield url.replace(addresses[0], ",".join(addresses)) + "?target_session_attrs=read-write"


def test_a_promoted_standby_has_every_acknowledged_vote(primary, standby, both, verify):
    with Service(both) as service, Load(service, voters=8) as load:
        wait_until(lambda: len(load.acknowledged) > 50)
        kill(primary)
        sql(standby.url(), guide("promote"))
        promoted_at = time.monotonic()
        wait_until(lambda: load.votes[-1].status == 303 and load.votes[-1].sent_at > promoted_at)
    verify(load, service)


def test_no_vote_is_acknowledged_that_the_standby_does_not_have(standby, both):
    with Service(both, WEB_CONCURRENCY="1") as service:
        wait_until(lambda: vote(service).status == 303)
        with frozen(standby.server_pid):
            assert "could not be confirmed" in vote(service).text
        wait_until(lambda: vote(service).status == 303)


def test_a_host_that_never_answers_is_passed_over(database):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = database.replace("@", f"@127.0.0.1:{silent.getsockname()[1]},")
        with Service(url, WEB_CONCURRENCY="1") as service:
            wait_until(lambda: vote(service).status == 303)
