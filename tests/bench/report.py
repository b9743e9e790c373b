"""The outcome as Markdown: a table of the contestants, one of the growth, one of the goals.

Throughout, turns[measure][column] is a list with a Turn for each round.
"""

import os
import re
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.measures import COLUMNS, COMPARED, GROWN
from bench.turns import CONNECTIONS, processes

# measure, the other contestant, how many times as fast catvote should be
FASTER = [
    ("page", "bare Bottle", 1.0),
    ("tally", "bare Bottle", 1.0),
    ("poll", "bare Bottle", 1.0),
    ("history", "bare Bottle", 0.8),
    ("vote", "without database", 0.6),
    ("vote", "bare Bottle", 0.6),
    ("page", "the Flask way", 4.5),
    ("vote", "the Flask way", 3),
    ("visit", "the Flask way", 4),
    ("page", "the async way", 1.8),
    ("vote", "the async way", 1),
    ("mix", "the async way", 1.8),
    ("visit", "the async way", 1.8),
    ("vote", "pgbench", 0.3),
]
# measure, how many times as long it may take with the most votes as with none; the history of none is a shorter page,
# so it is compared with fewer votes, too
STEADY = [("page-grown", 1.1), ("vote-grown", 1.1), ("history-first", 2), ("history-later", 1.1)]
FIRST_HISTORY = 50  # milliseconds for the first with the most votes
MIX_P99 = 30  # milliseconds
HALF_SPREAD = 5  # p99 / p50
HOURS_COST = 1.1  # times PostgreSQL's CPU


class Goal(NamedTuple):
    """A goal, and what was measured of it in each round; nothing, if a request failed.

    sign -- ">=" or "<="
    measured -- by the clock, unless that tells nothing
    by_cpu -- the same by CPU, if that tells something
    """

    label: str
    sign: str
    bound: float
    measured: list
    by_cpu: list

    def holds(self, figure):
        return figure >= self.bound if self.sign == ">=" else figure <= self.bound

    @property
    def verdict(self):
        """met or NOT MET, by the clock; if the rounds disagree about that, by the CPU."""
        figures, suffix = self.measured or self.by_cpu, ""
        if self.measured and self.by_cpu and len({self.holds(figure) for figure in self.measured}) == 2:
            figures, suffix = self.by_cpu, " by CPU"
        if not figures:
            return "NOT MET: requests failed"
        return ("met" if self.holds(median(figures)) else "NOT MET") + suffix


def values(rounds, figure):
    """Return a figure of each round, as a Turn calls it; nothing, if a request failed."""
    return [] if any(turn.failed for turn in rounds) else [getattr(turn, figure) for turn in rounds]


def ratios(turns, measure, one, other, figure):
    """Return for each round a figure of one column, as a Turn calls it, divided by that of the other.

    Nothing, if a request failed.
    """
    ours, theirs = values(turns[measure][one], figure), values(turns[measure][other], figure)
    return [first / second for first, second in zip(ours, theirs)]


def goals_of(turns):
    """Yield the goals of what was measured."""
    for measure, other, bound in FASTER:
        if measure in turns:
            faster = ratios(turns, measure, "catvote", other, "rate")
            cheaper = ratios(turns, measure, other, "catvote", "cpu")
            yield Goal(f"{COMPARED[measure]}: times as many as {other}", ">=", bound, faster, cheaper)
    for measure, bound in STEADY:
        if measure in turns:
            none, fewer, most = turns[measure]
            for size in (none, fewer) if "history" in measure else (none,):
                longer = ratios(turns, measure, most, size, "p50")
                dearer = [] if measure == "history-first" else ratios(turns, measure, most, size, "cpu")
                yield Goal(f"{GROWN[measure]}: time with {most:,} votes to {size:,}", "<=", bound, longer, dearer)
    if "history-first" in turns:
        most = max(turns["history-first"])
        times = values(turns["history-first"][most], "p50")
        yield Goal(f"{GROWN['history-first']}: milliseconds with {most:,} votes", "<=", FIRST_HISTORY, times, [])
    if "hours" in turns:
        dearer = ratios(turns, "hours", "with hours", "without hours", "cpu")
        yield Goal("a vote: PostgreSQL's CPU with the hours, times that without", "<=", HOURS_COST, [], dearer)
    if "mix" in turns:
        times = values(turns["mix"]["catvote"], "p99")
        yield Goal(f"{COMPARED['mix']}: p99 in milliseconds", "<=", MIX_P99, times, [])
    if "half" in turns:
        spreads = values(turns["half"]["catvote"], "spread")
        yield Goal(f"{COMPARED['half']}: p99 / p50", "<=", HALF_SPREAD, spreads, [])


