"""catvote as production runs it, by the Procfile's web line: a class for the tests, a command for `make run`."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg

from local import ROOT
from local.processes import as_command, end_with_us, wait_for, wait_until
from local.settings import read_dotenv, service_code
from local.target import target


def main() -> None:
    """Run the service for a person, until Ctrl-C or SIGTERM."""
    with as_command():
        read_dotenv()
        port = check_settings()
        with target(exclusive=True) as database:
            if database.is_local:
                print(f"In another terminal: {shlex.quote(str(database.psql))} {database.url}")
            else:
                apply_schema_if_allowed(database.url)
            with Service(database.url, to_terminal=True, PORT=port) as service:
                print(f"Open {service.address()} in a browser; Ctrl-C ends the service.", flush=True)
                status = wait_for(service.process, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    sys.exit(status)


def check_settings() -> str:
    """Return the port to listen on, "" if GUNICORN_CMD_ARGS says where. Raises RuntimeError if a setting cannot be used."""
    # gunicorn reads it before its own settings file, and ends with a traceback if it is no number.
    workers = os.environ.pop("WEB_CONCURRENCY", "").strip()
    if workers:
        if not workers.isdecimal() or int(workers) == 0:
            raise RuntimeError("WEB_CONCURRENCY, the number of workers, must be 1, 2 or more")
        os.environ["WEB_CONCURRENCY"] = workers
    told = told_gunicorn(os.environ)
    if told.daemon:
        raise RuntimeError("make run ends with the service, which must stay: take --daemon out of GUNICORN_CMD_ARGS")
    if told.bind:
        return ""
    port = os.environ.get("PORT") or "8000"
    try:
        with socket.create_server(("127.0.0.1", int(port))) as listener:
            return str(listener.getsockname()[1])  # any free one for 0
    except (OSError, OverflowError, ValueError):
        raise RuntimeError(f"Port {port} is in use or no port; choose another: make run PORT=8001") from None


def apply_schema_if_allowed(url: str) -> None:
    """Apply schema.sql to a database that is not ours, as the Procfile's release line does; else say why it was not."""
    try:
        service_code().initdb(url)
        print("schema.sql is applied to the database of DATABASE_URL.")
    except psycopg.Error as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"schema.sql is not applied to the database of DATABASE_URL, which is used as it is: {reason}")


def told_gunicorn(environment: dict[str, str]) -> Namespace:
    """Return what GUNICORN_CMD_ARGS says, as gunicorn reads it; what it does not say is None. Raises RuntimeError."""
    from gunicorn.config import Config  # only now: as it is imported it reads WEB_CONCURRENCY

    try:
        arguments = shlex.split(environment.get("GUNICORN_CMD_ARGS", ""))
    except ValueError as error:
        raise RuntimeError(f"GUNICORN_CMD_ARGS cannot be read: {error}") from None
    return Config().parser().parse_known_args(arguments)[0]


def url_of(address: str, port: int) -> str:
    """Return the URL for a browser on this machine of who listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def procfile(process_type: str) -> str:
    """Return the Procfile's command for a process type."""
    return re.search(rf"^{process_type}:\s*(.+)$", (ROOT / "Procfile").read_text(), re.MULTILINE)[1]


def free_port() -> int:
    """Return a port of the loopback interface on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Service:
    """gunicorn with its workers, on a port of the loopback interface; a context manager that ends them.

    database_url -- its DATABASE_URL, if any
    to_terminal -- for a person: it writes there, rather than into `log`, and sees all variables of this process; else it
        has one worker, unless `environment` says otherwise
    command -- another one than the Procfile's to start it by, for sh
    folder -- another one than the project's to start it in
    environment -- more variables; GUNICORN_CMD_ARGS may bind it to another address

    url, port and process (the gunicorn master) are for all to use. Raises RuntimeError, with
    what it wrote, if it ends instead of listening.
    """

    process: subprocess.Popen

    def __init__(
        self,
        database_url: str | None,
        to_terminal: bool = False,
        command: str = procfile("web"),
        folder: Path = ROOT,
        **environment: str,
    ):
        self.command, self.folder = command, folder
        self.port = int(environment.get("PORT") or free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **(os.environ if to_terminal else {"WEB_CONCURRENCY": "1"}),
            **environment,
            **({"DATABASE_URL": database_url} if database_url else {}),
            "PORT": str(self.port),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        if not told_gunicorn(self.environment).bind:
            arguments = self.environment.get("GUNICORN_CMD_ARGS", "")
            self.environment["GUNICORN_CMD_ARGS"] = f"--bind=127.0.0.1:{self.port} {arguments}"
        self.output = None if to_terminal else tempfile.NamedTemporaryFile()

    def __enter__(self):
        self.process = subprocess.Popen(
            ["sh", "-c", "exec " + self.command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            # Workers that get Ctrl-C beside the master can stall it: they are out of its reach.
            start_new_session=True,
            preexec_fn=end_with_us(signal.SIGTERM),
        )
        try:
            wait_until(lambda: self.process.poll() is not None or self.is_ready(), seconds=60)
            if self.process.poll() is not None:
                raise RuntimeError(f"The service did not start. {self.log}")
        except BaseException:
            self.stop()
            raise
        return self

    def is_ready(self) -> bool:
        """Return whether it accepts connections."""
        with suppress(psutil.Error):  # it has just ended
            return self.address() is not None

    def address(self) -> str | None:
        """Return where it listens, as a URL or the path of a socket, None as long as it does not."""
        for found in psutil.Process(self.process.pid).net_connections("all"):
            if found.family == socket.AF_UNIX and found.laddr:
                return found.laddr
            if found.status == psutil.CONN_LISTEN:
                return url_of(*found.laddr)
        return None

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes that run now."""
        return psutil.Process(self.process.pid).children()

    @property
    def log(self) -> str:
        """What it has written so far."""
        return Path(self.output.name).read_text() if self.output else ""

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> int:
        """Ask the master to end, wait for it, and return its status. Raises RuntimeError if anything stays behind."""
        self.process.terminate()
        try:
            status = self.process.wait(timeout=40)
            wait_until(lambda: not self.has_processes(), seconds=2)
        except (subprocess.TimeoutExpired, TimeoutError):
            os.killpg(self.process.pid, signal.SIGKILL)
            raise RuntimeError(f"Processes of the service would not end, and were killed. {self.log}") from None
        return status

    def has_processes(self) -> bool:
        """Return whether any of its processes is left, as long as they stay in the master's group."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


if __name__ == "__main__":
    main()
