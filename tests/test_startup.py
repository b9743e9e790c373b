"""The verbs: what the Makefile, the Procfile and the settings do, tried on copies of the project."""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from threading import Timer
from urllib.request import urlopen

import psutil
import psycopg
import pytest
from checkout import Running, make, nothing_runs_in, only_line, run
from local import ROOT
from local.processes import wait_until
from local.service import Service, free_port, procfile, url_of

import catvote

# Characters that mean something to sh, make, a URL or libpq.
AWKWARD = """pass&word#1 ${HOME} $HOME$$ 'single' "double" %25 @:/"""
OUR_PROGRAMS = f"{sys.prefix}/bin:{os.environ['PATH']}"


def listens(port, address="127.0.0.1"):
    """Return whether a connection to that port is accepted."""
    with socket.socket() as client:
        return client.connect_ex((address, port)) == 0


def sql(url, statement):
    """Run a statement in a database; return the first value of each row."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return [row[0] for row in cursor] if cursor.description else []


def tables(url):
    """Return the names of a database's tables."""
    return sql(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")


def keywords(url, **changes):
    """Return a URL as libpq's keywords and values, which need no percent-encoding."""
    return psycopg.conninfo.make_conninfo(url, **changes)


# make run with a database of its own


def test_it_says_what_to_open_and_where_the_votes_are(running):
    assert f"Open {running.url} " in running.log
    assert f"{running.folder}/.postgres" in running.log


def test_it_shows_how_to_reach_by_psql_the_database_which_waits_for_the_disk(running):
    (command,) = re.findall("In another terminal: (.+)", running.log)
    command += " -Atc 'SHOW fsync; SELECT vote FROM public.vote_totals'"
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert answer.stdout == "on\nGummi\nPita\n", answer.stderr


def test_nobody_else_on_the_machine_gets_into_the_database(running):
    (url,) = re.findall("(postgresql://.+)", running.log)
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(re.sub(":[^:@]+@", "@", url), passfile="/nowhere")
    assert running.folder.joinpath(".postgres").stat().st_mode & 0o077 == 0


def test_it_listens_on_the_loopback_interface_only(running):
    assert listens(running.port)
    assert not listens(running.port, address="127.0.0.2")


def test_it_refuses_to_run_twice_at_a_time(running):
    second = make(running.folder, "run", PORT=str(free_port()))
    assert second.returncode != 0
    assert "is make run running already" in only_line(second.stderr)


def test_other_verbs_share_its_database(running):
    running.votes(vote="Pita")
    assert "█" in make(running.folder, "report").stdout


def test_other_verbs_start_the_database_when_it_does_not_run(used_project):
    assert "Pita" in make(used_project, "report").stdout
    assert nothing_runs_in(used_project)


@pytest.mark.parametrize(
    ("kill", "number"),
    [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT), (os.killpg, signal.SIGHUP)],
    ids=["SIGTERM", "Ctrl-C", "terminal closed"],
)
def test_it_leaves_nothing_running_after(kill, number, used_project):
    # Whoever runs the tests may ignore these signals, as nohup does.
    with Running(used_project, "env --default-signal=HUP,INT make run", WEB_CONCURRENCY="2") as service:
        kill(service.process.pid, number)
        service.process.wait(timeout=15)
    assert nothing_runs_in(used_project)
    assert "Traceback" not in service.log


def test_a_second_ctrl_c_hurries_it_and_leaves_nothing_running(used_project):
    with Running(used_project, "env --default-signal=HUP,INT make run") as service, socket.socket() as visitor:
        visitor.connect(("127.0.0.1", service.port))
        visitor.sendall(b"POST /add HTTP/1.1\r\nContent-Length: 10\r\n")  # and the service waits for the rest
        os.killpg(service.process.pid, signal.SIGINT)
        wait_until(lambda: "Handling signal: term" in service.log)
        os.killpg(service.process.pid, signal.SIGINT)
        service.process.wait(timeout=15)
    assert nothing_runs_in(used_project)


