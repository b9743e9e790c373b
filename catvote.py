"""catvote: a web service that lets visitors vote for one of two cats dressed as donuts.

gunicorn calls `app` for each request; Bottle finds the handler; that asks the database, and fills a view.
"""

import json
import logging
import os
from collections import Counter, namedtuple
from functools import partial
from hashlib import sha256
from io import BytesIO
from math import inf
from pathlib import Path
from select import POLLIN, poll
from threading import Lock
from time import monotonic
from urllib.parse import quote, urlsplit

import bottle
import psycopg
from bottle import HTTPError, HTTPResponse, request, response
from psycopg_pool import ConnectionPool

# Configuration

log = logging.getLogger("catvote")
DATABASE_URL = os.environ.get("DATABASE_URL", "")
FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data")
FORM_LIMIT = 4096  # bytes; a vote needs ten, or two hundred as multipart
FOLDER = Path(__file__).parent
VERSION = sha256(b"".join(file.read_bytes() for file in sorted(FOLDER.glob("static/*")))).hexdigest()[:8]

# Database


class Connection(psycopg.Connection):
    """A connection on which no statement waits for ever, not even for a server that has frozen.

    After `patience` seconds it asks the server to cancel. A server that says it did has undone the statement;
    one that stays silent loses the connection. Success that late proves nothing: a commit looks the same
    that was told to wait no longer for its standby.
    """

    patience = 2

    def wait(self, gen, interval=0.1, timeout=None):
        try:
            return super().wait(gen, interval, timeout or self.patience)
        except psycopg.errors._WaitTimeout:
            try:
                self.cancel_safe(timeout=self.patience / 2)
                super().wait(gen, interval, self.patience / 2)
            except psycopg.OperationalError as error:
                if error.sqlstate:
                    raise
                self.close()
            raise


def configure(connection):
    """Do without prepared statements behind a pooler, where each may reach another server process."""
    (server_process,) = connection.execute("SELECT pg_backend_pid()").fetchone()
    if server_process != connection.info.backend_pid:
        connection.prepare_threshold = None


def check(connection):
    """Raise psycopg.Error if the server has hung up on an idle connection; then others have to go, too."""
    socket = poll()  # all that a server tells an idle connection is good-bye: silence needs no answer
    socket.register(connection.fileno(), POLLIN)
    if socket.poll(0):
        connection._pool.check()
        ConnectionPool.check_connection(connection)


# Two pools, so that votes that hang cannot keep pages from the database. Two workers hold at most
# 16 connections, where small hosted plans allow 20. gunicorn.conf.py opens and closes the pools.
SESSION = {"autocommit": True, "connect_timeout": 2, "application_name": "catvote"}
POOL = {"connection_class": Connection, "kwargs": SESSION, "configure": configure, "check": check, "open": False}
POOL |= {"min_size": 1, "max_idle": 60, "reconnect_timeout": 2}  # seconds
vote_pool, page_pool = (ConnectionPool(DATABASE_URL, max_size=size, **POOL) for size in (6, 2))


def execute(pool, patience, statement, parameters=()):
    """Run one statement, a transaction of its own, and return its rows, within 2.5 x `patience` seconds.

    Raises psycopg.IntegrityError or DataError if the parameters are to blame, else HTTPError 503, whose
    `unconfirmed` tells that the statement may have been done all the same.
    """
    sent = False
    try:
        with pool.connection(timeout=patience / 2) as connection:
            connection.patience = patience
            sent = True
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []
    except (psycopg.IntegrityError, psycopg.DataError):
        raise
    except psycopg.Error as error:
        log.warning("database: %s", str(error).strip() or type(error).__name__)
        away = HTTPError(503, "The database does not answer in time.", Retry_After="5")
        # An ERROR undoes the statement. A connection lost, even with a last word, may have committed.
        away.unconfirmed = sent and error.diag.severity_nonlocalized != "ERROR"
        raise away from error


# Rows of a statement, when it was begun (monotonic seconds), whether a later one has failed.
Reading = namedtuple("Reading", "rows begun outdated", defaults=[False])


