"""catvote: a web service that lets visitors vote for one of two cats dressed as donuts.

A server such as gunicorn calls `app`, at the end of this file, for each request. A finished answer is returned as it
is; without one, Bottle finds the request's handler, which asks the database and fills a template.
"""

import atexit
import json
import logging
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timezone
from enum import Enum
from functools import partial
from hashlib import sha256
from io import BytesIO
from math import inf
from pathlib import Path
from select import POLLIN, poll
from threading import Condition, Lock
from time import monotonic, sleep, time
from typing import NamedTuple
from urllib.parse import quote

import bottle
import psycopg
from bottle import Bottle, HTTPError, HTTPResponse, request, response, static_file, template
from multipart import parse_form_data
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool

# Configuration: what is voted on, what comes from the environment, and the numbers we chose.


class Candidate(NamedTuple):
    """Somebody to vote for, as the page shows it; `picture` is the name of a file in static/."""

    name: str
    picture: str
    description: str


# The keys are what the database stores. In schema.sql, the constraint votes_vote_is_a_cat and the view vote_totals have
# the same list.
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
DEVELOPMENT = bool(os.environ.get("DEVELOPMENT"))

# All times are in seconds. A vote takes about 5 at most: 1 to get a connection, 2 for the statement, 1 to ask the
# server to cancel it, and 1 for the server's answer to that.
CONNECTION_PATIENCE = 1  # for one of the pool's connections
VOTE_PATIENCE = 2  # for the statement that stores votes
TALLY_PATIENCE = 1  # for the statement that reads the tally
HISTORY_PATIENCE = 2
CANCEL_PATIENCE = 1  # to ask the server to cancel a statement, and as long again for its answer

# A page has a tally from the last second, or says that it is outdated. Fresh for 0.8 leaves time to make and send it.
TALLY_REFRESHED_AFTER, TALLY_FRESH = 0.5, 0.8
HISTORY_REFRESHED_AFTER, HISTORY_FRESH = 20, 50
PAGE_WAIT = 0.5  # how long after a reading began visitors wait for it before they get the older one
VOTER_WAIT = 1.5  # how long a visitor who has just voted waits for a reading that has the vote
FIRST_WAIT = 5  # how long a visitor waits while there is no reading at all: about as long as one may take
RETRY_PAUSE = 0.2  # after a reading that failed; without it, an immediate error would be logged at each visit
RETRY_AFTER = 5  # for visitors whom we ask to come again

# Connections to the database cost more than threads. Two workers have at most 8 of them: small hosted plans allow 20.
CONNECTIONS_FOR_VOTES = 2  # the second takes over while the first is held up
CONNECTIONS_FOR_PAGES = 2  # one for each Reader
UNUSED_TOO_LONG = 10  # for a connection: networks forget silent ones without a word, some after a minute
KEEPALIVE_PAUSE = 20

VOTES_A_STATEMENT = 8  # at most; as many threads wait for a statement that hangs
TURN_PATIENCE = 0.1  # how long a statement waits for the one before; then both run
FORM_LIMIT = 4096  # bytes; a vote needs ten, or two hundred as multipart

FOLDER = Path(__file__).resolve().parent
TEMPLATE_FOLDERS = [str(FOLDER / "views")]
STATIC = FOLDER / "static"
STATIC_FILES = [file for file in sorted(STATIC.rglob("*")) if file.is_file()]
VERSION_QUERY = "v=" + sha256(b"".join(file.read_bytes() for file in STATIC_FILES)).hexdigest()[:8]

log = logging.getLogger("catvote")


INVALID_URL = (
    "DATABASE_URL is not a valid PostgreSQL connection URL (is a special character in the password percent-encoded?);"
    " see .env.example"
)


def database_url() -> str:
    """Return DATABASE_URL, which says where the database is, in any form that libpq understands.

    https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING

    Raises ValueError if it is missing or malformed; the error's text shows nothing of it.
    """
    url = os.environ.get("DATABASE_URL", "").strip()
    if not url:
        raise ValueError("DATABASE_URL is not set; see .env.example")
    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError:  # its text quotes the URL, password and all
        raise ValueError(INVALID_URL) from None
    # An @ or / in a password has to be percent-encoded. Otherwise libpq takes a part of the password for the host, the
    # port or the database, and its errors, which we log, tell that.
    if "@" in parts.get("host", "") + parts.get("dbname", ""):
        raise ValueError(INVALID_URL)
    if not re.fullmatch("[0-9,]*", str(parts.get("port", ""))):
        raise ValueError(INVALID_URL)
    return url


