"""Generated calls of both APIs get answers that the descriptions in plugin-spec allow."""

import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error, positive_data_acceptance
from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection

from cnmdriver.lab.host import PLUGIN_SOCKET, Host
from cnmdriver.lab.lab import Lab
from tests.install.image import ROOT

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
ADMIN_SOCKET = "/run/pynet/admin.sock"
CALLS = 1000
"""Calls that are well-formed: enough to meet what earlier ones have made."""
STRANGE_CALLS = 400
FEW = 25
"""Calls of one command."""
REFUSED = (not_a_server_error, positive_data_acceptance)
"""Not asked: what is well-formed may still be refused, and 500 is how that is said."""
IDS = ("a" * 64, "b" * 64, "pshc0g59b755s4u5cuoahfqta")
POOLS = ("10.9.0.0/24", "10.9.1.0/24", "10.0.0.0/8", "fd09::/64")
OPTIONS = "com.docker.network.generic"
WORDS: dict[str, tuple[Any, ...]] = {
    "NetworkID": IDS,
    "EndpointID": ("c" * 64, "d" * 64, "e" * 64),
    "Pool": POOLS,
    "Gateway": ("10.9.0.1/24", "10.9.1.1/24", "fd09::1/64"),
    "Address": ("10.9.0.2/24", "10.9.0.3/24", "10.9.0.4", "10.9.0.5", "fd09::4"),
    "AddressIPv6": ("", "fd09::2/64"),
    "MacAddress": ("", "02:42:0a:09:00:02"),
    "AddressSpace": ("pynet-local", "LocalDefault"),
    "PoolID": tuple(f"pynet-local/{pool}" for pool in POOLS),
    "SandboxKey": ("/var/run/docker/netns/0123456789ab",),
    "Proto": (6, 17, 132),
    "HostIP": ("", "127.0.0.1"),
    OPTIONS: ({}, {"pynet.icc": "false"}, {"pynet.mtu": "1400"}),
    "network": IDS,
    "endpoint": ("c" * 64, "f" * 64),
    "host": ("h1",),
    "pool": POOLS,
    "address": ("10.9.0.2", "10.9.0.4"),
}
"""What is often put in the place of generated values, so that calls are about the same."""


class Connection(HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("pynet", timeout=30)
        self.path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.path)


class Pool(HTTPConnectionPool):
    """Connections to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("pynet")
        self.path = path

    def _new_conn(self) -> Connection:
        return Connection(self.path)


class Door(HTTPAdapter):
    """Sends requests to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pool = Pool(str(path))

    def get_connection_with_tls_context(self, *_: object, **__: object) -> Pool:
        """Return the connections."""
        return self.pool

    def close(self) -> None:
        """Close the connections."""
        self.pool.close()
        super().close()


def described(name: str) -> Any:
    """Return a description of plugin-spec/."""
    path = ROOT / "plugin-spec" / f"{name}.openapi.json"
    return schemathesis.openapi.from_dict(json.loads(path.read_text()))


DOCKER, STRANGE, COMMANDS = map(described, ("docker", "docker", "admin"))


@st.composite
def dressed(draw: Callable[[Any], Any], value: Any) -> Any:
    """Return a body with some values exchanged for those that other calls have."""
    if isinstance(value, list):
        return [draw(dressed(each)) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: draw(st.sampled_from((*WORDS[key], *WORDS[key], each)))
        if key in WORDS
        else draw(dressed(each))
        for key, each in value.items()
    }


def flatmap(context: object, values: Any) -> Any:
    """Let calls be about the same things."""
    del context
    return dressed(values)


DOCKER.hook("flatmap_body")(flatmap)
COMMANDS.hook("flatmap_path_parameters")(flatmap)
COMMANDS.hook("flatmap_query")(flatmap)


@pytest.fixture(scope="module")
def host(make_module_lab: Callable[..., Lab]) -> Host:
    """Return a host of this module's own: what is made on it need not go."""
    return make_module_lab(1, pynet_args=("--docker=", "--log-level=warning")).hosts[0]


@pytest.fixture
def session(host: Host, request: pytest.FixtureRequest) -> Iterator[requests.Session]:
    """Return what sends requests to the socket that the test names."""
    with requests.Session() as made:
        made.mount("http://", Door(host.socket(request.param)))
        yield made


def bounded(number: int) -> Any:
    """Return settings for calls that build on each other: none is repeated."""
    return settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def drive(session: requests.Session, cases: Any, number: int) -> Counter[int]:
    """Make calls and check every answer; return how often there was which status."""
    seen: Counter[int] = Counter()

    @bounded(number)
    @given(case=cases)
    def call(case: Any) -> None:
        answer = case.call(base_url="http://pynet", session=session)
        seen[answer.status_code] += 1
        case.validate_response(answer, excluded_checks=REFUSED)

    call()
    print(seen)
    return seen


@pytest.mark.parametrize("session", [PLUGIN_SOCKET], indirect=True)
def test_docker(host: Host, session: requests.Session) -> None:
    """What Docker may send is done or refused by a sentence, and nothing is a bug."""
    cases = DOCKER.as_strategy(generation_mode=GenerationMode.POSITIVE)
    seen = drive(session, cases, CALLS)
    assert seen[200] > CALLS / 10
    assert seen[500] > CALLS / 50
    assert host.pynet_answers()


@pytest.mark.parametrize("session", [PLUGIN_SOCKET], indirect=True)
def test_what_docker_never_sends(host: Host, session: requests.Session) -> None:
    """What the description does not allow is refused as unreadable."""
    cases = STRANGE.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    seen = drive(session, cases, STRANGE_CALLS)
    assert seen[400] > STRANGE_CALLS / 2
    assert host.pynet_answers()


@pytest.mark.parametrize("session", [ADMIN_SOCKET], indirect=True)
def test_commands(host: Host, session: requests.Session) -> None:
    """The commands' API answers as it is described, also to what no command sends."""
    make_something(host)
    found: Counter[str] = Counter()
    for operation in COMMANDS.get_all_operations():
        cases = operation.ok().as_strategy(generation_mode=GenerationMode.POSITIVE)
        seen = drive(session, cases, FEW)
        found.update(dict.fromkeys((f"{operation.ok().label} {c}" for c in seen), 1))
    lists = ("status", "networks", "endpoints", "hosts", "ports", "pools", "census")
    assert {f"GET /v1/{name} 200" for name in lists} <= found.keys()
    assert "GET /v1/networks/{network} 200" in found
    assert "GET /v1/networks/{network} 404" in found


def make_something(host: Host) -> None:
    """Let there be a network with an endpoint, as Docker makes them."""
    data = [{"Pool": "10.8.0.0/24", "Gateway": "10.8.0.1/24", "AddressSpace": "x"}]
    network = {"NetworkID": IDS[1], "Options": {}, "IPv4Data": data, "IPv6Data": []}
    face = {"Address": "10.8.0.2/24", "AddressIPv6": "", "MacAddress": ""}
    endpoint = {"NetworkID": IDS[1], "EndpointID": "f" * 64, "Interface": face}
    with requests.Session() as made:
        made.mount("http://", Door(host.socket(PLUGIN_SOCKET)))
        made.post("http://pynet/NetworkDriver.CreateNetwork", json=network)
        made.post("http://pynet/NetworkDriver.CreateEndpoint", json=endpoint)
