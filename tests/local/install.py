"""The packages, in .venv/: made when they are missing, made anew when they cannot work any more.

    python3 -m local.install REQUIREMENTS_FILE ...

An environment works in one folder, with one Python: after the clone was renamed, moved or copied, or
that Python was upgraded or removed, it is made anew. Needs Python 3.10 or later, and no packages.
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from venv import EnvBuilder

from local import ROOT

# What tells pip to install elsewhere (Gitpod: PIP_USER=1), or nothing, does not reach it: these options win over
# variables and pip.conf, and these variables have no such option. Indexes, proxies and certificates do reach it.
OPTIONS = ["--no-user", "--target=", "--quiet", "--disable-pip-version-check"]
DIVERSIONS = ["PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_DRY_RUN"]

STAMP = ".venv/made-for"


def main() -> None:
    """Install what the requirements files on the command line name."""
    with open(__file__) as ours:
        try:
            fcntl.flock(ours, fcntl.LOCK_EX)  # one at a time
            make_environment(ROOT)
            for file in sys.argv[1:]:
                if not install(ROOT, file):
                    sys.exit(f"The packages of {file} could not be installed.")
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f".venv cannot be made: {error}")
        except KeyboardInterrupt:
            sys.exit(130)


def make_environment(root: Path) -> None:
    """Make .venv in a folder, unless there is one that works."""
    if not works(root):
        if ":" in str(root):  # which separates folders in PATH and PYTHONPATH
            sys.exit(f"Python cannot work in a folder with a : in its name: rename {root}")
        print("Installing packages into .venv ...", file=sys.stderr)
        EnvBuilder(clear=True, symlinks=True, with_pip=True).create(root / ".venv")
        Path(root, STAMP).write_text(identity(root))


def works(root: Path) -> bool:
    """Return whether the environment in a folder was made there, and for the Python that it still leads to."""
    return Path(root, ".venv/bin/python").exists() and text_of(root / STAMP) == identity(root)


def identity(root: Path) -> str:
    """Return what an environment depends on: its folder, in its programs' first lines, and the Python behind it."""
    return f"{root}\n{Path(root, '.venv/bin/python').resolve()}\n"


def install(root: Path, file: str, **options) -> bool:
    """Install what a requirements file names, unless that is done, and return whether it is; `options` are Popen's."""
    stamp, wanted = stamp_of(root, file), requirements(root)
    if text_of(stamp) == wanted:
        return True
    variables = {name: value for name, value in os.environ.items() if name not in DIVERSIONS}
    command = [root / ".venv/bin/python", "-m", "pip", "install", *OPTIONS, "-r", root / file]
    if subprocess.run(command, env=variables, **options).returncode != 0:
        return False
    if not Path(root, ".venv/bin/gunicorn").exists():
        sys.exit("pip installed the packages elsewhere, as its settings say: see .venv/bin/pip config list")
    stamp.write_text(wanted)
    return True


def stamp_of(root: Path, file: str) -> Path:
    """Return the file in .venv that says that what a requirements file names is installed."""
    return root / ".venv" / file.replace("/", "-")


def requirements(root: Path) -> str:
    """Return the text of all requirements files, since one includes another."""
    files = [*root.glob("requirements*.txt"), *root.glob("tests/**/requirements*.txt")]
    return "\n".join(file.read_text("utf-8") for file in sorted(files))


def text_of(file: Path) -> str | None:
    """Return a file's text, None if there is no such file."""
    return file.read_text() if file.exists() else None


if __name__ == "__main__":
    main()
