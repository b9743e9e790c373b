"""On whatever machine: the verbs, in surroundings of which shells, hosts and users know many.

Each list below is a matrix: a new row is a new line. A verb takes half a second, most of it for its packages: where
one function decides, its rows are tried on that function, in this process, and a row or two on the verb.
"""

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest.mock import patch
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from checkout import Running, copy_of_project, environment, lend_packages, make
from local import postgres
from local.install import WHEEL, identity, stamp_of
from local.postgres import Target, read_dotenv, server_account, spawn, target, wait_for_predecessor
from local.service import check_settings

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")


def only_line(text):
    """Return the one line of a text about what is wrong, of which there must be no more."""
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if not line.startswith(("The votes are kept in", "make: ***"))]
    return line


# Variables that are meant for other programs

LIBPQ = [
    {"PGSSLMODE": "require"},
    {"PGSERVICE": "nowhere"},
    {"PGSERVICEFILE": "/nowhere", "PGSYSCONFDIR": "/nowhere"},
    {"PGHOST": "192.0.2.1"},
    {"PGHOSTADDR": "192.0.2.1"},
    {"PGPORT": "1"},
    {"PGUSER": "somebody", "PGPASSWORD": "wrong", "PGDATABASE": "elsewhere", "PGDATA": "/nowhere"},
    {"PGPASSFILE": "/nowhere"},
    {"PGCHANNELBINDING": "require", "PGSSLMODE": "disable"},
    {"PGREQUIREAUTH": "none"},
    {"PGREQUIREPEER": "somebody"},
    {"PGREQUIRESSL": "1"},
    {"PGTARGETSESSIONATTRS": "standby"},
    {"PGGSSENCMODE": "require"},
    {"PGOPTIONS": "-c nonsense=1"},
    {"PGOPTIONS": "-c default_transaction_read_only=on"},
    {"PGCLIENTENCODING": "LATIN1"},
    {"PGDATESTYLE": "nonsense"},
    {"PGTZ": "Nonsense/Zone"},
    {"PGSSLROOTCERT": "system"},
    {"PGSSLCERT": "/nowhere", "PGSSLKEY": "/nowhere"},
    {"PGMINPROTOCOLVERSION": "nonsense"},
]
PYTHON = [
    {"PYTHONHOME": "/nowhere"},
    {"PYTHONSAFEPATH": "1"},
    {"PYTHONPATH": "/nowhere"},
    {"PYTHONWARNINGS": "error"},
    {"PYTHONINSPECT": "1"},
    {"PYTHONNOUSERSITE": "", "PYTHONUSERBASE": "/nowhere"},
    {"PYTHONOPTIMIZE": "2"},
    {"PYTHONPLATLIBDIR": "nowhere"},
    {"VIRTUAL_ENV": "/nowhere"},
]
SHELL = [
    {"LC_ALL": "C"},
    {"LC_ALL": "nonsense"},
    {"LANG": "de_DE.ISO-8859-1"},
    {"TZ": "Nonsense/Zone"},
    {"HOME": "/nowhere"},
    {"TMPDIR": "/nowhere"},
    {"SHELL": "/bin/false"},
    {"MAKEFLAGS": "j2"},
]


def named(row):
    """Return what to call a row of variables in the list of tests."""
    return " ".join(f"{name}={value}" for name, value in row.items())


def together(*rows):
    """Return the variables of all rows as one row."""
    return dict(itertools.chain.from_iterable(row.items() for row in rows))


@pytest.mark.parametrize("variables", LIBPQ, ids=named)
def test_variables_for_other_databases_do_not_reach_psql_or_us(variables, running, monkeypatch):
    monkeypatch.setattr(postgres, "ROOT", running.folder)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with target() as local:
        command = [local.bindir / "psql", "-Xc", "INSERT INTO public.votes (vote) VALUES ('Pita') RETURNING vote"]
        answer = subprocess.run(command, env=local.environment(), capture_output=True, text=True)
    assert "Pita" in answer.stdout, answer.stderr


