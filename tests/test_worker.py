"""gunicorn with our settings and our worker: visitors who stay, limits of the machine, signals, logs.

What they are for `make dev` is tested with it, in test_startup.py.
"""

import re
import resource
import runpy
import signal
import socket
import struct
import time
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from itertools import pairwise

import pytest
from client import FORM, get, listen, read, vote, write
from conftest import unsurprised
from local import ROOT
from local.processes import wait_until
from local.service import Service

SETTINGS = ROOT / "gunicorn.conf.py"
LAST = write("GET", "/", "Connection: close")
REFUSED_IN_MID_BODY = write("POST", "/add", FORM, "Content-Length: 99999") + b"a" * 9_999


@pytest.fixture
def altered(shared_database, tmp_path):
    """A function that returns the Service with our settings and, after them, these lines of Python."""

    def altered(lines, **arguments):
        settings = tmp_path / "altered.conf.py"
        settings.write_text(f"__file__ = {str(SETTINGS)!r}\nexec(open(__file__).read())\n{lines}")
        return Service(shared_database, GUNICORN_CMD_ARGS=f"--config={settings}", **arguments)

    return altered


@pytest.fixture(scope="module")
def shared_service(shared_database):
    """The service with two workers, for all tests of this module: a Service."""
    with unsurprised(Service(shared_database, WEB_CONCURRENCY="2")) as service:
        yield service


@contextmanager
def visitors(service, number, saying=b""):
    """Yield connections of as many visitors who have said that, and now wait."""
    with ExitStack() as stack:
        connections = []
        for _ in range(number):
            connection = socket.create_connection(("127.0.0.1", service.port), timeout=20)
            connections.append(stack.enter_context(connection))
            connection.sendall(saying)
        yield connections


def workers_of(service):
    """Return its workers, once it has all of them."""
    number = int(service.environment["WEB_CONCURRENCY"])
    return wait_until(lambda: len(found := service.workers()) == number and found)


def seconds_for(action):
    """Return how long it takes."""
    start = time.monotonic()
    action()
    return time.monotonic() - start


# Visitors


@pytest.mark.alone
@pytest.mark.parametrize(
    ("said", "number"),
    [
        pytest.param(LAST, 300, id="stay after the last answer"),
        pytest.param(REFUSED_IN_MID_BODY, 300, id="stop after a refusal in mid-body"),
        pytest.param(b"", 300, id="say nothing"),
        pytest.param(b"GET / HT", 50, id="stop in mid-request"),  # they keep a thread each
    ],
)
def test_nobody_waits_for_visitors_who(said, number, shared_service):
    before = workers_of(shared_service)
    with visitors(shared_service, number, said):
        waits = [seconds_for(lambda: get(shared_service, "/")) for _ in range(50)]
    assert max(waits) < 1.5
    assert shared_service.workers() == before
    assert "cannot accept" not in shared_service.log  # when the other worker has


def test_who_stops_in_mid_request_keeps_no_thread_for_ever(altered):
    with altered("Worker.request_timeout = 1") as service, visitors(service, 70, b"GET / HT"):
        assert get(service, "/").status == 200


def test_who_is_refused_in_mid_body_can_go_on_and_read_why(shared_service):
    with visitors(shared_service, 1, REFUSED_IN_MID_BODY) as (visitor,):
        for _ in range(10):
            time.sleep(0.1)  # as over a slow line
            visitor.sendall(b"a" * 100)
        answer = HTTPResponse(visitor)
        answer.begin()
        assert answer.status == 413
        assert b"none was counted" in answer.read()


def assert_none_ended(service, before):
    """Fail unless these workers, and no others, still serve. It takes a moment to see that one has just ended."""
    with visitors(service, 20, LAST) as others:
        for visitor in others:
            visitor.recv(1)
    assert service.workers() == before


