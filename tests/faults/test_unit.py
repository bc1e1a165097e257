"""
The daemon as the unit in `deploy/` runs it: with what it needs and nothing else.

Where the tests run there may be no systemd, so tests/faults/service.py does to the
daemon what the unit's own lines say.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import DAEMON, Lab
from tests.dockerd.cluster import Cluster, census, fresh_pools, left, nothing_is_left
from tests.dockerd.tools import Container, Server, eventually
from tests.faults.service import Unit, expand

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(180)]

HERE = Path(__file__).parent
DEPLOY = HERE.parents[1] / "deploy"
UNIT = DEPLOY / "pynet.service"
NAMESPACE = "/run/netns/pynet"
PORT = 7
DENIALS = ("EPERM", "EACCES", "EROFS", "not permitted", "denied", "read-only file")


def as_unit(unit: Path, *argv: str) -> tuple[str, ...]:
    """Return the command that runs a program as a unit does."""
    return (sys.executable, str(HERE / "service.py"), str(unit), *argv)


def changed(directory: Path, change: Callable[[str], str]) -> Path:
    """Return the unit with other text, beside what it wants."""
    for path in DEPLOY.glob("pynet*"):
        (directory / path.name).write_text(path.read_text())
    unit = directory / UNIT.name
    unit.write_text(change(UNIT.read_text()))
    return unit


def without(*names: str) -> Callable[[str], str]:
    """Return what takes all lines of some settings out of a unit."""

    def change(text: str) -> str:
        lines = text.splitlines(keepends=True)
        return "".join(line for line in lines if line.partition("=")[0] not in names)

    return change


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return two hosts whose pynet runs as the unit says, and one etcd member."""
    return make_module_lab(2, etcd=1, daemon=as_unit(UNIT, *DAEMON))


@pytest.fixture
def cluster(lab: Lab) -> Iterator[Cluster]:
    """Return the hosts; after the test nothing is left, and nothing was denied."""
    with Cluster(lab) as made:
        yield made
    assert nothing_is_left(made), left(made)
    for host in lab.hosts:
        assert denials(host) == []


def denials(host: Host) -> list[str]:
    """Return the lines of the daemon's log that tell of something denied."""
    lines = host.log("pynet").splitlines()
    return [line for line in lines if any(word in line for word in DENIALS)]


def seen(host: Host, path: str) -> tuple[int, int]:
    """Return what a path of a host is, as its other programs see it."""
    found = host.socket(path).stat()
    return found.st_dev, found.st_ino


def is_sandbox(pid: int, container: Container) -> bool:
    """Tell whether a process sees a container's sandbox where Docker mounts it."""
    key = container.state["NetworkSettings"]["SandboxKey"].removeprefix("/var")
    here = Path("/proc/self/ns/net").stat().st_dev
    return Path(f"/proc/{pid}/root{key}").stat().st_dev == here


def test_the_daemon_is_restricted(lab: Lab) -> None:
    """The daemon has the four capabilities of the unit, and filters."""
    pid = lab.hosts[0].service_pid("pynet")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    shown = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    four = 1 << 10 | 1 << 12 | 1 << 13 | 1 << 21
    assert int(shown["CapEff"], 16) == int(shown["CapBnd"], 16) == four
    assert shown["NoNewPrivs"] == "1"
    assert shown["Seccomp"] == "2"
    assert int(shown["Seccomp_filters"]) >= 10


def test_bridge_networks(cluster: Cluster) -> None:
    """
    Bridge networks work, with ports below 1024, also over a restart.

    1. A network, two containers, one of them with a published port, low and taken from
       both families.
    2. The daemon is killed, stopped and started; another container starts.

    Result: all reach each other and are reached, and all goes.
    """
    scene = cluster.scenes[0]
    name = scene.network("-o", "pynet.mode=bridge", "--subnet=10.90.0.0/24")
    web = scene.run(name, "-p", "80:8080", "-p", "80:8080/udp")
    scene.serve(web, 8080)
    client = scene.run(name)
    assert client.pings(web.ip())
    scene.host.kill_pynet()
    scene.host.start_pynet()
    scene.host.stop_pynet()
    scene.host.start_pynet()
    answer = scene.outside.tcp(str(scene.host.address4), 80)
    assert answer is not None
    assert answer.server == web.name
    assert scene.run(name).pings(web.ip())
    assert client.pings(str(scene.host.underlay.address4))


