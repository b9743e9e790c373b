"""What schema.sql promises: exact counters whatever SQL changes votes, whoever runs it, at a flat price."""

from functools import partial

import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st
from psycopg import errors
from sessions import (
    CATS,
    SCHEMA,
    hours,
    inexact,
    on_every_major,
    totals,
    vote,
    wait_until_blocked,
)

from catvote import CANDIDATES

# Exact whatever one session does


class AnyStatements(stateful.RuleBasedStateMachine):
    """All kinds of statements in any order, in transactions or not, undone or not."""

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
        self.connection, self.execute = connection, connection.execute
        self.in_transaction = False
        self.execute("TRUNCATE public.votes")

    def teardown(self):
        if self.in_transaction:
            self.execute("ROLLBACK")

    @stateful.invariant()
    def exact(self):
        assert inexact(self.connection) == []

    @stateful.rule(votes=st.lists(st.tuples(cats, dates), max_size=4))  # none at all, too
    def insert(self, votes):
        columns = [cat for cat, _ in votes], [date for _, date in votes]
        self.execute(
            "INSERT INTO public.votes (vote, date_created) SELECT * FROM unnest(%s::text[], %s::timestamptz[])", columns
        )

    @stateful.rule(cat=cats, divisor=divisors)
    def update(self, cat, divisor):
        self.execute("UPDATE public.votes SET vote = %s WHERE row_id %% %s = 0", [cat, divisor])

    @stateful.rule(date=dates, divisor=divisors)
    def move_to_a_date(self, date, divisor):
        self.execute("UPDATE public.votes SET date_created = %s WHERE row_id %% %s = 0", [date, divisor])

    @stateful.rule(divisor=divisors)
    def delete(self, divisor):
        self.execute("DELETE FROM public.votes WHERE row_id %% %s = 0", [divisor])

    @stateful.rule()
    def truncate(self):
        self.execute("TRUNCATE public.votes")

    @stateful.rule(source=sources)
    def insert_on_conflict(self, source):
        self.execute(
            """
            INSERT INTO public.votes (row_id, vote) OVERRIDING SYSTEM VALUE
            SELECT * FROM unnest(%s::bigint[], %s::text[])
            ON CONFLICT (row_id) DO UPDATE SET vote = EXCLUDED.vote, date_created = now()
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

    @stateful.rule(cat=cats)
    def write_three_times_in_one_statement(self, cat):
        self.execute(
            """
            WITH gone AS (DELETE FROM public.votes WHERE row_id %% 3 = 0 RETURNING vote),
                 changed AS (UPDATE public.votes SET vote = %s WHERE row_id %% 3 = 1)
            INSERT INTO public.votes (vote) SELECT vote FROM gone
            """,
            [cat],
        )

    @stateful.rule()
    def recount(self):
        self.execute("SELECT public.recount_votes()")

    @stateful.precondition(lambda self: not self.in_transaction)
    @stateful.rule()
    def begin(self):
        self.execute("BEGIN")
        self.in_transaction = True

    @stateful.precondition(lambda self: self.in_transaction)
    @stateful.rule(verb=st.sampled_from(["COMMIT", "ROLLBACK"]))
    def end(self, verb):
        self.execute(verb)
        self.in_transaction = False


@on_every_major
def test_the_tally_is_exact_after_any_statements(connection):
    connection.execute("SET timezone = 'Asia/Kolkata'")  # whose hours begin at half past those of UTC
    stateful.run_state_machine_as_test(
        partial(AnyStatements, connection),
        # Others in each run, in continuous integration, too.
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, database=None, derandomize=False, print_blob=True
        ),
    )


def test_totals_have_all_cats_in_their_order(connection):
    connection.execute("ALTER TABLE votes DROP CONSTRAINT votes_vote_is_a_cat")
    connection.execute("SET enable_sort = off; SET enable_mergejoin = off")  # which would put them in order, too
    vote(connection, "Pita", "Bella")
    assert connection.execute("SELECT * FROM vote_totals").fetchall() == [("Bella", 1), ("Gummi", 0), ("Pita", 1)]


def test_votes_by_day_has_the_days_of_the_session(connection):
    connection.execute(
        """
        SET timezone = 'Europe/Berlin';
        INSERT INTO votes (date_created, vote)
        VALUES ('2024-05-01 23:30 UTC', 'Pita'), ('2024-05-01 12:00 UTC', 'Pita'), ('2024-05-01 10:00 UTC', 'Pita')
        """
    )
    days = connection.execute("SELECT day::text, vote, votes FROM votes_by_day").fetchall()
    assert days == [("2024-05-01", "Pita", 2), ("2024-05-02", "Pita", 1)]


@pytest.mark.parametrize("view", ["votes_by_hour", "votes_by_day"])
def test_the_past_is_in_the_order_of_time_and_cats(connection, view):
    connection.execute(
        """
        INSERT INTO votes (date_created, vote)
        SELECT now() - n * interval '1 day', cat FROM generate_series(1, 50) AS n, unnest('{Pita,Gummi}'::text[]) AS cat
        """
    )
    # Which would put them in order, too.
    connection.execute("SET enable_sort = off; SET enable_indexscan = off; SET enable_bitmapscan = off")
    rows = connection.execute(f"SELECT * FROM {view}").fetchall()
    assert rows == sorted(rows)
    assert len(rows) == 100


# Exact whatever many sessions do


def share_one_slot(connection):
    """Let all server processes count in the same slot, as some do by chance: the worst case."""
    (definition,) = connection.execute("SELECT pg_get_functiondef('count_votes'::regproc)").fetchone()
    assert "% 32" in definition
    connection.execute(definition.replace("% 32", "% 1"))


def test_votes_of_different_sessions_seldom_wait_for_each_other(connection, database, connect):
    others = [connect(database) for _ in range(10)]
    connection.execute("BEGIN")
    vote(connection, "Pita")
    waited = 0
    for other in others:
        other.execute("SET lock_timeout = '50ms'")
        try:
            vote(other, "Pita")
        except errors.LockNotAvailable:
            waited += 1
    assert waited <= 5  # of 32 slots, which the numbers of their processes choose


# Locks taken in one order never close a circle: so no statement may hold a counter while it waits for an earlier one.


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO votes (date_created, vote) VALUES ('2024-05-01 05:00 UTC', 'Gummi')",
        "UPDATE votes SET vote = 'Gummi' WHERE row_id = 1",
    ],
    ids=["INSERT", "UPDATE"],
)
def test_a_statement_that_waits_for_a_total_holds_no_hour(connection, database, connect, statement):
    share_one_slot(connection)
    connection.execute(
        """
        INSERT INTO votes (date_created, vote)
        VALUES ('2024-05-01 05:00 UTC', 'Pita'), ('2024-05-01 05:00 UTC', 'Gummi')
        """
    )
    blocker, blocked = connect(database), connect(database)
    blocker.execute("BEGIN")
    vote(blocker, "Gummi")
    running = blocked.start(statement)
    wait_until_blocked(connection, blocked)
    connection.execute("SET lock_timeout = '1s'")
    # A vote that moves changes no total.
    connection.execute("UPDATE votes SET date_created = '2024-05-01 06:00 UTC' WHERE row_id = 2")
    blocker.execute("COMMIT")
    running.result()
    assert inexact(connection) == []


# TRUNCATE and recounts


def test_a_snapshot_older_than_a_truncate_sees_neither_votes_nor_totals(connection, database, connect):
    vote(connection, "Pita")
    older = connect(database)
    older.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    connection.execute("TRUNCATE votes")
    vote(connection, "Gummi")
    assert inexact(older) == []
    vote(older, "Pita")
    older.execute("COMMIT")
    assert totals(connection) == {"Gummi": 1, "Pita": 1}


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


def test_a_recount_of_a_sound_tally_leaves_it_as_it_was(connection):
    vote(connection, "Pita")
    counters = "SELECT tally::text FROM tally"
    before = connection.execute(counters).fetchall()
    connection.execute("SELECT recount_votes()")
    assert connection.execute(counters).fetchall() == before


# What a vote is


def test_the_constraint_refuses_all_but_the_cats(connection):
    assert totals(connection).keys() == CANDIDATES.keys()
    vote(connection, *CANDIDATES)
    with pytest.raises(errors.CheckViolation) as refusal:
        vote(connection, "pita")
    assert refusal.value.diag.constraint_name == "votes_vote_is_a_cat"


@pytest.mark.parametrize("column", ["vote", "date_created"])
def test_nothing_may_be_null(connection, column):
    row = {"vote": "Pita", "date_created": "2000-01-01", column: None}
    with pytest.raises(errors.NotNullViolation) as refusal:
        connection.execute("INSERT INTO votes (vote, date_created) VALUES (%(vote)s, %(date_created)s)", row)
    assert refusal.value.diag.table_name == "votes"  # and not the tally


def test_a_vote_gets_its_number_and_date_by_itself_and_cannot_choose_the_number(connection):
    with connection.transaction():
        vote(connection, "Pita", "Gummi")
        rows = connection.execute("SELECT row_id, date_created = now(), vote FROM votes ORDER BY row_id").fetchall()
    assert rows == [(1, True, "Pita"), (2, True, "Gummi")]
    with pytest.raises(errors.GeneratedAlways):
        connection.execute("INSERT INTO votes (row_id, vote) VALUES (3, 'Pita')")
    with pytest.raises(errors.UniqueViolation):
        connection.execute("INSERT INTO votes (row_id, vote) OVERRIDING SYSTEM VALUE VALUES (1, 'Pita')")


def test_all_that_people_meet_has_a_comment(connection):
    uncommented = connection.execute(
        """
        SELECT oid::regclass::text
        FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') AND obj_description(oid) IS NULL
        UNION ALL
        SELECT attrelid::regclass || '.' || attname
        FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') AND attnum > 0
              AND col_description(attrelid, attnum) IS NULL
        UNION ALL
        SELECT oid::regprocedure::text
        FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace AND obj_description(oid) IS NULL
        """
    ).fetchall()
    assert uncommented == []


# Flat cost


def explain(connection, statement):
    """Run a statement; return its plan, and how many pages it touched."""
    ((plan,),) = connection.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}").fetchone()
    return plan, plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]


def test_ten_years_of_hours_make_neither_totals_nor_the_last_month_dearer(connection):
    connection.execute(
        """
        INSERT INTO tally (hour, vote, slot, votes)
        SELECT now() - hour * interval '1 hour', cat, 0, 1
        FROM generate_series(0, 87600) AS hour, unnest('{Gummi,Pita}'::text[]) AS cat
        """
    )
    vote(connection, "Pita")
    connection.execute("VACUUM ANALYZE tally")
    for query in [
        "SELECT * FROM vote_totals",
        "SELECT * FROM votes_by_hour WHERE hour > now() - interval '720 hours' AND hour <= now()",
    ]:
        plan, pages = explain(connection, query)
        assert "tally_primary_key" in str(plan)
        assert pages < 100  # of some 3,000


def test_counters_change_without_a_change_of_their_index(connection):
    hours = "INSERT INTO votes (vote, date_created) SELECT 'Pita', now() - n * interval '1 hour' FROM generate_series(1, 2000) AS n"
    connection.execute(hours)
    connection.execute("BEGIN")
    connection.execute(hours)
    query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables WHERE relname = 'tally'"
    updated, without_index = connection.execute(query).fetchone()
    assert updated == 2001
    assert without_index > 1900


def test_a_statement_is_counted_once_not_each_of_its_rows(connection):
    plan, _ = explain(connection, "INSERT INTO votes (vote) VALUES ('Pita'), ('Gummi'), ('Pita')")
    assert [trigger["Calls"] for trigger in plan["Triggers"]] == [1]


# Search paths and roles


@on_every_major
def test_a_search_path_leads_nobody_astray(connection):
    connection.execute(
        """
        CREATE SCHEMA hostile;
        CREATE FUNCTION hostile.fail() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE 'led astray'; END $$;
        CREATE FUNCTION hostile.pg_backend_pid() RETURNS int LANGUAGE sql AS 'SELECT hostile.fail()';
        CREATE FUNCTION hostile.hashtext(text) RETURNS int LANGUAGE sql AS 'SELECT hostile.fail()';
        CREATE FUNCTION hostile.add(bigint) RETURNS bigint LANGUAGE sql AS 'SELECT hostile.fail()::bigint';
        CREATE AGGREGATE hostile.count(*) (SFUNC = hostile.add, STYPE = bigint);
        CREATE TEMPORARY TABLE votes (LIKE public.votes);
        CREATE TEMPORARY TABLE tally (LIKE public.tally);
        CREATE TEMPORARY TABLE pg_trigger ();
        SET search_path = pg_temp, hostile, public, pg_catalog
        """
    )
    connection.execute(SCHEMA)
    vote(connection, "Pita", "Gummi", "Pita")
    connection.execute("UPDATE public.votes SET vote = 'Gummi' WHERE row_id = 1")
    connection.execute("DELETE FROM public.votes WHERE row_id = 2")
    assert totals(connection) == {"Gummi": 1, "Pita": 1}
    connection.execute("SELECT public.recount_votes()")
    assert totals(connection) == {"Gummi": 1, "Pita": 1}
    connection.execute("TRUNCATE public.votes")
    assert totals(connection) == {"Gummi": 0, "Pita": 0}


def refuses(connection, statement):
    """Return whether the server says that the role may not do that."""
    try:
        connection.execute(statement)
    except errors.InsufficientPrivilege:
        return True
    return False


def test_a_role_may_be_allowed_to_vote_and_to_read_counts_and_nothing_else(connection):
    connection.execute(
        """
        CREATE ROLE service;
        GRANT INSERT (vote) ON votes TO service;
        GRANT SELECT ON vote_totals, votes_by_hour TO service;
        SET ROLE service
        """
    )
    vote(connection, "Pita", "Gummi")
    assert totals(connection) == {"Gummi": 1, "Pita": 1}
    assert list(hours(connection).values()) == [{"Gummi": 1, "Pita": 1}]
    for statement in [
        "SELECT * FROM votes",
        "SELECT * FROM tally",
        "DELETE FROM votes",
        "TRUNCATE votes",
        "UPDATE tally SET votes = 9",
        "SELECT recount_votes()",
    ]:
        assert refuses(connection, statement)


def test_no_other_role_can_forge_the_tally_by_a_table_of_its_own(connection):
    connection.execute("CREATE ROLE forger; SET ROLE forger; CREATE TEMPORARY TABLE forged (vote text)")
    assert refuses(
        connection,
        """
        CREATE TRIGGER forge AFTER INSERT ON forged REFERENCING NEW TABLE AS changed
        FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes('1')
        """,
    )
