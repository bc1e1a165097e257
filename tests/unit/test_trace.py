"""Who is traced, what other hosts are told, and what a trace makes of what it saw."""

import asyncio
from dataclasses import replace
from ipaddress import ip_address, ip_interface

import pytest

from cnmdriver.errors import Conflict, NotFound, StoreError
from cnmdriver.insight import trace as module
from cnmdriver.insight.doctor import absent, doctor
from cnmdriver.insight.pairs import choose
from cnmdriver.insight.trace import answer, trace
from cnmdriver.insight.verdict import Below, Seen, judge
from cnmdriver.model import Endpoint, Hop, Question
from cnmdriver.plan.ops import Veth
from cnmdriver.plan.sight import Echo, Face, Filters, Inner, Way
from cnmdriver.store import records
from tests import scene
from tests.fakes import cluster, level, rig

TO = ip_address("10.1.0.3")
BASE = ip_address("192.0.2.12")


@pytest.fixture
async def made(tmp_path):
    """Build a host with two networks, whose sandboxes are as they should be."""
    async with rig(tmp_path) as built:
        await scene.populate(built)
        for one in built.site.view.all(Endpoint, "endpoints/"):
            face = Face(
                name="eth0", mac=one.mac, mtu=1500, up=True, addresses=one.addresses
            )
            ways = (Way(to=TO, device="eth0"),)
            if one.network == built.site.member(scene.BLUE).network:
                built.kernel.inners[one.sandbox] = Inner(face=face, ways=ways)
        yield built


async def test_two_on_one_host(made):
    """Two endpoints that reach each other are traced, step by step."""
    made.kernel.inners.clear()
    for one in made.site.view.all(Endpoint, "endpoints/"):
        face = Face(name="e", mac=one.mac, mtu=1, up=True, addresses=one.addresses)
        made.kernel.inners[one.id] = Inner(face=face)

    async def inner(sandbox, pair, mac, towards):
        (one,) = [
            e
            for e in made.site.view.all(Endpoint, "endpoints/")
            if e.sandbox == sandbox and e.mac == mac
        ]
        return made.kernel.inners[one.id]

    made.kernel.inner = inner
    found = await trace(made.site, "web", "10.1.0.3", repairs=True)
    assert found["reachable"]
    assert found["verdict"].startswith("reachable: 10.1.0.3 answers in 0.5 ms")
    assert (found["network"], found["from"]["name"]) == ("blue", "web")
    assert [h for h in found["hops"] if h["well"] is not True] == []
    assert [p["bytes"] for p in found["probes"]] == [84, 84, 1500, 1500]


@pytest.mark.parametrize(
    ("source", "target"),
    [("web", "db"), ("e1e1", "e2e2"), ("fd00:1::2", "db"), ("10.1.0.2", "10.1.0.3")],
)
async def test_who_is_meant(made, source, target):
    """Names, ids, their starts and addresses mean the same two."""
    pair = await choose(made.site, source, target)
    assert (pair.mine.id, pair.other.id) == (scene.WEB, scene.DB)


@pytest.mark.parametrize(
    ("source", "target", "error", "said"),
    [
        ("nobody", "db", NotFound, "no endpoint is called 'nobody'"),
        ("", "db", NotFound, "no endpoint is called ''"),
        ("web", "\x1b[2J" + "x" * 200, NotFound, r"'\x1b[2J"),
        ("db", "10.1.0.3", NotFound, "are one endpoint"),
        ("db", "batch", NotFound, "db is on network blue and batch on green"),
        ("10.1.0.2", "batch", NotFound, "published ports"),
    ],
)
async def test_who_is_not(made, source, target, error, said):
    """What is no pair of one network is refused, with the reason."""
    with pytest.raises(error) as refused:
        await choose(made.site, source, target)
    assert said in str(refused.value)
    assert str(refused.value).isprintable()


async def test_a_name_of_several(made):
    """A name of two endpoints on one network is refused with the ids."""
    made.site.names[scene.DB] = made.site.names[scene.WEB]
    third = replace(
        next(made.site.view.all(Endpoint, "endpoints/")),
        network=made.site.member(scene.BLUE).network,
        id="f" * 64,
        ipv4=ip_interface("10.1.0.77/24"),
        ipv6=None,
    )
    key = records.endpoint(third.network, third.id)
    await made.state.commit(lambda draft: draft.put(key, third))
    with pytest.raises(Conflict, match="say which two of"):
        await choose(made.site, "web", "f" * 64)


# What follows from what was seen.


def echo(answered=True, size=84, to=TO):
    """Return what became of a probe."""
    return Echo(to=to, size=size, milliseconds=0.5 if answered else None)


WELL = Seen(host="h1", hop=Hop(name="port", found="up"))
SICK = Seen(host="h2", hop=Hop(name="bridge", found="down", well=False, remedy="up!"))
DARK = Seen(host="h2", hop=Hop(name="far side", found="not looked at: gone", well=None))
BLIND = Seen(host="h2", hop=Hop(name="kernel", found="it hangs", well=None))
NO_BASE = Below(None, None)


