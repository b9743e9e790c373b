"""catvote's own settings of gunicorn, for another application: without its hooks and its worker's tricks."""

import runpy
from pathlib import Path

settings = runpy.run_path(str(Path(__file__).parents[2] / "gunicorn.conf.py"))
globals().update({name: value for name, value in settings.items() if not callable(value)}, worker_class="gthread")
