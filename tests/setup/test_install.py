"""
The installer on a machine of the lab, and what it writes.

A lab machine has no systemd: the files are put, and the daemon is started as the
installer says. What a booted machine makes of the units, tests/vm shows.
"""

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from cnmdriver import settings
from cnmdriver.cli.main import main
from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.process import Completed
from cnmdriver.plan import devices
from tests.dockerd.tools import Scene

DEPLOY = Path(__file__).parents[2] / "deploy"
INSTALLER = DEPLOY / "install.sh"
INSTALL = str(INSTALLER)
OVERLAY = (
    *("--ipam-driver=pynet", "--subnet=10.93.0.0/24"),
    *("-o", "pynet.mode=overlay", "-o", "pynet.gateway=pynet"),
)
PYNET = ("env", "-u", "PYTHONPATH", "/usr/local/bin/pynet")
FILES = """
/etc/bash_completion.d/pynet
/etc/docker/plugins/pynet.spec
/etc/pynet/pynet.toml
/etc/systemd/network/10-pynet.link
/etc/systemd/network/10-pynet.network
/etc/systemd/system/pynet-prepare.service
/etc/systemd/system/pynet.service
/etc/systemd/system/pynet.socket
/usr/local/bin/pynet
""".split()  # noqa: SIM905 - one a line


# What it writes.


def test_every_setting_is_in_the_file():
    """The generated file changes nothing; uncommented it says the defaults."""
    text = CliRunner().invoke(main, ["settings"]).output
    assert tomllib.loads(text) == {}
    said = tomllib.loads("\n".join(re.findall(r"^#(\w+ = .*)$", text, re.MULTILINE)))
    defaults = {name: field.default for name, field in settings.FIELDS.items()}
    assert said == defaults
    for field in settings.FIELDS.values():
        assert " ".join(field.metadata["help"].split()) in " ".join(
            text.replace("\n# ", " ").split()
        )


def test_a_settings_file_is_checked(tmp_path):
    """A sound file is said to be sound by code 0, a bad one by code 2 and why."""
    file = tmp_path / "pynet.toml"
    words = ["settings", "--check", "--config", str(file)]
    file.write_text('log_level = "debug"\n')
    assert CliRunner().invoke(main, words).exit_code == 0
    for text, why in (
        ('log_level = "loud"', "log_level must be one of debug, info, warning"),
        ('default_pools = "10.0.0.0/33"', "default pool '10.0.0.0/33'"),
    ):
        file.write_text(text)
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2
        assert why in done.output


@pytest.mark.parametrize(
    "path", ["pynet.network", "pynet.link", "NetworkManager.conf", "dhcpcd.conf"]
)
def test_others_are_kept_off_every_device(path):
    """Each file names all beginnings of names of pynet's devices, and nothing else."""
    makers = [
        "bridge",
        "port",
        "peer",
        "vxlan",
        "gateway_port",
        "gateway",
        "access_port",
        "access",
    ]
    names = {getattr(devices, maker)("x") for maker in makers}
    found = set(re.findall(r"\bp\w+-\*", (DEPLOY / "host" / path).read_text()))
    assert found == {re.sub("-.*", "-*", name) for name in names}


def test_a_firewall_passes_what_hosts_and_containers_send():
    """The zone has the devices of the host's own namespace, the policy the port."""
    zone = (DEPLOY / "host" / "firewalld-zone.xml").read_text()
    makers = (devices.bridge, devices.gateway, devices.access)
    wanted = [re.sub("-.*", "-+", maker("x")) for maker in makers]
    assert re.findall(r'interface name="(.*?)"', zone) == wanted
    policy = (DEPLOY / "host" / "firewalld-policy.xml").read_text()
    port = settings.FIELDS["vxlan_port"].default
    assert f'port="{port}" protocol="udp"' in policy
    # Firewalld refuses all its settings if a zone and a policy have one name.
    names = re.findall(
        r"firewalld/(?:zones|policies)/(.*?)\.xml", INSTALLER.read_text()
    )
    assert len({*names}) == len(names) == 2


