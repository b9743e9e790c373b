"""catvote: a web service that lets visitors vote for one of two cats dressed as donuts.

gunicorn calls `app` for each request; Bottle finds the handler; that asks the database, and fills a view.
"""

import json
import logging
import os
import re
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import Future
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from select import POLLIN, poll
from threading import Lock
from time import monotonic
from urllib.parse import quote

import psycopg
from bottle import Bottle, HTTPError, HTTPResponse, request, response, static_file, template
from multipart import parse_form_data
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

# Configuration

DATABASE_URL = os.environ.get("DATABASE_URL", "")
FORM_LIMIT = 4096  # bytes; a vote needs ten, or two hundred as multipart
FOLDER = Path(__file__).parent
VERSION = sha256(b"".join(file.read_bytes() for file in sorted(FOLDER.glob("static/*")))).hexdigest()[:8]
view = partial(template, template_lookup=[str(FOLDER / "views")], static_url=f"/static/{{}}?v={VERSION}".format)
routes = Bottle()


def database_url():
    """Return DATABASE_URL, which says where the database is, in any form that libpq understands.

    https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING

    Raises ValueError if it is missing or malformed; the error's text shows nothing of it.
    """
    url = os.environ.get("DATABASE_URL", "").strip()
    if not url:
        raise ValueError("DATABASE_URL is not set; see .env.example")
    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        parts = None  # the error's text quotes the URL, password and all
    # An @ or / in a password has to be percent-encoded: else a part of it is taken for a host or port, and logged.
    if (
        parts is None
        or "@" in parts.get("host", "") + parts.get("dbname", "")
        or re.search("[^0-9,]", str(parts.get("port", "")))
    ):
        raise ValueError("DATABASE_URL is not a valid PostgreSQL connection URL; see .env.example")
    return url


# Database


def initdb():
    """Apply schema.sql to the database of DATABASE_URL: safe again and again, and while people vote.

    Raises ValueError as `database_url`, psycopg.Error if the database refuses.
    """
    with psycopg.connect(database_url(), autocommit=True) as connection:
        connection.execute((FOLDER / "schema.sql").read_text())


class Connection(psycopg.Connection):
    """A connection on which no statement waits for ever, not even for a server that has frozen.

    After `patience` seconds it asks the server to cancel, and is not used again. A server that says it did has undone
    the statement. Success proves nothing then: so ends a commit that waits for its standby no longer.
    """

    patience = 2

    def wait(self, gen, interval=0.1, timeout=None):
        try:
            return super().wait(gen, interval, timeout or self.patience)
        except psycopg.errors._WaitTimeout:
            with closing(self):
                self.cancel_safe(timeout=self.patience / 2)
                super().wait(gen, interval, self.patience / 2)
                raise


def configure(connection):
    """Do without prepared statements behind a pooler, where each may reach another server process."""
    if connection.execute("SELECT pg_backend_pid()").fetchone() != (connection.info.backend_pid,):
        connection.prepare_threshold = None


def check(connection):
    """Raise psycopg.Error if the server has hung up on an idle connection; then others have to go, too."""
    socket = poll()  # all that a server tells an idle connection is good-bye: silence needs no answer
    socket.register(connection.fileno(), POLLIN)
    if socket.poll(0):
        connection._pool.check()
        ConnectionPool.check_connection(connection)


# Two pools, so that votes that hang cannot keep pages from the database. Two workers hold at most
# 8 connections, where small hosted plans allow 20. gunicorn.conf.py opens and closes the pools.
SESSION = {"autocommit": True, "connect_timeout": 2, "application_name": "catvote"}
pool_of = partial(ConnectionPool, DATABASE_URL, connection_class=Connection, kwargs=SESSION, configure=configure)
vote_pool, page_pool = (pool_of(check=check, min_size=1, max_size=2, reconnect_timeout=2, open=False) for _ in range(2))


def execute(pool, patience, statement, parameters=()):
    """Run one statement, a transaction of its own, and return its rows, within 2.5 x `patience` seconds.

    Raises HTTPError 503, `unconfirmed` if the statement may have been done all the same.
    """
    connection = None
    try:
        with pool.connection(timeout=patience / 2) as connection:
            connection.patience = patience
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []
    except psycopg.Error as error:
        logging.getLogger("catvote").warning("database: %s", " ".join(str(error).split()) or type(error).__name__)
        away = HTTPError(503, Retry_After="5")
        # An ERROR undoes the statement. A connection lost, even with a last word, may have committed.
        away.unconfirmed = connection is not None and error.diag.severity_nonlocalized != "ERROR"
        raise away from error