def test_after_sigkill_it_waits_for_the_old_server_and_starts_again_with_all_votes(used_project):
    with Running(used_project) as service:
        votes = service.votes(vote="Pita")
        server = psutil.Process(int(used_project.joinpath(".postgres/data/postmaster.pid").read_text().split()[0]))
        server.suspend()
        os.killpg(service.process.pid, signal.SIGKILL)
        Timer(5, server.resume).start()
    with Running(used_project) as service:
        assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
        assert service.votes() == votes > 0
        assert "█" in make(used_project, "report").stdout
    assert nothing_runs_in(used_project)


def test_ctrl_c_ends_it_without_a_traceback_while_it_starts(used_project):
    used_project.joinpath(".postgres").mkdir(mode=0o700, exist_ok=True)
    with used_project.joinpath(".postgres/server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Running(used_project, "env --default-signal=INT make run", ready="The votes are kept") as service:
            os.killpg(service.process.pid, signal.SIGINT)
            service.process.wait(timeout=15)
    assert "Traceback" not in service.log


def test_when_the_service_cannot_start_it_ends_without_a_traceback_and_leaves_nothing_running(used_project):
    ended = make(used_project, "run", PORT=str(free_port()), GUNICORN_CMD_ARGS="--pid=/nowhere/pid")
    assert ended.returncode != 0
    assert "The service did not start" in ended.stderr
    assert "local/" not in ended.stderr
    assert nothing_runs_in(used_project)


def test_a_service_that_leaves_processes_behind_is_found_out():
    service = Service(None, command="sleep 60 & exec python -m http.server --bind 127.0.0.1 $PORT")
    with pytest.raises(RuntimeError, match="would not end, and were killed"), service:
        pass
    wait_until(lambda: not service.has_processes())


def test_when_the_server_cannot_start_it_says_what_that_said(used_project):
    data = used_project / ".postgres/data"
    make(used_project, "report")
    with data.joinpath("postgresql.auto.conf").open("a") as settings:
        settings.write("nonsense = on\n")
    ended = make(used_project, "run", PORT=str(free_port()))
    data.joinpath("postgresql.auto.conf").write_text("")
    assert ended.returncode != 0
    assert 'unrecognized configuration parameter "nonsense"' in ended.stderr
    assert "Traceback" not in ended.stderr


# make run with DATABASE_URL


def test_it_applies_the_schema_to_a_new_database(shared_project, empty_database):
    with Running(shared_project, DATABASE_URL=empty_database) as service:
        assert service.votes(vote="Pita") == 1
    assert not shared_project.joinpath(".postgres").exists()


def test_it_serves_a_database_whose_schema_it_may_not_change_and_says_so(shared_project, database, awkward_role):
    url = keywords(database, user=awkward_role, password=AWKWARD)
    with Running(shared_project, DATABASE_URL=url) as service:
        assert service.votes(vote="Pita") == 1
    assert "schema.sql is not applied" in service.log
    assert AWKWARD not in service.log


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({"PORT": "0"}, "http://127.0.0.1:"),
        ({"GUNICORN_CMD_ARGS": "--bind=127.0.0.2:0"}, "http://127.0.0.2:"),
        ({"GUNICORN_CMD_ARGS": "--bind=127.0.0.2:0", "PORT": "65536"}, "http://127.0.0.2:"),
    ],
)
def test_it_serves_at_the_address_that_it_tells(settings, address, shared_project, shared_database):
    with Running(shared_project, DATABASE_URL=shared_database, **settings) as service:
        (told,) = re.findall(r"Open (\S+) in", service.log)
        assert told.startswith(address)
        assert urlopen(told + "/healthz").status == 200
    assert service.log.count("Listening at") == 1


def test_it_tells_the_path_of_a_unix_socket(shared_project, shared_database, tmp_path):
    arguments = f"--bind=unix:{tmp_path}/socket"
    with Running(shared_project, ready="Open ", DATABASE_URL=shared_database, GUNICORN_CMD_ARGS=arguments) as service:
        assert f"Open {tmp_path}/socket in" in service.log