# Database


def initdb(url: str | None = None) -> None:
    """Apply schema.sql to a database, that of DATABASE_URL by default. It is safe to repeat, even while people vote.

    Raises ValueError as `database_url`, and psycopg.Error.
    """
    with psycopg.connect(url or database_url(), autocommit=True, client_encoding="UTF8") as connection:
        connection.execute((FOLDER / "schema.sql").read_text("utf-8"))


class Trouble(Enum):
    """What became of a statement that failed."""

    AWAY = "It was never sent, or the database confirmed that it was cancelled: it is certainly not done."
    UNCERTAIN = "It was sent, and no clear answer came: it may have been done."
    REFUSED = "It breaks a check constraint of the schema: it is certainly not done."
    NOT_READY = "The database answers, but cannot do it: it is certainly not done."


class Unavailable(HTTPError):
    """The answer 503 to one visitor, because of a Trouble with the database."""

    def __init__(self, trouble: Trouble):
        super().__init__(503, Retry_After=str(RETRY_AFTER))
        self.trouble = trouble


class Connection(psycopg.Connection):
    """A connection whose statements are cancelled at the moment `give_up_at`, even if the server has frozen."""

    give_up_at = inf  # time.monotonic()

    def wait(self, gen, interval=0.1, timeout=None):
        """Wait for the server's answer; `gen` is a generator that works on it until it is complete.

        psycopg calls this method for each statement (checked: 3.3.9; guarded by tests/test_faults.py).
        """
        if self.give_up_at < inf:
            timeout = max(self.give_up_at - monotonic(), 0)
        try:
            return super().wait(gen, interval, timeout)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:  # no answer came: it is our time-out
                self.cancel_and_close(gen)
            raise

    def cancel_and_close(self, gen):
        """Ask the server to cancel the statement, and wait on for its answer a little.

        If it says that it cancelled, nothing was done: that raises QueryCanceled. If it says nothing, it may do it
        later. If it says that the statement was done, our time-out stands, too: with synchronous replication, a commit
        that is cancelled may be on this server only. (Before libpq 17, which psycopg[binary] brings, the request to
        cancel had no time-out.)
        """
        with closing(self):
            self.cancel_safe(timeout=CANCEL_PATIENCE)
            super().wait(gen, timeout=CANCEL_PATIENCE)


class Pool(ConnectionPool):
    """A pool that opens at its first use, so in the process that uses it, and gives out no connection that may be dead.

    name -- what the log calls it
    size -- how many connections there are at most
    """

    def __init__(self, name: str, size: int):
        super().__init__(
            database_url,
            name=name,
            connection_class=Connection,
            kwargs={
                "autocommit": True,  # a statement is a transaction: one message there and one back
                "prepare_threshold": None,  # behind a pooler each statement may reach another server process
                "client_encoding": "UTF8",  # whatever the database, a role or the environment say
                "connect_timeout": 2,
                "keepalives_idle": KEEPALIVE_PAUSE,
                "keepalives_interval": KEEPALIVE_PAUSE,
                "application_name": "catvote",
            },
            configure=note_use,
            check=self.refuse_if_dead,
            min_size=0,
            max_size=size,
            max_idle=UNUSED_TOO_LONG,
            reconnect_timeout=2,
            open=False,
        )
        atexit.register(self.close)

    def getconn(self, timeout=None):
        """Return a connection; the pool calls `refuse_if_dead` with it first, and takes another one if that raises."""
        self.open()
        return super().getconn(timeout)

    def refuse_if_dead(self, connection):
        """Raise psycopg.OperationalError if a connection may be dead, as far as one can know without asking the server.

        Then the others may be dead as well, and are all replaced.
        """
        unused_for = monotonic() - connection.used_at
        if unused_for > UNUSED_TOO_LONG or server_has_hung_up(connection):
            connection.close()
            self.drain()
            raise psycopg.OperationalError("the connection may be dead")
        note_use(connection)


def note_use(connection: Connection) -> None:
    """Note that the pool has made a connection, or given it out, right now."""
    connection.used_at = monotonic()


