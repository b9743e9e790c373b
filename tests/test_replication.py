"""A database that follows another by logical replication: what becomes of its tally."""

import time

import pytest
from conftest import new_database, swift_server
from local.postgres import apply_schema
from sessions import hours, inexact, on_every_major, totals, vote


@pytest.fixture(scope="module")
def publishing_server(server):
    """A server of the same version as `server` that other servers can follow."""
    with swift_server(bindir=server.bindir, options={"wal_level": "logical"}) as publishing_server:
        yield publishing_server


@pytest.fixture
def publisher(publishing_server, connect):
    """A Session on a database with votes, cast before anybody follows it."""
    with new_database(publishing_server) as url:
        apply_schema(url)
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


def caught_up(publisher, subscriber):
    """Wait until the subscriber has what the publisher has, row for row."""
    rows = "SELECT array_agg(votes::text ORDER BY row_id) FROM (SELECT row_id, extract(epoch FROM date_created), vote FROM votes) AS votes"
    states = "SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel"
    deadline = time.monotonic() + 30
    while not (
        subscriber.execute(states).fetchone()[0]
        and subscriber.execute(rows).fetchone() == publisher.execute(rows).fetchone()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def change(publisher):
    """Change votes in each way that there is."""
    vote(publisher, "Gummi", "Pita", "Gummi")
    publisher.execute("UPDATE votes SET vote = 'Gummi', date_created = '2024-05-02 13:00 UTC' WHERE row_id = 1")
    publisher.execute("DELETE FROM votes WHERE row_id = 2")


@on_every_major
@pytest.mark.parametrize("tables", ["TABLE votes, tally", "ALL TABLES"])
def test_a_subscriber_to_votes_and_tally_has_both(connection, publisher, follow, tables):
    follow(tables)
    caught_up(publisher, connection)
    change(publisher)
    caught_up(publisher, connection)
    wait_for_equal_tallies(publisher, connection)
    assert inexact(connection) == []
    publisher.execute("TRUNCATE votes")
    vote(publisher, "Pita")
    caught_up(publisher, connection)
    wait_for_equal_tallies(publisher, connection)
    assert totals(connection) == {"Gummi": 0, "Pita": 1}
    assert inexact(connection) == []


def wait_for_equal_tallies(publisher, subscriber):
    """Wait until both tell the same of their votes."""
    deadline = time.monotonic() + 10
    while (totals(subscriber), hours(subscriber)) != (totals(publisher), hours(publisher)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@on_every_major
def test_a_subscriber_to_votes_alone_has_a_tally_after_a_recount(connection, publisher, follow):
    follow("TABLE votes")
    caught_up(publisher, connection)
    change(publisher)
    caught_up(publisher, connection)
    # Who applies the changes of another database fires no trigger for a statement.
    assert totals(connection) == {"Gummi": 0, "Pita": 0}
    connection.execute("SELECT recount_votes()")
    assert totals(connection) == totals(publisher)
    assert inexact(connection) == []


@on_every_major
@pytest.mark.parametrize("tables", ["TABLE votes, tally", "TABLE votes"])
def test_a_subscriber_that_takes_over_counts_and_numbers_its_own_votes(connection, database, publisher, follow, tables):
    follow(tables)
    caught_up(publisher, connection)
    connection.execute("DROP SUBSCRIPTION all_votes")
    apply_schema(database)
    vote(connection, "Pita")
    assert totals(connection) == {"Gummi": 1, "Pita": 3}
    assert inexact(connection) == []
