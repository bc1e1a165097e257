"""The dataplane against the real kernel: all or nothing, twice is once, ours only."""

import asyncio
import errno
import json
import os
import time
from dataclasses import replace
from ipaddress import ip_interface, ip_network
from pathlib import Path

import pytest

from cnmdriver.dataplane import pairs
from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.dataplane.netlink import Netlink
from cnmdriver.errors import Conflict, KernelError
from cnmdriver.model import TCP, Attachment
from cnmdriver.plan import antispoof, devices, firewall, ops
from cnmdriver.plan.ops import (
    Address,
    Bridge,
    Element,
    Hold,
    Sysctl,
    Table,
    Veth,
    compare,
)

from .conftest import (
    HOST,
    PORTS,
    V4,
    V6,
    dump,
    endpoint,
    links,
    namespace,
    network,
    published,
    run,
    whole,
)

pytestmark = pytest.mark.root

NET = network(V4, V6)
PLAN = whole(NET, endpoint(NET, 2, *PORTS))
BRIDGE = devices.bridge(NET.id)
PORT = devices.port(f"ep-{NET.id}-2")
PEER = devices.peer(f"ep-{NET.id}-2")


def of(kind, plan=PLAN):
    """Return the first operation of a type."""
    return next(op for op in plan if isinstance(op, kind))


def other(net, number=3, *ports):
    """Return the plan of another network, which shares table and rules."""
    return whole(net, endpoint(net, number, *ports))


async def test_found_is_what_was_applied(kernel, plan):
    """After apply nothing lacks, nothing differs, and nothing is too much."""
    await kernel.apply(plan)
    difference = compare(plan, await kernel.found(plan))
    assert list(difference.lines()) == []


async def test_apply_twice_changes_nothing(kernel, plan):
    """A plan that holds is adopted: not one thing in the kernel is touched."""
    await kernel.apply(plan)
    before = dump(), indexes()
    await kernel.apply(plan)
    assert (dump(), indexes()) == before


async def test_clear_leaves_nothing(kernel, plan):
    """Clear takes everything back but the host's settings; a second one is well."""
    before = dump()
    await kernel.apply(plan)
    await kernel.clear(plan)
    await kernel.clear(plan)
    after = dump()
    kept = {f"/proc/sys/{path}" for path in kernel.changed_sysctls()}
    assert kept.isdisjoint(k for k in plan if isinstance(k, str))
    differing = {
        path
        for path, value in after["settings"].items()
        if before["settings"].get(path) != value
    }
    # Forwarding of all devices is also what new devices and each one have.
    assert all("forward" in path or path in kept for path in differing)
    for part in ("links", "addresses", "sockets"):
        assert before[part] == after[part]
    assert "pynet" not in after["nft"]
    assert [op for op in await kernel.found() if not getattr(op, "keep", False)] == []


async def test_clear_of_what_never_was(kernel, plan):
    """Clearing a plan that was never applied succeeds and changes nothing."""
    before = dump()
    await kernel.clear(plan)
    assert dump() == before


def indexes():
    """Return the index of each device: re-making one changes it."""
    return {
        link["ifname"]: link["ifindex"] for link in json.loads(run("ip", "-j", "link"))
    }


class Stop(Exception):
    """Raised by a step hook."""


class Hook:
    """A step hook that acts at the n-th step; the first is 0."""

    def __init__(self, act, at=-1):
        self.act = act
        self.at = at
        self.steps = []

    async def __call__(self, step):
        self.steps.append(step)
        if len(self.steps) - 1 == self.at:
            await self.act()


async def raise_stop():
    """Fail at a step."""
    raise Stop


async def cancel_self():
    """Cancel the running task at a step."""
    asyncio.current_task().cancel()
    await asyncio.sleep(0)


async def with_hook(tmp_path, hook):
    """Open a second dataplane in the same namespace."""
    kernel = Kernel(host=HOST, run_dir=tmp_path / "run", step=hook)
    await kernel.open()
    return kernel


