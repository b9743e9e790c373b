"""Start-up: what the Makefile's verbs, the Procfile and the settings do, tried on copies of the project."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import psycopg
import pytest
from checkout import Running, environment, left_behind, make
from local.postgres import ROOT
from local.service import Service, check_settings, free_port, procfile

import catvote

VERBS = [
    "help",
    "install",
    "run",
    "dev",
    "check",
    "test",
    "initdb",
    "dropdb",
    "report",
    "bench",
    "scale",
    "diagrams",
    "card",
    "clean",
]
# Characters that mean something to sh, make, a URL or libpq.
AWKWARD = """pass&word#1 $HOME$$ 'single' "double" %25 @:/"""


def listens(port, address="127.0.0.1"):
    """Return whether a connection to that port is accepted."""
    with socket.socket() as client:
        return client.connect_ex((address, port)) == 0


def starter_of(folder):
    """Return the process id that `make run` wrote beside its votes."""
    return int(folder.joinpath(".postgres/lock").read_text())


def tables(url):
    """Return the names of a database's tables."""
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
        return [name for (name,) in rows]


# make run with a database of its own


def test_a_vote_survives_a_restart(used_project):
    with Running(used_project) as service:
        votes = service.votes(vote="Pita")
    with Running(used_project) as service:
        assert service.votes() == votes > 0


def test_it_says_what_to_open_and_where_the_votes_are(running):
    assert f"Open {running.url} " in running.output
    assert f"{running.folder}/.postgres" in running.output


def test_it_shows_how_to_reach_the_database_by_psql(running):
    (command,) = re.findall("In another terminal: (.+)", running.output)
    answer = subprocess.run(["sh", "-c", command + " -c 'TABLE public.vote_totals'"], capture_output=True, text=True)
    assert "Pita" in answer.stdout, answer.stderr


def test_it_listens_on_the_loopback_interface_only(running):
    assert listens(running.port)
    assert not listens(running.port, address="127.0.0.2")


@pytest.mark.parametrize(
    "signals",
    [
        pytest.param([(os.kill, signal.SIGTERM)], id="SIGTERM"),
        pytest.param([(os.killpg, signal.SIGINT)], id="Ctrl-C"),
        pytest.param([(os.killpg, signal.SIGINT)] * 2, id="Ctrl-C twice"),
        pytest.param([(os.killpg, signal.SIGHUP)], id="terminal closed"),
        pytest.param([(os.killpg, signal.SIGKILL)], id="SIGKILL"),
    ],
)
def test_it_leaves_nothing_running_after(signals, used_project):
    with Running(used_project, WEB_CONCURRENCY="2") as service:
        for kill, number in signals:
            kill(service.process.pid, number)
            time.sleep(0.1)
        service.process.wait(timeout=15)
    assert left_behind(used_project) == []


def test_it_starts_again_at_once_after_it_was_killed(used_project):
    with Running(used_project) as service:
        votes = service.votes(vote="Pita")
        os.kill(starter_of(used_project), signal.SIGKILL)
    with Running(used_project) as service:
        assert service.votes() == votes


def test_it_refuses_to_run_twice_at_a_time(running):
    second = make(running.folder, "run", PORT=str(free_port()))
    assert second.returncode != 0
    assert "is make run running already" in second.stderr


def test_it_says_when_its_port_is_taken(running, monkeypatch):
    monkeypatch.setenv("PORT", str(running.port))
    with pytest.raises(RuntimeError, match=f"Port {running.port} is in use"):
        check_settings()


def test_other_verbs_share_its_database(running):
    running.votes(vote="Pita")
    assert "█" in make(running.folder, "report").stdout


def test_other_verbs_start_the_database_when_it_does_not_run(used_project):
    assert "Pita" in make(used_project, "report").stdout
    assert left_behind(used_project) == []


# make run with DATABASE_URL


def test_it_applies_the_schema_to_a_new_database(shared_project, empty_database):
    with Running(shared_project, DATABASE_URL=empty_database) as service:
        assert service.votes(vote="Pita") == 1
    assert not shared_project.joinpath(".postgres").exists()


def test_it_serves_a_database_whose_schema_it_may_not_change_and_says_so(shared_project, database, awkward_role):
    url = keywords(database, user=awkward_role, password=AWKWARD)
    with Running(shared_project, DATABASE_URL=url) as service:
        assert service.votes(vote="Pita") == 1
    assert "schema.sql is not applied" in service.output
    assert AWKWARD not in service.output


def test_it_serves_while_the_database_is_away(shared_project):
    away = f"postgresql://user:secret@127.0.0.1:{free_port()}/db"
    with Running(shared_project, DATABASE_URL=away) as service, pytest.raises(HTTPError) as refused:
        service.page(vote="Pita")
    assert refused.value.code == 503
    assert "schema.sql is not applied" in service.output
    assert "secret" not in service.output


