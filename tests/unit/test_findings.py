"""What a doctor makes of what was seen: each finding is provoked, and says a remedy."""

import gzip
from dataclasses import replace
from ipaddress import ip_address

import pytest

from cnmdriver import machine
from cnmdriver.insight.filters import Stop
from cnmdriver.insight.findings import ERROR, INFO, OK, WARNING, Peer, Seen, code, judge
from cnmdriver.insight.findings import version as read_version
from cnmdriver.machine import FEATURES, Machine, Manager
from cnmdriver.model import Hop
from cnmdriver.plan.sight import Echo

FAR = ip_address("192.0.2.12")
GOOD = Machine(
    kernel="6.1",
    features=dict.fromkeys(FEATURES, True),
    programs={"iptables": True, "ip6tables": True},
    managers=(Manager(name="NetworkManager", running=True, told=True),),
)


def echo(size=84, answered=True, error=""):
    """Return what became of a probe."""
    return Echo(to=FAR, size=size, milliseconds=0.4 if answered else None, error=error)


PEER = Peer(
    name="h2",
    vtep=FAR,
    version="1",
    small=echo(),
    sizes=(echo(1500), echo(1400)),
    inner=echo(),
    datagram=echo(44),
    hops=(Hop(name="h2, firewall in", found="UDP 4789 passes"),),
    skew=0.2,
)
WELL = Seen(
    machine=GOOD,
    version="1",
    underlay="eth0",
    shared=True,
    store=(1.0, 2.0, 900.0),
    docker="29.1.0",
    peers=(PEER,),
)
UNTRIED = "no two containers on one network: the tunnel itself was not tried"
WALL = Stop(tool="iptables", chain="FORWARD", rule="-P FORWARD DROP", remedy="fix it")


def with_peer(**fields):
    """Return what is well but for the other host."""
    return replace(WELL, peers=(replace(PEER, **fields),))


def with_machine(**fields):
    """Return what is well but for the machine."""
    return replace(WELL, machine=replace(GOOD, **fields))


def test_all_is_well():
    """Where nothing is amiss all findings are well, and the exit code is 0."""
    found = judge(WELL)
    assert {one.severity for one in found} == {OK}
    assert code(found) == 0
    assert [one.check for one in found] == [
        "kernel",
        "privileges",
        "docker",
        "store",
        "filters",
        "leftovers",
        "host h2",
        "host h2",
        "host h2",
    ]


CASES = [
    (with_machine(features={"vxlan": False}), ERROR, "6.1 has no vxlan", "modprobe"),
    (with_machine(programs={"iptables": False}), WARNING, "no iptables", "apt-get"),
    *(
        (
            with_machine(managers=(Manager(name=name, running=True, told=False),)),
            WARNING,
            f"{name} was not told to leave pynet's devices",
            "pn-*",
        )
        for name in ("systemd-networkd", "NetworkManager", "dhcpcd")
    ),
    (
        replace(WELL, lacking=("without CAP_X: it fails",)),
        WARNING,
        "CAP_X",
        "systemctl edit",
    ),
    (replace(WELL, mends=False), WARNING, "repair=false", "without --repair=false"),
    (replace(WELL, problems=("no room",)), ERROR, "no room", "pynet diff"),
    (
        replace(WELL, docker="", docker_error="Docker does not answer"),
        WARNING,
        "Docker does not answer",
        "systemctl start docker",
    ),
    (replace(WELL, docker="19.03.1"), ERROR, "older than 20.10", "install"),
    (replace(WELL, docker="20.10.24+dfsg1"), INFO, "no choice of the network", ""),
    (replace(WELL, docker="27.5"), INFO, "--gw-priority", ""),
    (replace(WELL, store=(), away="timed out"), ERROR, "away: timed out", "etcdctl"),
    (
        replace(WELL, absent=("192.0.2.103:2379",)),
        WARNING,
        "192.0.2.103:2379 takes no connections",
        "start etcd there",
    ),
    (replace(WELL, store=(5.0, 300.0, 301.0)), WARNING, "needs 300 ms", "faster disk"),
    (
        replace(WELL, stops={"the way out of network blue (IPv4)": WALL}),
        ERROR,
        "the way out of network blue (IPv4) is stopped by iptables: -P FORWARD DROP",
        "fix it",
    ),
    (replace(WELL, drift=("+ device pn-1",)), WARNING, "+ device pn-1", "pynet diff"),
    (replace(WELL, surplus=("device pn-2",)), WARNING, "in no plan", "pynet diff"),
    (replace(WELL, orphans=("device pe-3",)), WARNING, "pe-3 is in the", "pynet diff"),
    (
        replace(WELL, foreign=(("pn-4", "pynet:ffffffff:network:n"),)),
        WARNING,
        "device pn-4 is another pynet's",
        "ip link del pn-4",
    ),
    (replace(WELL, malformed=("hosts/x",)), WARNING, "record hosts/x", "etcdctl"),
    (with_peer(silent="it hangs"), WARNING, "could not be asked: it hangs", "h2:"),
    (
        with_peer(
            hops=(
                Hop(name="h2, firewall in", found="DROP", well=False, remedy="open it"),
            )
        ),
        ERROR,
        "h2, firewall in: DROP",
        "open it",
    ),
    (
        with_peer(small=echo(answered=False), sizes=(), inner=None),
        WARNING,
        "192.0.2.12 answers no ping",
        "ping -I eth0 192.0.2.12",
    ),
    (
        with_peer(small=echo(answered=False, error="no route"), sizes=(), inner=None),
        ERROR,
        "answers no ping: no route",
        "ip route get",
    ),
    (
        with_peer(small=echo(answered=False), sizes=()),
        INFO,
        "answers no ping",
        "ping -I",
    ),
    (
        with_peer(sizes=(echo(1500, answered=False), echo(1400))),
        ERROR,
        "packets of 1400 bytes pass, those of 1500 do not",
        "ip link set eth0 mtu 1400",
    ),
    (with_peer(inner=None, datagram=None), INFO, UNTRIED, ""),
    (
        with_peer(inner=echo(answered=False)),
        ERROR,
        "tunnels do not pass",
        "--vxlan-port",
    ),
    (
        with_peer(inner=echo(answered=False), arrived=0),
        ERROR,
        "frames do not arrive at h2",
        "--vxlan-port",
    ),
    (
        with_peer(inner=echo(answered=False), arrived=9),
        ERROR,
        "frames arrive at h2, and nothing comes back",
        "--vxlan-port",
    ),
    (
        with_peer(datagram=echo(44, answered=False)),
        WARNING,
        "pings pass the tunnel, UDP does not",
        "ethtool -K eth0",
    ),
    (with_peer(skew=-90.0), INFO, "its clock is 90 s behind", "timedatectl"),
    (with_peer(skew=90.0), INFO, "its clock is 90 s ahead", "timedatectl"),
    (with_peer(version="2"), INFO, "it runs pynet 2, this host 1", "upgrade"),
    (replace(WELL, unseen=3), INFO, "3 hosts more", "pynet doctor"),
]


