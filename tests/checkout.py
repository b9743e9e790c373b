"""Copies of the project to try the Makefile's verbs on, for the tests of start-up and of machines."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from local import ROOT
from local.install import STAMP, identity, requirements, stamp_of
from local.processes import wait_until
from local.service import Service


@contextmanager
def copy_of_project() -> Iterator[Path]:
    """Yield a new copy in a folder with a space in its name, with our packages but no settings and no votes."""
    ignored = [".git", ".venv", ".env", ".postgres", ".*cache", ".hypothesis"]
    with tempfile.TemporaryDirectory(dir=swift_folder()) as parent:
        os.chmod(parent, 0o755)  # the server's user may enter, so that the votes are kept in the copy
        folder = Path(parent).resolve() / "a copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*ignored))
        lend_packages(folder)
        yield folder


def swift_folder() -> str:
    """Return where databases and copies for tests go: into memory where there is room, since each is hundreds of files."""
    memory = "/dev/shm"
    with suppress(OSError):  # not every system has it
        status = os.statvfs(memory)
        if status.f_bavail * status.f_frsize > 2**31 and not status.f_flag & os.ST_NOEXEC:
            return memory
    return "/tmp"


def lend_packages(folder: Path) -> None:
    """Give a copy an environment that takes everything from ours, and says that it is complete."""
    folder.joinpath(".venv").mkdir()
    for name in "bin", "lib", "pyvenv.cfg":
        folder.joinpath(".venv", name).symlink_to(Path(sys.prefix, name))
    folder.joinpath(STAMP).write_text(identity(folder))
    for file in "tests/local/requirements.txt", "tests/requirements.txt":
        stamp_of(folder, file).write_text(requirements(folder))


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """Return the variables for a process in that folder: these settings, none of ours."""
    # Our own Python comes first: a version manager's `python3` takes longer to find it than many a verb takes.
    path = f"{Path(sys.base_prefix, 'bin')}:{os.environ['PATH']}"
    return {"PATH": path, "FOLDER": str(folder), **settings}


def make(folder: Path, *arguments: str, answer: str = "", **settings: str) -> subprocess.CompletedProcess:
    """Run make to its end; return its status, output and errors as text."""
    return run(["make", *arguments], folder, answer, **settings)


def run(command: list[str], folder: Path, answer: str = "", **settings: str) -> subprocess.CompletedProcess:
    """Run a command in a folder to its end; return its status, output and errors as text."""
    variables = environment(folder, **settings)
    return subprocess.run(command, cwd=folder, env=variables, input=answer, capture_output=True, text=True, timeout=90)


def complaint(ended: subprocess.CompletedProcess) -> str:
    """Return the one line in which a verb that has failed says why."""
    assert ended.returncode != 0
    return only_line(ended.stderr)


def only_line(text: str) -> str:
    """Return the one line of a text about what is wrong, of which there must be no more."""
    (line,) = [line for line in text.splitlines() if not line.startswith(("The votes are kept in", "make: ***"))]
    return line


class Running(Service):
    """A verb that serves, with one worker unless the settings say otherwise; ready when it says so."""

    def __init__(self, folder: Path, command: str = "make run", ready: str = "Open http", **settings: str):
        super().__init__(None, command=command, folder=folder, **settings)
        self.ready = ready
        self.environment = environment(folder, **{"PORT": str(self.port), "WEB_CONCURRENCY": "1", **settings})

    def is_ready(self) -> bool:
        return self.ready in self.log


def nothing_runs_in(folder: Path) -> bool:
    """Wait until all processes that were started in that folder have ended, and return True."""
    return wait_until(lambda: not processes_in(folder))


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that were started in that folder and still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder) in " ".join([*process.cmdline(), *process.environ().values()]):
                found.append(process)
    return found
