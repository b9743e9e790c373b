"""catvote: a web service that lets visitors vote for one of two cats dressed as donuts.

A server such as gunicorn calls `app`, at the end of this file, for each request, in one of many threads. From there
Bottle calls the handler of the address, which asks the database and fills a template. While what the database said is
fresh, pages made of it are sent again from memory.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from functools import cached_property, partial
from hashlib import sha256
from io import BytesIO
from math import inf
from mimetypes import MimeTypes
from pathlib import Path
from select import POLLIN, poll
from threading import Event, Lock
from time import monotonic, sleep, time
from typing import NamedTuple
from urllib.parse import quote

import bottle
import psycopg
from bottle import Bottle, HTTPError, HTTPResponse, request, response, template
from multipart import parse_form_data
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import CheckViolation, DeadlockDetected, QueryCanceled, SerializationFailure
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool, PoolTimeout

# What is voted on


class Candidate(NamedTuple):
    """Somebody to vote for, as the page shows it; `picture` is the name of a file in static/."""

    name: str
    picture: str
    description: str


# The keys are what the database stores: the constraint votes_vote_is_a_cat and the view vote_totals list them, too.
CANDIDATES = {
    "Gummi": Candidate(
        "Fruit Gummi", "gummi.svg", "A black and white cat in a donut with pink icing, a gummi bear on top."
    ),
    "Pita": Candidate("Pita", "pita.svg", "A ginger cat in a donut with chocolate icing, whipped cream on top."),
}
TITLE = "Vote: it's your civic duty"
QUESTION = "Two cats dressed as donuts: which one do you like better?"
SUMMARY = "Two cats dressed as donuts, Pita and Fruit Gummi, want your vote."  # for search engines and chats

SITE_URL = os.environ.get("SITE_URL", "").strip().rstrip("/")  # for links in chats, which have to be absolute
FOLDER = Path(__file__).resolve().parent
DEVELOPMENT = os.environ.get("DEVELOPMENT", "").lower() in ("1", "true", "yes", "on")

# Requests and their answers

routes = Bottle()
log = logging.getLogger("catvote")


@routes.get("/")
def index():
    """The page. `?voted=CAT` adds thanks, and a tally that is read now: it has that vote, or says that it is outdated."""
    make_thanks_page = thanks_page_makers.get(request.query.voted)
    if make_thanks_page:
        return answer_with(tally.reading_since(monotonic()).content(make_thanks_page))
    return answer_with(tally.latest_reading().content(make_index))


@routes.post("/add")
def add():
    """Store a vote. The answer 303 (RFC 9110, section 15.4.4) is a promise: the vote is committed."""
    if is_cross_origin(request.environ):
        raise HTTPError(403, "Votes from pages of other sites are not counted.")
    vote = read_vote()
    if vote not in CANDIDATES:
        raise HTTPError(400, "There is no such candidate, so no vote was counted.")
    trouble = vote_store.store(vote)
    if trouble is Trouble.REFUSED:
        raise HTTPError(400, "The database knows no such candidate, so no vote was counted.")
    if trouble:
        raise Unavailable(trouble)
    return HTTPResponse(status=303, headers={"Location": f"/?voted={quote(vote)}", "Cache-Control": "no-store"})


@routes.get("/tally.json")
def tally_json():
    """The tally for scripts; an outdated one says so by its Age in seconds (RFC 9111, section 5.1)."""
    reading = tally.latest_reading()
    if not reading.outdated:
        return answer_with(reading.content(make_tally_json))
    # Not to be kept: after a later 304 a browser would still show the Age of the answer that it kept.
    age = str(int(monotonic() - reading.sent_at))
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store", "Age": age}
    return HTTPResponse(reading.content(make_tally_json).body, headers=headers)


@routes.get("/history")
def history_page():
    """Votes in each of the last 48 hours and 30 days, in UTC. While the database is away, the hours stand still."""
    return answer_with(history.latest_reading().content(make_history))


@routes.get("/healthz")
def healthz():
    """For a platform that asks: 200 if tally and history can be read from the database now, else 503; within 4 seconds.

    It is a 503, too, if another visitor is reading, and that takes longer than `reading_since` waits.
    """
    asked_at = monotonic()
    for reader in tally, history:
        if reader.reading_since(asked_at).sent_at < asked_at:
            raise Unavailable(reader.trouble)
    return HTTPResponse("ok\n", headers={"Content-Type": "text/plain", "Cache-Control": "no-store"})


@routes.get("/static/<:path>")
def static():
    """A file; a browser keeps it for a year if the address names the present version, else it has to ask again."""
    # Files are known by their whole path, percent-encoded as `app` hands it to Bottle.
    content = files.get(f"{request.path}?{request.query_string}") or files.get(request.path)
    if not content:
        raise HTTPError(404)
    return answer_with(content)


def answer_with(content: Content) -> HTTPResponse:
    """Return Bottle's answer with this content, or a 304 if the visitor has it already."""
    status, headers, body = content.answer(request.environ)
    return HTTPResponse(body, status, headers)


