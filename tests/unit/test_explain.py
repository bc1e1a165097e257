"""The text of `pynet explain`: whole, in order, each thing once, safe to run."""

import shlex
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address

import pytest

from cnmdriver.insight.explain import PURPOSES, Part, explain, script
from cnmdriver.model import TCP
from cnmdriver.plan import devices, ops
from cnmdriver.plan.ops import Accept, Bridge, Element, Hold
from cnmdriver.store import records
from cnmdriver.store.view import Known
from tests import scene
from tests.fakes import cluster, level, rig
from tests.scene import BLUE, DB, WEB


@pytest.fixture
async def made(tmp_path):
    """Build a host with two networks and three sandboxed devices."""
    async with rig(tmp_path) as built:
        await scene.populate(built)
        yield built


def text_of(made):
    """Return the text for all networks."""
    return explain(made.site, list(made.site.members()))


def commands(text):
    """Return the commands of a text, as bash splits them."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    words, found = shlex.shlex(lines, posix=True, punctuation_chars="\n"), []
    words.whitespace = " \t"
    words.whitespace_split = True
    words.commenters = ""
    command = []
    for word in words:
        if word.strip("\n"):
            command.append(word)
        elif command:
            found.append(tuple(command))
            command = []
    return found + ([tuple(command)] if command else [])


async def test_every_operation_has_its_commands_once(made):
    """Each command of each planned operation stands in the text exactly once."""
    found = commands(text_of(made))
    for op in made.site.desired():
        for command in op.commands():
            if command[:3] != ("nft", "add", "element"):
                assert found.count(command) == 1, command
    elements = [c[-1] for c in found if c[:3] == ("nft", "add", "element")]
    planned = [op for op in made.site.desired() if isinstance(op, Element)]
    assert sorted(elements) == sorted(f"{{ {op.text} }}" for op in planned)


async def test_shared_operations_come_with_the_first_network(made):
    """The table and the rules that all networks share precede the second network."""
    text = text_of(made)
    first, second = text.split("======== network green")
    assert first.count("table inet pynet {") == 1
    assert "table inet pynet {" not in second
    assert "iptables" not in second


async def test_dockers_chain_precedes_the_first_rule(made):
    """Docker's chain is marked and made once per version, before our rules in it."""
    lines = text_of(made).splitlines()
    mark = lines.index("# Docker: the chain it leaves to others")
    for tool in ("iptables", "ip6tables"):
        made_at = lines.index(f"{tool} -w 5 -N DOCKER-USER")
        ours = [
            n for n, line in enumerate(lines) if line.startswith(f"{tool} -w 5 -I D")
        ]
        assert mark < made_at < min(ours)
        assert len(ours) == 2


async def test_docker_puts_a_device_into_its_sandbox(made):
    """What Docker does after Join stands below its mark, in the order it does it."""
    section = text_of(made).split("======== endpoint db on network blue")[1]
    section = section.split("# ====")[0]
    _, before, after = section.split("# Docker: the sandbox\n")
    assert before.split("\n")[:2] == ["ip netns add bbbbbbbbbbbb", ""]
    assert after.split("\n") == [
        "ip link set pc-3a26c64231 netns bbbbbbbbbbbb name eth0",
        "ip -n bbbbbbbbbbbb link set eth0 address 02:42:0a:01:00:03",
        "ip -n bbbbbbbbbbbb addr add 10.1.0.3/24 dev eth0",
        "ip -n bbbbbbbbbbbb addr add fd00:1::3/64 dev eth0 nodad",
        "ip -n bbbbbbbbbbbb link set eth0 up",
        "ip -n bbbbbbbbbbbb -4 route add default via 10.1.0.1",
        "ip -n bbbbbbbbbbbb -6 route add default via fd00:1::1",
        "",
        "",
    ]


async def test_sandbox_on_two_networks(made):
    """A sandbox is made once, its devices are counted, and it has one way out."""
    found = [c for c in commands(text_of(made)) if "aaaaaaaaaaaa" in c]
    assert found.count(("ip", "netns", "add", "aaaaaaaaaaaa")) == 1
    assert [c[-1] for c in found if "netns" in c and "name" in c] == ["eth0", "eth1"]
    ways = [c[-1] for c in found if "default" in c]
    assert ways == ["10.1.0.1", "fd00:1::1"]


