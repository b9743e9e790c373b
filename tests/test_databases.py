"""On whatever database: settings, rows, schemas and errors that a clean test server does not have."""

import re
import subprocess
from collections import Counter
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from shutil import which
from urllib.parse import urlsplit

import pytest
from client import get, vote
from conftest import missing, new_database, swift_server, unsurprised
from faults import backends, sql
from local.processes import wait_until
from local.service import Service

from catvote import initdb


@pytest.fixture
def own_application(serve, database):
    """The application, in this process, on a database whose schema the test may change: an InProcess."""
    return serve(database)


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


# Settings

HOSTILE_SETTINGS = {
    "client_encoding": "SQL_ASCII",
    "DateStyle": "German, DMY",
    "TimeZone": "Asia/Kolkata",  # where hours begin half-way into an hour of UTC
    "search_path": "",
}


def test_settings_of_the_database_change_nothing(database, connection, serve, caplog):
    for name, value in HOSTILE_SETTINGS.items():
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET {name} = '{value}'")
    check(serve(database), connection, caplog)


def test_parameters_of_the_url_and_blanks_around_it_change_nothing(database, connection, serve, caplog):
    parameters = "client_encoding=SQL_ASCII&keepalives_idle=7200&application_name=baker"
    check(serve(f" {database}?{parameters}\r\n"), connection, caplog)
    application = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'baker'"
    assert connection.execute(application).fetchone()[0] > 0  # the URL's counts


def test_the_time_zone_of_the_machine_changes_nothing(database, connection, caplog):
    with unsurprised(Service(database, TZ="Asia/Kolkata")) as service:
        check(service, connection, caplog)


def check(service, connection, caplog):
    """Cast votes at known hours, and one over HTTP; see that the service answers as ever and shows them all."""
    this_hour = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0)
    today = this_hour.replace(hour=0)
    hours = [this_hour - timedelta(hours=30, minutes=-30), this_hour - timedelta(hours=1, seconds=1)]
    days = [today - timedelta(days=9), today - timedelta(days=9, seconds=1)]
    for moment in hours + days:
        connection.execute("INSERT INTO public.votes (date_created, vote) VALUES (%s, 'Gummi')", [moment])
    shown = Counter(f"{moment:{HOUR}}" for moment in hours) + Counter(f"{moment:{DAY}}" for moment in hours + days)

    assert history(service) == {"Gummi": shown, "Pita": {}}
    assert vote(service).status == 303
    assert get(service, "/?voted=Pita").votes == {"Gummi": 4, "Pita": 1}
    assert get(service, "/tally.json").text == '{"Gummi": 4, "Pita": 1}'
    assert get(service, "/healthz").status == 200
    assert not caplog.text  # nothing failed that was then mended


def test_the_kernel_asks_for_silent_connections_within_a_minute(service, database):
    if not which("ss"):
        missing("no ss: apt-get install iproute2")
    assert vote(service).status == 303
    port = urlsplit(database).port
    command = ["ss", "-tnopH", "state", "established", f"dport = :{port}"]
    lines = subprocess.check_output(command, text=True).splitlines()
    own = [line for line in lines if any(f"pid={worker.pid}," in line for worker in service.workers())]
    assert own
    for line in own:
        assert re.search(r"timer:\(keepalive,[\d.]+(sec|ms),", line)  # not minutes


# Rows that nobody expects


def test_votes_of_any_age_count_and_the_history_has_those_of_its_time(application, shared_connection):
    for moment in "infinity", "-infinity", "0044-03-15 BC", "2020-02-02", "tomorrow", "now":
        shared_connection.execute("INSERT INTO votes (date_created, vote) VALUES (%s, 'Pita')", [moment])
    assert get(application, "/").votes == {"Gummi": 0, "Pita": 6}
    assert sum(history(application)["Pita"].values()) == 2  # one vote in its hour and its day
    assert len(shared_connection.execute(application.catvote.HISTORY).fetchall()) == 1  # no more is read


def test_the_history_begins_with_an_hour_and_a_day_that_are_whole(application, shared_connection):
    this_hour = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0)
    first_hour, first_day = this_hour - timedelta(hours=47), this_hour.replace(hour=0) - timedelta(days=29)
    moments = [first for begin in (first_hour, first_day) for first in (begin, begin - timedelta(seconds=1))]
    for moment in moments:
        shared_connection.execute("INSERT INTO votes (date_created, vote) VALUES (%s, 'Pita')", [moment])
    shown = Counter([f"{first_hour:{HOUR}}", *(f"{moment:{DAY}}" for moment in moments if moment >= first_day)])
    assert history(application)["Pita"] == shown


def test_the_history_has_its_first_day_also_where_clocks_were_put_forward_since(application, shared_connection):
    shared_connection.execute("SET TimeZone = 'Europe/Berlin'")
    shared_connection.execute("INSERT INTO votes (date_created, vote) VALUES ('2026-03-02 00:10+00', 'Pita')")
    statement = application.catvote.HISTORY.replace("now()", "'2026-03-31 23:50+00'::timestamptz")
    assert len(shared_connection.execute(statement).fetchall()) == 1


