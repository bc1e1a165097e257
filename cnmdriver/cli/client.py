"""A client of the daemon's admin socket, with nothing but the standard library."""

import json
import socket
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import quote, urlencode

from cnmdriver.cli.main import version

UNKNOWN = (404, 405)
"""What a daemon answers that has no such call."""
LIMIT = 15.0
"""Seconds to wait for an answer; the daemon gives up after 10."""


class ClientError(Exception):
    """What a person must be told, in one sentence."""


class NotRunningError(ClientError):
    """There is no daemon."""


class UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        """Name the socket; nothing is opened yet."""
        super().__init__("pynet", timeout=LIMIT)
        self.path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Client:
    """Asks one daemon."""

    def __init__(self, path: str) -> None:
        """Take the path of its admin socket."""
        self.path = path

    def get(self, *parts: str, **query: str) -> Any:
        """Read something; raises ClientError."""
        return self.ask("GET", parts, query)

    def delete(self, *parts: str, **query: str) -> Any:
        """Remove something; raises ClientError."""
        return self.ask("DELETE", parts, query)

    def news(self, *parts: str) -> Iterator[Any]:
        """Yield what the daemon tells as it comes, None for silence; ClientError."""
        connection = UnixConnection(self.path)
        try:
            connection.request("GET", "/".join(("/v1", *parts)))
            answer = connection.getresponse()
            if answer.status != 200:
                self.read(answer.status, answer.read())
            while line := answer.readline():
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))
                elif line.startswith(b":"):
                    yield None
        except (OSError, HTTPException, ValueError) as error:
            raise ClientError(self.explain(error)) from error
        finally:
            connection.close()

    def ask(self, verb: str, parts: tuple[str, ...], query: dict[str, str]) -> Any:
        """Send a request and return its answer; raises ClientError for a refusal."""
        place = "/".join(("/v1", *(quote(part, safe="") for part in parts)))
        connection = UnixConnection(self.path)
        try:
            connection.request(verb, f"{place}?{urlencode(query)}" if query else place)
            answer = connection.getresponse()
            status, body = answer.status, answer.read()
        except (OSError, HTTPException) as error:
            absent = isinstance(error, FileNotFoundError | ConnectionRefusedError)
            kind = NotRunningError if absent else ClientError
            raise kind(self.explain(error)) from error
        finally:
            connection.close()
        if status in UNKNOWN and f"{verb} {place}: ".encode() in body:
            raise ClientError(
                f"the pynet that runs (see pynet status) is of another version than "
                f"this command, {version()}, and does not know it; restart it: "
                "systemctl restart pynet"
            )
        return self.read(status, body)

    def read(self, status: int, body: bytes) -> Any:
        """Return what an answer holds; raises ClientError for a refusal."""
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        if status == 200 and content is not None:
            return content
        if isinstance(content, dict) and "error" in content:
            raise ClientError(str(content["error"]))
        raise ClientError(
            f"pynet at {self.path} answered with HTTP {status}; see the daemon's log"
        )

    def explain(self, error: Exception) -> str:
        """Say why there was no answer, and what to do."""
        match error:
            case PermissionError():
                return f"no permission for {self.path}: run this as root, with sudo"
            case TimeoutError():
                return (
                    f"pynet did not answer within {LIMIT:g} s at {self.path}; see its "
                    "log (journalctl -u pynet), or restart it"
                )
            case HTTPException() | ConnectionResetError() | BrokenPipeError():
                return (
                    f"what answers at {self.path} is not pynet, or it just stopped; "
                    "try again, or name its socket with --admin"
                )
        return (
            f"pynet is not running (no answer at {self.path}): "
            "start it with systemctl start pynet or pynet serve, or name its admin "
            "socket with --admin"
        )
