"""The service with lines of its own, which change the module `catvote` before it serves.

For what cannot be had from outside: tests that wait for nothing, and other applications on the same server.
"""

import tempfile
from pathlib import Path

from local.service import Service

# Each page has what the database says as it is made: votes and settings of one test do not show in the next.
READ_FOR_EACH_PAGE = """
for reader in catvote.tally_reader, catvote.history_reader:
    reader.refreshed_after = reader.fresh = 0
"""


class AlteredService(Service):
    """The service after these lines of Python, as one worker.

    lines -- they find `catvote` and `app` imported, and may change both
    """

    command = "gunicorn altered:app"

    def __init__(self, database_url, lines):
        self.place = tempfile.TemporaryDirectory()
        Path(self.place.name, "altered.py").write_text(f"import catvote\nfrom catvote import app\n{lines}")
        arguments = f"--pythonpath={self.place.name}"
        super().__init__(database_url, WEB_CONCURRENCY="1", GUNICORN_CMD_ARGS=arguments)