@pytest.mark.parametrize(
    ("path", "probes", "below", "said"),
    [
        ([WELL], [echo()], NO_BASE, "reachable: 10.1.0.3 answers in 0.5 ms"),
        ([SICK], [echo()], NO_BASE, "answers in 0.5 ms; but on h2, bridge: down"),
        ([WELL, SICK], [echo(False)], NO_BASE, "dies on h2, bridge: down"),
        ([DARK, SICK], [echo(False)], NO_BASE, "dies on h2, bridge: down"),
        ([SICK], [], NO_BASE, "dies on h2, bridge: down"),
        (
            [WELL],
            [echo(), echo(False, 1450)],
            NO_BASE,
            "packets of 84 bytes reach 10.1.0.3, those of 1450 die",
        ),
        (
            [WELL, DARK],
            [echo(False)],
            NO_BASE,
            "dies where this host cannot see: all of its own is well, h2 was not",
        ),
        (
            [WELL, BLIND],
            [echo(False)],
            NO_BASE,
            "dies where nobody looked: on h2, kernel: it hangs",
        ),
        ([WELL], [echo(False)], NO_BASE, "dies although all is well"),
        (
            [WELL],
            [echo(False)],
            Below(echo(False, to=BASE), None),
            "192.0.2.12 answers no ping either",
        ),
        (
            [WELL],
            [echo(False)],
            Below(echo(to=BASE), 0),
            "pings of hosts pass, and no frame arrives at h2",
        ),
        (
            [WELL],
            [echo(False)],
            Below(echo(to=BASE), 12),
            "frames arrive there, and no answer comes back",
        ),
        ([WELL], [], NO_BASE, "nothing was sent: the two share no kind of address"),
        (
            [WELL],
            [replace(echo(False), error="operation not permitted")],
            Below(echo(to=BASE), None),
            "no packet could be sent from the container: operation not permitted",
        ),
        (
            [WELL],
            [echo(False), echo()],
            Below(echo(to=BASE), None),
            "no answer comes back",
        ),
    ],
)
def test_verdicts(path, probes, below, said):
    """One line says where it ends; what is not well says how it is mended."""
    verdict = judge(path, tuple(probes), below=below, there="h2")
    assert said in verdict.line
    assert verdict.remedy or verdict.line.startswith(("reachable: 10", "nothing was"))


# Between hosts.


@pytest.fixture
async def pair(tmp_path):
    """Build two hosts with an endpoint each on one overlay."""
    async with cluster(tmp_path, 2) as rigs:
        for number, one in enumerate(rigs, 2):
            await scene.network(one, f"{number}" * 64, "10.9.0.0/24")
            await scene.endpoint(
                one, f"{number}" * 64, f"e{number}" * 32, f"10.9.0.{number}/24"
            )
            await one.networks.join(f"{number}" * 64, f"e{number}" * 32, f"/s/{number}")
            (mine,) = [
                e
                for e in one.site.view.all(Endpoint, "endpoints/")
                if e.host == one.site.host.id
            ]
            face = Face(
                name="e", mac=mine.mac, mtu=1, up=True, addresses=mine.addresses
            )
            one.kernel.inners[mine.sandbox] = Inner(face=face)
        await level(*rigs)

        async def ask(host, question):
            assert host == rigs[1].site.host.id
            asking = rigs[0].site.host.id
            return await answer(rigs[1].site, asking, question, repairs=True)

        rigs[0].site.ask = ask
        yield rigs


async def test_two_hosts(pair):
    """The steps of both hosts are there, in order, with the host's name."""
    found = await trace(pair[0].site, "10.9.0.3", "10.9.0.2", repairs=True)
    assert found["reachable"]
    assert found["from"]["host"] == "h1"
    assert [h for h in found["hops"] if h["well"] is not True] == []
    hosts = [h["host"] for h in found["hops"]]
    assert hosts == sorted(hosts[:-2]) + ["h1", "h1"]
    assert [h["name"] for h in found["hops"][-2:]] == ["firewall in", "tunnel guard"]


async def test_a_name_of_another_host(pair):
    """Who is not known by name here is asked for; only the host's own counts."""
    pair[1].site.names["e3" * 32] = "db"
    pair[1].site.names["e2" * 32] = "mine"
    found = await trace(pair[0].site, "10.9.0.2", "db", repairs=True)
    assert (found["to"]["id"], found["to"]["name"]) == ("e3" * 32, "db")
    assert found["reachable"]
    for name in ("mine", "x" * 300, "a\nb"):
        with pytest.raises(NotFound, match="no endpoint is called"):
            await trace(pair[0].site, "10.9.0.2", name, repairs=True)


async def test_a_name_when_nobody_answers(pair):
    """A host that does not answer has no endpoint of the name."""

    async def ask(host, question):
        raise StoreError("silent")

    pair[0].site.ask = ask
    with pytest.raises(NotFound, match="on a host that answers"):
        await trace(pair[0].site, "10.9.0.2", "db", repairs=True)


