"""Each step beyond one machine, as tests/scale/README.md tells of it, with the engines themselves."""

import os
import re
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
from conftest import missing, new_database, swift_server
from faults import WAITING_FOR_A_LOCK, backends, frozen, kill, sql
from load import Load, assert_kept
from local import ROOT
from local.postgres import LocalPostgres
from local.processes import spawn, wait_until
from local.service import Service, free_port
from scale.nginx import Nginx, find_program, replaced

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


def get(server, path="/", **headers):
    """GET a path; return the Answer."""
    return ask(HTTPConnection("127.0.0.1", server.port, timeout=30), "GET", path, headers=headers)


def vote(server, body="vote=Pita", address="127.0.0.1", **headers):
    """Vote from an address, as the page's form does; return the Answer."""
    visitor = HTTPConnection("127.0.0.1", server.port, timeout=30, source_address=(address, 0))
    return ask(visitor, "POST", "/add", body, FORM | headers)


def asked_anew(nginx, path="/"):
    """Ask for a page until it does not come from the cache; return the first such Answer."""

    def not_kept():
        answer = get(nginx, path)
        return answer.headers["X-Cache"] != "HIT" and answer

    return wait_until(not_kept)


def ask(connection, method, path, body=None, headers=None):
    """Send a request, and end the connection; return the Answer."""
    with closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


# A proxy in front


def nginx_before(first, second=None, replace=None):
    """Return an Nginx, not started yet, before two services, or twice before the same."""
    need("nginx")
    return Nginx(first, second or first, replace=replace)


@pytest.fixture
def nginx(shared_service):
    """nginx before `shared_service`, with nothing in its cache yet."""
    with nginx_before(shared_service) as nginx:
        yield nginx


@pytest.fixture
def own_service(database):
    """A service on `database`, for a test that stops it."""
    with Service(database) as service:
        yield service


def test_a_vote_through_nginx_is_stored_and_shown_to_its_voter_alone_and_at_once(nginx, take_votes):
    for votes in range(1, 4):
        voted = vote(nginx, Origin=nginx.url)  # a 403, unless the service learns the Host that the visitor has sent
        assert (voted.status, voted.headers["Location"]) == (303, "/?voted=Pita")
        own = get(nginx, "/?voted=Pita")
        assert (own.votes["Pita"], own.headers["X-Cache"]) == (votes, "BYPASS")
        assert "Thank you" in own.text
        assert "Thank you" not in get(nginx).text
    assert len(list((nginx.folder / "cache").iterdir())) == 1  # whatever visitors add to the address
    assert take_votes() == ["Pita"] * 3


def test_a_form_that_is_too_long_is_refused_by_the_service_and_a_much_longer_one_by_nginx(
    nginx, shared_service, take_votes
):
    assert vote(nginx, 5_000 * "x").body == vote(shared_service, 5_000 * "x").body
    refused = vote(nginx, 20_000 * "x")
    assert refused.status == 413
    assert refused.headers["Retry-After"] == "10"  # which the service asks for after a 503 only
    assert "none was counted" in refused.text
    assert not take_votes()


def test_the_service_learns_of_https_and_everybodys_page_tells_by_what_way_it_came(shared_service, take_votes):
    port = free_port()
    https = {"127.0.0.1:8443": f"127.0.0.1:{port}", "#listen": "listen", "#ssl_": "ssl_"}
    nginx = nginx_before(shared_service, replace=https)
    certificate = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=catvote"
    certificate += " -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out certificate.pem"
    subprocess.run(certificate.split(), cwd=nginx.folder, check=True, capture_output=True)
    trust = ssl.create_default_context(cafile=nginx.folder / "certificate.pem")
    trust.minimum_version = ssl.TLSVersion.TLSv1_3
    secure = HTTPSConnection("127.0.0.1", port, context=trust)
    with nginx:
        plain, page, again = get(nginx), ask(secure, "GET", "/"), ask(secure, "GET", "/")
        voted = ask(secure, "POST", "/add", "vote=Pita", FORM | {"Origin": f"https://127.0.0.1:{port}"})
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
    assert 200 - len(refused) <= 101 + 10 * seconds
    assert refused
    assert "this one was not counted" in refused[0].text
    assert vote(nginx, address="127.0.0.3").status == 303
    assert len(take_votes()) == 200 - len(refused) + 1
    wait_until(lambda: vote(nginx, address="127.0.0.2").status == 303)