def test_no_worker_ends_when_visitors_break_off(shared_service):
    workers = workers_of(shared_service)
    assert_none_ended(shared_service, workers)  # from now on they have all files that they keep open
    files = {worker: worker.num_fds() for worker in workers}
    for said in LAST, LAST[:9], REFUSED_IN_MID_BODY, b"":
        with visitors(shared_service, 10, said):
            pass
        with visitors(shared_service, 10, said) as breaking_off:
            for visitor in breaking_off:
                visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                if said == LAST:
                    visitor.recv(1)
    with visitors(shared_service, 30, LAST) as staying:  # the last whom the workers have to close
        for visitor in staying:
            visitor.recv(1)
        wait_until(lambda: all(worker.num_fds() <= files[worker] + 3 for worker in files))  # 3 for the database
    assert_none_ended(shared_service, workers)


# An application that fails in the middle of its answers.
BREAK_OFF = """
def post_worker_init(worker):
    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", "2")])
        yield b"1"
        raise RuntimeError("broken off")
    worker.wsgi = app
"""


def test_no_worker_ends_when_an_answer_breaks_off(altered):
    with altered(BREAK_OFF) as service:
        (worker,) = workers_of(service)
        with visitors(service, 1, LAST) as (visitor,):
            while visitor.recv(1000):
                pass
        with visitors(service, 1, b"nonsense\r\n\r\n") as (staying,):
            staying.recv(1)
            files = worker.num_fds()
            wait_until(lambda: worker.num_fds() < files)  # when the worker has closed both
        assert_none_ended(service, [worker])


SLOW_ANSWER = """
Worker.request_timeout = 0.5

def post_worker_init(worker):
    def app(environ, start_response):
        time.sleep(2.5)
        start_response("204 No Content", [])
        return []
    worker.wsgi = app
"""


def test_no_worker_ends_when_an_answer_takes_too_long(altered):
    with altered(SLOW_ANSWER) as service:
        before = workers_of(service)
        with visitors(service, 1, LAST) as (visitor,):
            assert visitor.recv(1) == b""
        with pytest.raises(TimeoutError):
            wait_until(lambda: service.workers() != before, seconds=3)


@pytest.mark.alone
def test_visitors_who_come_at_the_same_moment_are_shared_by_the_workers(shared_database):
    def visitors_of(worker):
        return sum(connection.status == "ESTABLISHED" for connection in worker.net_connections("tcp"))

    with Service(shared_database, WEB_CONCURRENCY="2") as service:
        first, second = workers_of(service)
        first.suspend()
        second.suspend()
        with visitors(service, 100):
            first.resume()
            second.resume()
            wait_until(lambda: visitors_of(first) + visitors_of(second) == 100)
            assert min(visitors_of(first), visitors_of(second)) >= 10


def test_the_connection_ends_with_the_last_answer(shared_service):
    with visitors(shared_service, 1, LAST) as (visitor,):
        assert seconds_for(lambda: listen(visitor)) < 1.5


def test_pipelined_requests_do_not_wait_for_each_other(shared_service):
    with visitors(shared_service, 1, write("GET", "/") * 99 + LAST) as (visitor,):
        answers = []
        assert seconds_for(lambda: answers.extend(read(listen(visitor)))) < 2.5
    assert [answer.status for answer in answers] == [200] * 100


def test_no_header_of_a_visitor_changes_the_path(shared_service):
    assert get(shared_service, "/", "SCRIPT_NAME: /elsewhere").status == 200


# An application that tells which thread it runs in.
WHO_AM_I = """
from threading import get_ident

def post_worker_init(worker):
    def app(environ, start_response):
        if environ["PATH_INFO"] == "/slowly":
            time.sleep(0.3)
        start_response("200 OK", [("Content-Length", "20")])
        return [b"%20d" % get_ident()]
    worker.wsgi = app
"""


@pytest.mark.alone
def test_a_thread_waits_for_its_visitors_next_request(altered):
    with altered(WHO_AM_I + "threads = 7") as service:
        connections = [HTTPConnection("127.0.0.1", service.port, timeout=10) for _ in range(8)]
        for connection in connections:
            connection.request("GET", "/slowly")
        others = {connection.getresponse().read() for connection in connections}
        assert len(others) > 4  # threads that are free in a moment, and could serve the next request as well

        served_by = []
        for _ in range(30):
            connections[0].request("GET", "/")
            served_by.append(connections[0].getresponse().read())
        for connection in connections:
            connection.close()
        stayed = sum(before == after for before, after in pairwise(served_by))
        assert stayed > 15  # a busy machine may be late now and then


