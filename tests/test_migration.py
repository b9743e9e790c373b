"""What schema.sql promises to a database that has votes already: applied again, brought forward, mended, restored."""

import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event

import client
import psycopg
import pytest
from conftest import new_database
from faults import Network
from local import ROOT
from local.processes import wait_until
from local.service import Service
from psycopg import errors
from psycopg.conninfo import make_conninfo
from sessions import (
    SCHEMA,
    at_once,
    hours,
    inexact,
    on_every_major,
    psql,
    run,
    totals,
    vote,
    wait_until_blocked,
)

from catvote import initdb

FIRST_SCHEMA = (ROOT / "tests/first_schema.sql").read_text()
EARLIER_SCHEMAS = {"first": FIRST_SCHEMA, "second": FIRST_SCHEMA + (ROOT / "tests/second_schema.sql").read_text()}
OLD_VOTES = """
    INSERT INTO public.votes (date_created, vote)
    VALUES ('2024-05-01 12:00 UTC', 'Pita'), ('2024-05-01 12:59 UTC', 'Pita'), ('2024-05-01 13:00 UTC', 'Gummi'),
           ('infinity', 'Pita'), ('-infinity', 'Gummi')
"""


@pytest.fixture(params=EARLIER_SCHEMAS)
def earlier_database(request, empty_database):
    """URL of a database that an earlier version made, with votes."""
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(EARLIER_SCHEMAS[request.param])
        connection.execute(OLD_VOTES)
    return empty_database


# Applied again, to a database where nothing is odd


@on_every_major
def test_applying_the_schema_again_changes_nothing(connection, database, server):
    def dump():
        return [line for line in run(server, "pg_dump", database).splitlines() if "restrict" not in line]

    vote(connection, "Pita", "Gummi", "Pita")
    before = dump()
    initdb(database)
    psql(server, database, SCHEMA)
    assert dump() == before


def test_applying_the_schema_leaves_the_session_as_it_was(connection):
    connection.execute(SCHEMA)
    assert connection.execute("SELECT name FROM pg_settings WHERE source = 'session'").fetchall() == []


@on_every_major
def test_eight_sessions_at_once_may_apply_the_schema_to_an_empty_database(empty_database, connect):
    at_once(8, empty_database, lambda connection, number: connection.execute(SCHEMA))
    connection = connect(empty_database)
    vote(connection, "Pita")
    assert totals(connection) == {"Gummi": 0, "Pita": 1}


def test_who_applies_the_schema_waits_for_as_long_as_another_does(connection, database, connect):
    connection.execute("SELECT pg_advisory_lock(hashtext('catvote schema'))")
    applied = connect(database).start(SCHEMA)
    assert not wait([applied], timeout=4).done  # longer than for a lock that keeps votes waiting
    connection.execute("SELECT pg_advisory_unlock_all()")
    applied.result(timeout=20)


def test_a_sound_database_keeps_no_vote_waiting_and_is_not_recounted(connection, database, connect):
    applying, voter = connect(database), connect(database)
    vote(connection, "Pita")
    connection.execute("UPDATE tally SET votes = votes + 7")
    voter.execute("BEGIN")
    vote(voter, "Pita")
    applying.execute(SCHEMA.rpartition("COMMIT;")[0])
    connection.execute("SET lock_timeout = '1s'")
    vote(connection, "Gummi")
    applying.execute("COMMIT")
    voter.execute("COMMIT")
    assert inexact(connection)


def test_the_schema_gives_way_to_a_long_report_and_votes_do_not_wait(connection, database, connect):
    reader, applying = connect(database), connect(database)
    reader.execute("BEGIN; SELECT * FROM votes_by_day")
    applied = applying.start(SCHEMA)
    wait_until_blocked(connection, applying)
    connection.execute("SET lock_timeout = '1s'")
    vote(connection, "Pita")
    with pytest.raises(errors.LockNotAvailable):
        applied.result(timeout=10)


@on_every_major
def test_the_owner_of_a_database_need_not_be_a_superuser(server, empty_database, connect):
    with psycopg.connect(server.url(), autocommit=True) as superuser:
        superuser.execute("CREATE ROLE database_owner LOGIN PASSWORD 'secret'")
        superuser.execute(f"ALTER DATABASE {empty_database.rpartition('/')[2]} OWNER TO database_owner")
    url = make_conninfo(empty_database, user="database_owner", password="secret")
    initdb(url)
    owner = connect(url)
    vote(owner, "Pita")
    copy_in(owner, 50)
    initdb(url)
    assert next_row_id(owner) == 51
    owner.execute("SELECT recount_votes()")
    assert inexact(owner) == []


# Mended: the counters


CHANGES = """
    ; INSERT INTO votes (vote) VALUES ('Pita');
    DELETE FROM votes WHERE row_id = 2;
    UPDATE votes SET vote = 'Pita' WHERE row_id = 4
"""
ACCIDENTS = {
    "a trigger was dropped": "DROP TRIGGER votes_count_insert ON votes" + CHANGES,
    "a trigger was disabled": "ALTER TABLE votes DISABLE TRIGGER votes_count_delete" + CHANGES,
    "tally was dropped": "DROP TABLE tally CASCADE",
    "tally was emptied": "DELETE FROM tally",
    "votes was dropped": "DROP TABLE votes CASCADE",
}


