"""On whatever database: settings, rows, schemas, networks and errors that a clean test server does not have."""

import re
import select
import socket
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from itertools import product
from shutil import which
from threading import Thread
from urllib.parse import quote, urlsplit

import psutil
import psycopg
import pytest
from altered import AlteredService
from client import get, vote
from conftest import missing, new_database
from local.postgres import ROOT
from local.service import Service
from psycopg import sql

from catvote import initdb


@pytest.fixture
def service(database):
    """The service on a database whose schema one test may change; two workers are of no use to it."""
    with Service(database, WEB_CONCURRENCY="1") as service:
        yield service


# What a session is told before it is ours

# A line more is a test more: of these for the database, the role, the environment and the URL, ...
COMMON_SETTINGS = [
    "client_encoding=SQL_ASCII",
    "client_encoding=LATIN1",
    "DateStyle=German, DMY",
    "TimeZone=Asia/Kolkata",
    "search_path=",
]
# ... of these for the database alone.
MORE_SETTINGS = [
    "client_encoding=SJIS",
    "DateStyle=SQL, MDY",
    "DateStyle=Postgres, DMY",
    "TimeZone=America/New_York",
    "TimeZone=Pacific/Kiritimati",
    "IntervalStyle=sql_standard",
    "bytea_output=escape",
    "extra_float_digits=-15",
    "search_path=nowhere",
    "default_transaction_isolation=serializable",
    "default_transaction_deferrable=on",
    "standard_conforming_strings=off",
    "backslash_quote=off",
    "transform_null_equals=on",
    "array_nulls=off",
    "quote_all_identifiers=on",
    "row_security=off",
    "client_min_messages=debug5",
    "statement_timeout=800ms",
    "lock_timeout=800ms",
    "idle_in_transaction_session_timeout=1ms",
    "plpgsql.variable_conflict=use_variable",
    "plpgsql.extra_errors=all",
]


# As statements that set and reset it ...
OWNERS = {"of the database": "ALTER DATABASE {database}", "of the role": "ALTER ROLE {role}"}


@contextmanager
def setting_of(owner, connection, name, value):
    """The database or the role of a connection has the setting for a while, and the service new sessions with it."""
    info = connection.info
    names = {"database": sql.Identifier(info.dbname), "role": sql.Identifier(info.user)}
    alter = sql.SQL(OWNERS[owner]).format(**names)
    connection.execute(sql.SQL("{} SET {} = {}").format(alter, sql.Identifier(*name.split(".")), value))
    end_sessions(connection)
    try:
        yield
    finally:
        connection.execute(sql.SQL("{} RESET ALL").format(alter))
        end_sessions(connection)


def end_sessions(connection):
    """End the service's sessions in that database, so that it has to begin new ones."""
    ended = connection.execute(
        """
        SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'catvote'
        """
    )
    assert all(done for (done,) in ended)


# ... and as what the service is started with: DATABASE_URL, and its environment.
STARTS = {
    "of the environment": lambda url, option: (url, {"PGOPTIONS": option}),
    "of the URL": lambda url, option: (f"{url}?options={quote(option)}", {}),
}
# Variables of libpq, and parameters of the URL, that have names of their own.
VARIABLES = [
    "PGCLIENTENCODING=SQL_ASCII",
    "PGCLIENTENCODING=LATIN1",
    "PGCLIENTENCODING=auto",
    "PGDATESTYLE=German",
    "PGTZ=Asia/Kolkata",
    "PGGEQO=off",
    "PGAPPNAME=baker",
    "PGCONNECT_TIMEOUT=900",
    "PGDATABASE=nowhere",
    "PGUSER=nobody",
    "PGPASSWORD=wrong",
]
PARAMETERS = [
    "client_encoding=SQL_ASCII",
    "client_encoding=LATIN1",
    "client_encoding=auto",
    "application_name=baker",
    "connect_timeout=900",
    "keepalives=1&keepalives_idle=7200",
]
ENCODINGS = ["SQL_ASCII", "LATIN1", "LATIN9", "WIN1252", "EUC_JP", "UTF8"]


@pytest.mark.parametrize(
    ("owner", "setting"), [*product(OWNERS, COMMON_SETTINGS), *product(["of the database"], MORE_SETTINGS)]
)
def test_no_setting_of_database_or_role_changes_what_the_service_does(prompt_service, rows, owner, setting):
    name, _, value = setting.partition("=")
    with setting_of(owner, rows, name, value):
        check(prompt_service, rows)