def is_cross_origin(environ: dict) -> bool:
    """Return whether a page of another origin sent a request: by Sec-Fetch-Site, else by comparing Origin with Host.

    The rule is that of https://pkg.go.dev/net/http#CrossOriginProtection, but capitals and default ports do not matter.
    """
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site:
        return site not in ("same-origin", "none")
    origin, host = environ.get("HTTP_ORIGIN"), environ.get("HTTP_HOST")
    if not origin:  # not a browser, or an old one
        return False
    scheme, _, address = origin.lower().partition("://")
    default_port = {"http": ":80", "https": ":443"}.get(scheme, "")
    if host and address.removesuffix(default_port) == host.lower().removesuffix(default_port):
        return False
    log.warning(
        "refused a vote: Origin %r, Host %r; if both are this site, a proxy does not hand on the Host", origin, host
    )
    return True


def read_vote() -> str:
    """Return the field `vote` of the form sent. Raises 413 if the form is too long, 400 if it is not one vote."""
    limit = 4096  # bytes; a vote needs ten, or two hundred as multipart
    body = read_body(limit + 1)
    if len(body) > limit:
        raise HTTPError(413, "That is far too much for a vote, so none was counted.")
    try:
        form, _ = parse_form_data(request.environ | {"wsgi.input": BytesIO(body)}, strict=True)
        (vote,) = form.getall("vote")
    except (ValueError, LookupError) as error:  # no form, no such character set, no vote, or two
        raise HTTPError(400, "The form did not arrive as one vote, so none was counted.") from error
    return vote


def read_body(limit: int) -> bytes:
    """Return the body sent, or its first `limit` bytes if it is longer. Raises 400 if it cannot be read."""
    chunked = "HTTP_TRANSFER_ENCODING" in request.environ  # then its length is not known beforehand
    try:
        length = limit if chunked else max(request.content_length, 0)
        return request.environ["wsgi.input"].read(min(length, limit))
    except Exception as error:  # each server raises an exception of its own; they have no base class in common
        raise HTTPError(400, "The form did not arrive whole, so no vote was counted.") from error


class Unavailable(HTTPError):
    """The answer 503: the database could not be asked, or did not do it.

    trouble -- says which. None comes from a Reader: another visitor is still reading, and the last attempt has not failed
    """

    def __init__(self, trouble: Trouble | None):
        super().__init__(503, Retry_After="5")
        self.trouble = trouble or Trouble.NOT_IN_TIME


def error_page(error: HTTPError) -> str:
    """Return the answer to an error, whoever raised it."""
    if DEVELOPMENT and error.status_code == 500:
        return Bottle.default_error_handler(routes, error)  # the traceback
    response.set_header("Cache-Control", "no-store")
    if error.status_code == 405:
        # Bottle answers HEAD wherever it answers GET, but does not list it.
        response.set_header("Allow", response.get_header("Allow").replace("GET", "GET, HEAD"))
    if request.path == "/tally.json":
        response.content_type = "application/json"
        return json.dumps({"error": error.status_line})
    trouble = getattr(error, "trouble", None)
    return render(
        "error", status=error.status_code, message=error.body, trouble=trouble, voting=request.method == "POST"
    )