def test_a_visitor_may_go_on_for_longer_than_a_request_may_take(altered):
    with (
        altered("Worker.request_timeout = 1") as service,
        closing(HTTPConnection("127.0.0.1", service.port, timeout=10)) as visitor,
    ):
        end = time.monotonic() + 3
        while time.monotonic() < end:
            visitor.request("GET", "/static/icon.svg")
            assert visitor.getresponse().read()
            time.sleep(0.02)  # too short a pause to lose the thread


def test_a_visitor_who_asks_and_asks_lets_others_have_the_thread(altered):
    with altered(WHO_AM_I + "threads = 1") as service:
        get(service, "/")  # from now on they are served in the order in which they come
        with visitors(service, 1, write("GET", "/slowly") * 9) as (asking,):
            assert get(service, "/").status == 200
            assert 0 < asking.recv(10_000).count(b"HTTP/1.1 200") < 9


# Limits of the machine


FEW_FILES = "sh -c 'ulimit -n 128; exec gunicorn catvote:app'"


def test_when_all_files_are_in_use_later_visitors_wait(shared_database):
    with Service(shared_database, command=FEW_FILES) as service:
        before = workers_of(service)
        with visitors(service, 150, write("GET", "/static/icon.svg")), visitors(service, 1, LAST) as (later,):
            later.settimeout(0.5)
            with pytest.raises(TimeoutError):
                later.recv(1)
        assert get(service, "/static/icon.svg").status == 200
        assert service.workers() == before
        assert "cannot accept" not in service.log


def test_no_worker_ends_when_a_visitor_cannot_be_accepted(altered):
    with altered("worker_connections = 1000", command=FEW_FILES) as service:
        before = workers_of(service)
        with visitors(service, 150, write("GET", "/static/icon.svg")):
            said = wait_until(lambda: service.log.count("cannot accept"))
            # It says so ten times a second, and does not try all the time.
            assert seconds_for(lambda: wait_until(lambda: service.log.count("cannot accept") >= said + 5)) > 0.3
        assert get(service, "/static/icon.svg").status == 200
        assert service.workers() == before


def test_the_soft_limit_of_files_is_raised(shared_database):
    with Service(shared_database, command="sh -c 'ulimit -Sn 256; exec gunicorn catvote:app'") as service:
        (soft, hard) = workers_of(service)[0].rlimit(resource.RLIMIT_NOFILE)
        assert soft == min(hard, 2048)


# While a file exists, no thread can be started.
NO_NEW_THREADS = """
from threading import Thread

start = Thread.start

def start_unless_forbidden(thread):
    if os.path.exists(os.environ["FORBIDDEN"]):
        raise RuntimeError("can't start new thread")
    start(thread)

Thread.start = start_unless_forbidden
"""


def test_where_no_thread_can_start_visitors_wait_for_one_that_there_is(altered, tmp_path):
    forbidden = tmp_path / "forbidden"
    with altered(NO_NEW_THREADS, FORBIDDEN=str(forbidden)) as service:
        assert get(service, "/").status == 200
        before = service.workers()
        forbidden.touch()
        with visitors(service, 3, LAST[:9]) as slow, visitors(service, 1, LAST) as (waiting,):
            time.sleep(0.5)  # by now the first of them has the only thread
            for visitor in slow:
                visitor.sendall(LAST[9:])
            for visitor in [*slow, waiting]:
                assert [answer.status for answer in read(listen(visitor))] == [200]
        assert service.workers() == before


# Start, reload and end


def test_it_starts_from_elsewhere_with_our_settings(shared_database):
    with Service(
        shared_database, command=f"gunicorn --config '{SETTINGS}' --chdir '{ROOT}' catvote:app", folder="/"
    ) as service:
        assert get(service, "/").status == 200