def print_row(*cells):
    print("|".join(["", *(f" {cell} " for cell in cells), ""]))


def print_head(*cells):
    print_row("", *cells)
    print("|---|" + "--:|" * len(cells))


def spread(figures):
    """Return the median of figures with the range of the rounds, for people."""
    if not figures:
        return ""
    return f"{median(figures):.2f} ({min(figures):.2f} to {max(figures):.2f})"


def middle(rounds, figure):
    """Return the median of a figure, as a Turn calls it."""
    return median(getattr(turn, figure) for turn in rounds)


def compared_cell(measure, rounds):
    """Return what a contestant's rounds came to."""
    if not rounds:
        return ""
    if any(turn.failed for turn in rounds):
        return "fails"
    if measure == "half":
        return f"p50 {middle(rounds, 'p50'):.1f} ms, p99 {middle(rounds, 'p99'):.1f} ms"
    service, database = middle(rounds, "service"), middle(rounds, "database")
    return f"{middle(rounds, 'rate'):,.0f} ({service:.0f} + {database:.0f})"


def grown_cell(rounds):
    """Return how long one visitor waited, in the middle of the rounds."""
    return "fails" if any(turn.failed for turn in rounds) else f"{middle(rounds, 'p50'):.2f} ms"


def print_compared(turns):
    """Print the contestants beside each other."""
    measures = [measure for measure in COMPARED if measure in turns]
    if not measures:
        return
    print_head(*COLUMNS)
    for measure in measures:
        print_row(COMPARED[measure], *(compared_cell(measure, turns[measure].get(name)) for name in COLUMNS))
    print("\nRequests, votes or visits a second (microseconds of CPU for one: service + PostgreSQL): medians of the")
    print(
        f"rounds. {CONNECTIONS} connections; {os.cpu_count()} cores for the service, PostgreSQL and the load program."
    )
    if "poll" in turns:
        unchanged = [f"{name} {middle(rounds, 'unchanged'):.1f} %" for name, rounds in turns["poll"].items()]
        print("Of the requests with the tally's tag these got a 304: " + ", ".join(unchanged) + ".")
    print()


def print_grown(turns):
    """Print how long one visitor waits with ever more votes stored."""
    measures = [measure for measure in GROWN if measure in turns]
    if not measures:
        return
    print_head(*(f"{size:,} votes" for size in turns[measures[0]]))
    for measure in measures:
        print_row(GROWN[measure], *(grown_cell(rounds) for rounds in turns[measure].values()))
    print("\nHalf of the requests of one visitor took no longer, with so many votes of the last 29 days stored;")
    print("first: when the service has just started.\n")


def print_goals(turns):
    """Print which goals are met."""
    print_head("goal", "by the clock", "by CPU", "")
    for goal in goals_of(turns):
        sign = {">=": "at least", "<=": "at most"}[goal.sign]
        print_row(goal.label, f"{sign} {goal.bound}", spread(goal.measured), spread(goal.by_cpu), goal.verdict)
    print("\nMedians of the ratios within a round (lowest to highest of the rounds). Where the rounds fall on both")
    print("sides of a goal by the clock, CPU decides.\n")


def print_facts(turns, catvote):
    """Print what else the README tells. Ends with the votes of catvote's last turn replaced by others."""
    if "page" in turns:
        more = ratios(turns, "page", "catvote", "catvote, one worker", "rate")
        print(f"- Two workers answer {spread(more)} times as many `GET /` as one.")
    _, *workers = processes(catvote.process)[0]
    memory = [re.search(r"Pss:\s+(\d+)", Path(f"/proc/{worker}/smaps_rollup").read_text())[1] for worker in workers]
    print(f"- A worker takes {median(map(int, memory)) / 1024:.0f} MiB of memory (PSS).")
    votes = 100_000
    catvote.database.run("TRUNCATE votes")
    catvote.database.fill("votes", votes)
    size = catvote.database.run("SELECT pg_total_relation_size('votes')")
    print(f"- A vote takes {size / votes:.0f} bytes of disk, indexes included.")


def report(turns, catvote):
    """Print all that was measured."""
    print_compared(turns)
    print_grown(turns)
    print_goals(turns)
    print_facts(turns, catvote)