def test_dev_shows_a_changed_view_without_a_restart(project, shared_database):
    with Running(project, ["make", "dev"], DATABASE_URL=shared_database) as service:
        assert "<!-- changed -->" not in service.page()
        view = project / "views/index.tpl"
        view.write_text(view.read_text() + "<!-- changed -->")
        for _ in range(50):
            time.sleep(0.2)
            with suppress(OSError):  # the old workers end
                if "<!-- changed -->" in service.page():
                    return
    pytest.fail("still the old view")


# Settings


@pytest.fixture
def awkward_role(database):
    """Name of a role that may vote and whose password is AWKWARD."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE ROLE awkward LOGIN")
        connection.execute(psycopg.sql.SQL("ALTER ROLE awkward PASSWORD {}").format(AWKWARD))
        connection.execute("GRANT SELECT ON vote_totals TO awkward; GRANT INSERT ON votes TO awkward")
        yield "awkward"
        connection.execute("DROP OWNED BY awkward; DROP ROLE awkward")


def write_dotenv(folder, **settings):
    """Write .env, each value in double quotes, in which a backslash escapes."""
    for name, value in settings.items():
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        folder.joinpath(".env").write_text(f'{name}="{quoted}"\n')


def keywords(url, **changes):
    """Return a URL as libpq's keywords and values, which need no percent-encoding."""
    return psycopg.conninfo.make_conninfo(url, **changes)


def test_a_value_in_dotenv_stays_whole(project, empty_database):
    write_dotenv(project, DATABASE_URL=keywords(empty_database, application_name=AWKWARD))
    project.joinpath("schema.sql").write_text("CREATE TABLE seen AS SELECT current_setting('application_name')")
    make(project, "initdb")
    with psycopg.connect(empty_database) as connection:
        assert connection.execute("TABLE seen").fetchall() == [(AWKWARD,)]


def test_dotenv_gives_make_run_its_database(project, database):
    write_dotenv(project, DATABASE_URL=database)
    with Running(project) as service:
        service.votes(vote="Pita")
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM votes").fetchone() == (1,)


def test_the_environment_wins_over_dotenv(project, empty_database):
    write_dotenv(project, DATABASE_URL="postgresql://127.0.0.1:1/nowhere")
    assert make(project, "initdb", DATABASE_URL=empty_database).returncode == 0
    assert "votes" in tables(empty_database)


def test_the_procfile_runs_under_a_process_manager_with_the_same_dotenv(project, database):
    write_dotenv(project, DATABASE_URL=keywords(database, application_name='it\'s "#1" & $more'))
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    with Running(project, ["honcho", "start", "web"], ready="Listening at", PATH=path) as service:
        assert service.votes(vote="Pita") == 1
    assert left_behind(project) == []


def test_a_password_may_be_percent_encoded_and_the_server_behind_a_unix_socket(server, database, awkward_role):
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    place = f"host={quote(server.socket_dir, safe='')}&port={server.settings['port']}"
    url = f"postgres://{awkward_role}:{quote(AWKWARD, safe='')}@/{name}?{place}"
    with Service(url) as service, urlopen(service.url + "/add", data=b"vote=Pita") as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(None, id="missing"),
        pytest.param("", id="empty"),
        pytest.param("postgres://user:secret@[::1/db", id="malformed URL"),
        pytest.param("mysql://user:secret@localhost/db", id="other database"),
        pytest.param("secret", id="no URL"),
        pytest.param("postgres://user:p@secret@host/db", id="@ in the password"),
        pytest.param("postgres://user:1/secret@host/db", id="/ in the password"),
        pytest.param("postgres://user:secret/1@host/db", id="/ after the secret"),
        pytest.param("postgres://user:secret/db", id="password for a port"),
    ],
)
def test_a_wrong_database_url_is_named_in_one_line_without_its_value(url, monkeypatch):
    monkeypatch.delenv("DATABASE_URL", raising=False) if url is None else monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(ValueError, match="^DATABASE_URL is not .*$") as wrong:
        catvote.database_url()
    assert "secret" not in "".join(traceback.format_exception(wrong.value))


@pytest.mark.parametrize(
    "command", [["sh", "-c", procfile("web")], ["make", "run"], ["make", "initdb"]], ids=["Procfile", "run", "initdb"]
)
def test_a_wrong_database_url_ends_the_start_with_that_line(command, shared_project):
    variables = environment(shared_project, DATABASE_URL="postgres://user:secret@[::1/db", PORT=str(free_port()))
    variables["PATH"] = f"{sys.prefix}/bin:{variables['PATH']}"
    ended = subprocess.run(command, cwd=shared_project, env=variables, capture_output=True, text=True, timeout=20)
    assert ended.returncode != 0
    (line,) = [line for line in ended.stderr.splitlines() if not line.startswith("make: ***")]
    assert "DATABASE_URL is not a valid" in line
    assert "secret" not in ended.stdout + line