def test_overlay_networks(cluster: Cluster) -> None:
    """
    Overlay networks work across hosts and outlive the daemons, namespace and all.

    1. A network on two hosts, a container on each, with a published port.
    2. Both daemons are killed, stopped and started.

    Result: containers reach each other meanwhile and after it; host and next daemon see
    the same namespace; the boot id is the same.
    """
    name = cluster.network()
    one, other = (scene.run(name, "-p", "8090:80") for scene in cluster.scenes)
    cluster.scenes[1].serve(other, 80)
    server = Server(other, other.name, PORT, "udp")
    cluster.stack.callback(server.close)
    hosts = cluster.lab.hosts
    before = [(seen(host, NAMESPACE), boot(host)) for host in hosts]
    for host in hosts:
        host.kill_pynet()
        assert one.udp(other.ip(name), PORT) is not None
        host.start_pynet()
        host.stop_pynet()
        assert one.udp(other.ip6(name), PORT) is not None
        host.start_pynet()
    assert [(seen(host, NAMESPACE), boot(host)) for host in hosts] == before
    for host in hosts:
        pid = host.service_pid("pynet")
        found = Path(f"/proc/{pid}/root{NAMESPACE}").stat()
        assert (found.st_dev, found.st_ino) == seen(host, NAMESPACE)
    more = cluster.scenes[0].run(name)
    assert more.udp(other.ip(name), PORT) is not None
    answer = cluster.scenes[1].outside.tcp(str(hosts[1].address4), 8090)
    assert answer is not None
    assert answer.server == other.name


def boot(host: Host) -> str:
    """Return the host's boot id."""
    return host.socket("/run/pynet/boot").read_text()


def test_the_namespace_is_there_for_the_next_network(cluster: Cluster) -> None:
    """The last overlay network leaves the namespace to the first that comes again."""
    scene = cluster.scenes[0]
    before = seen(scene.host, NAMESPACE)
    for _ in range(2):
        name = cluster.network(six=False)
        one, other = cluster.run(name)
        assert one.pings(other.ip(name))
        for each, container in zip(cluster.scenes, (one, other), strict=True):
            each.remove(container)
            each.remove_network(name)
        assert nothing_is_left(cluster), left(cluster)
        assert seen(scene.host, NAMESPACE) == before


def test_sandboxes_of_a_later_dockerd_are_seen(cluster: Cluster) -> None:
    """A daemon that was there before dockerd sees what dockerd mounts."""
    scene = cluster.scenes[0]
    scene.host.stop_dockerd()
    scene.host.stop_pynet()
    scene.host.start_pynet()
    scene.host.start_dockerd()
    name = scene.network("-o", "pynet.mode=bridge", "--subnet=10.91.0.0/24")
    container = scene.run(name)
    assert is_sandbox(scene.host.service_pid("pynet"), container)


def test_after_a_power_cut_it_starts_before_dockerd(cluster: Cluster) -> None:
    """At boot, with nothing of Docker's there, the daemon starts and Docker finds it."""
    scene = cluster.scenes[1]
    name = cluster.network("-o", "pynet.mode=overlay", six=False)
    container = scene.run(name, "--restart=always")
    scene.host.power_cut()
    scene.host.power_on()
    assert eventually(lambda: container.look().path, 15.0)
    assert container.pings(cluster.scenes[0].run(name).ip(name))


def test_without_the_right_to_enter_namespaces(
    make_lab: Callable[..., Lab], tmp_path: Path
) -> None:
    """
    Without CAP_SYS_ADMIN bridge networks work, and overlays are refused with the reason.

    1. A host on etcd, under the unit without that capability.

    Result: `status` names it, an overlay network is refused and the reason names it, a
    bridge network works, and nothing is left of any.
    """
    place = tmp_path / "unit"
    place.mkdir()
    unit = changed(place, lambda text: text.replace(" CAP_SYS_ADMIN\n", "\n"))
    lab = make_lab(1, etcd=1, daemon=as_unit(unit, *DAEMON))
    with Cluster(lab) as cluster:
        (scene,) = cluster.scenes
        shown = json.loads(scene.host.pynet("status", "--json", check=False).stdout)
        assert any("CAP_SYS_ADMIN" in sentence for sentence in shown["attention"])
        four, _ = fresh_pools()
        words = ("--ipam-driver", "pynet", "--subnet", four)
        why = refused_overlay(cluster, *words)
        assert "CAP_SYS_ADMIN" in why
        assert "pynet.mode=bridge" in why
        name = scene.network(*words, "-o", "pynet.mode=bridge")
        one, other = scene.run(name, "-p", "80:80"), scene.run(name)
        assert one.pings(other.ip())
        scene.host.kill_pynet()
        scene.host.start_pynet()
        assert scene.run(name).pings(one.ip())
    assert nothing_is_left(cluster), left(cluster)
    assert census(lab.hosts[0]) == []


def refused_overlay(cluster: Cluster, *words: str) -> str:
    """Make an overlay network and start a container; return why one was refused."""
    (scene,) = cluster.scenes
    made = scene.host.docker(
        "network", "create", "-d", "pynet", *words, "no", check=False
    )
    if made.returncode:
        return made.stderr
    why = scene.refused_run("no")
    scene.host.docker("rm", "-f", scene.containers.pop())
    scene.host.docker("network", "rm", "no")
    return why


# What each line is good for.


