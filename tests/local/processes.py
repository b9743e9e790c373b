"""Processes: as whom they start, how they are waited for, and how they end."""

import ctypes
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EPERM
from pathlib import Path
from typing import TypeVar

import psycopg

from local import ROOT

Found = TypeVar("Found")


def wait_until(happened: Callable[[], Found], seconds: float = 30) -> Found:
    """Call a function until it returns something true, and return that. Raises TimeoutError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        if time.monotonic() > deadline:
            name = getattr(happened, "__qualname__", happened)
            raise TimeoutError(f"{name} has not come true within {seconds} seconds")
        time.sleep(0.05)
    return found


@contextmanager
def as_command() -> Iterator[None]:
    """Make SIGTERM and a closed terminal clean up as Ctrl-C does, and end on errors with one line."""
    on_signal(signal.SIGTERM, signal.default_int_handler)
    on_signal(signal.SIGHUP, signal.default_int_handler)
    try:
        yield
    except (RuntimeError, OSError, psycopg.Error) as error:
        sys.exit(str(error).strip())
    except KeyboardInterrupt:
        sys.exit(130)


def on_signal(number: int, action: Callable) -> None:
    """Call `action` when that signal comes, unless it was ignored when we began, as nohup ignores SIGHUP."""
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, action)


def wait_for(process: subprocess.Popen, *numbers: int) -> int:
    """Wait for a process; return its status as a shell would.

    Of the signals with these numbers that come meanwhile, the first asks it, and it alone, to
    end (SIGTERM), each further one to hurry (SIGINT).
    """
    signals = iter([signal.SIGTERM])
    for number in numbers:
        on_signal(number, lambda *_: process.send_signal(next(signals, signal.SIGINT)))
    status = process.wait()
    return status if status >= 0 else 128 - status


def spawn(command: list[str | Path], **options) -> subprocess.Popen:
    """Start a command as the server's user, in a session of its own, where Ctrl-C does not reach it.

    `options` are Popen's. Raises RuntimeError if root may not become that user.
    """
    # Only children change user: all of Python may live where no other user can enter.
    options.update(server_account(), start_new_session=True, preexec_fn=end_with_us(signal.SIGINT))
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
    except OSError as error:
        if "user" in options and error.errno == EPERM:
            raise RuntimeError(POWERLESS_ROOT) from None
        raise


POWERLESS_ROOT = (
    "PostgreSQL does not run as root, and root cannot become another user here: run this as an ordinary user"
)


def server_account() -> dict[str, int | list]:
    """Return Popen's arguments for a user that Postgres accepts: none for ours, unless we are root.

    root takes the checkout's owner, who can then go on without root, else `postgres`, else `nobody`.
    """
    if os.geteuid() != 0:
        return {}
    for find, who in (pwd.getpwuid, ROOT.stat().st_uid), (pwd.getpwnam, "postgres"), (pwd.getpwnam, "nobody"):
        with suppress(KeyError):
            account = find(who)
            if account.pw_uid != 0:
                return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    raise RuntimeError("PostgreSQL does not run as root: add a user named postgres")


def give_to_server(folder: Path) -> None:
    """Let a folder, with all that is in it, belong to the server's user. Raises RuntimeError if root may not do that."""
    if account := server_account():
        owner = f"{account['user']}:{account['group']}"
        if subprocess.run(["chown", "-hR", owner, folder], capture_output=True).returncode != 0:
            raise RuntimeError(POWERLESS_ROOT)


def reachable(path: Path) -> bool:
    """Return whether the server's user can execute that file or enter that folder."""
    return spawn(["test", "-x", path]).wait() == 0


def end_with_us(number: int) -> Callable | None:
    """Return what a child process calls to be sent that signal when ours is killed (Linux only)."""
    libc = ctypes.CDLL(None)
    return (lambda: libc.prctl(1, number)) if hasattr(libc, "prctl") else None  # 1: PR_SET_PDEATHSIG
