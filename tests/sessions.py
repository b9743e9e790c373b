"""Sessions that vote and look at the tally, one or many at once: for tests of schema.sql."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import psycopg
import pytest
from local import ROOT
from local.processes import wait_until
from local.programs import server_programs

SCHEMA = (ROOT / "schema.sql").read_text()
CATS = ("Gummi", "Pita")

# What matters most runs on the oldest and the newest PostgreSQL, too. None: the one of all other tests, which may be one
# of them.
OWN_MAJOR = server_programs()[0][0] if server_programs() else None
on_every_major = pytest.mark.parametrize(
    "server", [None, *({14, 18} - {OWN_MAJOR})], indirect=True, ids=lambda major: str(major or "own")
)


class Session(psycopg.Connection):
    """A connection that can also execute a statement in the background."""

    def start(self, statement):
        """Execute a statement in a thread; return a future of its cursor."""
        executor = ThreadPoolExecutor(1)
        future = executor.submit(self.execute, statement)
        executor.shutdown(wait=False)
        return future


def vote(connection, *cats):
    """Cast votes, one for each cat named."""
    connection.execute("INSERT INTO public.votes (vote) SELECT unnest(%s::text[])", [list(cats)])


def hours(connection):
    """Return {hour of UTC as text: {cat: votes}}, as people see it."""
    hours = {}
    query = "SELECT (hour AT TIME ZONE 'UTC')::text, vote, votes FROM public.votes_by_hour"
    for hour, cat, votes in connection.execute(query):
        hours.setdefault(hour, {})[cat] = votes
    return hours


def totals(connection):
    """Return the tally as people see it."""
    return dict(connection.execute("SELECT vote, votes FROM public.vote_totals").fetchall())


def inexact(connection):
    """Return (hour or 'total', cat, votes by the views, rows in votes) where they differ, all seen in one snapshot."""
    return connection.execute(
        """
        SELECT hour, vote, kept.votes, counted.votes
        FROM (
            SELECT 'total' AS hour, vote, votes FROM public.vote_totals
            UNION ALL
            SELECT hour::text, vote, votes FROM public.votes_by_hour
        ) AS kept
        FULL JOIN (
            SELECT coalesce(hour::text, 'total') AS hour, vote, count(*) AS votes
            FROM (SELECT to_timestamp(floor(extract(epoch FROM date_created) / 3600) * 3600), vote FROM public.votes) AS row (hour, vote)
            GROUP BY GROUPING SETS ((vote), (vote, hour))
            HAVING hour IS NULL OR isfinite(hour)
        ) AS counted USING (hour, vote)
        WHERE kept.votes IS DISTINCT FROM coalesce(counted.votes, CASE hour WHEN 'total' THEN 0 END)
        """,
        prepare=False,
    ).fetchall()


def wait_until_blocked(observer, connection):
    """Return as soon as the connection's statement waits for another session's lock."""
    query = "SELECT cardinality(pg_blocking_pids(%s)) > 0"
    wait_until(lambda: observer.execute(query, [connection.info.backend_pid]).fetchone()[0])


def at_once(sessions, url, work):
    """Call work(connection, number) in that many sessions at once; return what the calls returned."""
    barrier = Barrier(sessions, timeout=10)

    def session(number):
        with psycopg.connect(url, autocommit=True) as connection:
            barrier.wait()
            return work(connection, number)

    with ThreadPoolExecutor(sessions) as executor:
        return list(executor.map(session, range(sessions)))


def run(server, program, *arguments, standard_input=None):
    """Return the standard output of a PostgreSQL program, which must end without an error, a warning or a notice."""
    command = [server.bindir / program, *arguments]
    process = subprocess.run(command, input=standard_input, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


def psql(server, url, statements):
    """Have psql execute statements, one after the other."""
    run(server, "psql", "-Xq", "--set=ON_ERROR_STOP=1", url, standard_input=statements)
