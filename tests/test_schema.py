"""What schema.sql promises: exact counters whatever SQL changes votes, whoever runs it, at a flat price."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Event

import psycopg
import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st
from local.postgres import ROOT
from psycopg import errors
from sessions import CATS, ISOLATION_LEVELS, at_once, hours, inexact, on_every_major, totals, vote, wait_until_blocked

SCHEMA = (ROOT / "schema.sql").read_text()


def share_one_slot(connection):
    """Let all server processes count in the same slot, as some do by chance: the worst case."""
    (definition,) = connection.execute("SELECT pg_get_functiondef('count_votes'::regproc)").fetchone()
    assert "% 32" in definition
    connection.execute(definition.replace("% 32", "% 1"))


# Exact whatever one session does


class AnyStatements(stateful.RuleBasedStateMachine):
    """All kinds of statements in any order, in transactions, after savepoints, undone or not."""

    lists_of_cats = st.lists(st.sampled_from(CATS), max_size=4)  # none at all, too
    cats = st.sampled_from(CATS)
    divisors = st.integers(1, 3)
    # Two of one hour, the next one's first instant, and what is in no chart.
    dates = st.sampled_from(
        ["2024-05-01 12:00 UTC", "2024-05-01 12:59:59.999999 UTC", "2024-05-01 13:00 UTC"]
        + ["infinity", "-infinity", "12000-01-01", "4000-01-01 BC", "now"]
    )
    sources = st.dictionaries(st.integers(-4, -1), cats, max_size=4)  # by row_id: some exist, some do not

    def __init__(self, connection):
        super().__init__()
        self.execute = connection.execute
        self.connection = connection
        self.depth = 0  # of savepoints, the transaction's beginning being the first
        self.execute("TRUNCATE public.votes")

    def teardown(self):
        if self.depth:
            self.execute("ROLLBACK")

    @stateful.invariant()
    def exact(self):
        assert inexact(self.connection) == []

    @stateful.rule(cats=lists_of_cats)
    def insert(self, cats):
        vote(self.connection, *cats)

    @stateful.rule(votes=st.lists(st.tuples(cats, dates), max_size=4))
    def insert_of_any_date(self, votes):
        with self.connection.cursor() as cursor:
            cursor.executemany("INSERT INTO public.votes (vote, date_created) VALUES (%s, %s)", votes)

    @stateful.rule(votes=st.lists(st.tuples(cats, dates), max_size=4))
    def copy(self, votes):
        with self.connection.cursor().copy("COPY public.votes (vote, date_created) FROM STDIN") as copy:
            for row in votes:
                copy.write_row(row)

    @stateful.rule(cat=cats, divisor=divisors)
    def update(self, cat, divisor):
        self.execute("UPDATE public.votes SET vote = %s WHERE row_id %% %s = 0", [cat, divisor])

    @stateful.rule(divisor=divisors)
    def swap(self, divisor):
        swapped = "CASE vote WHEN 'Pita' THEN 'Gummi' ELSE 'Pita' END"
        self.execute(f"UPDATE public.votes SET vote = {swapped} WHERE row_id %% %s = 0", [divisor])

    @stateful.rule(date=dates, divisor=divisors)
    def move_to_a_date(self, date, divisor):
        self.execute("UPDATE public.votes SET date_created = %s WHERE row_id %% %s = 0", [date, divisor])

    @stateful.rule(minutes=st.integers(-90, 90))
    def move_by_minutes(self, minutes):
        self.execute("UPDATE public.votes SET date_created = date_created + make_interval(mins => %s)", [minutes])

    @stateful.rule(divisor=divisors)
    def delete(self, divisor):
        self.execute("DELETE FROM public.votes WHERE row_id %% %s = 0", [divisor])

    @stateful.rule()
    def truncate(self):
        self.execute("TRUNCATE public.votes")

    @stateful.rule(
        source=sources, action=st.sampled_from(["NOTHING", "UPDATE SET vote = EXCLUDED.vote, date_created = now()"])
    )
    def insert_on_conflict(self, source, action):
        self.execute(
            f"""
            INSERT INTO public.votes (row_id, vote) OVERRIDING SYSTEM VALUE
            SELECT * FROM unnest(%s::bigint[], %s::text[])
            ON CONFLICT (row_id) DO {action}
            """,
            [list(source), list(source.values())],
        )

    @stateful.precondition(lambda self: self.connection.info.server_version >= 15_00_00)
    @stateful.rule(source=sources, date=dates)
    def merge(self, source, date):
        self.execute(
            """
            MERGE INTO public.votes
            USING unnest(%s::bigint[], %s::text[]) AS source (row_id, vote) ON votes.row_id = source.row_id
            WHEN MATCHED AND votes.vote = source.vote THEN DELETE
            WHEN MATCHED THEN UPDATE SET vote = source.vote, date_created = %s
            WHEN NOT MATCHED THEN INSERT (row_id, vote) OVERRIDING SYSTEM VALUE VALUES (source.row_id, source.vote)
            """,
            [list(source), list(source.values()), date],
        )

    @stateful.rule(cats=lists_of_cats)
    def write_four_times_in_one_statement(self, cats):
        self.execute(
            """
            WITH first AS (INSERT INTO public.votes (vote) SELECT unnest(%s::text[])),
                 gone AS (DELETE FROM public.votes WHERE row_id % 3 = 0 RETURNING vote),
                 changed AS (UPDATE public.votes SET vote = 'Pita' WHERE row_id % 3 = 1)
            INSERT INTO public.votes (vote) SELECT vote FROM gone
            """.replace("% 3", "%% 3"),
            [cats],
        )

    @stateful.rule()
    def fail_half_way(self):
        with suppress(errors.CheckViolation), self.connection.transaction():
            vote(self.connection, "Gummi", "Nobody")

    @stateful.rule()
    def recount(self):
        self.execute("SELECT public.recount_votes()")

    @stateful.rule()
    def savepoint(self):
        self.execute(f"SAVEPOINT number_{self.depth}" if self.depth else "BEGIN")
        self.depth += 1

    @stateful.precondition(lambda self: self.depth > 1)
    @stateful.rule(data=st.data(), verb=st.sampled_from(["ROLLBACK TO", "RELEASE"]))
    def end_savepoint(self, data, verb):
        number = data.draw(st.integers(1, self.depth - 1))
        self.execute(f"{verb} number_{number}")
        self.depth = number + (verb == "ROLLBACK TO")  # which keeps the savepoint itself

    @stateful.precondition(lambda self: self.depth)
    @stateful.rule(verb=st.sampled_from(["COMMIT", "ROLLBACK"]))
    def end(self, verb):
        self.execute(verb)
        self.depth = 0


@on_every_major
def test_the_tally_is_exact_after_any_statements(connection):
    stateful.run_state_machine_as_test(
        partial(AnyStatements, connection),
        settings=settings(max_examples=40, stateful_step_count=30, deadline=None, database=None),
    )


def test_a_cat_without_votes_has_a_total_of_zero(connection):
    assert totals(connection) == {"Gummi": 0, "Pita": 0}


def test_totals_come_in_the_order_of_the_cats(connection):
    vote(connection, "Pita", "Gummi", "Pita")
    assert connection.execute("SELECT * FROM vote_totals").fetchall() == [("Gummi", 1), ("Pita", 2)]


def test_totals_and_constraint_know_the_same_cats(connection):
    (constraint,) = connection.execute(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'votes_vote_is_a_cat'"
    ).fetchone()
    assert sorted(re.findall(r"'(.*?)'", constraint)) == list(totals(connection))


def test_recount_mends_a_damaged_tally(connection):
    vote(connection, "Pita", "Gummi", "Pita")
    connection.execute("UPDATE tally SET votes = votes + 7 WHERE vote = 'Pita'")
    connection.execute("DELETE FROM tally WHERE vote = 'Gummi'")
    assert inexact(connection)
    connection.execute("SELECT recount_votes()")
    assert inexact(connection) == []


# Exact whatever many sessions do


@on_every_major
@pytest.mark.parametrize("slots", [32, 1])
@pytest.mark.parametrize("isolation", ISOLATION_LEVELS)
def test_mixed_statements_of_many_sessions_neither_deadlock_nor_miscount(connection, database, isolation, slots):
    if slots == 1:
        share_one_slot(connection)
    done = Event()

    def look(reader):
        while not done.is_set():
            assert inexact(reader) == []

    def write(writer, number):
        writer.execute(f"SET default_transaction_isolation = '{isolation}'")
        # Writers meet at the counters alone: each changes votes of its own, told by their minute.
        own = f"extract(minute FROM date_created) = {number}"
        date = f"timestamptz '2000-01-01 12:0{number} UTC'"
        swapped = "CASE vote WHEN 'Pita' THEN 'Gummi' ELSE 'Pita' END"
        statements = [
            f"INSERT INTO votes (date_created, vote) SELECT {date}, unnest('{{Pita,Gummi,Pita}}'::text[])",
            f"INSERT INTO votes (date_created, vote) VALUES ({date} + interval '1 hour', 'Gummi')",
            f"UPDATE votes SET vote = {swapped} WHERE {own}",
            f"UPDATE votes SET date_created = {date} + row_id % 3 * interval '1 hour' WHERE {own}",
            f"BEGIN; DELETE FROM votes WHERE {own}; ROLLBACK",
            f"DELETE FROM votes WHERE {own} AND row_id % 3 < 2",
        ]
        if number == 0:
            statements.append("TRUNCATE votes")
        for statement in statements * 12:
            while True:
                try:
                    writer.execute(statement)
                    break
                except errors.SerializationFailure:
                    writer.execute("ROLLBACK")

    with psycopg.connect(database, autocommit=True) as reader, ThreadPoolExecutor() as executor:
        looking = executor.submit(look, reader)
        try:
            at_once(4, database, write)
        finally:
            done.set()
        looking.result()
    assert inexact(connection) == []


CHANGES_OF_BOTH_CATS = {
    "INSERT": "INSERT INTO votes (vote) VALUES ('Pita'), ('Gummi')",
    "UPDATE": "UPDATE votes SET vote = CASE WHEN row_id < 3 THEN 'Pita' ELSE 'Gummi' END",
    "DELETE": "DELETE FROM votes",
}


@pytest.mark.parametrize("statement", CHANGES_OF_BOTH_CATS.values(), ids=CHANGES_OF_BOTH_CATS.keys())
def test_a_statement_holds_no_counter_while_it_waits_for_that_of_an_earlier_cat(
    connection, database, connect, statement
):
    # Locks taken in one order never close a circle.
    share_one_slot(connection)
    vote(connection, "Pita", "Gummi", "Gummi", "Gummi")
    blocker, blocked = connect(database), connect(database)
    blocker.execute("BEGIN")
    vote(blocker, "Gummi")
    running = blocked.start(statement)
    wait_until_blocked(connection, blocked)
    connection.execute("SET lock_timeout = '1s'")
    vote(connection, "Pita")
    blocker.execute("COMMIT")
    running.result()
    assert inexact(connection) == []


def test_a_statement_holds_no_counter_while_it_waits_for_that_of_an_earlier_hour(connection, database, connect):
    share_one_slot(connection)
    connection.execute(
        """
        INSERT INTO votes (date_created, vote)
        SELECT timestamptz '2024-05-01 UTC' + hour * interval '1 hour', 'Pita' FROM unnest('{1,5,5}'::int[]) AS hour
        """
    )
    move = "UPDATE votes SET date_created = '2024-05-01 {}:00 UTC' WHERE row_id = {}".format
    blocker, blocked = connect(database), connect(database)
    blocker.execute("BEGIN")
    blocker.execute(move(3, 1))  # holds the counters of hours 1 and 3
    running = blocked.start(move(1, 2))
    wait_until_blocked(connection, blocked)
    connection.execute("SET lock_timeout = '1s'")
    connection.execute(move(6, 3))
    blocker.execute("COMMIT")
    running.result()
    assert inexact(connection) == []


def test_votes_of_different_sessions_seldom_wait_for_each_other(connection, database, connect):
    connection.execute("BEGIN")
    vote(connection, "Pita")
    waited = 0
    for _ in range(10):
        other = connect(database)
        other.execute("SET lock_timeout = '50ms'")
        try:
            vote(other, "Pita")
        except errors.LockNotAvailable:
            waited += 1
    assert waited <= 2


@on_every_major
def test_a_snapshot_older_than_a_truncate_sees_neither_votes_nor_totals(connection, database, connect):
    vote(connection, "Pita")
    older = connect(database)
    older.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    assert totals(older) == {"Gummi": 0, "Pita": 1}
    older.execute("COMMIT; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    connection.execute("TRUNCATE votes")
    vote(connection, "Gummi")
    assert inexact(older) == []
    vote(older, "Pita")
    assert inexact(older) == []
    older.execute("COMMIT")
    assert totals(connection) == {"Gummi": 1, "Pita": 1}


@pytest.mark.parametrize("isolation", ISOLATION_LEVELS)
def test_a_truncate_from_an_older_snapshot_takes_newer_votes_along(connection, database, connect, isolation):
    older = connect(database)
    older.execute(f"BEGIN ISOLATION LEVEL {isolation}")
    older.execute("SELECT 1")
    vote(connection, "Pita", "Gummi")
    older.execute("TRUNCATE votes; COMMIT")
    assert inexact(connection) == []


@on_every_major
@pytest.mark.parametrize("isolation", ISOLATION_LEVELS)
@pytest.mark.parametrize("counter", ["new counter", "known counter"])
def test_a_recount_from_an_older_snapshot_is_exact_or_refused(connection, database, connect, isolation, counter):
    vote(connection, "Pita")
    voter = connect(database) if counter == "new counter" else connection
    older = connect(database)
    older.execute(f"BEGIN ISOLATION LEVEL {isolation}")
    older.execute("SELECT 1")
    vote(voter, "Pita", "Gummi")
    with suppress(errors.SerializationFailure, errors.UniqueViolation):
        older.execute("SELECT recount_votes()")
        older.execute("COMMIT")
    older.execute("ROLLBACK")
    assert inexact(connection) == []


def test_no_vote_waits_for_a_recount_nor_a_recount_for_votes(connection, database, connect):
    voter, recounting = connect(database), connect(database)
    vote(connection, "Pita")
    connection.execute("DELETE FROM tally")
    voter.execute("BEGIN")
    vote(voter, "Pita")
    recounting.execute("BEGIN; SET LOCAL lock_timeout = '1s'; SELECT recount_votes()")
    connection.execute("SET lock_timeout = '1s'")
    vote(connection, "Gummi")
    connection.execute("DELETE FROM votes WHERE vote = 'Pita'")
    voter.execute("COMMIT")
    recounting.execute("COMMIT")
    assert totals(connection) == {"Gummi": 1, "Pita": 1}
    assert inexact(connection) == []


@on_every_major
def test_two_recounts_at_once_mend_a_damage_once(connection, database, connect):
    vote(connection, "Pita", "Gummi")
    connection.execute("UPDATE tally SET votes = votes + 7")
    first, second = connect(database), connect(database)
    first.execute("BEGIN; SELECT recount_votes()")
    running = second.start("SELECT recount_votes()")
    wait_until_blocked(connection, second)
    first.execute("COMMIT")
    running.result()
    assert inexact(connection) == []


@on_every_major
def test_recounts_among_votes_of_many_sessions_leave_the_counters_exact(connection, database):
    def work(session, number):
        for _ in range(60):
            if number == 0:
                session.execute("SELECT recount_votes()")
                assert inexact(session) == []
            else:
                vote(session, "Pita", "Gummi")
                session.execute(
                    "UPDATE votes SET date_created = date_created - interval '1 hour' WHERE row_id %% 7 = %s", [number]
                )

    at_once(4, database, work)
    assert inexact(connection) == []


# What a vote is


@pytest.mark.parametrize("cat", ["Nobody", "", "pita", "Pita ", "Pita\n", "Gummi,Pita"])
def test_the_constraint_refuses_all_but_the_cats(connection, cat):
    with pytest.raises(errors.CheckViolation) as refusal:
        vote(connection, cat)
    assert refusal.value.sqlstate == "23514"
    assert refusal.value.diag.constraint_name == "votes_vote_is_a_cat"


@pytest.mark.parametrize("column", ["vote", "date_created"])
def test_nothing_may_be_null(connection, column):
    row = {"vote": "Pita", "date_created": "2000-01-01", column: None}
    with pytest.raises(errors.NotNullViolation) as refusal:
        connection.execute("INSERT INTO votes (vote, date_created) VALUES (%(vote)s, %(date_created)s)", row)
    assert refusal.value.sqlstate == "23502"
    assert (refusal.value.diag.table_name, refusal.value.diag.column_name) == ("votes", column)


def test_a_vote_gets_its_number_and_date_by_itself(connection):
    with connection.transaction():
        vote(connection, "Pita", "Gummi")
        rows = connection.execute("SELECT row_id, date_created = now(), vote FROM votes ORDER BY row_id").fetchall()
    assert rows == [(1, True, "Pita"), (2, True, "Gummi")]


def test_a_vote_cannot_choose_its_number(connection):
    with pytest.raises(errors.GeneratedAlways):
        connection.execute("INSERT INTO votes (row_id, vote) VALUES (1, 'Pita')")


# Views for people


def test_votes_by_day_has_the_days_of_the_session(connection):
    connection.execute(
        """
        INSERT INTO votes (date_created, vote)
        VALUES ('2024-05-01 23:30 UTC', 'Pita'), ('2024-05-01 12:00 UTC', 'Pita'), ('2024-05-01 10:00 UTC', 'Gummi')
        """
    )
    query = "SELECT day::text, vote, votes FROM votes_by_day"
    connection.execute("SET timezone = 'UTC'")
    assert connection.execute(query).fetchall() == [("2024-05-01", "Gummi", 1), ("2024-05-01", "Pita", 2)]
    connection.execute("SET timezone = 'Europe/Berlin'")
    assert connection.execute(query).fetchall() == [
        ("2024-05-01", "Gummi", 1),
        ("2024-05-01", "Pita", 1),
        ("2024-05-02", "Pita", 1),
    ]


def test_votes_by_hour_counts_from_the_full_hour(connection):
    connection.execute(
        """
        INSERT INTO votes (date_created, vote)
        VALUES ('2024-05-01 13:00 UTC', 'Pita'), ('2024-05-01 12:59 UTC', 'Pita'), ('2024-05-01 12:00 UTC', 'Pita')
        """
    )
    connection.execute("SET timezone = 'UTC'")
    rows = connection.execute("SELECT hour::text, vote, votes FROM votes_by_hour").fetchall()
    assert rows == [("2024-05-01 12:00:00+00", "Pita", 2), ("2024-05-01 13:00:00+00", "Pita", 1)]


def test_an_hour_whose_votes_are_gone_is_not_shown(connection):
    connection.execute("INSERT INTO votes (date_created, vote) VALUES ('2024-05-01 13:00 UTC', 'Pita')")
    connection.execute("UPDATE votes SET date_created = '2024-05-01 15:30 UTC'")
    assert hours(connection) == {"2024-05-01 15:00:00": {"Pita": 1}}
    connection.execute("DELETE FROM votes")
    assert hours(connection) == {}


FAR_DATES = ["infinity", "-infinity", "12000-01-01", "294276-12-31 23:59 UTC", "4714-11-24 00:00 UTC BC", "3000-01-01"]
# As the service asks, whatever the session's time zone and style of dates.
HISTORY = """
SELECT extract(epoch FROM hour)::bigint, vote, votes
FROM public.votes_by_hour
WHERE hour > now() - interval '30 days' AND hour <= now()
"""


@on_every_major
@pytest.mark.parametrize("date", FAR_DATES)
def test_a_vote_of_any_date_is_counted_and_spoils_no_other(connection, date):
    connection.execute("SET timezone = 'Asia/Kolkata'; SET datestyle = 'SQL, DMY'")
    vote(connection, "Pita")
    connection.execute("INSERT INTO votes (date_created, vote) VALUES (%s, 'Pita'), (now(), 'Gummi')", [date])
    assert totals(connection) == {"Gummi": 1, "Pita": 2}
    assert inexact(connection) == []
    assert [votes for _, _, votes in connection.execute(HISTORY)] == [1, 1]
    connection.execute("SELECT recount_votes()")
    assert inexact(connection) == []
    connection.execute("DELETE FROM votes WHERE date_created = %s", [date])
    assert totals(connection) == {"Gummi": 1, "Pita": 1}
    assert inexact(connection) == []


@pytest.mark.parametrize("date", ["infinity", "-infinity"])
def test_a_vote_without_a_finite_date_is_in_no_hour(connection, date):
    connection.execute("INSERT INTO votes (date_created, vote) VALUES (%s, 'Pita')", [date])
    assert (totals(connection)["Pita"], hours(connection)) == (1, {})


def test_hours_are_of_utc_whatever_the_zone_of_the_session(connection):
    connection.execute("SET timezone = 'Asia/Kolkata'")
    connection.execute("INSERT INTO votes (date_created, vote) VALUES ('2024-05-01 13:15 UTC', 'Pita')")
    assert hours(connection) == {"2024-05-01 13:00:00": {"Pita": 1}}


def test_all_that_people_meet_has_a_comment(connection):
    uncommented = connection.execute(
        """
        SELECT oid::regclass::text
        FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') AND obj_description(oid) IS NULL
        UNION ALL
        SELECT attrelid::regclass || '.' || attname
        FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0
              AND col_description(attrelid, attnum) IS NULL
        UNION ALL
        SELECT oid::regprocedure::text
        FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace AND obj_description(oid) IS NULL
        """
    ).fetchall()
    assert uncommented == []


# Flat cost


def cast_many(connection):
    """Cast 200,000 votes in one statement, one a minute; return the seconds that took."""
    start = time.monotonic()
    connection.execute(
        """
        INSERT INTO votes (date_created, vote)
        SELECT timestamptz '2020-01-01 UTC' + n * interval '1 minute', CASE WHEN n % 3 = 0 THEN 'Pita' ELSE 'Gummi' END
        FROM generate_series(1, 200000) AS n
        """
    )
    return time.monotonic() - start


def explain(connection, query):
    """Run a query; return its plan as text and how many pages it touched."""
    (plan,) = connection.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}").fetchone()
    return str(plan), plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"]


@on_every_major
def test_totals_cost_the_same_with_many_votes_as_with_few(connection):
    vote(connection, "Pita", "Gummi")
    _, pages = explain(connection, "SELECT * FROM vote_totals")
    cast_many(connection)
    for _ in range(1000):
        vote(connection, "Pita")
    _, later_pages = explain(connection, "SELECT * FROM vote_totals")
    assert later_pages <= pages + 5
    assert explain(connection, "SELECT vote, count(*) FROM votes GROUP BY vote")[1] > 1000


@on_every_major
def test_ten_years_of_hours_make_neither_totals_nor_the_last_month_dearer(connection):
    vote(connection, "Pita", "Gummi")
    last_month = "SELECT * FROM votes_by_hour WHERE hour > now() - interval '30 days'"
    explain(connection, "SELECT * FROM vote_totals")
    _, pages = explain(connection, "SELECT * FROM vote_totals")
    connection.execute(
        """
        INSERT INTO votes (date_created, vote)
        SELECT now() - hour * interval '1 hour', cat
        FROM generate_series(0, 87600) AS hour, unnest('{Gummi,Pita}'::text[]) AS cat
        """
    )
    connection.execute("VACUUM ANALYZE tally")
    plan, later_pages = explain(connection, "SELECT * FROM vote_totals")
    assert "'Index Cond': \"(tally.hour = '-infinity'" in plan.replace("(hour =", "(tally.hour =")
    assert later_pages <= pages + 10
    plan, pages = explain(connection, last_month)
    assert "tally_primary_key" in plan
    assert pages < 100  # of some 3,000


def test_a_statement_is_counted_once_not_each_of_its_rows(connection):
    connection.execute("ALTER TABLE votes DISABLE TRIGGER USER")
    uncounted = cast_many(connection)
    connection.execute("ALTER TABLE votes ENABLE TRIGGER USER")
    assert cast_many(connection) < 20 * uncounted  # by a trigger for each row it were 500 times


def test_the_index_finds_a_time_range(connection):
    cast_many(connection)
    connection.execute("VACUUM ANALYZE votes")
    plan, pages = explain(
        connection, "SELECT count(*) FROM votes WHERE date_created BETWEEN '2020-03-01' AND '2020-03-02'"
    )
    assert "votes_date_created_brin" in plan
    assert pages < 400


# Search paths and roles


@pytest.fixture
def hostile(connection):
    """SQL that sets a search path where names as ours lead astray."""
    connection.execute(
        """
        CREATE SCHEMA hostile;
        CREATE FUNCTION hostile.fail() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE 'led astray'; END $$;
        CREATE FUNCTION hostile.pg_backend_pid() RETURNS int LANGUAGE sql AS 'SELECT hostile.fail()';
        CREATE FUNCTION hostile.hashtext(text) RETURNS int LANGUAGE sql AS 'SELECT hostile.fail()';
        CREATE FUNCTION hostile.add(bigint) RETURNS bigint LANGUAGE sql AS 'SELECT hostile.fail()::bigint';
        CREATE AGGREGATE hostile.count(*) (SFUNC = hostile.add, STYPE = bigint);
        CREATE TABLE hostile.votes (LIKE public.votes);
        CREATE TABLE hostile.tally (LIKE public.tally);
        """
    )
    return """
        CREATE TEMPORARY TABLE votes (LIKE public.votes);
        CREATE TEMPORARY TABLE tally (LIKE public.tally);
        SET search_path = pg_temp, hostile, public, pg_catalog;
        """


@on_every_major
def test_votes_are_counted_with_an_empty_search_path(connection):
    connection.execute("SET search_path = ''")
    vote(connection, "Pita", "Gummi", "Pita")
    connection.execute("UPDATE public.votes SET vote = 'Gummi' WHERE row_id = 1")
    connection.execute("DELETE FROM public.votes WHERE row_id = 2")
    assert totals(connection) == {"Gummi": 1, "Pita": 1}
    connection.execute("SELECT public.recount_votes()")
    connection.execute("TRUNCATE public.votes")
    assert totals(connection) == {"Gummi": 0, "Pita": 0}


@on_every_major
def test_votes_are_counted_with_a_hostile_search_path(connection, hostile):
    connection.execute(hostile)
    vote(connection, "Pita", "Gummi", "Pita")
    connection.execute("UPDATE public.votes SET vote = 'Gummi' WHERE row_id = 1")
    connection.execute("DELETE FROM public.votes WHERE row_id = 2")
    assert totals(connection) == {"Gummi": 1, "Pita": 1}
    connection.execute("SELECT public.recount_votes()")
    assert totals(connection) == {"Gummi": 1, "Pita": 1}
    connection.execute("TRUNCATE public.votes")
    assert totals(connection) == {"Gummi": 0, "Pita": 0}


def test_the_schema_is_applied_with_a_hostile_search_path(connection, hostile):
    vote(connection, "Pita")
    connection.execute(hostile)
    connection.execute(SCHEMA)
    connection.execute("DROP SCHEMA hostile CASCADE")
    connection.execute("SET search_path = public")
    vote(connection, "Pita")
    assert totals(connection) == {"Gummi": 0, "Pita": 2}


def refuses(connection, statement):
    """Return whether the server says that the role may not do that."""
    try:
        connection.execute(statement)
    except errors.InsufficientPrivilege:
        return True
    return False


@on_every_major
def test_a_role_may_be_allowed_to_vote_and_nothing_else(connection):
    connection.execute("CREATE ROLE voter; GRANT INSERT ON votes TO voter; SET ROLE voter")
    vote(connection, "Pita", "Gummi")
    for statement in [
        "SELECT * FROM votes",
        "SELECT * FROM vote_totals",
        "DELETE FROM votes",
        "TRUNCATE votes",
        "UPDATE tally SET votes = 9",
        "SELECT recount_votes()",
    ]:
        assert refuses(connection, statement)
    connection.execute("RESET ROLE")
    assert totals(connection) == {"Gummi": 1, "Pita": 1}


@on_every_major
def test_a_role_may_be_allowed_to_read_the_counts_and_nothing_else(connection):
    vote(connection, "Pita")
    connection.execute("CREATE ROLE reader; GRANT SELECT ON vote_totals, votes_by_hour TO reader; SET ROLE reader")
    assert totals(connection) == {"Gummi": 0, "Pita": 1}
    assert list(hours(connection).values()) == [{"Pita": 1}]
    for statement in ["SELECT * FROM votes", "SELECT * FROM tally", "INSERT INTO votes (vote) VALUES ('Pita')"]:
        assert refuses(connection, statement)


@on_every_major
def test_no_other_role_can_forge_the_tally_by_a_table_of_its_own(connection):
    connection.execute("CREATE ROLE forger; SET ROLE forger; CREATE TEMPORARY TABLE forged (vote text)")
    assert refuses(
        connection,
        """
        CREATE TRIGGER forge AFTER INSERT ON forged REFERENCING NEW TABLE AS inserted
        FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes()
        """,
    )


# Partitions


def test_the_partitioned_table_of_the_guide_is_counted_by_the_same_triggers(empty_database):
    guide = (ROOT / "tests/scale/README.md").read_text()
    table = re.search(r"^```sql partitions\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)[1]
    schema, number = re.subn(
        r"CREATE TABLE IF NOT EXISTS public\.votes \(.*?\);\n",
        lambda _: table,
        (ROOT / "schema.sql").read_text(),
        flags=re.DOTALL,
    )
    assert number == 1
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(schema)
        connection.execute(schema)
        connection.execute("INSERT INTO votes (vote) SELECT unnest('{Pita,Gummi,Pita,Pita}'::text[])")
        connection.execute("INSERT INTO votes (vote, date_created) VALUES ('Gummi', '2027-05-05')")
        connection.execute("UPDATE votes SET date_created = '2027-06-06' WHERE row_id = 1")
        connection.execute("DELETE FROM votes WHERE row_id = 3")
        assert connection.execute("TABLE vote_totals").fetchall() == [("Gummi", 2), ("Pita", 2)]
        assert connection.execute("SELECT count(*) FROM votes_later").fetchone() == (2,)
        connection.execute("ALTER TABLE votes DETACH PARTITION votes_later")
        assert connection.execute("TABLE vote_totals").fetchall() == [("Gummi", 2), ("Pita", 2)]
        connection.execute("SELECT recount_votes()")
        assert inexact(connection) == []
