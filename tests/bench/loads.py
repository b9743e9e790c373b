"""A turn: a load works on one contestant for a second or two; what came of it, and the CPU that it took."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection
from math import ceil, nan
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
        return (self.service + self.database) or nan  # the system counts hundredths of a second


def cpu_seconds(master):
    """Return the CPU seconds that a process, and all that descend from it, have used so far."""
    parent = psutil.Process(master.pid)
    seconds = 0
    for process in [parent, *parent.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # it has just ended
            seconds += sum(process.cpu_times()[:4])  # with those of children that have ended
    return seconds


def wrk(contestant, seconds, requests, unit=1, connections=CONNECTIONS, rest=0):
    """Send requests in turn, again and again; return the Turn, None if one failed.

    requests -- see load.lua
    unit -- how many requests are counted as one
    rest -- milliseconds from an answer to the next request of its connection, on average
    """
    contestant.prepare()
    command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={ceil(seconds)}s", "--timeout=30s"]
    command += [f"--script={FOLDER}/load.lua", contestant.url, "--", rest, int(connections > 1), *requests]
    masters = contestant.process, contestant.database.postgres.child_process
    before = [cpu_seconds(master) for master in masters]
    result = json.loads(run_for(seconds, command).splitlines()[-1])
    used = [cpu_seconds(master) - then for master, then in zip(masters, before)]
    contestant.note_connections()
    polls_only = all(request.startswith("POLL") for request in requests)
    answered = result["unchanged"] if polls_only else result["requests"]
    if not answered and not result["failed"] and seconds < 5:  # too little time: a very short turn, or a busy machine
        return wrk(contestant, 2 * seconds, requests, unit, connections, rest)
    if not answered or result["failed"]:
        print(f"No figures for {sorted(set(requests))}: {result}", file=sys.stderr)
        return None
    units = result["requests"] / unit
    return Turn(units / result["seconds"], result["p50"], result["p99"], *(1e6 * seconds / units for seconds in used))


def run_for(seconds, command):
    """Run wrk; return what it printed. It knows whole seconds only, but Ctrl-C makes it stop earlier, and report."""
    ignore_it_first = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # while wrk does not handle it yet
    program = subprocess.Popen(map(str, command), stdout=subprocess.PIPE, text=True, preexec_fn=ignore_it_first)
    while True:
        try:
            return program.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            program.send_signal(signal.SIGINT)


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
    before = cpu_seconds(database.postgres.child_process)
    output = subprocess.run(command, check=True, capture_output=True, text=True, input=vote).stdout
    used = cpu_seconds(database.postgres.child_process) - before
    rate, latency, votes = (
        float(re.search(rf"(?m)^{name}\W+([\d.]+)", output)[1])
        for name in ("tps", "latency average", "number of transactions actually processed")
    )
    return Turn(rate, latency, latency, 0, 1e6 * used / votes)