@pytest.mark.parametrize("variables", [*PYTHON, *SHELL, pytest.param(together(*LIBPQ), id="libpq's")], ids=named)
def test_variables_for_other_programs_do_not_reach_ours(variables, running):
    report = make(running.folder, "report", **variables)
    assert report.returncode == 0, report.stderr
    assert "Pita" in report.stdout


def test_none_of_them_reaches_the_service(used_project):
    with Running(used_project, **together(*LIBPQ, *PYTHON, *SHELL)) as service:
        assert service.votes(vote="Pita") > 0


def test_libpqs_variables_complete_the_url_for_psql_as_for_the_service(shared_project, shared_database, server):
    whole = {"PGPASSWORD": server.password, "PGAPPNAME": "from the shell"}
    url = shared_database.replace(f":{server.password}", "")
    assert url != shared_database
    report = make(shared_project, "report", DATABASE_URL=url, **whole)
    assert "Pita" in report.stdout, report.stderr


def test_the_url_wins_over_a_service_of_the_shell_also_for_psql(shared_project, shared_database, tmp_path):
    file = tmp_path / "services"
    file.write_text("[elsewhere]\nhost=127.0.0.1\nport=1\ndbname=elsewhere\n")
    service = {"PGSERVICE": "elsewhere", "PGSERVICEFILE": str(file)}
    report = make(shared_project, "report", DATABASE_URL=shared_database, **service)
    assert "Pita" in report.stdout, report.stderr


def test_the_url_wins_over_the_shell_also_where_it_says_what_holds_by_default(monkeypatch):
    monkeypatch.setenv("PGPORT", "1")
    assert Target("postgresql://user@127.0.0.1:5432/db", Path("/usr/bin"), None).environment()["PGPORT"] == "5432"


# The environment in .venv/


PROGRAM = "import sys\n\ndef run():\n    print('It serves from', sys.prefix)\n"


@pytest.fixture(scope="module")
def small_project():
    """A copy that needs one package, whose program `gunicorn` says from which environment it runs."""
    with copy_of_project() as folder:
        shutil.rmtree(folder / ".venv")
        wheel = folder / "gunicorn-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("small_gunicorn.py", PROGRAM)
            archive.writestr("gunicorn-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: gunicorn\nVersion: 1\n")
            archive.writestr(
                "gunicorn-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(
                "gunicorn-1.dist-info/entry_points.txt", "[console_scripts]\ngunicorn = small_gunicorn:run\n"
            )
            archive.writestr("gunicorn-1.dist-info/RECORD", "")
        folder.joinpath("requirements.txt").write_text(f"./{wheel.name}\n")
        folder.joinpath("tests/requirements.txt").write_text("")
        folder.joinpath("tests/local/requirements.txt").write_text("-r ../../requirements.txt\n")
        assert make(folder, "install").returncode == 0
        yield folder


