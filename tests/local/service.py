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

from local.postgres import ROOT, as_command, end_with_us, target, wait_for


def procfile(process_type):
    """Return the Procfile's command for a process type."""
    return re.search(rf"^{process_type}:\s*(.+)$", (ROOT / "Procfile").read_text(), re.MULTILINE)[1]


def free_port():
    """Return a port of the loopback interface on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Service:
    """gunicorn with its workers on a port of the loopback interface; a context manager that ends them.

    database_url -- its DATABASE_URL
    to_terminal -- let it write there, rather than into `log`
    environment -- more variables; it sees no others of this process but PATH

    url, port and process (the gunicorn master) are for all to use. Raises RuntimeError, with
    what it wrote, if it ends instead of listening.
    """

    command, folder = procfile("web"), ROOT

    def __init__(self, database_url, to_terminal=False, **environment):
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

    def wait_until_it_listens(self):
        """Return when connections are accepted; raise RuntimeError if the process ends before."""
        while self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.02)
        raise RuntimeError(f"The service did not start. {self.log}")

    @property
    def log(self):
        """What it has written so far."""
        return Path(self.output.name).read_text() if self.output else ""

    def __exit__(self, *_):
        self.stop()

    def stop(self):
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


def main():
    """Run the service for a person, until Ctrl-C or SIGTERM."""
    port = os.environ.get("PORT") or "8000"
    with as_command(), target(exclusive=True) as database:
        try:
            socket.create_server(("127.0.0.1", int(port))).close()
        except (OSError, OverflowError, ValueError):
            raise RuntimeError(f"Port {port} is in use or no port; choose another: make run PORT=8001") from None
        if database.folder:
            psql = "psql" if which("psql") else quote(str(database.bindir / "psql"))
            print(f"In another terminal: {psql} {database.url}")
        else:
            print("The database is that of DATABASE_URL; if it is new: make initdb")
        with Service(database.url, to_terminal=True, **{**os.environ, "PORT": port}) as service:
            print(f"Open {service.url} in a browser; Ctrl-C ends the service.", flush=True)
            status = wait_for(service.process, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    sys.exit(status)


if __name__ == "__main__":
    main()
