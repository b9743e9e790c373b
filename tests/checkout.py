"""Copies of the project to try the Makefile's verbs on, for the tests of start-up and of machines."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
from client import votes_on
from local.install import identity, requirements, stamp_of
from local.postgres import ROOT
from local.service import free_port


@contextmanager
def copy_of_project(mode: int = 0o755) -> Iterator[Path]:
    """Yield a new copy in a folder with a space in its name, with our packages but no settings and no votes.

    mode -- of the folder around it: in most the server's user may enter, so that the votes are kept in the copy
    """
    ignored = [".git", ".venv", ".env", ".postgres", ".*cache", ".hypothesis", "__pycache__"]
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        os.chmod(parent, mode)
        folder = Path(parent).resolve() / "a copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*ignored))
        lend_packages(folder)
        yield folder


def lend_packages(folder: Path) -> None:
    """Give a copy an environment that takes everything from ours, and says that it is complete."""
    environment = folder / ".venv"
    if not environment.exists():
        environment.mkdir()
        for name in "bin", "lib", "pyvenv.cfg":
            environment.joinpath(name).symlink_to(Path(sys.prefix, name))
    environment.joinpath("made-for").write_text(identity(folder))
    for file in "tests/local/requirements.txt", "tests/requirements.txt":
        stamp_of(folder, file).write_text(requirements(folder))


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """Return the variables for a process in that folder: these settings, none of ours."""
    # Our own Python comes first: a version manager's `python3` takes longer to find it than many a verb takes.
    path = f"{Path(sys.base_prefix, 'bin')}:{os.environ['PATH']}"
    return {"PATH": path, "FOLDER": str(folder), **settings}


def make(folder: Path, *arguments: str, answer: str = "", **settings: str) -> subprocess.CompletedProcess:
    """Run make to its end; return its status, output and errors as text."""
    variables = environment(folder, **settings)
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, input=answer, capture_output=True, text=True, timeout=90)


class Running:
    """A command that serves, from when it says that it is ready; a context manager that ends it with SIGTERM.

    One worker does, unless the settings say otherwise.
    """

    def __init__(self, folder: Path, command=("make", "run"), ready="Open http", **settings: str):
        self.folder = folder
        self.command = command
        self.ready = ready
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = {"PORT": str(self.port), "WEB_CONCURRENCY": "1", **settings}
        self.log = tempfile.NamedTemporaryFile()

    def __enter__(self):
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=environment(self.folder, **self.settings),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        for _ in range(600):
            if self.ready in self.output:
                return self
            assert self.process.poll() is None, self.output
            time.sleep(0.05)
        self.__exit__()
        pytest.fail(f"It is not ready: {self.output}")

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout=40)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return Path(self.log.name).read_text()

    def page(self, vote: str | None = None) -> str:
        """Return the page, as made from the database; with `vote` the one that follows that vote."""
        form = vote and f"vote={vote}".encode()
        with urlopen(self.url + ("/add" if vote else "/?voted=Pita"), data=form, timeout=20) as answer:
            return answer.read().decode()

    def votes(self, vote: str | None = None) -> int:
        """Return the number of Pita's votes on the page."""
        return votes_on(self.page(vote))["Pita"]


def left_behind(folder: Path, seconds: int = 5) -> list[str]:
    """Return command lines of processes that were started in that folder and still run after some seconds."""
    for _ in range(seconds * 10):
        remaining = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = process.joinpath("cmdline").read_bytes()
                if bytes(folder) in command + process.joinpath("environ").read_bytes():
                    remaining.append(command.replace(b"\0", b" ").decode())
            except OSError:  # ended meanwhile
                continue
        if not remaining:
            break
        time.sleep(0.1)
    return remaining