# make initdb, dropdb, report; the Procfile's release line


def test_initdb_applies_the_schema_again_and_again(shared_project, empty_database):
    for _ in range(2):
        assert make(shared_project, "initdb", DATABASE_URL=empty_database).returncode == 0
    assert tables(empty_database) == ["tally", "votes"]


def test_initdb_stops_at_the_first_error(project, empty_database):
    project.joinpath("schema.sql").write_text("SELECT 1 / 0; CREATE TABLE later ();")
    ended = make(project, "initdb", DATABASE_URL=empty_database)
    assert ended.returncode != 0
    assert "division by zero" in ended.stderr
    assert tables(empty_database) == []


def test_initdb_shows_no_connection_string(shared_project, shared_database):
    ended = make(shared_project, "initdb", DATABASE_URL=shared_database)
    assert "postgresql:" not in ended.stdout + ended.stderr


@pytest.fixture
def heroku(project, server, empty_database):
    """Settings under which a command like Heroku's leads to `empty_database`; the copy has no packages."""
    shutil.rmtree(project / ".venv")
    command = project / "bin/heroku"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n[ $1 = pg:psql ] && exec {server.bindir}/psql -X '{empty_database}'\n")
    command.chmod(0o755)
    return {"PATH": f"{command.parent}:{os.environ['PATH']}"}


def test_initdb_feeds_herokus_psql_and_needs_nothing_here(project, heroku, empty_database):
    ended = make(project, "initdb", "PSQL=heroku pg:psql", **heroku)
    assert ended.returncode == 0, ended.stderr
    assert not project.joinpath(".venv").exists()
    assert "votes" in tables(empty_database)


def test_initdb_reports_an_error_on_heroku(project, heroku, empty_database):
    project.joinpath("schema.sql").write_text("SELECT 1 / 0; CREATE TABLE later ();")
    assert make(project, "initdb", "PSQL=heroku pg:psql", **heroku).returncode != 0
    assert tables(empty_database) == []


@pytest.mark.parametrize("answer", ["", "\n", "no\n", "y\n"])
def test_dropdb_keeps_all_without_a_clear_yes(answer, shared_project, server, shared_database):
    ended = make(shared_project, "dropdb", f"PSQL={server.bindir}/psql -X '{shared_database}'", answer=answer)
    assert ended.returncode != 0
    assert "Nothing was dropped" in ended.stdout
    assert tables(shared_database) == ["tally", "votes"]


def test_dropdb_drops_what_the_schema_made(shared_project, database):
    ended = make(shared_project, "dropdb", answer="yes\n", DATABASE_URL=database)
    assert ended.returncode == 0, ended.stderr
    with psycopg.connect(database) as connection:
        left = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace UNION ALL "
        left += "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        assert connection.execute(left).fetchall() == []


def test_dropdb_says_which_database(shared_project, shared_database):
    name = psycopg.conninfo.conninfo_to_dict(shared_database)["dbname"]
    assert name in make(shared_project, "dropdb", DATABASE_URL=shared_database).stdout


def test_report_draws_a_bar_for_each_cat_and_day(shared_project, database):
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("INSERT INTO votes (vote) VALUES ('Pita'), ('Pita'), ('Gummi')")
    report = make(shared_project, "report", DATABASE_URL=database).stdout
    assert [line.count("█") for line in report.splitlines() if "Gummi" in line] == [20, 20]
    assert [line.count("█") for line in report.splitlines() if "Pita" in line] == [40, 40]


def test_the_release_line_applies_the_schema(empty_database):
    variables = {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "DATABASE_URL": empty_database}
    subprocess.run(["sh", "-c", procfile("release")], cwd=ROOT, env=variables, check=True, timeout=20)
    assert tables(empty_database) == ["tally", "votes"]


# make clean, help; install is in test_machines.py


def test_clean_keeps_the_votes(project):
    project.joinpath(".postgres").mkdir()
    assert make(project, "clean").returncode == 0
    assert project.joinpath(".postgres").exists()
    assert not project.joinpath(".venv").exists()


def test_clean_removes_caches_however_deep(project):
    caches = [project / "__pycache__", project / "tests/scale/deeper/__pycache__"]
    for cache in caches:
        cache.mkdir(parents=True)
    assert make(project, "clean").returncode == 0
    assert not any(cache.exists() for cache in caches)


@pytest.mark.parametrize("arguments", [[], ["help"]])
def test_help_lists_every_verb(arguments, shared_project):
    lines = make(shared_project, *arguments).stdout.splitlines()
    assert [line.split()[1] for line in lines] == VERBS
