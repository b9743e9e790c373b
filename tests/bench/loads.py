"""A turn: a load works on one contestant for a second or two; what came of it, and the CPU that it took."""

import json
import re
import subprocess
import time
from contextlib import suppress
from http.client import HTTPConnection
from math import nan
from typing import NamedTuple

import psutil

from bench.contestants import FOLDER

CONNECTIONS = 16
POOLED = 6  # of pgbench: as many as catvote's two workers may have


class Turn(NamedTuple):
    """What a turn came to; a unit is a request, or a visit of several. Without one, requests failed.

    rate -- units a second
    p50, p99 -- milliseconds for a request: half, 99 in 100 took no longer
    service, database -- microseconds of CPU for a unit
    """

    rate: float = nan
    p50: float = nan
    p99: float = nan
    service: float = nan
    database: float = nan

    @property
    def cpu(self):
        return self.service + self.database


def cpu_seconds(masters):
    """Return the CPU seconds that processes, and all that descend from them, have used so far."""
    seconds = 0
    for master in masters:
        parent = psutil.Process(master.pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                seconds += sum(process.cpu_times()[:4])  # with those of children that have ended
    return seconds


def run(command, *groups, **options):
    """Run a load program; return what it printed, and the CPU seconds that each group of processes used meanwhile."""
    before = [cpu_seconds(group) for group in groups]
    program = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, **options)
    return program.stdout, [cpu_seconds(group) - then for group, then in zip(groups, before)]


def wrk(contestant, seconds, requests, unit=1, connections=CONNECTIONS, rest=0):
    """Send requests in turn, again and again; return the Turn, None if one failed.

    requests -- see load.lua
    unit -- how many requests are counted as one
    rest -- milliseconds from an answer to the next request of its connection, on average
    """
    contestant.prepare()
    # wrk knows whole seconds only; Ctrl-C makes it stop and report.
    command = ["timeout", "--preserve-status", "--signal=INT", seconds, "wrk", "--duration=1h", "--timeout=30s"]
    command += ["--threads=1", f"--connections={connections}", f"--script={FOLDER}/load.lua", contestant.url]
    database = contestant.database.postgres.child_process
    output, used = run([*command, "--", rest, int(connections > 1), *requests], contestant.masters, [database])
    contestant.note_connections()
    result = json.loads(output.splitlines()[-1])
    all_polls = all(request.startswith("POLL") for request in requests)
    if result["failed"] or not result["requests"] or (all_polls and not result["unchanged"]):
        return None
    units = result["requests"] / unit
    cpu = [1e6 * seconds / units for seconds in used]
    return Turn(units / result["seconds"], result["p50"], result["p99"], *cpu)


def half(contestant, seconds, requests):
    """Send half as many requests as the service bears; return the Turn, None if one failed."""
    bears = wrk(contestant, seconds / 2, requests)
    return bears and wrk(contestant, seconds, requests, rest=2000 * CONNECTIONS / bears.rate)


def first(contestant, path):
    """Start a service anew and ask for a path, once; return a Turn that knows only the time of it, None if it failed.

    Its page is asked for before, on the same connection: so neither connecting nor the start is part of the time.
    """
    contestant.prepare()
    contestant.restart()
    connection = HTTPConnection("127.0.0.1", contestant.port, timeout=60)
    for asked in "/", path:
        begun = time.monotonic()
        connection.request("GET", asked)
        answer = connection.getresponse()
        answer.read()
    milliseconds = 1000 * (time.monotonic() - begun)
    connection.close()
    return Turn(p50=milliseconds, p99=milliseconds) if answer.status == 200 else None


def pgbench(database, seconds):
    """Store votes with nothing between the load program and the database; return the Turn."""
    command = [database.postgres.bindir / "pgbench", "--no-vacuum", "--protocol=prepared", f"--client={POOLED}"]
    command += [f"--time={max(1, round(seconds))}", "--file=-", database.url]
    vote = "INSERT INTO public.votes (vote) VALUES ('Pita')"
    output, [used] = run(command, [database.postgres.child_process], input=vote, stderr=subprocess.DEVNULL)
    rate, latency, votes = (
        float(re.search(rf"(?m)^{name}\W+([\d.]+)", output)[1])
        for name in ("tps", "latency average", "number of transactions actually processed")
    )
    return Turn(rate, latency, latency, 0, 1e6 * used / votes)
