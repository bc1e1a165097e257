"""
Keys and values: where each record is stored and how it reads as bytes.

Keys, under a prefix of the store's own:

    cluster                            Cluster
    hosts/<host>                       Host
    alive/<host>                       Alive         (on the host's lease)
    fence/<host>                       Fence         (same lease; expected by commits)
    kept/<host>                        Kept          (on a long lease)
    knocks/<host>                      Knock
    questions/<asked>/<asking>         Question      (on the lease of who asks)
    answers/<asked>/<asking>           Answer        (on the lease of who was asked)
    networks/<network>                 Network
    members/<network>/<host>           Member
    spaces/<space>                     Space: changed with every claim
    pools/<space>/<cidr>               Pool
    addresses/<space>/<cidr>/<ip>      Reservation   (create-only: the allocator)
    blocks/<space>/<cidr>/<block>      Block         (create-only)
    endpoints/<network>/<endpoint>     Endpoint
    vnis/<vni>                         Vni           (create-only: the allocator)
    watermarks/<host>                  Watermark     (last: the main watch ends here)

Values are JSON with the schema's version, `{"schema": 1, "record": {…}}`. A record of a
newer schema is read as far as this version knows it, and never rewritten.
"""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from cnmdriver.errors import StoreError
from cnmdriver.model import (
    Alive,
    Answer,
    Block,
    Cluster,
    Endpoint,
    Fence,
    Host,
    IPAddress,
    IPNetwork,
    Kept,
    Knock,
    Member,
    Network,
    Pool,
    Question,
    Reservation,
    Vni,
    Watermark,
)
from cnmdriver.store import checks

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Counts claims on the pools of a space, so that two never decide at once."""

    claims: int = 0


R = TypeVar("R")

TYPES: dict[str, type[Any]] = {
    "cluster": Cluster,
    "hosts": Host,
    "alive": Alive,
    "fence": Fence,
    "kept": Kept,
    "knocks": Knock,
    "questions": Question,
    "answers": Answer,
    "networks": Network,
    "members": Member,
    "spaces": Space,
    "pools": Pool,
    "addresses": Reservation,
    "blocks": Block,
    "endpoints": Endpoint,
    "vnis": Vni,
    "watermarks": Watermark,
}

CLUSTER = "cluster"
WATERMARKS = "watermarks/"
"""Behind all other keys: hosts write them often, and nobody follows them."""
DEPTHS = {
    "addresses": 4,
    "blocks": 4,
    "members": 2,
    "endpoints": 2,
    "pools": 2,
    "questions": 2,
    "answers": 2,
}
"""How many words of a key its like have too; one, where nothing else is said."""


def host(name: str) -> str:
    """Return a host's key."""
    return f"hosts/{name}"


def alive(host: str) -> str:
    """Return the key that says a host's daemon runs."""
    return f"alive/{host}"


def fence(host: str) -> str:
    """Return the key that every commit of a host expects."""
    return f"fence/{host}"


def kept(host: str) -> str:
    """Return the key that says a host may come back."""
    return f"kept/{host}"


def knock(host: str) -> str:
    """Return the key by which one asks whether a host is alive."""
    return f"knocks/{host}"


def question(asked: str, asking: str) -> str:
    """Return the key of what one host asks another."""
    return f"questions/{asked}/{asking}"


def answer(asked: str, asking: str) -> str:
    """Return the key of what that host has answered."""
    return f"answers/{asked}/{asking}"


def vni(number: int) -> str:
    """Return the key of a VXLAN network identifier."""
    return f"vnis/{number}"


def watermark(host: str) -> str:
    """Return the key of what a host's kernel holds."""
    return f"{WATERMARKS}{host}"


def network(name: str) -> str:
    """Return a network's key."""
    return f"networks/{name}"


def member(network: str, host: str) -> str:
    """Return the key of a host's part in a network."""
    return f"members/{network}/{host}"


def space(name: str) -> str:
    """Return the key that every claim on a pool of a space changes."""
    return f"spaces/{name}"


def pool(space: str, cidr: IPNetwork) -> str:
    """Return a pool's key."""
    return f"pools/{space}/{cidr}"


def address(space: str, cidr: IPNetwork, ip: IPAddress) -> str:
    """Return the key of one address of a pool."""
    return f"{addresses(space, cidr)}{ip}"


def addresses(space: str, cidr: IPNetwork) -> str:
    """Return the prefix of all addresses of a pool."""
    return f"addresses/{space}/{cidr}/"


def block(space: str, cidr: IPNetwork, part: IPNetwork) -> str:
    """Return the key of a block of a pool."""
    return f"{blocks(space, cidr)}{part}"


def blocks(space: str, cidr: IPNetwork) -> str:
    """Return the prefix of all blocks of a pool."""
    return f"blocks/{space}/{cidr}/"


def endpoint(network: str, name: str) -> str:
    """Return an endpoint's key."""
    return f"endpoints/{network}/{name}"


def group(key: str) -> str:
    """Return the prefix that a key shares with its like; records are listed by it."""
    parts = key.split("/")
    return "/".join(parts[: DEPTHS.get(parts[0], 1)]) + "/"


class Envelope(msgspec.Struct, frozen=True):
    """What stands around a record in the store."""

    schema: int
    record: msgspec.Raw


Unknown = dict[str, msgspec.Raw]
"""Fields of a record that this version does not know, as they are stored."""


def encode(record: object, unknown: Unknown | None = None) -> bytes:
    """Write a record as a stored value, with fields that a newer version gave it."""
    whole = record
    if unknown:
        known = msgspec.to_builtins(record, enc_hook=write_address)
        whole = {**known, **unknown}
    return msgspec.json.encode(
        {"schema": SCHEMA, "record": whole}, enc_hook=write_address
    )


def decode(key: str, value: bytes) -> object:
    """Read a stored value; raises StoreError if it is not one of pynet's."""
    return read(key, value)[0]


def read(key: str, value: bytes) -> tuple[object, int, Unknown]:
    """Read a stored value as `decode` does; return also its schema and the rest."""
    kind = TYPES.get(key.partition("/")[0])
    if kind is None:
        raise StoreError(f"key {checks.shown(key)} in the store is none of pynet's")
    try:
        envelope = msgspec.json.decode(value, type=Envelope)
        found = msgspec.json.decode(envelope.record, type=kind, dec_hook=read_address)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(
            f"value of {checks.shown(key)} in the store: {error}"
        ) from None
    checks.check(key, found)
    return found, envelope.schema, unknown(kind, envelope.record)


def unknown(kind: type[Any], record: msgspec.Raw) -> Unknown:
    """Return the fields of a record that its type does not have."""
    fields = msgspec.json.decode(record, type=Unknown)
    return {k: v for k, v in fields.items() if k not in kind.__dataclass_fields__}


def write_address(value: object) -> str:
    """Write an `ipaddress` value as text."""
    return str(value)


def read_address(kind: type[R], value: object) -> R:
    """Read an `ipaddress` value of the wanted type."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")  # noqa: TRY004  msgspec wants it
    readers: dict[Any, Any] = {
        IPAddress: ipaddress.ip_address,
        IPNetwork: ipaddress.ip_network,
    }
    read: Callable[[str], R] = readers.get(kind, kind)
    return read(value)