routes.default_error_handler = error_page

# Pages, and other contents that are the same for many visitors

ASK_AGAIN = "no-cache"  # a browser may keep it, but has to ask whether it is still the same
KEEP_FOR_A_YEAR = "max-age=31536000, immutable"


class Content:
    """The body of an answer, and its headers. A browser that has it already, as the entity tag shows, gets a 304."""

    def __init__(self, body: bytes, content_type: str, cache_control: str = ASK_AGAIN):
        self.body = body
        self.tag = f'"{sha256(body).hexdigest()[:16]}"'
        self.cache_headers = [("ETag", self.tag), ("Cache-Control", cache_control)]
        self.headers = [("Content-Type", content_type), ("Content-Length", str(len(body))), *self.cache_headers]

    def answer(self, environ: dict) -> tuple[str, list, bytes]:
        """Return status, headers and body: a 304 if the visitor has it already (RFC 9110, section 13.1.2)."""
        known_tags = environ.get("HTTP_IF_NONE_MATCH", "")
        if self.tag in known_tags or known_tags == "*":
            return "304 Not Modified", self.cache_headers, b""
        return "200 OK", self.headers, self.body


def make_index(reading: Reading, voted: str | None = None) -> Content:
    """Return the page with the cats; with thanks if one was voted for."""
    counts = dict(reading.rows)
    votes = {cat: counts.get(cat, 0) for cat in CANDIDATES}
    return html(render("index", votes=votes, thanked=CANDIDATES.get(voted), outdated=reading.outdated))


# Made once, since a Reading keeps its contents by these functions.
thanks_page_makers = {cat: partial(make_index, voted=cat) for cat in CANDIDATES}


def make_tally_json(reading: Reading) -> Content:
    """Return the tally for scripts."""
    return Content(json.dumps(dict(reading.rows)).encode(), "application/json")


def make_history(reading: Reading) -> Content:
    """Return the page with the votes of the last 48 hours and 30 days."""
    charts = {
        "hour": votes_in_periods(reading.rows, seconds=3600, number=48),
        "day": votes_in_periods(reading.rows, seconds=86400, number=30),
    }
    return html(render("history", charts=charts, outdated=reading.outdated))


def votes_in_periods(rows: list[tuple], seconds: int, number: int) -> list[tuple[datetime, Counter]]:
    """Return the last `number` periods of so many seconds, each as its beginning in UTC and its votes for each cat."""
    present = int(time()) // seconds
    periods = {period: Counter() for period in range(present - number + 1, present + 1)}
    for hour, vote, votes in rows:  # in seconds since 1970
        period = hour // seconds
        if period in periods:
            periods[period][vote] += votes
    return [(datetime.fromtimestamp(period * seconds, timezone.utc), votes) for period, votes in periods.items()]


def html(text: str) -> Content:
    """Return a page as Content."""
    return Content(text.encode(), "text/html; charset=utf-8")


def render(name: str, **values) -> str:
    """Fill the template views/NAME.tpl with these values and those that many templates need."""
    return template(name, values, SHARED_VALUES, template_lookup=TEMPLATE_FOLDERS)


# One list for all calls: Bottle keeps compiled templates by the identity of the list that it found them by.
TEMPLATE_FOLDERS = [str(FOLDER / "views")]

# Votes. The commit is the expensive part, since the server waits for its disk. Votes that come meanwhile share the next
# commit.

INSERT = "INSERT INTO public.votes (vote) SELECT unnest(%s::text[])"


class Batch:
    """Votes that are stored together.

    troubles -- what became of the votes for each cat: None if they are committed, else the Trouble
    decided -- set once the troubles are known, or never will be
    """

    def __init__(self):
        self.votes: list[str] = []
        self.troubles: dict[str, Trouble | None] = {}
        self.decided = Event()


