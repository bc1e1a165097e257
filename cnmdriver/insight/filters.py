"""
Which rule of the host's own packet filters ends a packet's way, if any does.

What is asked for is a packet that begins a connection, with the facts that are known of
it. A rule is read as far as pynet knows its words. One that has others, say a limit or
the content of a set, proves nothing: a packet may pass it.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

from cnmdriver.model import IPAddress
from cnmdriver.plan.ops import GROUP
from cnmdriver.plan.sight import Filters

OWN = "pynet"
DEEP = 16
"""Chains that call each other deeper than this are not followed."""
ENDS = {"DROP", "REJECT"}
BASE = {"INPUT", "FORWARD", "OUTPUT", "PREROUTING", "POSTROUTING"}
NUMBERS = {"udp": "17", "tcp": "6", "icmp": "1", "icmpv6": "58"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """What is known of a packet that begins something; None is not known."""

    hook: str
    """`input`, `forward` or `output`."""
    version: int
    protocol: str = "udp"
    port: int | None = None
    source: IPAddress | None = None
    target: IPAddress | None = None
    enters: str = ""
    leaves: str = ""
    ours: tuple[bool, bool] = (False, False)
    """Whether it enters, and leaves, by a device of pynet's link group."""
    translated: bool = False
    """Whether it came to a published port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The rule, or the policy, that ends a packet's way."""

    tool: str
    chain: str
    rule: str
    remedy: str


def stop(filters: Filters, packet: Packet) -> Stop | None:
    """Return what of the host's filters surely stops a packet, None if nothing does."""
    name = "iptables" if packet.version == 4 else "ip6tables"
    for tool, text in filters.listings:
        if tool.removesuffix("-legacy") == name:
            found = iptables_stop(tool, text, packet)
            if found is not None:
                return found
    return nft_stop(filters.ruleset, packet)


# iptables.


def iptables_stop(tool: str, text: str, packet: Packet) -> Stop | None:
    """Return what in the filter table, as `-S` prints it, stops a packet."""
    policies: dict[str, str] = {}
    chains: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        match shlex.split(line):
            case ["-P", chain, policy]:
                policies[chain] = policy
                chains.setdefault(chain, [])
            case ["-A", chain, *words]:
                chains.setdefault(chain, []).append(words)
    chain = packet.hook.upper()
    fate, place, words = followed(chains, chain, packet)
    if fate in ENDS:
        rule = shlex.join(("-A", place, *words))
        remedy = shlex.join((tool, "-D", place, *words))
        return Stop(tool=tool, chain=place, rule=rule, remedy=remedy)
    if not fate and policies.get(chain) == "DROP":
        return Stop(
            tool=tool,
            chain=chain,
            rule=f"-P {chain} DROP",
            remedy=shlex.join((tool, "-I", chain, *admission(packet))),
        )
    return None


def followed(
    chains: Mapping[str, list[list[str]]], chain: str, packet: Packet, depth: int = 0
) -> tuple[str, str, list[str]]:
    """Follow a packet through a chain: what surely ends it, where, by which rule."""
    doubt = False
    for words in chains.get(chain, ()) if depth < DEEP else ():
        fits, target = applies(words, packet)
        if fits is False or not target:
            continue
        fate, place, rule = target, chain, words
        if target in chains:
            fate, place, rule = followed(chains, target, packet, depth + 1)
            fate = fate or ("RETURN" if "-g" in words else "")
        if fate == "ACCEPT":
            # Where it is not known whether the rule fits, it may pass for good.
            return fate, place, rule
        if fits is None:
            doubt = doubt or fate == "RETURN"
        elif fate in ENDS and not doubt:
            return fate, place, rule
        elif fate in {"RETURN", *ENDS}:
            break
    return "", chain, []


def applies(words: list[str], packet: Packet) -> tuple[bool | None, str]:
    """Tell whether a rule is for the packet, None if that is not known; its target."""
    conditions, target = parted(words)
    unknown = False
    for negated, word, value in conditions:
        holds = condition(word, value, packet)
        if holds is negated:
            return False, target
        unknown = unknown or holds is None
    return (None if unknown else True), target


def parted(words: list[str]) -> tuple[list[tuple[bool, str, str]], str]:
    """Divide a rule into its conditions, each maybe negated, and its target."""
    found: list[tuple[bool, str, str]] = []
    negated = False
    left = iter(words)
    for word in left:
        if word in {"-j", "-g"}:
            return found, next(left, "")
        if word == "!":
            negated = True
            continue
        # What is no word is one more value of the word before, which is none we know.
        value = next(left, "") if word.startswith("-") else ""
        if word != "-m":
            found.append((negated, word, value))
            negated = False
    return found, ""


def condition(word: str, value: str, packet: Packet) -> bool | None:
    """Tell whether one condition of a rule holds, None if that is not known."""
    check = CONDITIONS.get(word)
    return None if check is None else check(value, packet)


