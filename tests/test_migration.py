"""What schema.sql promises to a database that has votes already: applied again, brought forward, restored, copied."""

from threading import Event

import psycopg
import pytest
from conftest import new_database
from local import ROOT
from psycopg import errors
from psycopg.conninfo import make_conninfo
from sessions import (
    ISOLATION_LEVELS,
    at_once,
    feed,
    hours,
    inexact,
    on_every_major,
    run,
    totals,
    vote,
    wait_until_blocked,
)

import catvote

SCHEMA = (ROOT / "schema.sql").read_text()
FIRST_SCHEMA = (ROOT / "tests/first_schema.sql").read_text()


# Applied again


@on_every_major
def test_applying_the_schema_again_changes_nothing(connection, database, server):
    def dump():
        text = run(server.bindir / "pg_dump", database)
        return [line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))]

    vote(connection, "Pita", "Gummi", "Pita")
    before = dump()
    catvote.initdb(database)
    catvote.initdb(database)
    assert dump() == before


@on_every_major
def test_eight_sessions_at_once_may_apply_the_schema_to_an_empty_database(empty_database, connect):
    at_once(8, empty_database, lambda connection, number: connection.execute(SCHEMA))
    connection = connect(empty_database)
    vote(connection, "Pita")
    assert totals(connection) == {"Gummi": 0, "Pita": 1}


@on_every_major
def test_applying_the_schema_while_votes_come_in_loses_none(connection, database):
    voting, done = Event(), Event()

    def work(session, number):
        if number == 0:
            try:
                assert voting.wait(10)
                for _ in range(10):
                    session.execute(SCHEMA)
            finally:
                done.set()
            return 0
        cast = 0
        while not done.is_set():
            vote(session, "Pita")
            voting.set()
            cast += 1
        return cast

    cast = sum(at_once(4, database, work))
    assert totals(connection) == {"Gummi": 0, "Pita": cast}
    assert inexact(connection) == []


@on_every_major
def test_the_owner_of_a_database_need_not_be_a_superuser(server, empty_database, connect):
    with psycopg.connect(server.url(), autocommit=True) as superuser:
        superuser.execute("CREATE ROLE database_owner LOGIN PASSWORD 'secret'")
        superuser.execute(f"ALTER DATABASE {empty_database.rpartition('/')[2]} OWNER TO database_owner")
    url = make_conninfo(empty_database, user="database_owner", password="secret")
    catvote.initdb(url)
    catvote.initdb(url)
    owner = connect(url)
    vote(owner, "Pita")
    copy_in(owner, 50)
    catvote.initdb(url)
    assert next_row_id(owner) == 51
    owner.execute("SELECT recount_votes()")
    assert inexact(owner) == []


@on_every_major
@pytest.mark.parametrize("isolation", ISOLATION_LEVELS)
def test_the_first_tally_has_all_votes_of_an_older_table(empty_database, connect, isolation):
    connection, voter = connect(empty_database), connect(empty_database)
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET default_transaction_isolation = '{isolation}'")
    connection.execute(
        """
        CREATE TABLE votes (
            row_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            date_created timestamptz NOT NULL DEFAULT now(),
            vote varchar(10) NOT NULL
        )
        """
    )
    vote(connection, "Pita", "Gummi", "Pita")
    voter.execute("BEGIN")
    vote(voter, "Pita")
    applying = connect(empty_database)
    applied = applying.start(SCHEMA)
    wait_until_blocked(connection, applying)
    voter.execute("COMMIT")
    applied.result()
    vote(connection, "Gummi")
    assert totals(connection) == {"Gummi": 2, "Pita": 3}
    assert inexact(connection) == []


def test_the_schema_gives_way_to_a_long_report_and_votes_do_not_wait(connection, database, connect):
    reader, applying = connect(database), connect(database)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM votes_by_day")
    applied = applying.start(SCHEMA)
    wait_until_blocked(connection, applying)
    connection.execute("SET lock_timeout = '1s'")
    vote(connection, "Pita")
    with pytest.raises(errors.LockNotAvailable):
        applied.result(timeout=5)
    assert totals(connection) == {"Gummi": 0, "Pita": 1}