@pytest.mark.parametrize(("bound", "url"), [("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80")])
def test_who_listens_everywhere_is_to_be_opened_here(bound, url):
    assert url_of(bound, 80) == url


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"PORT": "eight"}, "Port eight"),
        ({"PORT": "65536"}, "Port 65536"),
        ({"WEB_CONCURRENCY": "two"}, "WEB_CONCURRENCY"),
        ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY"),
        ({"GUNICORN_CMD_ARGS": "'"}, "GUNICORN_CMD_ARGS"),
        ({"GUNICORN_CMD_ARGS": "--daemon"}, "GUNICORN_CMD_ARGS"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_in_one_line(settings, named, shared_project):
    ended = make(shared_project, "run", **settings)
    assert ended.returncode != 0
    assert named in only_line(ended.stderr)


def test_it_says_when_its_port_is_taken(running):
    ended = make(running.folder, "run", PORT=str(running.port))
    assert f"Port {running.port} is in use" in only_line(ended.stderr)


def test_an_empty_number_of_workers_is_the_usual_one(shared_project, shared_database):
    with Running(shared_project, DATABASE_URL=shared_database, WEB_CONCURRENCY="") as service:
        wait_until(lambda: service.log.count("Booting worker") == 2)


def test_dev_shows_a_changed_view_without_a_restart(project, shared_database):
    def is_changed():
        try:
            return "<!-- changed -->" in service.page()
        except OSError:  # the old workers end
            return False

    with Running(project, "make dev", DATABASE_URL=shared_database) as service:
        assert not is_changed()
        with project.joinpath("views/index.tpl").open("a") as view:
            view.write("<!-- changed -->")
        wait_until(is_changed)


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


def write_dotenv(folder, url):
    """Write .env with a DATABASE_URL in double quotes, in which a backslash escapes."""
    quoted = url.replace("\\", "\\\\").replace('"', '\\"')
    folder.joinpath(".env").write_text(f'DATABASE_URL="{quoted}"\n')


def test_a_value_in_dotenv_stays_whole(project, empty_database):
    write_dotenv(project, keywords(empty_database, application_name=AWKWARD))
    project.joinpath("schema.sql").write_text("CREATE TABLE seen AS SELECT current_setting('application_name')")
    make(project, "initdb")
    assert sql(empty_database, "TABLE seen") == [AWKWARD]


def test_the_environment_wins_over_dotenv(project, empty_database):
    write_dotenv(project, "postgresql://127.0.0.1:1/nowhere")
    assert make(project, "initdb", DATABASE_URL=empty_database).returncode == 0
    assert "votes" in tables(empty_database)


@pytest.mark.parametrize(
    ("verb", "put"),
    [
        ("run", lambda path: path.write_bytes("PORT=8000\n".encode("utf-16"))),
        ("report", os.mkfifo),
        ("initdb", lambda path: path.symlink_to("/nowhere")),
    ],
)
def test_a_dotenv_that_cannot_be_read_ends_a_verb_with_one_line(verb, put, project):
    put(project / ".env")
    ended = make(project, verb)
    assert ended.returncode != 0
    assert only_line(ended.stderr).startswith(".env is ")


def test_the_procfile_runs_under_a_process_manager_with_the_same_dotenv(project, database):
    write_dotenv(project, keywords(database, application_name='it\'s "#1" & $more'))
    with Running(project, "honcho start web", ready="Listening at", PATH=OUR_PROGRAMS) as service:
        assert service.votes(vote="Pita") == 1
    assert nothing_runs_in(project)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("", id="empty"),
        pytest.param("postgres://user:secret@[::1/db", id="malformed URL"),
        pytest.param("postgres://user:p@secret@host/db", id="@ in the password"),
        pytest.param("postgres://user:1/secret@host/db", id="/ in the password"),
        pytest.param("postgres://user:secret/db", id="password for a port"),
    ],
)
def test_a_wrong_database_url_is_named_in_one_line_without_its_value(url, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(ValueError, match="^DATABASE_URL is not .*$") as wrong:
        catvote.database_url()
    assert "secret" not in "".join(traceback.format_exception(wrong.value))


@pytest.mark.parametrize("command", [["make", "run"], ["make", "initdb"]], ids=["run", "initdb"])
def test_a_wrong_database_url_ends_the_start_with_that_line(command, shared_project):
    url = "postgres://user:secret@[::1/db"
    ended = run(command, shared_project, DATABASE_URL=url, PORT=str(free_port()), PATH=OUR_PROGRAMS)
    assert ended.returncode != 0
    line = only_line(ended.stderr)
    assert "DATABASE_URL is not a valid" in line
    assert "secret" not in ended.stdout + line


# make initdb, dropdb, report; the Procfile's release line


def test_initdb_applies_the_schema_and_shows_no_connection_string(shared_project, empty_database):
    ended = make(shared_project, "initdb", DATABASE_URL=empty_database)
    assert ended.returncode == 0, ended.stderr
    assert tables(empty_database) == ["tally", "votes"]
    assert "postgresql:" not in ended.stdout + ended.stderr


def test_initdb_names_an_error_and_leaves_nothing_of_the_schema(project, empty_database):
    project.joinpath("schema.sql").write_text("CREATE TABLE sooner (); SELECT 1 / 0;")
    ended = make(project, "initdb", DATABASE_URL=empty_database)
    assert ended.returncode != 0
    assert "division by zero" in only_line(ended.stderr)
    assert tables(empty_database) == []


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


def test_initdb_stops_at_the_first_error_on_heroku(project, heroku, empty_database):
    project.joinpath("schema.sql").write_text("SELECT 1 / 0; CREATE TABLE later ();")
    assert make(project, "initdb", "PSQL=heroku pg:psql", **heroku).returncode != 0
    assert tables(empty_database) == []


@pytest.mark.parametrize("quoted", ["'{}'", '"{}"'])
def test_quotes_in_psql_lead_to_the_database_that_they_name(quoted, shared_project, server, database):
    psql = f"{server.bindir}/psql -X {quoted.format(keywords(database, application_name='report'))}"
    sql(database, "INSERT INTO votes (vote) VALUES ('Pita')")
    assert "█" in make(shared_project, "report", f"PSQL={psql}").stdout
    assert make(shared_project, "dropdb", f"PSQL={psql}", answer="yes\n").returncode == 0
    assert tables(database) == []


@pytest.mark.parametrize("answer", ["", "no\n", "y\n"])
def test_dropdb_says_which_database_and_keeps_all_without_a_clear_yes(answer, shared_project, shared_database):
    ended = make(shared_project, "dropdb", DATABASE_URL=shared_database, answer=answer)
    assert ended.returncode != 0
    assert shared_database.rpartition("/")[2] in ended.stdout
    assert "Nothing was dropped" in ended.stdout
    assert tables(shared_database) == ["tally", "votes"]


def test_dropdb_drops_what_the_schema_made(shared_project, database):
    ended = make(shared_project, "dropdb", answer="yes\n", DATABASE_URL=database)
    assert ended.returncode == 0, ended.stderr
    left = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace UNION ALL "
    left += "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    assert sql(database, left) == []


def test_dropdb_fails_and_keeps_all_where_it_may_not(shared_project, database, awkward_role):
    url = keywords(database, user=awkward_role, password=AWKWARD)
    ended = make(shared_project, "dropdb", answer="yes\n", DATABASE_URL=url)
    assert ended.returncode != 0
    assert "must be owner" in ended.stderr
    assert sql(database, "SELECT count(*) FROM vote_totals") == [2]


def test_report_draws_a_bar_for_each_cat_and_day(shared_project, database):
    sql(database, "INSERT INTO votes (vote) VALUES ('Pita'), ('Pita'), ('Gummi')")
    report = make(shared_project, "report", DATABASE_URL=database).stdout
    assert [line.count("█") for line in report.splitlines() if "Gummi" in line] == [20, 20]
    assert [line.count("█") for line in report.splitlines() if "Pita" in line] == [40, 40]


def test_the_release_line_applies_the_schema(empty_database):
    variables = {"PATH": OUR_PROGRAMS, "DATABASE_URL": empty_database}
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
