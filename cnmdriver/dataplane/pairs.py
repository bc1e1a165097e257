"""
New pairs: what they are asked for with, in requests that go to the kernel together.

The first makes both ends, the far one at once in the namespace where it belongs. The
second says what a device cannot be told while it is made, and only then the third sets
the near end up.
"""

import os
import socket
from collections.abc import Iterator

from cnmdriver.dataplane import rtnetlink
from cnmdriver.dataplane.inside import enter
from cnmdriver.dataplane.rtnetlink import (
    CREATE,
    EXCLUSIVE,
    GROUP,
    NAME,
    NEW_LINK,
    SET_LINK,
    UP,
    Request,
    attribute,
    number,
    text,
)
from cnmdriver.dataplane.seating import furnish
from cnmdriver.plan import ops
from cnmdriver.plan.ops import Seat, Veth

ADDRESS, MTU, MASTER, INFO, ALIAS, FAMILIES, NAMESPACE = 1, 4, 10, 18, 20, 26, 28
KIND, DATA, PORT_KIND, PORT_DATA = 1, 2, 4, 5
PEER = 1
GENMODE, NONE = 8, 1
HAIRPIN, ISOLATED = 4, 33
"""Attributes of include/uapi/linux/if_link.h, each nest's own."""
LEAST_SIX = 1280
"""The MTU below which a device has no IPv6 (RFC 8200, section 5)."""


def make(op: Veth, bridge: int, peer: str, place: int | None) -> tuple[int, bool]:
    """
    Make a pair in the thread's namespace, or its far end in that of a descriptor.

    Returns the errno of making it, 0 if it was made, and whether all the rest was done
    too. Raises OSError if the kernel cannot be asked.
    """
    made, *rest = rtnetlink.asked(list(requests(op, bridge, peer, place)))
    return made, not any(rest)


def build(op: Veth, bridge: int, seat: Seat, sandbox: int) -> tuple[int, bool]:
    """
    Make a pair that reaches into a sandbox, and stay there to set up what is inside.

    Returns the same as `make`; all the rest is not done unless all before it was.
    """
    made, whole = make(op, bridge, seat.name, sandbox)
    if whole and not made:
        enter(sandbox)
        furnish(seat)
    return made, whole


def requests(op: Veth, bridge: int, peer: str, place: int | None) -> Iterator[Request]:
    """Yield what is asked for a new pair, of which the far end's MAC must be known."""
    near = attribute(NAME, text(op.name))
    far = attribute(NAME, text(peer))
    far += attribute(ADDRESS, bytes.fromhex((op.mac or "").replace(":", "")))
    if place is not None:
        far += number(NAMESPACE, place)
    both = number(MTU, op.mtu) + number(GROUP, ops.GROUP)
    pair = attribute(PEER, rtnetlink.link(0) + far + both)
    kind = attribute(KIND, text("veth")) + attribute(DATA, pair)
    made = near + both + number(MASTER, bridge) + attribute(INFO, kind)
    yield NEW_LINK, CREATE | EXCLUSIVE, rtnetlink.link(0) + made

    port = attribute(HAIRPIN, bytes([op.hairpin]))
    port += attribute(ISOLATED, bytes([op.isolated]))
    kind = attribute(PORT_KIND, text("bridge")) + attribute(PORT_DATA, port)
    more = attribute(INFO, kind)
    if op.alias is not None:
        more += attribute(ALIAS, os.fsencode(op.alias))
    if op.mtu >= LEAST_SIX:
        six = attribute(GENMODE, bytes([NONE]))
        more += attribute(FAMILIES, attribute(int(socket.AF_INET6), six))
    yield NEW_LINK, 0, rtnetlink.link(0) + near + more

    if op.up:
        yield SET_LINK, 0, rtnetlink.link(0, flags=UP, mask=UP) + near