def server_has_hung_up(connection: Connection) -> bool:
    """Return whether the server has sent something: on an idle connection that is hardly ever anything but good-bye."""
    poller = poll()
    poller.register(connection.fileno(), POLLIN)
    return bool(poller.poll(0))


# Votes that hang must not keep pages from the database: hence two pools.
vote_pool = Pool("votes", CONNECTIONS_FOR_VOTES)
page_pool = Pool("pages", CONNECTIONS_FOR_PAGES)


def execute(pool: Pool, patience: float, statement: str, parameters: Sequence = ()) -> list[tuple]:
    """Run one statement, a transaction of its own, and return its rows.

    patience -- seconds for the statement; see CONNECTION_PATIENCE and CANCEL_PATIENCE for the rest

    Raises Unavailable.
    """
    connection = None
    try:
        with pool.connection(timeout=CONNECTION_PATIENCE) as connection:
            connection.give_up_at = monotonic() + patience
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []
    # ValueError: text in a row that cannot be decoded; RuntimeError: no thread to open the pool with
    except (psycopg.Error, ValueError, RuntimeError) as error:
        log.warning("database: %s%s", " ".join(str(error).split()) or type(error).__name__, advice(error))
        raise Unavailable(trouble_of(error, connected=connection is not None)) from error


def trouble_of(error: Exception, connected: bool) -> Trouble:
    """Return what an error means for a statement; `connected` if there was a connection to send it on."""
    if not connected:
        return Trouble.AWAY
    if not is_undone(error):
        return Trouble.UNCERTAIN
    if isinstance(error, psycopg.errors.CheckViolation):
        return Trouble.REFUSED
    if isinstance(error, psycopg.errors.QueryCanceled):  # at our wish: see Connection
        return Trouble.AWAY
    return Trouble.NOT_READY


def is_undone(error: Exception) -> bool:
    """Return whether it is certain that the statement has changed nothing.

    An ERROR undoes it. The FATAL of a connection that ends does not, nor does an ERROR that says the outcome is unknown:
    a connection behind the server was lost (class 08), completion unknown (40003), internal error (class XX).
    https://www.postgresql.org/docs/current/errcodes-appendix.html
    """
    if not isinstance(error, psycopg.Error):
        return False
    outcome_is_unknown = (error.sqlstate or "").startswith(("08", "40003", "XX"))
    return error.diag.severity_nonlocalized == "ERROR" and not outcome_is_unknown


def advice(error: Exception) -> str:
    """Return what to tell the operator beside the database's own words."""
    if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedColumn):
        return " (schema.sql is not applied, or an older one: make initdb)"
    if isinstance(error, psycopg.errors.UniqueViolation):
        return " (row_id lags behind rows that brought their own: make initdb)"
    return ""


# Tally and history: read now and then for everybody, not at each visit.


class Reading(NamedTuple):
    """The rows that a statement returned.

    number -- which of its Reader's readings it is
    begun_at -- time.monotonic() when the reading began; it has every vote that was committed before
    outdated -- it took too long, or a later one was waited for, and failed or was late
    """

    number: int
    begun_at: float
    rows: list[tuple]
    outdated: bool = False