class Reader:
    """Keeps the rows of a statement for `fresh` seconds, so that many visitors cost one reading."""

    def __init__(self, statement, patience, fresh):
        self.query, self.fresh = (page_pool, patience, statement), fresh
        self.last, self.lock = Reading([], -inf), Lock()

    def read(self):
        """Return a Reading of now, else the last one marked as outdated, else raise HTTPError 503."""
        begun = monotonic()
        try:
            reading = Reading(execute(*self.query), begun)
        except HTTPError:
            if self.last.begun == -inf:
                raise
            reading = self.last._replace(outdated=True)
        if reading.begun >= self.last.begun:  # of two at once, the one begun later has seen more
            self.last = reading
        return reading

    def latest(self):
        """Return the last Reading while it is fresh, else as `read`."""
        last = self.last
        # One visitor reads for all; the others wait for it, unless the database is known to be away.
        if monotonic() - last.begun >= self.fresh and self.lock.acquire(blocking=not last.outdated):
            try:
                return self.read() if self.last is last else self.last
            finally:
                self.lock.release()
        return last


HISTORY = """
    SELECT hour AT TIME ZONE 'UTC', jsonb_object_agg(vote, coalesce(counted.votes, 0))
    FROM generate_series(date_trunc('day', now(), 'UTC') - interval '29 days', now(), '1 hour') AS hour
    CROSS JOIN public.vote_totals
    LEFT JOIN (
        SELECT date_bin('1 hour', date_created, 'epoch') AS hour, vote, count(*) AS votes
        FROM public.votes
        WHERE date_created >= now() - interval '30 days'
        GROUP BY 1, 2
    ) AS counted USING (hour, vote)
    GROUP BY hour
    ORDER BY hour
"""
tally_reader = Reader("SELECT vote, votes FROM public.vote_totals", patience=0.7, fresh=0.7)
history_reader = Reader(HISTORY, patience=3, fresh=60)

# Request handlers

routes = bottle.Bottle()


@routes.get("/")
def index():
    """The page; `?voted=CAT` adds thanks and a tally that includes that vote, whichever worker answers."""
    voted = request.query.voted
    reading = tally_reader.read() if voted else tally_reader.latest()
    origin = request.environ["wsgi.url_scheme"] + "://" + request.environ.get("HTTP_HOST", "")
    return conditional(view("index", votes=dict(reading.rows), outdated=reading.outdated, voted=voted, origin=origin))


@routes.get("/tally.json")
def tally_json():
    """The tally for scripts; an outdated one says so by its Age in seconds (RFC 9111, section 5.1)."""
    reading = tally_reader.latest()
    if reading.outdated:
        response.set_header("Age", int(monotonic() - reading.begun))
    return conditional(json.dumps(dict(reading.rows)), "application/json")


@routes.get("/history")
def history():
    """Votes in each of the last 48 hours and 30 days, in UTC."""
    hours, _, outdated = history_reader.latest()
    days = {}
    for hour, votes in hours:
        days.setdefault(hour.date(), Counter()).update(votes)
    return conditional(view("history", hours=hours[-48:], days=[*days.items()], outdated=outdated))


@routes.post("/add")
def add():
    """Store a vote. The 303 (RFC 9110, section 15.4.4) is a promise: that vote is committed."""
    refuse_cross_site()
    vote = read_vote()
    try:
        execute(vote_pool, 2, "INSERT INTO public.votes (vote) VALUES (%s)", [vote])
    except (psycopg.IntegrityError, psycopg.DataError, UnicodeError) as error:
        raise HTTPError(400, "There is no such cat, so no vote was counted.") from error
    except HTTPError as error:
        outcome = "could not be confirmed" if error.unconfirmed else "was not counted"
        error.body = f"The database does not answer: your vote {outcome}."
        raise
    return HTTPResponse(status=303, headers={"Location": f"/?voted={quote(vote)}", "Cache-Control": "no-store"})


