"""
Replays recorded conversations with dockerd against the real application and driver.

The plugin that was recorded chose its own pools, addresses and pool ids; a session
translates them, in all later requests, to what pynet chose. Each request must get the
outcome Docker went on with, but for the deviations listed here; its answer must decode
as what Docker expects; and a request that may come again is sent twice.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import msgspec

from cnmdriver.api import wire
from cnmdriver.errors import DriverError

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts"
GENERIC = "com.docker.network.generic"
HOSTS = {"20.10.24": "", "29": "plugin.moby.localhost"}

ANSWERS = {
    "Plugin.Activate": wire.Activation,
    "NetworkDriver.GetCapabilities": wire.NetworkCapabilities,
    "NetworkDriver.AllocateNetwork": wire.Allocated,
    "NetworkDriver.CreateEndpoint": wire.EndpointCreated,
    "NetworkDriver.EndpointOperInfo": wire.OperInfo,
    "NetworkDriver.Join": wire.Joined,
    "NetworkDriver.GwAllocCheck": wire.GatewaySkip,
    "IpamDriver.GetCapabilities": wire.IpamCapabilities,
    "IpamDriver.GetDefaultAddressSpaces": wire.AddressSpaces,
    "IpamDriver.RequestPool": wire.PoolGiven,
    "IpamDriver.RequestAddress": wire.AddressGiven,
}
ONCE = {"IpamDriver.RequestPool", "IpamDriver.RequestAddress"}
"""What Docker may mean a second time: two pools, two addresses."""
REMOVING = {
    "NetworkDriver.FreeNetwork",
    "NetworkDriver.DeleteNetwork",
    "NetworkDriver.DeleteEndpoint",
    "NetworkDriver.Leave",
    "NetworkDriver.RevokeExternalConnectivity",
    "NetworkDriver.DiscoverDelete",
    "IpamDriver.ReleasePool",
    "IpamDriver.ReleaseAddress",
}
HANDSHAKE = {
    "Plugin.Activate",
    "NetworkDriver.GetCapabilities",
    "IpamDriver.GetCapabilities",
    "IpamDriver.GetDefaultAddressSpaces",
}

ACCEPTED, REFUSED = "accepted", "refused"
TOLD = "told"
"""Refused by the driver's door for this call, as the recorded plugin was told to."""
UNSENT = "unsent"
"""Not sent: Docker would not have come to it, or nobody would have answered."""


@dataclass(frozen=True)
class Deviation:
    """Calls whose outcome must be another one than the recorded."""

    files: str
    methods: frozenset
    recorded: str
    outcome: str
    reason: str
    numbers: frozenset = frozenset()

    def covers(self, file: str, call: "Call") -> bool:
        """Tell whether it is about a call; `files` is a pattern of version/name."""
        return (
            fnmatch(file, self.files)
            and call.method in self.methods
            and call.outcome == self.recorded
            and (not self.numbers or call.number in self.numbers)
        )


@dataclass(frozen=True)
class Call:
    """One recorded call."""

    number: int
    method: str
    request: dict | None
    response: object
    status: int

    @property
    def outcome(self) -> str:
        """Return what Docker made of the recorded answer."""
        if self.status == 0:
            return UNSENT
        if self.status == 404 and self.method.endswith("ExternalConnectivity"):
            return ACCEPTED
        if self.status != 200 or self.answer is None:
            return REFUSED
        # Go reads keys without regard to case; under the wrong key an error is not
        # seen, but then Docker fails for want of the answer.
        keys = {key.lower() for key, value in self.answer.items() if value}
        return REFUSED if keys & {"err", "error"} else ACCEPTED

    @property
    def answer(self) -> dict | None:
        """Return the recorded answer, None if it was no JSON."""
        if isinstance(self.response, dict):
            return self.response
        try:
            return json.loads(self.response)
        except ValueError:
            return None


def deviation(files, methods, change, reason, numbers=()) -> Deviation:
    """Write a deviation; `change` is the recorded outcome and the right one."""
    names = frozenset(methods if isinstance(methods, set) else {methods})
    return Deviation(files, names, *change, reason, frozenset(numbers))