class VoteStore:
    """Stores votes, one batch at a time.

    The voter who begins a batch leads it: waits for the turn, while others join, and then stores the votes of all.
    """

    def __init__(self):
        self.turn = Lock()  # held by the leader whose batch is being stored
        self.joining = Lock()  # held for a moment, to join the next batch or to close it
        self.next_batch = Batch()
        # Whether the last batch that had its turn failed, but not because it was REFUSED. Then something is wrong with
        # the database, and the next leader waits for the turn only briefly.
        self.last_failed = False

    def store(self, vote: str) -> Trouble | None:
        """Store a vote; return None once it is committed, else the Trouble.

        Takes 5.5 seconds at most: 1.5 for the turn, 2 for the database, and twice 1 for a cancel.
        """
        with self.joining:
            batch = self.next_batch
            leads = not batch.votes
            batch.votes.append(vote)
        if leads:
            self.store_batch(batch)
        batch.decided.wait()
        return batch.troubles.get(vote, Trouble.UNCERTAIN)  # no trouble is known if a mistake of ours ended the leader

    def store_batch(self, batch: Batch) -> None:
        """Store a batch when its turn comes. If the turn does not come in time, the batch is never sent."""
        has_turn = self.turn.acquire(timeout=0.2 if self.last_failed else 1.5)
        try:
            with self.joining:
                self.next_batch = Batch()
            if has_turn:
                batch.troubles = insert(batch.votes)
                self.last_failed = any(trouble not in (None, Trouble.REFUSED) for trouble in batch.troubles.values())
            else:
                batch.troubles = dict.fromkeys(batch.votes, Trouble.NOT_IN_TIME)
        finally:  # nobody waits for ever, even after a mistake of ours
            batch.decided.set()
            if has_turn:
                self.turn.release()


def insert(votes: list[str]) -> dict[str, Trouble | None]:
    """Store votes; return what became of those for each cat: None if they are committed, else the Trouble."""
    deadline = monotonic() + 2
    trouble = insert_together(votes, deadline)
    numbers = Counter(votes)
    if trouble is Trouble.REFUSED and len(numbers) > 1:  # one cat that the schema lacks has spoiled the statement
        return {cat: insert_together([cat] * number, deadline) for cat, number in numbers.items()}
    return dict.fromkeys(votes, trouble)


def insert_together(votes: list[str], deadline: float) -> Trouble | None:
    """Store votes by one statement, all or none; return None if they are committed, else the Trouble."""
    try:
        with connection_until(deadline, cancel_patience=1) as connection:
            connection.execute(INSERT, [votes])
    except Unavailable as error:
        return error.trouble
    return None


# Tally and history. A visitor who needs a newer reading makes it, for all who need one at that moment.

# Names with their schema, hours as seconds: no setting of the database, a role or the environment changes the rows. Votes
# may be dated in the future.
TALLY = "SELECT vote, votes FROM public.vote_totals"
HISTORY = """
    SELECT extract(epoch FROM hour), vote, votes
    FROM public.votes_by_hour
    WHERE hour > now() - interval '720 hours' AND hour <= now()
"""


@dataclass
class Reading:
    """The rows that a statement returned, and the contents made of them.

    sent_at -- time.monotonic() when the statement was sent: the rows have every vote that was committed before
    outdated -- whether it was too old when it was handed out; the page says so
    """

    rows: list[tuple]
    sent_at: float
    outdated: bool = False
    contents: dict[Callable, Content] = field(default_factory=dict)
    making: Lock = field(default_factory=Lock)

    def content(self, make: Callable[[Reading], Content]) -> Content:
        """Return make(self): made by the first visitor who asks for it, kept for the others."""
        with self.making:
            if make not in self.contents:
                self.contents[make] = make(self)
            return self.contents[make]

    @cached_property
    def as_outdated(self) -> Reading:
        """The same rows again, for contents that say that they are outdated. It is kept, and so are those."""
        return Reading(self.rows, self.sent_at, outdated=True)