def test_the_schema_gives_way_before_a_vote_behind_it_is_given_up(connection, database, connect):
    voter, applying = connect(database), connect(database)
    voter.execute("BEGIN")
    vote(voter, "Pita")
    applied = applying.start(SCHEMA)
    wait_until_blocked(connection, applying)
    connection.execute("SET lock_timeout = '1900ms'")
    vote(connection, "Gummi")
    with pytest.raises(errors.LockNotAvailable):
        applied.result(timeout=5)


# A database of the first version, whose tally has totals alone


@pytest.fixture
def first_version(empty_database):
    """URL of a database that the first version made, with votes."""
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(FIRST_SCHEMA)
        vote(connection, "Pita")
        connection.execute(
            """
            INSERT INTO public.votes (date_created, vote)
            VALUES ('2024-05-01 12:00 UTC', 'Pita'), ('2024-05-01 12:59 UTC', 'Pita'), ('2024-05-01 13:00 UTC', 'Gummi'),
                   ('infinity', 'Pita'), ('-infinity', 'Gummi')
            """
        )
    return empty_database


def schema_of(server, url):
    """Return what pg_dump says of a database, without data and without the index that may stay as it was."""
    lines = run(server.bindir / "pg_dump", "--schema-only", "--no-comments", url).splitlines()
    return [line for line in lines if "restrict" not in line and "votes_date_created_brin" not in line]


@on_every_major
def test_a_database_of_the_first_version_becomes_as_a_new_one(server, first_version):
    with new_database(server) as new:
        catvote.initdb(new)
        catvote.initdb(first_version)
        assert schema_of(server, first_version) == schema_of(server, new)


@on_every_major
def test_old_votes_stay_as_they_are_and_get_their_hours(first_version, connect):
    connection = connect(first_version)
    votes = connection.execute("SELECT votes::text, xmin FROM votes ORDER BY row_id").fetchall()
    catvote.initdb(first_version)
    assert connection.execute("SELECT votes::text, xmin FROM votes ORDER BY row_id").fetchall() == votes
    assert hours(connection)["2024-05-01 12:00:00"] == {"Pita": 2}
    assert hours(connection)["2024-05-01 13:00:00"] == {"Gummi": 1}
    vote(connection, "Gummi")
    connection.execute("UPDATE votes SET date_created = '2024-05-01 13:30 UTC' WHERE vote = 'Pita'")
    assert inexact(connection) == []


@on_every_major
def test_old_and_new_code_vote_and_read_while_the_first_version_is_brought_forward(first_version, connect):
    voting, done = Event(), Event()
    before = 6

    def work(session, number):
        cast = 0
        if number == 0:
            try:
                assert voting.wait(10)
                for _ in range(3):
                    session.execute(SCHEMA)
            finally:
                done.set()
        elif number < 3:
            while not done.is_set():
                vote(session, "Pita", "Gummi")
                voting.set()
                cast += 2
        else:
            seen = before
            while not done.is_set():
                now = sum(totals(session).values())
                assert seen <= now
                seen = now
                assert hours(session)["2024-05-01 12:00:00"] == {"Pita": 2}  # the chart never lacks what is old
        return cast

    cast = sum(at_once(4, first_version, work))
    connection = connect(first_version)
    assert sum(totals(connection).values()) == before + cast
    assert inexact(connection) == []


def test_a_transaction_that_began_before_is_counted_in_hours_or_waited_for(first_version, connect):
    connection, older, voter, applying = (connect(first_version) for _ in range(4))
    older.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM pg_class")  # has a snapshot, no lock on votes
    voter.execute("BEGIN")
    vote(voter, "Pita")
    applied = applying.start(SCHEMA)
    wait_until_blocked(connection, applying)
    voter.execute("COMMIT")
    applied.result()
    vote(older, "Gummi")
    older.execute("COMMIT")
    assert inexact(connection) == []