def test_a_wrong_database_url_ends_the_start_with_one_line_in_the_log(tmp_path):
    log = tmp_path / "errors"
    wrong = Service("postgres://user:secret@[::1/db", GUNICORN_CMD_ARGS=f"--log-level=warning --error-logfile={log}")
    with pytest.raises(RuntimeError, match="did not start"), wrong:
        pass
    assert wrong.process.returncode == 1
    (line,) = (wrong.log + log.read_text()).splitlines()
    assert re.search(r"\[ERROR\] DATABASE_URL is not a valid", line)
    assert "secret" not in line


ANOTHER_APP = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "7")])
    return [b"changed"]
"""


def test_a_reload_brings_changed_code(project, shared_database):
    with Service(shared_database, folder=project) as service:
        assert get(service, "/").body != b"changed"
        with project.joinpath("catvote.py").open("a") as module:
            module.write(ANOTHER_APP)
        service.process.send_signal(signal.SIGHUP)
        wait_until(lambda: get(service, "/").body == b"changed")


def test_a_reload_that_brings_a_mistake_ends_the_service_and_shows_nobody_a_traceback(project, shared_database):
    with Service(shared_database, folder=project) as service:
        with project.joinpath("catvote.py").open("a") as module:
            module.write("no_such_name\n")
        service.process.send_signal(signal.SIGHUP)
        assert service.process.wait(timeout=20) == 3  # gunicorn's: a worker could not start


@pytest.mark.parametrize(("value", "expected"), [("TRUE", True), ("0", False)])
def test_settings_and_application_agree_on_what_switches_development_on(value, expected, monkeypatch):
    monkeypatch.setenv("DEVELOPMENT", value)
    assert runpy.run_path(str(SETTINGS))["reload"] is expected
    assert runpy.run_path(str(ROOT / "catvote.py"))["DEVELOPMENT"] is expected


# A worker that needs a second after it was forked, before anything of its own.
SLOWLY_FORKED = "os.register_at_fork(after_in_child=lambda: time.sleep(1))"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_that_have_no_handlers_yet_end_at_once(number, altered):
    with altered(SLOWLY_FORKED) as service:
        workers_of(service)
        service.process.send_signal(number)
        assert seconds_for(service.process.wait) < 10


def test_a_worker_that_misses_the_rotation_of_logs_is_replaced(altered):
    with altered(SLOWLY_FORKED) as service:
        (early,) = workers_of(service)
        early.send_signal(signal.SIGUSR1)
        wait_until(lambda: service.workers() and early not in service.workers())


def test_at_the_end_visitors_who_have_asked_nothing_yet_have_a_moment_to_do_so(shared_database):
    with Service(shared_database, WEB_CONCURRENCY="2") as service, visitors(service, 4) as (visitor, *_):
        assert get(service, "/").status == 200
        service.process.terminate()
        time.sleep(0.5)
        visitor.sendall(LAST)
        assert [answer.status for answer in read(listen(visitor))] == [200]
        assert seconds_for(service.process.wait) < 10


def test_two_workers_serve_unless_somebody_says_how_many(monkeypatch):
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    assert runpy.run_path(str(SETTINGS))["workers"] == 2


def test_platforms_and_routers_find_the_times_they_need():
    settings = runpy.run_path(str(SETTINGS))
    assert settings["keepalive"] > 90  # Heroku's router keeps a connection that long
    assert settings["graceful_timeout"] < 30  # after that Heroku kills


# What is written where


def test_the_applications_log_is_where_gunicorns_errors_are_with_time_and_process(shared_database, tmp_path):
    log = tmp_path / "errors"
    with Service(shared_database, GUNICORN_CMD_ARGS=f"--error-logfile={log}") as service:
        assert vote(service, "Origin: http://elsewhere.example").status == 403
        pids = [worker.pid for worker in service.workers()]
    (line,) = [line for line in log.read_text().splitlines() if "elsewhere.example" in line]
    time_and_process = re.match(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\] \[(\d+)\] \[WARNING\] ", line)
    assert int(time_and_process[1]) in pids
    assert "elsewhere.example" not in service.log


def test_it_leaves_no_socket_at_home(shared_database, tmp_path):
    with Service(shared_database, HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path)) as service:
        assert get(service, "/").status == 200
        workers_of(service)
        assert [*tmp_path.rglob("*")] == []
