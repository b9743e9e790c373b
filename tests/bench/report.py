"""The two tables, as Markdown: of what was measured, and of the ratios."""

from statistics import median

import psutil

from bench.loads import Turn


def print_tables(contestants, turns):
    """Print what was measured in each column, then how the first one compares with each of the others."""
    first, *others = columns = list(dict.fromkeys(column for row in turns.values() for column in row))
    print_head("", columns)
    for row, rounds in turns.items():
        print_row(row, columns, {column: figures(rounds[column]) for column in rounds})
    for row, describe in {"MiB of a worker, of all": memory, "connections": connections}.items():
        print_row(row, columns, {column: describe(contestant) for column, contestant in contestants.items()})
    print(
        "\nHow many there were a second (microseconds of CPU for one: service + PostgreSQL). Medians of the rounds.\n"
    )

    print_head(f"{first} to", others)
    for row, rounds in turns.items():
        print_row(row, others, {column: ratio(rounds[first], rounds[column]) for column in rounds})
    print("\nHow many times as good by the clock and by CPU (lowest to highest of the rounds).")


def print_head(corner, columns):
    print_row(corner, columns, {column: column for column in columns})
    print("|---" + "|--:" * len(columns) + "|")


def print_row(label, columns, cells):
    print("| " + " | ".join([label, *(cells.get(column, "") for column in columns)]) + " |", flush=True)


def figures(rounds):
    """Return what the rounds came to."""
    if None in rounds:
        return "fails"
    middle = Turn(*map(median, zip(*rounds)))
    return f"{middle.rate:,.0f} ({middle.service:.0f} + {middle.database:.0f})"


def ratio(ours, theirs):
    """Return how many times as good the one rounds are as the others."""
    if None in ours + theirs:
        return "fails"
    by_clock = [our.rate / their.rate for our, their in zip(ours, theirs)]
    by_cpu = [their.cpu / our.cpu for our, their in zip(ours, theirs)]
    return f"{spread(by_clock)}, CPU {spread(by_cpu)}"


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