class Reader:
    """Reads by one statement for all visitors, in a thread of its own, so that a slow database holds up few of them.

    Its readings have numbers: 1, 2, 3 ... At most one is under way; one more may be asked for, and begins after it.

    patience -- seconds for the statement
    refreshed_after -- age in seconds at which a new reading is asked for, while visitors get the one there is
    fresh -- age in seconds after which visitors wait for the new one
    """

    def __init__(self, statement: str, patience: float, refreshed_after: float, fresh: float):
        self.statement = statement
        self.patience = patience
        self.refreshed_after = refreshed_after
        self.fresh = fresh
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.last: Reading | None = None  # the last that succeeded
        self.trouble = Trouble.AWAY  # of the last that failed
        self.asked_for = self.begun = self.ended = 0  # number of the last one that was asked for, has begun, has ended
        self.begun_at = -inf  # when the last one that has begun did so
        self.changed = Condition()  # guards these four; wakes those who wait for a reading to end

    def if_fresh(self) -> Reading | None:
        """Return the last Reading if it is fresh. When it is no longer quite fresh, have a new one made meanwhile."""
        reading = self.last
        if reading is None:
            return None
        age = monotonic() - reading.begun_at
        if age > self.refreshed_after:
            with self.changed:
                self.ask_for(self.ended + 1)
        return reading if age <= self.fresh else None

    def latest(self) -> Reading:
        """Return a fresh Reading, or the last one, marked as outdated. Raises Unavailable if there is none."""
        reading = self.if_fresh()
        if reading:
            return reading
        with self.changed:
            next_to_end = self.ended + 1
            self.ask_for(next_to_end)
            # A visitor who comes late to a slow reading does not wait at all.
            is_under_way = self.begun == next_to_end
            began_at = self.begun_at if is_under_way else monotonic()
            return self.wait_for(next_to_end, began_at + PAGE_WAIT)

    def begun_from_now(self) -> Reading:
        """Return a Reading that begins after this call; else as `latest`."""
        with self.changed:
            next_to_begin = self.begun + 1
            self.ask_for(next_to_begin)
            return self.wait_for(next_to_begin, monotonic() + VOTER_WAIT)

    def ask_for(self, number: int) -> None:
        """Have the reading of this number made, unless it was asked for before."""
        if self.asked_for < number:
            self.executor.submit(self.read)
            self.asked_for = number

    def read(self) -> None:
        """Run the statement, and wake those who wait for what comes of it."""
        with self.changed:
            self.begun += 1
            self.begun_at = monotonic()
        number, begun_at = self.begun, self.begun_at
        try:
            rows = execute(page_pool, self.patience, self.statement)
            self.last = Reading(number, begun_at, rows)
        except Unavailable as error:
            self.trouble = error.trouble
            sleep(RETRY_PAUSE)
        except Exception:  # in a thread of its own nobody else would tell of it
            log.exception("A reading failed")
        finally:
            with self.changed:
                self.ended = number
                self.changed.notify_all()

    def wait_for(self, number: int, deadline: float) -> Reading:
        """Return the Reading of this number or a later one; or the last one, as outdated, if none has come in time.

        Raises Unavailable if there is none at all.
        """
        patience = deadline - monotonic() if self.last else FIRST_WAIT
        self.changed.wait_for(lambda: self.ended >= number, max(patience, 0))
        reading = self.last
        if reading is None:
            raise Unavailable(self.trouble)
        took_too_long = monotonic() - reading.begun_at > self.fresh
        return reading._replace(outdated=reading.number < number or took_too_long)


# No setting of the database, a role or the environment changes what these return.
TALLY = "SELECT vote, votes FROM public.vote_totals"
HISTORY = """
    SELECT extract(epoch FROM hour)::bigint, vote, votes
    FROM public.votes_by_hour
    WHERE hour > now() - interval '30 days' AND hour <= now()
"""
tally_reader = Reader(TALLY, TALLY_PATIENCE, TALLY_REFRESHED_AFTER, TALLY_FRESH)
history_reader = Reader(HISTORY, HISTORY_PATIENCE, HISTORY_REFRESHED_AFTER, HISTORY_FRESH)


def votes_in_periods(rows: list[tuple], seconds: int, number: int) -> list[tuple[datetime, Counter]]:
    """Return when each of the last `number` periods of so many seconds began, in UTC, and its votes for each cat."""
    present = int(time()) // seconds
    periods = {period: Counter() for period in range(present - number + 1, present + 1)}
    for began_at, vote, votes in rows:  # seconds since 1970
        period = began_at // seconds
        if period in periods:
            periods[period][vote] += votes
    return [(datetime.fromtimestamp(period * seconds, timezone.utc), votes) for period, votes in periods.items()]


# Votes. The commit is the expensive part, since the server waits for its disk: so many votes share one.

INSERT = "INSERT INTO public.votes (vote) SELECT unnest(%s::text[])"


class Batch:
    """Votes that one statement stores.

    outcome -- a Future, which one thread fills and others wait for: None if the votes are stored, else the Trouble
    """

    def __init__(self):
        self.votes: list[str] = []
        self.outcome = Future()