Reading = namedtuple("Reading", "begun rows outdated", defaults=[False])  # begun: monotonic seconds


class Reader:
    """Keeps a statement's rows for `fresh` seconds, a quarter more while one visitor reads; outdated if that failed."""

    def __init__(self, statement, patience, fresh):
        self.query, self.fresh = (page_pool, patience, statement), fresh
        self.last, self.lock, self.retry_at = Reading(-fresh, None), Lock(), 0

    def latest(self, now=False):
        """Return a Reading `fresh` enough or, if `now`, begun after this call, or outdated; or raise HTTPError 503."""
        since = monotonic() - (0 if now else self.fresh)
        last = self.last
        # One visitor reads for all. The others wait `now` or if the rows are too old and not known to be outdated.
        due = last.begun < since and monotonic() >= self.retry_at
        if due and self.lock.acquire(blocking=now or (last.begun < since - self.fresh / 4 and not last.outdated)):
            try:
                # Another may have read, or failed to, while this one waited for the lock.
                if self.last is last or not (self.last.outdated or self.last.begun >= since):
                    self.last = Reading(monotonic(), tuple(execute(*self.query)))
            except HTTPError:
                self.last, self.retry_at = self.last._replace(outdated=True), monotonic() + self.fresh / 10
            finally:
                self.lock.release()
        if self.last.rows is None:
            raise HTTPError(503, Retry_After="5")
        return self.last


INSERT = "INSERT INTO public.votes (vote) SELECT unnest(%s::text[])"
HISTORY = "SELECT hour, vote, votes FROM public.votes_by_hour WHERE hour > now() - interval '30 days'"
tally_reader = Reader("SELECT vote, votes FROM public.vote_totals", patience=0.7, fresh=0.7)
history_reader = Reader(HISTORY, patience=3, fresh=60)

# For each cat the votes to store next, and what becomes of them: a cat that is gone spoils no other's.
batches, joining, storing = defaultdict(lambda: ([], Future())), Lock(), Lock()


def store(vote):
    """Store a vote, in one statement with those that come while another runs; raise HTTPError as `execute` does."""
    with joining:
        votes, stored = batches[vote]
        votes.append(vote)
        first = len(votes) == 1
        if len(votes) == 8:  # if their statement hangs, not all threads hang with it
            del batches[vote]
    if first:
        in_turn = storing.acquire(timeout=0.1)  # seconds; if one takes longer, use the pool's other connection
        with joining:
            if batches[vote][0] is votes:
                del batches[vote]
        try:
            stored.set_result(execute(vote_pool, 2, INSERT, [votes]))
        except BaseException as error:  # noqa: BLE001 -- whatever it is, nobody may wait for ever
            stored.set_exception(error)
        if in_turn:
            storing.release()
    stored.result()


# Request handlers


@routes.get("/")
def index():
    """The page; `?voted=CAT` adds thanks and a tally that includes that vote, whichever worker answers."""
    voted = request.query.voted
    return conditional(page(tally_reader.latest(now=bool(voted)), voted, request.environ["catvote.origin"]))


@lru_cache(maxsize=64)
def page(reading, voted, origin):
    """Return the answer with the page, made once for all who see the same."""
    return answer(view("index", votes=dict(reading.rows), outdated=reading.outdated, voted=voted, origin=origin))


@routes.get("/tally.json")
def tally_json():
    """The tally for scripts; an outdated one says so by its Age in seconds (RFC 9111, section 5.1)."""
    reading = tally_reader.latest()
    tally = answer(json.dumps(dict(reading.rows)), "application/json")
    if reading.outdated:
        tally.set_header("Age", int(monotonic() - reading.begun))
    return conditional(tally)


@routes.get("/history")
def history():
    """Votes in each of the last 48 hours and 30 days, in UTC."""
    _, rows, outdated = history_reader.latest()
    this_hour = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0)
    hours = {this_hour - timedelta(hours=number): Counter() for number in reversed(range(30 * 24))}
    days = {hour.date(): Counter() for hour in hours}
    for hour, vote, votes in rows:
        hours.get(hour, {})[vote] = votes
        days.get(hour.date(), Counter())[vote] += votes
    hours, days = [*hours.items()][-48:], [*days.items()][-30:]
    return conditional(answer(view("history", hours=hours, days=days, outdated=outdated)))


@routes.post("/add")
def add():
    """Store a vote. The 303 (RFC 9110, section 15.4.4) is a promise: that vote is committed."""
    refuse_cross_site()
    vote = read_vote()
    if vote not in dict(tally_reader.latest().rows):
        raise HTTPError(400, "There is no such cat, so no vote was counted.")
    store(vote)
    return HTTPResponse(status=303, headers={"Location": f"/?voted={quote(vote)}", "Cache-Control": "no-store"})