@pytest.mark.parametrize(("start", "setting"), [*product(STARTS, COMMON_SETTINGS)])
def test_no_setting_it_is_started_with_changes_what_the_service_does(shared_database, rows, start, setting):
    backslashed = setting.replace(", ", r",\ ")  # which keeps its spaces
    url, environment = STARTS[start](shared_database, f"-c {backslashed}")
    check_start(rows, url, **environment)


@pytest.mark.parametrize("variable", VARIABLES)
def test_no_variable_of_libpq_changes_what_the_service_does(shared_database, rows, variable):
    check_start(rows, shared_database, **dict([variable.split("=")]))


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_no_parameter_of_the_url_changes_what_the_service_does(shared_database, rows, parameter):
    check_start(rows, f"{shared_database}?{parameter}")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_database_may_have_any_encoding(server, encoding):
    with new_database(server, f"template0 ENCODING '{encoding}'") as url:
        initdb(url)
        with psycopg.connect(url, autocommit=True, client_encoding="UTF8") as connection:
            check_start(connection, url)


@pytest.mark.parametrize("blank", ["\n", "\r\n", " ", "\t"])
def test_database_url_may_end_in_what_secrets_often_end_in(shared_database, rows, blank):
    check_start(rows, f"{blank}{shared_database}{blank}")


def test_a_server_may_end_idle_sessions(prompt_service, rows):
    with setting_of("of the database", rows, "idle_session_timeout", "400ms"):
        before = len(prompt_service.log)
        for number in range(1, 4):
            time.sleep(0.6)
            assert vote(prompt_service).status == 303
            assert get(prompt_service, "/?voted=Pita").votes == {"Gummi": 0, "Pita": number}
        assert "database: " not in prompt_service.log[before:]


def check_start(connection, url, **environment):
    """Start the service with this DATABASE_URL and environment, and check it."""
    with Service(url, WEB_CONCURRENCY="1", **environment) as service:
        check(service, connection)


def check(service, connection):
    """Cast votes at known hours, and one over HTTP; see that the service answers as ever and shows them all."""
    before = len(service.log)
    this_hour = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0)
    today = this_hour.replace(hour=0)
    # Half-way into an hour of UTC is where hours begin in Kolkata; around midnight another zone has another day.
    hours = [this_hour - timedelta(hours=30, minutes=-30), this_hour - timedelta(hours=1, seconds=1)]
    days = [today - timedelta(days=9), today - timedelta(days=9, seconds=1)]
    for moment in hours + days:
        connection.execute("INSERT INTO public.votes (date_created, vote) VALUES (%s, 'Gummi')", [moment])
    shown = Counter(f"{moment:{HOUR}}" for moment in hours) + Counter(f"{moment:{DAY}}" for moment in hours + days)

    page = get(service, "/")
    assert (page.status, page.votes) == (200, {"Gummi": 4, "Pita": 0})
    assert history(service) == {"Gummi": shown, "Pita": {}}
    assert vote(service).status == 303
    assert get(service, "/?voted=Pita").votes == {"Gummi": 4, "Pita": 1}
    assert get(service, "/tally.json").text == '{"Gummi": 4, "Pita": 1}'
    assert get(service, "/healthz").status == 200
    logged = service.log[before:]
    assert "Traceback" not in logged
    assert "database: " not in logged  # nothing failed that was then mended
    age = "SELECT extract(epoch FROM now() - date_created) FROM public.votes WHERE vote = 'Pita'"
    assert connection.execute(age).fetchone()[0] < 60
    into_hour = "SELECT extract(epoch FROM hour)::bigint % 3600 FROM public.votes_by_hour WHERE vote = 'Pita'"
    assert connection.execute(into_hour).fetchall() == [(0,)]


HOUR, DAY = "%d %b, %H:00", "%d %b"  # as /history names them


def history(service):
    """Return for each cat the votes in those hours and days of /history that have any."""
    answer = get(service, "/history")
    assert answer.status == 200
    rows = re.findall('<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', answer.text)
    columns = {"Gummi": Counter(), "Pita": Counter()}
    for period, *votes in rows:
        for column, number in zip(columns.values(), votes, strict=True):
            column[period] = int(number.replace(",", ""))
    return {cat: +column for cat, column in columns.items()}