class VoteStore:
    """Stores votes: those that come while a statement runs are stored together by the next.

    The first vote of a batch leads it. Its thread waits for its turn, while others join, and stores all of them.
    """

    def __init__(self):
        self.gathering = Batch()
        self.joining = Lock()  # for changes of the batch that is being gathered
        self.turn = Lock()  # held by the leader whose statement runs

    def store(self, vote: str) -> None:
        """Return when a vote is committed. Raises Unavailable."""
        batch, leads = self.join(vote)
        if leads:
            self.store_batch(batch)
        trouble = batch.outcome.result()
        if trouble is Trouble.REFUSED and len(batch.votes) > 1:  # perhaps because of another vote: retry alone
            trouble = attempt([vote])
        if trouble:
            raise Unavailable(trouble)

    def join(self, vote: str) -> tuple[Batch, bool]:
        """Add a vote to the batch that is being gathered; return that, and whether the vote is its first."""
        with self.joining:
            batch = self.gathering
            batch.votes.append(vote)
            leads = len(batch.votes) == 1
            if len(batch.votes) == VOTES_A_STATEMENT:
                self.gathering = Batch()
            return batch, leads

    def store_batch(self, batch: Batch) -> None:
        """Store a batch, in turn if that does not take too long, and let all its votes know."""
        in_turn = self.turn.acquire(timeout=TURN_PATIENCE)
        with self.joining:
            if self.gathering is batch:
                self.gathering = Batch()
        outcome = Trouble.UNCERTAIN  # whatever happens to the statement, nobody may wait for ever
        try:
            outcome = attempt(batch.votes)
        finally:
            batch.outcome.set_result(outcome)
            if in_turn:
                self.turn.release()


def attempt(votes: list[str]) -> Trouble | None:
    """Store votes by one statement; return None, or the Trouble: each voter needs their own exception."""
    try:
        execute(vote_pool, VOTE_PATIENCE, INSERT, [votes])
    except Unavailable as error:
        return error.trouble
    return None


vote_store = VoteStore()


# Answers that are the same for everybody: made once for each reading, and given out until the next.


ASK_AGAIN = "no-cache"  # a browser may keep it, but has to ask whether it is still the same
KEPT_FOR_A_YEAR = "max-age=31536000, immutable"


class Answer:
    """A finished answer with an entity tag, which the browser sends back when it asks again."""

    def __init__(self, body: bytes, content_type: str, cache_control: str):
        self.body = body
        self.tag = f'"{sha256(body).hexdigest()[:16]}"'
        self.kept_headers = [("ETag", self.tag), ("Cache-Control", cache_control)]
        self.headers = [("Content-Type", content_type), ("Content-Length", str(len(body))), *self.kept_headers]

    def for_visitor(self, environ: dict) -> tuple[str, list, bytes]:
        """Return status, headers and body: a 304 if the visitor has it already (RFC 9110, section 13.1.2)."""
        known = environ.get("HTTP_IF_NONE_MATCH", "")
        if self.tag in known or known.strip() == "*":
            return "304 Not Modified", self.kept_headers, b""
        return "200 OK", self.headers, self.body


class SharedPage:
    """A page that is made once for each Reading.

    reader -- where its Readings come from
    make -- a function that turns a Reading into an Answer
    """

    def __init__(self, reader: Reader, make: Callable[[Reading], Answer]):
        self.reader = reader
        self.make = make
        self.last_made = (None, None)  # a Reading, and the Answer made of it: in one, so that no thread sees half of it

    def made_of(self, reading: Reading) -> Answer:
        """Return the Answer for a Reading, made now unless it is the one made last."""
        last_reading, answer = self.last_made
        if last_reading != reading:
            answer = self.make(reading)
            self.last_made = (reading, answer)
        return answer

    def finished(self) -> Answer | None:
        """Return the Answer if it is made already, and fresh."""
        last_reading, answer = self.last_made
        return answer if answer and last_reading == self.reader.if_fresh() else None


def render(name: str, **values) -> str:
    """Fill a template, views/NAME.tpl, with these values and those that many templates need."""
    return template(name, values, SHARED_VALUES, template_lookup=TEMPLATE_FOLDERS)


def static_url(name: str) -> str:
    """Return the address of a file in static/; it changes with the files, so that a browser may keep them."""
    return f"/static/{name}?{VERSION_QUERY}"


SHARED_VALUES = {
    "candidates": CANDIDATES,
    "title": TITLE,
    "question": QUESTION,
    "summary": SUMMARY,
    "site_url": SITE_URL,
    "static_url": static_url,
}


def html(text: str) -> Answer:
    """Return the Answer with a page, which a browser may keep but has to ask for again."""
    return Answer(text.encode(), "text/html; charset=utf-8", ASK_AGAIN)


