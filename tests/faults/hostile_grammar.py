"""
Requests that nobody should send, made from the types of those that Docker sends.

A request is a tree: what `json` knows, plus `Verbatim` text and `Pairs` with keys that
come twice. It is built along a message's type, each field from its own vocabulary or
from the edges of its type, then damaged here and there, written, and at times damaged
again as bytes. Everything follows from the one `Random` that is given.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from msgspec import inspect

from cnmdriver.api.app import LARGEST_BODY, METHODS


class Verbatim(str):
    """Text that stands in the JSON as it is; a lone low surrogate is a byte."""

    __slots__ = ()


@dataclass(frozen=True)
class Pairs:
    """An object whose keys may come twice."""

    items: Sequence[tuple[str, Any]]


NETWORKS = [f"{n:x}" * 64 for n in range(1, 9)] + ["n" * 25, "net.1_-"]
ENDPOINTS = [f"e{n:x}" * 32 for n in range(12)]
SPACES = ["pynet-local", "pynet-global", "", "LocalDefault", "team.a"]
POOLS4 = [f"10.77.{n}.0/24" for n in range(6)] + [
    "10.77.0.0/16", "10.77.9.0/29", "10.77.9.8/31", "10.77.9.10/32", "0.0.0.0/0",
    "127.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32", "10.77.0.1/24", "10.77.0.0/33",
    "010.077.000.000/24", "10.77.0.0/255.255.255.0", "10.77.0.0",
]  # fmt: skip
POOLS6 = [f"fd77:{n}::/64" for n in range(3)] + [
    "fd77:9::/127", "::/0", "fe80::/10", "ff00::/8", "::ffff:10.77.0.0/120", "::1/128",
    "fd77:9::/48", "fd77::1/64", "fd77::/129", "2001:db8::/32",
]  # fmt: skip
ADDRESSES = [f"10.77.{n}.{m}" for n in range(3) for m in (0, 1, 2, 3, 9, 255)] + [
    f"fd77:{n}::{m}" for n in range(3) for m in (0, 1, 2, 9)
] + [
    "0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "169.254.1.1", "::", "::1",
    "fe80::1%eth0", "fe80::1%0", "ff02::1", "::ffff:10.77.0.2", "10.77.0.2 ", "0x7f.1",
    "10.77.0", "10.77.0.256", "1" * 39, "[::1]", "localhost", "10.77.0.2\n", "\uff11.\uff11.\uff11.\uff11",
]  # fmt: skip
MACS = [
    "02:42:0a:4d:00:02", "02:42:0A:4D:00:03", "", "00:00:00:00:00:00", "01:00:5e:00:00:01",
    "ff:ff:ff:ff:ff:ff", "02-42-0a-4d-00-02", "0242.0a4d.0002", "02:42:0a:4d:00",
    "02:42:0a:4d:00:02:03:04", "gg:42:0a:4d:00:02", "33:33:00:00:00:01", "02:42:0a:4d:00:02\n",
]  # fmt: skip
SANDBOXES = [f"/var/run/docker/netns/{n:012x}" for n in range(6)] + [
    "/", "/etc/passwd", "relative", "/../../x", "/" + "a" * 1023, "/proc/1/ns/net",
    "/run/netns/x; reboot", "/dev/zero", "/nul\0l", "//",
]  # fmt: skip
HOST_IPS = ["", "0.0.0.0", "127.0.0.1", "::", "::1", "10.77.0.1", "192.0.2.9", "x", "%"]
OPTIONS = {
    "pynet.mtu": [
        "1400",
        "68",
        "65535",
        "67",
        "0",
        "-1",
        "1e3",
        "\uff11\uff14\uff10\uff10",
        "9" * 400,
        "",
    ],
    "pynet.mode": ["bridge", "overlay", "macvlan", "", "BRIDGE"],
    "pynet.bridge": [
        "br77",
        "lo",
        "a" * 15,
        "a" * 16,
        "..",
        "a/b",
        "a b",
        "",
        "pn-0123456789",
    ],
    "pynet.gateway": ["pynet", "docker", "none"],
    "pynet.icc": ["true", "false", "maybe"],
    "pynet.masquerade": ["false", "1"],
    "pynet.spoof": ["allow", "deny", "x"],
    "pynet.flood": ["true"],
    "pynet.host_access": ["true"],
    "pynet.host_binding": ["127.0.0.1", "::1", "256.1.1.1"],
    "pynet.attach": ["auto", "moved", "direct", "both", ""],
    "pynet.prefix": ["eth", "e" * 15, "e" * 16, "a b", "../", ""],
    "pynet.network": [NETWORKS[0], "x" * 300, ""],
    "pynet.space": ["team.a", "/", "a/b", "..", "x" * 65],
    "com.docker.network.driver.mtu": ["1400", "x"],
    "com.docker.network.bridge.name": ["docker0", "br78"],
    "com.example.other": ["anything"],
    "pynet.nothing": ["1"],
    "": ["1"],
}
NASTY: Sequence[Any] = (
    None, True, False, 0, -1, 1, 80, 255, 65535, 65536, 1 << 31, 1 << 63, 1 << 64, 1.5, -0.0,
    "", " ", "\0", "a", "A" * 70, "B" * 5000, "é", "\U0001f40b" * 20, "\u202e", "\u2028",
    "$(reboot)", "'; DROP TABLE records; --", "%s%n%x", "../../../etc/passwd", "{}", "null",
    [], {}, [[]], [None], {"": ""}, {"a": {"b": {"c": [1, {"d": None}]}}}, ["a"] * 300,
    Verbatim("NaN"), Verbatim("Infinity"), Verbatim("-Infinity"), Verbatim("1e999"),
    Verbatim("9" * 400), Verbatim("-" + "9" * 40), Verbatim("0x10"), Verbatim("01"),
    Verbatim("1."), Verbatim("'a'"), Verbatim("undefined"), Verbatim('"\\ud800"'),
    Verbatim('"\\udc00"'), Verbatim('"\\ud800\\ud800"'), Verbatim('"\\u0000"'),
    Verbatim('"\\x41"'), Verbatim('"\udcff\udcfe"'), Verbatim('"\udced\udca0\udc80"'),
    Verbatim('"\udcc0\udcaf"'), Verbatim('"tab\tand\nline"'), Verbatim(""), Verbatim("[1,]"),
    Verbatim('{"a":1,}'), Verbatim("/* c */ 1"), Verbatim("[" * 200 + "]" * 200),
    Verbatim('{"a":' * 150 + "1" + "}" * 150), Verbatim("1e-400"), Verbatim("true false"),
)  # fmt: skip
"""What no field expects."""

Words = Callable[[Random], Any]


def of(*lists: Sequence[Any]) -> Words:
    """Choose from lists, all of which are equally likely."""
    return lambda random: random.choice(random.choice(lists))


def prefixed(random: Random) -> str:
    """Make an address with a prefix length."""
    return f"{random.choice(ADDRESSES)}/{random.choice((24, 24, 64, 0, 32, 129, 29))}"


def pool_id(random: Random) -> str:
    """Make the id of a pool, most times of one there could be."""
    pools = random.choice((POOLS4[:6], POOLS4, POOLS6[:3], POOLS6))
    parts = [random.choice(SPACES[:2]), random.choice(pools)]
    if random.random() < 0.1:
        parts.append(random.choice(POOLS4))
    return "/".join(parts)


def options(random: Random) -> dict[str, Any]:
    """Make options, few or very many."""
    if random.random() < 0.01:
        return {f"com.example.o{n}": "x" for n in range(random.choice((255, 256, 257)))}
    names = random.sample(sorted(OPTIONS), random.choice((0, 0, 0, 1, 1, 2, 5)))
    return {name: random.choice(OPTIONS[name]) for name in names}


WORDS: Mapping[str, Words] = {
    "NetworkID": of(NETWORKS),
    "EndpointID": of(ENDPOINTS),
    "PoolID": pool_id,
    "AddressSpace": of(SPACES),
    "Pool": of(POOLS4[:6], POOLS4, POOLS6[:3], POOLS6, [""]),
    "SubPool": of([""], [""], POOLS4, POOLS6),
    "Gateway": prefixed,
    "Address": of(ADDRESSES, [""], ["10.77.0.2/24", "10.77.1.3/24"]),
    "AddressIPv6": of([""], ["fd77:0::2/64", "fd77:1::9/64"]),
    "MacAddress": of(MACS, [""]),
    "SandboxKey": of(SANDBOXES[:6], SANDBOXES),
    "HostIP": of(HOST_IPS, [""]),
    "Proto": of([6, 17, 132], [0, 1, 58, 255, 256]),
    "Port": of([80, 53], [1, 65535, 0, 65536]),
    "HostPort": of([0, 8080, 8081, 65535], [1, 20000]),
    "HostPortEnd": of([0, 8080, 8090], [65535, 1]),
    "DiscoveryType": of([1], [0, 2, 1 << 70]),
    "com.docker.network.generic": options,
    "RequestAddressType": of(["com.docker.network.gateway", "", "x"]),
}


class Grammar:
    """Makes requests; `sound` is the share of fields that are left as they should be."""

    def __init__(self, random: Random, *, sound: float = 0.9) -> None:
        """Draw from a source of chance."""
        self.random = random
        self.sound = sound

    def chance(self, share: float) -> bool:
        """Tell whether something happens that happens in this share of cases."""
        return self.random.random() < share

    def method(self) -> str:
        """Choose a method."""
        return self.random.choice(sorted(METHODS))

    def message(self, method: str) -> Any:
        """Make a message for a method, with a flaw or several, or without."""
        tree = self.struct(inspect.type_info(METHODS[method].request))
        flaws = self.random.choices((0, 1, 2, 6), (35, 40, 20, 5))[0]
        for _ in range(flaws):
            tree = self.damage(tree)
        return tree

    def struct(self, kind: Any) -> Any:
        """Make an object; what may lack sometimes does."""
        return {
            field.encode_name: self.field(field.encode_name, field.type)
            for field in kind.fields
            if field.required or self.chance(0.7)
        }

    def field(self, name: str, kind: Any) -> Any:
        """Make a field by its name, else by its type."""
        if name in WORDS and self.chance(self.sound):
            return WORDS[name](self.random)
        return self.value(kind)

    def value(self, kind: Any) -> Any:  # noqa: PLR0911 - one per type
        """Make a value of a type, at its edges."""
        random = self.random
        match kind:
            case inspect.StructType():
                return self.struct(kind)
            case inspect.UnionType():
                return self.value(random.choice(kind.types))
            case inspect.IntType():
                low, high = kind.ge or 0, kind.le or 1 << 16
                return random.choice((low, high, low - 1, high + 1, (low + high) // 2))
            case inspect.StrType():
                most = kind.max_length or 100
                return "x" * random.choice((0, 1, 5, most, most + 1))
            case inspect.BoolType():
                return self.chance(0.5)
            case inspect.NoneType():
                return None
            case _:
                return self.several(kind)

    def several(self, kind: Any) -> Any:
        """Make a list or a map, else anything."""
        random = self.random
        match kind:
            case inspect.VarTupleType() | inspect.ListType():
                most = kind.max_length or 10
                few = random.choice((0, 1, 1, 2, 3))
                count = most + 1 if self.chance(0.002) else few
                # Many may be the same: making each one takes longer than reading it.
                made = [self.value(kind.item_type) for _ in range(min(count, 5))]
                return [made[n % 5] for n in range(count)]
            case inspect.DictType():
                if self.chance(0.5):
                    return options(random)
                return {
                    self.word(): self.value(kind.value_type)
                    for _ in range(random.choice((0, 1, 3)))
                }
            case _:
                return random.choice(NASTY)

    def word(self) -> str:
        """Make the key of a map."""
        return self.random.choice(("a", "", "x" * 4097, "com.example", "\0", "é" * 9))

    # Damage.

    def damage(self, tree: Any) -> Any:  # noqa: PLR0911 - one per kind
        """Replace, drop, double or add something somewhere in a tree."""
        random = self.random
        if not isinstance(tree, dict | list) or not tree or self.chance(0.1):
            return random.choice(NASTY)
        if isinstance(tree, list):
            place = random.randrange(len(tree))
            return [*tree[:place], self.damage(tree[place]), *tree[place + 1 :]]
        name = random.choice(list(tree))
        match random.randrange(7):
            case 0:
                return {k: v for k, v in tree.items() if k != name}
            case 1:
                return Pairs([*tree.items(), (name, random.choice(NASTY))])
            case 2:
                return {**tree, name.lower(): tree[name], name.upper(): None}
            case 3:
                return {**tree, f"Extra{random.randrange(9)}": random.choice(NASTY)}
            case 4:
                return {**tree, name: [tree[name]]}
            case _:
                return {**tree, name: self.damage(tree[name])}

    def body(self, method: str) -> bytes:
        """Make the bytes of a request's body."""
        text = written(self.message(method))
        if self.chance(0.06):
            text = self.torn(text)
        return text.encode("utf-8", "surrogateescape")

    def torn(self, text: str) -> str:
        """Damage JSON as text."""
        random = self.random
        place = random.randrange(len(text) + 1)
        return random.choice(
            (
                text[:place],
                text[:place] + random.choice('"{}[],:\\\0\udcff') + text[place:],
                text[:place] + text[place + 1 :],
                text + text,
                text + "x",
                "\ufeff" + text,
                f"[{text}]",
                f'"{text}"',
                text.replace(":", "="),
                " " * 1000 + text + "\n" * 1000,
                "",
            )
        )

    def large(self, method: str) -> bytes:
        """Make a body that is deep, or long, or both."""
        random = self.random
        match random.randrange(6):
            case 0:
                depth = random.choice((1000, 10_000, 100_000))
                opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
                text = opening * depth + random.choice(("", "1", closing * depth))
                text = random.choice(
                    (text, f'{{"Options":{text}}}', f'{{"X":{text},"NetworkID":"a"}}')
                )
            case 1:
                size = random.choice((LARGEST_BODY - 40, LARGEST_BODY + 1, 2 << 20))
                text = f'{{"NetworkID":"{"x" * size}"}}'
            case 2:
                ports = [{"Proto": 6, "Port": 80, "HostPort": 0}] * 8193
                ids = {"NetworkID": NETWORKS[0], "EndpointID": ENDPOINTS[0]}
                text = written(
                    {**ids, "Options": {"com.docker.network.portmap": ports}}
                )
            case 3:
                some = {f"k{n}": "x" * random.choice((1, 40)) for n in range(10_000)}
                text = written({"NetworkID": NETWORKS[1], "Options": some})
            case 4:
                extra = {f"a{n}": "10.77.0.9/24" for n in range(256)}
                pool = {"Pool": "10.77.0.0/24", "AuxAddresses": extra}
                text = written({"NetworkID": NETWORKS[2], "IPv4Data": [pool] * 64})
            case _:
                text = "[" + "1," * 300_000 + "1]"
        return text.encode()


def written(tree: Any) -> str:
    """Write a tree as JSON, or as what it holds instead."""
    match tree:
        case Verbatim():
            return str(tree)
        case Pairs():
            return written_pairs(tree.items)
        case dict():
            return written_pairs(list(tree.items()))
        case list():
            return "[" + ",".join(map(written, tree)) + "]"
        case _:
            return json.dumps(tree)


def written_pairs(items: Sequence[tuple[str, Any]]) -> str:
    """Write an object."""
    return "{" + ",".join(f"{json.dumps(k)}:{written(v)}" for k, v in items) + "}"
