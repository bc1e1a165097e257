"""Reports, status, census and diff: what they say is what is, and JSON can carry it."""

import json
from ipaddress import ip_network

import pytest

from cnmdriver.errors import Conflict, KernelError, NotFound, StoreError
from cnmdriver.insight import kernel, report
from cnmdriver.insight.status import status
from cnmdriver.plan.ops import Bridge, Sysctl
from tests import scene
from tests.fakes import FakeKernel, rig

INFO = {"pid": 7, "uptime": 3.5, "store": "sqlite:///s", "docker": "off"}


class OddKernel(FakeKernel):
    """A kernel with more to tell: another pynet's device, changed settings, errors."""

    def __init__(self):
        """Have nothing odd yet."""
        super().__init__()
        self.others = ()
        self.changed = {}
        self.broken = False

    async def found(self, wanted=()):
        """Read, or fail."""
        if self.broken:
            raise KernelError("reading the table failed: no such thing (ENOENT)")
        return await super().found(wanted)

    async def foreign(self):
        """Return devices of others."""
        return self.others

    def changed_sysctls(self):
        """Return what was changed."""
        return self.changed


@pytest.fixture
async def made(tmp_path):
    """Build a host with two networks."""
    async with rig(tmp_path, OddKernel()) as built:
        await scene.populate(built)
        yield built


