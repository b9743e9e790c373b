"""What schema.sql promises: an exact tally whatever SQL changes votes, whoever runs it, at a flat price."""

import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Barrier, Event

import psycopg
import pytest
from conftest import missing, new_database
from hypothesis import settings, stateful
from hypothesis import strategies as st
from local.postgres import ROOT, LocalPostgres, apply_schema
from local.programs import programs_of
from psycopg import errors
from psycopg.conninfo import make_conninfo

SCHEMA = (ROOT / "schema.sql").read_text()
CATS = ("Gummi", "Pita")
ISOLATION_LEVELS = ["read committed", "repeatable read", "serializable"]

# What matters most runs on the oldest and the newest PostgreSQL, too.
on_every_major = pytest.mark.parametrize("server", [14, None, 18], indirect=True, ids=["14", "own", "18"])


@pytest.fixture(scope="module")
def server(request, server):
    """The server of all tests or, for tests marked on_every_major, one of that version."""
    major = getattr(request, "param", None)
    if not major:
        yield server
        return
    try:
        bindir = programs_of(major)
    except RuntimeError as error:
        missing(str(error))
    with LocalPostgres(bindir=bindir) as other:
        yield other


@pytest.fixture
def database(empty_database):
    """URL of a database with the schema and no votes, for one test."""
    apply_schema(empty_database)
    return empty_database


class Session(psycopg.Connection):
    """A connection that can also execute a statement in the background."""

    def start(self, statement):
        """Execute a statement in a thread; return a future of its cursor."""
        executor = ThreadPoolExecutor(1)
        future = executor.submit(self.execute, statement)
        executor.shutdown(wait=False)
        return future


@pytest.fixture
def connect():
    """A function that opens a Session in autocommit mode, closed after the test."""
    sessions = []

    def connect(url):
        sessions.append(Session.connect(url, autocommit=True))
        return sessions[-1]

    yield connect
    # A test that failed may leave sessions that wait for each other.
    for session in sessions:
        session.cancel_safe()
    for session in sessions:
        with session.lock:
            session.close()


def vote(connection, *cats):
    """Cast votes, one for each cat named."""
    connection.execute("INSERT INTO public.votes (vote) SELECT unnest(%s::text[])", [list(cats)])


def totals(connection):
    """Return the tally as people see it."""
    return dict(connection.execute("SELECT vote, votes FROM public.vote_totals").fetchall())


def inexact(connection):
    """Return (cat, votes by vote_totals, rows in votes) where they differ, all seen in one snapshot."""
    return connection.execute(
        """
        SELECT vote, total.votes, counted.votes
        FROM public.vote_totals AS total
        FULL JOIN (SELECT vote, count(*) AS votes FROM public.votes GROUP BY vote) AS counted USING (vote)
        WHERE total.votes IS DISTINCT FROM coalesce(counted.votes, 0)
        """,
        prepare=False,
    ).fetchall()


def wait_until_blocked(observer, connection):
    """Return as soon as the connection's statement waits for another session's lock."""
    deadline = time.monotonic() + 10
    query = "SELECT cardinality(pg_blocking_pids(%s)) > 0"
    while not observer.execute(query, [connection.info.backend_pid]).fetchone()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def at_once(sessions, url, work):
    """Call work(connection, number) in that many sessions at once; return what the calls returned."""
    barrier = Barrier(sessions, timeout=10)

    def session(number):
        with psycopg.connect(url, autocommit=True) as connection:
            barrier.wait()
            return work(connection, number)

    with ThreadPoolExecutor(sessions) as executor:
        return list(executor.map(session, range(sessions)))


def share_one_slot(connection):
    """Let all server processes count in the same slot, as some do by chance: the worst case."""
    (definition,) = connection.execute("SELECT pg_get_functiondef('count_votes'::regproc)").fetchone()
    assert "% 32" in definition
    connection.execute(definition.replace("% 32", "% 1"))


