"""nginx in front of two services, by nginx.conf: a class for the tests, a command for `make scale`."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from local.processes import as_command, server_account, spawn
from local.service import Service, free_port
from local.target import target

SETTINGS = Path(__file__).with_name("nginx.conf")
SBIN = "/usr/sbin"  # Debian's folder for servers, which is not on everybody's PATH


def find_program(name: str) -> str:
    """Return the path of a program of Debian's package of that name. Raises RuntimeError if it is not installed."""
    program = shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}")
    if not program:
        raise RuntimeError(f"{name} is not installed: apt-get install {name}")
    return program


class Nginx:
    """nginx before two services, on a port of the loopback interface; a context manager that ends it.

    first, second -- the services
    port -- where it listens; without it on a free port
    https -- also listen on https_port, with a certificate made for the occasion
    replace -- text of nginx.conf, and what is to stand there instead

    url, port, https_port, process (nginx's master) and folder (settings, cache, log) are for all to use.
    Raises RuntimeError if nginx is not installed or ends instead of listening.
    """

    def __init__(
        self,
        first: Service,
        second: Service,
        port: str | int | None = None,
        https: bool = False,
        replace: dict[str, str] | None = None,
    ):
        self.program = find_program("nginx")
        self.port, self.https_port = port or free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.https = https
        self.replace = {
            "127.0.0.1:8000": f"127.0.0.1:{self.port}",
            "127.0.0.1:8001": f"127.0.0.1:{first.port}",
            "127.0.0.1:8002": f"127.0.0.1:{second.port}",
            "127.0.0.1:8443": f"127.0.0.1:{self.https_port}",
            **(replace or {}),
        }

    def __enter__(self):
        # root's own temporary folder may be closed to the user who runs it.
        self.folder = Path(tempfile.mkdtemp(prefix="catvote-nginx-", dir="/tmp" if os.geteuid() == 0 else None))
        try:
            (self.folder / "temporary").mkdir()
            if self.https:
                self.make_certificate()
            self.write_settings()
            if account := server_account():
                for path in [self.folder, *self.folder.iterdir()]:
                    os.chown(path, account["user"], account["group"])
            self.process = spawn([*self.command(), "-g", "daemon off;"], stderr=subprocess.DEVNULL)
            self.wait_until_it_listens()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def command(self) -> list[str]:
        return [self.program, "-e", "error.log", "-p", str(self.folder), "-c", "nginx.conf"]

    def write_settings(self) -> None:
        settings = SETTINGS.read_text()
        if self.https:
            settings = settings.replace("#listen", "listen").replace("#ssl_", "ssl_")
        for text, replacement in self.replace.items():
            assert text in settings, text
            settings = settings.replace(text, replacement)
        (self.folder / "nginx.conf").write_text(settings)

    def make_certificate(self) -> None:
        """Make a key and a certificate for 127.0.0.1 that nobody but `certificate.pem` vouches for."""
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
        command += ["-out", "certificate.pem", "-keyout", "key.pem"]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)

    def wait_until_it_listens(self) -> None:
        """Return when connections are accepted. Raises RuntimeError if the process ends before."""
        while not (self.folder / "nginx.pid").exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"nginx did not start: {self.log.partition('[emerg] ')[2].partition(chr(10))[0]}")
            time.sleep(0.02)

    @property
    def log(self) -> str:
        """What it has written so far: warnings and errors."""
        return (self.folder / "error.log").read_text()

    def quit(self, *_) -> None:
        """Ask it to answer the requests it has, and to end. May handle a signal."""
        self.process.send_signal(signal.SIGQUIT)

    def stop(self) -> None:
        """Let it end, and remove its folder."""
        if hasattr(self, "process"):
            self.quit()
            self.process.wait(timeout=20)
        shutil.rmtree(self.folder)


def main():
    """Run nginx and two services for a person, until Ctrl-C or SIGTERM."""
    port = os.environ.get("PORT") or "8000"
    with as_command():
        find_program("nginx")
        with (
            target(exclusive=True) as database,
            Service(database.url, to_terminal=True, PORT="") as first,
            Service(database.url, to_terminal=True, PORT="") as second,
            Nginx(first, second, port=port) as nginx,
        ):
            for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
                signal.signal(number, nginx.quit)
            print(f"Open {nginx.url} in a browser: nginx before {first.url} and {second.url}.")
            print(f"Its settings, cache and log are in {nginx.folder}; Ctrl-C ends all three.", flush=True)
            status = nginx.process.wait()
    sys.exit(status)


if __name__ == "__main__":
    main()