class Reader:
    """Keeps the last Reading of one statement, and makes a newer one when a visitor needs it.

    One visitor at a time reads. The others wait for that, and share the result.

    fresh -- age in seconds up to which a Reading is good enough for most visitors
    trouble -- why the last attempt failed, if it did
    """

    def __init__(self, statement: str, fresh: float):
        self.statement = statement
        self.fresh = fresh
        self.turn = Lock()  # held by the visitor who reads
        self.last: Reading | None = None
        self.trouble: Trouble | None = None
        self.failed_at = -inf  # when the last attempt failed, if it did

    def latest_reading(self) -> Reading:
        """Return a Reading that is fresh, or the last one, as outdated. Raises Unavailable if there is none."""
        return self.reading_since(monotonic() - self.fresh)

    def reading_since(self, moment: float) -> Reading:
        """Return a Reading sent at that moment or later, and fresh; or the last one, as outdated.

        Raises Unavailable if there is none.

        The visitor who reads is held for 1.7 seconds at most: 1.4, the wait for the turn included, and twice 0.15 for a
        cancel (see `read`). Others wait for the turn for 0.8 seconds at most, or not at all within 5 seconds of a failure.
        """
        deadline = monotonic() + 1.4
        if not self.last_if_since(moment) and self.turn.acquire(timeout=0 if self.failed_within(5) else 0.8):
            try:
                if not self.last_if_since(moment):  # who had the turn before may have made it
                    self.read(deadline)
            finally:
                self.turn.release()
        if self.last is None:
            raise Unavailable(self.trouble)
        reading = self.last_if_since(moment)
        # A statement that took longer than `fresh` was sent in time, but what it read is outdated, too.
        if reading and monotonic() - reading.sent_at <= self.fresh:
            return reading
        return self.last.as_outdated

    def last_if_since(self, moment: float) -> Reading | None:
        """Return the last Reading if it was sent at that moment or later."""
        reading = self.last
        return reading if reading and reading.sent_at >= moment else None

    def failed_within(self, seconds: float) -> bool:
        """Return whether the last attempt failed, and no longer ago than that."""
        return monotonic() - self.failed_at < seconds

    def read(self, deadline: float) -> None:
        """Run the statement, and keep what comes of it: the Reading or the Trouble."""
        if self.failed_within(0.2):  # at most five attempts of a Reader, and lines in the log, a second
            sleep(0.2)
        try:
            with connection_until(deadline, cancel_patience=0.15) as connection:
                sent_at = monotonic()
                rows = connection.execute(self.statement).fetchall()
        except Unavailable as error:
            self.trouble, self.failed_at = error.trouble, monotonic()
        else:
            self.last, self.trouble, self.failed_at = Reading(rows, sent_at), None, -inf


# The database


@contextmanager
def connection_until(deadline: float, cancel_patience: float) -> Iterator[Connection]:
    """Lend a connection of the pool for one statement, which is a transaction of its own.

    deadline -- time.monotonic() until which to wait for the connection, and then for the statement
    cancel_patience -- seconds to ask the server to cancel a statement that is late, and as many to wait for its answer

    Raises Unavailable, also in place of the statement's errors.
    """
    try:
        connection = living_connection(deadline)
    except (psycopg.Error, RuntimeError, ValueError) as error:  # no connection in time, no thread, a malformed URL
        log_error(error)
        raise Unavailable(Trouble.NOT_IN_TIME) from error
    try:
        connection.deadline, connection.cancel_patience = deadline, cancel_patience
        yield connection
        connection.last_used_at = monotonic()
    except psycopg.Error as error:
        log_error(error)
        trouble = trouble_of(error)
        if trouble is not Trouble.REFUSED:
            # The others may be no better: after a failover, or a change of settings, only new connections are.
            pool().drain()
        raise Unavailable(trouble) from error
    finally:
        pool().putconn(connection)


class Trouble(Enum):
    """What became of a statement that failed. The values explain the names; views/error.tpl has words for visitors."""

    NOT_IN_TIME = "It was not sent, or was late and is cancelled: it is certainly not done."
    UNCERTAIN = "It may have been sent, and no clear answer came: it may have been done."
    REFUSED = "It breaks a check constraint of the schema: it is certainly not done."
    NOT_READY = "The database answers, but cannot do it: it is certainly not done."


