"""Who is measured: catvote, and other ways to write it, each on a database of its own of one PostgreSQL server."""

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import psycopg
from local.postgres import ROOT, apply_schema
from local.service import Service

FOLDER = Path(__file__).parent
VENV = Path(sys.prefix) / "bench"
BARE = "gunicorn --config=bare_settings.py bare_bottle:app"
WITHOUT_DATABASE = "gunicorn --config=bare_settings.py without_database:app"
FLASK = f"{VENV}/bin/gunicorn --workers=2 flask_way:app"
ASYNC = f"{VENV}/bin/uvicorn --workers=2 --no-access-log --port=$PORT async_way:app"
# As Flask-SQLAlchemy's create_all() makes it, which two workers must not do at once.
VOTE_TABLE = """
    CREATE TABLE vote (id serial PRIMARY KEY, date_created timestamp DEFAULT now(), vote varchar(10) NOT NULL)
"""
# Votes from first to last of so many, the same number in each hour of the last 29 days, in the order of their time.
FILL = """
    INSERT INTO {table} (date_created, vote)
    SELECT now() - interval '29 days' * (1 - number::float / {votes}), (ARRAY['Gummi', 'Pita'])[1 + number % 2]
    FROM generate_series({first}, {last}) AS number
"""
FILL_AT_ONCE = 1_000_000
VOTES_OF_HISTORY = 100_000  # so that its page has a bar for each hour and day


def install():
    """Make the virtualenv of the contestants, unless it is there."""
    wanted, installed = FOLDER / "requirements.txt", VENV / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted.read_text():
        print(f"Installing the contestants into {VENV}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        subprocess.run([VENV / "bin/pip", "install", "-qq", "--disable-pip-version-check", "-r", wanted], check=True)
        shutil.copy(wanted, installed)


class Database:
    """A new database with catvote's schema and the one table of the others."""

    def __init__(self, postgres, name):
        self.postgres, self.url = postgres, postgres.url(name)
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        apply_schema(self.url)
        self.run(VOTE_TABLE)

    def run(self, statements):
        """Run SQL; return the first value of the first row, if any."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statements)
            return cursor.fetchone()[0] if cursor.description else None

    def fill(self, table, votes):
        """Store so many votes in a table, evenly over the last 29 days."""
        for first in range(1, votes + 1, FILL_AT_ONCE):
            last = min(votes, first + FILL_AT_ONCE - 1)
            self.run(FILL.format(table=table, votes=votes, first=first, last=last))
        for statement in f"VACUUM ANALYZE {table}", "CHECKPOINT":
            self.run(statement)


class Contestant(Service):
    """A service to be measured; a context manager.

    database -- its Database
    table -- what to empty before each turn, if anything
    command -- how to start it in this folder; without it, it is catvote as production starts it
    environment -- variables
    """

    def __init__(self, database, table=None, command=None, **environment):
        # catvote's module, for those who take a part of it.
        super().__init__(database.url, PYTHONPATH=str(ROOT), **environment)
        self.database, self.table = database, table
        if command:
            self.command, self.folder = command, FOLDER

    def __exit__(self, *_):
        with suppress(AssertionError, ProcessLookupError):  # uvicorn leaves a process behind for a moment
            self.stop()

    def get(self, path):
        """Return the body that it answers for a path."""
        with urlopen(self.url + path) as answer:
            return answer.read()

    def empty(self):
        """Forget all votes, unless this contestant is to keep them."""
        if self.table:
            self.database.run(f"TRUNCATE {self.table}")

    def restart(self):
        """Stop it and start it anew."""
        self.__exit__()
        self.__enter__()


def start_compared(stack, postgres, pages):
    """Start those who are compared with each other; return them by name.

    stack -- an ExitStack that ends them
    pages -- a folder for what the others show, so that all serve the same pages
    """

    def start(database, table=None, command=None, **environment):
        contestant = Contestant(Database(postgres, database), table, command, PAGES=str(pages), **environment)
        return stack.enter_context(contestant)

    catvote = start("catvote", "votes")
    history = start("history")
    history.database.fill("votes", VOTES_OF_HISTORY)
    save_pages(catvote, history, pages)
    contestants = {
        "catvote": catvote,
        "catvote's history": history,
        "catvote, one worker": start("one_worker", "votes", WEB_CONCURRENCY="1"),
        "without database": start("without_database", None, WITHOUT_DATABASE),
        "bare Bottle": start("bare_bottle", None, BARE),
        "the Flask way": start("flask_way", "vote", FLASK),
        "the async way": start("async_way", "vote", ASYNC),
    }
    for file in linked_files(catvote):
        for name in "bare Bottle", "the Flask way", "the async way":
            if contestants[name].get(file) != catvote.get(file):
                raise RuntimeError(f"{name} does not serve the same {file} as catvote")
    return contestants


def save_pages(catvote, history, pages):
    """Save what catvote shows into a folder, its page also as a template with places for the counts."""
    page = catvote.get("/").decode()
    template, places = re.subn(r'(data-votes="(\w+)"[^>]*>)0', r'\1{{ votes["\2"] }}', page)
    if places != 2:
        raise RuntimeError(f"catvote's page has {places} counts of 0 in place of two: {page}")
    pages.joinpath("page.html").write_text(page)
    pages.joinpath("index.html").write_text(template)
    pages.joinpath("tally.json").write_bytes(catvote.get("/tally.json"))
    pages.joinpath("history.html").write_bytes(history.get("/history"))


def linked_files(catvote):
    """Return the addresses of the files that a browser loads with catvote's page."""
    return list(dict.fromkeys(re.findall(r'(?:href|src)="(/static/[^"]+)"', catvote.get("/").decode())))


def start_grown(stack, postgres, pages, sizes):
    """Start catvote and the Flask way with so many votes each; return {("catvote", size): its contestant, ...}.

    catvote has one worker here, so that its first reading is the first.
    """
    contestants = {}
    for size in sizes:
        print(f"Storing {size:,} votes, twice", file=sys.stderr)
        database = Database(postgres, f"grown_{size}")
        database.fill("votes", size)
        database.fill("vote", size)
        ways = {
            "catvote": Contestant(database, None if size else "votes", WEB_CONCURRENCY="1"),
            "the Flask way": Contestant(database, None if size else "vote", FLASK, PAGES=str(pages)),
        }
        for name, contestant in ways.items():
            contestants[name, size] = stack.enter_context(contestant)
    return contestants


def databases_of_pgbench(postgres):
    """Return two databases for pgbench: as schema.sql makes it, and without the counters of the hours."""
    with_hours, without_hours = Database(postgres, "with_hours"), Database(postgres, "without_hours")
    without_hours.run((FOLDER / "without_hours.sql").read_text())
    return with_hours, without_hours
