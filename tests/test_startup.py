"""The verbs: what the Makefile, the Procfile and the settings do, tried on copies of the project."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import contextmanager
from urllib.request import urlopen

import psutil
import psycopg
import pytest
from checkout import Running, complaint, make, nothing_runs_in
from client import FORM, get, vote, write
from faults import sql
from local import ROOT
from local.processes import wait_until
from local.service import Service, check_settings, free_port, procfile, url_of
from psycopg.conninfo import make_conninfo

import catvote

# Characters that mean something to sh, make, a URL or libpq.
AWKWARD = """pass&word#1 ${HOME} $HOME$$ 'single' "double" %25 @:/"""


def tables(url):
    """Return the names of a database's tables."""
    return [name for (name,) in sql(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")]


# make run with a database of its own


def test_it_shows_where_the_votes_are_and_how_to_reach_by_psql_the_database_which_waits_for_the_disk(make_run):
    assert f"The votes are kept in {make_run.folder}/.postgres\n" in make_run.log
    (command,) = re.findall("In another terminal: (.+)", make_run.log)
    command += " -Atc 'SHOW fsync; SELECT vote FROM public.vote_totals'"
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert answer.stdout == "on\nGummi\nPita\n", answer.stderr


def test_nobody_else_on_the_machine_gets_into_the_database(make_run):
    (url,) = re.findall("(postgresql://.+)", make_run.log)
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(re.sub(":[^:@]+@", "@", url), passfile="/nowhere")
    assert sql(url, "SHOW unix_socket_directories") == [("",)]
    assert make_run.folder.joinpath(".postgres").stat().st_mode & 0o077 == 0


def test_it_listens_on_the_loopback_interface_only(make_run):
    assert f"Open {make_run.url} " in make_run.log
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", make_run.port))


@pytest.mark.parametrize("verb", ["run", "scale"])
def test_it_refuses_to_run_twice_at_a_time(verb, make_run):
    assert "is make run running already" in complaint(make(make_run.folder, verb, PORT=str(free_port())))


def test_it_says_when_its_port_is_taken(make_run):
    assert f"Port {make_run.port} is in use" in complaint(make(make_run.folder, "run", PORT=str(make_run.port)))


def test_other_verbs_share_its_database(make_run):
    assert vote(make_run).status == 303
    assert "█" in make(make_run.folder, "report").stdout


@contextmanager
def vote_under_way(service):
    """Yield a connection on which the service waits for the rest of a vote."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as voter:
        voter.sendall(write("POST", "/add", FORM, "Content-Length: 9", "Expect: 100-continue"))
        assert b" 100 " in voter.recv(100)
        yield voter


# Whoever runs the tests may ignore these signals, as nohup does.
MAKE_RUN = "env --default-signal=HUP,INT make run"


@pytest.mark.parametrize(
    ("kill", "number"),
    [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT), (os.killpg, signal.SIGHUP)],
    ids=["SIGTERM", "Ctrl-C", "terminal closed"],
)
def test_it_ends_once_a_vote_under_way_is_stored_and_leaves_nothing_running(kill, number, shared_project):
    with Running(shared_project, MAKE_RUN) as service, vote_under_way(service) as voter:
        kill(service.process.pid, number)
        wait_until(lambda: "Handling signal: term" in service.log)
        voter.sendall(b"vote=Pita")
        assert b" 303 " in voter.recv(100)
        service.process.wait(timeout=15)
    assert nothing_runs_in(shared_project)
    assert "Traceback" not in service.log


def test_a_second_ctrl_c_hurries_it_and_leaves_nothing_running(shared_project):
    with Running(shared_project, MAKE_RUN) as service, vote_under_way(service):
        os.killpg(service.process.pid, signal.SIGINT)
        wait_until(lambda: "Handling signal: term" in service.log)
        os.killpg(service.process.pid, signal.SIGINT)
        service.process.wait(timeout=15)
    assert nothing_runs_in(shared_project)


def test_after_sigkill_it_waits_for_the_old_server_and_starts_again_with_all_votes(shared_project):
    def serves():
        return "Open http" in service.log

    with Running(shared_project) as service:
        assert vote(service).status == 303
        votes = get(service, "/?voted=Pita").votes
        server = psutil.Process(int(shared_project.joinpath(".postgres/data/postmaster.pid").read_text().split()[0]))
        server.suspend()
        os.killpg(service.process.pid, signal.SIGKILL)
    with Running(shared_project, ready="The votes are kept") as service:
        with pytest.raises(TimeoutError):
            wait_until(serves, seconds=2)
        server.resume()
        wait_until(serves)
        assert get(service, "/?voted=Pita").votes == votes
        assert "█" in make(shared_project, "report").stdout
    assert nothing_runs_in(shared_project)


def test_when_the_service_cannot_start_it_ends_without_a_traceback_and_leaves_nothing_running(shared_project):
    ended = make(shared_project, "run", PORT=str(free_port()), GUNICORN_CMD_ARGS="--pid=nowhere/pid")
    assert ended.returncode != 0
    assert "The service did not start" in ended.stderr
    assert "local/" not in ended.stderr
    assert nothing_runs_in(shared_project)


def test_a_service_that_leaves_processes_behind_is_found_out():
    service = Service(None, command="sleep 60 & exec python -m http.server --bind 127.0.0.1 $PORT")
    with pytest.raises(RuntimeError, match="would not end, and were killed"), service:
        pass
    wait_until(lambda: not service.has_processes())


# make run and make dev with DATABASE_URL


def test_it_applies_the_schema_and_serves_where_gunicorn_is_told_to_listen(shared_project, empty_database):
    told_gunicorn = {"GUNICORN_CMD_ARGS": "--bind=127.0.0.2:0", "PORT": "65536"}
    with Running(shared_project, DATABASE_URL=empty_database, **told_gunicorn) as service:
        (address,) = re.findall(r"Open (http://127\.0\.0\.2:\d+) in", service.log)
        assert urlopen(address + "/healthz").status == 200
    assert service.log.count("Listening at") == 1
    assert tables(empty_database) == ["tally", "votes"]
    assert "The votes are kept in" not in service.log


@pytest.fixture
def voters_url(database):
    """URL of `database` for somebody who may only vote there."""
    sql(database, "CREATE ROLE voter; GRANT SELECT ON vote_totals TO voter; GRANT INSERT ON votes TO voter")
    yield make_conninfo(database, options="-c role=voter")
    sql(database, "DROP OWNED BY voter; DROP ROLE voter")


def test_it_serves_a_database_whose_schema_it_may_not_change_and_says_so(shared_project, voters_url, server):
    with Running(shared_project, DATABASE_URL=voters_url) as service:
        assert vote(service).status == 303
    assert "schema.sql is not applied" in service.log
    assert server.password not in service.log


MISTAKES = ["no_such_name", "raise SystemExit(42)"]


def test_dev_shows_an_error_and_goes_on_when_it_is_mended(project, shared_database):
    module = project / "catvote.py"
    sound = module.read_text()
    with Running(project, "make dev", DATABASE_URL=shared_database) as service:
        for mistake in MISTAKES:
            save_until_seen(service, "/", module, f"{sound}\n{mistake}\n", mistake)
        save_until_seen(service, "/", module, sound, "data-votes")


# What is known of each for longer than 15 seconds, unless the service is reloaded.
@pytest.mark.parametrize(("file", "path"), [("views/history.tpl", "/history"), ("static/pita.svg", "/static/pita.svg")])
def test_dev_shows_a_changed_file(file, path, project, shared_database):
    with Running(project, "make dev", DATABASE_URL=shared_database) as service:
        assert get(service, path).status == 200
        content = project.joinpath(file).read_text() + "<!-- changed -->"
        save_until_seen(service, path, project / file, content, "<!-- changed -->")


def save_until_seen(service, path, file, content, text):
    """Save a file until the page at that path has that text."""

    def is_seen():
        file.write_text(content)
        return any(text in page(service, path) for _ in range(40))

    # gunicorn's reloader takes what it sees first for the state of before: like a person, save again.
    wait_until(is_seen, seconds=15)


def page(service, path):
    """Return a page as text, "" if it does not come since workers are just replaced."""
    try:
        return get(service, path).text
    except (OSError, ValueError):
        return ""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_that_is_there_at_the_start_is_shown_without_our_own_code(mistake, project, shared_database):
    with project.joinpath("catvote.py").open("a") as module:
        module.write(f"{mistake}\n")
    ended = make(project, "initdb", DATABASE_URL=shared_database)
    assert ended.returncode != 0
    assert mistake in ended.stderr
    assert "/catvote.py" in ended.stderr
    assert "/local/" not in ended.stderr


# Settings


@pytest.mark.parametrize(("name", "value"), [("WEB_CONCURRENCY", "two"), ("DATABASE_URL", "postgres://[::1/db")])
def test_a_setting_that_cannot_be_used_ends_it_with_one_line(name, value, shared_project):
    assert name in complaint(make(shared_project, "run", PORT=str(free_port()), **{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eight"),
        ("PORT", "65536"),
        ("WEB_CONCURRENCY", "0"),
        ("GUNICORN_CMD_ARGS", "'"),
        ("GUNICORN_CMD_ARGS", "--daemon"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"(?i){name}"):
        check_settings()


def test_an_empty_number_of_workers_is_the_usual_one_and_port_0_any_that_is_free(monkeypatch):
    monkeypatch.setenv("WEB_CONCURRENCY", "")
    monkeypatch.setenv("PORT", "0")
    assert int(check_settings()) > 0
    assert "WEB_CONCURRENCY" not in os.environ


def test_a_unix_socket_is_told_by_its_path(shared_database, tmp_path):
    with Service(shared_database, GUNICORN_CMD_ARGS=f"--bind=unix:{tmp_path}/socket") as service:
        assert service.address() == f"{tmp_path}/socket"


@pytest.mark.parametrize(("bound", "url"), [("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80")])
def test_who_listens_everywhere_is_to_be_opened_here(bound, url):
    assert url_of(bound, 80) == url


def test_a_value_in_dotenv_stays_whole_and_the_environment_wins(project, empty_database):
    url = make_conninfo(empty_database, application_name=AWKWARD)
    in_double_quotes = url.replace("\\", "\\\\").replace('"', '\\"')
    project.joinpath(".env").write_text(f'DATABASE_URL="{in_double_quotes}"\nPGTZ=Asia/Tokyo\n')
    schema = "CREATE TABLE seen (name, zone) AS SELECT current_setting('application_name'), current_setting('TimeZone')"
    project.joinpath("schema.sql").write_text(schema)
    ended = make(project, "initdb", PGTZ="Europe/Berlin")
    assert ended.returncode == 0, ended.stderr
    assert sql(empty_database, "TABLE seen") == [(AWKWARD, "Europe/Berlin")]


@pytest.mark.parametrize(
    ("verb", "put"),
    [
        ("initdb", lambda path: path.write_bytes("PORT=8000\n".encode("utf-16"))),
        ("report", lambda path: path.symlink_to("nowhere")),
        ("run", os.mkfifo),
    ],
    ids=["UTF-16", "link to nowhere", "pipe"],
)
def test_a_dotenv_that_cannot_be_read_ends_a_verb_with_one_line(verb, put, project):
    put(project / ".env")
    assert complaint(make(project, verb)).startswith(".env is ")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "postgres://user:secret@[::1/db",
        "postgres://user:p@secret@host/db",
        "postgres://user:1/secret@host/db",
        "postgres://user:secret/db",
        "postgres://user:secret%FF@host/db",
    ],
    ids=["empty", "malformed URL", "@ in the password", "/ in the password", "password for a port", "not UTF-8"],
)
def test_a_wrong_database_url_is_named_in_one_line_without_its_value(url, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(ValueError, match="^DATABASE_URL is not .*$") as wrong:
        catvote.database_url()
    assert "secret" not in "".join(traceback.format_exception(wrong.value))


# make initdb, dropdb, report; the Procfile's release line


def test_initdb_names_an_error_and_leaves_nothing_of_the_schema(project, empty_database):
    project.joinpath("schema.sql").write_text("CREATE TABLE sooner (); SELECT 1 / 0;")
    assert "division by zero" in complaint(make(project, "initdb", DATABASE_URL=empty_database))
    assert tables(empty_database) == []


def test_initdb_feeds_herokus_psql_which_stops_at_an_error_and_needs_nothing_here(project, server, empty_database):
    shutil.rmtree(project / ".venv")
    heroku = project / "heroku"
    heroku.write_text(f"#!/bin/sh\n[ $1 = pg:psql ] && exec {server.bindir}/psql -X '{empty_database}'\n")
    heroku.chmod(0o755)
    initdb = ["initdb", "PSQL=heroku pg:psql", f"PATH={project}:{os.environ['PATH']}"]
    assert make(project, *initdb).returncode == 0
    assert tables(empty_database) == ["tally", "votes"]
    project.joinpath("schema.sql").write_text("SELECT 1 / 0; CREATE TABLE later ();")
    assert make(project, *initdb).returncode != 0
    assert tables(empty_database) == ["tally", "votes"]
    assert not project.joinpath(".venv").exists()


def test_quotes_in_psql_lead_to_the_database_that_they_name(shared_project, server, database):
    psql = f"{server.bindir}/psql -X '{make_conninfo(database, application_name='report')}'"
    sql(database, "INSERT INTO votes (vote) VALUES ('Pita')")
    assert "█" in make(shared_project, "report", f"PSQL={psql}").stdout
    assert make(shared_project, "dropdb", f"PSQL={psql}", answer="yes\n").returncode == 0
    assert tables(database) == []


def test_dropdb_says_which_database_and_keeps_all_without_a_clear_yes(shared_project, shared_database):
    ended = make(shared_project, "dropdb", DATABASE_URL=shared_database, answer="y\n")
    assert ended.returncode != 0
    assert shared_database.rpartition("/")[2] in ended.stdout
    assert "Nothing was dropped" in ended.stdout
    assert tables(shared_database) == ["tally", "votes"]


def test_dropdb_drops_what_the_schema_made_and_what_was_built_on_it(shared_project, database):
    sql(database, "CREATE VIEW of_totals AS TABLE vote_totals; CREATE VIEW of_votes AS TABLE votes")
    sql(database, "CREATE VIEW of_recounts AS SELECT recount_votes() IS NULL AS done")
    ended = make(shared_project, "dropdb", answer="yes\n", DATABASE_URL=database)
    assert ended.returncode == 0, ended.stderr
    left = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace UNION ALL "
    left += "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    assert sql(database, left) == []


def test_dropdb_fails_and_keeps_all_where_it_may_not(shared_project, database, voters_url):
    ended = make(shared_project, "dropdb", answer="yes\n", DATABASE_URL=voters_url)
    assert ended.returncode != 0
    assert "must be owner" in ended.stderr
    assert sql(database, "SELECT count(*) FROM vote_totals") == [(2,)]


def test_report_draws_a_bar_for_each_cat_and_day(shared_project, database):
    def bars(cat):
        lines = make(shared_project, "report", DATABASE_URL=database).stdout.splitlines()
        return [line.count("█") for line in lines if cat in line]

    assert bars("Pita") == [0]
    sql(database, "INSERT INTO votes (vote) VALUES ('Pita'), ('Gummi'), ('Gummi')")
    assert bars("Pita") == [20, 20]


def test_the_release_line_applies_the_schema(empty_database):
    variables = {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "DATABASE_URL": empty_database}
    subprocess.run(["sh", "-c", procfile("release")], cwd=ROOT, env=variables, check=True, timeout=20)
    assert tables(empty_database) == ["tally", "votes"]


# make test, clean, help; install is in test_machines.py


def test_make_test_runs_both_parts_and_fails_if_one_does(shared_project, tmp_path):
    program = tmp_path / "pytest"
    program.write_text(f"""echo "with $*" >> {tmp_path}/log\n[ "$*" = "-m alone tests" ]""")
    assert make(shared_project, "test", f"PYTEST=sh {program}").returncode != 0
    assert tmp_path.joinpath("log").read_text().endswith(" -m not alone tests\nwith -m alone tests\n")


def test_clean_removes_packages_and_caches_however_deep_and_keeps_the_votes(project):
    kept = project / ".postgres/__pycache__"
    gone = [project / ".venv", project / "__pycache__", project / "tests/scale/deeper/__pycache__"]
    for folder in [kept, *gone]:
        folder.mkdir(parents=True, exist_ok=True)
    assert make(project, "clean").returncode == 0
    assert kept.exists()
    assert not any(folder.exists() for folder in gone)


def test_help_lists_every_verb(shared_project):
    lines = make(shared_project).stdout.splitlines()
    verbs = "help install run dev check test initdb dropdb report bench scale diagrams card clean"
    assert [line.split()[1] for line in lines] == verbs.split()
