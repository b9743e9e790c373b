"""`make bench`, from its contestants to its tables, in a few seconds. How fast anything is, is not judged here."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from bench.contestants import OTHERS
from conftest import missing
from local import ROOT

QUICK = ["--rounds=1", "--seconds=0.05", "--rows", "POST /add", "GET /history", "a visit"]
FIGURES = [
    r"[\d,]+ \(\d+ \+ \d+\)",  # requests a second, and their CPU
    r"[\d.]+, [\d.]+",  # MiB
    r"\d+",  # connections
    r"[\d.]+ \([\d.]+ to [\d.]+\), CPU .*",  # a ratio
]


@pytest.fixture
def without_history(tmp_path):
    """The folder of another checkout, whose catvote has no /history."""
    for name in "gunicorn.conf.py", "schema.sql":
        shutil.copy(ROOT / name, tmp_path)
    for name in "views", "static":
        shutil.copytree(ROOT / name, tmp_path / name)
    module = (ROOT / "catvote.py").read_text()
    assert '"/history"' in module
    (tmp_path / "catvote.py").write_text(module.replace('"/history"', '"/nothing"'))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def test_it_prints_figures_and_ratios_of_all_contestants_but_for_requests_that_fail(without_history):
    if not shutil.which("wrk"):
        missing("no wrk: apt-get install wrk")
    command = [sys.executable, "-m", "bench", *QUICK, f"--beside={without_history}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "WEB_CONCURRENCY": "1"}
    bench = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert bench.returncode == 0, bench.stderr

    table, ratios = [list(map(cells, text.splitlines())) for text in re.findall(r"(?m)(?:^\|.*\n)+", bench.stdout)]
    assert sorted(table[0]) == sorted(["", "catvote", "beside", *OTHERS, "pgbench"])
    assert ratios[0] == ["catvote to", *table[0][2:]]
    no_figures = {
        (row[0], column): cell
        for head, _, *rows in (table, ratios)
        for row in rows
        for column, cell in zip(head[1:], row[1:])
        if cell and not any(re.fullmatch(form, cell) for form in FIGURES)
    }
    assert no_figures == {("GET /history", "beside"): "fails"}, bench.stderr


def cells(row):
    """Return the cells of a table's row."""
    return [cell.strip() for cell in row.split("|")[1:-1]]
