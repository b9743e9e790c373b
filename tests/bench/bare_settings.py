"""catvote's own settings of gunicorn, its worker included, for another application: all but the hooks, which need it."""

import runpy
from inspect import isfunction
from pathlib import Path

settings = runpy.run_path(str(Path(__file__).parents[2] / "gunicorn.conf.py"))
globals().update({name: value for name, value in settings.items() if not isfunction(value)})
