"""How much the service bears, compared with other ways to write it and with another checkout of itself.

All contestants run at once and take turns, round after round, so that a busy moment of the machine hits each of them.
Figures are medians of the rounds; ratios are medians of the ratios within a round, with the range of the rounds.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from shutil import which

from local.postgres import LocalPostgres
from local.processes import as_command

from bench.contestants import OTHERS, catvote, other, save_pages
from bench.loads import ROWS, measures
from bench.report import print_tables


def main():
    """Measure, and print the tables."""
    options = read_options()
    with as_command(), ExitStack() as stack:
        if not which("wrk"):
            raise RuntimeError("wrk, which sends the requests, is not installed: apt-get install wrk")
        pages = stack.enter_context(tempfile.TemporaryDirectory())
        postgres = stack.enter_context(LocalPostgres(durable=True))
        contestants = {"catvote": stack.enter_context(catvote(postgres, "catvote", options.votes))}
        save_pages(contestants["catvote"], pages)
        if "beside" in options.only:
            theirs = catvote(postgres, "beside", options.votes, options.beside.resolve())
            contestants["beside"] = stack.enter_context(theirs)
        for number, way in enumerate(OTHERS):
            if way in options.only:
                contestants[way] = stack.enter_context(other(postgres, f"other_{number}", way, pages, options.votes))
        print_tables(contestants, take_turns(measures(contestants, options), options))


def take_turns(rows, options):
    """Measure everything, round after round; return {row: {column: what its measure returned in each round}}."""
    turns = {row: {column: [] for column in columns} for row, columns in rows.items()}
    for number in range(options.rounds):
        print(f"Round {number + 1} of {options.rounds}", file=sys.stderr)
        for row, columns in rows.items():
            # Every other round backwards, so that nobody always comes first.
            for column in reversed(columns) if number % 2 else columns:
                turns[row][column].append(columns[column](options.seconds))
    return turns


def read_options():
    """Return what the command line says."""
    columns = ["beside", *OTHERS, "pgbench"]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout, in which make install was run")
    parser.add_argument("--only", nargs="+", choices=columns, help="compare catvote with some of these; else with all")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help="some of the rows; else all"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2, help="how long a turn takes; default 2")
    parser.add_argument(
        "--votes", type=int, help="stored beforehand; default 10,000 for catvote, none for the two ways that count them"
    )
    options = parser.parse_args()
    options.only = options.only or (columns if options.beside else columns[1:])
    installed = options.beside and (options.beside / ".venv/bin/gunicorn").exists()
    if "beside" in options.only and not installed:
        parser.error("--beside needs the folder of another checkout, in which make install was run")
    return options


if __name__ == "__main__":
    main()
