"""What the verbs are told: .env, and the service's own code with its mistakes."""

import os
import traceback
from types import ModuleType

from dotenv import load_dotenv

from local import ROOT


def read_dotenv() -> None:
    """Take settings from .env, unless the environment has them; values stay as they are, also with a $ in them.

    Raises RuntimeError if it is there and cannot be read.
    """
    file = ROOT / ".env"
    if not os.path.lexists(file):
        return
    if not file.is_file():
        raise RuntimeError(".env is no file: see .env.example")
    try:
        load_dotenv(file, interpolate=False)
    except ValueError:  # that is UTF-16 or Latin-1, or has a NUL
        raise RuntimeError(".env is not text in UTF-8: save it as that; see .env.example") from None


def service_code() -> ModuleType:
    """Return the module catvote. Raises RuntimeError, with the mistake and its place, if it cannot be imported."""
    try:
        import catvote
    except (Exception, SystemExit) as error:
        theirs = error.with_traceback(error.__traceback__.tb_next)  # without this line
        mistake = "".join(traceback.format_exception(theirs))
        raise RuntimeError(f"catvote.py cannot be imported.\n{mistake}") from error
    return catvote