ATTEMPTS = {
    "write_etc": ("ProtectSystem",),
    "write_run": ("ReadOnlyPaths",),
    "write_setting": ("ProtectKernelTunables",),
    "write_cgroups": (
        "ProtectControlGroups",
        "ProtectKernelTunables",
        "CapabilityBoundingSet",
    ),
    "read_home": ("ProtectHome",),
    "read_tmp": ("PrivateTmp",),
    "open_device": ("PrivateDevices", "ProtectKernelLogs", "CapabilityBoundingSet"),
    "load_module": (
        "ProtectKernelModules",
        "SystemCallFilter",
        "CapabilityBoundingSet",
    ),
    "mount": ("SystemCallFilter",),
    "give_away": ("CapabilityBoundingSet",),
    "override": ("CapabilityBoundingSet",),
    "set_user_id": ("RestrictSUIDSGID",),
    "packets": ("RestrictAddressFamilies",),
    "namespace": ("RestrictNamespaces",),
    "realtime": ("RestrictRealtime", "SystemCallFilter", "CapabilityBoundingSet"),
    "personality": ("LockPersonality",),
    "make_code": ("MemoryDenyWriteExecute",),
    "other_architecture": ("SystemCallArchitectures",),
    "set_clock": ("ProtectClock", "SystemCallFilter", "CapabilityBoundingSet"),
    "kernel_log": ("ProtectKernelLogs", "SystemCallFilter", "CapabilityBoundingSet"),
    "host_name": ("ProtectHostname", "SystemCallFilter"),
    "new_privileges": ("NoNewPrivileges",),
    "share_files": ("UMask",),
    "key": ("SystemCallFilter",),
}
"""What the daemon must not be able to do, and the settings that stop it."""


def possible(host: Host, unit: Path, place: Path, *names: str) -> dict[str, bool]:
    """Make attempts on a host as a unit would; return which the kernel allowed."""
    program = (sys.executable, str(HERE / "attempts.py"), *names)
    done = host.exec("env", f"ATTEMPT_TMP={place}", *as_unit(unit, *program))
    found: dict[str, bool] = json.loads(done.stdout)
    return found


def test_nothing_else_is_possible(lab: Lab, tmp_path: Path) -> None:
    """Under the unit none of the attempts is possible."""
    found = possible(lab.hosts[0], UNIT, tmp_path, *ATTEMPTS)
    assert found == dict.fromkeys(ATTEMPTS, False)


@pytest.mark.parametrize("name", ATTEMPTS)
def test_each_setting_bites(lab: Lab, tmp_path: Path, name: str) -> None:
    """What the unit stops is possible without the settings that are to stop it."""
    place = tmp_path / "unit"
    place.mkdir()
    unit = changed(place, without(*ATTEMPTS[name]))
    assert possible(lab.hosts[0], unit, tmp_path, name) == {name: True}


def test_every_restriction_is_tried() -> None:
    """No restricting line of the unit is without an attempt that shows its effect."""
    tried = {setting for settings in ATTEMPTS.values() for setting in settings}
    lines = Unit(UNIT).names
    restricting = ("Protect", "Private", "Restrict", "SystemCall", "Lock", "Memory")
    found = {name for name in lines if name.startswith((*restricting, "NoNew", "Cap"))}
    assert found - tried == {"SystemCallErrorNumber"}


# The file itself.


def test_settings_that_are_not_known_are_refused(tmp_path: Path) -> None:
    """A line that the tests do not translate is an error, and not left out."""
    unit = changed(
        tmp_path, lambda text: text.replace("UMask=", "DynamicUser=yes\nUMask=")
    )
    done = subprocess.run(
        as_unit(unit, "true"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "what do DynamicUser do?" in done.stderr


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    """Systemd finds nothing wrong with the files."""
    unit = changed(
        tmp_path, lambda text: text.replace("/opt/pynet/bin/pynet", "/usr/bin/true")
    )
    units = (unit, unit.with_name("pynet.socket"))
    words = ("systemd-analyze", "verify", *map(str, units))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert ours == []


def test_the_unit_is_for_docker() -> None:
    """The daemon is there before Docker, and what it must not lose is kept."""
    unit = Unit(UNIT)
    assert "docker.service" in unit.words("Before", "Unit")
    assert unit.words("RuntimeDirectory") == ["pynet"]
    assert unit.says("RuntimeDirectoryPreserve")
    assert unit.one("StateDirectoryMode") == "0700"
    assert unit.one("Restart") == "on-failure"
    wanted = unit.words("Wants", "Unit")
    assert {*wanted} <= {*unit.words("After", "Unit")}
    ours = [name for name in wanted if name.startswith("pynet")]
    assert ours == ["pynet-prepare.service", "pynet.socket"]
    assert all(unit.path.with_name(name).exists() for name in ours)


def test_sets_of_calls_are_expanded() -> None:
    """A set that holds another stands for all calls of both."""
    sets = {"@one": ["read", "@two"], "@two": ["write"]}
    assert expand(["@one", "close"], sets) == {"read", "write", "close"}
