"""A comparison as Markdown: a table of what was measured, and one of the ratios."""

from statistics import median

import psutil

from bench.comparisons import GOALS
from bench.loads import Turn


def print_comparison(comparison):
    """Print what was measured in each column, then how the first one compares with each of the others."""
    columns, timed = comparison.columns, comparison.timed
    print(f"## {comparison.title}\n")
    print_head("", columns)
    for row, turns in comparison.turns.items():
        print_row(row, [figures(turns[column], timed) if column in turns else "" for column in columns])
    for row, describe in {"MiB of a worker, of all": memory, "connections": connections}.items():
        if comparison.contestants:
            contestants = map(comparison.contestants.get, columns)
            print_row(row, [describe(contestant) if contestant else "" for contestant in contestants])
    figures_are = (
        "Milliseconds for a request: half of them, and 99 in 100, took no longer."
        if timed
        else "How many there were a second (microseconds of CPU for one: service + PostgreSQL)."
    )
    print(f"\n{figures_are} Medians of the rounds.\n")

    first, *others = columns
    print_head(f"{first} to", others)
    for row, turns in comparison.turns.items():
        compared = [other for other in others if other in turns]
        if compared:
            cells = {other: ratio(turns[first], turns[other], timed, GOALS.get((row, other))) for other in compared}
            print_row(row, [cells.get(other, "") for other in others])
    print("\nHow many times as good by the clock and by CPU (lowest to highest of the rounds).\n")


def print_head(corner, columns):
    print_row(corner, columns)
    print("|---" + "|--:" * len(columns) + "|")


def print_row(label, cells):
    print("| " + " | ".join([label, *cells]) + " |", flush=True)


def figures(rounds, timed):
    """Return what the rounds came to."""
    if None in rounds:
        return "fails"
    middle = Turn(*map(median, zip(*rounds)))
    if timed:
        return f"{middle.p50:.2f}, {middle.p99:.2f}"
    return f"{middle.rate:,.0f} ({middle.service:.0f} + {middle.database:.0f})"


def ratio(ours, theirs, timed, goal):
    """Return how many times as good the one rounds are as the others, and whether that is good enough.

    Where the rounds fall on both sides of the goal by the clock, CPU decides.
    """
    pairs = list(zip(ours, theirs))
    if None in ours + theirs:
        return "fails"
    if timed:
        return spread([their.p50 / our.p50 for our, their in pairs])
    by_clock = [our.rate / their.rate for our, their in pairs]
    by_cpu = [their.cpu / our.cpu for our, their in pairs]
    text = f"{spread(by_clock)}, CPU {spread(by_cpu)}"
    if not goal:
        return text
    agreed = len({figure >= goal for figure in by_clock}) == 1
    met = median(by_clock if agreed else by_cpu) >= goal
    return f"{text}: {'met' if met else 'NOT MET'}, at least {goal}"


def spread(ratios):
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def memory(contestant):
    """Return the MiB of the largest process of a service, and of all; pages that several share count in part (PSS)."""
    master = psutil.Process(contestant.process.pid)
    sizes = [process.memory_full_info().pss / 2**20 for process in (master, *master.children(recursive=True))]
    return f"{max(sizes):.1f}, {sum(sizes):.1f}"


def connections(contestant):
    """Return the most connections to the database that there were."""
    return str(contestant.most_connections)