@pytest.mark.parametrize(("seen", "severity", "what", "remedy"), CASES)
def test_what_is_amiss(seen, severity, what, remedy):
    """One thing amiss is one finding more: what, why, and what mends it."""
    found = [
        one
        for one in judge(seen)
        if one.severity != OK and (one.what == what or one.what != UNTRIED)
    ]
    (one,) = found
    assert one.severity == severity
    assert what in one.what
    assert one.why
    assert remedy in one.remedy
    assert bool(one.remedy) is bool(remedy)
    assert code(found) == {INFO: 0, WARNING: 1, ERROR: 2}[severity]


def test_the_worst_counts():
    """The exit code is that of the worst finding."""
    seen = replace(WELL, mends=False, away="gone", docker="27.1")
    assert code(judge(seen)) == 2


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("20.10.24+dfsg1", (20, 10)),
        ("29.8-dev", (29, 8)),
        ("29", (0, 0)),
        ("", (0, 0)),
        ("library-import", (0, 0)),
    ],
)
def test_versions(text, numbers):
    """Of a version the first two numbers count."""
    assert read_version(text) == numbers


# The machine.


@pytest.fixture
def root(tmp_path):
    """Return a root directory with the lists of a kernel's modules."""
    place = tmp_path / "lib/modules/6.1"
    place.mkdir(parents=True)
    (place / "modules.builtin").write_text("kernel/net/bridge/bridge.ko\n")
    (place / "modules.dep").write_text("kernel/drivers/net/veth.ko.xz: a\n")
    (tmp_path / "sys/module/vxlan").mkdir(parents=True)
    return tmp_path


def test_modules(root):
    """A module is there if it is loaded, built in, or can be loaded."""
    found = machine.look(root, "6.1").features
    assert found == {
        "veth": True,
        "bridge": True,
        "vxlan": True,
        "nf_tables": False,
        "nft_fib_inet": False,
        "nf_nat": False,
    }


def test_modules_by_the_kernels_options(root):
    """Without lists the kernel's own word counts, and without that nothing is said."""
    assert machine.has(root, "6.2", "bridge") is None
    assert machine.has(root, "6.2", "vxlan") is True
    (root / "proc").mkdir()
    options = b"CONFIG_VETH=m\n# CONFIG_NF_NAT is not set\nCONFIG_BRIDGE=y\n"
    (root / "proc/config.gz").write_bytes(gzip.compress(options))
    assert machine.has(root, "6.2", "veth") is True
    assert machine.has(root, "6.2", "bridge") is True
    assert machine.has(root, "6.2", "nf_nat") is False
    (root / "proc/config.gz").write_bytes(b"no gzip")
    assert machine.has(root, "6.2", "veth") is None


@pytest.mark.parametrize(
    ("name", "sign", "file"),
    [
        (
            "systemd-networkd",
            "run/systemd/netif/state",
            "etc/systemd/network/5.network",
        ),
        ("NetworkManager", "run/NetworkManager/x", "etc/NetworkManager/conf.d/5.conf"),
        ("dhcpcd", "run/dhcpcd/x", "etc/dhcpcd.conf"),
    ],
)
def test_managers(tmp_path, name, sign, file):
    """Who manages devices is seen when it runs, and whether it leaves pynet's."""

    def seen():
        every = {one.name: one for one in machine.managers(tmp_path)}
        return every[name].running, every[name].told

    assert seen() == (False, False)
    for path, text in ((sign, ""), (file, "eth0")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert seen() == (True, False)
    (tmp_path / file).write_text("Name=pn-* pe-*\n")
    assert seen() == (True, True)


def test_this_machine():
    """The machine the tests run on can be looked at."""
    found = machine.look()
    assert found.kernel
    assert set(found.features) == set(FEATURES)
