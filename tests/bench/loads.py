"""What is measured: each load works on one contestant for a second or two, its turn."""

import json
import re
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from math import ceil, nan
from pathlib import Path
from typing import NamedTuple

import psutil

from bench.contestants import FOLDER

CONNECTIONS = 16
POOLED = 6  # of pgbench: as many as catvote's two workers may have

THREE_WAYS = ["catvote", "the Flask way", "the async way"]
FOUR_WAYS = [*THREE_WAYS, "bare Bottle"]


def loads(stylesheet, *other_files):
    """Return {row: (requests that are sent in turn, again and again; columns that have this row)}."""
    files = [f"GET {file}" for file in (stylesheet, *other_files)]
    visit = ["GET /", *files, "POST /add", "GET /?voted=Pita", *["POLL /tally.json"] * 10]
    return {
        "GET /": (["GET /"], [*FOUR_WAYS, "beside"]),
        "GET /?voted=Pita": (["GET /?voted=Pita"], [*THREE_WAYS, "beside"]),
        "the stylesheet": (files[:1], FOUR_WAYS),
        "GET /tally.json": (["GET /tally.json"], [*FOUR_WAYS, "beside"]),
        "GET /tally.json, with its tag": (["POLL /tally.json"], THREE_WAYS),
        "GET /history": (["GET /history"], ["catvote", "bare Bottle", "beside"]),
        "POST /add": (["POST /add"], [*FOUR_WAYS, "without database", "beside"]),
        "nine GET / and one POST /add": ([*["GET /"] * 9, "POST /add"], THREE_WAYS),
        "a visit": (visit, [*THREE_WAYS, "beside"]),
    }


ROWS = list(loads("stylesheet"))


def measures(contestants, options):
    """Return {row: {column: function of the seconds that returns a Turn, or None if requests failed}}."""
    rows = {}
    for column, contestant in contestants.items():
        for row, (requests, columns) in loads(*contestant.files()).items():
            if column in columns and row in options.rows:
                rows.setdefault(row, {})[column] = partial(wrk, contestant, requests)
    if "pgbench" in options.only and "POST /add" in rows:
        rows["POST /add"]["pgbench"] = partial(pgbench, contestants["catvote"])
    return {row: columns for row, columns in rows.items() if len(columns) > 1}


class Turn(NamedTuple):
    """What a turn came to; a unit is a request, or several that belong together, such as a visit.

    rate -- units a second
    service, database -- microseconds of CPU for a unit
    """

    rate: float
    service: float
    database: float

    @property
    def cpu(self):
        return (self.service + self.database) or nan  # the system counts hundredths of a second


def wrk(contestant, requests, seconds):
    """Send requests (see load.lua) in turn, again and again; return the Turn, with all of them as its unit."""
    command = ["wrk", "--threads=1", f"--connections={CONNECTIONS}", f"--duration={ceil(seconds)}s", "--timeout=30s"]
    command += [f"--script={FOLDER}/load.lua", contestant.url, "--", *requests]
    contestant.begin_turn()
    before = cpu_seconds(contestant)
    result = json.loads(run_for(seconds, command).splitlines()[-1])
    used = [after - then for after, then in zip(cpu_seconds(contestant), before)]
    contestant.end_turn()
    polls_only = all(request.startswith("POLL") for request in requests)
    answered = result["unchanged"] if polls_only else result["requests"]
    if not answered and not result["failed"] and seconds < 5:  # too little time: a very short turn, or a busy machine
        return wrk(contestant, requests, 2 * seconds)
    if not answered or result["failed"]:
        print(f"No figures for {sorted(set(requests))}: {result}", file=sys.stderr)
        return None
    units = result["requests"] / len(requests)
    return Turn(units / result["seconds"], *(1e6 * seconds / units for seconds in used))


def run_for(seconds, command):
    """Run wrk; return what it printed. It knows whole seconds only, but Ctrl-C makes it stop earlier, and report."""
    ignore_it_first = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # while wrk does not handle it yet
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=ignore_it_first)
    while True:
        try:
            return program.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            program.send_signal(signal.SIGINT)


def pgbench(contestant, seconds):
    """Store votes with nothing between the load program and catvote's database; return the Turn."""
    command = [contestant.postgres.bindir / "pgbench", "--no-vacuum", "--protocol=prepared", f"--client={POOLED}"]
    command += [f"--time={ceil(seconds)}", "--file=-", contestant.database]
    _, before = cpu_seconds(contestant)
    vote = "INSERT INTO public.votes (vote) VALUES ('Pita')"
    output = subprocess.run(command, check=True, capture_output=True, text=True, input=vote).stdout
    _, after = cpu_seconds(contestant)
    rate, votes = (
        float(re.search(rf"(?m)^{name}\W+([\d.]+)", output)[1])
        for name in ("tps", "number of transactions actually processed")
    )
    return Turn(rate, 0, 1e6 * (after - before) / votes)


def cpu_seconds(contestant):
    """Return the CPU seconds that the processes of a service, and those of its PostgreSQL, have used so far."""
    return [seconds_of_family(master.pid) for master in (contestant.process, contestant.postgres.child_process)]


def seconds_of_family(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()  # psutil would look at all processes there are
    seconds = 0
    for each in pid, *children.split():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            seconds += sum(psutil.Process(int(each)).cpu_times()[:4])  # with those of children that have ended
    return seconds
