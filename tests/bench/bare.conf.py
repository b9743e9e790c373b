"""catvote's own settings of gunicorn, without the functions that open and close its pools."""

import runpy
from pathlib import Path
from types import FunctionType

settings = runpy.run_path(str(Path(__file__).parents[2] / "gunicorn.conf.py"))
globals().update({name: value for name, value in settings.items() if not isinstance(value, FunctionType)})
