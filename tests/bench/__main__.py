"""How much the service bears, beside other ways to write it and beside another checkout of itself.

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

from bench.comparisons import COMPARISONS
from bench.report import print_comparison


def main():
    """Measure, and print the tables."""
    options = read_options()
    with as_command(), ExitStack() as stack:
        if not which("wrk"):
            raise RuntimeError("wrk, which sends the requests, is not installed: apt-get install wrk")
        options.pages = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(LocalPostgres(durable=True))
        comparisons = [COMPARISONS[name](stack, postgres, options) for name in options.only]
        for number in range(options.rounds):
            print(f"Round {number + 1} of {options.rounds}", file=sys.stderr)
            for comparison in comparisons:
                comparison.take_turns(backwards=number % 2 == 1)
        for comparison in comparisons:
            print_comparison(comparison)


def read_options():
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout, in which make install was run")
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, help="some of the comparisons; else all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2, help="how long a turn takes; default 2")
    parser.add_argument("--votes", type=int, nargs="+", default=[0, 1_000_000, 10_000_000], help="stored, for growth")
    options = parser.parse_args()
    if not options.only:
        options.only = [name for name in COMPARISONS if name != "beside" or options.beside]
    installed = options.beside and (options.beside / ".venv/bin/gunicorn").exists()
    if "beside" in options.only and not installed:
        parser.error("--beside needs the folder of another checkout, in which make install was run")
    return options


if __name__ == "__main__":
    main()
