"""Who is measured: catvote, and other ways to write it, each on a database of its own of one PostgreSQL server."""

import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

from faults import sql
from local import ROOT
from local.service import Service

FOLDER = Path(__file__).parent
SAME_SERVER = f"gunicorn --config='{ROOT}/gunicorn.conf.py'"
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
# The same number of votes in each hour of the last 29 days, in the order of their time.
FILL = """
    INSERT INTO {table} (date_created, vote)
    SELECT now() - interval '29 days' * (1 - number::float / {votes}), (ARRAY['Gummi', 'Pita'])[1 + number % 2]
    FROM generate_series(1, {votes}) AS number
"""


def catvote(postgres, name, votes=None, folder=ROOT):
    """Return catvote as production starts it, from a checkout with its packages, with so many votes stored."""
    schema = (folder / "schema.sql").read_text("utf-8")
    enough = 10_000  # for a bar in the history for each hour and day
    contestant = Contestant(postgres, name, schema, "votes", enough if votes is None else votes, folder=folder)
    contestant.environment["PATH"] = f"{folder}/.venv/bin:{contestant.environment['PATH']}"
    return contestant


def other(postgres, name, way, pages, votes=None):
    """Return one of OTHERS, which shows the pages in that folder, with so many votes stored."""
    # PYTHONPATH is for gunicorn.conf.py, and for who takes a part of catvote.
    options = {"command": OTHERS[way], "folder": FOLDER, "PYTHONPATH": str(ROOT), "PAGES": str(pages)}
    return Contestant(postgres, name, VOTE_TABLE, "vote", votes or 0, **options)


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


class Contestant(Service):
    """A service to be measured, with two workers unless WEB_CONCURRENCY says otherwise; a context manager.

    postgres -- its LocalPostgres, in which it gets a new database of that name, with that schema
    table -- where votes are stored
    votes -- how many are stored beforehand; if none, the table is emptied before each turn
    options -- those of Service
    """

    def __init__(self, postgres, name, schema, table, votes, **options):
        self.postgres, self.database, self.table, self.keeps_votes = postgres, postgres.url(name), table, votes > 0
        super().__init__(self.database, WEB_CONCURRENCY=os.environ.get("WEB_CONCURRENCY") or "2", **options)
        self.most_connections = 0  # to the database, that were seen after a turn
        sql(postgres.url(), f"CREATE DATABASE {name}")
        fill = FILL.format(table=table, votes=votes)
        for statements in schema, fill, f"VACUUM ANALYZE {table}", "CHECKPOINT":
            sql(self.database, statements)

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

    def begin_turn(self):
        """Forget all votes, unless there were some beforehand."""
        if not self.keeps_votes:
            sql(self.database, f"TRUNCATE {self.table}")

    def end_turn(self):
        """Note how many connections to the database there are: the pool keeps those of a turn for a few seconds."""
        others = "datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ((connections,),) = sql(self.database, f"SELECT count(*) FROM pg_stat_activity WHERE {others}")
        self.most_connections = max(self.most_connections, connections)
