"""nginx in front of two services, by nginx.conf: a class for the tests, a command for `make scale`."""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from local.processes import as_command, wait_for
from local.service import Service, check_settings
from local.settings import read_dotenv
from local.target import target

SETTINGS = Path(__file__).with_name("nginx.conf")


def find_program(name: str) -> str:
    """Return the path of a program of Debian's package of that name. Raises RuntimeError if it is not installed."""
    # Debian's folder for servers is not on everybody's PATH.
    program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if not program:
        raise RuntimeError(f"{name} is not installed: apt-get install {name}")
    return program


class Nginx(Service):
    """nginx before two services; used as a Service is.

    first, second -- the services
    to_terminal, PORT -- as Service has them
    replace -- text of nginx.conf, and what is to stand there instead

    Raises RuntimeError if nginx is not installed.
    """

    def __init__(
        self,
        first: Service,
        second: Service,
        to_terminal: bool = False,
        replace: dict[str, str] | None = None,
        **environment: str,
    ):
        # The workers of an nginx that root starts are another user's, and root's own temporary folder may be closed.
        self.place = tempfile.TemporaryDirectory(prefix="catvote-nginx-", dir="/tmp")
        os.chmod(self.place.name, 0o755)
        command = f"{find_program('nginx')} -p . -e stderr -c nginx.conf"
        super().__init__(None, to_terminal, command, Path(self.place.name), **environment)
        ports = {8000: self.port, 8001: first.port, 8002: second.port}  # in nginx.conf: ours
        addresses = {f"127.0.0.1:{theirs}": f"127.0.0.1:{ours}" for theirs, ours in ports.items()}
        self.settings = replaced(SETTINGS.read_text(), addresses | (replace or {}))
        (self.folder / "nginx.conf").write_text(self.settings)


def replaced(settings: str, replacements: dict[str, str]) -> str:
    """Return settings with other text in place of some, which has to be there."""
    for text, replacement in replacements.items():
        assert text in settings, f"not in the settings: {text}"
        settings = settings.replace(text, replacement)
    return settings


def main():
    """Run nginx and two services for a person, until Ctrl-C or SIGTERM."""
    with as_command():
        read_dotenv()
        os.environ["GUNICORN_CMD_ARGS"] = ""  # it may have an address, and both services would listen there
        port = check_settings()
        with (
            target(exclusive=True) as database,
            Service(database.url, to_terminal=True) as first,
            Service(database.url, to_terminal=True) as second,
            Nginx(first, second, to_terminal=True, PORT=port) as nginx,
        ):
            print(f"Open {nginx.url} in a browser: nginx before {first.url} and {second.url}.")
            print(f"Its settings and cache are in {nginx.folder}; Ctrl-C ends all three.", flush=True)
            status = wait_for(nginx.process, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    sys.exit(status)


if __name__ == "__main__":
    main()
