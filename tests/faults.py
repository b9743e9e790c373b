"""Faults to bring about in real processes, and what to ask the database meanwhile."""

import select
import socket
import time
from contextlib import contextmanager, suppress
from itertools import accumulate
from threading import Thread
from urllib.parse import urlsplit

import psutil
import psycopg


def sql(url, statement, *parameters):
    """Run a statement on a connection of its own; return its rows."""
    with psycopg.connect(url, autocommit=True, connect_timeout=2) as connection:
        cursor = connection.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


def backends(url, condition="true"):
    """Return the ids of the server processes that the service has in that database."""
    statement = f"""
        SELECT pid FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'catvote'
        AND pid <> pg_backend_pid() AND {condition}
    """
    return [pid for (pid,) in sql(url, statement)]


WAITING_FOR_A_LOCK = "wait_event_type = 'Lock'"  # a condition for `backends`


def at_each_vote(url, statements):
    """Have that database run these statements of PL/pgSQL when it has stored votes, before it commits them."""
    sql(
        url,
        f"""
        CREATE FUNCTION at_each_vote() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {statements}; RETURN NULL; END $$;
        CREATE TRIGGER at_each_vote AFTER INSERT ON votes FOR EACH STATEMENT EXECUTE FUNCTION at_each_vote();
        """,
    )


def end_sessions(url):
    """End the service's sessions in that database, so that it has to begin new ones."""
    for pid in backends(url):
        sql(url, "SELECT pg_terminate_backend(%s, 5000)", pid)


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


class Network:
    """A way to a server with the faults of real ones; a context manager.

    url -- the server's; `self.url` is the same by this way
    delay -- seconds that a new connection takes
    round_trip -- seconds that a question and its answer take on their way, at least
    forgets_after -- seconds of silence after which it forgets a connection, as NAT and load balancers do: from then on
        it swallows what either side sends, and says nothing
    """

    def __init__(self, url, delay=0, round_trip=0, forgets_after=None):
        self.target = urlsplit(url)
        self.delay, self.round_trip, self.forgets_after = delay, round_trip, forgets_after
        self.sockets = [socket.create_server(("127.0.0.1", 0))]
        self.forgotten = 0
        self.url = url.replace(f":{self.target.port}/", f":{self.sockets[0].getsockname()[1]}/")

    def __enter__(self):
        Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        for each in self.sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
            each.close()

    def accept(self):
        """Take each connection that comes, at once."""
        with suppress(OSError):
            while True:
                client, _ = self.sockets[0].accept()
                self.sockets.append(client)
                Thread(target=self.carry, args=[client], daemon=True).start()

    def carry(self, client):
        """Carry bytes both ways, until either side hangs up or has been silent for too long."""
        time.sleep(self.delay)
        with (
            suppress(OSError, ValueError),
            socket.create_connection((self.target.hostname, self.target.port)) as server,
        ):
            ways = {client: server, server: client}
            while ready := select.select(ways, [], [], self.forgets_after)[0]:
                for sender in ready:
                    data = sender.recv(65536)
                    if not data:
                        ways[sender].shutdown(socket.SHUT_RDWR)
                        return
                    time.sleep(self.round_trip / 2)
                    ways[sender].sendall(data)
            self.forgotten += 1
            while client.recv(65536):
                pass
