"""How much the service bears, beside other ways to write it: prints the table and the goals that the README shows.

    python tests/bench.py [--quick] [--only MEASURE ...]

All contestants run at once and take turns of two seconds, round after round: so a busy moment of the machine
hits each of them. Figures are medians of the rounds, comparisons medians of the ratios within a round.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import NamedTuple
from urllib.request import urlopen

import psycopg
from local.postgres import LocalPostgres, apply_schema, as_command
from local.service import Service

FOLDER = Path(__file__).parent / "bench"
VENV = Path(sys.prefix) / "bench"
CONNECTIONS = 16
POOLED = 8  # connections of catvote's two workers to the database
COLUMNS = ["catvote", "bare Bottle", "the Flask way", "the async way", "pgbench"]
# measure: what its row of the table is called
ROWS = {
    "page": "`GET /`",
    "unchanged": "`GET /`, answered 304",
    "file": "a static file",
    "vote": "`POST /add`",
    "mix": "nine `GET /` to one `POST /add`",
    "half": "`GET /`, half as many",
    "read": "`GET /?voted=Pita`, one visitor",
    "write": "`POST /add`, one visitor",
}
# measure, the other contestant, how many times as fast catvote should be
GOALS = [
    ("page", "bare Bottle", 0.95),
    ("page", "the Flask way", 4.5),
    ("page", "the async way", 1.8),
    ("vote", "bare Bottle", 0.6),
    ("vote", "the Flask way", 3),
    ("vote", "the async way", 1),
    ("vote", "pgbench", 0.3),
    ("mix", "the async way", 1),
]
# As Flask-SQLAlchemy's create_all() makes it, which two workers must not do at once.
VOTE_TABLE = """
    CREATE TABLE vote (id serial PRIMARY KEY, date_created timestamp DEFAULT now(), vote varchar(10) NOT NULL)