# Rows that nobody expects

FAR_AWAY = ["infinity", "-infinity", "12000-01-01", "290000-12-31", "0044-03-15 BC", "4713-01-01 BC", "1969-12-31"]


@pytest.mark.parametrize("moment", FAR_AWAY)
def test_a_vote_of_another_age_counts_and_leaves_the_history_alone(prompt_service, rows, moment):
    rows.execute("INSERT INTO votes (date_created, vote) VALUES (%s, 'Pita'), (now(), 'Gummi')", [moment])
    assert get(prompt_service, "/").votes == {"Gummi": 1, "Pita": 1}
    votes = history(prompt_service)
    assert sum(votes["Gummi"].values()) == 2  # in its hour and its day
    assert votes["Pita"] == {}
    assert vote(prompt_service).status == 303
    assert get(prompt_service, "/?voted=Pita").votes == {"Gummi": 1, "Pita": 2}


def test_the_history_begins_with_an_hour_and_a_day_that_are_whole(prompt_service, rows):
    this_hour = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0)
    first_hour, first_day = this_hour - timedelta(hours=47), this_hour.replace(hour=0) - timedelta(days=29)
    moments = [first for begin in (first_hour, first_day) for first in (begin, begin - timedelta(seconds=1))]
    for moment in moments:
        rows.execute("INSERT INTO votes (date_created, vote) VALUES (%s, 'Pita')", [moment])
    shown = Counter([f"{first_hour:{HOUR}}", *(f"{moment:{DAY}}" for moment in moments if moment >= first_day)])
    assert history(prompt_service)["Pita"] == shown


@pytest.mark.parametrize("ahead", ["1 hour", "1 day", "29 days", "1 year"])
def test_a_vote_of_the_future_counts_and_is_in_no_period_yet(prompt_service, rows, ahead):
    rows.execute("INSERT INTO votes (date_created, vote) VALUES (now() + %s::interval, 'Pita')", [ahead])
    assert get(prompt_service, "/").votes == {"Gummi": 0, "Pita": 1}
    assert history(prompt_service) == {"Gummi": {}, "Pita": {}}


def test_a_cat_that_only_the_database_knows_takes_no_page_away(service, connection):
    connection.execute("ALTER TABLE votes DROP CONSTRAINT votes_vote_is_a_cat")
    connection.execute("INSERT INTO votes (vote) VALUES ('Garfield'), ('Pita'), ('')")
    page = get(service, "/")
    assert page.votes == {"Gummi": 0, "Pita": 1}
    assert re.findall('data-share="(.*?)">(.*?)<', page.text) == [("Gummi", "0%"), ("Pita", "100%")]
    assert history(service)["Gummi"] == {}
    assert get(service, "/tally.json").status == get(service, "/healthz").status == 200
    assert vote(service, body=b"vote=Garfield").status == 400
    assert vote(service).status == 303
    assert get(service, "/?voted=Pita").votes == {"Gummi": 0, "Pita": 2}


def test_a_cat_that_the_totals_lack_has_no_votes(service, connection):
    connection.execute("DROP VIEW vote_totals; CREATE VIEW vote_totals AS SELECT 'Gummi' AS vote, 7 AS votes")
    for target in ("/", "/?voted=Gummi"):
        assert get(service, target).votes == {"Gummi": 7, "Pita": 0}
    assert get(service, "/tally.json").status == 200


def test_a_vote_for_a_cat_that_only_the_page_knows_is_400(service, connection):
    connection.execute("ALTER TABLE votes DROP CONSTRAINT votes_vote_is_a_cat, ADD CHECK (vote = 'Gummi')")
    refused = vote(service)
    assert refused.status == 400
    assert "no vote was counted" in refused.text
    assert vote(service, body=b"vote=Gummi").status == 303
    assert get(service, "/?voted=Gummi").votes == {"Gummi": 1, "Pita": 0}


UNREADABLE = {
    "a date that Python does not have": "SELECT 'Pita', 'infinity'::timestamptz",
    "another date that it does not have": "SELECT 'Pita', '12000-01-01'::date",
    "bytes that are not UTF-8": r"SELECT convert_from('\xff', 'SQL_ASCII'), 1",
}