async def test_the_other_side_is_broken(pair):
    """What the other host lacks is named as the other host's."""
    key = next(k for k in pair[1].kernel.ops if k[0] == "element" and "vteps4" in k)
    del pair[1].kernel.ops[key]
    pair[0].kernel.silent = True
    found = await trace(pair[0].site, "10.9.0.2", "10.9.0.3", repairs=True)
    assert found["verdict"].startswith("dies on h2, tunnel guard: vteps4")
    assert found["at"] == {"host": "h2", "hop": "tunnel guard"}


async def test_a_sandbox_that_is_gone(pair):
    """A sandbox is gone if no device reaches into it; else it is only out of sight."""
    pair[0].kernel.dead.add("/s/2")
    pair[0].kernel.silent = True
    found = await trace(pair[0].site, "10.9.0.2", "10.9.0.3", repairs=True)
    assert found["verdict"] == "dies on h1, interface: its sandbox is gone"
    held = pair[0].kernel.ops
    (port,) = [op for op in held.values() if isinstance(op, Veth) and "pe-" in op.name]
    held[port.key] = replace(port, peer=None)
    found = await trace(pair[0].site, "10.9.0.2", "10.9.0.3", repairs=True)
    (hop,) = [h for h in found["hops"] if h["well"] is None]
    assert hop["found"] == "this daemon does not see /s/2"


async def test_the_other_side_cannot_be_asked(pair):
    """Why the other host was not looked at is said."""

    async def ask(host, question):
        raise StoreError("its daemon was stopped")

    pair[0].site.ask = ask
    pair[0].kernel.silent = True
    found = await trace(pair[0].site, "10.9.0.2", "10.9.0.3", repairs=True)
    assert "h2 was not looked at: its daemon was stopped" in found["verdict"]


@pytest.mark.parametrize(
    "question",
    [
        Question(id="q", network="none", endpoint="e", other="o"),
        Question(id="q", network="NET", endpoint="e3" * 32, other="o"),
        Question(id="q", network="NET", endpoint="e2" * 32, other="e3" * 32),
        Question(id="q", network="NET", endpoint="e3" * 32, other="e3" * 32),
    ],
)
async def test_what_is_not_answered(pair, question):
    """A host tells of its own endpoint and one of who asks, and of nothing else."""
    network = next(pair[0].site.members()).network
    asked = replace(question, network=question.network.replace("NET", network))
    before = dict(pair[1].kernel.ops)
    asking = pair[0].site.host.id
    (hop,) = await answer(pair[1].site, asking, asked, repairs=True)
    assert hop.well is False
    assert pair[1].kernel.ops == before


async def test_frames_that_arrive(pair, monkeypatch):
    """Where all is well and nothing answers, the other's counter says how far it is."""
    count = iter((5, 5, 9))

    async def received(where, device):
        return next(count)

    pair[1].kernel.received = received
    pair[0].kernel.silent = True

    async def ping(sandbox, source, to, size=84):
        return Echo(to=to, size=size, milliseconds=None if sandbox else 0.2)

    pair[0].kernel.ping = ping
    found = await trace(pair[0].site, "10.9.0.2", "10.9.0.3", repairs=True)
    assert "frames arrive there, and no answer comes back" in found["verdict"]
    assert module.RECEIVED in {h["name"] for h in found["hops"]}


async def test_a_doctor_of_two_hosts(pair):
    """A doctor looks at the way to each other host, and says that all is well."""
    found = await doctor(pair[0].site, {"docker": "off"})
    checks = {f["check"]: f for f in found["findings"]}
    assert checks["host h2"]["severity"] == "ok"
    assert checks["leftovers"]["severity"] == "ok"
    assert {f["what"] for f in found["findings"] if f["severity"] == "error"} == set()


async def test_members_of_the_store():
    """Who takes no connections is named; an embedded store has no members."""

    def nothing(reader, writer):
        writer.close()

    server = await asyncio.start_server(nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    there = f"127.0.0.1:{port}"
    assert await absent(f"etcd://{there}") == ()
    server.close()
    await server.wait_closed()
    assert await absent(f"etcds://{there},nonsense") == (there, "nonsense")
    assert await absent("sqlite:///x/store.db") == ()


async def test_a_doctor_names_what_stops_a_network(made):
    """A policy that stops a network's way out is named, with the network."""
    made.kernel.walls = Filters(listings=(("iptables", "-P FORWARD DROP\n"),))
    found = await doctor(made.site, {"docker": "away"})
    said = [f["what"] for f in found["findings"] if f["severity"] == "error"]
    assert len(said) == 4
    assert min(said).startswith(
        "the way out of network blue (IPv4) is stopped by iptables"
    )
    assert found["code"] == 2
    assert "Docker does not answer" in {f["what"] for f in found["findings"]}
