"""
The answers of the admin API, field for field: what `plugin-spec/` describes.

A call that is not in `SHAPES` answers some JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict


class Removed(TypedDict):
    """An endpoint that was removed."""

    removed: str
    name: str


class HostRemoved(TypedDict):
    """A host that was given up, and what became of its blocks."""

    removed: str
    blocks: str


class Released(TypedDict):
    """An address that was given back."""

    released: str
    pool: str


class Refusal(TypedDict):
    """Why a call was refused."""

    error: str


class Daemon(TypedDict):
    """The daemon; `uptime` in seconds."""

    version: str
    pid: int
    uptime: float


class ThisHost(TypedDict):
    """The daemon's host; `vtep` is null on one without tunnels."""

    id: str
    name: str
    boot: str
    vtep: str | None


class Store(TypedDict):
    """The store; `away` says why it is, or is null."""

    url: str
    revision: int
    away: str | None


class Status(TypedDict):
    """Is it well; counts are this host's."""

    well: bool
    attention: list[str]
    daemon: Daemon
    host: ThisHost
    store: Store
    docker: str
    repairs: dict[str, int]
    drops: dict[str, int]
    networks: int
    endpoints: int
    ports: int
    addresses: int


class Subnet(TypedDict):
    """A subnet of a network."""

    pool: str
    space: str
    gateway: str | None
    reserved: list[str]


class Network(TypedDict):
    """A network, and this host's part in it."""

    name: str
    id: str
    network: str
    mode: str
    bridge: str
    mtu: int
    internal: bool
    icc: bool
    masquerade: bool
    gateway: str
    subnets: list[Subnet]
    endpoints: int
    hosts: int


class Published(TypedDict):
    """A published port; `host_ip` null stands for every address."""

    protocol: str
    host_ip: str | None
    host_port: int
    addresses: list[str]
    port: int


class Port(Published):
    """A published port, and whose it is."""

    endpoint: str
    endpoint_id: str
    network: str


class Endpoint(TypedDict):
    """An endpoint of this host."""

    name: str
    id: str
    network: str
    network_id: str
    addresses: list[str]
    mac: str
    sandbox: str
    joined: bool
    device: str
    interface: str
    attached: Literal["moved", "direct"]
    published: list[Published]


class NetworkDetails(Network):
    """All there is to say about a network."""

    options: dict[str, str]
    prefix: str
    attach: str
    host_binding: str | None
    claims: list[str]
    members: list[Endpoint]


class Host(TypedDict):
    """A host of the cluster; `since` in seconds of Unix time, by its own clock."""

    name: str
    id: str
    here: bool
    vtep: str | None
    vxlan_port: int
    version: str
    state: str
    since: float | None
    endpoints: int
    behind: int


class Address(TypedDict):
    """An address that is taken."""

    address: str
    owner: str
    endpoint_id: str
    gateway: bool
    bound: bool
    host: str
    host_name: str
    here: bool


class Pool(TypedDict):
    """A pool, with the addresses taken of it."""

    id: str
    space: str
    pool: str
    network: str
    claimed: bool
    size: int
    taken: int
    addresses: list[Address]


class Commands(TypedDict):
    """What one would type, as a script."""

    commands: str


class Foreign(TypedDict):
    """A device that another pynet has marked."""

    device: str
    alias: str


Setting = TypedDict("Setting", {"was": str, "is": str | None})
"""The values of a setting of the host that was changed."""

Operation = dict[str, object]
"""An operation: its `kind`, its `key`, and its fields."""


class Changed(TypedDict):
    """An object that is not as planned, and the fields that differ."""

    wanted: Operation
    found: Operation
    differs: list[str]


class Diff(TypedDict):
    """Desired against found."""

    lines: list[str]
    lacking: list[Operation]
    changed: list[Changed]
    surplus: list[Operation]


class Census(TypedDict):
    """All that pynet owns on this host."""

    owned: list[Operation]
    foreign: list[Foreign]
    settings: dict[str, Setting]


class Topology(TypedDict):
    """All that a picture of the cluster needs; `at` in seconds of Unix time."""

    here: str
    name: str
    version: str
    at: float
    shared: bool
    store: str
    revision: int
    away: bool
    attention: list[str]
    hosts: list[dict[str, object]]
    networks: list[dict[str, object]]
    endpoints: list[dict[str, object]]


class Party(TypedDict):
    """An endpoint of a trace, on whichever host."""

    name: str
    id: str
    addresses: list[str]
    mac: str
    host: str


class Step(TypedDict):
    """A step of a trace; `well` is null where it could not be looked at."""

    host: str
    name: str
    wanted: str
    found: str
    well: bool | None
    remedy: str


class Probe(TypedDict):
    """What became of a ping; `milliseconds` is null if there was no answer."""

    to: str
    bytes: int
    milliseconds: float | None
    error: str


class At(TypedDict):
    """The step that is amiss."""

    host: str
    hop: str


# `from` is a word of Python's.
Trace = TypedDict(
    "Trace",
    {
        "network": str,
        "mode": str,
        "from": Party,
        "to": Party,
        "hops": list[Step],
        "probes": list[Probe],
        "reachable": bool,
        "verdict": str,
        "at": At | None,
        "remedy": str,
    },
)
"""The way between two endpoints, and where it ends."""


class Finding(TypedDict):
    """One thing that was looked at; `severity` is ok, info, warning or error."""

    check: str
    severity: str
    what: str
    why: str
    remedy: str


class Doctor(TypedDict):
    """All findings; `code` is 0, 1 for warnings, 2 for errors."""

    findings: list[Finding]
    code: int


class Log(TypedDict):
    """The latest lines of the log, each as JSON."""

    lines: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a call answers, and what it reads of the query: name and meaning."""

    answer: object
    query: Mapping[str, str]
    must: bool = False
    """Whether all of the query must be given."""


def _shape(answer: object, *, must: bool = False, **query: str) -> Shape:
    return Shape(answer=answer, query=query, must=must)


SHAPES: Mapping[tuple[str, str], Shape] = {
    ("GET", "status"): _shape(Status),
    ("GET", "networks"): _shape(list[Network]),
    ("GET", "networks/{network}"): _shape(NetworkDetails),
    ("GET", "endpoints"): _shape(list[Endpoint]),
    ("DELETE", "endpoints/{endpoint}"): _shape(Removed),
    ("GET", "hosts"): _shape(list[Host]),
    ("DELETE", "hosts/{host}"): _shape(
        HostRemoved, force="true to give up a host whose lease lives"
    ),
    ("GET", "ports"): _shape(list[Port]),
    ("GET", "pools"): _shape(list[Pool]),
    ("DELETE", "addresses"): _shape(
        Released, must=True, pool="CIDR or id of a pool", address="the address"
    ),
    ("GET", "explain"): _shape(
        Commands, network="name or id of a network; all without it"
    ),
    ("GET", "diff"): _shape(Diff),
    ("GET", "census"): _shape(Census),
    ("GET", "topology"): _shape(Topology),
    ("GET", "trace"): _shape(
        Trace,
        must=True,
        **{"from": "name, id or address of an endpoint", "to": "the same of another"},
    ),
    ("GET", "doctor"): _shape(Doctor),
    ("GET", "settings"): _shape(dict[str, object]),
    ("GET", "log"): _shape(Log),
}