@on_every_major
def test_votes_go_on_while_the_hours_of_old_votes_are_counted(first_version, connect):
    connection, reader, applying = (connect(first_version) for _ in range(3))
    reader.execute("BEGIN")
    assert hours(reader)["2024-05-01 12:00:00"] == {"Pita": 2}
    # It has counted, and waits for the reader before it may replace the view.
    applied = applying.start(SCHEMA)
    wait_until_blocked(connection, applying)
    connection.execute("SET lock_timeout = '300ms'")
    vote(connection, "Pita", "Gummi")
    assert sum(totals(connection).values()) == 8
    with pytest.raises(errors.LockNotAvailable):
        applied.result(timeout=20)
    assert hours(reader)["2024-05-01 12:00:00"] == {"Pita": 2}
    reader.execute("COMMIT")
    catvote.initdb(first_version)
    assert inexact(connection) == []


@on_every_major
def test_a_role_that_may_only_vote_and_read_goes_on_without_a_new_grant(first_version, connect):
    connection = connect(first_version)
    connection.execute(
        """
        CREATE ROLE service;
        GRANT INSERT (vote) ON votes TO service;
        GRANT SELECT ON vote_totals, votes_by_hour TO service
        """
    )
    catvote.initdb(first_version)
    connection.execute("SET ROLE service")
    vote(connection, "Gummi")
    assert totals(connection) == {"Gummi": 3, "Pita": 4}
    assert hours(connection)["2024-05-01 13:00:00"] == {"Gummi": 1}
    for statement in ["SELECT * FROM votes", "SELECT * FROM tally", "DELETE FROM tally"]:
        with pytest.raises(errors.InsufficientPrivilege):
            connection.execute(statement)
    connection.execute("RESET ROLE; DROP OWNED BY service; DROP ROLE service")


@on_every_major
def test_what_was_counted_once_is_not_counted_again(first_version, connect):
    connection = connect(first_version)
    catvote.initdb(first_version)
    connection.execute("UPDATE tally SET votes = votes + 7")
    catvote.initdb(first_version)
    assert inexact(connection)


def test_an_emptied_tally_is_counted_anew(connection, database):
    vote(connection, "Pita", "Gummi", "Pita")
    connection.execute("DELETE FROM tally")
    catvote.initdb(database)
    assert inexact(connection) == []


# Votes that came with a row_id of their own


def copy_in(connection, row_id):
    """Insert a vote that has its row_id already."""
    connection.execute("INSERT INTO votes (row_id, vote) OVERRIDING SYSTEM VALUE VALUES (%s, 'Pita')", [row_id])


def next_row_id(connection):
    """Cast a vote; return its row_id."""
    return connection.execute("INSERT INTO votes (vote) VALUES ('Gummi') RETURNING row_id").fetchone()[0]


@on_every_major
@pytest.mark.parametrize("votes_before", [0, 1])
def test_the_schema_moves_a_sequence_on_that_rows_have_overtaken(connection, database, votes_before):
    vote(connection, *["Pita"] * votes_before)
    copy_in(connection, 1 + votes_before)
    copy_in(connection, 50)
    with pytest.raises(errors.UniqueViolation):
        next_row_id(connection)
    catvote.initdb(database)
    assert next_row_id(connection) == 51


def test_the_schema_moves_a_sequence_on_that_was_never_used(connection, database):
    copy_in(connection, 50)
    catvote.initdb(database)
    assert next_row_id(connection) == 51


@pytest.mark.parametrize("row_ids", [[], [-5], [3]])
def test_the_schema_never_moves_a_sequence_back(connection, database, row_ids):
    vote(connection, *["Pita"] * 100)
    connection.execute("DELETE FROM votes")
    for row_id in row_ids:
        copy_in(connection, row_id)
    catvote.initdb(database)
    assert next_row_id(connection) == 101


def test_a_new_database_counts_its_votes_from_one(connection, database):
    catvote.initdb(database)
    assert next_row_id(connection) == 1


