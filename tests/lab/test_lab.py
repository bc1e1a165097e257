import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cnmdriver.lab import process
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.machine import wait_until
from cnmdriver.lab.process import LabError
from tests.lab.tools import STUB, cli, leftovers, machine_state, start

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def pair(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return two hosts with dockerd and without pynet; leave them as found."""
    return make_module_lab(hosts=2, serve=False)


def test_dockerd_answers_on_each_host(pair: Lab) -> None:
    """Each host has a dockerd of its own that answers, under the host's name."""
    names = [
        host.docker("info", "--format", "{{.Name}}").stdout.strip()
        for host in pair.hosts
    ]
    ids = {host.docker("info", "--format", "{{.ID}}").stdout for host in pair.hosts}
    assert names == ["h1", "h2"]
    assert len(ids) == 2


@pytest.mark.parametrize(
    "target", ["192.0.2.1", "192.0.2.12", "2001:db8:1::1", "2001:db8:1::12"]
)
def test_hosts_reach_each_other_and_the_outside(pair: Lab, target: str) -> None:
    """A host reaches the other host and the outside, by IPv4 and IPv6."""
    pair.hosts[0].exec("ping", "-c1", "-W2", target)


def test_outside_reaches_a_host(pair: Lab) -> None:
    """A program in the underlay's namespace reaches a host."""
    pair.outside.exec("ping", "-c1", "-W2", str(pair.hosts[1].address4))


def test_container_runs_on_the_default_bridge(pair: Lab) -> None:
    """A container on Docker's bridge gets an address and reaches the outside."""
    host = pair.hosts[0]
    host.docker("run", "-d", "--name", "web", "busybox", "sleep", "1000")
    try:
        shown = host.container_exec("web", "ip", "-4", "addr", "show", "eth0").stdout
        host.container_exec("web", "ping", "-c1", "-W2", "192.0.2.1")
        tops = [Path(path + host.cgroup) for path in process.cgroup_mounts()]
        groups = [path for top in tops if top.exists() for path in top.iterdir()]
    finally:
        host.docker("rm", "-f", "web")
    assert "172.17.0." in shown
    assert any(len(path.name) == 64 for path in groups)


def test_published_port_is_reached_from_outside(pair: Lab) -> None:
    """A client in the underlay reaches a port that Docker publishes."""
    host = pair.hosts[0]
    publish = ("run", "-d", "--name", "hello", "-p", "8080:80", "busybox")
    host.docker(*publish, "nc", "-ll", "-p", "80", "-e", "echo", "hello")
    try:
        argv = ("busybox", "nc", "-w", "2", str(host.address4), "8080")

        def answered() -> bool:
            return pair.outside.exec(*argv, check=False).stdout == "hello\n"

        assert wait_until(answered, 5.0)
    finally:
        host.docker("rm", "-f", "hello")


def test_exec_tells_how_the_command_ended(pair: Lab) -> None:
    """A command gets its input, and its output and exit code come back."""
    host = pair.hosts[0]
    assert host.exec("cat", input="word").stdout == "word"
    assert host.exec("false", check=False).returncode == 1
    with pytest.raises(LabError, match="`ls /nowhere` on h1 ended with 2: ls"):
        host.exec("ls", "/nowhere")


def test_exec_that_hangs_leaves_nothing(pair: Lab) -> None:
    """A command that exceeds its time is killed inside the host as well."""
    host = pair.hosts[0]
    with pytest.raises(LabError, match="did not end within"):
        host.exec("sleep", "987", timeout=0.2)

    def gone() -> bool:
        return "sleep 987" not in host.exec("ps", "axo", "args").stdout

    assert wait_until(gone, 2.0)


def test_popen_is_killed_inside_the_host(pair: Lab) -> None:
    """Killing what popen returned ends the command in the host."""
    host = pair.hosts[0]
    with host.popen("sh", "-c", "echo started; exec sleep 986") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        child.kill()

    def gone() -> bool:
        return "sleep 986" not in host.exec("ps", "axo", "args").stdout

    assert wait_until(gone, 2.0)


def test_host_has_its_own_kernel_views(pair: Lab) -> None:
    """A host sees its own processes and devices, and the machine's control groups."""
    host = pair.hosts[0]
    assert "lab/init.py" in host.exec("cat", "/proc/1/cmdline").stdout
    devices = host.exec("ls", "/sys/class/net").stdout.split()
    assert set(devices) == {"docker0", "eth0", "lo"}
    assert host.exec("ls", "/sys/fs/cgroup").stdout.split()
    assert host.exec("hostname").stdout == "h1\n"


def test_sysctls_are_the_hosts_own(pair: Lab) -> None:
    """A sysctl set on one host holds there and nowhere else."""
    first, second = pair.hosts
    name = "net.ipv4.conf.all.accept_local"
    before = second.sysctl(name)
    assert first.sysctl(name, "1") == "1"
    assert second.sysctl(name) == before == "0"
    assert first.sysctl(name, "0") == "0"


def test_mounts_are_shared_within_the_host_only(pair: Lab) -> None:
    """A mount made in a slave namespace of a host is seen there, and not outside."""
    host = pair.hosts[0]
    host.exec("mkdir", "/run/shown")
    flags = ("unshare", "--mount", "--propagation", "shared")
    host.exec(*flags, "mount", "-t", "tmpfs", "tmpfs", "/run/shown")
    assert "/run/shown" in host.exec("cat", "/proc/mounts").stdout
    assert "/run/shown" not in Path("/proc/self/mounts").read_text()
    host.exec("umount", "/run/shown")


def test_docker_api_is_reached_from_the_test(pair: Lab) -> None:
    """A test talks to a host's Docker socket without entering the host."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(pair.hosts[1].socket("/run/docker.sock")))
        client.sendall(b"GET /info HTTP/1.0\r\nHost: d\r\n\r\n")
        body = b"".join(iter(lambda: client.recv(65536), b""))
    assert json.loads(body.split(b"\r\n\r\n", 1)[1])["Name"] == "h2"


def test_dockerd_restarts_in_every_way(pair: Lab) -> None:
    """A dockerd that was stopped or killed starts again, with other arguments."""
    host = pair.hosts[1]
    assert host.stop_dockerd() == 0
    assert not host.docker_answers()
    host.start_dockerd(["--label=color=red"], env={"LANG": "C"})
    labels = host.docker("info", "--format", "{{.Labels}}").stdout
    assert labels == "[color=red]\n"
    with pytest.raises(LabError, match="dockerd runs on h2 already: stop it first"):
        host.start_dockerd()
    host.kill_dockerd()
    host.start_dockerd()
    os.kill(host.service_pid("dockerd"), signal.SIGKILL)
    assert wait_until(lambda: not host.docker_answers(), 5.0)
    host.start_dockerd()
    host.docker("run", "--rm", "busybox", "true")


def test_dockerd_that_cannot_start_is_told_with_its_log(pair: Lab) -> None:
    """A dockerd that fails at once raises with the end of its log."""
    host = pair.hosts[1]
    host.stop_dockerd()
    began = time.monotonic()
    with pytest.raises(LabError, match="unknown flag: --nonsense"):
        host.start_dockerd(["--nonsense"])
    assert time.monotonic() - began < 5
    host.start_dockerd()


def test_a_cut_cable_cuts_off_one_host(pair: Lab) -> None:
    """An unplugged host is out of reach until its cable is mended."""
    first, second = pair.hosts
    ping = ("ping", "-c1", "-W1", str(second.address4))
    second.unplug()
    assert first.exec(*ping, check=False).returncode == 1
    second.plug()
    assert wait_until(lambda: first.exec(*ping, check=False).returncode == 0, 5)


def test_daemon_starts_stops_and_is_killed(
    make_lab: Callable[..., Lab], tmp_path: Path
) -> None:
    """
    The daemon is started with the lab and by hand, stopped, and killed.

    1. The lab starts a stub as its daemon, and waits for its socket.
    2. SIGTERM ends it with its own exit code; SIGKILL at once.
    3. Arguments, environment and log are the ones of each start.

    Result: the log holds both starts.
    """
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    lab = make_lab(daemon=(sys.executable, str(stub), "serve"), pynet_args=("--all",))
    host = lab.hosts[0]
    assert host.pynet_answers()
    assert host.stop_pynet() == 7
    assert not host.pynet_answers()
    host.start_pynet(["--once"], env={"PYNET_WORD": "word"})
    pid = host.service_pid("pynet")
    host.kill_pynet()
    assert not Path(f"/proc/{pid}").exists()
    expected = "stub ['serve', '--all'] None\nstub ['serve', '--all', '--once'] word\n"
    assert host.log("pynet") == expected


def test_power_cut_spares_the_rest(make_lab: Callable[..., Lab]) -> None:
    """
    A power cut ends one host at once; it boots again with its disk and an empty /run.

    1. Two hosts; a container, a file in /var/lib/pynet and one in /run on the first.
    2. Power cut: nothing of the first runs, the second does not notice.
    3. Boot, dockerd again.

    Result: container and state are there, /run was emptied.
    """
    lab = make_lab(hosts=2, serve=False)
    first, second = lab.hosts
    first.docker("run", "-d", "--name", "kept", "busybox", "sleep", "1000")
    first.exec("touch", "/var/lib/pynet/state", "/run/boot")
    dockerd = first.service_pid("dockerd")

    with process.held([first.pid]) as spaces:
        first.power_cut()
        assert not first.is_on
        assert process.members(spaces) == []
    assert not Path(f"/proc/{dockerd}").exists()
    second.docker("run", "--rm", "busybox", "true")
    lab.outside.exec("ping", "-c1", "-W2", str(second.address4))
    with pytest.raises(LabError, match="h1 is off"):
        first.exec("true")

    first.boot()
    first.start_dockerd()
    first.exec("ls", "/var/lib/pynet/state")
    assert first.exec("ls", "/run/boot", check=False).returncode == 2
    first.docker("start", "kept")
    lab.outside.exec("ping", "-c1", "-W2", str(first.address4))


def test_down_leaves_nothing(place: Path) -> None:
    """
    Nothing of a lab is left on the machine, and nothing was changed there.

    1. A lab with a running container, a program in one of its namespaces only, and a
       program started with popen.
    2. down.

    Result: no process, mount, namespace, control group or file; the machine's links,
    addresses, rules, mounts and settings are the same, also while the lab is up.
    """
    before = machine_state()
    lab = Lab.create(place, 2, serve=False)
    lab.up()
    first = lab.hosts[0]
    first.docker("run", "-d", "--name", "runs", "busybox", "sleep", "1000")
    child = first.popen("sleep", "1000")
    stranger = start(["nsenter", f"--net={first.netns}", "sleep", "1000"])
    during = machine_state()
    with process.held([machine.pid for machine in lab.machines]) as spaces:
        lab.down()
        assert stranger.wait(5) == -signal.SIGKILL
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()
        assert leftovers(lab, spaces) == []
    assert during == before
    assert machine_state() == before


@pytest.mark.parametrize("moment", [0.06, 0.12, 0.2, 0.35, 0.6, 1.0])
def test_down_after_the_lab_command_was_killed(place: Path, moment: float) -> None:
    """`pynet lab down` removes all of a lab whose `up` was killed at any moment."""
    with start(cli(place, "up", "--no-serve")) as child:
        wait_until((place / "lab.json").exists, 10.0)
        time.sleep(moment)
        child.kill()
    lab = Lab.attach(place)
    with process.held(process.machine_processes(lab.directory)) as spaces:
        done = process.run(cli(place, "down"))
        assert (done.returncode, done.stderr) == (0, "")
        assert leftovers(lab, spaces - process.namespaces_of(os.getpid())) == []


def test_command_line(place: Path) -> None:
    """The commands up, ls, exec, docker and down do what they say."""
    up = process.run(cli(place, "up", "--hosts=1", "--no-serve"))
    assert (up.returncode, up.stderr) == (0, "")
    ls = process.run(cli(place, "ls"))
    assert ls.stdout == up.stdout
    assert re.search(
        r"h1 +192\.0\.2\.11 +2001:db8:1::11 +on +pynet down, dockerd up", ls.stdout
    )
    said = process.run(cli(place, "exec", "h1", "sh", "-c", "hostname; exit 3"))
    assert (said.returncode, said.stdout) == (3, "h1\n")
    docker = process.run(
        cli(place, "docker", "h1", "run", "--rm", "busybox", "echo", "-n", "hi")
    )
    assert (docker.returncode, docker.stdout) == (0, "hi")
    twice = process.run(cli(place, "up"))
    assert twice.returncode == 1
    assert "is not empty: take the lab in it down" in twice.stderr
    down = process.run(cli(place, "down"))
    assert (down.returncode, place.exists()) == (0, False)
    assert "there is no lab in" in process.run(cli(place, "ls")).stderr


def test_failed_up_leaves_nothing(place: Path) -> None:
    """A lab whose dockerd does not start is gone, and the log's end is in the error."""
    lab = Lab.create(place, 2, serve=False, dockerd_args=["--nonsense"])
    with pytest.raises(LabError, match="unknown flag"):
        lab.up()
    assert leftovers(lab, frozenset()) == []
