"""What is measured: for each row of the tables, what to call for a turn of each of its columns."""

from functools import partial

from bench.contestants import databases_of_pgbench, linked_files, start_compared, start_grown
from bench.turns import first, half, pgbench, wrk

COLUMNS = ["catvote", "without database", "bare Bottle", "the Flask way", "the async way", "pgbench"]
POLLS = 10
GROWTH_SECONDS = 1  # one visitor at a time sends enough requests in that time
FLASK_SECONDS = 3  # but a page that counts ten million votes takes most of one
# Measures of contestants beside each other, and what their rows are called
COMPARED = {
    "page": "`GET /`",
    "page-304": "`GET /`, with its tag",
    "voted": "`GET /?voted=Pita`",
    "file": "the stylesheet",
    "tally": "`GET /tally.json`",
    "poll": "`GET /tally.json`, with its tag",
    "history": "`GET /history`",
    "vote": "`POST /add`",
    "mix": "nine `GET /` to one `POST /add`",
    "half": "`GET /`, half as many",
    "visit": "a visit",
}
# Measures of one service with ever more votes stored
GROWN = {
    "page-grown": "`GET /`",
    "voted-grown": "`GET /?voted=Pita`",
    "vote-grown": "`POST /add`",
    "history-first": "`GET /history`, first",
    "history-later": "`GET /history`, later",
    "flask-grown": "`GET /` of the Flask way",
}
HOURS = {"hours": "a vote by pgbench"}
MEASURES = COMPARED | GROWN | HOURS


def visit(catvote):
    """Return the requests of a visit: the page and its files, a vote, the page after it, ten polls."""
    files = [f"GET {file}" for file in linked_files(catvote)]
    return ["GET /", *files, "POST /add", "GET /?voted=Pita", *["POLL /tally.json"] * POLLS]


def compared(contestants, with_hours, seconds):
    """Return {measure: {name of a contestant: what to call for a turn}} for COMPARED."""

    def load(plan, *names, unit=1):
        return {name: partial(wrk, contestants[name], seconds, plan, unit) for name in names}

    catvote, bare, flask, asynchronous = "catvote", "bare Bottle", "the Flask way", "the async way"
    stylesheet = next(file for file in linked_files(contestants[catvote]) if ".css" in file)
    whole_visit = visit(contestants[catvote])
    history = load(["GET /history"], bare, "catvote's history")
    return {
        "page": load(["GET /"], catvote, bare, flask, asynchronous, "catvote, one worker"),
        "page-304": load(["POLL /"], catvote),
        "voted": load(["GET /?voted=Pita"], catvote, flask, asynchronous),
        "file": load([f"GET {stylesheet}"], catvote, bare, flask, asynchronous),
        "tally": load(["GET /tally.json"], catvote, bare, flask, asynchronous),
        "poll": load(["POLL /tally.json"], catvote, bare, flask, asynchronous),
        "history": {catvote: history["catvote's history"], bare: history[bare]},
        "vote": load(["POST /add"], catvote, "without database", bare, flask, asynchronous)
        | {"pgbench": partial(pgbench, with_hours, seconds)},
        "mix": load([*["GET /"] * 9, "POST /add"], catvote, flask, asynchronous),
        "half": {catvote: partial(half, contestants[catvote], seconds, ["GET /"])},
        "visit": load(whole_visit, catvote, flask, asynchronous, unit=len(whole_visit)),
    }


def grown(contestants, sizes):
    """Return {measure: {number of votes: what to call for a turn}} for GROWN. One visitor at a time."""

    def load(request, way="catvote", seconds=GROWTH_SECONDS, votes=True):
        options = {"connections": 1, "votes": votes}
        return {size: partial(wrk, contestants[way, size], seconds, [request], **options) for size in sizes}

    return {
        "page-grown": load("GET /"),
        "voted-grown": load("GET /?voted=Pita"),
        "vote-grown": load("POST /add"),
        "history-first": {size: partial(first, contestants["catvote", size], "/history") for size in sizes},
        # Nobody votes: with none stored, the page that says so is not to be another one meanwhile.
        "history-later": load("GET /history", votes=False),
        "flask-grown": load("GET /", "the Flask way", FLASK_SECONDS),
    }


def start(stack, postgres, pages, wanted, sizes, seconds):
    """Start whom the measures wanted need; return {measure: {column: what to call for a turn}}, and catvote."""
    with_hours, without_hours = databases_of_pgbench(postgres)
    contestants = start_compared(stack, postgres, pages)
    measures = compared(contestants, with_hours, seconds)
    if wanted & GROWN.keys():
        measures |= grown(start_grown(stack, postgres, pages, sizes), sizes)
    hours = {"with hours": with_hours, "without hours": without_hours}
    measures["hours"] = {name: partial(pgbench, database, seconds) for name, database in hours.items()}
    return {name: turns for name, turns in measures.items() if name in wanted}, contestants["catvote"]
