"""The managed plugin on lab hosts, made and set as a person would."""

from pathlib import Path

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.tools import Scene
from tests.install.image import ROOT, SLOW

NAME = "pynet:latest"
BUILD = str(ROOT / "plugin-spec" / "build")


class PluginScene(Scene):
    """A scene whose networks are the plugin's."""

    def network(self, *options: str, driver: str = NAME, name: str = "") -> str:
        """Create a network of the plugin's and return its name."""
        return super().network(*options, driver=driver, name=name)

    def refused_network(self, *options: str, driver: str = NAME) -> str:
        """Try to create a network that must be refused, and return why it was."""
        return super().refused_network(*options, driver=driver)


def load(lab: Lab, image: Path) -> None:
    """Give all hosts the image."""
    for host in lab.hosts:
        host.docker("load", "-i", str(image), timeout=SLOW)


def create(host: Host) -> None:
    """Make the plugin."""
    host.exec(BUILD, timeout=SLOW)


def enable(host: Host, *settings: str) -> None:
    """Set the plugin and start it."""
    store = f"PYNET_STORE=etcd://{','.join(host.software.endpoints)}"
    host.docker("plugin", "set", NAME, store, *settings)
    host.docker("plugin", "enable", NAME)


def remove(host: Host) -> None:
    """Stop the plugin, whatever uses it, and remove it."""
    host.docker("plugin", "disable", "-f", NAME)
    host.docker("plugin", "rm", "-f", NAME)


def mounts(host: Host) -> list[str]:
    """Return what is mounted where a plugin's mounts are, less what `ip netns` leaves."""
    lines = host.exec("cat", "/proc/self/mountinfo").stdout.splitlines()
    places = sorted(line.split()[4] for line in lines)
    ours = ("/run", "/host", "/var/lib/docker", "/var/lib/pynet")
    return [p for p in places if p.startswith(ours) and p != "/run/netns"]


def processes(host: Host) -> list[str]:
    """Return the command lines of pynet's daemons on a host."""
    lines = host.exec("ps", "-eo", "args").stdout.splitlines()
    return [line for line in lines if line.endswith("pynet serve")]


def pynet(host: Host, *args: str) -> str:
    """Run a command of pynet's, with the plugin's admin socket."""
    return host.pynet(*args).stdout