def trouble_of(error: psycopg.Error) -> Trouble:
    """Return what the error of a statement that was sent means for that statement."""
    if not is_undone(error):
        return Trouble.UNCERTAIN
    if isinstance(error, CheckViolation):
        return Trouble.REFUSED
    if isinstance(error, QueryCanceled):  # by us (see Connection.wait), by a statement_timeout, or by the operator
        return Trouble.NOT_IN_TIME
    return Trouble.NOT_READY


def is_undone(error: psycopg.Error) -> bool:
    """Return whether it is certain that the statement has changed nothing.

    After an ERROR it is. After the FATAL of a connection that ends, or no answer, nobody knows; nor after an ERROR that
    says so: a connection behind the server was lost (class 08), completion unknown (40003), internal error (class XX).
    https://www.postgresql.org/docs/current/errcodes-appendix.html
    """
    outcome_is_unknown = (error.sqlstate or "").startswith(("08", "40003", "XX"))
    return error.diag.severity_nonlocalized == "ERROR" and not outcome_is_unknown


def log_error(error: Exception) -> None:
    """Tell the operator of an error: the database's own words in one line, and advice if we have any."""
    advice = ""
    if isinstance(error, PoolTimeout):
        advice = " (the database is away, or connecting to it takes too long)"
    if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedColumn):
        advice = " (schema.sql is not applied, or an older one: make initdb)"
    if isinstance(error, psycopg.errors.UniqueViolation):
        advice = " (row_id lags behind rows that brought their own: make initdb)"
    log.warning("database: %s%s", " ".join(str(error).split()) or type(error).__name__, advice)