def test_a_cat_that_only_the_database_knows_takes_no_page_away(own_application, connection):
    connection.execute("ALTER TABLE votes DROP CONSTRAINT votes_vote_is_a_cat")
    connection.execute("INSERT INTO votes (vote) VALUES ('Garfield'), ('Pita'), ('')")
    page = get(own_application, "/")
    assert page.votes == {"Gummi": 0, "Pita": 1}
    assert re.findall('data-share="(.*?)">(.*?)<', page.text) == [("Gummi", "0%"), ("Pita", "100%")]
    assert history(own_application)["Gummi"] == {}
    assert get(own_application, "/tally.json").status == get(own_application, "/healthz").status == 200
    assert vote(own_application, body=b"vote=Garfield").status == 400
    assert vote(own_application).status == 303


def test_a_cat_that_the_totals_lack_has_no_votes(own_application, connection):
    connection.execute("DROP VIEW vote_totals; CREATE VIEW vote_totals AS SELECT 'Gummi' AS vote, 7 AS votes")
    assert get(own_application, "/").votes == {"Gummi": 7, "Pita": 0}


def test_a_vote_for_a_cat_that_only_the_page_knows_is_400_tried_once_and_ends_no_session(
    own_application, database, connection, caplog
):
    connection.execute("ALTER TABLE votes DROP CONSTRAINT votes_vote_is_a_cat, ADD CHECK (vote = 'Gummi')")
    assert vote(own_application, body=b"vote=Gummi").status == 303
    sessions = backends(database)
    refused = vote(own_application)
    assert refused.status == 400
    assert "no vote was counted" in refused.text
    assert caplog.text.count("database: ") == 1
    assert vote(own_application, body=b"vote=Gummi").status == 303
    assert backends(database) == sessions


# Schemas of another time


def test_without_a_schema_everybody_is_told_the_truth(empty_database, serve, caplog):
    application = serve(empty_database)
    check_that_the_schema_is_missed(application, caplog, "/", "/history")
    refused = vote(application)
    assert refused.not_counted
    assert "no answer" not in refused.text
    initdb(empty_database)
    assert vote(application).status == 303
    wait_until(lambda: get(application, "/healthz").status == 200, seconds=5)
    assert get(application, "/?voted=Pita").votes == {"Gummi": 0, "Pita": 1}


OLDER = {
    "a history without hours": ("ALTER VIEW votes_by_hour RENAME hour TO day", "/history", "/"),
    "no totals": ("DROP VIEW vote_totals", "/", "/history"),
}


@pytest.mark.parametrize(("change", "page", "other_page"), OLDER.values(), ids=OLDER)
def test_an_older_schema_costs_only_what_it_lacks(own_application, connection, caplog, change, page, other_page):
    connection.execute(change)
    check_that_the_schema_is_missed(own_application, caplog, page)
    assert get(own_application, other_page).status == 200
    assert vote(own_application).status == 303


def check_that_the_schema_is_missed(application, caplog, *pages):
    """See that operator and platform are told of it, and that no visitor is told of a database that is away."""
    for page in *pages, "/healthz":
        caplog.clear()
        answer = get(application, page)
        assert answer.status == 503
        assert "Something is wrong with our database" in answer.text
        assert "no answer" not in answer.text
        assert "(schema.sql is not applied, or an older one: make initdb)" in caplog.text


def test_rows_that_brought_their_own_row_id_cost_votes_until_initdb_and_nobody_is_deceived(
    own_application, database, caplog
):
    sql(
        database,
        "INSERT INTO votes (row_id, vote) OVERRIDING SYSTEM VALUE SELECT n, 'Gummi' FROM generate_series(1, 50) AS n",
    )
    refused = vote(own_application)
    assert refused.not_counted
    assert "no answer" not in refused.text
    assert "(row_id lags behind rows that brought their own: make initdb)" in caplog.text


# Errors that the database has of its own

VERDICTS = {
    "08006": "could not be confirmed",  # connection_failure: a server behind ours was lost
    "40003": "could not be confirmed",  # statement_completion_unknown
    "XX000": "could not be confirmed",  # internal_error
    "53100": "was not counted",  # disk_full
}


@pytest.mark.parametrize(("sqlstate", "verdict"), VERDICTS.items())
def test_an_error_of_the_database_tells_whether_a_vote_may_be_stored(
    own_application, connection, caplog, sqlstate, verdict
):
    with errors_at_votes(connection, sqlstate):
        answer = vote(own_application)
        assert answer.status == 503
        assert f"your vote {verdict}" in answer.text
        assert "oven" not in answer.text
        assert "database: the oven is broken CONTEXT: PL/pgSQL function" in caplog.text  # in one line
    assert vote(own_application).status == 303


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


def test_an_error_means_the_same_where_the_database_speaks_another_language(serve, monkeypatch, caplog):
    monkeypatch.setenv("LANGUAGE", "de")
    with swift_server(lc_messages="C.UTF-8") as server, new_database(server) as url:
        assert vote(serve(url)).not_counted  # there is no schema
    if "existiert nicht" not in caplog.text:
        pytest.skip("PostgreSQL's programs know no German here")


def test_an_error_without_words_is_logged_by_its_name(application, caplog):
    application.catvote.log_error(ValueError())
    assert "database: ValueError" in caplog.text
