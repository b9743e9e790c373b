"""`make bench`, from its contestants to its tables, in a few seconds. How fast anything is, is not judged here."""

import os
import re
import subprocess
import sys
from shutil import which

from bench.contestants import OTHERS
from conftest import missing
from local import ROOT

FIGURES = {
    r"[\d,]+ \(\d+ \+ \d+\)",  # requests a second, and their CPU
    r"[\d.]+, [\d.]+",  # milliseconds, or MiB
    r"\d+",  # connections
    r"[\d.]+ \([\d.]+ to [\d.]+\)(, CPU .*)?",  # a ratio
}
QUICK = ["--rounds=1", "--seconds=0.1", "--votes", "1000", "0", f"--beside={ROOT}"]


def test_it_prints_figures_and_ratios_of_all_contestants():
    if not which("wrk"):
        missing("no wrk: apt-get install wrk")
    command = [sys.executable, "-m", "bench", *QUICK]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "WEB_CONCURRENCY": "1"}
    bench = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert bench.returncode == 0, bench.stderr

    tables = [table.splitlines() for table in re.findall(r"(?m)(?:^\|.*\n)+", bench.stdout)]
    heads = [cells(head) for head, *_ in tables]
    assert [head[0] for head in heads] == ["", "catvote to", "", "catvote to", "", "1,000 votes to", "", "counted to"]
    assert heads[0] == ["", "catvote", "beside"]
    assert set(heads[2]) == {"", "catvote", *OTHERS, "pgbench"}
    figures = {cell for table in tables for row in table[2:] for cell in cells(row)[1:] if cell}
    assert [cell for cell in figures if not any(re.fullmatch(form, cell) for form in FIGURES)] == [], bench.stderr


def cells(row):
    """Return the cells of a table's row."""
    return [cell.strip() for cell in row.split("|")[1:-1]]
