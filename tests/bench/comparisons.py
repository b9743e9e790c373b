"""What is compared: each table's columns, which are contestants, and rows, which are loads."""

import sys
from functools import partial

from bench.contestants import OTHERS, catvote, other, save_pages
from bench.loads import first, half, pgbench, wrk

THREE_WAYS = ["catvote", "the Flask way", "the async way"]
FOUR_WAYS = [*THREE_WAYS, "bare Bottle"]
STORED = 10_000  # votes, so that catvote's history has a bar for each hour and day
# How many times as many requests catvote should answer at least.
GOALS = {
    ("GET /", "bare Bottle"): 1,
    ("GET /tally.json", "bare Bottle"): 1,
    ("GET /history", "bare Bottle"): 0.8,
    ("POST /add", "without database"): 0.6,
    ("GET /", "the Flask way"): 4.5,
    ("POST /add", "the Flask way"): 3,
    ("a visit", "the Flask way"): 4,
    ("GET /", "the async way"): 1.8,
    ("POST /add", "the async way"): 1,
    ("a visit", "the async way"): 1.8,
    ("POST /add", "pgbench"): 0.3,
    ("GET /", "beside"): 0.97,
    ("GET /tally.json", "beside"): 0.97,
    ("GET /history", "beside"): 0.97,
    ("POST /add", "beside"): 0.97,
    ("GET /?voted=Pita", "beside"): 1.05,
    ("a visit", "beside"): 1,
}


def loads(contestant):
    """Return {row: (requests that all connections send in turn, again and again; who is asked for the same)}."""
    stylesheet, *files = [f"GET {file}" for file in contestant.files()]
    visit = ["GET /", stylesheet, *files, "POST /add", "GET /?voted=Pita", *["POLL /tally.json"] * 10]
    return {
        "GET /": (["GET /"], [*FOUR_WAYS, "beside"]),
        "GET /, with its tag": (["POLL /"], ["catvote"]),
        "GET /?voted=Pita": (["GET /?voted=Pita"], [*THREE_WAYS, "beside"]),
        "the stylesheet": ([stylesheet], FOUR_WAYS),
        "GET /tally.json": (["GET /tally.json"], [*FOUR_WAYS, "beside"]),
        "GET /tally.json, with its tag": (["POLL /tally.json"], THREE_WAYS),
        "GET /history": (["GET /history"], ["catvote", "bare Bottle", "beside"]),
        "POST /add": (["POST /add"], [*FOUR_WAYS, "without database", "beside"]),
        "nine GET / to one POST /add": ([*["GET /"] * 9, "POST /add"], THREE_WAYS),
        "a visit": (visit, [*THREE_WAYS, "beside"]),
        "votes and pages": (["POST /add", "GET /?voted=Pita", "GET /history", "GET /tally.json"], ["beside"]),
    }


class Comparison:
    """A table to be. All its columns are compared with the first one.

    timed -- whether the time of a request counts, rather than how many there are a second
    contestants -- {column: Contestant}
    turns -- {row: {column: a Turn for each round}}
    """

    def __init__(self, title, timed=False):
        self.title, self.timed, self.contestants, self.measures, self.turns = title, timed, {}, {}, {}

    def add(self, row, column, measure, *arguments):
        """Have that function called with these arguments for a Turn."""
        self.measures[row, column] = partial(measure, *arguments)
        self.turns.setdefault(row, {})[column] = []

    def add_loads(self, column, contestant, seconds, role=None):
        """Measure the rows of `loads` that are for this column, or for another `role`."""
        self.contestants[column] = contestant
        for row, (requests, roles) in loads(contestant).items():
            if (role or column) in roles:
                self.add(row, column, wrk, contestant, seconds, requests, len(requests) if row == "a visit" else 1)

    def take_turns(self, backwards):
        """Measure everything once; every other round `backwards`, so that nobody always comes first."""
        for row, columns in self.turns.items():
            for column in reversed(columns) if backwards else columns:
                columns[column].append(self.measures[row, column]())

    @property
    def columns(self):
        return list(dict.fromkeys(column for columns in self.turns.values() for column in columns))


def ways(stack, postgres, options):
    """Compare catvote with other ways to write it."""
    comparison = Comparison("Other ways to write it")
    ours = stack.enter_context(catvote(postgres, "ways", STORED))
    save_pages(ours, options.pages)
    comparison.add_loads("catvote", ours, options.seconds)
    for number, way in enumerate(OTHERS):
        theirs = stack.enter_context(other(postgres, f"ways_{number}", way, options.pages))
        comparison.add_loads(way, theirs, options.seconds)
    comparison.add("POST /add", "pgbench", pgbench, ours.database, options.seconds)
    return comparison


def beside(stack, postgres, options):
    """Compare catvote with another checkout of it."""
    comparison = Comparison(f"Beside {options.beside}")
    ours = stack.enter_context(catvote(postgres, "ours", STORED))
    theirs = stack.enter_context(catvote(postgres, "theirs", STORED, options.beside.resolve()))
    comparison.add_loads("catvote", ours, options.seconds, role="beside")
    comparison.add_loads("beside", theirs, options.seconds)
    return comparison


def growth(stack, postgres, options):
    """Compare the waiting times of one visitor, with many votes stored and with fewer."""
    comparison = Comparison("What one visitor waits for, by the votes stored", timed=True)
    for votes in sorted(options.votes, reverse=True):
        print(f"Storing {votes:,} votes, twice", file=sys.stderr)
        column = f"{votes:,} votes"
        ours = stack.enter_context(catvote(postgres, f"grown_{votes}", votes))
        if not comparison.turns:
            save_pages(ours, options.pages)
        for request in "GET /", "GET /?voted=Pita", "GET /history", "POST /add":
            comparison.add(request, column, wrk, ours, options.seconds / 2, [request], 1, 1)
        comparison.add("GET /history, the first", column, first, ours, "/history")
        comparison.add("GET /, half as many as it bears", column, half, ours, options.seconds, ["GET /"])
        flask = stack.enter_context(other(postgres, f"flask_{votes}", "the Flask way", options.pages, votes))
        # A page that counts ten million votes takes most of a second.
        comparison.add("GET / of the Flask way", column, wrk, flask, options.seconds * 1.5, ["GET /"], 1, 1)
    return comparison


def trigger(stack, postgres, options):
    """Compare what PostgreSQL needs for a vote with what it would need if it did not count."""
    comparison = Comparison("What counting costs PostgreSQL")
    counting, storing = (catvote(postgres, name, 0).database for name in ("counting", "storing"))
    storing.run("ALTER TABLE votes DISABLE TRIGGER USER")
    comparison.add("a vote by pgbench", "counted", pgbench, counting, options.seconds)
    comparison.add("a vote by pgbench", "only stored", pgbench, storing, options.seconds)
    return comparison


COMPARISONS = {"beside": beside, "ways": ways, "growth": growth, "trigger": trigger}
