"""A turn: a load program works on one contestant for a second or two; what it printed, and the CPU that all took."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from http.client import HTTPConnection
from math import nan
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from bench.contestants import FOLDER

CONNECTIONS = 16
POOLED = 8  # connections of catvote's two workers to the database, and of pgbench
VOTE = {"method": "POST", "url": "/add", "body": "vote=Gummi"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Turn(NamedTuple):
    """What a turn came to; a unit is a request, or a visit of several.

    rate -- units a second
    p50, p99 -- milliseconds for a request: half, 99 in 100 took no longer
    service, database -- microseconds of CPU for a unit
    unchanged -- requests of 100 that were answered 304
    failed -- whether a request failed, or none was answered in time: then there are no figures
    """

    rate: float = nan
    p50: float = nan
    p99: float = nan
    service: float = nan
    database: float = nan
    unchanged: float = nan
    failed: bool = False

    @property
    def cpu(self):
        return self.service + self.database

    @property
    def spread(self):
        return self.p99 / self.p50


def processes(master):
    """Return the ids of a process and all that descend from it, and the CPU seconds they have used (Linux only)."""
    ticks, children = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = file.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(file.parent.name))
            ticks[int(file.parent.name)] = sum(map(int, fields[11:15]))  # with children that have ended
    tree = [master.pid]
    for process in tree:
        tree += children.get(process, [])
    return tree, sum(ticks.get(process, 0) for process in tree) / os.sysconf("SC_CLK_TCK")


def run(command, *masters):
    """Run a load program; return what it printed, and the CPU seconds used meanwhile below each of these processes."""
    before = [processes(master)[1] for master in masters]
    program = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    after = [processes(master)[1] for master in masters]
    return program.stdout, [now - then for now, then in zip(after, before)]


@contextmanager
def a_vote_each_second(contestant):
    """Have somebody vote meanwhile, so that no contestant can keep a page for ever."""
    finished = Event()

    def vote():
        while not finished.wait(1):
            connection = HTTPConnection("127.0.0.1", contestant.port, timeout=30)
            connection.request(**VOTE, headers=FORM)
            connection.getresponse()
            connection.close()

    voter = Thread(target=vote)
    voter.start()
    try:
        yield
    finally:
        finished.set()
        voter.join()


def wrk(contestant, seconds, plan, unit=1, rest=0, connections=CONNECTIONS, votes=True):
    """Send requests for so many seconds; return the Turn.

    plan -- the requests, sent in turn again and again: see load.lua
    unit -- how many requests are counted as one
    rest -- milliseconds from an answer to the next request of its connection, on average
    votes -- whether somebody votes meanwhile, each second
    """
    contestant.empty()
    command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds}s", "--timeout=30s"]
    command += [f"--script={FOLDER}/load.lua", contestant.url, "--", rest, *plan]
    with a_vote_each_second(contestant) if votes else nullcontext():
        output, used = run(command, contestant.process, contestant.database.postgres.child_process)
    result = json.loads(output.splitlines()[-1])
    if result["failed"] or not result["requests"]:
        print(f"{result['failed']} of {result['requests']} requests failed, among {set(plan)}", file=sys.stderr)
        return Turn(failed=True)
    units = result["requests"] / unit
    cpu = [1e6 * seconds / units for seconds in used]
    unchanged = 100 * result["unchanged"] / result["requests"]
    return Turn(units / result["seconds"], result["p50"], result["p99"], *cpu, unchanged)


def half(contestant, seconds, plan):
    """Send half as many requests as the service bears; return the Turn."""
    bears = wrk(contestant, 1, plan)
    return bears if bears.failed else wrk(contestant, seconds, plan, rest=2000 * CONNECTIONS / bears.rate)


def first(contestant, path):
    """Start a service anew and ask for a path, once; return a Turn that knows only the time of it.

    Its page is asked for before, on the same connection: so neither connecting nor the start is part of the time.
    """
    contestant.empty()
    contestant.restart()
    connection = HTTPConnection("127.0.0.1", contestant.port, timeout=60)
    connection.request("GET", "/")
    connection.getresponse().read()
    begun = time.monotonic()
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    milliseconds = 1000 * (time.monotonic() - begun)
    connection.close()
    return Turn(failed=True) if answer.status != 200 else Turn(p50=milliseconds)


def pgbench(database, seconds):
    """Store votes for so many seconds with nothing between the load program and the database; return the Turn."""
    database.run("TRUNCATE votes")
    command = [database.postgres.bindir / "pgbench", "--no-vacuum", "--protocol=prepared", f"--client={POOLED}"]
    command += [f"--time={seconds}", f"--file={FOLDER}/vote.sql", "--define=vote=Pita", database.url]
    output, [used] = run(command, database.postgres.child_process)

    def figure(name):
        return float(re.search(rf"(?m)^{name}\W+([\d.]+)", output)[1])

    average, votes = figure("latency average"), figure("number of transactions actually processed")
    return Turn(figure("tps"), average, average, 0, 1e6 * used / votes)