ADDING = {
    "NetworkDriver.CreateNetwork",
    "NetworkDriver.CreateEndpoint",
    "NetworkDriver.Join",
    "NetworkDriver.ProgramExternalConnectivity",
    "NetworkDriver.EndpointOperInfo",
    "IpamDriver.RequestPool",
    "IpamDriver.RequestAddress",
}
DEVIATIONS = (
    deviation(
        "*", HANDSHAKE, (REFUSED, ACCEPTED), "pynet is ready before its socket is"
    ),
    deviation("*", REMOVING, (REFUSED, ACCEPTED), "a removal never fails"),
    deviation("*/16-*", ADDING, (REFUSED, TOLD), "every kind of error, on purpose"),
    deviation(
        "*/38-*", "NetworkDriver.GwAllocCheck", (REFUSED, TOLD), "errors on purpose"
    ),
    deviation(
        "*/40-*", "NetworkDriver.AllocateNetwork", (REFUSED, TOLD), "error on purpose"
    ),
    deviation(
        "*/53-*", "IpamDriver.RequestAddress", (REFUSED, TOLD), "error on purpose"
    ),
    deviation(
        "*/09-*",
        "NetworkDriver.ProgramExternalConnectivity",
        (ACCEPTED, REFUSED),
        "the host port is published by another container",
        {48, 59},
    ),
    deviation(
        "*/17-*",
        "IpamDriver.RequestPool",
        (ACCEPTED, REFUSED),
        "a replay, which pynet does not ask for, looks like a second network",
        {23, 32},
    ),
    deviation(
        "*/20-*",
        "IpamDriver.RequestPool",
        (ACCEPTED, REFUSED),
        "the same pool for a second network on one host",
        {6, 10},
    ),
    deviation(
        "*/32-*",
        "NetworkDriver.CreateEndpoint",
        (ACCEPTED, REFUSED),
        "a repeated call that has lost its body",
        {5},
    ),
    deviation(
        "29/37-*",
        "NetworkDriver.CreateNetwork",
        (ACCEPTED, REFUSED),
        "a host has a subnet once, in whichever of Docker's scopes",
        {9},
    ),
    deviation(
        "*/42-*.node2.*",
        "NetworkDriver.CreateEndpoint",
        (ACCEPTED, REFUSED),
        "the network is known to this node by Docker's cluster store alone",
        {10},
    ),
)
EARLIER = ("13-", "14-", "15-", "16-", "31-")
"""Recorded on a network that an earlier recording created."""


def expected(file: str, call: "Call") -> tuple[str, Deviation | None]:
    """Return the outcome a call must have, and what it deviates by."""
    for row in DEVIATIONS:
        if row.covers(file, call):
            return row.outcome, row
    return call.outcome, None


def load(file: str) -> list[Call]:
    """Read the calls of a recording, in the order in which they came."""
    text = (TRANSCRIPTS / file).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    calls = [
        Call(
            number=call["n"],
            method=call["path"].removeprefix("/"),
            request=call["request"],
            response=call["response"],
            status=call.get("status", 200),
        )
        for call in sorted((x for x in lines if "path" in x), key=lambda x: x["t"])
    ]
    if file.split("/")[1].startswith(EARLIER):
        return [earlier_network(calls), *calls]
    return calls


def earlier_network(calls: list[Call]) -> Call:
    """Make the call that created the network of the first endpoint."""
    first = next(c for c in calls if c.method == "NetworkDriver.CreateEndpoint")
    pool = ip_interface(first.request["Interface"]["Address"]).network
    gateway = f"{pool.network_address + 1}/{pool.prefixlen}"
    data = {"AddressSpace": "LocalDefault", "Pool": str(pool), "Gateway": gateway}
    request = {"NetworkID": first.request["NetworkID"], "IPv4Data": [data]}
    return Call(
        number=0,
        method="NetworkDriver.CreateNetwork",
        request=request,
        response={},
        status=200,
    )


class Door:
    """A driver that can be told to refuse the next call, as the recorded one was."""

    def __init__(self, driver) -> None:
        self.driver = driver
        self.refusal = None

    def __getattr__(self, name):
        if self.refusal is not None:
            raise self.refusal
        return getattr(self.driver, name)


