"""The application in this process, under Waitress: for tests that change the module, or count what it does.

So each of them also shows that another server than gunicorn serves it, and by the standard library's checks that it
keeps to WSGI.
"""

import importlib
import sys
from threading import Thread
from wsgiref.validate import validator

import waitress


class InProcess:
    """A server on a port of the loopback interface, for the application as each test has loaded it.

    catvote -- the module as it was loaded last, which a test may change
    """

    def __init__(self):
        server = waitress.create_server(self, host="127.0.0.1", port=0, threads=32)
        self.port = server.effective_port
        Thread(target=server.run, daemon=True).start()

    def load(self):
        """Import the module anew, so that nothing is known of earlier tests."""
        sys.modules.pop("catvote", None)
        self.catvote = importlib.import_module("catvote")
        self.application = validator(self.catvote.app)

    def close(self):
        """End the connections to the database."""
        self.catvote.pool().close()

    def __call__(self, environ, start_response):
        return self.application(environ, start_response)