def without_packages(folder):
    """Take from a folder's environment what was installed into it, and the note that it was."""
    for file in folder.glob(".venv/**/*gunicorn*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    stamp_of(folder, "tests/local/requirements.txt").unlink(missing_ok=True)


def served_from(folder):
    """Return what the program in a folder's environment says."""
    return subprocess.run([folder / ".venv/bin/gunicorn"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "variables",
    [
        {"PIP_USER": "1"},
        {"PIP_USER": "yes", "PYTHONUSERBASE": "{elsewhere}"},
        {"PIP_TARGET": "{elsewhere}"},
        {"PIP_PREFIX": "{elsewhere}"},
        {"PIP_ROOT": "{elsewhere}"},
        {"PIP_PYTHON": "{elsewhere}/python"},
        {"PIP_DRY_RUN": "1"},
        {"PIP_CONFIG_FILE": "[install]\nuser = true"},
        {"PIP_CONFIG_FILE": "[install]\ntarget = {elsewhere}"},
        {"PIP_REQUIRE_VIRTUALENV": "1"},
    ],
    ids=named,
)
def test_pip_installs_here_whatever_it_is_told(variables, small_project, tmp_path):
    without_packages(small_project)
    elsewhere = tmp_path / "elsewhere"
    settings = {name: value.replace("{elsewhere}", str(elsewhere)) for name, value in variables.items()}
    if "PIP_CONFIG_FILE" in settings:
        tmp_path.joinpath("pip.conf").write_text(settings["PIP_CONFIG_FILE"])
        settings["PIP_CONFIG_FILE"] = str(tmp_path / "pip.conf")
    ended = make(small_project, "install", **settings)
    assert ended.returncode == 0, ended.stderr
    assert served_from(small_project) == f"It serves from {small_project}/.venv\n"
    assert not elsewhere.exists()


def test_what_would_still_lead_pip_elsewhere_is_named_until_it_is_mended(small_project, tmp_path):
    without_packages(small_project)
    tmp_path.joinpath("pip.conf").write_text(f"[install]\nprefix = {tmp_path}/elsewhere\n")
    ended = make(small_project, "install", PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))
    assert ended.returncode != 0
    assert "pip config list" in ended.stderr
    make(small_project, "install")
    assert served_from(small_project) == f"It serves from {small_project}/.venv\n"


@pytest.fixture
def installed(small_project):
    """The small project with its environment, which the test may spoil."""
    kept = shutil.copytree(small_project, small_project.with_name("kept"), symlinks=True)
    make(small_project, "install")
    yield small_project
    shutil.rmtree(small_project, ignore_errors=True)
    kept.rename(small_project)


def moved(folder):
    """Move a project."""
    return folder.rename(folder.with_name("moved"))


def copied(folder):
    """Copy a project, links and all, and let nobody use the first any more."""
    shutil.copytree(folder, folder.with_name("copied"), symlinks=True)
    folder.joinpath(".venv/bin/python").unlink()
    return folder.with_name("copied")


def python_removed(folder):
    """Let the environment's Python lead nowhere, as it did when the environment was made."""
    python = folder / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python3.9")
    folder.joinpath(".venv/made-for").write_text(identity(folder))
    return folder


def python_replaced(folder):
    """Put another program under the name of the environment's Python."""
    python = folder / ".venv/bin/python"
    python.unlink()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    return folder


def half_made(folder):
    """Leave what an installation leaves that was killed early."""
    folder.joinpath(".venv/made-for").unlink()
    folder.joinpath(".venv/bin/python").unlink()
    return folder


@pytest.mark.parametrize("change", [moved, copied, python_removed, python_replaced, half_made])
def test_an_environment_that_cannot_work_any_more_is_made_anew(change, installed):
    folder = change(installed)
    ended = make(folder, "install")
    assert ended.returncode == 0, ended.stderr
    assert served_from(folder) == f"It serves from {folder}/.venv\n"


def test_packages_are_installed_once_and_again_when_requirements_change(project):
    gone = project / "tests/requirements.txt"
    assert make(project, "install").stderr == ""
    gone.write_text("-r nowhere.txt\n")
    ended = make(project, "install")
    assert "nowhere.txt" in ended.stderr
    assert "tests/requirements.txt could not be installed" in ended.stderr


def test_make_run_needs_no_package_that_only_tests_need(project):
    project.joinpath("tests/requirements.txt").write_text("-r nowhere.txt\n")
    lend_packages(project)
    stamp_of(project, "tests/requirements.txt").unlink()
    ended = make(project, "run", PORT="none")
    assert "Port none" in only_line(ended.stderr)


def test_no_program_from_pypi_is_needed_where_the_machine_has_a_server(small_project, programs):
    path = programs(initdb="", postgres="echo 'postgres (PostgreSQL) 18.0'")
    assert make(small_project, "install", PATH=path).returncode == 0
    assert not stamp_of(small_project, WHEEL).exists()


@pytest.fixture
def programs(tmp_path):
    """A function that puts programs into a folder, an underscore for a dot, and returns a PATH that begins with it."""

    def put(**programs):
        for name, script in programs.items():
            tmp_path.joinpath(name.replace("_", ".")).write_text(f"#!/bin/sh\n{script}\n")
            tmp_path.joinpath(name.replace("_", ".")).chmod(0o755)
        return f"{tmp_path}:{environment(tmp_path)['PATH']}"

    return put


NOT_INSTALLED = "echo \"pyenv: version '3.13' is not installed\" >&2; exit 1"


def test_another_python_is_found_where_the_plain_name_fails(shared_project, programs):
    path = programs(python3=NOT_INSTALLED, python3_13=f'exec {sys.executable} "$@"')
    ended = make(shared_project, "packages", PATH=path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (NOT_INSTALLED, "pyenv: version '3.13' is not installed"),
        ("echo 3.8.10 >&2", "3.8.10"),
        ("echo \"ModuleNotFoundError: No module named 'ensurepip'\" >&2; exit 1", "ensurepip"),
        ("kill -9 $$", "Python 3.10 or later with venv is needed"),
    ],
)
def test_what_an_unusable_python_says_is_shown(script, said, shared_project, programs):
    path = programs(python3=f"{script}\nexit 1")
    ended = make(shared_project, "packages", "PYTHON=python3", PATH=path)
    assert ended.returncode != 0
    assert said in ended.stderr
    assert "apt-get install python3-venv" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_python_is_named(shared_project):
    ended = make(shared_project, "packages", "PYTHON=python3.99")
    assert "python3.99" in ended.stderr
    assert "Python 3.10 or later" in ended.stderr