@dataclass
class Names:
    """What the recorded plugin's choices are with us."""

    pool_ids: dict = field(default_factory=dict)
    pools: dict = field(default_factory=dict)
    addresses: dict = field(default_factory=dict)
    networks: dict = field(default_factory=lambda: defaultdict(list))

    def request(self, call: Call) -> dict:
        """Return a request as Docker would have sent it to us."""
        request = json.loads(json.dumps(call.request))
        pool = pool_of(request.get("PoolID", "//"))
        if request.get("Pool"):
            sub = request["SubPool"]
            request["SubPool"] = sub and self._part(request["Pool"], sub)
            request["Pool"] = self.pools.get(request["Pool"], request["Pool"])
        if "PoolID" in request:
            request["PoolID"] = self.pool_ids.get(request["PoolID"], request["PoolID"])
            if request.get("Address"):
                request["Address"] = self._address(pool, request["Address"])
        for data in (request.get("IPv4Data") or []) + (request.get("IPv6Data") or []):
            self._data(request, data)
        if request.get("Interface"):
            self._interface(request["NetworkID"], request["Interface"])
        return request

    def _data(self, request: dict, data: dict) -> None:
        if data["AddressSpace"] in ("LocalDefault", "GlobalDefault", "null"):
            return
        pool = data["Pool"]
        self.networks[request["NetworkID"]].append(pool)
        data["Pool"] = self.pools.get(pool, pool)
        if "Gateway" in data:
            data["Gateway"] = self._prefixed(pool, data["Gateway"])
        for name, text in (data.get("AuxAddresses") or {}).items():
            data["AuxAddresses"][name] = self._prefixed(pool, text)

    def _interface(self, network: str, interface: dict) -> None:
        for key in ("Address", "AddressIPv6"):
            text = interface[key]
            for pool in self.networks[network]:
                if text and ip_interface(text).ip in ip_network(pool):
                    interface[key] = self._prefixed(pool, text)

    def _prefixed(self, pool: str, text: str) -> str:
        ours = ip_network(self.pools.get(pool, pool))
        return f"{self._address(pool, str(ip_interface(text).ip))}/{ours.prefixlen}"

    def _address(self, pool: str, text: str) -> str:
        """Return the address we gave, else the one at the same place in our pool."""
        key = (pool, ip_address(text))
        if key in self.addresses:
            return self.addresses[key]
        ours = ip_network(self.pools.get(pool, pool))
        place = int(key[1]) - int(ip_network(pool).network_address)
        return str(ours.network_address + place)

    def _part(self, pool: str, sub: str) -> str:
        start, _, length = sub.partition("/")
        return f"{self._address(pool, start)}/{length}"

    def learn(self, call: Call, answer: dict) -> None:
        """Remember what we chose where the recorded plugin chose something."""
        recorded = call.answer
        if call.method == "IpamDriver.RequestPool":
            self.pool_ids[recorded["PoolID"]] = answer["PoolID"]
            if not call.request["Pool"]:
                self.pools[recorded["Pool"]] = answer["Pool"]
        elif call.method == "IpamDriver.RequestAddress" and recorded["Address"]:
            address = ip_address(recorded["Address"].split("/")[0])
            key = (pool_of(call.request["PoolID"]), address)
            self.addresses[key] = answer["Address"].split("/")[0]
        elif call.method == "IpamDriver.ReleaseAddress":
            address = ip_address(call.request["Address"])
            self.addresses.pop((pool_of(call.request["PoolID"]), address), None)
        elif call.method == "IpamDriver.ReleasePool":
            self.pool_ids.pop(call.request["PoolID"], None)
            self.pools.pop(pool_of(call.request["PoolID"]), None)


def pool_of(pool_id: str) -> str:
    """Return the pool in a pool id of the recorded plugin."""
    return "/".join(pool_id.split("/")[1:3])


