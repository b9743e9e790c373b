"""Visitors by the dozen, who vote and look at pages over connections that they keep, and the log of what they got."""

import time
from bisect import bisect
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection, HTTPException
from itertools import cycle
from random import Random
from threading import Event, Thread
from urllib.parse import urlencode

from client import Answer
from faults import backends, most_at_once, sql
from local.processes import wait_until

CATS = ("Gummi", "Pita")


@dataclass(frozen=True)
class Visit(Answer):
    """An answer, and what was asked for; moments are those of time.monotonic().

    status -- 0 if no answer came, -1 if there was no connection either
    cat -- whom it votes for; empty if it only looks at a page
    kept -- an earlier request had used its connection
    """

    path: str
    cat: str
    kept: bool
    sent_at: float
    ended_at: float

    @property
    def seconds(self):
        return self.ended_at - self.sent_at

    @property
    def total(self):
        """The sum of the counts on the page."""
        return sum(self.votes.values())


class Load:
    """Visitors who go on until the context manager ends.

    services -- those to visit, by turns
    voters -- how many vote, again and again, and go where a 303 sends them
    watchers -- how many look at each of WATCHED, again and again
    pause -- seconds from an answer to the next request: long enough that the load leaves the machine time for others

    `answers` is the log.
    """

    WATCHED = ("/", "/history", "/static/icon.svg", "/healthz")

    def __init__(self, *services, voters=24, watchers=2, pause=0.2):
        self.services, self.answers, self.pause = services, [], pause
        self.ended = Event()
        service = cycle(services)
        self.threads = [Thread(target=self.vote, args=[next(service), Random(number)]) for number in range(voters)]
        self.threads += [Thread(target=self.watch, args=[next(service), path]) for path in self.WATCHED * watchers]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def visitor(self, service):
        """Return the connection that a visitor keeps."""
        return HTTPConnection("127.0.0.1", service.port, timeout=30)

    def vote(self, service, random):
        visitor = self.visitor(service)
        while not self.ended.wait(random.uniform(0.5, 1.5) * self.pause):
            answer = self.ask(visitor, "/add", random.choice(CATS))
            if answer.status == 303:
                self.ask(visitor, answer.headers["Location"])

    def watch(self, service, path):
        visitor = self.visitor(service)
        while not self.ended.wait(self.pause):
            self.ask(visitor, path)

    def ask(self, visitor, path, cat=""):
        """Send a request, as a vote if for a cat, log it, and return the answer."""
        kept, status, headers, body = visitor.sock is not None, -1, Message(), b""
        sent_at = time.monotonic()
        try:
            if not kept:
                visitor.connect()
            status = 0
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            visitor.request(*(("POST", path, urlencode({"vote": cat}), form) if cat else ("GET", path)))
            response = visitor.getresponse()
            body = response.read()
            status, headers = response.status, response.headers
        except (OSError, HTTPException):
            visitor.close()
        answer = Visit(status, headers, body, path, cat, kept, sent_at, time.monotonic())
        self.answers.append(answer)
        return answer

    def go_on(self, votes):
        """Return when so many more votes have been acknowledged."""
        goal = len(self.acknowledged) + votes
        wait_until(lambda: len(self.acknowledged) >= goal)

    @property
    def votes(self):
        return [answer for answer in self.answers if answer.cat]

    @property
    def acknowledged(self):
        return [vote for vote in self.votes if vote.status == 303]

    @property
    def not_counted(self):
        return [vote for vote in self.votes if vote.not_counted]

    @property
    def unconfirmed(self):
        return [vote for vote in self.votes if vote.unconfirmed]

    def pages(self, path, start, end):
        """Return the answers for a page asked for and given in that time."""
        return [
            answer for answer in self.answers if answer.path == path and start < answer.sent_at < answer.ended_at < end
        ]


def assert_kept(load, service, statuses=(200, 303, 503)):
    """Compare what the visitors were told with the rows, once the service has ended.

    statuses -- those that are no surprise
    """
    assert service.process.returncode == 0
    assert "Traceback" not in service.log
    assert {answer.status for answer in load.answers} <= {*statuses}
    answers = [answer for answer in load.answers if answer.status > 0]
    assert_prompt(answers, workers=int(service.environment["WEB_CONCURRENCY"]) * len(load.services))

    # Pages show every vote that was acknowledged so long before, and after a vote also the last ones.
    acknowledged_at = sorted(vote.ended_at for vote in load.acknowledged)
    for page in answers:
        if "data-votes" in page.text and not page.outdated:
            age = 0 if "voted" in page.path else 1
            assert page.total >= bisect(acknowledged_at, page.sent_at - age)

    url = service.environment["DATABASE_URL"]
    wait_until(lambda: not backends(url, "state <> 'idle'"))  # none is busy with a vote that its visitor gave up
    count = "SELECT vote, votes, (SELECT count(*) FROM votes WHERE votes.vote = vote_totals.vote) FROM vote_totals"
    for cat, counted, stored in sql(url, count):
        assert counted == stored
        votes = [vote for vote in load.votes if vote.cat == cat]
        acknowledged = sum(vote.status == 303 for vote in votes)
        unknown = sum(vote.unconfirmed or vote.status == 0 for vote in votes)
        assert acknowledged <= stored <= acknowledged + unknown


def assert_prompt(answers, workers):
    """Check that nobody waited for too long, and that who was refused was told the truth and when to come again."""
    # Of each page one visitor tries to read while the database is in trouble, and nobody waits a second for that one.
    pages, room_for_a_busy_machine = 2, 2
    held = [answer for answer in answers if answer.seconds > 1.2 and answer.path not in ("/add", "/healthz")]
    assert most_at_once(held) <= pages * workers * room_for_a_busy_machine
    for answer in answers:
        assert answer.seconds < {"/add": 8, "/healthz": 4}.get(answer.path, 2), answer
        if answer.status == 503:
            assert answer.headers["Retry-After"].isdigit()
            assert not answer.cat or answer.not_counted or answer.unconfirmed