# Folders


@pytest.mark.parametrize(
    "name", ["it's", 'a "b"', "$HOME", "50% #1", "caffè", "semi;colon & more", "-n", "back\\slash"]
)
def test_a_clone_may_have_any_name(name, project, shared_database):
    folder = project.rename(project.with_name(name))
    lend_packages(folder)
    report = make(folder, "report", DATABASE_URL=shared_database)
    assert "Pita" in report.stdout, report.stderr


def test_a_local_database_may_be_in_a_clone_of_any_name(project):
    folder = project.rename(project.with_name("""-n it's "$HOME" 50% #1; caffè & back\\slash"""))
    lend_packages(folder)
    report = make(folder, "report")
    assert "Pita" in report.stdout, report.stderr


def test_a_name_that_no_environment_can_have_is_refused_with_one_line(project):
    folder = project.rename(project.with_name("a:b"))
    shutil.rmtree(folder / ".venv")
    ended = make(folder, "run")
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert "PATH separator" in ended.stderr


def test_a_clone_may_be_in_a_private_folder():
    with copy_of_project(mode=0o700) as folder, Running(folder) as service:
        assert service.votes(vote="Pita") > 0
        kept = service.output.partition("The votes are kept in ")[2].partition("\n")[0]
    if not kept.startswith(str(folder)):
        shutil.rmtree(kept)


# Signals


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (["nohup", "make", "run"], signal.SIGHUP),
        (["sh", "-c", "trap '' INT; exec make run"], signal.SIGINT),
        (["sh", "-c", "trap '' HUP; exec make dev"], signal.SIGHUP),
    ],
    ids=["nohup, terminal closed", "in the background, Ctrl-C", "make dev"],
)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(command, number, used_project):
    with Running(used_project, command) as service:
        os.killpg(service.process.pid, number)
        time.sleep(1)
        assert service.votes(vote="Pita") > 0


# What an earlier run has left


@pytest.fixture
def stranger():
    """Process id of another program, of the user under whom the server runs."""
    process = spawn(["sleep", "60"])
    yield process.pid
    assert process.poll() is None
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "content",
    ["{stranger}\n{folder}/data\n1700000000\n5432\n\n127.0.0.1\n", "{stranger}\n", "", "\0\0\0\0", "nonsense\n"],
    ids=["another program's number", "cut off", "empty", "zeros", "nonsense"],
)
def test_a_postmaster_pid_left_by_a_power_cut_keeps_nobody_waiting(content, tmp_path, stranger):
    file = tmp_path / "data/postmaster.pid"
    file.parent.mkdir()
    file.write_text(content.format(stranger=stranger, folder=tmp_path))
    begun = time.monotonic()
    wait_for_predecessor(file.parent)
    assert time.monotonic() - begun < 1
    assert not file.exists()


def test_after_a_power_cut_the_server_starts_as_ever(used_project, stranger):
    make(used_project, "report")
    folder = used_project / ".postgres"
    folder.joinpath("data/postmaster.pid").write_text(f"{stranger}\n{folder}/data\n1700000000\n5432\n\n127.0.0.1\n")
    report = make(used_project, "report")
    assert "Pita" in report.stdout, report.stderr