def test_many_who_ask_at_once_whatever_host_they_name_cost_the_service_one_request(nginx, shared_service):
    with ThreadPoolExecutor(max_workers=20) as visitors:
        with frozen(shared_service.process.pid):
            asked = [visitors.submit(get, nginx, Host=f"{number}.example") for number in range(20)]
            time.sleep(0.5)
        answers = [each.result() for each in asked]
    assert sorted(answer.headers["X-Cache"] for answer in answers) == 19 * ["HIT"] + ["MISS"]
    assert not any(".example" in answer.text for answer in answers)


def test_the_first_visitor_after_a_quiet_time_sees_the_present(nginx):
    before = get(nginx)
    vote(nginx)
    page = asked_anew(nginx)
    assert (page.headers["X-Cache"], page.votes["Pita"]) == ("EXPIRED", before.votes["Pita"] + 1)


def test_a_page_of_a_frozen_service_is_waited_for_by_one_visitor_while_others_get_the_last_one(shared_service):
    with nginx_before(shared_service, replace={"proxy_read_timeout 3s": "proxy_read_timeout 1s"}) as nginx:
        get(nginx)
        with ThreadPoolExecutor() as visitors, frozen(shared_service.process.pid):
            answers = [visitors.submit(asked_anew, nginx) for _ in range(2)]
            assert {answer.result().headers["X-Cache"] for answer in answers} == {"STALE", "UPDATING"}


def test_a_vote_that_a_frozen_service_has_could_not_be_confirmed_and_is_stored_once(shared_service, take_votes):
    with nginx_before(shared_service, replace={"proxy_read_timeout 15s": "proxy_read_timeout 1s"}) as nginx:
        with frozen(shared_service.process.pid):
            answer = vote(nginx)
        assert answer.status == 504
        assert "could not be confirmed" in answer.text
        assert nginx.log.count("upstream timed out") == 1  # it was not sent again
    assert wait_until(take_votes) == ["Pita"]


def test_pages_go_on_while_no_service_answers_and_votes_count_again_soon_after(own_service):
    with nginx_before(own_service) as nginx:
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


