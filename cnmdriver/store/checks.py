"""
What a record must be beyond the types of its fields, and under which key it may stand.

The store is shared: what stands in it may come from another program, an older or a
newer pynet, or somebody who means harm. A record that passes can be planned with: its
names fit a device, a command and a terminal, its numbers are in range, its addresses
lie in their pool, and its key says the same as its fields. One that does not is left
out of the view, and named.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv6Address, ip_network
from itertools import combinations

from cnmdriver.errors import StoreError
from cnmdriver.model import (
    PROTOCOLS,
    Alive,
    Answer,
    Block,
    Cluster,
    Endpoint,
    Fence,
    Host,
    IPAddress,
    IPNetwork,
    Knock,
    Member,
    Network,
    Pool,
    Published,
    Question,
    Reservation,
    Subnet,
    Vni,
    Watermark,
)

ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
SPACE = re.compile(r"[A-Za-z0-9_.-]{0,128}")
POOL_ID = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
DEVICE = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9_.][A-Za-z0-9_.-]{0,14}|")
PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,9}")
MAC = re.compile(r"(?!00:00:00:00:00:00)[0-9a-f][02468ace](:[0-9a-f]{2}){5}")
NUMBER = re.compile(r"[1-9][0-9]{0,9}")
TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f]*")
VNIS = range(1, 1 << 24)
PORTS = range(1, 1 << 16)
MTUS = range(68, (1 << 16) + 1)
"""Of a link; a loopback's is the largest there is."""
COUNTS = range(1 << 63)
HOPS = 64
"""More than this no answer has."""
MANY = 8192
"""More ports, options or reserved addresses than this no record has."""
SHOWN = 80

Parts = list[str]
Rule = Callable[[Parts, object], bool]


class Wrong(Exception):
    """What is wrong with a record, as the rest of a sentence."""


def check(key: str, record: object) -> None:
    """Raise StoreError unless a record can be used, and stands under its own key."""
    name, *parts = key.split("/")
    try:
        demand(RULES[name](parts, record) if name in RULES else True, "the key")
    except Wrong as wrong:
        raise StoreError(
            f"value of {shown(key)} in the store: {wrong} cannot be used"
        ) from None


def shown(key: str) -> str:
    """Return a key as it can be printed: short, and quoted if it is an odd one."""
    plain = key.isascii() and key.isprintable() and " " not in key
    return key[:SHOWN] if plain else ascii(key[:SHOWN])


def demand(holds: bool, what: str) -> None:
    """Raise Wrong, naming what does not hold."""
    if not holds:
        raise Wrong(what)


def match(pattern: re.Pattern[str], text: str, field: str) -> None:
    """Raise Wrong unless a text has a form from end to end."""
    if not pattern.fullmatch(text):
        raise Wrong(f"{field} {text[:SHOWN]!a}")


def within(numbers: range, number: int, field: str) -> None:
    """Raise Wrong unless a number is in a range."""
    if number not in numbers:
        raise Wrong(f"{field} {number}")


def words(most: int, **fields: str) -> None:
    """Raise Wrong unless texts are short, and harmless on a terminal."""
    for field, text in fields.items():
        match(TEXT, text[: most + 1], field)
        demand(len(text) <= most, f"{field} of {len(text)} characters")


def usable(address: IPAddress | None, field: str) -> None:
    """Raise Wrong for an address that no single host can have."""
    if address is None:
        return
    odd = address.is_multicast or address.is_unspecified or address.is_loopback
    scoped = isinstance(address, IPv6Address) and bool(address.scope_id)
    demand(not odd and not scoped, f"{field} {address}")


def inside(pool: IPNetwork, addresses: Iterable[IPAddress], field: str) -> None:
    """Raise Wrong for an address that is in no pool."""
    for address in addresses:
        demand(address in pool, f"{field} {address} outside {pool}")


# One rule per kind of record. Each tells whether the key is the record's own.


def cluster(parts: Parts, record: object) -> bool:
    """Check the cluster's record."""
    demand(isinstance(record, Cluster), "the record")
    if isinstance(record, Cluster):
        match(ID, record.id, "id")
        within(COUNTS, record.schema, "schema")
    return not parts


def host(parts: Parts, record: object) -> bool:
    """Check a host."""
    if not isinstance(record, Host):
        return False
    match(ID, record.id, "id")
    match(ID, record.namespace, "namespace")
    demand(record.namespace not in {".", ".."}, f"namespace {record.namespace!r}")
    words(255, name=record.name, version=record.version)
    usable(record.vtep, "vtep")
    within(PORTS, record.vxlan_port, "vxlan_port")
    within(MTUS, record.mtu, "mtu")
    return parts == [record.id]


def sign(parts: Parts, record: object) -> bool:
    """Check what a host says of itself from time to time."""
    match record:
        case Alive():
            words(128, instance=record.instance, boot=record.boot)
        case Fence():
            words(128, instance=record.instance)
            within(COUNTS, record.count, "count")
        case Knock():
            words(128, instance=record.instance)
        case Watermark():
            within(COUNTS, record.revision, "revision")
    return named(parts)


def question(parts: Parts, record: object) -> bool:
    """Check what a host asks another."""
    if not isinstance(record, Question):
        return False
    match(ID, record.id, "id")
    for field in ("network", "endpoint", "other"):
        if getattr(record, field):
            match(ID, getattr(record, field), field)
    words(255, name=record.name)
    return between(parts)