class Connection(psycopg.Connection):
    """A connection that waits for the outcome of a statement until a deadline, and then has it cancelled."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.deadline = inf  # connection_until sets this and the next each time it lends the connection
        self.cancel_patience = 0
        self.last_used_at = monotonic()

    def execute(self, *arguments, **options) -> psycopg.Cursor:
        """Run a statement; again if the server undid it because of another one at the same time.

        A SerializationFailure comes if the database's default isolation is a strict one, and two connections count in the
        same row of the tally; a deadlock, if somebody's transaction in psql locks the tally before `votes`.
        """
        while True:
            try:
                return super().execute(*arguments, **options)
            except (SerializationFailure, DeadlockDetected):
                if monotonic() > self.deadline:
                    raise
                sleep(0.01)

    def wait(self, gen, interval=0.1, timeout=None):
        """Wait for the server's answer, which `gen`, a generator of psycopg's, reads until it is complete.

        Past the deadline, ask the server to cancel the statement, and wait a little longer for what it says to that.

        psycopg calls this for each statement, and passes no `timeout` (checked: 3.3.9; guarded by test_http.py and
        test_faults.py). The request to cancel ends in time since libpq 17, which psycopg[binary] brings.
        """
        try:
            return super().wait(gen, interval, timeout=self.deadline - monotonic())
        except psycopg.OperationalError:
            if self.info.transaction_status is not TransactionStatus.ACTIVE:
                raise  # nothing is under way: the connection is lost, or the server has answered by an error
            # The statement is late. The time-out has left `gen` whole: a second wait reads on where the first stopped.
            # Both calls raise a time-out if the server stays silent; the second raises QueryCanceled if the server
            # confirms that nothing was done.
            self.cancel_safe(timeout=self.cancel_patience)
            super().wait(gen, timeout=self.cancel_patience)
            # It reports success instead. That is not certain: with synchronous replication, a commit whose wait was
            # cancelled may be on this server only. So the first time-out stands, which means Trouble.UNCERTAIN.
            raise

    def may_be_dead(self) -> bool:
        """Return whether the server may have gone, as far as one can know without asking it."""
        arrivals = poll()
        arrivals.register(self.fileno(), POLLIN)
        # On an idle connection, what comes from the server is hardly ever anything but good-bye.
        server_has_hung_up = bool(arrivals.poll(0))
        # Networks forget silent connections without a word, some after a minute.
        return server_has_hung_up or monotonic() - self.last_used_at > UNUSED_TOO_LONG


UNUSED_TOO_LONG = 10  # seconds


def living_connection(deadline: float) -> Connection:
    """Take a connection from the pool. Where one may be dead the others may be, too, so then all are replaced.

    Raises psycopg_pool.PoolTimeout if there is none by the deadline, and what `pool` raises.
    """
    while True:
        connection = pool().getconn(timeout=deadline - monotonic())
        if not connection.may_be_dead():
            return connection
        pool().drain()
        pool().putconn(connection)  # which closes it, as each connection that is older than the last drain


pool_of_this_process: ConnectionPool | None = None
opening = Lock()


def pool() -> ConnectionPool:
    """Return the pool of this process, opened at its first use: one opened before a fork is of no use after it.

    Raises RuntimeError if a thread that it needs cannot be started, and ValueError as `database_url` does. Then the next
    call tries again.
    """
    global pool_of_this_process
    with opening:
        if pool_of_this_process is None:
            pool_of_this_process = open_pool()
        return pool_of_this_process


def open_pool() -> ConnectionPool:
    """Return a new pool. Three connections are enough: votes, tally and history use one each at a time."""
    new_pool = ConnectionPool(
        connection_settings(database_url()),
        name="catvote",
        connection_class=Connection,
        # A statement is a transaction: one message there and one back. Statements are not prepared, since behind a pooler
        # each may reach another server process.
        kwargs={"autocommit": True, "prepare_threshold": None},
        min_size=0,
        max_size=3,
        max_lifetime=300,  # so that no session stays for long on a server that has become a standby
        # While the database is away, the pool tries again at growing intervals, for this time; after that, whenever
        # somebody asks. With its own five minutes it would be long before it finds a database that is back.
        reconnect_timeout=2,
        open=False,
    )
    new_pool.open()
    atexit.register(new_pool.close)  # else a process that ends waits 5 s for each of the pool's threads
    return new_pool


def connection_settings(url: str) -> str:
    """Return libpq's settings for a database: those of its URL, ours where it has none, and always our encoding."""
    defaults = {
        "application_name": "catvote",
        "connect_timeout": "5",  # seconds
        "keepalives_idle": "20",  # seconds; for `initdb`, which may be silent for long
        # Unless a certificate is named, libpq looks for one in HOME. Where it may not look, it connects without TLS, and
        # says nothing. A named file that does not exist is simply no certificate.
        "sslcert": os.environ.get("PGSSLCERT", "/nonexistent"),
    }
    encoding = {"client_encoding": "UTF8"}  # whatever the database, a role or the environment say
    return make_conninfo(**(defaults | conninfo_to_dict(url) | encoding))


def database_url() -> str:
    """Return DATABASE_URL, which says where the database is, as a URL or as keywords and values.

    https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING

    Raises ValueError if it is missing or malformed, or has an @ in the name of a host or database, which libpq would
    accept. The error's text shows nothing of it.
    """
    url = os.environ.get("DATABASE_URL", "").strip()
    if not url:
        raise ValueError("DATABASE_URL is not set; see .env.example")
    with suppress(psycopg.ProgrammingError, UnicodeError):  # their texts quote the URL, password and all
        parts = conninfo_to_dict(url)
        # An @ or / in a password has to be percent-encoded. Otherwise libpq takes a part of the password for the host,
        # the port or the database. Its errors name those, and we log its errors.
        names, port = parts.get("host", "") + parts.get("dbname", ""), str(parts.get("port", ""))
        if "@" not in names and re.fullmatch("[0-9,]*", port):
            return url
    raise ValueError(
        "DATABASE_URL is not a valid PostgreSQL connection URL (is a special character in the password"
        " percent-encoded?); see .env.example"
    )


