"""Fixtures: a server for all tests, a database of its own for each, the service, a browser."""

import itertools
import os
import shutil
import signal
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
from checkout import Running, copy_of_project, swift_folder
from inprocess import InProcess
from local.postgres import LocalPostgres
from local.service import Service
from majors import programs_of
from playwright.sync_api import expect, sync_playwright
from sessions import Session

import catvote

# Tests reach databases by URL alone.
for name in [name for name in os.environ if name.startswith("PG")]:
    del os.environ[name]
# SIGTERM lets fixtures clean up as Ctrl-C does, which a background process would ignore.
for number in signal.SIGINT, signal.SIGTERM:
    signal.signal(number, signal.default_int_handler)

numbers = itertools.count()


def missing(reason):
    """Skip the test for what this machine lacks; in continuous integration that is a failure."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def server_of():
    """A function that returns the server of a major version, by default our own: a LocalPostgres, for all tests."""
    with ExitStack() as stack:
        # Each costs a second of CPU, and tests of several modules may come in any order.
        yield cache(lambda major=None: stack.enter_context(swift_server(bindir=major and programs_of(major))))


@contextmanager
def swift_server(bindir=None, **options):
    """Yield a LocalPostgres with its data in a swift folder, which keeps no more of its log than it needs."""
    with (
        TemporaryDirectory(prefix="catvote-", dir=swift_folder()) as folder,
        LocalPostgres(Path(folder), bindir, options={"max_wal_size": "64MB", **options}) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def server(request, server_of):
    """The server of all tests or, for tests marked on_every_major, the one of that version."""
    try:
        return server_of(getattr(request, "param", None))
    except RuntimeError as error:
        missing(str(error))


@contextmanager
def new_database(server, template="template0"):
    """Yield the URL of a new copy of a template database, dropped at the end unless the server was stopped."""
    name = f"catvote_{next(numbers)}"
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield server.url(name)
        with suppress(psycopg.OperationalError):
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@cache
def template_of(server):
    """Return the name of a database with the schema on a server, to be copied; made once, and gone with the server."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE with_schema TEMPLATE template0")
    catvote.initdb(server.url("with_schema"))
    return "with_schema"


@pytest.fixture
def empty_database(server):
    """URL of a database without anything, for one test."""
    with new_database(server) as url:
        yield url


@pytest.fixture
def database(server):
    """URL of a database with the schema and no votes, for one test."""
    with new_database(server, template_of(server)) as url:
        yield url


@pytest.fixture
def connection(database):
    """An autocommit connection to `database`."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def connect():
    """A function that opens a Session in autocommit mode, closed after the test."""
    sessions = []

    def connect(url):
        sessions.append(Session.connect(url, autocommit=True))
        return sessions[-1]

    yield connect
    # A test that failed may leave sessions that wait for each other.
    for session in sessions:
        session.cancel_safe()
    for session in sessions:
        with session.lock:
            session.close()


@contextmanager
def unsurprised(service):
    """Run a Service; at its end, fail if it has met with an exception that nobody expected."""
    with service:
        yield service
    assert "Traceback" not in service.log


@pytest.fixture
def service(database):
    """The service on `database`, for one test: a Service."""
    with unsurprised(Service(database)) as service:
        yield service


@pytest.fixture(scope="module")
def shared_database(server):
    """URL of a database for all tests of a module that do not mind each other's votes."""
    with new_database(server, template_of(server)) as url:
        yield url


@pytest.fixture(scope="module")
def shared_service(shared_database):
    """The service on `shared_database`, for all tests of a module: a Service."""
    with unsurprised(Service(shared_database)) as service:
        yield service


@pytest.fixture
def shared_connection(shared_database):
    """An autocommit connection to `shared_database`, which has no votes when the test begins."""
    with psycopg.connect(shared_database, autocommit=True, client_encoding="UTF8") as connection:
        connection.execute("TRUNCATE public.votes")
        yield connection


@pytest.fixture
def take_votes(shared_connection):
    """A function that removes the votes stored since the test began, or since its last call, and returns them."""
    return lambda: [vote for (vote,) in shared_connection.execute("DELETE FROM public.votes RETURNING vote")]


@pytest.fixture(scope="session")
def in_process():
    """The server of this process, for `serve`: an InProcess."""
    return InProcess()


@pytest.fixture
def serve(in_process, monkeypatch):
    """A function that serves the application, with a DATABASE_URL and more variables, from now on: an InProcess."""
    with ExitStack() as stack:

        def serve(database_url, **variables):
            for name, value in {**variables, "DATABASE_URL": database_url}.items():
                monkeypatch.setenv(name, value)
            in_process.load()
            stack.callback(in_process.close)
            return in_process

        yield serve


@pytest.fixture
def application(serve, shared_database):
    """The application on `shared_database`, in this process, for one test: an InProcess."""
    return serve(shared_database)


@pytest.fixture
def project():
    """A copy of the project, for one test."""
    with copy_of_project() as folder:
        yield folder


@pytest.fixture(scope="module")
def shared_project():
    """A copy of the project, for all tests of a module: they change nothing there but its local database."""
    with copy_of_project() as folder:
        yield folder


@pytest.fixture(scope="module")
def make_run():
    """`make run` in a copy of the project, with a local database, for all tests of a module: a Running."""
    with copy_of_project() as folder, Running(folder) as service:
        yield service


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium: a Playwright Browser."""
    # The first needs a third of the others' processor time.
    programs = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"]
    executable = next(filter(None, map(shutil.which, programs)), None)
    if not executable:
        missing("no Chromium: apt-get install chromium-headless-shell, or chromium")
    # The rest keeps it from calling home.
    arguments = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    arguments += ["--disable-component-update", "--disable-sync"]
    expect.set_options(timeout=30_000)  # on a busy machine, too
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=arguments, chromium_sandbox=os.geteuid() != 0
        )
        yield browser
        browser.close()