async def test_steps_have_names(host, tmp_path):
    """Each operation is announced before it is done, by verb and kind."""
    assert host
    hook = Hook(raise_stop)
    kernel = await with_hook(tmp_path, hook)
    await kernel.apply(PLAN)
    await kernel.clear(PLAN)
    await kernel.close()
    assert [f"apply.{op.key[0]}" for op in PLAN] == hook.steps[: len(PLAN)]
    assert [f"clear.{op.key[0]}" for op in PLAN[::-1]] == hook.steps[len(PLAN) :]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("act", "error"), [(raise_stop, Stop), (cancel_self, asyncio.CancelledError)]
)
async def test_undo_at_each_step(host, tmp_path, act, error):
    """Wherever apply is stopped, by an error or a cancel, the kernel is as before."""
    assert host
    run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    before = dump()
    for at in range(len(PLAN)):
        hook = Hook(act, at)
        kernel = await with_hook(tmp_path, hook)
        with pytest.raises(error):
            await kernel.apply(PLAN)
        await kernel.close()
        assert without_filter(before) == without_filter(dump()), hook.steps[-1]
        assert kernel.changed_sysctls() == {}


def without_filter(state):
    """Leave out the empty chains of iptables, which its programs make by looking."""
    nft = state["nft"]
    for version in ("ip", "ip6"):
        for chain in ("INPUT", "FORWARD", "OUTPUT"):
            hook = f"type filter hook {chain.lower()} priority filter; policy accept;"
            nft = nft.replace(f"\tchain {chain} {{\n\t\t{hook}\n\t}}\n", "")
        nft = nft.replace(f"table {version} filter {{\n}}\n", "")
    return {**state, "nft": nft.replace("\n\n", "\n")}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("act", [raise_stop, cancel_self])
async def test_undo_beside_another_network(host, tmp_path, act):
    """Undoing one network leaves the other, with which it shares table and rules."""
    assert host
    first = await with_hook(tmp_path, Hook(act))
    shared = whole(network("10.201.0.0/24"), endpoint(network("10.201.0.0/24"), 2))
    await first.apply(shared)
    before = dump()
    await first.close()
    for at in range(0, len(PLAN), 3):
        kernel = await with_hook(tmp_path, Hook(act, at))
        with pytest.raises((Stop, asyncio.CancelledError)):
            await kernel.apply(PLAN)
        await kernel.close()
        assert before == dump()


@pytest.mark.timeout(120)
async def test_cancel_at_any_time(kernel):
    """A cancel between the steps leaves the whole plan or nothing of it."""
    await kernel.apply(PLAN)
    done = without_filter(dump())
    await kernel.clear(PLAN)
    restore_settings(kernel)
    nothing = without_filter(dump())
    outcomes = set()
    for wait in range(40):
        task = asyncio.create_task(kernel.apply(PLAN))
        await asyncio.sleep(wait / 1000)
        task.cancel()
        await asyncio.wait({task})
        state = without_filter(dump())
        outcomes.add(task.cancelled())
        assert without_macs(state) == without_macs(
            nothing if task.cancelled() else done
        )
        await kernel.clear(PLAN)
        restore_settings(kernel)
    assert True in outcomes


def without_macs(state):
    """Leave out the random MAC of a pair's host end."""
    found = {
        name: {k: v for k, v in link.items() if k != "address"}
        for name, link in state["links"].items()
    }
    return {**state, "links": found}


def restore_settings(kernel):
    """Put the host's settings back by hand, as nobody else would."""
    for path, value in kernel.changed_sysctls().items():
        Path("/proc/sys", path).write_text(value)


async def test_failure_of_the_kernel_undoes(kernel):
    """An operation the kernel refuses is named with its errno, and all is undone."""
    before = without_filter(dump())
    last = Veth(
        name="pe-x", peer="pc-x", mac="03:00:00:00:00:01", bridge=BRIDGE, mtu=1450,
        alias="pynet:01234567:endpoint:x",
    )  # fmt: skip
    with pytest.raises(KernelError, match=r"device pe-x failed: .*\(EADDRNOTAVAIL\)"):
        await kernel.apply((*PLAN, last))
    assert before == without_filter(dump())


async def test_failed_mend_is_undone(kernel):
    """What was mended in place before the failure is as it was before."""
    await kernel.apply(PLAN)
    run("ip", "link", "set", BRIDGE, "mtu", "1300", "address", "02:00:00:00:00:99")
    run("ip", "link", "set", PORT, "down", "alias", "")
    run("ip", "addr", "del", "10.200.1.1/24", "dev", BRIDGE)
    run("nft", "delete", "element", "inet", "pynet", "any4", "{ tcp . 8080 }")
    before = dump()
    bad = Address(device="pn-nowhere", interface=ip_interface("10.9.9.9/24"))
    with pytest.raises(KernelError, match="pn-nowhere"):
        await kernel.apply((*PLAN, bad))
    assert before == dump()


