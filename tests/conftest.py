"""Fixtures: a server for all tests, a database of its own for each, the service, a browser."""

import itertools
import os
import shutil
import signal
from contextlib import contextmanager

import psycopg
import pytest
from local.postgres import LocalPostgres, apply_schema, programs_of
from local.service import Service, free_port
from playwright.sync_api import sync_playwright
from sessions import Session

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
def own_server():
    """A PostgreSQL server for all tests: a LocalPostgres."""
    with LocalPostgres() as server:
        yield server


@pytest.fixture(scope="module")
def server(request, own_server):
    """The server of all tests or, for tests marked on_every_major, one of that version."""
    major = getattr(request, "param", None)
    if not major:
        yield own_server
        return
    try:
        bindir = programs_of(major)
    except RuntimeError as error:
        missing(str(error))
    with LocalPostgres(bindir=bindir) as other:
        yield other


@pytest.fixture(scope="session")
def template(own_server):
    """Name of a database with the schema, to be copied."""
    with psycopg.connect(own_server.url(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE catvote_template")
    apply_schema(own_server.url("catvote_template"))
    return "catvote_template"


@contextmanager
def new_database(server, template):
    """Yield the URL of a new copy of a template database, dropped at the end."""
    name = f"catvote_{next(numbers)}"
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield server.url(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_database(server):
    """URL of a database without anything, for one test."""
    with new_database(server, "template0") as url:
        yield url


@pytest.fixture
def database(empty_database):
    """URL of a database with the schema and no votes, for one test."""
    apply_schema(empty_database)
    return empty_database


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


@pytest.fixture
def service(database):
    """The service on `database`, for one test: a Service."""
    with Service(database) as service:
        yield service


@pytest.fixture(scope="module")
def shared_database(server, template):
    """URL of a database for all tests of a module that do not mind each other's votes."""
    with new_database(server, template) as url:
        yield url


@pytest.fixture(scope="module")
def shared_service(shared_database):
    """The service on `shared_database`, for all tests of a module: a Service."""
    with Service(shared_database) as service:
        yield service


@pytest.fixture(scope="module")
def collect(shared_database):
    """A function that returns the votes stored since its last call, and removes them."""
    with psycopg.connect(shared_database, autocommit=True) as connection:
        yield lambda: [vote for (vote,) in connection.execute("DELETE FROM votes RETURNING vote")]


@pytest.fixture
def stored(collect):
    """A function that returns the votes stored since the test began."""
    collect()
    return collect


@pytest.fixture(scope="module")
def service_without_database():
    """The service, whose database cannot be reached."""
    with Service(f"postgresql://127.0.0.1:{free_port()}/catvote") as service:
        yield service


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium: a Playwright Browser."""
    executable = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if not executable:
        missing("no Chromium: apt-get install chromium")
    # The rest keeps it from calling home.
    arguments = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    arguments += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=arguments, chromium_sandbox=os.geteuid() != 0
        )
        yield browser
        browser.close()


def pytest_terminal_summary(terminalreporter):
    """Print the figures that tests have recorded, a line each."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if report.when == "call" and name == "figures":
                terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {value}")
