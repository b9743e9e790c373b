"""catvote as production runs it, by the Procfile's web line: a class for the tests, a command for `make run`."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shlex import quote
from shutil import which

import psutil
import psycopg

from local import ROOT
from local.postgres import apply_schema, read_dotenv, target
from local.processes import as_command, end_with_us, wait_for


def procfile(process_type: str) -> str:
    """Return the Procfile's command for a process type."""
    return re.search(rf"^{process_type}:\s*(.+)$", (ROOT / "Procfile").read_text(), re.MULTILINE)[1]


def free_port() -> int:
    """Return a port of the loopback interface on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Service:
    """gunicorn with its workers on a port of the loopback interface; a context manager that ends them.

    database_url -- its DATABASE_URL
    to_terminal -- let it write there, rather than into `log`
    command -- another one than the Procfile's to start it by, for sh
    folder -- another one than the project's to start it in
    environment -- more variables; it sees no others of this process but PATH

    url, port and process (the gunicorn master) are for all to use. Raises RuntimeError, with
    what it wrote, if it ends instead of listening.
    """

    command: str = procfile("web")
    folder: Path = ROOT
    process: subprocess.Popen

    def __init__(
        self,
        database_url: str,
        to_terminal: bool = False,
        command: str | None = None,
        folder: Path | None = None,
        **environment: str,
    ):
        self.command = command or self.command
        self.folder = folder or self.folder
        self.port = int(environment.get("PORT") or free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **environment,
            "DATABASE_URL": database_url,
            "PORT": str(self.port),
            "GUNICORN_CMD_ARGS": f"--bind=127.0.0.1:{self.port} {environment.get('GUNICORN_CMD_ARGS', '')}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
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
            self.wait_until_it_listens()
        except BaseException:
            self.stop()
            raise
        return self

    def wait_until_it_listens(self) -> None:
        """Return when connections are accepted; raise RuntimeError if the process ends before."""
        while self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.02)
        raise RuntimeError(f"The service did not start. {self.log}")

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
        """Ask the master to end, wait for it, and return its status. Raises AssertionError if anything stays behind."""
        self.process.terminate()
        status = self.process.wait(timeout=40)
        for _ in range(20):
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return status
            time.sleep(0.1)
        os.killpg(self.process.pid, signal.SIGKILL)
        raise AssertionError(f"Processes of the service were left behind: {self.log}")


def main() -> None:
    """Run the service for a person, until Ctrl-C or SIGTERM."""
    with as_command():
        read_dotenv()
        port = check_settings()
        with target(exclusive=True) as database:
            if database.folder:
                psql = "psql" if which("psql") else quote(str(database.bindir / "psql"))
                print(f"In another terminal: {psql} {database.url}")
            else:
                apply_schema_if_allowed(database.url)
            with Service(database.url, to_terminal=True, **{**os.environ, "PORT": port}) as service:
                print(f"Open {service.url} in a browser; Ctrl-C ends the service.", flush=True)
                status = wait_for(service.process, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    sys.exit(status)


def check_settings() -> str:
    """Return the port to listen on. Raises RuntimeError if that or another setting cannot be used."""
    # gunicorn reads it before its own settings file, and ends with a traceback if it is no number.
    if not os.environ.get("WEB_CONCURRENCY"):
        os.environ.pop("WEB_CONCURRENCY", None)
    elif not re.fullmatch(r"\s*0*[1-9]\d*\s*", os.environ["WEB_CONCURRENCY"]):
        raise RuntimeError("WEB_CONCURRENCY, the number of workers, must be 1, 2 or more")
    port = os.environ.get("PORT") or "8000"
    try:
        socket.create_server(("127.0.0.1", int(port))).close()
    except (OSError, OverflowError, ValueError):
        raise RuntimeError(f"Port {port} is in use or no port; choose another: make run PORT=8001") from None
    return port


def apply_schema_if_allowed(url: str) -> None:
    """Apply schema.sql to a database that is not ours, as the Procfile's release line does; else say why it was not."""
    patient = {"connect_timeout": 5, **psycopg.conninfo.conninfo_to_dict(url)}
    try:
        apply_schema(psycopg.conninfo.make_conninfo(**patient))
        print("schema.sql is applied to the database of DATABASE_URL.")
    except psycopg.Error as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"schema.sql is not applied to the database of DATABASE_URL, which is used as it is: {reason}")


if __name__ == "__main__":
    main()