MENDS = {
    "bridge mtu": ["ip", "link", "set", BRIDGE, "mtu", "1300"],
    "bridge mac": ["ip", "link", "set", BRIDGE, "address", "02:00:00:00:00:99"],
    "bridge down": ["ip", "link", "set", BRIDGE, "down"],
    "bridge alias": ["ip", "link", "set", BRIDGE, "alias", ""],
    "pair mtu": ["ip", "link", "set", PORT, "mtu", "1300"],
    "pair master": ["ip", "link", "set", PORT, "nomaster"],
    "pair down": ["ip", "link", "set", PORT, "down"],
    "hairpin": ["bridge", "link", "set", "dev", PORT, "hairpin", "off"],
    "isolated": ["bridge", "link", "set", "dev", PORT, "isolated", "on"],
    "setting": ["sysctl", "-qw", f"net.ipv4.conf.{BRIDGE}.route_localnet=0"],
    "forwarding": ["sysctl", "-qw", "net.ipv4.ip_forward=0"],
    "address": ["ip", "addr", "del", "10.200.1.1/24", "dev", BRIDGE],
    "element": [
        "nft",
        "delete",
        "element",
        "inet",
        "pynet",
        "bridges",
        f"{{ {BRIDGE} }}",
    ],
    "rule": ["iptables", "-F", "DOCKER-USER"],
    "jump": ["iptables", "-F", "FORWARD"],
    "table": ["nft", "delete", "table", "inet", "pynet"],
}


@pytest.mark.parametrize("command", MENDS.values(), ids=MENDS.keys())
async def test_mend_in_place(kernel, command):
    """A change by another's hand is seen, and mended without making a device anew."""
    await kernel.apply(PLAN)
    before = links(), indexes()
    run(*command)
    difference = compare(PLAN, await kernel.found(PLAN))
    assert difference.lacking or difference.changed
    await kernel.apply(PLAN)
    assert not compare(PLAN, await kernel.found(PLAN))
    assert (links(), indexes()) == before


HIDDEN = {
    "group": ["ip", "link", "set", BRIDGE, "group", "0"],
    "snooping": ["ip", "link", "set", BRIDGE, "type", "bridge", "mcast_snooping", "1"],
    "addrgenmode": ["ip", "link", "set", PORT, "addrgenmode", "eui64"],
    "far end's mtu": ["ip", "link", "set", PEER, "mtu", "1300"],
}


@pytest.mark.parametrize("command", HIDDEN.values(), ids=HIDDEN.keys())
async def test_mend_what_operations_do_not_say(kernel, command):
    """Apply also mends what has no field of its own in an operation."""
    await kernel.apply(PLAN)
    before = links(), indexes()
    run(*command)
    assert links() != before[0]
    await kernel.apply(PLAN)
    assert (links(), indexes()) == before


async def test_settings_of_a_made_device(kernel):
    """Devices come as wanted: names, marks, MTU on both ends, up, no own addresses."""
    await kernel.apply(PLAN)
    found = links()
    bridge, port, peer = found[BRIDGE], found[PORT], found[PEER]
    assert bridge["address"] == "02:42:0a:c8:01:01"
    assert bridge["ifalias"] == f"pynet:01234567:network:{NET.id}"
    assert port["ifalias"] == f"pynet:01234567:endpoint:ep-{NET.id}-2"
    assert bridge["linkinfo"]["info_data"]["mcast_snooping"] == 0
    assert peer["address"] == "02:42:00:00:00:02"
    assert {"28782"} == {link["group"] for link in (bridge, port, peer)}
    assert {1450} == {link["mtu"] for link in (bridge, port, peer)}
    assert {"none"} == {link["inet6_addr_gen_mode"] for link in (bridge, port)}
    assert port["linkinfo"]["info_slave_data"]["hairpin"] is True
    assert port["linkinfo"]["info_slave_data"]["isolated"] is False
    assert "UP" in bridge["flags"]
    assert "UP" in port["flags"]
    assert "UP" not in peer["flags"]
    # None was made by the kernel: this is the plan's, on the bridge.
    assert run("ip", "addr").count("fe80") == run("ip", "addr").count("fe80::1/64") == 1


