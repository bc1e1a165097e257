"""
Operations: values that state what shall hold in the kernel.

A plan is an ordered tuple of operations, each standing only on earlier ones. Nothing
here does anything: the dataplane makes a plan hold (`apply`), takes it back (`clear`)
or reads the kernel into operations (`found`), and `difference` compares the two. The
same value also reads as the command a person would type.

An operation has a *key*: of two operations with one key and other content, one is a
change of the other. `REMAKE` names the fields that the kernel cannot change on a living
object; any other difference is mended in place. A field that is None in a found
operation is one the kernel does not show, and equals everything.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from cnmdriver.model import PROTOCOLS, IPAddress, IPInterface, IPNetwork

HOST = "host"
"""Where an operation holds: here the namespace the daemon runs in."""
FLOOD = "00:00:00:00:00:00"
"""The address of a VXLAN device's entry for all frames it knows no other for."""

GROUP = 0x706E
"""The link group that marks a device as pynet's ("pn")."""

Key = tuple[str, ...]
Command = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """The part all operations share."""

    where: str = HOST

    REMAKE: ClassVar[frozenset[str]] = frozenset()

    @property
    def key(self) -> Key:
        """Return what names the object, whatever its content."""
        raise NotImplementedError

    def stands_on(self) -> tuple[Key, ...]:
        """Return the keys of the objects that must be there first."""
        return () if self.where == HOST else (("namespace", HOST, self.where),)

    def commands(self) -> tuple[Command, ...]:
        """Return the commands that make it hold, as a person would type them."""
        raise NotImplementedError

    def tool(self, program: str, *words: str) -> Command:
        """Return a command of iproute2 that works where the operation holds."""
        return (program, *(() if self.where == HOST else ("-n", self.where)), *words)

    def inside(self, *words: str) -> Command:
        """Return any other command, run where the operation holds."""
        enter = () if self.where == HOST else ("ip", "netns", "exec", self.where)
        return (*enter, *words)