@pytest.mark.parametrize("rows", UNREADABLE.values(), ids=UNREADABLE)
def test_what_the_driver_cannot_read_is_an_honest_503(server, rows):
    with new_database(server, "template0 ENCODING 'SQL_ASCII'") as url:
        initdb(url)
        with psycopg.connect(url, autocommit=True, client_encoding="UTF8") as connection:
            connection.execute(f"DROP VIEW vote_totals; CREATE VIEW vote_totals (vote, votes) AS {rows}")
        with Service(url, WEB_CONCURRENCY="1") as service:
            for target in ("/", "/?voted=Pita", "/tally.json"):
                assert get(service, target).status == 503
            assert vote(service).status == 303
            assert "Traceback" not in service.log


# Schemas of another time


def test_without_a_schema_everybody_is_told_the_truth(empty_database):
    with Service(empty_database, WEB_CONCURRENCY="1") as service:
        check_that_the_schema_is_missed(service, "/", "/history")
        refused = vote(service)
        assert refused.status == 503
        assert "your vote was not counted" in refused.text
        assert "does not answer" not in refused.text

        initdb(empty_database)
        time.sleep(1)
        assert vote(service).status == 303
        assert get(service, "/healthz").status == 200
        assert get(service, "/?voted=Pita").votes == {"Gummi": 0, "Pita": 1}
        assert sum(history(service)["Pita"].values()) == 2
        assert get(service, "/healthz").status == 200


@pytest.mark.parametrize(
    ("lost", "page"),
    [
        ("DROP VIEW votes_by_hour", "/history"),
        ("DROP VIEW vote_totals", "/"),
    ],
)
def test_an_older_schema_costs_only_what_it_lacks(service, connection, lost, page):
    connection.execute(lost)
    check_that_the_schema_is_missed(service, page)
    assert get(service, {"/": "/history", "/history": "/"}[page]).status == 200
    assert vote(service).status == 303


def check_that_the_schema_is_missed(service, *pages):
    """See that operator and platform are told of it, and that no visitor is told of a database that is away."""
    for page in pages:
        answer = get(service, page)
        assert answer.status == 503
        assert "Something is wrong with our database" in answer.text
        assert "does not answer" not in answer.text
        (line, *_) = [line for line in service.log.splitlines() if "make initdb" in line]
        assert "schema.sql" in line
    assert get(service, "/healthz").status == 503


def test_a_database_of_the_first_version_serves_and_is_brought_forward_without_a_restart(empty_database):
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute((ROOT / "tests/first_schema.sql").read_text())
        connection.execute("INSERT INTO votes (vote) VALUES ('Gummi'), ('Pita'), ('Pita')")
    with Service(empty_database, WEB_CONCURRENCY="1") as service:
        assert get(service, "/").votes == {"Gummi": 1, "Pita": 2}
        assert vote(service).status == 303
        initdb(empty_database)
        assert vote(service).status == 303
        assert get(service, "/?voted=Pita").votes == {"Gummi": 1, "Pita": 4}
        assert sum(history(service)["Pita"].values()) == 8
        assert get(service, "/healthz").status == 200
        assert "database: " not in service.log


def test_rows_that_brought_their_own_row_id_cost_votes_until_initdb_and_nobody_is_deceived(
    service, database, connection
):
    connection.execute(
        "INSERT INTO votes (row_id, vote) OVERRIDING SYSTEM VALUE SELECT n, 'Gummi' FROM generate_series(1, 50) AS n"
    )
    refused = vote(service)
    assert refused.status == 503
    assert "your vote was not counted" in refused.text
    assert "does not answer" not in refused.text
    assert "row_id" in service.log
    assert "make initdb" in service.log
    assert get(service, "/?voted=Pita").votes == {"Gummi": 50, "Pita": 0}

    initdb(database)
    assert vote(service).status == 303
    assert get(service, "/?voted=Pita").votes == {"Gummi": 50, "Pita": 1}


# Errors that the database has of its own

VERDICTS = {
    "08000": "could not be confirmed",  # connection_exception: a server behind ours was lost
    "08006": "could not be confirmed",  # connection_failure
    "08P01": "could not be confirmed",  # protocol_violation
    "40003": "could not be confirmed",  # statement_completion_unknown
    "XX000": "could not be confirmed",  # internal_error
    "22000": "was not counted",  # data_exception
    "40001": "was not counted",  # serialization_failure
    "40P01": "was not counted",  # deadlock_detected
    "53100": "was not counted",  # disk_full
    "55P03": "was not counted",  # lock_not_available
    "57014": "was not counted",  # query_canceled, by somebody else
    "P0001": "was not counted",  # raise_exception
}