async def test_isolated_port(kernel):
    """Without inter-container communication the port is isolated by the bridge."""
    net = network(V4, icc=False)
    await kernel.apply(whole(net, endpoint(net, 2)))
    name = devices.port(f"ep-{net.id}-2")
    assert links()[name]["linkinfo"]["info_slave_data"]["isolated"] is True


async def test_far_end_in_a_sandbox(kernel):
    """
    A pair whose far end Docker has moved away is adopted.

    1. The far end goes: found shows neither its name nor its MAC, and no difference.
    2. Applying again leaves the pair; a new MTU is set on the end that is here.
    3. The far end comes back under its name: found shows it again.
    4. It comes back under another name: the pair is made anew.

    Result: a pair is remade only when its far end is here and wrong.
    """
    await kernel.apply(PLAN)
    index = indexes()[PORT]
    with namespace() as sandbox:
        run("ip", "link", "set", PEER, "netns", sandbox.path)
        found = of(Veth, await kernel.found())
        assert (found.peer, found.mac) == (None, None)
        assert not compare(PLAN, await kernel.found(PLAN))
        larger = tuple(replace(o, mtu=1460) if isinstance(o, Veth) else o for o in PLAN)
        await kernel.apply(larger)
        await kernel.apply(PLAN)
        assert indexes()[PORT] == index
        sandbox.run("ip", "link", "set", PEER, "netns", f"/proc/{os.getpid()}/ns/net")
    found = of(Veth, await kernel.found())
    assert (found.peer, found.mac) == (PEER, "02:42:00:00:00:02")
    assert indexes()[PORT] == index
    run("ip", "link", "set", PEER, "name", "eth7")
    assert compare(PLAN, await kernel.found(PLAN)).changed
    await kernel.apply(PLAN)
    assert not compare(PLAN, await kernel.found(PLAN))
    assert indexes()[PORT] != index
    assert "eth7" not in links()


async def test_a_device_that_a_sandbox_got_by_half(kernel, monkeypatch):
    """
    What broke off while a sandbox got a new device is finished by another try.

    1. The device is moved into the sandbox, and no address can be added.
    2. It is tried again.
    Result: there is one device, under the same name, with its address, and up.
    """
    await kernel.apply(PLAN)
    own = endpoint(NET, 2, *PORTS)
    given = Attachment(device=PEER, prefix="eth")
    words = (given, own.addresses, own.mac)
    add = Netlink.add_address

    async def refused(*_):
        raise KernelError("too slow")

    with namespace() as sandbox:
        monkeypatch.setattr(Netlink, "add_address", refused)
        with pytest.raises(KernelError, match="too slow"):
            await kernel.reattach(sandbox.path, *words)
        monkeypatch.setattr(Netlink, "add_address", add)
        assert await kernel.reattach(sandbox.path, *words) == "eth0"
        shown = json.loads(sandbox.run("ip", "-j", "addr", "show", "dev", "eth0"))[0]
        have = {each["local"] for each in shown["addr_info"]}
        assert have >= {str(address.ip) for address in own.addresses}
        assert "UP" in shown["flags"]
        with pytest.raises(KernelError, match=f"device {PEER} is not there"):
            await kernel.reattach(
                sandbox.path, given, own.addresses, "02:00:00:00:00:0f"
            )


async def test_remake_is_undone(kernel):
    """A pair that was made anew before a failure is there as it was before."""
    await kernel.apply(PLAN)
    run("ip", "link", "set", PEER, "address", "02:00:00:00:00:77")
    before = await kernel.found(PLAN)
    bad = Address(device="pn-nowhere", interface=ip_interface("10.9.9.9/24"))
    with pytest.raises(KernelError, match="pn-nowhere"):
        await kernel.apply((*PLAN, bad))
    assert await kernel.found(PLAN) == before
    assert links()[PEER]["address"] == "02:00:00:00:00:77"


async def test_another_kind_of_ours_is_remade(kernel):
    """A device of our group under a wanted name, but of another kind, is replaced."""
    pair = ["type", "veth", "peer", "name", "x"]
    run("ip", "link", "add", BRIDGE, "group", "28782", *pair)
    await kernel.apply(PLAN)
    assert links()[BRIDGE]["linkinfo"]["info_kind"] == "bridge"
    assert "x" not in links()