# Dump and restore


@on_every_major
@pytest.mark.parametrize("options", [[], ["--no-owner", "--no-privileges"]], ids=["all", "without owners"])
def test_a_restored_database_is_exact_and_goes_on_counting(connection, database, server, connect, options):
    vote(connection, "Pita", "Gummi", "Pita")
    dump = run(server.bindir / "pg_dump", *options, database)
    with new_database(server) as copy:
        feed(server, copy, dump)
        restored = connect(copy)
        assert totals(restored) == {"Gummi": 1, "Pita": 2}
        vote(restored, "Gummi")
        assert totals(restored) == {"Gummi": 2, "Pita": 2}
        with pytest.raises(errors.CheckViolation):
            vote(restored, "Nobody")
        feed(server, copy, SCHEMA)
        assert inexact(restored) == []
        restored.close()


@pytest.mark.parametrize("option", ["--exclude-table=tally", "--exclude-table=votes", "--schema=public"])
def test_restored_data_are_exact_after_a_recount(connection, database, server, connect, option):
    vote(connection, "Pita", "Gummi", "Pita")
    dump = run(server.bindir / "pg_dump", "--data-only", option, database)
    with new_database(server) as copy:
        catvote.initdb(copy)
        feed(server, copy, dump)
        restored = connect(copy)
        # The triggers have counted the votes already: a tally from the dump comes on top.
        assert (inexact(restored) == []) == (option == "--exclude-table=tally")
        restored.execute("SELECT recount_votes()")
        assert inexact(restored) == []
        restored.close()


# Votes of the earlier application

RECIPE = """
BEGIN; ALTER TABLE model RENAME TO model_copied;
INSERT INTO votes (date_created, vote) SELECT date_created AT TIME ZONE 'UTC', vote FROM model_copied
WHERE vote IN ('Gummi', 'Pita') ORDER BY row_id; COMMIT;
"""


@pytest.fixture
def earlier_application(connection):
    """The table of the earlier Flask application, with votes of which not all are for a cat."""
    connection.execute(
        """
        SET timezone = 'Asia/Tokyo';
        CREATE TABLE model (row_id serial PRIMARY KEY, date_created timestamp DEFAULT now(), vote varchar);
        INSERT INTO model (row_id, date_created, vote)
        VALUES (3, '2015-03-01 12:00', 'Pita'), (1, '2015-01-01 12:00', 'Gummi'), (2, '2015-02-01 12:00', 'Dog'),
               (4, '2015-04-01 12:00', 'Pita'), (5, '2015-05-01 12:00', NULL);
        SELECT setval('model_row_id_seq', 5);
        """
    )


@on_every_major
def test_the_recipe_copies_votes_for_cats_in_their_order(connection, earlier_application):
    connection.execute(RECIPE)
    connection.execute("SET timezone = 'UTC'")
    assert connection.execute("SELECT row_id, date_created::text, vote FROM votes ORDER BY row_id").fetchall() == [
        (1, "2015-01-01 12:00:00+00", "Gummi"),
        (2, "2015-03-01 12:00:00+00", "Pita"),
        (3, "2015-04-01 12:00:00+00", "Pita"),
    ]
    assert inexact(connection) == []


def test_the_recipe_copies_but_once(connection, earlier_application):
    connection.execute(RECIPE)
    with pytest.raises(errors.UndefinedTable):
        connection.execute(RECIPE)
    connection.execute("ROLLBACK")
    assert totals(connection) == {"Gummi": 1, "Pita": 2}


def test_the_recipe_copies_votes_that_the_earlier_application_is_casting(
    connection, earlier_application, database, connect
):
    earlier, copying = connect(database), connect(database)
    earlier.execute("BEGIN; INSERT INTO model (vote) VALUES ('Gummi')")
    copied = copying.start(RECIPE)
    wait_until_blocked(connection, copying)
    earlier.execute("COMMIT")
    copied.result()
    assert totals(connection) == {"Gummi": 2, "Pita": 2}
