"""HTTP as bytes: a client that can also send what no browser or library would."""

import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser

FORM = "Content-Type: application/x-www-form-urlencoded"
HOST = "catvote.example"


@dataclass(frozen=True)
class Answer:
    """An answer of the service; headers[name] ignores case and is None if there is none."""

    status: int
    headers: Message
    body: bytes

    @property
    def text(self):
        return self.body.decode()

    @property
    def votes(self):
        """The count that the page shows for each cat."""
        counts = re.findall(r'data-votes="(\w+)"[^>]*>([\d,]+)<', self.text)
        return {cat: int(count.replace(",", "")) for cat, count in counts}

    @property
    def not_counted(self):
        return self.status == 503 and "vote was not counted" in self.text

    @property
    def unconfirmed(self):
        return self.status in (502, 503, 504) and "vote could not be confirmed" in self.text  # 503: the service's own

    @property
    def outdated(self):
        return bool(re.search("<p (?![^>]*hidden)[^>]*>[^<]*these are the last known votes", self.text))


def write(method, target, *headers, body=b""):
    """Return a request as bytes; Host and Content-Length are added unless `headers` have their like."""
    names = {header.partition(":")[0].lower() for header in headers}
    lines = [f"{method} {target} HTTP/1.1", *headers]
    if "host" not in names:
        lines.append(f"Host: {HOST}")
    if body and not names & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(body):
    """Return a body in the chunked transfer coding, in two chunks."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:3], body[3:])) + b"0\r\n\r\n"


def read(data, method="GET"):
    """Return the answers that these bytes are. Raises ValueError if they are not whole answers and nothing else."""
    answers = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        status_line, _, fields = head.decode("latin-1").partition("\r\n")
        version, status, _ = status_line.split(" ", 2)
        headers = Parser().parsestr(fields, headersonly=True)
        without_body = method == "HEAD" or status in ("100", "304")
        length = 0 if without_body else int(headers["Content-Length"] or "unknown")
        if version not in ("HTTP/1.0", "HTTP/1.1") or not end or len(data) < length:
            raise ValueError(f"not HTTP: {status_line!r}")
        answers.append(Answer(int(status), headers, data[:length]))
        data = data[length:]
    return answers


def listen(connection):
    """Return all that the service says until it hangs up."""
    said = b""
    with suppress(ConnectionResetError):  # it has left, and part of our request unread
        while data := connection.recv(65536):
            said += data
    return said


def talk(service, data, method="GET"):
    """Send these bytes, and no more, on a connection of their own; return all answers."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        with suppress(OSError):  # it may have heard enough, and left
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        return read(listen(connection), method)


def ask(service, method, target, *headers, body=b""):
    """Send one request; return its one answer."""
    (answer,) = talk(service, write(method, target, *headers, body=body), method)
    return answer


def get(service, target, *headers):
    """GET a target; return the one answer."""
    return ask(service, "GET", target, *headers)


def vote(service, *headers, body=b"vote=Pita"):
    """Vote as the page's form does, with more headers; return the one answer."""
    return ask(service, "POST", "/add", FORM, *headers, body=body)