def make_index(reading: Reading, voted: str | None = None) -> Answer:
    """Return the page with the cats; with thanks if one was voted for."""
    counts = dict(reading.rows)
    votes = {cat: counts.get(cat, 0) for cat in CANDIDATES}
    thanked = CANDIDATES.get(voted)
    return html(render("index", votes=votes, thanked=thanked, outdated=reading.outdated))


def make_tally_json(reading: Reading) -> Answer:
    """Return the tally for scripts."""
    return Answer(json.dumps(dict(reading.rows)).encode(), "application/json", ASK_AGAIN)


def make_history(reading: Reading) -> Answer:
    """Return the page with the votes of the last 48 hours and 30 days."""
    charts = {
        "hour": votes_in_periods(reading.rows, seconds=3600, number=48),
        "day": votes_in_periods(reading.rows, seconds=86400, number=30),
    }
    return html(render("history", charts=charts, outdated=reading.outdated))


index_page = SharedPage(tally_reader, make_index)
voter_pages = {cat: SharedPage(tally_reader, partial(make_index, voted=cat)) for cat in CANDIDATES}
tally_page = SharedPage(tally_reader, make_tally_json)
history_page = SharedPage(history_reader, make_history)
shared_pages = {"/": index_page, "/tally.json": tally_page, "/history": history_page}


def make_file(file: Path) -> Answer:
    """Return the Answer with a static file."""
    content_type, _ = mimetypes.guess_type(file.name)
    return Answer(file.read_bytes(), content_type or "application/octet-stream", KEPT_FOR_A_YEAR)


files = {f"/{file.relative_to(FOLDER).as_posix()}": make_file(file) for file in STATIC_FILES}

# Request handlers

routes = Bottle()


@routes.get("/")
def index():
    """The page; `?voted=CAT` adds thanks and a tally that includes that vote, whichever worker answers."""
    voter_page = voter_pages.get(request.query.voted)
    if voter_page:
        return respond_with(voter_page.made_of(tally_reader.begun_from_now()))
    return respond_with(index_page.made_of(tally_reader.latest()))


@routes.get("/tally.json")
def tally_json():
    """The tally for scripts; an outdated one says so by its Age in seconds (RFC 9111, section 5.1)."""
    reading = tally_reader.latest()
    answer = respond_with(tally_page.made_of(reading))
    if reading.outdated:
        answer.set_header("Age", str(int(monotonic() - reading.begun_at)))
    return answer


@routes.get("/history")
def history():
    """Votes in each of the last 48 hours and 30 days, in UTC."""
    return respond_with(history_page.made_of(history_reader.latest()))


def respond_with(answer: Answer) -> HTTPResponse:
    """Return what this visitor gets of an answer that is the same for everybody."""
    status, headers, body = answer.for_visitor(request.environ)
    return HTTPResponse(body, status, headers)


@routes.post("/add")
def add():
    """Store a vote. The 303 (RFC 9110, section 15.4.4) is a promise: that vote is committed."""
    refuse_cross_site()
    vote = read_vote()
    if vote not in CANDIDATES:
        raise HTTPError(400, "There is no such candidate, so no vote was counted.")
    try:
        vote_store.store(vote)
    except Unavailable as error:
        if error.trouble is Trouble.REFUSED:
            raise HTTPError(400, "The database knows no such candidate, so no vote was counted.") from error
        raise
    return HTTPResponse(status=303, headers={"Location": f"/?voted={quote(vote)}", "Cache-Control": "no-store"})


def refuse_cross_site() -> None:
    """Raise 403 for a page of another site, by the rule of https://pkg.go.dev/net/http#CrossOriginProtection."""
    refusal = HTTPError(403, "Votes from pages of other sites are not counted.")
    site = request.environ.get("HTTP_SEC_FETCH_SITE")
    if site in ("same-origin", "none"):
        return
    if site:
        raise refusal
    origin = request.environ.get("HTTP_ORIGIN")
    if not origin:  # not a browser
        return
    host = request.environ.get("HTTP_HOST", "")
    if not host or origin.lower().partition("://")[2] != host.lower():
        log.warning(
            "refused a vote: Origin %r, Host %r; a proxy in front has to hand on the visitor's Host", origin, host
        )
        raise refusal