def refuse_cross_site():
    """Raise 403 for a page of another site, by the rule of https://pkg.go.dev/net/http#CrossOriginProtection."""
    site, origin, host = (request.environ.get("HTTP_" + name, "") for name in ("SEC_FETCH_SITE", "ORIGIN", "HOST"))
    same_host = host and origin.lower().partition("://")[2] == host.lower()
    if site not in ("same-origin", "none") and (site or (origin and not same_host)):
        raise HTTPError(403, "Votes from pages of other sites are not counted.")


def read_vote():
    """Return the field `vote` of the form sent; raise 413 if it is too long, 400 if it is not one vote."""
    try:
        body = request.environ["wsgi.input"].read(FORM_LIMIT + 1)
        if len(body) <= FORM_LIMIT:
            (vote,) = parse_form_data(request.environ | {"wsgi.input": BytesIO(body)}, strict=True)[0].getall("vote")
            return vote
    except Exception as error:  # each server has its own for a body that is broken off
        raise HTTPError(400, "The form did not arrive as one vote, so none was counted.") from error
    raise HTTPError(413, "That is far too much for a vote, so none was counted.")


@routes.get("/healthz")
def healthz():
    """200 while the database answers, for a platform that asks; else 503."""
    execute(page_pool, 0.7, "SELECT 1")
    return HTTPResponse("ok\n", headers={"Content-Type": "text/plain", "Cache-Control": "no-store"})


@routes.get("/static/<path:path>")
def static(path):
    """A file; for a year if its address names the present version, else to be asked for again."""
    file = static_file(path, root=FOLDER / "static", etag=False)
    if file.status_code < 400:
        del file.headers["Date"]  # gunicorn sends one
        file.set_header("Cache-Control", "max-age=31536000, immutable" if request.query.v == VERSION else "no-cache")
    return file


def answer(text, content_type="text/html; charset=utf-8"):
    """Return an answer with an entity tag, which a visitor shows next time."""
    body = text.encode()
    headers = {"Content-Type": content_type, "Content-Length": len(body), "Cache-Control": "no-cache"}
    return HTTPResponse(body, headers=headers, ETag=f'"{sha256(body).hexdigest()[:16]}"')


def conditional(answer):
    """Return the answer, or 304 if the visitor has it already (RFC 9110, section 13.1.2)."""
    known = answer.headers["ETag"] in request.environ.get("HTTP_IF_NONE_MATCH", "")
    return HTTPResponse(status=304, headers=answer.headerlist) if known else answer


def error_page(error):
    """Return the page for an error, whoever raised it."""
    response.set_header("Cache-Control", "no-store")
    if error.status_code == 405:
        response.set_header("Allow", response.get_header("Allow").replace("GET", "GET, HEAD"))
    outcome = "could not be confirmed" if getattr(error, "unconfirmed", False) else "was not counted"
    away = "The database does not answer" + (f": your vote {outcome}." if request.method == "POST" else ".")
    return view("error", status=error.status_code, message=error.body or away)


routes.default_error_handler = error_page
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with no-referrer Chromium sends our own form as of origin null
}
HTTPS_HEADERS = HEADERS | {"Strict-Transport-Security": "max-age=31536000"}
headers_of = lru_cache(maxsize=64)(HTTPResponse.headerlist.fget)  # Bottle makes the list anew each time


def app(environ, start_response):
    """The WSGI application (PEP 3333): Bottle's answer, whatever it is, with HEADERS added."""
    origin = environ["catvote.origin"] = environ["wsgi.url_scheme"] + "://" + environ.get("HTTP_HOST", "")
    extra = list((HTTPS_HEADERS if origin.startswith("https") else HEADERS).items())
    # Most requests are for the plain page, which needs no routing while its tally is fresh.
    plain = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"] == "/" and not environ.get("QUERY_STRING")
    reading = tally_reader.last
    if plain and "HTTP_IF_NONE_MATCH" not in environ and monotonic() - reading.begun < tally_reader.fresh:
        with suppress(Exception):  # Bottle will meet it again and answer
            kept = page(reading, "", origin)
            start_response("200 OK", headers_of(kept) + extra)
            return [kept.body]
    # Bottle drops bytes that are not UTF-8, which would make / of /%FF; no path of ours has any.
    environ["PATH_INFO"] = environ["PATH_INFO"].encode("ascii", "replace").decode()
    return routes(environ, lambda status, headers, *error: start_response(status, headers + extra, *error))
