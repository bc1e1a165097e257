"""Docker's API as the users of a chaos run call it: every answer is a value."""

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any

from cnmdriver.lab.host import DOCKER_SOCKET, Host
from cnmdriver.lab.process import LabError

PATIENCE = 120.0
"""Seconds after which a command is given up: whoever waits so long has found a hang."""
AWAY = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What dockerd answered; status 0 and why, if it did not."""

    status: int
    data: Any = None
    text: str = ""

    @property
    def done(self) -> bool:
        """Whether dockerd did what was asked, or had it done before."""
        return 200 <= self.status < 400


class Connection(http.client.HTTPConnection):
    """A connection to a lab host's dockerd."""

    def __init__(self, path: str) -> None:
        """Take the path of the Unix socket, as seen from here."""
        super().__init__("docker", timeout=PATIENCE)
        self.path = path

    def connect(self) -> None:
        """Connect to the Unix socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self.path)


def ask(host: Host, method: str, path: str, body: object = None) -> Answer:
    """Ask a host's dockerd once."""
    connection = None
    try:
        connection = Connection(str(host.socket(DOCKER_SOCKET)))
        headers = {"Content-Type": "application/json"} if body is not None else {}
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, headers)
        response = connection.getresponse()
        raw = response.read().decode(errors="replace")
        return read(response.status, raw)
    except (OSError, http.client.HTTPException, LabError) as error:
        return Answer(status=AWAY, text=f"docker does not answer: {error!r}")
    finally:
        if connection is not None:
            connection.close()


def read(status: int, raw: str) -> Answer:
    """Read what dockerd wrote."""
    try:
        data = json.loads(raw) if raw.strip() else None
    except ValueError:
        return Answer(status=status, text=raw)
    text = str(data.get("message", "")) if isinstance(data, dict) else ""
    return Answer(status=status, data=data, text=text)
