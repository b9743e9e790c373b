"""How much the service bears, beside other ways to write it: prints the tables that tests/README.md shows.

    python -m bench [--quick] [--only MEASURE ...]

All contestants run at once and take turns of two seconds, round after round: so a busy moment of the machine hits each
of them. Rates are medians of the rounds, comparisons medians of the ratios within a round, with the range of the rounds.
"""

import argparse
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from local.postgres import LocalPostgres, as_command

from bench.contestants import install
from bench.measures import MEASURES, start
from bench.report import report


def main():
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of a second, few votes: to see that it works")
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="MEASURE", help=" ".join(MEASURES)
    )
    options = parser.parse_args()
    rounds, seconds, sizes = (2, 1, (0, 10_000, 100_000)) if options.quick else (7, 2, (0, 1_000_000, 10_000_000))
    if not shutil.which("wrk"):
        sys.exit("wrk, which sends the requests, is not on this machine: apt-get install wrk")
    install()
    with as_command(), ExitStack() as stack:
        pages = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(LocalPostgres(durable=True))
        measures, catvote = start(stack, postgres, pages, set(options.only), sizes, seconds)
        turns = {measure: {column: [] for column in columns} for measure, columns in measures.items()}
        for number in range(rounds):
            print(f"Round {number + 1} of {rounds}", file=sys.stderr)
            for measure, columns in measures.items():
                for column, turn in columns.items():
                    turns[measure][column].append(turn())
        report(turns, catvote)


if __name__ == "__main__":
    main()