@pytest.mark.parametrize(("sqlstate", "verdict"), VERDICTS.items())
def test_an_error_of_the_database_tells_whether_a_vote_may_be_stored(prompt_service, rows, sqlstate, verdict):
    with errors_at_votes(rows, sqlstate):
        before = len(prompt_service.log)
        answer = vote(prompt_service)
        assert answer.status == 503
        assert f"your vote {verdict}" in answer.text
        assert "oven" not in answer.text
        assert "the oven is broken" in prompt_service.log[before:]
    assert vote(prompt_service).status == 303


@contextmanager
def errors_at_votes(connection, sqlstate):
    """Each vote meets with an error of this code, for a while."""
    connection.execute(f"""
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN RAISE EXCEPTION 'the oven is broken' USING ERRCODE = '{sqlstate}'; END $$;
        CREATE TRIGGER fail BEFORE INSERT ON votes FOR EACH ROW EXECUTE FUNCTION fail();
    """)
    try:
        yield
    finally:
        connection.execute("DROP FUNCTION fail CASCADE")


# Networks that forget


class ForgetfulNetwork:
    """A way to a server that forgets connections after some seconds of silence, as NAT and load balancers do.

    From then on it swallows what either side sends, and says nothing. A context manager.

    url -- the server's; `self.url` is the same by this way
    """

    def __init__(self, url, seconds):
        self.target = urlsplit(url)
        self.seconds = seconds
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
        """Open a way to the server for each connection that comes."""
        with suppress(OSError):
            while True:
                client, _ = self.sockets[0].accept()
                server = socket.create_connection((self.target.hostname, self.target.port))
                self.sockets += [client, server]
                Thread(target=self.carry, args=[client, server], daemon=True).start()

    def carry(self, client, server):
        """Carry bytes both ways, until either side hangs up or has been silent for too long."""
        ways = {client: server, server: client}
        with suppress(OSError):
            while ready := select.select(ways, [], [], self.seconds)[0]:
                for sender in ready:
                    data = sender.recv(65536)
                    if not data:
                        ways[sender].shutdown(socket.SHUT_RDWR)
                        return
                    ways[sender].sendall(data)
            self.forgotten += 1
            while client.recv(65536):
                pass


# Connections are trusted for a quarter of the time, on networks that remember them for as much less.
IMPATIENT = """
catvote.UNUSED_TOO_LONG /= 4
for pool in catvote.vote_pool, catvote.page_pool:
    pool.max_idle /= 4
"""


def test_a_quiet_spell_in_which_the_network_forgets_costs_nobody_anything(database):
    with ForgetfulNetwork(database, seconds=2) as network, AlteredService(network.url, IMPATIENT) as service:
        with ThreadPoolExecutor(8) as pool:
            assert {answer.status for answer in pool.map(lambda _: vote(service), range(32))} == {303}
        assert get(service, "/healthz").status == get(service, "/").status == 200
        for number in range(1, 3):
            time.sleep(3)
            assert network.forgotten
            start = time.monotonic()
            first = vote(service)
            assert (first.status, time.monotonic() - start < 1) == (303, True)
            start = time.monotonic()
            page = get(service, "/")
            assert page.votes == {"Gummi": 0, "Pita": 32 + number}
            assert '<p id="outdated" hidden>' in page.text
            assert time.monotonic() - start < 1
            assert get(service, "/healthz").status == 200
    assert "database: " not in service.log


def test_the_kernel_asks_for_silent_connections_within_a_minute(service, database):
    if not which("ss"):
        missing("no ss: apt-get install iproute2")
    assert vote(service).status == 303
    assert get(service, "/").status == 200
    port = urlsplit(database).port
    lines = subprocess.check_output(
        ["ss", "-tnopH", "state", "established", f"dport = :{port}"], text=True
    ).splitlines()
    family = psutil.Process(service.process.pid).children()
    own = [line for line in lines if any(f"pid={process.pid}," in line for process in family)]
    assert own
    for line in own:
        minutes, seconds = re.search(r"timer:\(keepalive,(?:(\d+)min)?(?:([\d.]+)(?:sec|ms))?", line).groups()
        assert not minutes and seconds