def initdb(url: str | None = None) -> None:
    """Apply schema.sql to a database, that of DATABASE_URL by default. It is safe to repeat, even while people vote.

    Raises psycopg.Error, and ValueError if DATABASE_URL is missing or malformed.
    """
    with psycopg.connect(connection_settings(url or database_url()), autocommit=True) as connection:
        connection.execute((FOLDER / "schema.sql").read_text("utf-8"))


# Static files, and what the service is made of


def visible_files(folder: Path) -> list[Path]:
    """Return all files in a folder and those below it, but none that is hidden or in a hidden folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


# By their paths as Bottle gets them from `app`, percent-encoded.
file_bodies = {
    f"/{quote(file.relative_to(FOLDER).as_posix())}": file.read_bytes() for file in visible_files(FOLDER / "static")
}
VERSION = sha256(b"".join(file_bodies.values())).hexdigest()[:8]


def static_url(name: str) -> str:
    """Return the address of a file in static/; it changes with the files, so that a browser may keep them."""
    return f"/static/{quote(name)}?v={VERSION}"


def file_content(path: str, cache_control: str) -> Content:
    """Return a static file as Content, of the type that Python knows for its name, whatever this machine knows."""
    content_type, _ = MimeTypes().guess_type(path)
    return Content(file_bodies[path], content_type or "application/octet-stream", cache_control)


files = {path: file_content(path, ASK_AGAIN) for path in file_bodies}
files |= {f"{path}?v={VERSION}": file_content(path, KEEP_FOR_A_YEAR) for path in file_bodies}

SHARED_VALUES = {
    "candidates": CANDIDATES,
    "title": TITLE,
    "question": QUESTION,
    "summary": SUMMARY,
    "site_url": SITE_URL,
    "static_url": static_url,
}

vote_store = VoteStore()
tally = Reader(TALLY, fresh=0.8)  # a tally on a page is a second old at most: this leaves time to make and send it
history = Reader(HISTORY, fresh=20)
shared_pages = {"/": (tally, make_index), "/tally.json": (tally, make_tally_json), "/history": (history, make_history)}

bottle.debug(DEVELOPMENT)

# WSGI

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = [
    ("Content-Security-Policy", CONTENT_SECURITY_POLICY),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=()"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Referrer-Policy", "same-origin"),  # with no-referrer Chromium gives `null` as the origin of our own form
]


def app(environ, start_response):
    """The WSGI application (PEP 3333): answers from memory if it can, else by Bottle; with security headers."""
    path = environ.get("PATH_INFO") or "/"

    def start_securely(status, headers, *error):
        return start_response(status, headers + security_headers(environ, path), *error)

    content = content_in_memory(environ, path)
    if content:
        status, headers, body = content.answer(environ)
        start_securely(status, headers)
        return [body]
    # The web server has decoded the path. It is encoded again, since Bottle drops bytes that are not UTF-8 (/%FF was /).
    environ["PATH_INFO"] = quote(path, encoding="latin-1")
    return routes(environ, start_securely)


def content_in_memory(environ: dict, path: str) -> Content | None:
    """Return the content asked for if it is there, and fresh. Bottle's way costs a quarter more CPU, all in all."""
    if environ["REQUEST_METHOD"] != "GET":
        return None
    query = environ.get("QUERY_STRING")
    if query:
        return files.get(f"{path}?{query}")
    if path not in shared_pages:
        return None
    reader, make = shared_pages[path]
    reading = reader.last_if_since(monotonic() - reader.fresh)
    return reading and reading.contents.get(make)


def security_headers(environ: dict, path: str) -> list[tuple[str, str]]:
    """Return headers that tell a browser what not to do with an answer."""
    # Pages of other sites may show the preview of a link to us, and nothing else.
    resource_policy = "cross-origin" if path == "/static/card.png" else "same-origin"
    headers = [*SECURITY_HEADERS, ("Cross-Origin-Resource-Policy", resource_policy)]
    if environ["wsgi.url_scheme"] == "https":
        headers.append(("Strict-Transport-Security", "max-age=31536000"))
    return headers