"""
FILL = "INSERT INTO {} (vote) SELECT (ARRAY['Gummi', 'Pita'])[1 + number % 2] FROM generate_series(1, {}) AS number"


class Turn(NamedTuple):
    """What a turn came to: requests a second, milliseconds for one, microseconds of CPU for one."""

    rate: float
    p50: float
    p99: float
    server: float
    database: float


def processes(master):
    """Return the ids of a process and all that descend from it, and the CPU seconds they have used (Linux only)."""
    ticks, children = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = file.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(file.parent.name))
            ticks[int(file.parent.name)] = sum(map(int, fields[11:15]))  # with children that have ended
    tree = [master.pid]
    for process in tree:
        tree += children.get(process, [])
    return tree, sum(ticks.get(process, 0) for process in tree) / os.sysconf("SC_CLK_TCK")


class Contestant(Service):
    """A service to be measured, on a database of its own: catvote unless there is another `command`.

    table -- what to empty before each turn, if anything
    """

    def __init__(self, postgres, database, table=None, command=None, **environment):
        super().__init__(postgres.url(database), **environment)
        self.postgres, self.database, self.table = postgres, database, table
        if command:
            self.command, self.folder = command, FOLDER

    def __exit__(self, *_):
        with suppress(AssertionError, ProcessLookupError):  # uvicorn leaves a process behind for a moment
            self.stop()

    def sql(self, statement):
        """Run a statement on its database; return the first value of the first row, if any."""
        with psycopg.connect(self.postgres.url(self.database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchone()[0] if cursor.description else None

    def page(self):
        """Return its page."""
        with urlopen(self.url) as answer:
            return answer.read().decode()

    @contextmanager
    def a_vote_each_second(self):
        """Have somebody vote meanwhile, so that no contestant can keep a page for ever."""
        finished = Event()

        def vote():
            while not finished.wait(1):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
                connection.request("POST", "/add", "vote=Gummi", {"Content-Type": "application/x-www-form-urlencoded"})
                connection.getresponse()
                connection.close()

        voter = Thread(target=vote)
        voter.start()
        try:
            yield
        finally:
            finished.set()
            voter.join()

    def turn(self, command, parse):
        """Run a load program; `parse` makes rate, p50, p99 and the number of requests of what it prints."""
        masters = self.process, self.postgres.child_process
        before = [processes(master)[1] for master in masters]
        program = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
        after = [processes(master)[1] for master in masters]
        *figures, requests = parse(program.stdout)
        return Turn(*figures, *(1e6 * (now - then) / requests for now, then in zip(after, before)))

    def wrk(self, seconds, path="/", votes=0, rest=0, connections=CONNECTIONS, header="Accept: */*"):
        """Send requests, so many in ten of them votes, and let a connection rest so many ms between two."""
        command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds}s", "--timeout=30s"]
        command += [f"--header={header}", f"--script={FOLDER}/load.lua", self.url + path, "--", votes, rest]

        def parse(output):
            result = json.loads(output.splitlines()[-1])
            if result["failed"]:
                raise RuntimeError(f"{result['failed']} of {result['requests']} requests failed. {self.log}")
            return result["requests"] / result["seconds"], result["p50"], result["p99"], result["requests"]

        return self.turn(command, parse)

    def load(self, seconds, **options):
        """Send requests to a service that had no votes at first, unless it is to keep them."""
        if self.table:
            self.sql(f"TRUNCATE {self.table}")
        with self.a_vote_each_second():
            return self.wrk(seconds, **options)

    def half(self, seconds):
        """Send half as many requests as the service bears."""
        return self.load(seconds, rest=2000 * CONNECTIONS / self.load(1).rate)

    def unchanged(self, seconds):
        """Ask as a browser that has the page already. Nobody votes meanwhile."""
        time.sleep(1)
        with urlopen(self.url) as answer:
            return self.wrk(seconds, header=f"If-None-Match: {answer.headers['ETag']}")

    def pgbench(self, seconds):
        """Store votes with nothing between the load program and the database."""
        command = [self.postgres.bindir / "pgbench", "--no-vacuum", "--protocol=prepared", f"--client={POOLED}"]
        command += [f"--time={seconds}", f"--file={FOLDER}/vote.sql", "--define=vote=Pita"]

        def parse(output):
            names = "tps", "latency average", "number of transactions actually processed"
            rate, latency, requests = (float(re.search(rf"(?m)^{name}\W+([\d.]+)", output)[1]) for name in names)
            return rate, latency, latency, requests

        return self.turn([*command, self.postgres.url(self.database)], parse)


def install():
    """Make the virtualenv of the contestants, unless it is there."""
    wanted, installed = FOLDER / "requirements.txt", VENV / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted.read_text():
        print(f"Installing the contestants into {VENV}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        subprocess.run([VENV / "bin/pip", "install", "-qq", "--disable-pip-version-check", "-r", wanted], check=True)
        shutil.copy(wanted, installed)


def start_all(stack, votes):
    """Start all contestants and return them by name; those called "full" have so many votes."""
    postgres = stack.enter_context(LocalPostgres(durable=True))
    pages = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    def start(database, *arguments, **environment):
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database}")
        apply_schema(postgres.url(database))
        contestant = Contestant(postgres, database, *arguments, PAGES=str(pages), **environment)
        contestant.sql(VOTE_TABLE)
        return stack.enter_context(contestant)

    catvote = start("catvote", "votes")
    # The others serve the same page: as it is, or as a template.
    page = catvote.page()
    template, places = re.subn(r'(data-votes="(\w+)">)0', r'\1{{ votes["\2"] }}', page)
    assert places == 2
    pages.joinpath("page.html").write_text(page)
    pages.joinpath("index.html").write_text(template)

    flask = f"{VENV}/bin/gunicorn --workers=2 flask_way:app"
    uvicorn = f"{VENV}/bin/uvicorn --workers=2 --no-access-log --port=$PORT async_way:app"
    contestants = {
        "catvote": catvote,
        "bare Bottle": start("bottle", None, "gunicorn --config=bare.conf.py bare_bottle:app"),
        "the Flask way": start("flask", "vote", flask),
        "the async way": start("async", "vote", uvicorn),
        "one worker": start("one_worker", "votes", WEB_CONCURRENCY="1"),
        "catvote, full": start("catvote_full"),
        "the Flask way, full": start("flask_full", None, flask),
    }
    for name, table in ("catvote, full", "votes"), ("the Flask way, full", "vote"):
        for statement in FILL.format(table, votes), f"VACUUM ANALYZE {table}", "CHECKPOINT":
            contestants[name].sql(statement)
    return contestants


def measures(contestants):
    """Return for each measure what to call for a turn of each contestant."""

    def load(*names, **options):
        return {name: partial(contestants[name].load, **options) for name in names}

    catvote = contestants["catvote"]
    stylesheet = re.search(r'/static/[^"]+\.css[^"]*', catvote.page())[0]
    return {
        "page": load("catvote", "bare Bottle", "the Flask way", "the async way", "one worker"),
        "unchanged": {"catvote": catvote.unchanged},
        "file": load("catvote", path=stylesheet),
        "vote": load("catvote", "bare Bottle", "the Flask way", "the async way", votes=10)
        | {"pgbench": catvote.pgbench},
        "mix": load("catvote", "the Flask way", "the async way", votes=1),
        "half": {name: contestants[name].half for name in ("catvote", "bare Bottle")},
        "read": load("catvote", "the Flask way", "catvote, full", path="/?voted=Pita", connections=1)
        | {"the Flask way, full": lambda seconds: contestants["the Flask way, full"].load(5 * seconds, connections=1)},
        "write": load("catvote", "catvote, full", votes=10, connections=1),
    }


def report(turns, contestants, votes):
    """Print the outcome as Markdown. turns[measure][contestant] is a list with a Turn for each round."""
    middle = {
        measure: {name: Turn(*map(median, zip(*rounds))) for name, rounds in of.items()}
        for measure, of in turns.items()
    }

    def ratio(measure, name, other, figure):
        """Return the median of a figure of one contestant, divided by that of another in the same round."""
        return median(figure(one) / figure(two) for one, two in zip(turns[measure][name], turns[measure][other]))

    print("|".join(["", " ", *(f" {name} " for name in COLUMNS), ""]))
    print("|---|" + "--:|" * len(COLUMNS))
    for measure, of in middle.items():
        cells = []
        for turn, full in ((of.get(name), of.get(f"{name}, full")) for name in COLUMNS):
            if full:
                cells.append(f"{turn.p50:.2f} ms, full {full.p50:.2f} ms")
            elif measure == "half":
                cells.append(f"p50 {turn.p50:.1f} ms, p99 {turn.p99:.1f} ms" if turn else "")
            else:
                cells.append(f"{turn.rate:,.0f} ({turn.server:.0f} + {turn.database:.0f})" if turn else "")
        print("|".join(["", f" {ROWS[measure]} ", *(f" {cell} " for cell in cells), ""]))
    print("\nRequests a second (microseconds of CPU for one: service + PostgreSQL), or milliseconds for one;")
    print(f"full: with {votes:,} votes stored. {CONNECTIONS} connections, {os.cpu_count()} cores for everything.\n")

    goals = []
    for measure, other, goal in GOALS:
        if measure in turns:
            times = ratio(measure, "catvote", other, lambda turn: turn.rate)
            cheaper = ratio(measure, other, "catvote", lambda turn: turn.server + turn.database)
            label = f"{ROWS[measure]}: times as many as {other} ({cheaper:.2f} by CPU)"
            goals.append((label, "at least", goal, times, times >= goal))
    if "mix" in turns:
        p99 = middle["mix"]["catvote"].p99
        goals.append((f"{ROWS['mix']}: p99 in ms", "below", 30, p99, p99 < 30))
    if "half" in turns:
        spread = middle["half"]["catvote"].p99 / middle["half"]["catvote"].p50
        goals.append((f"{ROWS['half']}: p99 / p50", "below", 5, spread, spread < 5))
    for measure in {"read", "write"} & turns.keys():
        grown = ratio(measure, "catvote, full", "catvote", lambda turn: turn.p50)
        goals.append((f"{ROWS[measure]}: time if full, times that if empty", "at most", 1.1, grown, grown <= 1.1))
    for label, sign, goal, measured, met in goals:
        print(f"- {label}: goal {sign} {goal}, measured {measured:.2f}: {'met' if met else 'NOT MET'}")

    if "page" in turns:
        more = ratio("page", "catvote", "one worker", lambda turn: turn.rate)
        print(f"- Two workers answer {more:.2f} times as many `GET /` as one.")
    _, *workers = processes(contestants["catvote"].process)[0]
    memory = [re.search(r"Pss:\s+(\d+)", Path(f"/proc/{worker}/smaps_rollup").read_text())[1] for worker in workers]
    print(f"- A worker takes {median(map(int, memory)) / 1024:.0f} MiB of memory (PSS).")
    size = contestants["catvote, full"].sql("SELECT pg_total_relation_size('votes')")
    print(f"- A vote takes {size / votes:.0f} bytes of disk, indexes included.")


def main():
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of a second, few votes: to see that it works")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="MEASURE", help=" ".join(ROWS))
    options = parser.parse_args()
    rounds, seconds, votes = (2, 1, 100_000) if options.quick else (7, 2, 10_000_000)
    if not shutil.which("wrk"):
        sys.exit("wrk, which sends the requests, is not on this machine: apt-get install wrk")
    install()
    with as_command(), ExitStack() as stack:
        contestants = start_all(stack, votes)
        wanted = {measure: turn for measure, turn in measures(contestants).items() if measure in options.only}
        turns = {measure: {name: [] for name in names} for measure, names in wanted.items()}
        for number in range(rounds):
            print(f"Round {number + 1} of {rounds}", file=sys.stderr)
            for measure, names in wanted.items():
                for name, turn in names.items():
                    turns[measure][name].append(turn(seconds))
        report(turns, contestants, votes)


if __name__ == "__main__":
    main()