Plan = tuple[Op, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace(Op):
    """
    A network namespace of ours, under a name that `ip netns` knows.

    Its loopback device has the alias, since a namespace has none.
    """

    name: str
    alias: str | None = None

    @property
    def key(self) -> Key:
        return ("namespace", self.where, self.name)

    def commands(self) -> tuple[Command, ...]:
        return (
            ("ip", "netns", "add", self.name),
            ("ip", "-n", self.name, "link", "set", "lo", "alias", self.alias or ""),
            ("ip", "-n", self.name, "link", "set", "lo", "up"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sysctl(Op):
    """
    A kernel setting, by its path below /proc/sys.

    With `keep` it belongs to the whole host and stays when the plan is cleared; the
    dataplane remembers the old value. Others vanish with their device.
    """

    path: str
    value: str
    keep: bool = False
    device: str = ""

    @property
    def key(self) -> Key:
        return ("sysctl", self.where, self.path)

    def stands_on(self) -> tuple[Key, ...]:
        if self.device:
            return (("device", self.where, self.device),)
        return Op.stands_on(self)

    def commands(self) -> tuple[Command, ...]:
        # The slash form of a name: device names may have dots. A device of less than
        # 1280 bytes has no IPv6, and no setting of it: that is no error.
        return (self.inside("sysctl", "-qew", f"{self.path}={self.value}"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge(Op):
    """A bridge, up, with a fixed MAC and without addresses of its own making."""

    name: str
    mac: str
    mtu: int
    up: bool = True
    alias: str | None

    @property
    def key(self) -> Key:
        return ("device", self.where, self.name)

    def commands(self) -> tuple[Command, ...]:
        # The MTU comes last: a bridge without ports takes it only once it exists,
        # and setting it stops the kernel from following the smallest port. Below 1280
        # it takes IPv6 away, and with it what is set before.
        link = self.tool("ip", "link")
        return (
            (*link, "add", self.name, "address", self.mac, "group", str(GROUP))
            + ("type", "bridge", "mcast_snooping", "0"),
            (*link, "set", self.name, "addrgenmode", "none"),
            (*link, "set", self.name, "mtu", str(self.mtu)),
            (*link, "set", self.name, "alias", self.alias or ""),
            (*link, "set", self.name, "up"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Address(Op):
    """An address of the host on a device of ours."""

    device: str
    interface: IPInterface

    @property
    def key(self) -> Key:
        return ("address", self.where, self.device, str(self.interface))

    def stands_on(self) -> tuple[Key, ...]:
        return (("device", self.where, self.device),)

    def commands(self) -> tuple[Command, ...]:
        # A gateway's address is given by the store, so nobody need be asked for it.
        nodad = ("nodad",) if self.interface.version == 6 else ()
        place = (str(self.interface), "dev", self.device)
        return (self.tool("ip", "addr", "add", *place, *nodad),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """
    An interface in a sandbox: its name there, and its addresses.

    The sandbox is Docker's key of it, which only the dataplane opens. What happens to
    the interface later is between Docker and the container, so it is never compared.
    """

    sandbox: str
    name: str
    addresses: tuple[IPInterface, ...]

    @property
    def namespace(self) -> str:
        """Return the last part of the key: what `ip netns` would call the sandbox."""
        return self.sandbox.rpartition("/")[2]

    def commands(self) -> tuple[Command, ...]:
        """Return the commands that set it up, once it is there."""
        ip = ("ip", "-n", self.namespace)
        off = int(all(address.version == 4 for address in self.addresses))
        setting = f"net/ipv6/conf/{self.name}/disable_ipv6={off}"
        return (
            ("ip", "netns", "exec", self.namespace, "sysctl", "-qew", setting),
            (*ip, "link", "set", self.name, "up"),
            *(
                (*ip, "addr", "add", str(address), "dev", self.name)
                + (("nodad",) if address.version == 6 else ())
                for address in self.addresses
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Veth(Op):
    """
    A pair: `name` is a port of the bridge, `peer` the end in the host's namespace.

    Docker moves that end into a sandbox, or the host uses it itself (`Interface`), or
    it is built in a sandbox (`seat`), if that is there. The kernel does not show it
    once it is in a sandbox, so a found pair has None for `peer` and `mac` then.
    """

    name: str
    peer: str | None
    mac: str | None
    bridge: str
    mtu: int
    hairpin: bool = False
    isolated: bool = False
    up: bool = True
    alias: str | None
    seat: Seat | None = None

    REMAKE: ClassVar[frozenset[str]] = frozenset({"peer", "mac"})

    @property
    def key(self) -> Key:
        return ("device", self.where, self.name)

    def stands_on(self) -> tuple[Key, ...]:
        return (("device", self.where, self.bridge),)

    def commands(self) -> tuple[Command, ...]:
        mtu, group = ("mtu", str(self.mtu)), ("group", str(GROUP))
        # A device of less than 1280 has no IPv6 at all.
        mode = ("addrgenmode", "none") if self.mtu >= 1280 else ()
        near = () if self.where == HOST else ("netns", self.where)
        ip = self.tool("ip", "link", "set", self.name)
        far: Command = (self.peer or "",)
        if self.seat is not None:
            far = (self.seat.name, "netns", self.seat.namespace)
        return (
            ("ip", "link", "add", self.name, *near, *mtu, *group, "type", "veth")
            + ("peer", "name", *far, *mtu, *group)
            + ("address", self.mac or ""),
            (*ip, *mode, "master", self.bridge),
            (*ip, "alias", self.alias or ""),
            self.tool("bridge", "link", "set", "dev", self.name)
            + port(hairpin=self.hairpin, isolated=self.isolated),
            (*ip, "up"),
            *(self.seat.commands() if self.seat is not None else ()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface(Op):
    """The far end of a pair where the host itself uses it: up, and marked as ours."""

    name: str
    pair: Key
    """The key of the `Veth` it is an end of; it comes and goes with that."""
    up: bool = True
    alias: str | None

    @property
    def key(self) -> Key:
        return ("device", self.where, self.name)

    def stands_on(self) -> tuple[Key, ...]:
        return (self.pair,)

    def commands(self) -> tuple[Command, ...]:
        ip = self.tool("ip", "link", "set", self.name)
        # Said so, it is no error for a device of less than 1280, which has no IPv6.
        setting = f"net/ipv6/conf/{self.name}/addr_gen_mode=1"
        return (
            self.inside("sysctl", "-qew", setting),
            (*ip, "alias", self.alias or ""),
            (*ip, "up"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Vxlan(Op):
    """
    A VXLAN device that learns nothing, as a port of a bridge (RFC 7348).

    It is made from the host's namespace, where its UDP socket stays. ARP and ND for
    known addresses are answered by the bridge (`neigh_suppress`); with `flood` what is
    unknown goes to every host.
    """

    name: str
    vni: int
    local: IPAddress
    port: int
    bridge: str
    mtu: int
    flood: bool = False
    isolated: bool = False
    up: bool = True
    alias: str | None

    REMAKE: ClassVar[frozenset[str]] = frozenset({"vni", "local", "port"})

    @property
    def key(self) -> Key:
        return ("device", self.where, self.name)

    def stands_on(self) -> tuple[Key, ...]:
        return (("device", self.where, self.bridge),)

    def commands(self) -> tuple[Command, ...]:
        near = () if self.where == HOST else ("netns", self.where)
        ip = self.tool("ip", "link", "set", self.name)
        mode = ("addrgenmode", "none") if self.mtu >= 1280 else ()
        flood = "on" if self.flood else "off"
        return (
            ("ip", "link", "add", self.name, *near, "mtu", str(self.mtu))
            + ("group", str(GROUP), "type", "vxlan", "id", str(self.vni))
            + ("local", str(self.local), "dstport", str(self.port))
            + ("nolearning", "ttl", "64"),
            (*ip, *mode, "master", self.bridge),
            (*ip, "alias", self.alias or ""),
            self.tool("bridge", "link", "set", "dev", self.name)
            + ("learning", "off", "neigh_suppress", "on", "flood", flood)
            + ("mcast_flood", flood, "bcast_flood", flood)
            + ("isolated", "on" if self.isolated else "off"),
            (*ip, "up"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fdb(Op):
    """
    Where frames for a MAC go: out of a port, and on a VXLAN device, to which host.

    With `dst` it is an entry of the VXLAN device itself (`self`), without one an entry
    of the bridge the device is a port of (`master static sticky`: a static entry alone
    follows a frame with a forged source to another port). `FLOOD` can have many.
    """

    device: str
    mac: str
    dst: IPAddress | None = None

    def __hash__(self) -> int:
        # There are many: addresses take longer than texts, which keep their hash.
        return hash((self.device, self.mac))

    @property
    def key(self) -> Key:
        kind = "master" if self.dst is None else "self"
        many = (str(self.dst),) if self.mac == FLOOD else ()
        return ("fdb", self.where, self.device, self.mac, kind, *many)

    def stands_on(self) -> tuple[Key, ...]:
        return (("device", self.where, self.device),)

    def commands(self) -> tuple[Command, ...]:
        verb = "append" if self.mac == FLOOD else "replace"
        entry = self.tool("bridge", "fdb", verb, self.mac, "dev", self.device)
        if self.dst is None:
            return ((*entry, "master", "static", "sticky"),)
        return ((*entry, "dst", str(self.dst), "self", "permanent"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour(Op):
    """Which MAC an address has, without asking: what a bridge answers ARP and ND by."""

    device: str
    address: IPAddress
    mac: str

    def __hash__(self) -> int:
        return hash((self.device, self.mac))

    @property
    def key(self) -> Key:
        return ("neighbour", self.where, self.device, str(self.address))

    def stands_on(self) -> tuple[Key, ...]:
        return (("device", self.where, self.device),)

    def commands(self) -> tuple[Command, ...]:
        replace = (f"-{self.address.version}", "neigh", "replace", str(self.address))
        entry = ("lladdr", self.mac, "dev", self.device, "nud", "permanent")
        return (self.tool("ip", *replace, *entry),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route(Op):
    """A connected route of the host, with the address its own packets come from."""

    destination: IPNetwork
    device: str
    source: IPAddress

    @property
    def key(self) -> Key:
        return ("route", self.where, str(self.destination))

    def stands_on(self) -> tuple[Key, ...]:
        return (("device", self.where, self.device),)

    def commands(self) -> tuple[Command, ...]:
        replace = (f"-{self.destination.version}", "route", "replace")
        words = (str(self.destination), "dev", self.device, "src", str(self.source))
        return (self.tool("ip", *replace, *words),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(Op):
    """
    The nftables table with all chains and empty sets: `nft` text of one transaction.

    Loading it again must not empty the sets, so a found table has None for `text`
    unless its mark differs; `mark` is a digest of the text, kept as the comment of an
    empty chain.
    """

    family: str
    name: str
    mark: str
    text: str | None

    @property
    def key(self) -> Key:
        return ("table", self.where, self.family, self.name)

    def commands(self) -> tuple[Command, ...]:
        return (self.inside("nft", self.text or ""),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Element(Op):
    """
    An element of a set or map of the table: each field in nftables' own spelling.

    `value` is empty in a set. Only published ports have values, and with each comes
    or goes the conntrack state of the port.
    """

    family: str = "inet"
    table: str = "pynet"
    set: str
    item: tuple[str, ...]
    value: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        return ("element", self.where, self.family, self.table, self.set, *self.item)

    def stands_on(self) -> tuple[Key, ...]:
        return (("table", self.where, self.family, self.table),)

    @property
    def text(self) -> str:
        """Return the element as nft writes it between the braces."""
        item = " . ".join(self.item)
        return f"{item} : {' . '.join(self.value)}" if self.value else item

    def commands(self) -> tuple[Command, ...]:
        place = ("nft", "add", "element", self.family, self.table, self.set)
        return (self.inside(*place, f"{{ {self.text} }}"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept(Op):
    """
    Traffic of our bridges passes the host's own FORWARD chain, in one IP version.

    The decision stays in our table, where a drop is final. The two rules stand in
    DOCKER-USER, the chain Docker leaves to others; it is made, and FORWARD sent
    there, where Docker has not done so (protocol: "FORWARD policy DROP").
    """

    version: int

    @property
    def key(self) -> Key:
        return ("accept", self.where, str(self.version))

    def commands(self) -> tuple[Command, ...]:
        tool = "iptables" if self.version == 4 else "ip6tables"
        mark = ("-m", "comment", "--comment", "pynet", "-j", "ACCEPT")
        return tuple(
            (tool, "-w", "5", "-I", "DOCKER-USER", "-m", "devgroup", side, hex(GROUP))
            + mark
            for side in ("--src-group", "--dst-group")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold(Op):
    """
    A socket of the daemon that keeps a published port from other programs.

    The kernel translates the port before a packet can reach the socket, but for ::1,
    which it cannot translate: those connections are relayed to `target`. `address`
    None is every address of the host, in both families.
    """

    protocol: int
    address: IPAddress | None
    port: int
    target: IPAddress | None
    target_port: int

    @property
    def key(self) -> Key:
        return (
            "hold", self.where, PROTOCOLS[self.protocol],
            "*" if self.address is None else str(self.address), str(self.port),
        )  # fmt: skip

    def commands(self) -> tuple[Command, ...]:
        return ()


def port(*, hairpin: bool, isolated: bool) -> Command:
    """Return the words for how a bridge treats a port."""
    flags = {"hairpin": hairpin, "isolated": isolated}
    return tuple(
        word for name, on in flags.items() for word in (name, "on" if on else "off")
    )


def differing(wanted: Op, found: Op) -> tuple[str, ...]:
    """Return the names of the fields in which a found object is not as wanted."""
    return tuple(
        f.name
        for f in fields(wanted)
        if getattr(found, f.name) is not None
        and getattr(wanted, f.name) is not None
        and getattr(found, f.name) != getattr(wanted, f.name)
    )


def describe(wanted: Op, found: Op) -> str:
    """Say in words what differs, e.g. "mtu is 1400 and should be 1450"."""
    return ", ".join(
        f"{name} is {getattr(found, name)} and should be {getattr(wanted, name)}"
        for name in differing(wanted, found)
    )


def union(plans: Iterable[Plan]) -> Plan:
    """Merge plans in order; an operation many share appears once, at its first."""
    return tuple(keyed(plans).values())


def keyed(plans: Iterable[Plan]) -> dict[Key, Op]:
    """Merge plans, with the key of each operation."""
    return {op.key: op for plan in plans for op in plan}


def without(plan: Plan, kept: Iterable[Op]) -> Plan:
    """Return the plan less every object that `kept` still wants."""
    keys = {op.key for op in kept}
    return tuple(op for op in plan if op.key not in keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What stands between the kernel and the plans."""

    lacking: Plan
    changed: tuple[tuple[Op, Op], ...]
    """Pairs of wanted and found."""
    surplus: Plan

    def __bool__(self) -> bool:
        """Tell whether there is any difference."""
        return bool(self.lacking or self.changed or self.surplus)

    def amiss(self) -> frozenset[Key]:
        """Return the key of each object."""
        wanted = (op for op, _ in self.changed)
        return frozenset(op.key for op in (*self.lacking, *wanted, *self.surplus))

    def lines(self, *, surplus: bool = True) -> Iterator[str]:
        """Yield one line for each object: `+` lacks, `~` differs, `-` is too much."""
        for op in self.lacking:
            yield f"+ {name(op)}"
        for wanted, found in self.changed:
            yield f"~ {name(wanted)}: {describe(wanted, found)}"
        for op in self.surplus if surplus else ():
            yield f"- {name(op)}"


def compare(wanted: Plan, found: Plan) -> Difference:
    """Compare all plans with all that is found; kept settings are never surplus."""
    want, have = keyed((wanted,)), keyed((found,))
    return contrast({**want, **have}, want, have)


def contrast(
    keys: Iterable[Key], want: Mapping[Key, Op], have: Mapping[Key, Op]
) -> Difference:
    """Compare some objects as they are wanted, if they are, with as they are found."""
    lacking, changed, surplus = [], [], []
    for key in keys:
        op, there = want.get(key), have.get(key)
        if op is None:
            if there is not None and not (isinstance(there, Sysctl) and there.keep):
                surplus.append(there)
        elif there is None:
            lacking.append(op)
        elif there != op and differing(op, there):
            changed.append((op, there))
    return Difference(
        lacking=tuple(lacking), changed=tuple(changed), surplus=tuple(surplus)
    )


def together(parts: Sequence[Difference]) -> Difference:
    """Return what there is in any of some differences, of which each has its own."""
    return Difference(
        lacking=tuple(op for part in parts for op in part.lacking),
        changed=tuple(pair for part in parts for pair in part.changed),
        surplus=tuple(op for part in parts for op in part.surplus),
    )


def lasting(before: Difference, now: Difference) -> Difference:
    """Return what of a difference there was before, in whatever way."""
    amiss = {op.key for op in before.lacking} | {w.key for w, _ in before.changed}
    surplus = {op.key for op in before.surplus}
    return Difference(
        lacking=tuple(op for op in now.lacking if op.key in amiss),
        changed=tuple(pair for pair in now.changed if pair[0].key in amiss),
        surplus=tuple(op for op in now.surplus if op.key in surplus),
    )


def less(difference: Difference, keys: Collection[Key]) -> Difference:
    """Return a difference without some objects."""
    return Difference(
        lacking=tuple(op for op in difference.lacking if op.key not in keys),
        changed=tuple(pair for pair in difference.changed if pair[0].key not in keys),
        surplus=tuple(op for op in difference.surplus if op.key not in keys),
    )


def name(op: Op) -> str:
    """Return the short name of an object for people: its key less where it holds."""
    kind, where, *rest = op.key
    place = "" if where == HOST else f"{where}: "
    return f"{place}{kind} {' '.join(rest)}"