@as_root
def test_what_root_makes_in_a_users_clone_is_the_users(project):
    owner = pwd.getpwnam("nobody")
    subprocess.run(["chown", "-R", str(owner.pw_uid), project], check=True)
    assert "Pita" in make(project, "report").stdout
    assert {file.lstat().st_uid for file in [project / ".postgres", *project.glob(".postgres/**/*")]} == {owner.pw_uid}


@pytest.fixture
def as_user():
    """A function that returns a command prefix: run as a user with that number, who may do as much as ours."""

    def prefix(number):
        command = ["unshare", "--user", f"--map-user={number}", f"--map-group={number}"]
        if subprocess.run([*command, "true"], capture_output=True).returncode != 0:
            pytest.skip("user namespaces are not allowed here")
        return command

    return prefix


def run(command, folder, **settings):
    """Run a command in a folder to its end; return its status, output and errors as text."""
    variables = environment(folder, **settings)
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=90)


def test_a_user_without_a_name_is_told_what_to_do(project, as_user):
    ended = run([*as_user(54321), "make", "report"], project)
    assert ended.returncode != 0
    line = only_line(ended.stderr)
    assert "/etc/passwd" in line
    assert "DATABASE_URL" in line


def test_a_user_without_a_name_may_use_another_database(shared_project, as_user, shared_database):
    ended = run([*as_user(54321), "make", "report"], shared_project, DATABASE_URL=shared_database)
    assert "Pita" in ended.stdout, ended.stderr


@as_root
def test_a_folder_that_another_user_made_is_named(running, as_user):
    ended = run([*as_user(server_account()["user"]), "make", "report"], running.folder)
    assert ended.returncode != 0
    line = only_line(ended.stderr)
    assert str(running.folder / ".postgres") in line
    assert "chown" in line


# .env


@pytest.fixture
def dotenv(tmp_path, monkeypatch):
    """The path of a .env for this process, whose variables are after the test as before."""
    monkeypatch.setattr(postgres, "ROOT", tmp_path)
    with patch.dict(os.environ):
        os.environ.pop("DATABASE_URL", None)
        yield tmp_path / ".env"


@pytest.mark.parametrize(
    "content",
    [
        "PORT=8000\n".encode("utf-16"),
        "PORT=8000\n".encode("utf-16-le"),
        "PORT=8000  # der Hafen für alle\n".encode("latin-1"),
        os.mkdir,
        os.mkfifo,
        lambda path: os.symlink("/nowhere", path),
    ],
    ids=["UTF-16", "UTF-16 without a mark", "Latin-1", "folder", "pipe", "link to nowhere"],
)
def test_a_dotenv_that_cannot_be_read_is_named(content, dotenv):
    content(dotenv) if callable(content) else dotenv.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"^\.env is .*$"):
        read_dotenv()


@pytest.mark.parametrize("verb", ["run", "report", "initdb"])
def test_a_dotenv_that_cannot_be_read_ends_a_verb_with_one_line(verb, project):
    project.joinpath(".env").write_bytes(b"PORT=\xff")
    ended = make(project, verb)
    assert ended.returncode != 0
    assert ".env" in only_line(ended.stderr)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffDATABASE_URL={url}\n",
        "DATABASE_URL={url}\r\n",
        "export DATABASE_URL={url}",
        "# für später\n\nDATABASE_URL='{url}'  # where the votes are\nOTHER\n",
        "DATABASE_URL= {url} \n",
        "PORT=\nWEB_CONCURRENCY=\nDATABASE_URL={url}\n",
    ],
    ids=["byte order mark", "CRLF", "export", "comments", "blanks", "empty lines"],
)
def test_a_dotenv_as_editors_and_shells_write_it_is_read(content, dotenv):
    url = "postgresql://user:password@127.0.0.1/db"
    dotenv.write_bytes(content.format(url=url).encode())
    read_dotenv()
    with target() as database:
        assert database.url == url


@pytest.mark.parametrize("value", ["${HOME}", "$HOME", "${NOWHERE:-default}", "a$$b", "`id`", "%d"])
def test_a_value_in_dotenv_is_not_expanded(value, dotenv):
    dotenv.write_text(f"SETTING='{value}'\n")
    read_dotenv()
    assert os.environ["SETTING"] == value