async def test_endpoint_without_a_sandbox(made):
    """An endpoint that has not joined is named, and nothing is typed for it."""
    section = text_of(made).split("======== endpoint batch on network green")[1]
    section = section.split("# ====")[0]
    assert section.strip() == "# it has not joined a sandbox: nothing holds for it yet"


async def test_held_ports_are_comments(made):
    """Ports the daemon holds are told in comments, as there is no command for it."""
    section = text_of(made).split("======== endpoint web on network blue")[1]
    assert "\n# - 8080/tcp\n# - 5353/udp of 127.0.0.1\n" in section


async def test_one_network_is_whole(made):
    """The text for one network alone has all that the network stands on."""
    member = made.site.member(scene.GREEN)
    text = explain(made.site, [member])
    assert "network blue" not in text
    assert "table inet pynet {" in text
    assert ("ip", "netns", "add", "aaaaaaaaaaaa") in commands(text)
    assert "ip -n aaaaaaaaaaaa -4 route add default via 10.2.0.1" in text


async def test_gateway_of_docker_is_said(tmp_path):
    """On a network whose way out is Docker's there is no route, but a remark."""
    async with rig(tmp_path) as made:
        await scene.network(made, scene.BLUE, "10.1.0.0/24", gateway="docker")
        await scene.endpoint(made, scene.BLUE, scene.WEB, "10.1.0.2/24")
        await made.networks.join(scene.BLUE, scene.WEB, scene.SANDBOX + "cc")
        text = text_of(made)
    assert "route add default" not in text
    assert "# Docker: the way out is a device of its own, on docker_gwbridge" in text


async def test_lost_network_record(made):
    """A network whose record is gone is named; the others are explained."""
    member = made.site.member(scene.GREEN)
    key = records.network(member.network)
    made.site.view.write(key, None, made.site.view.seen(key) + 1)
    text = text_of(made)
    assert "network green\n\n# it has no record in the store" in text
    assert "network blue" in text


async def test_names_cannot_leave_their_comment(made):
    """A name with a line break stays in its comment and runs nothing."""
    made.site.names[scene.BLUE] = "blue\nreboot\x1b[2J"
    made.site.names[scene.WEB] = "web\r\nreboot"
    text = text_of(made)
    assert "# ======== network blue?reboot?[2J 10.1.0.0/24" in text
    assert ("reboot",) not in commands(text)
    assert "\x1b" not in text


async def test_hostile_ids_are_quoted(made):
    """What others chose freely is one word of a command, whatever is in it."""
    endpoint = made.site.endpoints(made.site.member(scene.BLUE).network)[0]
    hostile = replace(
        endpoint, id="x; reboot\n$(reboot)", sandbox="/run/`reboot`; reboot"
    )
    # From the store it would not come: it is no record there.
    key = records.endpoint(hostile.network, hostile.id)
    made.site.view.set(key, Known(hostile, 1))
    found = commands(text_of(made))
    assert not [c for c in found if c[0] == "reboot"]
    assert ("ip", "netns", "add", "`reboot`; reboot") in found


def test_nothing_is_explained_by_the_head_alone():
    """Without networks the text has comments only."""
    assert commands(script("h1", [])) == []


def test_parts_of_one_purpose_share_a_comment():
    """Operations of one kind in a row stand below one comment."""
    bridge = Bridge(name="b", mac="02:42:0a:01:00:01", mtu=1500, alias="a")
    hold = Hold(
        protocol=TCP,
        address=ip_address("::1"),
        port=80,
        target=None,
        target_port=80,
    )
    text = script("h", [Part(title="t", plan=(bridge, Accept(version=4), hold, hold))])
    assert text.count("# the bridge\n") == 1
    assert text.count("# - 80/tcp of ::1\n") == 1


# Several hosts.