@pytest.mark.parametrize("accident", ACCIDENTS.values(), ids=ACCIDENTS)
def test_the_schema_mends_the_counters_after(connection, database, accident):
    vote(connection, "Pita", "Gummi", "Pita", "Gummi")
    connection.execute(accident)
    initdb(database)
    assert inexact(connection) == []
    connection.execute(CHANGES)
    assert inexact(connection) == []


def test_the_schema_makes_a_dropped_index_anew(connection, database):
    vote(connection, "Pita")
    connection.execute("DROP INDEX votes_date_created_brin")
    initdb(database)
    options = "SELECT reloptions FROM pg_class WHERE relname = 'votes_date_created_brin'"
    assert "autosummarize=on" in connection.execute(options).fetchone()[0]  # so that new rows need no vacuum


# Mended: rows that came with a row_id of their own


def copy_in(connection, row_id):
    """Insert a vote that has its row_id already."""
    connection.execute("INSERT INTO votes (row_id, vote) OVERRIDING SYSTEM VALUE VALUES (%s, 'Pita')", [row_id])


def next_row_id(connection):
    """Cast a vote; return its row_id."""
    return connection.execute("INSERT INTO votes (vote) VALUES ('Gummi') RETURNING row_id").fetchone()[0]


def test_the_schema_moves_a_sequence_on_that_rows_have_overtaken(connection, database):
    copy_in(connection, 50)
    initdb(database)
    assert next_row_id(connection) == 51


def test_the_schema_waits_for_rows_that_are_just_coming(connection, database, connect):
    copying, applying = connect(database), connect(database)
    copy_in(connection, 50)
    copying.execute("BEGIN")
    copy_in(copying, 51)
    applied = applying.start(SCHEMA)
    wait_until_blocked(connection, applying)
    copying.execute("COMMIT")
    applied.result()
    assert next_row_id(connection) == 52


def test_the_schema_never_moves_a_sequence_back(connection, database):
    vote(connection, *["Pita"] * 100)
    connection.execute("DELETE FROM votes; DELETE FROM tally")
    copy_in(connection, 3)
    connection.execute("DROP TRIGGER votes_count_insert ON votes")
    initdb(database)
    assert next_row_id(connection) == 101


# Brought forward


@on_every_major
def test_an_earlier_version_becomes_as_a_new_one_without_a_change_to_votes_or_rights(server, earlier_database, connect):
    def structure(url):
        """Return the statements that would make these tables, without the index, which may stay as it was."""
        lines = run(server, "pg_dump", "--schema-only", "--no-comments", "--no-privileges", url).splitlines()
        return [line for line in lines if "restrict" not in line and "votes_date_created_brin" not in line]

    connection = connect(earlier_database)
    connection.execute("CREATE ROLE earlier_service; GRANT SELECT ON vote_totals, votes_by_hour TO earlier_service")
    kept = """
        SELECT array_agg(votes::text || xmin ORDER BY row_id),
               (SELECT array_agg(relacl ORDER BY relname) FROM pg_class WHERE relname IN ('vote_totals', 'votes_by_hour'))
        FROM votes
    """
    before = connection.execute(kept).fetchone()
    initdb(earlier_database)
    assert connection.execute(kept).fetchone() == before
    assert hours(connection) == {"2024-05-01 12:00:00": {"Pita": 2}, "2024-05-01 13:00:00": {"Gummi": 1}}
    assert inexact(connection) == []
    with new_database(server) as new:
        initdb(new)
        assert structure(earlier_database) == structure(new)
    connection.execute("DROP OWNED BY earlier_service; DROP ROLE earlier_service")


def old_code(session, ended):
    """Vote and look as the earlier versions' catvote.py does, until the event; return the number of votes cast."""
    cast = seen = 0
    while not ended.wait(0.02):
        session.execute("INSERT INTO public.votes (vote) SELECT unnest(%s::text[])", [["Pita", "Gummi"]])
        cast += 2
        now = sum(votes for _, votes in session.execute("SELECT vote, votes FROM public.vote_totals"))
        assert seen + 2 <= now
        seen = now
        history = """
            SELECT extract(epoch FROM hour)::bigint, vote, votes
            FROM public.votes_by_hour
            WHERE hour > now() - interval '30 days' AND hour <= now()
        """
        assert sum(votes for _, _, votes in session.execute(history)) >= cast
    return cast


def new_code(service, ended):
    """Vote as a visitor does, until the event; return the number of votes that were acknowledged."""
    acknowledged = 0
    while not ended.wait(0.02):
        answer = client.vote(service)
        assert answer.status in (303, 503)
        acknowledged += answer.status == 303
    return acknowledged


