"""gunicorn's settings; here because gunicorn looks for a file of this name beside the application.

Heroku's web dynos, `make run` and `gunicorn catvote:app` all start with these. gunicorn itself
reads PORT and GUNICORN_CMD_ARGS from the environment; the latter wins over this file.
"""

import os
import re
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from select import POLLIN, poll

import bottle
from gunicorn.workers.gthread import ThreadWorker
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

INVALID = "catvote: DATABASE_URL is not a valid PostgreSQL connection URL; see .env.example"
try:
    database = conninfo_to_dict(os.environ.get("DATABASE_URL", ""))
except ProgrammingError:  # whose text quotes the URL, password and all
    sys.exit(INVALID)
if not database:
    sys.exit("catvote: DATABASE_URL is not set; see .env.example")
# An @ or / in a password has to be percent-encoded: else a part of it is taken for the host or port, and logged.
if "@" in database.get("host", "") + database.get("dbname", "") or re.search("[^0-9,]", str(database.get("port", ""))):
    sys.exit(INVALID)

workers = os.environ.get("WEB_CONCURRENCY", "2")


class Worker(ThreadWorker):
    """gunicorn's gthread worker, with two changes of how a thread takes leave of a visitor."""

    def handle(self, conn):
        keep = super().handle(conn)
        # A browser asks for the stylesheet and the pictures at once, and the way through the main thread
        # to the next free one costs a quarter of the CPU of a page: while there is a thread for each visitor, it waits.
        again = poll()
        while keep is True and self.nr_conns <= self.cfg.threads:
            again.register(conn.sock, POLLIN)
            if not (conn.parser.unreader.buf.getvalue() or again.poll(50)):  # milliseconds
                break
            keep = super().handle(conn)
        # gunicorn 27.0.1 gives a visitor 2 s to hang up, in the one thread that accepts connections: those
        # who do not would hold up everybody. Here they hold up this thread.
        if keep is False:
            conn.close(graceful=True)
            conn.close = lambda graceful=False: None
        return keep


# Threads cost little and a slow visitor holds one; database connections, which cost, are
# fewer: see the pools in catvote.py.
worker_class = Worker
threads = 64

# Longer than a router in front keeps its connections (Heroku's: 90 s), so that it never
# sends a request into a connection just closed.
keepalive = 95
# Heroku kills 30 s after the first signal.
graceful_timeout = 25

# There is no access log: a platform's router has one, and GUNICORN_CMD_ARGS=--access-logfile=- is another.
# No headers from visitors become SCRIPT_NAME or PATH_INFO, and no socket appears in $HOME.
forwarder_headers = ""
control_socket_disable = True

# Reload on save, and Bottle's own error pages, with the traceback.
DEVELOPMENT = bool(os.environ.get("DEVELOPMENT"))
FOLDER = Path(__file__).parent
if DEVELOPMENT:
    reload = True
    reload_extra_files = [str(file) for file in [*FOLDER.glob("views/*"), *FOLDER.glob("static/*")]]


def post_worker_init(worker):
    """Open the pools in the process that uses them, since a connection does not survive a fork."""
    import catvote

    catvote.vote_pool.open()
    catvote.page_pool.open()
    # Visitors are let in with the first connection or, without a database, after a second.
    with suppress(bottle.HTTPError):
        catvote.execute(catvote.page_pool, 2, "SELECT 1")
    # gunicorn takes two calls to look a setting up, some twenty times a request: so they become plain attributes.
    vars(worker.cfg).update({name: setting.get() for name, setting in worker.cfg.settings.items()})
    if DEVELOPMENT:
        bottle.debug()
        del catvote.routes.default_error_handler


def worker_exit(server, worker):
    """Close the pools, if the application got so far as to have them."""
    if catvote := sys.modules.get("catvote"):
        catvote.vote_pool.close()
        catvote.page_pool.close()


def mask_sigterm(how):
    """Hold SIGTERM back (signal.SIG_BLOCK) or let it through (signal.SIG_UNBLOCK)."""
    signal.pthread_sigmask(how, [signal.SIGTERM])


def end_on_sigterm():
    """Let SIGTERM end a worker that has no handlers of its own yet: the master's, inherited, would swallow it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    mask_sigterm(signal.SIG_UNBLOCK)


# The master waits graceful_timeout seconds for a worker that has missed its SIGTERM.
os.register_at_fork(
    before=partial(mask_sigterm, signal.SIG_BLOCK),
    after_in_parent=partial(mask_sigterm, signal.SIG_UNBLOCK),
    after_in_child=end_on_sigterm,
)
