"""gunicorn's settings; here because gunicorn looks for a file of this name beside the application.

Heroku's web dynos, `make run` and `gunicorn catvote:app` all start with these. gunicorn itself
reads PORT and GUNICORN_CMD_ARGS from the environment; the latter wins over this file.
"""

import glob
import logging
import os
import resource
import runpy
import signal
import socket
import sys
import time
import traceback
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from select import POLLIN, poll
from selectors import EVENT_READ

from gunicorn.util import make_fail_app
from gunicorn.workers import gthread

FOLDER = Path(__file__).resolve().parent

workers = int(os.environ.get("WEB_CONCURRENCY") or 2)

# Threads cost little and a slow visitor holds one; database connections, which cost, are
# fewer: see the pool in catvote.py.
threads = 64

# Each connection is an open file, and a worker has some forty others at most. Usual limits (1,024, 256 on macOS) are
# meant to be raised by programs that need more; beyond what is left, visitors wait to be accepted.
soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
if soft_limit < 2048:
    soft_limit = min(2048, hard_limit)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
worker_connections = min(1000, soft_limit - 50)

# Longer than a router in front keeps its connections (Heroku's: 90 s), so that it never
# sends a request into a connection just closed.
keepalive = 95
# Heroku kills 30 s after the first signal.
graceful_timeout = 25

# No headers from visitors become SCRIPT_NAME or PATH_INFO, and no socket appears in $HOME.
forwarder_headers = ""
control_socket_disable = True

# Reload on save; the rule is that of catvote.DEVELOPMENT.
reload = os.environ.get("DEVELOPMENT", "").lower() in ("1", "true", "yes", "on")
reload_extra_files = [glob.escape(str(FOLDER)) + files for files in ("/catvote.py", "/views/*", "/static/**/*")]


def on_starting(server):
    """End the start if DATABASE_URL is wrong: workers that find out would be started again and again.

    catvote.py is run here and not imported, since workers would inherit the module, also those of a later reload.
    """
    try:
        runpy.run_path(str(FOLDER / "catvote.py"))["database_url"]()
    except ValueError as error:
        server.log.error("%s", error)
        sys.exit(1)
    # Until a worker has handlers of its own, the master's, inherited, would swallow what is sent to it: it ends by that.
    os.register_at_fork(before=hold_signals, after_in_parent=let_signals_come, after_in_child=end_by_signals)


SIGNALS_TO_WORKERS = [signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1]
hold_signals = partial(signal.pthread_sigmask, signal.SIG_BLOCK, SIGNALS_TO_WORKERS)
let_signals_come = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, SIGNALS_TO_WORKERS)


def end_by_signals():
    for number in SIGNALS_TO_WORKERS:
        signal.signal(number, signal.SIG_DFL)
    let_signals_come()


def post_fork(server, worker):
    """Log what the application and its libraries have to say where gunicorn logs its errors, and in the same form."""
    logging.basicConfig(handlers=logging.getLogger("gunicorn.error").handlers)


# After an answer that did not need all that the visitor sends, gunicorn's thread reads on for so many seconds (else 5).
gthread.DEFAULT_WORKER_DATA_TIMEOUT = 0.05


class Worker(gthread.ThreadWorker):
    """gunicorn's gthread worker, with amendments that were checked against gunicorn 27.0.1.

    Its main thread accepts visitors and watches those of whom no request is under way; its other threads serve. In
    gunicorn's, visitors who do nothing hold up both kinds, and with them everybody else; guarded by test_worker.py.
    """

    request_timeout = 30  # seconds; gunicorn has none, and who lost the network in mid-request would keep a thread

    def init_process(self):
        self.serving = {}  # visitors who have a thread or queue for one, and when their time is over
        self.leaving = deque()  # visitors who have their last answer
        # A request asks for dozens of settings, each by several calls; as plain attributes they save 4 % of a page.
        vars(self.cfg).update({name: setting.get() for name, setting in self.cfg.settings.items()})
        super().init_process()

    def accept(self, listener):
        """Accept a visitor, who gets a thread when something comes; gunicorn gives the silent one, too, for 5 s."""
        # The other worker, if it has fewer visitors, comes first: in gunicorn's, a thread for each has the same effect.
        time.sleep(min(self.nr_conns, 10) * 0.00005)
        try:
            visitor, address = listener.accept()
        except BlockingIOError:  # the other worker was faster
            return
        except OSError as error:  # too many open files, for example; gunicorn's worker ends
            self.log.warning("cannot accept a visitor: %s", error)
            time.sleep(0.1)
            return
        conn = gthread.TConn(self.cfg, visitor, address, listener.getsockname())
        conn.set_timeout()
        self.nr_conns += 1
        self.pending_conns.append(conn)
        self.poller.register(visitor, EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def enqueue_req(self, conn):
        """Let a thread serve a visitor. If no further one can start, one of the others will; gunicorn's worker ends."""
        self.serving[conn] = inf
        with suppress(RuntimeError):  # by then the visitor is in the executor's queue
            self.tpool.submit(self.serve, conn)

    def serve(self, conn):
        """Serve a visitor's requests, and wait a moment for the next of them in the same thread.

        The way through the main thread to the next free one costs a quarter of the CPU of a page.
        """
        keep = self.handle(conn)
        while keep and len(self.serving) <= self.cfg.threads and next_request_comes(conn):
            keep = self.handle(conn)
        del self.serving[conn]
        if keep:
            handled = Future()
            handled.set_result(keep)
            self.method_queue.defer(self.finish_request, conn, handled)
        else:
            self.method_queue.defer(self.see_off, conn)

    def handle(self, conn):
        """Serve one request; return whether the visitor may send another one."""
        self.serving[conn] = time.monotonic() + self.request_timeout
        return super().handle(conn)

    def see_off(self, conn):
        """Read on until a visitor who has the last answer hangs up, for 2 s at most, and close the connection then.

        Closed while something is unread, it would be reset, and the answer lost (RFC 9112, section 9.6). gunicorn
        reads on for one visitor after the other, in the main thread.
        """
        conn.timeout = time.monotonic() + 2
        self.leaving.append(conn)
        with suppress(OSError):  # it may be closed or reset already
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
            self.poller.register(conn.sock, EVENT_READ, partial(self.read_on, conn))

    def read_on(self, conn, connection):
        with suppress(OSError):
            if connection.recv(65536):
                return
        self.leaving.remove(conn)
        self.close(conn)

    def close(self, conn):
        with suppress(KeyError, ValueError):  # it never came to that
            self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()

    def murder_pending(self):
        """Close what has been open for too long; gunicorn calls this at least once a second."""
        now = time.monotonic()
        while self.leaving and self.leaving[0].timeout < now:
            self.close(self.leaving.popleft())
        for conn, end in list(self.serving.items()):
            if end < now:
                with suppress(OSError):
                    conn.sock.shutdown(socket.SHUT_RDWR)  # the thread finds that there is nothing more
        if not self.alive:  # gunicorn waits until graceful_timeout for those who have said nothing yet
            for conn in self.pending_conns:
                conn.timeout = min(conn.timeout, now + 2)
        super().murder_pending()

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
            self.wsgi = make_fail_app(traceback.format_exc())


worker_class = Worker


def next_request_comes(conn):
    """Return whether a visitor has sent more, or does so within 50 milliseconds."""
    if conn.parser.unreader.buf.getvalue():  # read together with the request before
        return True
    visitor = poll()
    visitor.register(conn.sock, POLLIN)
    return bool(visitor.poll(50))