def read_vote() -> str:
    """Return the field `vote` of the form sent. Raises 413 if the form is too long, 400 if it is not one vote."""
    body = read_body()
    if len(body) > FORM_LIMIT:
        raise HTTPError(413, "That is far too much for a vote, so none was counted.")
    try:
        form, _ = parse_form_data(request.environ | {"wsgi.input": BytesIO(body)}, strict=True)
        (vote,) = form.getall("vote")
    except (ValueError, LookupError) as error:  # no form, no such character set, no vote, or two
        raise HTTPError(400, "The form did not arrive as one vote, so none was counted.") from error
    return vote


def read_body() -> bytes:
    """Return the body sent, or its first FORM_LIMIT + 1 bytes. Raises 400 if it cannot be read."""
    chunked = "HTTP_TRANSFER_ENCODING" in request.environ  # then its length is not known beforehand
    try:
        length = FORM_LIMIT + 1 if chunked else max(request.content_length, 0)
        return request.environ["wsgi.input"].read(min(length, FORM_LIMIT + 1))
    except Exception as error:  # each server has its own for that, none that they share
        raise HTTPError(400, "The form did not arrive whole, so no vote was counted.") from error


@routes.get("/healthz")
def healthz():
    """200 while the database answers and has the schema, for a platform that asks; else 503."""
    asked_at = monotonic()
    for reader in tally_reader, history_reader:
        if reader.begun_from_now().begun_at < asked_at:
            raise Unavailable(reader.trouble)
    return HTTPResponse("ok\n", headers={"Content-Type": "text/plain", "Cache-Control": "no-store"})


@routes.get("/static/<path:path>")
def static(path):
    """A file or a part of it; for a year if its address names the present version, else to be asked for again."""
    file = files.get(request.path)
    if file and "HTTP_IF_NONE_MATCH" in request.environ:
        answer = respond_with(file)  # a tag wins over a date (RFC 9110, section 13.1.3), but not for Bottle
    else:
        answer = static_file(path, root=STATIC, etag=file.tag if file else False)
    if answer.status_code < 400:
        answer.headers.pop("Date", None)  # the server sends one
        answer.set_header("Cache-Control", KEPT_FOR_A_YEAR if request.query_string == VERSION_QUERY else ASK_AGAIN)
    return answer


def error_page(error: HTTPError) -> str:
    """Return the answer to an error, whoever raised it."""
    if DEVELOPMENT and error.status_code == 500:
        return Bottle.default_error_handler(routes, error)  # the traceback
    response.set_header("Cache-Control", "no-store")
    if error.status_code == 405:
        # To Bottle, HEAD is a kind of GET.
        response.set_header("Allow", response.get_header("Allow").replace("GET", "GET, HEAD"))
    if request.path == "/tally.json":
        response.content_type = "application/json"
        return json.dumps({"error": error.status_line})
    trouble = getattr(error, "trouble", None)
    return render(
        "error", status=error.status_code, message=error.body, trouble=trouble, voting=request.method == "POST"
    )


routes.default_error_handler = error_page
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
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "same-origin"),  # with no-referrer Chromium sends our own form as of origin null
]
SECURITY_HEADERS_OF_HTTPS = [*SECURITY_HEADERS, ("Strict-Transport-Security", "max-age=31536000")]


def app(environ, start_response):
    """The WSGI application (PEP 3333): a finished answer if there is one, else Bottle's; with security headers."""
    https = environ["wsgi.url_scheme"] == "https"
    security_headers = SECURITY_HEADERS_OF_HTTPS if https else SECURITY_HEADERS

    def start_securely(status, headers, *error):
        return start_response(status, headers + security_headers, *error)

    answer = finished_answer(environ)
    if answer:
        status, headers, body = answer.for_visitor(environ)
        start_securely(status, headers)
        return [body]
    # Bottle drops bytes that are not UTF-8, which would make / of /%FF. All our paths are ASCII.
    environ["PATH_INFO"] = environ["PATH_INFO"].encode("ascii", "replace").decode()
    return routes(environ, start_securely)


def finished_answer(environ: dict) -> Answer | None:
    """Return the answer to a plain question if it is made already; most requests get one, and need no routing."""
    if environ["REQUEST_METHOD"] != "GET":
        return None
    path, query = environ["PATH_INFO"], environ.get("QUERY_STRING")
    if not query:
        page = shared_pages.get(path)
        return page.finished() if page else None
    if query == VERSION_QUERY and "HTTP_RANGE" not in environ:
        return files.get(path)
    return None