FOREIGN = {
    "another's bridge": ("type", "bridge"),
    "another's pair": ("type", "veth", "peer", "name", "foreign"),
}


@pytest.mark.parametrize("kind", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize("name", [BRIDGE, PORT])
async def test_foreign_device_is_untouched(kernel, name, kind):
    """A foreign device with a wanted name is a Conflict that names it, and stays."""
    run("ip", "link", "add", name, *kind)
    before = without_filter(dump())
    with pytest.raises(Conflict, match=f"device {name} is needed"):
        await kernel.apply(PLAN)
    assert without_filter(dump()) == before
    await kernel.clear(PLAN)
    assert without_filter(dump()) == before
    assert await kernel.found() == ()


async def test_foreign_far_end(kernel):
    """A foreign device with the name of a pair's far end is a Conflict, and stays."""
    run("ip", "link", "add", PEER, "type", "bridge")
    before = without_filter(dump())
    with pytest.raises(Conflict, match=f"a device {PEER} exists"):
        await kernel.apply(PLAN)
    assert without_filter(dump()) == before


async def test_another_hosts_device(kernel):
    """A device that another pynet marked is reported, never adopted or removed."""
    run("ip", "link", "add", BRIDGE, "group", "28782", "type", "bridge")
    run("ip", "link", "set", BRIDGE, "alias", "pynet:fedcba98:network:x")
    with pytest.raises(Conflict, match="pynet:fedcba98:network:x"):
        await kernel.apply(PLAN)
    await kernel.clear(PLAN)
    assert await kernel.found() == ()
    assert await kernel.foreign() == ((BRIDGE, "pynet:fedcba98:network:x"),)


async def test_crash_before_the_alias(kernel):
    """A device of our group and name without its alias is ours, and gets it."""
    run("ip", "link", "add", BRIDGE, "group", "28782", "type", "bridge")
    assert of(Bridge, await kernel.found()).alias == ""
    await kernel.apply(PLAN)
    assert not compare(PLAN, await kernel.found(PLAN))


async def test_leftovers_are_cleared_as_found(kernel):
    """What a crash left is found without a plan, and clearing that removes it."""
    await kernel.apply(PLAN)
    found = await kernel.found()
    assert {type(op) for op in PLAN} == {type(op) for op in found}
    await kernel.clear(found)
    left = await kernel.found()
    assert all(isinstance(op, Sysctl) and op.keep for op in left)
    assert set(links()) == {"lo"}


async def test_clear_goes_on_after_errors(kernel, monkeypatch):
    """Clear reports every failure in one error, and removes all the rest."""
    await kernel.apply(PLAN)

    async def refuse(link, address):
        raise KernelError(f"removing {address} from {link.name} failed")

    monkeypatch.setattr(kernel._host.netlink, "remove_address", refuse)
    with pytest.raises(KernelError) as caught:
        await kernel.clear(PLAN)
    assert "removing 10.200.1.1/24" in str(caught.value)
    assert "removing fd00:200:1::1/64" in str(caught.value)
    assert set(links()) == {"lo"}
    assert "pynet" not in run("nft", "list", "ruleset")


async def test_settings_are_remembered(kernel, tmp_path):
    """The first value of a setting of the host survives in the run directory."""
    await kernel.apply(PLAN)
    old = {"net/ipv4/ip_forward": "0", "net/ipv6/conf/all/forwarding": "0"}
    assert old.items() <= kernel.changed_sysctls().items()
    await kernel.close()
    again = await with_hook(tmp_path, Hook(raise_stop))
    assert again.changed_sysctls() == kernel.changed_sysctls()
    await again.apply(PLAN)
    assert again.changed_sysctls() == kernel.changed_sysctls()
    kept = {op.path: op.value for op in await again.found() if getattr(op, "keep", 0)}
    assert kept["net/ipv4/ip_forward"] == "1"
    await again.close()


async def test_a_setting_as_wanted_is_not_changed(kernel):
    """What the host had already is not remembered as changed."""
    run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    net = network(V4)
    await kernel.apply(whole(net))
    assert kernel.changed_sysctls() == {}


async def test_forwarding_keeps_router_advertisements(kernel):
    """Before the host routes IPv6, devices that listen to routers are told to go on."""
    run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    run("ip", "link", "add", "docker0", "type", "bridge")
    run("sysctl", "-qw", "net.ipv6.conf.eth1.accept_ra=0")
    await kernel.apply(PLAN)
    root = Path("/proc/sys/net/ipv6/conf")
    names = ("eth0", "eth1", "docker0", BRIDGE)
    values = {name: (root / name / "accept_ra").read_text().strip() for name in names}
    assert values == {"eth0": "2", "eth1": "0", "docker0": "1", BRIDGE: "0"}
    assert kernel.changed_sysctls()["net/ipv6/conf/eth0/accept_ra"] == "1"


async def test_ipv6_off(kernel):
    """On a host without IPv6 an IPv6 network fails with what to do, others do not."""
    run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    with pytest.raises(KernelError, match="IPv6 is off on this host") as caught:
        await kernel.apply(PLAN)
    assert "net.ipv6.conf.all.disable_ipv6 = 1" in str(caught.value)
    net = network(V4)
    plan = whole(net, endpoint(net, 2))
    await kernel.apply(plan)
    assert not compare(plan, await kernel.found(plan))


async def test_address_with_another_prefix(kernel):
    """A gateway with the wrong prefix length is exchanged, in both families."""
    await kernel.apply(PLAN)
    for wrong, right in (("10.200.1.1/16", 24), ("fd00:200:1::1/48", 64)):
        address = wrong.partition("/")[0]
        run("ip", "addr", "del", f"{address}/{right}", "dev", BRIDGE)
        run("ip", "addr", "add", wrong, "dev", BRIDGE)
    found = compare(PLAN, await kernel.found(PLAN))
    await kernel.apply(PLAN)
    await kernel.clear(found.surplus)
    assert not compare(PLAN, await kernel.found(PLAN))


async def test_taken_port(kernel):
    """A published port that a program has is refused, and the plan undone."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 8080)
    before = without_filter(dump())
    with pytest.raises(Conflict, match="8080"):
        await kernel.apply(PLAN)
    assert without_filter(dump()) == before
    server.close()
    await server.wait_closed()


async def test_relay_target_is_undone(kernel):
    """A held port that was given another target has the old one after a failure."""
    await kernel.apply(PLAN)
    hold = of(Hold)
    moved = replace(hold, target_port=81)
    bad = Address(device="pn-nowhere", interface=ip_interface("10.9.9.9/24"))
    with pytest.raises(KernelError):
        await kernel.apply((moved, bad))
    assert hold in await kernel.found()
    await kernel.apply((moved,))
    assert moved in await kernel.found()


async def test_routes(kernel):
    """Routes of the host are shown, but neither the default nor those of our devices."""
    await kernel.apply(PLAN)
    run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    for name in ("eth0", "eth1"):
        run("ip", "link", "set", name, "addrgenmode", "none", "up")
    run("ip", "addr", "add", "10.0.0.2/24", "dev", "eth0")
    run("ip", "-6", "addr", "add", "fd09::2/64", "dev", "eth0", "nodad")
    run("ip", "route", "add", "default", "via", "10.0.0.1")
    run("ip", "route", "add", "10.9.0.0/16", "via", "10.0.0.1")
    run("ip", "route", "add", "blackhole", "10.10.0.0/16")
    assert set(await kernel.routes()) == {
        (ip_network("10.0.0.0/24"), "eth0"),
        (ip_network("10.9.0.0/16"), "eth0"),
        (ip_network("fd09::/64"), "eth0"),
    }


async def test_plans_at_once(kernel):
    """Networks that come and go at the same time do not disturb each other."""
    nets = [network(f"10.210.{n}.0/24", f"fd00:210:{n}::/64") for n in range(8)]
    plans = [other(net, 2, published(TCP, 9000 + at)) for at, net in enumerate(nets)]
    await asyncio.gather(*(kernel.apply(plan) for plan in plans))
    own = [tuple(op for op in plan if op not in plans[0]) for plan in plans[1:]]
    await asyncio.gather(*(kernel.clear(plan) for plan in own))
    assert not compare(plans[0], await kernel.found(plans[0]))


async def test_looking_at_once(kernel):
    """Many may look at the kernel at the same time: it has one dump at a time."""
    await kernel.apply(whole(network("10.211.0.0/24")))
    routes = await asyncio.gather(*(kernel.routes() for _ in range(20)))
    assert routes == [routes[0]] * 20


async def test_bounded(kernel, monkeypatch):
    """A kernel that does not answer is an error within two seconds, and is undone."""
    before = without_filter(dump())
    real = kernel._host.netlink._ip.addr

    async def slow(*_args, **_words):
        await asyncio.sleep(60)

    monkeypatch.setattr(kernel._host.netlink._ip, "addr", slow)
    started = time.monotonic()
    with pytest.raises(KernelError, match="did not answer within 2 s"):
        await kernel.apply(PLAN)
    assert time.monotonic() - started < 5
    assert without_filter(dump()) == before
    monkeypatch.setattr(kernel._host.netlink._ip, "addr", real)


async def test_failure_inside_an_operation(kernel, monkeypatch):
    """Whichever request of a plan is refused, what came before is taken back."""
    before = without_filter(dump())
    netlink = kernel._host.netlink
    make = pairs.make

    async def refuse(*_args, **_words):
        raise KernelError("refused (EPERM)")

    def in_part(op, bridge, peer, place):
        made, _ = make(
            replace(op, alias="", hairpin=not op.hairpin), bridge, peer, place
        )
        return made, False

    def not_at_all(*_):
        return errno.EPERM, False

    for patches in (
        *(((netlink, verb, refuse),) for verb in ("change", "generate", "add_address")),
        ((pairs, "make", not_at_all),),
        ((pairs, "make", in_part), (netlink, "port", refuse)),
    ):
        with monkeypatch.context() as patch:
            for where, verb, instead in patches:
                patch.setattr(where, verb, instead)
            with pytest.raises(KernelError, match="EPERM"):
                await kernel.apply(PLAN)
        assert without_filter(dump()) == before, patches
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "make", in_part)
        await kernel.apply(PLAN)
    assert not compare(PLAN, await kernel.found(PLAN))


async def test_not_opened(tmp_path):
    """A dataplane that was not opened says so."""
    kernel = Kernel(host=HOST, run_dir=tmp_path)
    with pytest.raises(KernelError, match="before it was opened"):
        await kernel.apply(PLAN)
    with pytest.raises(KernelError, match="before it was opened"):
        await kernel.apply((of(Bridge),))


async def test_open_and_close_leave_no_descriptor(host, tmp_path):
    """Closing gives back every socket and thread; closing twice is well."""
    assert host
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        kernel = await with_hook(tmp_path, Hook(raise_stop))
        await kernel.apply(PLAN)
        await kernel.close()
        await kernel.close()
    # The default executor's threads hold none.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


async def test_errno_is_named(kernel):
    """A refusal names operation, reason and errno."""
    net = network(V6)
    address = Address(
        device=devices.bridge(net.id), interface=ip_interface("fd00::1/64")
    )
    bridge = of(Bridge, whole(net))
    off = Sysctl(
        path=f"net/ipv6/conf/{bridge.name}/disable_ipv6", value="1", device=bridge.name
    )
    with pytest.raises(KernelError) as caught:
        await kernel.apply((bridge, off, address))
    assert errno.errorcode[errno.EACCES] in str(caught.value)
    assert f"adding address fd00::1/64 to {bridge.name} failed" in str(caught.value)


async def test_commands_do_the_same(kernel, plan):
    """The commands of a plan, typed by hand, make what apply makes."""
    for tool in ("iptables", "ip6tables"):
        run(tool, "-N", "DOCKER-USER")
        run(tool, "-I", "FORWARD", "-j", "DOCKER-USER")
    for op in plan:
        for words in op.commands():
            run(*words)
    holds = [op for op in plan if isinstance(op, Hold)]
    difference = compare(plan, await kernel.found(plan))
    assert difference.lacking == tuple(holds)
    assert not difference.changed
    assert not difference.surplus
    before = without_sockets(dump()), indexes()
    await kernel.apply(plan)
    assert (without_sockets(dump()), indexes()) == before


def without_sockets(state):
    """Leave out the sockets of this process, for which there is no command."""
    return {**state, "sockets": ""}


async def test_table_stays_for_others(kernel):
    """A table is made once, and clearing one network's elements leaves it."""
    await kernel.apply(PLAN)
    elements = tuple(op for op in PLAN if isinstance(op, Element))
    await kernel.clear(elements)
    found = [op for op in await kernel.found() if isinstance(op, Table | Element)]
    tables = (antispoof.table(ops.HOST), firewall.table())
    assert found == [replace(table, text=None) for table in tables]