class Session:
    """One recording, replayed on one driver."""

    def __init__(self, file: str, docker, doors) -> None:
        self.file = file
        self.docker = docker
        self.doors = doors
        self.names = Names()
        self.ghosts = set()
        """Ids of networks, endpoints and pools that we refused: Docker lacks them."""
        self.live = set()
        """Networks and pools that Docker has."""

    async def replay(self, calls: Iterable[Call]) -> None:
        """Replay all calls."""
        for call in calls:
            outcome, _ = expected(self.file, call)
            if outcome == UNSENT:
                self.refuse(call)
            if outcome == UNSENT or self.is_ghostly(call):
                continue
            reply = await self.send(call, outcome)
            where = f"{self.file} call {call.number} {call.method}: {reply.body}"
            assert (reply.status == 200) == (outcome == ACCEPTED), where
            if outcome == ACCEPTED:
                self.check_answer(call, reply)
                self.accept(call, reply.json)
            else:
                assert reply.json["Err"] == reply.json["Error"] != "", where
                assert reply.status in (400, 500), where
                self.refuse(call)

    def is_ghostly(self, call: Call) -> bool:
        """Tell whether Docker would not have sent it, for want of what it is about."""
        if call.method in REMOVING or not call.request:
            return False
        request = call.request
        pools = (request.get("IPv4Data") or []) + (request.get("IPv6Data") or [])
        spaces = {f"{data['AddressSpace']}/{data['Pool']}" for data in pools}
        ids = {request.get(key) for key in ("NetworkID", "EndpointID", "PoolID")}
        if not self.ghosts & (ids | spaces):
            return False
        if call.method == "NetworkDriver.CreateNetwork":
            self.ghosts -= spaces
            self.ghosts.add(request["NetworkID"])
        return True

    async def send(self, call: Call, outcome: str):
        """Send a call, twice if it may come twice, and return the answer."""
        request = self.names.request(call) if call.request else None
        if outcome == TOLD:
            refusal = DriverError("the recorded plugin was told to refuse")
            for door in self.doors:
                door.refusal = refusal
        elif request and outcome == ACCEPTED:
            request = await self.dotted(call, request)
        replies = [
            await self.docker.call(
                call.method, request, host=HOSTS[self.file.split("/")[0]]
            )
            for _ in range(1 if call.method in ONCE else 2)
        ]
        for door in self.doors:
            door.refusal = None
        first, last = replies[0], replies[-1]
        assert (first.status, first.body) == (last.status, last.body), call
        return last

    async def dotted(self, call: Call, request: dict) -> dict:
        """Check that options without a domain are refused, and give them one."""
        options = request.get("Options") or {}
        flat = call.method in (
            "NetworkDriver.AllocateNetwork",
            "IpamDriver.RequestPool",
        )
        own = options if flat else options.get(GENERIC, {})
        bare = [name for name in own if "." not in name and name[0].islower()]
        if not bare:
            return request
        reply = await self.docker.call(call.method, request)
        assert (reply.status, bare[0] in reply.json["Err"]) == (400, True), reply
        for name in bare:
            own[f"org.example.{name}"] = own.pop(name)
        return request

    def check_answer(self, call: Call, reply) -> None:
        """Check that an answer is no more and no less than what Docker reads."""
        kind = ANSWERS.get(call.method, wire.Done)
        decoded = msgspec.json.decode(reply.body, type=kind, strict=True)
        assert json.loads(msgspec.json.encode(decoded)) == reply.json, (call, reply)

    def accept(self, call: Call, answer: dict) -> None:
        """Remember what Docker has now."""
        request = call.request or {}
        if call.outcome == ACCEPTED:
            self.names.learn(call, answer)
        match call.method:
            case "NetworkDriver.CreateNetwork":
                self.live.add(request["NetworkID"])
            case "NetworkDriver.DeleteNetwork":
                self.live.discard(request["NetworkID"])
                self.names.networks.pop(request["NetworkID"], None)
            case "IpamDriver.RequestPool":
                self.live.add(call.response["PoolID"])
            case "IpamDriver.ReleasePool":
                self.live.discard(request["PoolID"])

    def refuse(self, call: Call) -> None:
        """Remember what Docker lacks though the recorded one had it."""
        if call.outcome == REFUSED or not call.request:
            return
        match call.method:
            case "NetworkDriver.CreateNetwork":
                self.ghosts.add(call.request["NetworkID"])
            case "NetworkDriver.CreateEndpoint":
                self.ghosts.add(call.request["EndpointID"])
            case "IpamDriver.RequestPool":
                self.ghosts.add(call.response["PoolID"])

    async def finish(self) -> None:
        """Remove what the recording left, as `docker network rm` would."""
        for name in sorted(self.live):
            is_pool = "/" in name
            method = (
                "IpamDriver.ReleasePool" if is_pool else "NetworkDriver.DeleteNetwork"
            )
            key = "PoolID" if is_pool else "NetworkID"
            value = self.names.pool_ids.get(name, name)
            reply = await self.docker.call(method, {key: value})
            assert reply.status == 200, reply