@pytest.fixture
async def empty(tmp_path):
    """Build a host with nothing."""
    async with rig(tmp_path, OddKernel()) as built:
        yield built


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Look twice without a pause."""
    monkeypatch.setattr(kernel, "PAUSE", 0)


async def test_networks(made):
    """A network is told with its pools, and how many are on it."""
    blue, green = report.networks(made.site)
    assert [blue["name"], green["name"]] == ["blue", "green"]
    assert blue["id"] == scene.BLUE
    assert blue["subnets"][0] == {
        "pool": "10.1.0.0/24",
        "space": "local",
        "gateway": "10.1.0.1",
        "reserved": [],
    }
    assert (blue["endpoints"], blue["hosts"], blue["icc"]) == (2, 1, True)
    assert (green["bridge"], green["icc"]) == ("green0", False)


async def test_inspect(made):
    """Inspecting a network adds its options and its endpoints, and no others."""
    found = report.inspect(made.site, made.site.member(scene.GREEN))
    assert found["options"] == {"pynet.bridge": "green0", "pynet.icc": "false"}
    assert [e["name"] for e in found["members"]] == ["batch", "web"]
    assert found["claims"] == ["local/10.2.0.0/24"]


async def test_endpoints(made):
    """An endpoint is told with its addresses and whether it joined."""
    found = report.endpoints(made.site)
    told = [(e["network"], e["name"], e["joined"]) for e in found]
    assert told == [
        ("blue", "db", True),
        ("blue", "web", True),
        ("green", "batch", False),
        ("green", "web", True),
    ]
    assert found[0]["addresses"] == ["10.1.0.3/24", "fd00:1::3/64"]
    assert found[0]["sandbox"] == scene.SANDBOX + "bbbbbbbbbbbb"


async def test_ports(made):
    """A port is told with where it leads, in both families if it is on every address."""
    dns, http = report.ports(made.site)
    assert (dns["host_ip"], dns["host_port"], dns["protocol"]) == (
        "127.0.0.1",
        5353,
        "udp",
    )
    assert dns["addresses"] == ["10.1.0.2"]
    assert (http["host_ip"], http["addresses"]) == (None, ["10.1.0.2", "fd00:1::2"])
    assert (http["endpoint"], http["network"], http["port"]) == ("web", "blue", 80)


async def test_pools(made):
    """A pool is told with its network, its size and every address with its owner."""
    four, green, six = report.pools(made.site)
    assert (four["id"], four["network"]) == ("local/10.1.0.0/24", "blue")
    assert (four["size"], four["taken"]) == (254, 3)
    owners = {a["address"]: a["owner"] for a in four["addresses"]}
    assert owners == {"10.1.0.1": "gateway", "10.1.0.2": "web", "10.1.0.3": "db"}
    assert (green["network"], six["size"]) == ("green", 2**64 - 1)


async def test_pool_of_no_network(empty):
    """A pool that no network has taken yet says so."""
    await empty.ipam.request_pool(
        space="local",
        pool=ip_network("10.9.0.0/24"),
        sub_pool=None,
        options={},
        version=4,
    )
    (pool,) = report.pools(empty.site)
    assert (pool["network"], pool["claimed"], pool["addresses"]) == ("", False, [])


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("db", scene.DB),
        (scene.WEB, scene.WEB),
        ("e1e1", scene.WEB),
        ("e3", scene.BATCH),
    ],
)
async def test_find_endpoint(made, wanted, found):
    """A name, an id and the start of an id all mean the endpoint."""
    assert report.find_endpoint(made.site, wanted).id == found


async def test_find_ambiguous(made):
    """What can mean several is refused, with the ids to choose from."""
    with pytest.raises(Conflict) as caught:
        report.find_endpoint(made.site, "web")
    assert str(caught.value) == (
        "'web' can be 2 endpoints: say which of e1e1e1e1e1e1, e4e4e4e4e4e4"
    )
    with pytest.raises(Conflict, match="can be 4 endpoints"):
        report.find_endpoint(made.site, "e")


@pytest.mark.parametrize("wanted", ["", "nobody", "e1e2"])
async def test_find_nothing(made, wanted):
    """What means nothing is refused, with the command that lists what there is."""
    with pytest.raises(NotFound, match="pynet endpoint ls lists them"):
        report.find_endpoint(made.site, wanted)


async def test_find_pool(made):
    """A pool is found by its CIDR or its id, never by a part of either."""
    for wanted in ("10.1.0.0/24", "local/10.1.0.0/24"):
        assert str(report.find_pool(made.site, wanted).cidr) == "10.1.0.0/24"
    with pytest.raises(NotFound):
        report.find_pool(made.site, "10.1.0.0")


async def test_network_by_the_id_hosts_share(made):
    """The id all hosts know a network by means it too."""
    member = made.site.member(scene.BLUE)
    assert report.find_network(made.site, member.network) == member


async def test_empty_census(empty):
    """A host without networks has an empty census."""
    found = await kernel.census(empty.site)
    assert found == {"owned": [], "foreign": [], "settings": {}}


async def test_census_tells_all_but_settings_of_the_host(made):
    """Every object is told; a setting of the whole host is no object of ours."""
    found = await kernel.census(made.site)
    objects = [o for o in made.kernel.ops.values() if not kernel.is_host_setting(o)]
    assert len(found["owned"]) == len(objects)
    (pair, *_) = [o for o in found["owned"] if o["kind"] == "veth"]
    assert pair["key"] == ["device", "host", pair["name"]]
    assert (pair["where"], pair["mtu"], pair["up"]) == ("host", 1500, True)


async def test_census_is_the_same_in_any_order(made):
    """Two readings of one state are equal as JSON, however the kernel lists them."""
    before = json.dumps(await kernel.census(made.site))
    made.kernel.ops = dict(reversed(made.kernel.ops.items()))
    assert json.dumps(await kernel.census(made.site)) == before


async def test_census_tells_changed_settings_and_strangers(empty):
    """Settings come with both values, other pynets' devices with their marks."""
    path = "net/ipv4/ip_forward"
    empty.kernel.changed = {path: "0"}
    empty.kernel.one(Sysctl(path=path, value="1", keep=True))
    empty.kernel.others = (("pn-1", "pynet:other:network:x"),)
    assert await kernel.census(empty.site) == {
        "owned": [],
        "foreign": [{"device": "pn-1", "alias": "pynet:other:network:x"}],
        "settings": {path: {"was": "0", "is": "1"}},
    }


async def test_no_diff(made):
    """After the driver's own calls nothing differs."""
    found = await kernel.diff(made.site)
    assert found == {"lines": [], "lacking": [], "changed": [], "surplus": []}


async def test_diff(made):
    """What lacks, differs and is too much is told in lines and in values."""
    green = next(
        o for o in made.kernel.ops.values() if getattr(o, "name", "") == "green0"
    )
    lost = next(o for o in made.kernel.ops.values() if o.key[0] == "hold")
    stray = Bridge(name="pn-stray", mac="02:42:00:00:00:01", mtu=1500, alias=None)
    made.kernel.ops[green.key] = Bridge(
        name="green0", mac=green.mac, mtu=1400, alias=green.alias
    )
    made.kernel.ops[stray.key] = stray
    del made.kernel.ops[lost.key]
    found = await kernel.diff(made.site)
    assert found["lines"] == [
        "+ hold tcp * 8080",
        "~ device green0: mtu is 1400 and should be 1500",
        "- device pn-stray",
    ]
    assert found["changed"][0]["differs"] == ["mtu"]
    assert found["surplus"][0]["name"] == "pn-stray"
    assert json.loads(json.dumps(found)) == found