def test_pages_go_on_without_a_database_first_as_the_service_knows_them_then_as_nginx_does(
    server, database, own_service
):
    name = database.rpartition("/")[2]
    with nginx_before(own_service) as nginx:
        before = get(nginx, "/tally.json")
        assert before.headers["Age"] is None
        sql(server.url(), f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        sql(server.url(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        outdated = wait_until(lambda: get(nginx, "/tally.json").headers.get_all("Age"))
        assert len(outdated) == 1  # the service's own
        own_service.stop()
        with own_service:  # which knows no tally now
            answer = asked_anew(nginx, "/tally.json")
            assert (answer.status, answer.headers["X-Cache"], answer.body) == (200, "STALE", before.body)


def test_one_failure_tells_all_workers_of_nginx_which_service_is_away(shared_service):
    away = SimpleNamespace(port=free_port())
    many_workers = {"worker_processes auto": "worker_processes 8"}
    with (
        nginx_before(away, shared_service, many_workers) as nginx,
        ThreadPoolExecutor(max_workers=8) as visitors,
    ):
        started_at = time.monotonic()
        assert {get(nginx, "/history").status for _ in range(2)} == {200}
        assert {answer.status for answer in visitors.map(get, 64 * [nginx], 64 * ["/history"])} == {200}
        seconds = time.monotonic() - started_at
        assert 1 <= nginx.log.count("connect() failed") <= seconds + 1


def test_a_vote_passes_over_a_machine_that_does_not_answer(shared_service):
    silent = socket.create_server(("127.0.0.1", 0), backlog=0)
    address = silent.getsockname()
    fill = socket.create_connection(address)  # which leaves no room for another
    with silent, fill, nginx_before(SimpleNamespace(port=address[1]), shared_service) as nginx:
        assert vote(nginx).status == 303


def test_nginx_keeps_a_connection_to_a_service_for_less_time_than_a_service_that_ends(nginx, shared_service):
    def kept():
        connections = [each for process in nginx.workers() for each in process.net_connections()]
        return [each for each in connections if each.raddr and each.raddr.port == shared_service.port]

    get(nginx, "/history")
    assert kept()
    wait_until(lambda: not kept(), seconds=15)


def test_a_machine_may_be_taken_out_and_a_slow_visitor_holds_that_up_for_so_long_only(shared_service, own_service):
    limits = {"worker_shutdown_timeout 10s": "worker_shutdown_timeout 1s", "body_timeout 10s": "body_timeout 60s"}
    with nginx_before(shared_service, own_service, limits) as nginx:
        with socket.create_connection(("127.0.0.1", nginx.port)) as slow:
            slow.send(b"POST /add HTTP/1.1\r\nHost: catvote.example\r\nContent-Length: 1000\r\n\r\n")
            get(nginx)  # its workers come after its port
            before = nginx.workers()
            settings = nginx.settings.replace(f":{shared_service.port}", f":{shared_service.port} down")
            (nginx.folder / "nginx.conf").write_text(settings)
            command = guide("reload").replace("nginx", find_program("nginx"), 1).replace("FOLDER", str(nginx.folder))
            subprocess.run(command, shell=True, check=True, capture_output=True)
            assert not psutil.wait_procs(before, timeout=30)[1]
        with frozen(shared_service.process.pid):
            assert {vote(nginx).status for _ in range(4)} == {303}


def test_slow_visitors_by_the_hundred_hold_up_nobody_and_are_sent_away(shared_service):
    patience = {f"client_{part}_timeout 10s": f"client_{part}_timeout 5s" for part in ("header", "body")}
    nginx = nginx_before(shared_service, replace={"worker_processes auto": "worker_processes 1", **patience})
    nginx.command = f"sh -c 'ulimit -Sn 500; exec {nginx.command}'"
    with nginx, ExitStack() as stack:
        address = ("127.0.0.1", nginx.port)
        visitors = [stack.enter_context(socket.create_connection(address)) for _ in range(600)]
        head = b"POST /history HTTP/1.1\r\nHost: catvote.example\r\nContent-Length: 1000"
        for slow_head, slow_body in zip(visitors[::2], visitors[1::2]):
            slow_head.send(head)
            slow_body.send(head + b"\r\n\r\n")
        assert (vote(nginx).status, get(nginx).status) == (303, 200)
        answers = poll()
        for visitor in visitors:
            answers.register(visitor, POLLIN)
        assert not answers.poll(0)
        wait_until(lambda: len(answers.poll(0)) == len(visitors))


def test_nginx_needs_no_root_and_writes_into_its_folder_alone(shared_service):
    nginx = nginx_before(shared_service)
    if os.geteuid() == 0:
        os.chown(nginx.folder, uid=65534, gid=65534)
        nginx.command = f"setpriv --reuid=65534 --regid=65534 --clear-groups {nginx.command}"
    with nginx:
        assert get(nginx).status == 200
        assert nginx.log == ""


def test_make_scale_serves_on_one_port_of_its_own_says_so_and_leaves_nothing_behind(project, database, tmp_path):
    need("nginx")
    (project / ".env").write_text(f"DATABASE_URL={database}\nGUNICORN_CMD_ARGS=--bind=127.0.0.1:1\n")
    private = str(tmp_path)  # nginx's own user could not enter
    with Running(project, "make scale", "Ctrl-C ends", TMPDIR=private) as scale:
        printed = re.search(
            rf"Open {scale.url} in a browser: nginx before (http://127.0.0.1:\d+) and (http://127.0.0.1:\d+)\.\n"
            r"Its settings and cache are in (/tmp/catvote-nginx-\w+); Ctrl-C ends all three\.\n",
            scale.log,
        )
        assert printed, scale.log
        assert vote(scale).status == 303
        assert get(scale).headers["X-Cache"] == "MISS"
        second = make(project, "scale", PORT=str(scale.port))
        assert second.returncode != 0
        assert "is in use" in only_line(second.stderr)
    assert sql(database, "SELECT count(*) FROM votes") == [(1,)]
    assert nothing_runs_in(project)
    assert not Path(printed[3]).exists()


def test_a_program_is_found_where_debian_has_servers_or_named_with_its_package(monkeypatch):
    need("nginx")
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_program("nginx")
    with pytest.raises(RuntimeError, match="no-such-program is not installed: apt-get install no-such-program"):
        find_program("no-such-program")


# Connections


@pytest.fixture
def pgbouncer(server, database):
    """PgBouncer by pgbouncer.ini, with two server connections, before `database`: its URL."""
    need("pgbouncer")
    port, folder = free_port(), Path(server.base_dir)
    replacements = {
        "port=5432": f"port={server.settings['port']}",
        "listen_port = 6432": f"listen_port = {port}",
        "auth_file = users.txt": f"auth_file = {folder}/users.txt",
        "default_pool_size = 8": "default_pool_size = 2",
    }
    (folder / "pgbouncer.ini").write_text(replaced((FOLDER / "pgbouncer.ini").read_text(), replacements))
    (folder / "users.txt").write_text(f'"postgres" "{server.password}"\n')
    process = spawn([find_program("pgbouncer"), "--quiet", folder / "pgbouncer.ini"])
    url = database.replace(f":{server.settings['port']}/", f":{port}/")
    try:
        wait_until(lambda: answers(url.replace(database.rpartition("/")[2], "postgres")))
        yield url
    finally:
        process.terminate()
        process.wait()


def answers(url):
    """Return whether a database answers."""
    with suppress(psycopg.OperationalError):
        return sql(url, "SELECT true")


def test_many_workers_share_few_server_connections(pgbouncer):
    base, _, database = pgbouncer.rpartition("/")
    with Service(pgbouncer, WEB_CONCURRENCY="4") as service, Load(service, voters=16, watchers=1) as load:
        load.go_on(votes=50)
        # PgBouncer keeps a server connection for ten minutes: these are all that it has made.
        connections = [each for each in sql(f"{base}/pgbouncer", "SHOW SERVERS") if database in each]
    assert_kept(load, service, statuses=(200, 303))
    assert len(connections) in (1, 2)


def test_a_password_reaches_pgbouncer_by_no_weaker_way_than_the_server(pgbouncer):
    assert sql(f"{pgbouncer}?require_auth=scram-sha-256", "SELECT 1") == [(1,)]


def test_what_a_voter_is_told_behind_pgbouncer_is_true(database, pgbouncer):
    with Service(pgbouncer) as service, ThreadPoolExecutor() as visitors:
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE votes")
            assert "was not counted" in vote(service).text
            lost = visitors.submit(vote, service)
            (pid,) = wait_until(lambda: backends(database, WAITING_FOR_A_LOCK))
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

    wait_until(lambda: answers(pgbouncer), seconds=8)


# The server that dies


@pytest.fixture
def pair():
    """A server that waits at every commit for its standby, and that."""
    with swift_server() as primary:
        folder = Path(primary.base_dir, "standby")
        copy = [primary.bindir / "pg_basebackup", "--dbname", primary.url(), "--pgdata", folder / "data"]
        assert spawn([*copy, "--write-recovery-conf", "--checkpoint=fast"]).wait() == 0
        (folder / "password").write_text(primary.password)
        with LocalPostgres(base_dir=folder, bindir=primary.bindir) as standby:
            for statement in guide("synchronous").split(";")[:-1]:
                sql(primary.url(), statement)
            wait_until(lambda: sql(primary.url(), "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
            yield primary, standby


def test_a_vote_is_acknowledged_when_the_standby_has_it_too_and_is_there_after_promotion(pair):
    primary, standby = pair
    with new_database(primary) as url:
        catvote.initdb(url)
        # Whichever of the two takes votes, as the guide has it.
        hosts = ",".join(f"127.0.0.1:{server.settings['port']}" for server in pair)
        both = re.sub("@.*/", f"@{hosts}/", url) + "?target_session_attrs=read-write"
        with Service(both) as service, Load(service, voters=8, watchers=1) as load:
            load.go_on(votes=20)
            with frozen(standby.server_pid):
                wait_until(lambda: load.unconfirmed)
            load.go_on(votes=20)
            kill(primary)
            sql(standby.url(), guide("promote"))
            load.go_on(votes=20)
        assert_kept(load, service)
