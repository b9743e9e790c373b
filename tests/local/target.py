"""The database that a verb works with: a command for the Makefile.

    python -m local.target COMMAND [ARGUMENT ...]

runs COMMAND with the database of DATABASE_URL or, if that is not set, with a local one whose
server runs as long as COMMAND does. DATABASE_URL tells COMMAND which one it is; so do libpq's
own variables (PGHOST and the like), for psql, and PATH has a psql.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg

from local import ROOT
from local.postgres import LocalPostgres, has_locked
from local.processes import as_command, on_signal, reachable, wait_for
from local.programs import programs_for
from local.settings import read_dotenv, service_code


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


class Target(NamedTuple):
    """A database to work with: its URL, and whether it is the local one."""

    url: str
    is_local: bool

    @property
    def psql(self) -> Path:
        """The machine's psql, else that of server programs."""
        return Path(shutil.which("psql") or programs_for() / "psql")

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
        path = f"{os.environ['PATH']}:{self.psql.parent}"
        ours = {"PGCLIENTENCODING": "UTF8", "DATABASE_URL": self.url, "PATH": path}
        # Without one, libpq looks for a certificate in HOME. If that may not be read, it does without TLS, silently.
        variables = {"PGSSLCERT": "/nonexistent", **os.environ, **settings, **ours}
        variables.pop("PGSERVICE", None)  # what the service file says is in the others, unless the URL says otherwise
        return variables


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
        yield Target(url, is_local=False)
        return

    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # meant for other databases: a server of our own is reached by its URL alone
    folder = local_folder()
    print(f"The votes are kept in {folder}", file=sys.stderr)
    try:
        lock = open(folder / "lock", "a+")  # of whoever has started the server; it tells the others its URL
    except PermissionError:
        raise RuntimeError(
            f"{folder} is another user's, maybe root's: let its owner give it to you (chown -R)"
        ) from None
    with lock:
        if has_locked(lock):
            lock.truncate(0)
            with LocalPostgres(base_dir=folder, durable=True) as server:
                url = url_with_schema(server)
                lock.write(url)
                lock.flush()
                yield Target(url, is_local=True)
        elif exclusive:
            raise RuntimeError("The local database is in use: is make run running already?")
        else:
            lock.seek(0)
            if not (url := lock.read()):
                raise RuntimeError("The local database is just starting: please try again.")
            yield Target(url, is_local=True)


def local_folder() -> Path:
    """Return the folder of the local database, made if needed: in the checkout, where the server's user can enter that."""
    folder = ROOT / ".postgres"
    if not reachable(ROOT):
        folder = Path("/var/lib/catvote", hashlib.sha256(bytes(ROOT)).hexdigest()[:12])
        folder.parent.mkdir(exist_ok=True)
        folder.parent.chmod(0o755)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def url_with_schema(server: LocalPostgres) -> str:
    """Return the URL of our database on our server, made if needed, with the schema."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'catvote'").fetchone():
            connection.execute("CREATE DATABASE catvote")
    url = server.url("catvote")
    service_code().initdb(url)
    return url


if __name__ == "__main__":
    main()