def answer(parts: Parts, record: object) -> bool:
    """Check what a host has answered: it is printed, and nothing else."""
    if not isinstance(record, Answer):
        return False
    match(ID, record.id, "id")
    demand(len(record.hops) <= HOPS, "number of hops")
    for hop in record.hops:
        words(64, name=hop.name)
        words(512, wanted=hop.wanted, found=hop.found, remedy=hop.remedy)
    return between(parts)


def between(parts: Parts) -> bool:
    """Tell whether the rest of a key is the names of two hosts."""
    return len(parts) == 2 and all(ID.fullmatch(part) for part in parts)


def named(parts: Parts) -> bool:
    """Tell whether the rest of a key is a name."""
    return len(parts) == 1 and ID.fullmatch(parts[0]) is not None


def network(parts: Parts, record: object) -> bool:
    """Check a network."""
    if not isinstance(record, Network):
        return False
    match(ID, record.id, "id")
    # A newer pynet may have modes that are refused by name where they are joined.
    for field in ("mode", "gateway"):
        match(ID, getattr(record, field), field)
    within(MTUS, record.mtu, "mtu")
    within(range(VNIS.stop), record.vni, "vni")
    demand(len(record.subnets) <= 64, "number of subnets")
    for one in record.subnets:
        subnet(one)
    pools = [s.pool for s in record.subnets]
    for pool_, other in combinations(pools, 2):
        apart = pool_.version != other.version or not pool_.overlaps(other)
        demand(apart, f"subnet {pool_} beside {other}")
    return parts == [record.id]


def subnet(one: Subnet) -> None:
    """Check a subnet of a network."""
    match(SPACE, one.space, "space")
    demand(len(one.reserved) <= MANY, "number of reserved addresses")
    gateway = () if one.gateway is None else (one.gateway,)
    inside(one.pool, gateway, "gateway")
    inside(one.pool, one.reserved, "reserved")


def member(parts: Parts, record: object) -> bool:
    """Check a host's part in a network."""
    if not isinstance(record, Member):
        return False
    for field in ("network", "host"):
        match(ID, getattr(record, field), field)
    if record.docker_id:
        match(ID, record.docker_id, "docker_id")
    match(DEVICE, record.bridge, "bridge")
    match(PREFIX, record.prefix, "prefix")
    words(16, attach=record.attach)
    demand(max(len(record.options), len(record.claims)) <= MANY, "number of options")
    for claim in record.claims:
        match(POOL_ID, claim, "claim")
    for address in record.addresses:
        usable(address.ip, "address")
    return parts == [record.network, record.host]


def space(parts: Parts, record: object) -> bool:
    """Check the count of a space's claims."""
    within(COUNTS, getattr(record, "claims", -1), "claims")
    return len(parts) == 1 and SPACE.fullmatch(parts[0]) is not None


def pool(parts: Parts, record: object) -> bool:
    """Check a pool."""
    if not isinstance(record, Pool):
        return False
    match(SPACE, record.space, "space")
    match(ID, record.network, "network")
    return parts == [record.space, *str(record.cidr).split("/")]


def address(parts: Parts, record: object) -> bool:
    """Check an address that is taken."""
    if not isinstance(record, Reservation):
        return False
    match(SPACE, record.space, "space")
    match(ID, record.host, "host")
    if record.endpoint:
        match(ID, record.endpoint, "endpoint")
    words(255, name=record.name)
    inside(record.cidr, [record.ip], "address")
    return parts == [record.space, *str(record.cidr).split("/"), str(record.ip)]


def block(parts: Parts, record: object) -> bool:
    """Check a block; what it says of addresses is about its pool's."""
    if not isinstance(record, Block) or len(parts) != 5:
        return False
    match(ID, record.host, "host")
    match(SPACE, parts[0], "space")
    try:
        whole, part = ip_network("/".join(parts[1:3])), ip_network("/".join(parts[3:]))
    except ValueError:
        return False
    inside(whole, [part.network_address, part.broadcast_address], "block")
    inside(whole, (*record.wanted, *record.lent), "address")
    return parts[1:] == [*str(whole).split("/"), *str(part).split("/")]


def endpoint(parts: Parts, record: object) -> bool:
    """Check a sandbox's place in a network."""
    if not isinstance(record, Endpoint):
        return False
    for field in ("network", "id", "host"):
        match(ID, getattr(record, field), field)
    match(MAC, record.mac, "mac")
    words(128, boot=record.boot)
    words(1024, sandbox=record.sandbox)
    words(16, attach=record.attach)
    match(DEVICE, record.device, "device")
    for one in record.addresses:
        usable(one.ip, "address")
    demand(len(record.published) <= MANY, "number of ports")
    for port in record.published:
        published(port)
    return parts == [record.network, record.id]


def published(port: Published) -> None:
    """Check a published port."""
    demand(port.protocol in PROTOCOLS, f"protocol {port.protocol}")
    within(PORTS, port.port, "port")
    within(PORTS, port.host_port, "host_port")


def vni(parts: Parts, record: object) -> bool:
    """Check the claim on a VXLAN network identifier."""
    if not isinstance(record, Vni) or len(parts) != 1:
        return False
    match(ID, record.network, "network")
    match(NUMBER, parts[0], "number")
    within(VNIS, int(parts[0]), "number")
    return True


RULES: Mapping[str, Rule] = {
    "cluster": cluster,
    "hosts": host,
    "alive": sign,
    "fence": sign,
    "kept": sign,
    "knocks": sign,
    "questions": question,
    "answers": answer,
    "watermarks": sign,
    "networks": network,
    "members": member,
    "spaces": space,
    "pools": pool,
    "addresses": address,
    "blocks": block,
    "endpoints": endpoint,
    "vnis": vni,
}
