"""A database that follows another by logical replication: what becomes of its tally."""

import pytest
from conftest import new_database, swift_server
from local.processes import wait_until
from sessions import hours, inexact, on_every_major, totals, vote

from catvote import initdb


@pytest.fixture(scope="module")
def publishing_server(server):
    """A server of the same version as `server` that other servers can follow."""
    with swift_server(bindir=server.bindir, options={"wal_level": "logical"}) as publishing_server:
        yield publishing_server


@pytest.fixture
def publisher(publishing_server, connect):
    """A Session on a database with votes, cast before anybody follows it."""
    with new_database(publishing_server) as url:
        initdb(url)
        publisher = connect(url)
        vote(publisher, "Pita", "Gummi")
        publisher.execute("INSERT INTO votes (date_created, vote) VALUES ('2024-05-01 12:00 UTC', 'Pita')")
        yield publisher
        publisher.close()


@pytest.fixture
def follow(connection, publisher, publishing_server):
    """A function that makes `connection`'s database follow the publisher's in these tables."""
    # On PostgreSQL 14 and 15, a subscription waits that long for its first worker, by default 5 s.
    connection.execute("ALTER SYSTEM SET wal_retrieve_retry_interval = '100ms'")
    connection.execute("SELECT pg_reload_conf()")

    def follow(tables):
        publisher.execute(f"CREATE PUBLICATION all_votes FOR {tables}")
        url = publishing_server.url(publisher.info.dbname)
        connection.execute(f"CREATE SUBSCRIPTION all_votes CONNECTION '{url}' PUBLICATION all_votes")

    yield follow
    connection.execute("DROP SUBSCRIPTION IF EXISTS all_votes")


def wait_for(publisher, subscriber, look):
    """Wait until a function of a connection returns the same for both databases, all tables being copied."""
    states = "SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel"
    wait_until(lambda: subscriber.execute(states).fetchone()[0] and look(subscriber) == look(publisher))


def rows(connection):
    return connection.execute("SELECT row_id, extract(epoch FROM date_created), vote FROM votes ORDER BY 1").fetchall()


def change(publisher):
    """Change votes in each way that there is."""
    vote(publisher, "Gummi", "Pita", "Gummi")
    publisher.execute("UPDATE votes SET vote = 'Gummi', date_created = '2024-05-02 13:00 UTC' WHERE row_id = 1")
    publisher.execute("DELETE FROM votes WHERE row_id = 2")


@on_every_major
def test_a_subscriber_to_votes_and_tally_has_both(connection, publisher, follow):
    def all_of_it(connection):
        return rows(connection), totals(connection), hours(connection)

    follow("TABLE votes, tally")
    wait_for(publisher, connection, all_of_it)
    change(publisher)
    wait_for(publisher, connection, all_of_it)
    assert inexact(connection) == []
    publisher.execute("TRUNCATE votes")
    vote(publisher, "Pita")
    wait_for(publisher, connection, all_of_it)
    assert inexact(connection) == []


@pytest.mark.parametrize("tables", ["TABLE votes, tally", "TABLE votes"])
def test_a_subscriber_that_takes_over_counts_and_numbers_its_own_votes(connection, database, publisher, follow, tables):
    follow(tables)
    wait_for(publisher, connection, rows)
    connection.execute("DROP SUBSCRIPTION all_votes")
    initdb(database)
    vote(connection, "Pita")
    assert totals(connection) == {"Gummi": 1, "Pita": 3}
    assert inexact(connection) == []
