"""Who is measured: catvote, and other ways to write it, each on a database of its own of one PostgreSQL server."""

import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import psycopg
from local import ROOT
from local.service import Service

FOLDER = Path(__file__).parent
SAME_SERVER = f"gunicorn --config={ROOT}/gunicorn.conf.py"
# The command of each that is not catvote itself.
OTHERS = {
    "without database": f"{SAME_SERVER} without_database:app",
    "bare Bottle": f"{SAME_SERVER} bare_bottle:app",
    "the Flask way": "gunicorn flask_way:app",
    "the async way": "uvicorn --no-access-log --port=$PORT async_way:app",
}
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


class Database:
    """A new database without anything."""

    def __init__(self, postgres, name):
        self.postgres, self.url = postgres, postgres.url(name)
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")

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
    """A service to be measured, with two workers unless WEB_CONCURRENCY says otherwise; a context manager.

    database -- its Database
    emptied -- the table to empty before each turn, if any
    options -- those of Service
    """

    def __init__(self, database, emptied=None, **options):
        super().__init__(database.url, WEB_CONCURRENCY=os.environ.get("WEB_CONCURRENCY") or "2", **options)
        self.database, self.emptied = database, emptied
        self.most_connections = 0  # to the database, that were seen after a turn

    def __exit__(self, *_):
        with suppress(RuntimeError):  # uvicorn leaves a process behind for a moment
            self.stop()

    def get(self, path):
        """Return the text that it answers for a path."""
        with urlopen(self.url + path) as answer:
            return answer.read().decode()

    def files(self):
        """Return the addresses of the files that a browser loads with the page, the stylesheet first."""
        linked = dict.fromkeys(re.findall(r'(?:href|src)="(/static/[^"]+)"', self.get("/")))
        return sorted(linked, key=lambda file: ".css" not in file)

    def prepare(self):
        """Forget all votes, unless this contestant is to keep them."""
        if self.emptied:
            self.database.run(f"TRUNCATE {self.emptied}")

    def note_connections(self):
        """Note how many connections to the database there are: the pool keeps those of a turn for a few seconds."""
        statement = """
            SELECT count(*) - 1 FROM pg_stat_activity
            WHERE datname = current_database() AND backend_type = 'client backend'
        """  # without this one
        self.most_connections = max(self.most_connections, self.database.run(statement))

    def restart(self):
        """Stop it and start it anew."""
        self.__exit__()
        self.__enter__()


def catvote(postgres, name, votes, folder=ROOT):
    """Return catvote as production starts it, from a checkout with its packages, with so many votes stored."""
    database = Database(postgres, name)
    database.run((folder / "schema.sql").read_text("utf-8"))
    database.fill("votes", votes)
    contestant = Contestant(database, None if votes else "votes", folder=folder)
    contestant.environment["PATH"] = f"{folder}/.venv/bin:{contestant.environment['PATH']}"
    return contestant


def other(postgres, name, way, pages, votes=0):
    """Return one of OTHERS, which shows the pages in that folder, with so many votes stored."""
    database = Database(postgres, name)
    database.run(VOTE_TABLE)
    database.fill("vote", votes)
    # PYTHONPATH is for gunicorn.conf.py, and for who takes a part of catvote.
    options = {"command": OTHERS[way], "folder": FOLDER, "PYTHONPATH": str(ROOT), "PAGES": str(pages)}
    return Contestant(database, None if votes else "vote", **options)


def save_pages(contestant, pages):
    """Save what catvote shows into a folder, for the others; its page also as a template with places for the counts."""
    page = contestant.get("/")
    template, places = re.subn(r'(data-votes="(\w+)"[^>]*>)[\d,]+', r'\1{{ votes["\2"] }}', page)
    if places != 2:
        raise RuntimeError(f"catvote's page has {places} counts in place of two: {page}")
    texts = {"page.html": page, "template.html": template}
    texts |= {"tally.json": contestant.get("/tally.json"), "history.html": contestant.get("/history")}
    for name, text in texts.items():
        Path(pages, name).write_text(text)