def refuse_cross_site():
    """Raise 403 for a page of another site, by the rule of https://pkg.go.dev/net/http#CrossOriginProtection."""
    site, origin, host = (request.environ.get("HTTP_" + name, "") for name in ("SEC_FETCH_SITE", "ORIGIN", "HOST"))
    try:
        same_host = urlsplit(origin).netloc.lower() == host.lower() != ""
    except ValueError:
        same_host = False
    if site not in ("same-origin", "none") and (site or (origin and not same_host)):
        raise HTTPError(403, "Votes from pages of other sites are not counted.")


def read_vote():
    """Return the field `vote` of the form sent; raise 413 if it is too long, 400 if it is not one vote."""
    environ = request.environ
    refused = HTTPError(400, "The form did not arrive as one vote, so none was counted.")
    try:
        body = environ["wsgi.input"].read(FORM_LIMIT + 1)
    except Exception as error:  # each server has its own for a body that is broken off or malformed
        raise refused from error
    if len(body) > FORM_LIMIT:
        raise HTTPError(413, "That is far too much for a vote, so none was counted.")
    length = str(len(body))
    kind, semicolon, options = environ.get("CONTENT_TYPE", "").partition(";")
    kind = kind.strip().lower()  # the only spelling that Bottle knows
    if kind not in FORM_TYPES or environ.get("CONTENT_LENGTH", length) != length:
        raise refused
    environ.pop("HTTP_TRANSFER_ENCODING", None)  # the server has decoded chunks; Bottle would try again
    environ |= {"wsgi.input": BytesIO(body), "CONTENT_LENGTH": length, "CONTENT_TYPE": kind + semicolon + options}
    try:
        (vote,) = request.forms.decode().getall("vote")
    except (ValueError, LookupError, HTTPError) as error:
        raise refused from error
    return vote


@routes.get("/healthz")
def healthz():
    """200 while the database answers, for a platform that asks; else 503."""
    execute(page_pool, 0.7, "SELECT 1")
    return HTTPResponse("ok\n", headers={"Content-Type": "text/plain", "Cache-Control": "no-store"})


@routes.get("/static/<path:path>")
def static(path):
    """A file; for a year if its address names the present version, else to be asked for again."""
    file = bottle.static_file(path, root=FOLDER / "static", etag=False)
    if file.status_code < 400:
        del file.headers["Date"]  # gunicorn sends one
        file.set_header("Cache-Control", "max-age=31536000, immutable" if request.query.v == VERSION else "no-cache")
    return file


view = partial(bottle.template, template_lookup=[str(FOLDER / "views")], static_url=f"/static/{{}}?v={VERSION}".format)


def conditional(text, content_type="text/html; charset=utf-8"):
    """Return the text, or 304 if the visitor has it already (RFC 9110, section 13.1.2)."""
    tag = f'"{sha256(text.encode()).hexdigest()[:16]}"'
    response.headers.update({"Content-Type": content_type, "Cache-Control": "no-cache", "ETag": tag})
    if tag in request.environ.get("HTTP_IF_NONE_MATCH", ""):
        response.status = 304
    return text


def error_page(error):
    """Return the page for an error, whoever raised it."""
    response.set_header("Cache-Control", "no-store")
    if error.status_code == 405:
        response.set_header("Allow", response.get_header("Allow").replace("GET", "GET, HEAD"))
    return view("error", status=error.status_code, message=error.body)


routes.default_error_handler = error_page

# For gunicorn catvote:app

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with no-referrer Chromium sends our own form as of origin null
}
HTTPS_HEADERS = {**HEADERS, "Strict-Transport-Security": "max-age=31536000"}


def app(environ, start_response):
    """The WSGI application (PEP 3333): Bottle's answer, whatever it is, with HEADERS added."""
    # Bottle drops bytes that are not UTF-8, which would make / of /%FF; no path of ours has any.
    environ["PATH_INFO"] = environ["PATH_INFO"].encode("ascii", "replace").decode()
    extra = HTTPS_HEADERS if environ["wsgi.url_scheme"] == "https" else HEADERS

    def start(status, headers, exc_info=None):
        return start_response(status, [*headers, *extra.items()], exc_info)

    return routes(environ, start)