# Numbers


@pytest.mark.parametrize(("number", "workers"), [("1", 1), ("02", 2), ("", 2), (" 3 ", 3)])
def test_as_many_workers_as_gunicorn_itself_would_start(number, workers, shared_project, shared_database):
    with Running(shared_project, DATABASE_URL=shared_database, WEB_CONCURRENCY=number) as service:
        assert eventually(lambda: service.output.count("Booting worker") == workers)
        assert service.votes(vote="Pita") > 0


@pytest.mark.parametrize("number", ["two", "0", "-1", "1.5", "0x2", "²"])
def test_a_number_of_workers_that_is_none_is_named(number, monkeypatch):
    monkeypatch.setenv("WEB_CONCURRENCY", number)
    with pytest.raises(RuntimeError, match=r"^WEB_CONCURRENCY.*$"):
        check_settings()


@pytest.mark.parametrize("port", ["eight", "0x50", "-1", "65536", "80 80"])
def test_a_port_that_is_none_is_named(port, monkeypatch):
    monkeypatch.setenv("PORT", port)
    with pytest.raises(RuntimeError, match=f"^Port {port} .*$"):
        check_settings()


@pytest.mark.parametrize(("name", "value"), [("WEB_CONCURRENCY", "two"), ("PORT", "eight")])
def test_a_number_that_is_none_ends_make_run_with_one_line(name, value, shared_project):
    ended = make(shared_project, "run", **{name: value})
    assert ended.returncode != 0
    assert name in only_line(ended.stderr).upper()


# make dev and mistakes


MISTAKES = {
    "syntax error": "def broken(:\n",
    "unknown name": "no_such_name\n",
    "missing module": "import no_such_module\n",
    "any exception": "raise ValueError('broken')\n",
    "exit": "raise SystemExit('broken')\n",
    "not UTF-8": b"CAFE = 'caf\xe9'\n",
    "no application": "del app\n",
}


def answer_of(service):
    """Return status and text of the service's page; 0 while it does not answer."""
    try:
        with urlopen(service.url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def eventually(condition, seconds=20):
    """Return whether a condition becomes true within some seconds."""
    return any(condition() or time.sleep(0.1) for _ in range(seconds * 10))


@pytest.fixture(scope="module")
def dev(shared_database):
    """`make dev`, in a copy of the project whose catvote.py is sound after each test: a Running."""
    with copy_of_project() as folder, Running(folder, ["make", "dev"], DATABASE_URL=shared_database) as service:
        yield service


def leads_to(status, content, service):
    """Save another catvote.py; return whether the page then has that status.

    gunicorn's reloader takes what it sees first for the state of before: like a person, save again if nothing happens.
    """

    def save():
        service.folder.joinpath("catvote.py").write_bytes(content)
        return eventually(lambda: answer_of(service)[0] == status, seconds=4)

    return any(save() for _ in range(5))


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_dev_shows_an_error_and_goes_on_when_it_is_mended(mistake, dev):
    sound = dev.folder.joinpath("catvote.py").read_bytes()
    wrong = sound + (mistake if isinstance(mistake, bytes) else mistake.encode())
    assert leads_to(500, wrong, dev), dev.output
    assert "catvote" in answer_of(dev)[1]
    assert leads_to(200, sound, dev), dev.output
    assert dev.process.poll() is None


@pytest.mark.parametrize(
    ("verb", "mistake"),
    [("run", "unknown name"), ("dev", "unknown name"), ("initdb", "syntax error"), ("initdb", "exit")],
)
def test_a_mistake_that_is_there_at_the_start_is_shown_without_our_own_code(verb, mistake, project, shared_database):
    with project.joinpath("catvote.py").open("a") as module:
        module.write(MISTAKES[mistake])
    ended = make(project, verb, DATABASE_URL=shared_database)
    assert ended.returncode != 0
    assert MISTAKES[mistake].strip() in ended.stderr
    assert "/catvote.py" in ended.stderr
    assert "/local/" not in ended.stderr
