"""How much the service bears, beside other ways to write it: prints the table and the goals that the README shows.

    python tests/bench.py [--quick] [--only MEASURE ...]

All contestants run at once and take turns of a few seconds, round after round: so a busy moment of the
machine hits each of them. Figures are medians of the rounds, comparisons medians of each round's ratio.
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
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import NamedTuple
from urllib.request import urlopen

import psycopg
from postgres import LocalPostgres, apply_schema, as_command
from service import Service

FOLDER = Path(__file__).parent / "bench"
VENV = Path(sys.prefix) / "bench"
CONNECTIONS = 16
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
# As Flask-SQLAlchemy's create_all() makes it, which two workers must not do at once.
VOTE_TABLE = (
    "CREATE TABLE vote (id serial PRIMARY KEY, date_created timestamp DEFAULT now(), vote varchar(10) NOT NULL)"
)
FILL = "INSERT INTO {} (vote) SELECT (ARRAY['Gummi', 'Pita'])[1 + number % 2] FROM generate_series(1, {}) AS number"


class Turn(NamedTuple):
    """What a turn came to: requests a second, milliseconds for one, microseconds of CPU for one."""

    rate: float
    p50: float
    p99: float
    server: float
    database: float


def processes(master):
    """Return a process and all that descend from it, by id, and the CPU seconds they have used (Linux only)."""
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

    def __enter__(self):  # FIXME goes when Service has `command` and `folder`
        if not hasattr(self, "command"):
            return super().__enter__()
        self.process = subprocess.Popen(
            ["sh", "-c", "exec " + self.command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
        )
        self.wait_until_it_listens()
        return self

    def __exit__(self, *_):
        with suppress(AssertionError):  # uvicorn leaves a process behind, which stop() ends
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
                connection.request("POST", "/add", "vote=Gummi", FORM)
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

    def empty(self):
        if self.table:
            self.sql(f"TRUNCATE {self.table}")

    def load(self, seconds, path="/", votes=0, rest=0, connections=CONNECTIONS):
        """Have wrk send requests, so many in ten of them votes, and each connection rest so many ms between two."""
        self.empty()
        with self.a_vote_each_second():
            return self.wrk(seconds, path, votes, rest, connections)

    def wrk(self, seconds, path="/", votes=0, rest=0, connections=CONNECTIONS, header="Accept: */*"):
        command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds}s", "--timeout=30s"]
        command += [f"--header={header}", f"--script={FOLDER}/load.lua", self.url + path, "--", votes, rest]

        def parse(output):
            result = json.loads(output.splitlines()[-1])
            if result["failed"]:
                raise RuntimeError(f"{result['failed']} of {result['requests']} requests failed. {self.log}")
            return result["requests"] / result["seconds"], result["p50"], result["p99"], result["requests"]

        return self.turn(command, parse)

    def half_load(self, seconds):
        """Have wrk send half as many requests as the server bears."""
        return self.load(seconds, rest=2000 * CONNECTIONS / self.load(seconds).rate)

    def unchanged(self, seconds):
        """Have wrk ask as a browser that has the page already; so nobody votes meanwhile."""
        self.empty()
        with urlopen(self.url) as answer:
            return self.wrk(seconds, header=f"If-None-Match: {answer.headers['ETag']}")

    def bare_insert(self, seconds):
        """Have pgbench store votes, with nothing between it and the database."""
        self.empty()
        command = [self.postgres.bindir / "pgbench", "--no-vacuum", "--protocol=prepared", f"--client={CONNECTIONS}"]
        command += [f"--time={seconds}", f"--file={FOLDER}/vote.sql", "--define=vote=Pita"]

        def parse(output):
            names = "tps", "latency average", "number of transactions actually processed"
            rate, latency, requests = (
                float(re.search(rf"^{name}\W+([\d.]+)", output, re.MULTILINE)[1]) for name in names
            )
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
    """Start all contestants; return them by name, those with `votes` stored as (name, "full")."""
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
    pages.joinpath("page.html").write_text(catvote.page())
    template, places = re.subn(r'(data-votes="(\w+)">)0', r'\1{{ votes["\2"] }}', catvote.page())
    assert places == 2
    pages.joinpath("index.html").write_text(template)

    flask_command = f"{VENV}/bin/gunicorn --workers=2 flask_way:app"
    async_command = f"{VENV}/bin/uvicorn --workers=2 --no-access-log --port=$PORT async_way:app"
    contestants = {
        "catvote": catvote,
        "bare Bottle": start("bottle", None, "gunicorn --config=bare.conf.py bare_bottle:app"),
        "the Flask way": start("flask", "vote", flask_command),
        "the async way": start("fastapi", "vote", async_command),
        "one worker": start("one_worker", "votes", WEB_CONCURRENCY="1"),
    }
    if votes:
        contestants["catvote, full"] = start("catvote_full")
        contestants["the Flask way, full"] = start("flask_full", None, flask_command)
        for name, table in ("catvote, full", "votes"), ("the Flask way, full", "vote"):
            contestants[name].sql(FILL.format(table, votes))
            contestants[name].sql(f"VACUUM ANALYZE {table}")
            contestants[name].sql("CHECKPOINT")
    return contestants


COLUMNS = ["catvote", "bare Bottle", "the Flask way", "the async way", "pgbench"]


def measures(contestants, votes):
    """Return for each measure what to call for a turn of each contestant."""

    def of(*names, **load):
        return {name: partial(contestants[name].load, **load) for name in names}

    catvote = contestants["catvote"]
    stylesheet = re.search(r'/static/[^"]+\.css[^"]*', catvote.page())[0]
    found = {
        "page": of(*COLUMNS[:4]),
        "unchanged": {"catvote": catvote.unchanged},
        "file": of("catvote", path=stylesheet),
        "vote": of(*COLUMNS[:4], votes=10) | {"pgbench": catvote.bare_insert},
        "mix": of("catvote", "the Flask way", "the async way", votes=1),
        "half": {"catvote": catvote.half_load},
        "workers": of("catvote", "one worker"),
    }
    if votes:
        both = "catvote", "the Flask way", "catvote, full", "the Flask way, full"
        found["read"] = of(*both, path="/?voted=Pita", connections=1)
        found["write"] = of(*both, votes=10, connections=1)
    return found


def report(turns, votes, contestants):
    """Print what was measured, as Markdown. turns[measure][contestant] is a list with a Turn for each round."""

    def middle(measure, name):
        """Return the medians of a contestant's turns, None if it had none."""
        found = turns.get(measure, {}).get(name)
        return found and Turn(*map(median, zip(*found)))

    def ratio(measure, name, other, figure="rate"):
        """Return the median of the rounds' ratios of a figure of two contestants."""
        pairs = zip(turns[measure][name], turns[measure][other])
        return median(getattr(one, figure) / getattr(two, figure) for one, two in pairs)

    def row(label, cell, measure):
        if measure in turns:
            cells = [cell(measure, name) if middle(measure, name) else "" for name in COLUMNS]
            print("|".join(["", f" {label} ", *(f" {text} " for text in cells), ""]))

    def rate(measure, name):
        turn = middle(measure, name)
        return f"{turn.rate:,.0f} ({turn.server:.0f} + {turn.database:.0f})"

    def percentiles(measure, name):
        return "{0.p50:.1f}, {0.p99:.1f}".format(middle(measure, name))

    def growth(measure, name):
        return f"{middle(measure, name).p50:.2f}, {middle(measure, name + ', full').p50:.2f}"

    print("|".join(["", " ", *(f" {name} " for name in COLUMNS), ""]))
    print("|---|" + "--:|" * len(COLUMNS))
    row("`GET /`", rate, "page")
    row("`GET /`, 304", rate, "unchanged")
    row("a static file", rate, "file")
    row("`POST /add`", rate, "vote")
    row("nine `GET /` to one `POST /add`", rate, "mix")
    row("ms for one of these: p50, p99", percentiles, "mix")
    row("ms for `GET /` at half its rate: p50, p99", percentiles, "half")
    row(f"ms for `/?voted=Pita`: no votes, {votes:,}", growth, "read")
    row(f"ms for `POST /add`: no votes, {votes:,}", growth, "write")
    print("\nRequests a second (µs of CPU for one, service + PostgreSQL) unless it says ms.\n")

    if "workers" in turns:
        print(f"- two workers, for one: {ratio('workers', 'catvote', 'one worker'):.2f} times the pages, ", end="")
        print(
            f"{ratio('workers', 'catvote', 'one worker', 'server'):.2f} times the CPU a page, on {os.cpu_count()} cores"
        )
    _, *workers = processes(contestants["catvote"].process)[0]
    memory = [
        int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{worker}/smaps_rollup").read_text(), re.MULTILINE)[1])
        for worker in workers
    ]
    print(f"- memory of a worker: {median(memory) / 1024:.0f} MiB (PSS)")
    if votes:
        size = contestants["catvote, full"].sql("SELECT pg_total_relation_size('votes')") / votes
        print(f"- disk for a vote: {size:.0f} bytes, indexes included")
    print()

    goals = [
        ("page", "bare Bottle", 0.95),
        ("page", "the Flask way", 4.5),
        ("page", "the async way", 1.8),
        ("vote", "bare Bottle", 0.6),
        ("vote", "the Flask way", 3),
        ("vote", "the async way", 1),
        ("vote", "pgbench", 0.3),
        ("mix", "the async way", 1),
    ]
    labels = {"page": "`GET /`", "vote": "`POST /add`", "mix": "the mix"}
    verdicts = [
        (f"{labels[measure]}, times {other}", ">=", goal, ratio(measure, "catvote", other))
        for measure, other, goal in goals
        if measure in turns
    ]
    if "mix" in turns:
        verdicts.append(("the mix, p99 in ms", "<", 30, middle("mix", "catvote").p99))
    if "half" in turns:
        half = middle("half", "catvote")
        verdicts.append(("`GET /` at half its rate, p99 / p50", "<", 5, half.p99 / half.p50))
    for measure, label in ("read", "`/?voted=Pita`"), ("write", "`POST /add`"):
        if measure in turns:
            grown = ratio(measure, "catvote, full", "catvote", "p50")
            verdicts.append((f"{label} with {votes:,} votes, times that with none", "<=", 1.1, grown))
    for label, sign, goal, measured in verdicts:
        met = measured >= goal if sign == ">=" else measured <= goal
        print(f"- {label}: goal {sign} {goal}, measured {measured:.2f}: {'met' if met else 'NOT MET'}")


def main():
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two rounds of a second, 200,000 votes: to see that it works"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="MEASURE", help="page unchanged file vote mix half workers read write"
    )
    options = parser.parse_args()
    rounds, seconds, votes = (2, 1, 200_000) if options.quick else (7, 3, 10_000_000)
    if options.only and not {"read", "write"} & {*options.only}:
        votes = 0
    if not shutil.which("wrk"):
        sys.exit("wrk, which sends the requests, is not on this machine: apt-get install wrk")
    install()
    with as_command(), ExitStack() as stack:
        contestants = start_all(stack, votes)
        wanted = measures(contestants, votes)
        if options.only:
            wanted = {measure: wanted[measure] for measure in options.only}
        turns = {measure: {name: [] for name in names} for measure, names in wanted.items()}
        for number in range(rounds):
            print(f"Round {number + 1} of {rounds}", file=sys.stderr)
            for measure, names in wanted.items():
                for name, turn in names.items():
                    turns[measure][name].append(turn(seconds))
        report(turns, votes, contestants)


if __name__ == "__main__":
    main()
