"""What nginx in front gains and costs: prints the tables that README.md here shows.

    python -m scale.compare

One service alone, with two workers, and two behind nginx, with one each, take turns of two seconds, on one machine and
one database. Figures are medians of the rounds, ratios medians of those within a round.
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from statistics import median
from typing import NamedTuple

from bench.turns import FOLDER, run
from local.postgres import LocalPostgres, apply_schema, as_command
from local.service import Service
from scale.nginx import Nginx, find_program

ROUNDS, SECONDS, CONNECTIONS = 5, 2, 16
# What its row of the table is called, and the requests that load.lua is to send.
MEASURES = {
    "pages, `GET /`": "GET /",
    "polls, `/tally.json` with its tag": "POLL /tally.json",
    "votes, `POST /add`": "POST /add",
}
# All votes come from one address here.
NO_LIMIT = {"rate=10r/s": "rate=1000000r/s", "burst=100 ": "burst=1000000 "}
OPEN_PAGES = (500, 1000, 2000, 4000, 8000)
POLLED_EVERY = 2  # seconds, as catvote.js does
OPEN_SECONDS = 10


class Turn(NamedTuple):
    """What a turn came to.

    rate -- answers a second
    p99 -- milliseconds that 99 of 100 answers took at most
    cpu -- microseconds of CPU for an answer: of nginx, services and PostgreSQL
    failed -- requests without an answer, or with an error
    """

    rate: float
    p99: float
    cpu: float
    failed: int


def turn(url, masters, plan, seconds=SECONDS, connections=CONNECTIONS, rest=0):
    """Send requests to a URL for so many seconds; return the Turn.

    masters -- the processes that, with all below them, do the work
    plan -- the requests, sent in turn: see load.lua
    rest -- milliseconds from an answer to the next request on its connection, on average
    """
    command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds}s", "--timeout=30s"]
    printed, used = run([*command, f"--script={FOLDER}/load.lua", url, "--", rest, *plan], *masters)
    result = json.loads(printed.splitlines()[-1])
    requests = max(result["requests"], 1)
    return Turn(result["requests"] / result["seconds"], result["p99"], 1e6 * sum(used) / requests, result["failed"])


def compare_rates(ways):
    """Print what a second and an answer cost; `ways` are the URL and processes, alone and behind nginx."""
    print("| | alone | behind nginx | ratio (rounds) | CPU alone | CPU behind nginx |")
    print("|---|--:|--:|--:|--:|--:|")
    for label, request in MEASURES.items():
        rounds = [[turn(*way, [request]) for way in ways] for _ in range(ROUNDS)]
        alone, behind = (Turn(*map(median, zip(*turns))) for turns in zip(*rounds))
        if any(turn.failed for turns in rounds for turn in turns):
            raise RuntimeError(f"Requests failed: {label}")
        ratios = [with_nginx.rate / without.rate for without, with_nginx in rounds]
        print(
            f"| {label} | {alone.rate:,.0f} | {behind.rate:,.0f} "
            f"| {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {alone.cpu:.0f} | {behind.cpu:.0f} |"
        )
    print("\nAnswers a second; microseconds of CPU for one, of nginx, services and PostgreSQL together.\n")


def compare_open_pages(ways):
    """Print for numbers of open pages whether each way bears them, and what they take."""
    print("| open pages | asked a second | alone | behind nginx |")
    print("|--:|--:|---|---|")
    for pages in OPEN_PAGES:
        wanted = pages / POLLED_EVERY
        cells = []
        for way in ways:
            borne = turn(*way, ["POLL /tally.json"], OPEN_SECONDS, pages, 1000 * POLLED_EVERY)
            answered = f"{100 * borne.rate / wanted:.0f} %, 99 of 100 within {borne.p99:.0f} ms, {borne.failed} failed"
            cells.append(f"{answered}; {1e6 * POLLED_EVERY / borne.cpu:,.0f} a core")
            time.sleep(1)
        print(f"| {pages:,} | {wanted:,.0f} | {cells[0]} | {cells[1]} |", flush=True)


def main():
    """Measure, and print the tables."""
    with as_command(), ExitStack() as stack:
        find_program("wrk")
        postgres = stack.enter_context(LocalPostgres(durable=True))
        apply_schema(postgres.url())
        alone = stack.enter_context(Service(postgres.url(), WEB_CONCURRENCY="2"))
        first, second = (stack.enter_context(Service(postgres.url(), WEB_CONCURRENCY="1")) for _ in range(2))
        nginx = stack.enter_context(Nginx(first, second, replace=NO_LIMIT))
        database = postgres.child_process
        ways = [(alone.url, [alone.process, database])]
        ways += [(nginx.url, [nginx.process, first.process, second.process, database])]
        print(f"{os.cpu_count()} cores for everything, the load program included.\n", file=sys.stderr)
        compare_rates(ways)
        compare_open_pages(ways)


if __name__ == "__main__":
    main()
