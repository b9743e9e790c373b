"""Faults to bring about in real processes, and what to ask the database meanwhile."""

from contextlib import contextmanager, suppress
from itertools import accumulate

import psutil
import psycopg
from local.processes import wait_until  # noqa: F401 (until the tests import it from there)


def sql(url, statement, *parameters):
    """Run a statement on a connection of its own; return its rows."""
    with psycopg.connect(url, autocommit=True, connect_timeout=2) as connection:
        cursor = connection.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def backends(url, condition="true"):
    """Return the ids of the server processes that the service has in that database."""
    statement = f"""
        SELECT pid FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'catvote'
        AND pid <> pg_backend_pid() AND {condition}
    """
    return [pid for (pid,) in sql(url, statement)]


def freeze(pid):
    """Stop a process and all its children by SIGSTOP; return them."""
    parent = psutil.Process(pid)
    parent.suspend()  # first, so that no child comes later
    family = [parent, *parent.children(recursive=True)]
    for process in family:
        process.suspend()
    return family


@contextmanager
def frozen(pid):
    """Keep a process and all its children stopped for a while."""
    family = freeze(pid)
    try:
        yield
    finally:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def kill(server):
    """Kill all processes of a server, by SIGKILL."""
    for process in freeze(server.server_pid):
        process.kill()
    server.crash()  # which only finds it dead


def recovery(load, healed_at):
    """Return how long after that moment the last vote failed; many have succeeded since."""
    failed_at = max([vote.ended_at for vote in load.votes if vote.status != 303], default=healed_at)
    assert sum(vote.sent_at > failed_at for vote in load.acknowledged) > 50
    return max(failed_at - healed_at, 0)


def most_at_once(answers):
    """Return how many of these visitors waited at the same moment, at most."""
    moments = sorted([(answer.sent_at, 1) for answer in answers] + [(answer.ended_at, -1) for answer in answers])
    return max(accumulate((change for _, change in moments), initial=0))


def workers(service):
    """Old name of Service.workers, until every test has changed over."""
    return psutil.Process(service.process.pid).children()