def test_the_scripts_are_sound():
    """Shellcheck has nothing to say of any script."""
    scripts = [
        path
        for path in (*DEPLOY.rglob("*"), DEPLOY.parent / ".ci" / "run")
        if path.is_file() and path.read_text().startswith(("#!/bin/bash", "#!/bin/sh"))
    ]
    assert DEPLOY / "install.sh" in scripts
    done = subprocess.run(
        ["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "usage: "),
        (["--halp"], 2, "what is --halp? See --help"),
        (["--wheel"], 2, "--wheel needs an argument"),
        (["--purge"], 2, "--purge belongs to --uninstall"),
    ],
)
def test_wrong_use(words, code, said):
    """Wrong use is told with code 2, and does nothing."""
    done = subprocess.run(
        [INSTALL, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert said in done.stdout + done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    """Each shell gets a script that asks pynet; in bash it completes."""
    text = CliRunner().invoke(main, ["completion", shell]).output
    assert f"_PYNET_COMPLETE={shell}_complete" in text
    asked = subprocess.run(
        [sys.executable, "-m", "cnmdriver"],
        env={
            "_PYNET_COMPLETE": "bash_complete",
            "COMP_WORDS": "pynet net",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout == "plain,network\n"


# The whole of it.


@dataclass
class Installer:
    """The installer on a machine from which no registry is reached."""

    host: Host
    wheels: Path

    def __call__(self, *words: str, check: bool = True) -> Completed:
        """Run it."""
        offline = ("PIP_NO_INDEX=1", f"PIP_FIND_LINKS={self.wheels}")
        argv = ("env", "-u", "PYTHONPATH", *offline, INSTALL, *words)
        return self.host.exec(*argv, check=check, timeout=400)


@pytest.mark.timeout(300)
@pytest.mark.root
def test_the_wheel_has_every_file(wheels):
    """What the package has in the repository, the wheel has, data included."""
    words = ("git", "-C", str(DEPLOY.parent), "ls-files", "cnmdriver")
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    (wheel,) = wheels.glob("cnmdriver-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {*listed.split()} <= {*archive.namelist()}


def tree(host: Host) -> list[str]:
    """Return what there is where the installer writes: rights, owners, sizes, links."""
    places = ("/etc", "/opt", "/usr/local/bin", "/usr/local/share", "/var/lib/pynet")
    form = "%p %M %u:%g %s %l %T@\n"
    shown = host.exec("find", *places, "-type", "d", "-printf", "%p %M %u:%g\n",
                      "-o", "-printf", form, check=False)  # fmt: skip
    return sorted(shown.stdout.splitlines())


def plain(lines: list[str]) -> set[str]:
    """Return a tree without times, and without the daemon's state."""
    kept = (line for line in lines if not line.startswith("/var/lib/pynet"))
    return {re.sub(r" \d+\.\d+$", "", line) for line in kept}


def kernel(host: Host) -> dict[str, str]:
    """Return what the machine's kernel holds."""
    counters = re.compile(r"\[\d+:\d+\]|packets \d+ bytes \d+|^#.*$", re.MULTILINE)
    commands = {
        "links": "ip -o link",
        "addresses": "ip -o -4 addr",
        "routes": "ip route",
        "namespaces": "ip netns",
        "nft": "nft -s list ruleset",
        "iptables": "iptables-save",
        "ip6tables": "ip6tables-save",
        "forwarding": "sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding",
    }
    return {
        name: counters.sub("", host.exec(*words.split()).stdout)
        for name, words in commands.items()
    }


def private_usr_local(host: Host) -> None:
    """Give the machine a /usr/local of its own, as it has an /etc and an /opt."""
    script = """
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work
mount -t overlay -o lowerdir=/usr/local,upperdir=/mnt/upper,workdir=/mnt/work \
    overlay /usr/local
umount -l /mnt
"""
    host.exec("bash", "-ec", script)


@pytest.mark.root
@pytest.mark.dockerd
@pytest.mark.timeout(900)
def test_from_nothing_to_nothing(make_lab: Callable[..., Lab], wheels: Path) -> None:
    """
    A machine gets pynet by the installer, uses it, and is afterwards as it was.

    1. Installed, twice, with a line in the settings and a block for dhcpcd between.
    2. The daemon is started, serves a container, and is asked for its version.
    3. Removal is refused while the container runs, and names it; then it goes.
    4. Installed once more, from a wheel, and removed, all of it.

    Result: the second run changes nothing and keeps the settings; the files are there;
    after each removal no file, device, rule or namespace is left that was not there
    before, but for what the operator wrote, and after --purge not that either.
    """
    lab = make_lab(1, etcd=1, serve=False, daemon=(*PYNET, "serve"))
    (host,) = lab.hosts
    install = Installer(host, wheels)
    private_usr_local(host)
    host.exec("bash", "-ec", "echo hostname >/etc/dhcpcd.conf")
    before = tree(host), kernel(host)

    said = install().stdout
    assert "there is no systemd here to start it" in said
    assert host.exec("ls", *FILES).stdout.split() == FILES
    assert "denyinterfaces pn-*" in host.exec("head", "-3", "/etc/dhcpcd.conf").stdout
    host.exec("bash", "-ec", "echo 'audit = 5' >>/etc/pynet/pynet.toml")
    first = tree(host)
    install()
    assert tree(host) == first

    assert host.pynet("--version").stdout.startswith("pynet 0.")
    host.start_pynet()
    with Scene(host) as scene:
        name = scene.network("--subnet=10.92.0.0/24", "-o", "pynet.mode=bridge")
        overlay = scene.network(*OVERLAY)
        one, other = scene.run(name, "-p", "80:80"), scene.run(name)
        assert one.pings(other.ip())
        scene.run(overlay)
        refused = install("--uninstall", check=False)
        assert refused.returncode == 1
        assert "containers use networks of pynet: " in refused.stderr
        assert one.name in refused.stderr
        assert "nothing was removed" in refused.stderr
        assert one.pings(other.ip())
        for container in scene.containers:
            host.docker("rm", "-f", container)
        scene.containers.clear()
        scene.networks.clear()
        still = install("--uninstall", check=False)
        assert still.returncode == 1
        assert "pynet is running here already" in still.stderr
        assert (
            host.docker("network", "ls", "-q", "--filter", "driver=pynet").stdout == ""
        )
    host.stop_pynet()
    said = install("--uninstall").stdout
    assert "/etc/pynet/pynet.toml was changed, and stays" in said
    assert "its state stays in /var/lib/pynet" in said
    assert kernel(host) == before[1]
    more = plain(tree(host)) ^ plain(before[0])
    assert {line.split()[0] for line in more} == {"/etc/pynet/pynet.toml"}

    (wheel,) = wheels.glob("cnmdriver-*.whl")
    install("--wheel", str(wheel), "--no-start")
    assert host.pynet("--version").stdout.startswith("pynet 0.")
    install("--uninstall", "--purge")
    assert plain(tree(host)) == plain(before[0])
    assert kernel(host) == before[1]