@pytest.mark.parametrize(
    ("earlier_database", "votes"),
    [("first", 5), ("second", 1_000_000)],
    indirect=["earlier_database"],
)
def test_no_vote_of_old_or_new_code_is_lost_as_an_earlier_version_is_brought_forward(earlier_database, connect, votes):
    connection = connect(earlier_database)
    connection.execute(
        """
        INSERT INTO votes (date_created, vote)
        SELECT now() - random() * interval '300 days', 'Pita' FROM generate_series(1, %s) ORDER BY 1
        """,
        [votes - 5],
    )
    voted = "SELECT count(*) FROM votes"
    ended = Event()
    with Service(earlier_database) as service, ThreadPoolExecutor() as executor:
        casting = [executor.submit(old_code, connect(earlier_database), ended) for _ in range(2)]
        casting += [executor.submit(new_code, service, ended) for _ in range(2)]
        try:
            for _ in range(2):
                before = connection.execute(voted).fetchone()[0]
                wait_until(lambda: connection.execute(voted).fetchone()[0] > before + 20)  # noqa: B023
                initdb(earlier_database)
        finally:
            ended.set()
        cast = sum(each.result() for each in casting)
    assert sum(totals(connection).values()) == votes + cast
    assert inexact(connection) == []


def test_the_first_tally_has_all_votes_of_an_older_table(empty_database, connect):
    connection, voter = connect(empty_database), connect(empty_database)
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET default_transaction_isolation = 'serializable'")
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


# Locks


def test_the_schema_gives_way_before_a_vote_behind_it_is_given_up(earlier_database, connect):
    connection, voter, applying = (connect(earlier_database) for _ in range(3))
    voter.execute("BEGIN")
    vote(voter, "Pita")
    applied = applying.start(SCHEMA)
    wait_until_blocked(connection, applying)
    connection.execute("SET lock_timeout = '1900ms'")
    vote(connection, "Gummi")
    with pytest.raises(errors.LockNotAvailable):
        applied.result(timeout=10)


@pytest.mark.parametrize("view", ["votes_by_hour", "vote_totals"])
def test_slow_readers_keep_no_vote_waiting_for_the_schema(earlier_database, connect, view):
    connection, reader, applying = (connect(earlier_database) for _ in range(3))
    reader.execute(f"BEGIN; SELECT * FROM {view}")
    applied = applying.start(SCHEMA)
    wait_until_blocked(connection, applying)
    connection.execute("SET lock_timeout = '300ms'")
    vote(connection, "Pita")
    reader.execute("COMMIT")
    applied.result(timeout=20)
    assert inexact(connection) == []


def test_readers_and_the_schema_do_not_wait_for_each_other_in_a_circle(earlier_database, connect):
    connection, voter, applying, reader = (connect(earlier_database) for _ in range(4))
    # It has a counter, so that the tally cannot be altered yet; who reads the totals now must not come between.
    voter.execute("BEGIN; SELECT FROM tally")
    applied = applying.start(SCHEMA)
    wait_until_blocked(connection, applying)
    reading = reader.start("SELECT vote, votes FROM public.vote_totals")
    wait_until_blocked(connection, reader)
    voter.execute("COMMIT")
    applied.result(timeout=20)
    assert reading.result(timeout=20).fetchall()


# Slow lines, where psql sends statement by statement


@pytest.mark.parametrize("earlier_database", ["first"], indirect=True)
def test_over_a_slow_line_no_vote_is_kept_waiting_for_a_visitors_patience(server, earlier_database, connect):
    ended = Event()

    def cast(session):
        session.execute("SET lock_timeout = '2s'")
        return old_code(session, ended)

    with Network(earlier_database, round_trip=0.25) as network, ThreadPoolExecutor() as executor:
        casting = [executor.submit(cast, connect(earlier_database)) for _ in range(3)]
        try:
            psql(server, network.url, SCHEMA)
        finally:
            ended.set()
        votes = 5 + sum(each.result() for each in casting)
    connection = connect(earlier_database)
    assert sum(totals(connection).values()) == votes
    assert inexact(connection) == []


@pytest.mark.parametrize("earlier_database", ["first"], indirect=True)
def test_a_psql_that_is_stopped_frees_its_locks(server, earlier_database, connect):
    connection = connect(earlier_database)
    but_for_the_commit, _, _ = SCHEMA.rpartition("COMMIT;")
    command = [server.bindir / "psql", "-Xq", "--output=/dev/null", earlier_database]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            print(but_for_the_commit + "\\warn done", file=program.stdin, flush=True)
            assert program.stderr.readline() == "done\n"
            program.send_signal(signal.SIGSTOP)
            connection.execute("SET lock_timeout = '10s'")
            vote(connection, "Pita")
            connection.execute(SCHEMA)
            assert inexact(connection) == []
        finally:
            program.kill()


# Dump and restore


@on_every_major
def test_a_restored_database_is_exact_and_goes_on_counting(connection, database, server, connect):
    vote(connection, "Pita", "Gummi", "Pita")
    dump = run(server, "pg_dump", database)
    with new_database(server) as copy:
        psql(server, copy, dump)
        restored = connect(copy)
        vote(restored, "Gummi")
        assert totals(restored) == {"Gummi": 2, "Pita": 2}
        assert inexact(restored) == []
        restored.close()
