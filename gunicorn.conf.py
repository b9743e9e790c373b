"""gunicorn's settings; here because gunicorn looks for a file of this name beside the application.

Heroku's web dynos, `make run` and `gunicorn catvote:app` all start with these. gunicorn itself
reads PORT and GUNICORN_CMD_ARGS from the environment; the latter wins over this file.
"""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from select import POLLIN, poll

from gunicorn.util import close_graceful
from gunicorn.workers.gthread import ThreadWorker

import catvote

# A wrong DATABASE_URL ends the start with one line: a worker that finds out would be started again and again.
try:
    catvote.database_url()
except ValueError as error:
    sys.exit(f"catvote: {error}")
# Workers import the module anew, also those of a later reload.
del sys.modules["catvote"]

workers = int(os.environ.get("WEB_CONCURRENCY") or 2)

# Threads cost little and a slow visitor holds one; database connections, which cost, are
# fewer: see the pools in catvote.py.
threads = 64

# Longer than a router in front keeps its connections (Heroku's: 90 s), so that it never
# sends a request into a connection just closed.
keepalive = 95
# Heroku kills 30 s after the first signal.
graceful_timeout = 25

# No headers from visitors become SCRIPT_NAME or PATH_INFO, and no socket appears in $HOME.
forwarder_headers = ""
control_socket_disable = True

# Reload on save.
FOLDER = Path(__file__).resolve().parent
reload = bool(os.environ.get("DEVELOPMENT"))
if reload:
    files = [FOLDER / "catvote.py", *FOLDER.glob("views/*"), *FOLDER.glob("static/**/*")]
    reload_extra_files = [str(file) for file in files if file.is_file()]


class Worker(ThreadWorker):
    """gunicorn's gthread worker, with amendments that were checked against gunicorn 27.0.1."""

    def handle(self, conn):
        """Serve a visitor's requests, and wait a moment for the next of them in the same thread.

        The way through the main thread to the next free one costs a quarter of the CPU of a page. Guarded by
        test_a_thread_waits_for_its_visitors_next_request.
        """
        keep = super().handle(conn)
        while keep is True and self.nr_conns <= self.cfg.threads and next_request_comes(conn.sock):
            keep = super().handle(conn)
        if keep is False:
            # gunicorn gives a visitor 2 s to hang up, in the one thread that accepts connections. Here that time
            # is spent on a copy of the socket; guarded by test_visitors_who_do_not_hang_up_hold_up_nobody.
            close_graceful(conn.sock.dup())
        return keep

    def load_wsgi(self):
        """With `make dev`, show an exception at import, whatever it is (sys.exit, too), until it is mended.

        gunicorn does so with a SyntaxError only. Guarded by test_dev_shows_an_error_and_goes_on_when_it_is_mended.
        """
        try:
            super().load_wsgi()
        except (Exception, SystemExit):
            if not self.cfg.reload:
                raise
            self.log.exception("catvote.py cannot be imported")
            self.wsgi = page_with(traceback.format_exc())


worker_class = Worker


def next_request_comes(connection: socket.socket) -> bool:
    """Return whether a visitor sends something within 50 milliseconds."""
    visitor = poll()
    visitor.register(connection, POLLIN)
    return bool(visitor.poll(50))


def page_with(text):
    """Return a WSGI application that shows a text."""

    def application(environ, start_response):
        start_response("500 Internal Server Error", [("Content-Type", "text/plain; charset=utf-8")])
        return [text.encode()]

    return application


def post_fork(server, worker):
    """Let SIGTERM end a worker that has no handlers of its own yet: the master's, inherited, would swallow it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