def of_protocol(value: str, packet: Packet) -> bool:
    """Tell whether a protocol, by name or number, is the packet's."""
    return value in {packet.protocol, NUMBERS[packet.protocol], "all"}


def to_port(value: str, packet: Packet) -> bool:
    """Tell whether one of some ports, or ranges of them, is the packet's."""
    return any(spans(packet.port, part) for part in value.split(","))


def of_group(value: str, own: bool) -> bool | None:
    """Tell whether a device is of a group, given whether it is of pynet's."""
    return own if value in {str(GROUP), hex(GROUP)} else None


def is_new(value: str, packet: Packet) -> bool:
    """Tell whether a packet that begins a connection has one of some states."""
    states = set(value.split(","))
    return "NEW" in states or ("DNAT" in states and packet.translated)


def is_local(value: str, packet: Packet) -> bool | None:
    """Tell whether the packet is for an address of this kind."""
    if value in {"MULTICAST", "BROADCAST", "ANYCAST"}:
        return False
    return packet.hook == "input" if value == "LOCAL" else None


CONDITIONS: Mapping[str, Callable[[str, Packet], bool | None]] = {
    "--comment": lambda _, __: True,
    "-p": of_protocol,
    "-s": lambda value, packet: inside(packet.source, value),
    "-d": lambda value, packet: inside(packet.target, value),
    "-i": lambda value, packet: named(packet.enters, value),
    "-o": lambda value, packet: named(packet.leaves, value),
    "--dport": to_port,
    "--dports": to_port,
    "--src-group": lambda value, packet: of_group(value, packet.ours[0]),
    "--dst-group": lambda value, packet: of_group(value, packet.ours[1]),
    "--ctstate": is_new,
    "--state": is_new,
    "--dst-type": is_local,
}
"""What pynet knows of the words of a rule."""


def inside(address: IPAddress | None, cidr: str) -> bool | None:
    """Tell whether an address is in a network."""
    if address is None:
        return None
    try:
        return address in ip_network(cidr, strict=False)
    except ValueError:
        return None


def named(device: str, pattern: str) -> bool | None:
    """Tell whether a device has a name; a pattern may end with what any name may."""
    if not device:
        return None
    if pattern[-1:] in {"+", "*"}:
        return device.startswith(pattern[:-1])
    return device == pattern


def spans(port: int | None, part: str) -> bool:
    """Tell whether a port is one, or in a range."""
    first, _, last = part.partition(":")
    if port is None or not first.isdigit() or not (last or first).isdigit():
        return False
    return int(first) <= port <= int(last or first)


def admission(packet: Packet) -> tuple[str, ...]:
    """Return the rest of a rule that lets such packets pass."""
    source = ("-s", str(packet.source)) if packet.source is not None else ()
    port = ("--dport", str(packet.port)) if packet.port is not None else ()
    return ("-p", packet.protocol, *source, *port, "-j", "ACCEPT")


# nftables.


def nft_stop(ruleset: str, packet: Packet) -> Stop | None:
    """Return what in nftables, but for iptables' tables and our own, stops a packet."""
    items = json.loads(ruleset)["nftables"] if ruleset else []
    families = {"inet", "ip" if packet.version == 4 else "ip6"}
    chains = [item["chain"] for item in items if "chain" in item]
    rules = [item["rule"] for item in items if "rule" in item]
    for base in sorted(chains, key=lambda c: int(c.get("prio") or 0)):
        if base.get("hook") != packet.hook or base["family"] not in families:
            continue
        if base["table"] == OWN or base["name"] in BASE:
            continue
        found = base_stop(base, rules, packet)
        if found is not None:
            return found
    return None


def base_stop(base: Mapping[str, Any], rules: list[Any], packet: Packet) -> Stop | None:
    """Return what of one base chain stops a packet."""
    place = f"{base['family']} {base['table']}"
    own: dict[str, list[Any]] = {}
    for rule in rules:
        if (rule["family"], rule["table"]) == (base["family"], base["table"]):
            own.setdefault(rule["chain"], []).append(rule)
    fate, rule = traced(own, base["name"], packet)
    if fate == "drop" and rule is not None:
        return Stop(
            tool="nft",
            chain=f"{place} {rule['chain']}",
            rule=f"rule with handle {rule['handle']} of {place} {rule['chain']}",
            remedy=f"nft delete rule {place} {rule['chain']} handle {rule['handle']}",
        )
    if not fate and base.get("policy") == "drop":
        return Stop(
            tool="nft",
            chain=f"{place} {base['name']}",
            rule=f"policy drop of {place} {base['name']}",
            remedy=f"nft insert rule {place} {base['name']} {words(packet)} accept",
        )
    return None


def words(packet: Packet) -> str:
    """Return the words of a rule that says which packets."""
    family = "ip" if packet.version == 4 else "ip6"
    source = f"{family} saddr {packet.source} " if packet.source is not None else ""
    port = f"{packet.protocol} dport {packet.port}" if packet.port is not None else ""
    return f"{source}{port}".strip()