@asynccontextmanager
async def overlay(tmp_path, **said):
    """Build two hosts with an overlay; each has a sandbox on it."""
    async with cluster(tmp_path, 2) as hosts:
        for last, (made, web) in enumerate(zip(hosts, (WEB, DB), strict=True), 11):
            made.site.names[BLUE] = "blue"
            await scene.network(made, BLUE, "10.1.0.0/24", "fd00:1::/64", **said)
            await level(*hosts)
            faces = (f"10.1.0.{last}/24", f"fd00:1::{last}/64")
            await scene.endpoint(made, BLUE, web, *faces)
            await made.networks.join(BLUE, web, scene.SANDBOX + "aaaaaaaaaaaa")
        await level(*hosts)
        yield hosts


ALL = {"gateway": "pynet", "host_access": "true", "flood": "true"}


@pytest.mark.parametrize("said", [{}, ALL, {"host_access": "true"}])
async def test_overlay_is_whole(tmp_path, said):
    """Every command of an overlay stands in the text once, after what it stands on."""
    async with overlay(tmp_path, **said) as (made, _):
        found = commands(text_of(made))
        wanted = [c for op in made.site.desired() for c in op.commands()]
    assert [c for c in wanted if found.count(c) != 1] == []
    ours = [c for c in found if c in wanted]
    assert sorted(ours) == sorted(wanted)
    assert ("ip", "netns", "add", "pynet") in ours


async def test_other_hosts(tmp_path):
    """What other hosts have stands below a title of its own, and no sandbox of theirs."""
    async with overlay(tmp_path, flood="true") as (made, _):
        text = text_of(made)
    _, others = text.split("# ======== what other hosts have on network blue\n")
    tunnel = devices.vxlan(made.site.member(BLUE).network)
    bridge = devices.bridge(made.site.member(BLUE).network)
    mac = "02:42:0a:01:00:0c"
    assert others.split("\n") == [
        "",
        "# what is for everybody goes to every host",
        (
            f"bridge -n pynet fdb append 00:00:00:00:00:00 dev {tunnel}"
            " dst 192.0.2.2 self permanent"
        ),
        "",
        "# who is where, as nothing is learnt: MAC to host or port, address to MAC",
        (
            f"bridge -n pynet fdb replace {mac} dev {tunnel}"
            " dst 192.0.2.2 self permanent"
        ),
        f"bridge -n pynet fdb replace {mac} dev {tunnel} master static sticky",
        (
            f"ip -n pynet -4 neigh replace 10.1.0.12 lladdr {mac}"
            f" dev {bridge} nud permanent"
        ),
        (
            f"ip -n pynet -6 neigh replace fd00:1::12 lladdr {mac}"
            f" dev {bridge} nud permanent"
        ),
        "",
    ]


async def test_purposes_of_an_overlay(tmp_path):
    """Each kind of thing is said in words, in the order in which it is made."""
    async with overlay(tmp_path, **ALL) as (made, _):
        section = text_of(made).split("# ====")[1]
    lines = [x[2:] for x in section.splitlines() if x.startswith("# ")]
    assert lines == [
        "a namespace for the overlays: the host's firewall sees nothing in it",
        "nor are iptables' rules asked there",
        (
            "what each port may send, and that no frame from or to a gateway of ours "
            "passes a tunnel"
        ),
        "the chains every packet of ours passes, and the sets they look into",
        "what the sets know",
        "Docker: the chain it leaves to others",
        "let our devices pass the host's own FORWARD chain",
        "let the host route",
        "what the sets know",
        "the bridge",
        "settings of the device",
        "the tunnels: a port of the bridge that leads to the other hosts",
        "a pair: one end is a port of the bridge, the other is the gateway",
        "the host's end of that pair",
        "who is where, as nothing is learnt: MAC to host or port, address to MAC",
        "settings of the device",
        "the host's addresses there",
        "a pair: one end is a port of the bridge, the other is the host's own",
        "the host's end of that pair",
        "who is where, as nothing is learnt: MAC to host or port, address to MAC",
        "settings of the device",
        "the host's addresses there",
        "the host's way to the pools, by its own address there",
        "what the sets know",
    ]


def test_every_operation_has_a_purpose():
    """No kind of operation is printed without a word on what it is for."""
    kinds = {kind for kind in vars(ops).values() if isinstance(kind, type)}
    kinds = {kind for kind in kinds if issubclass(kind, ops.Op)} - {ops.Op}
    assert kinds - set(PURPOSES) == {ops.Table, ops.Veth}