async def test_diff_of_a_call_in_progress(made):
    """What is half done at the first look and done at the second is no difference."""
    held = dict(made.kernel.ops)
    made.kernel.ops.clear()
    read = made.kernel.found

    async def late(wanted=()):
        found = await read(wanted)
        made.kernel.ops = held
        return found

    made.kernel.found = late
    assert not (await kernel.diff(made.site))["lines"]


async def test_diff_of_one_call_after_another(made):
    """What another call is half way with at the second look is none either."""
    held = dict(made.kernel.ops)
    other = next(o for o in held.values() if o.key[0] == "hold")
    first = next(o for o in held.values() if o.key[0] == "device")
    del made.kernel.ops[first.key]
    read = made.kernel.found

    async def late(wanted=()):
        found = await read(wanted)
        made.kernel.ops = {k: op for k, op in held.items() if op is not other}
        return found

    made.kernel.found = late
    assert not (await kernel.diff(made.site))["lines"]
    assert (await kernel.diff(made.site))["lines"] == ["+ hold tcp * 8080"]


async def test_status_well(made):
    """A host where all is as it should be is well, and says what it holds."""
    found = await status(made.site, INFO)
    assert (found["well"], found["attention"]) == (True, [])
    assert found["daemon"] == {"version": "test", "pid": 7, "uptime": 3.5}
    assert found["host"]["name"] == "h1"
    assert found["store"]["url"] == "sqlite:///s"
    assert [found[n] for n in ("networks", "endpoints", "ports", "addresses")] == [
        2,
        4,
        2,
        9,
    ]
    assert json.loads(json.dumps(found)) == found


async def test_status_keeps_secrets(empty):
    """User and password of a store are told nowhere."""
    url = "etcd://root:secret@h1:2379,h2:2379"
    empty.state.away = f"{url} does not answer"
    found = await status(empty.site, {**INFO, "store": url})
    assert found["store"]["url"] == "etcd://h1:2379,h2:2379"
    (told,) = found["attention"]
    assert told.startswith("the store has been away since ")
    assert told.endswith(" UTC: etcd://h1:2379,h2:2379 does not answer")
    assert "secret" not in found["attention"][0]


async def test_status_of_a_kernel_that_differs(made):
    """Few differences are named, many are counted."""
    lost = next(o for o in made.kernel.ops.values() if o.key[0] == "hold")
    del made.kernel.ops[lost.key]
    found = await status(made.site, INFO)
    assert found["attention"] == [
        "the kernel differs from the plans: + hold tcp * 8080; see pynet diff"
    ]
    made.kernel.ops.clear()
    found = await status(made.site, INFO)
    number = len(made.site.desired())
    (sentence,) = found["attention"]
    assert sentence.startswith(f"the kernel differs from the plans: {number} lacking;")
    assert found["well"] is False


async def test_status_of_what_the_audit_left(empty):
    """Problems and orphans of the last audit, and other pynets' devices, are told."""
    empty.kernel.others = (("pn-1", "pynet:other:network:x"),)
    told = {"orphans": ["device pe-1"], "problems": ["making pn-2 failed"]}
    found = await status(empty.site, INFO | told)
    orphan, problem, stranger = found["attention"]
    assert orphan.startswith("device pe-1 is in use by a sandbox")
    assert problem.endswith("making pn-2 failed")
    assert "device pn-1 is another pynet's (pynet:other:network:x)" in stranger


async def test_status_of_a_broken_kernel(empty):
    """A kernel that cannot be read is told, and is no error of the question."""
    empty.kernel.broken = True
    found = await status(empty.site, INFO)
    assert found["attention"] == [
        "the kernel cannot be read: reading the table failed: no such thing (ENOENT)"
    ]


async def test_status_of_a_bad_record(empty):
    """A record nobody can read is told by its key."""
    empty.site.view.write("networks/x", b"{", 99)
    found = await status(empty.site, INFO)
    assert found["attention"][0].startswith("record networks/x in the store cannot be")


async def test_status_of_a_full_outbox(made):
    """Changes that wait for the store are counted."""

    async def away(change, lease=None):
        raise StoreError("the store is away")

    made.state.store.commit = away
    await made.networks.delete_endpoint(scene.BLUE, scene.DB)
    found = await status(made.site, INFO)
    assert found["attention"][0] == "changes that wait until the store is back: 1"