def traced(
    chains: Mapping[str, list[Any]], chain: str, packet: Packet, depth: int = 0
) -> tuple[str, Any]:
    """Follow a packet through a chain: what surely ends it, and by which rule."""
    doubt = False
    for rule in chains.get(chain, ()) if depth < DEEP else ():
        fits, verdict, target = read(rule["expr"], packet)
        if fits is False or not verdict:
            continue
        fate, inner = verdict, rule
        if verdict in {"jump", "goto"}:
            fate, inner = traced(chains, target, packet, depth + 1)
            fate = fate or ("return" if verdict == "goto" else "")
        if fate == "accept":
            return fate, inner
        if fits is None:
            doubt = doubt or fate == "return"
        elif fate == "drop" and not doubt:
            return fate, inner
        elif fate in {"return", "drop"}:
            break
    return "", None


VERDICTS = {"accept": "accept", "drop": "drop", "reject": "drop", "return": "return"}
HARMLESS = {"counter", "log", "mangle", "comment"}
"""Statements after which the next one is looked at."""


def read(expressions: list[Any], packet: Packet) -> tuple[bool | None, str, str]:
    """Tell whether a rule is for the packet, its verdict, and where that leads."""
    verdict = target = ""
    unknown = False
    for expression in expressions:
        kind, content = next(iter(expression.items()))
        holds: bool | None = True
        if kind == "vmap":
            holds, verdict, target = chosen(content, packet)
        elif kind in {"jump", "goto"}:
            verdict, target = kind, content["target"]
        elif kind == "match":
            holds = matches(content, packet)
        elif kind in VERDICTS:
            verdict = VERDICTS[kind]
        elif kind not in HARMLESS:
            holds = None
        if holds is False:
            return False, "", ""
        unknown = unknown or holds is None
    return (None if unknown else True), verdict, target


def chosen(content: Any, packet: Packet) -> tuple[bool | None, str, str]:
    """Return what a map of verdicts says; one that is not known may let it pass."""
    data = content.get("data")
    pairs = data.get("set") if isinstance(data, dict) else None
    for pair in pairs if isinstance(pairs, list) else [[None, {"accept": None}]]:
        holds = equal(content.get("key"), pair[0], packet)
        if holds is None:
            return None, "accept", ""
        if holds:
            return read([pair[1]], packet)
    return False, "", ""


def matches(content: Any, packet: Packet) -> bool | None:
    """Tell whether a match holds, None if that is not known."""
    found = None
    for one in values(content.get("right")):
        holds = equal(content.get("left"), one, packet)
        if holds is None:
            return None
        found = bool(found) or holds
    if found is None or content.get("op") not in {"==", "!=", "in"}:
        return None
    return found is not (content["op"] == "!=")


def values(right: Any) -> Iterator[Any]:
    """Yield what a match compares with."""
    if isinstance(right, dict) and "set" in right:
        yield from right["set"] if isinstance(right["set"], list) else [right["set"]]
    elif isinstance(right, list):
        yield from right
    else:
        yield right


def equal(left: Any, right: Any, packet: Packet) -> bool | None:
    """Compare one fact of the packet with one value."""
    match left:
        case {"payload": {"protocol": str(protocol), "field": str(field)}}:
            return in_header(protocol, field, right, packet)
        case {"meta": {"key": "l4proto" | "protocol"}}:
            return of_protocol(str(right), packet)
        case {"meta": {"key": "iifname" | "iif"}}:
            return named(packet.enters, str(right))
        case {"meta": {"key": "oifname" | "oif"}}:
            return named(packet.leaves, str(right))
        case {"ct": {"key": str(key)}}:
            states = {("state", "new"): True, ("status", "dnat"): packet.translated}
            known = key == "state" and isinstance(right, str)
            return states.get((key, str(right)), False if known else None)
    return None


def in_header(protocol: str, field: str, right: Any, packet: Packet) -> bool | None:
    """Compare a field of a header with one value."""
    other = {"ip": 6, "ip6": 4}.get(protocol) == packet.version
    if other or (protocol in NUMBERS and protocol != packet.protocol):
        return False
    match protocol, field:
        case (("udp" | "tcp" | "th"), "dport"):
            return number(packet.port, right)
        case (("ip" | "ip6"), "saddr"):
            return within(packet.source, right)
        case (("ip" | "ip6"), "daddr"):
            return within(packet.target, right)
    return None


def number(port: int | None, right: Any) -> bool | None:
    """Compare a port with a number, or a range of them."""
    if port is None:
        return None
    if isinstance(right, dict) and "range" in right:
        first, last = right["range"]
        return bool(first <= port <= last)
    return port == right if isinstance(right, int) else None


def within(address: IPAddress | None, right: Any) -> bool | None:
    """Compare an address with one, or with a prefix."""
    if address is None:
        return None
    try:
        if isinstance(right, dict) and "prefix" in right:
            net = f"{right['prefix']['addr']}/{right['prefix']['len']}"
            return address in ip_network(net, strict=False)
        return address == ip_address(right)
    except (TypeError, ValueError):
        return None