def run(program, *arguments, standard_input=None):
    """Return the standard output of a PostgreSQL program, which must succeed."""
    process = subprocess.run([program, *arguments], input=standard_input, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


def feed(server, url, statements):
    """Let psql execute statements, which it must do without an error, a warning or a notice."""
    run(server.bindir / "psql", "--quiet", "--set=ON_ERROR_STOP=1", url, standard_input=statements)


# Exact whatever one session does


class AnyStatements(stateful.RuleBasedStateMachine):
    """All kinds of statements in any order, in transactions, after savepoints, undone or not."""

    lists_of_cats = st.lists(st.sampled_from(CATS), max_size=4)  # none at all, too
    cats = st.sampled_from(CATS)
    divisors = st.integers(1, 3)
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

    @stateful.rule(cats=lists_of_cats)
    def copy(self, cats):
        with self.connection.cursor().copy("COPY public.votes (vote) FROM STDIN") as copy:
            for cat in cats:
                copy.write_row([cat])

    @stateful.rule(cat=cats, divisor=divisors)
    def update(self, cat, divisor):
        self.execute("UPDATE public.votes SET vote = %s WHERE row_id %% %s = 0", [cat, divisor])

    @stateful.rule(divisor=divisors)
    def swap(self, divisor):
        swapped = "CASE vote WHEN 'Pita' THEN 'Gummi' ELSE 'Pita' END"
        self.execute(f"UPDATE public.votes SET vote = {swapped} WHERE row_id %% %s = 0", [divisor])

    @stateful.rule()
    def update_date_only(self):
        self.execute("UPDATE public.votes SET date_created = now()")

    @stateful.rule(divisor=divisors)
    def delete(self, divisor):
        self.execute("DELETE FROM public.votes WHERE row_id %% %s = 0", [divisor])

    @stateful.rule()
    def truncate(self):
        self.execute("TRUNCATE public.votes")

    @stateful.rule(source=sources, action=st.sampled_from(["NOTHING", "UPDATE SET vote = EXCLUDED.vote"]))
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
    @stateful.rule(source=sources)
    def merge(self, source):
        self.execute(
            """
            MERGE INTO public.votes
            USING unnest(%s::bigint[], %s::text[]) AS source (row_id, vote) ON votes.row_id = source.row_id
            WHEN MATCHED AND votes.vote = source.vote THEN DELETE
            WHEN MATCHED THEN UPDATE SET vote = source.vote
            WHEN NOT MATCHED THEN INSERT (row_id, vote) OVERRIDING SYSTEM VALUE VALUES (source.row_id, source.vote)
            """,
            [list(source), list(source.values())],
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
        # Writers meet at the tally alone: each changes votes of its own, told by their year.
        own = f"date_created = '{2000 + number}-01-01'"
        swapped = "CASE vote WHEN 'Pita' THEN 'Gummi' ELSE 'Pita' END"
        statements = [
            f"INSERT INTO votes (date_created, vote) SELECT '{2000 + number}-01-01', unnest('{{Pita,Gummi,Pita}}'::text[])",
            f"INSERT INTO votes (date_created, vote) VALUES ('{2000 + number}-01-01', 'Gummi')",
            f"UPDATE votes SET vote = {swapped} WHERE {own}",
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


def test_a_recount_waits_for_votes_that_are_not_committed(connection, database, connect):
    voter, other = connect(database), connect(database)
    voter.execute("BEGIN")
    vote(voter, "Pita")
    recount = other.start("SELECT recount_votes()")
    wait_until_blocked(connection, other)
    voter.execute("COMMIT")
    recount.result()
    assert totals(connection) == {"Gummi": 0, "Pita": 1}


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


# Applied again


@on_every_major
def test_applying_the_schema_again_changes_nothing(connection, database, server):
    def dump():
        text = run(server.bindir / "pg_dump", database)
        return [line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))]

    vote(connection, "Pita", "Gummi", "Pita")
    before = dump()
    apply_schema(database)
    apply_schema(database)
    assert dump() == before


@on_every_major
def test_eight_sessions_at_once_may_apply_the_schema_to_an_empty_database(empty_database, connect):
    at_once(8, empty_database, lambda connection, number: connection.execute(SCHEMA))
    connection = connect(empty_database)
    vote(connection, "Pita")
    assert totals(connection) == {"Gummi": 0, "Pita": 1}


@on_every_major
def test_applying_the_schema_while_votes_come_in_loses_none(connection, database):
    done = Event()

    def work(session, number):
        if number == 0:
            try:
                for _ in range(10):
                    session.execute(SCHEMA)
            finally:
                done.set()
            return 0
        cast = 0
        while not done.is_set():
            vote(session, "Pita")
            cast += 1
        return cast

    cast = sum(at_once(4, database, work))
    assert cast > 0
    assert totals(connection) == {"Gummi": 0, "Pita": cast}
    assert inexact(connection) == []


@on_every_major
def test_the_owner_of_a_database_need_not_be_a_superuser(server, empty_database, connect):
    with psycopg.connect(server.url(), autocommit=True) as superuser:
        superuser.execute("CREATE ROLE database_owner LOGIN PASSWORD 'secret'")
        superuser.execute(f"ALTER DATABASE {empty_database.rpartition('/')[2]} OWNER TO database_owner")
    url = make_conninfo(empty_database, user="database_owner", password="secret")
    apply_schema(url)
    apply_schema(url)
    owner = connect(url)
    vote(owner, "Pita")
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
def test_a_role_may_be_allowed_to_read_the_totals_and_nothing_else(connection):
    vote(connection, "Pita")
    connection.execute("CREATE ROLE reader; GRANT SELECT ON vote_totals TO reader; SET ROLE reader")
    assert totals(connection) == {"Gummi": 0, "Pita": 1}
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


# Dump and restore


@on_every_major
@pytest.mark.parametrize("options", [[], ["--no-owner", "--no-privileges"]], ids=["all", "without owners"])
def test_a_restored_database_is_exact_and_goes_on_counting(connection, database, server, connect, options):
    vote(connection, "Pita", "Gummi", "Pita")
    dump = run(server.bindir / "pg_dump", *options, database)
    with new_database(server, "template0") as copy:
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
    with new_database(server, "template0") as copy:
        apply_schema(copy)
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
    inexact = "TABLE vote_totals EXCEPT SELECT vote, count(*) FROM votes GROUP BY vote"
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(schema)
        connection.execute(schema)
        connection.execute("INSERT INTO votes (vote) SELECT unnest('{Pita,Gummi,Pita,Pita}'::text[])")
        connection.execute("INSERT INTO votes (vote, date_created) VALUES ('Gummi', '2027-05-05')")
        connection.execute("UPDATE votes SET date_created = '2027-06-06' WHERE row_id = 1")
        connection.execute("DELETE FROM votes WHERE row_id = 3")
        assert connection.execute("TABLE vote_totals").fetchall() == [("Gummi", 2), ("Pita", 2)]
        assert connection.execute("SELECT count(*) FROM votes_later").fetchone() == (2,)
        assert connection.execute(inexact).fetchall() == []
        connection.execute("ALTER TABLE votes DETACH PARTITION votes_later")
        assert connection.execute("TABLE vote_totals").fetchall() == [("Gummi", 2), ("Pita", 2)]
        connection.execute("SELECT recount_votes()")
        assert connection.execute(inexact).fetchall() == []
