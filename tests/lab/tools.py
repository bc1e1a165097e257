"""What the tests of the lab share: a daemon to start, and what a lab leaves."""

import re
import subprocess
import sys
from pathlib import Path

import cnmdriver
from cnmdriver.lab import process
from cnmdriver.lab.lab import Lab

PACKAGE = Path(str(cnmdriver.__file__)).parent.parent

STUB = """
import os, signal, socket, sys
path = "/run/docker/plugins/pynet.sock"
os.makedirs(os.path.dirname(path), exist_ok=True)
if os.path.exists(path):
    os.unlink(path)
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
print("stub", sys.argv[1:], os.environ.get("PYNET_WORD"), flush=True)
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
while True:
    server.accept()[0].close()
"""


def machine_state() -> dict[str, str]:
    """Return what a lab must not change on the machine it runs on."""
    commands = {
        "links": ["ip", "-o", "link"],
        "addresses": ["ip", "-o", "addr"],
        "routes": ["ip", "route"],
        "named": ["ip", "netns"],
        "nft": ["nft", "-s", "list", "ruleset"],
        "iptables": ["iptables-save"],
        "forward": ["cat", "/proc/sys/net/ipv4/ip_forward"],
        "hostname": ["hostname"],
        "mounts": ["cat", "/proc/self/mounts"],
    }
    state = {name: process.run(argv).stdout for name, argv in commands.items()}
    kept = [line for line in state["iptables"].splitlines() if line[:1] != "#"]
    state["iptables"] = re.sub(r"\[\d+:\d+\]", "", "\n".join(kept))
    state["routes"] = state["routes"].strip()
    return state


def leftovers(lab: Lab, namespaces: frozenset[str]) -> list[str]:
    """Return all that still exists of a lab."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    groups = [Path(path + lab.cgroup) for path in process.cgroup_mounts()]
    found = [f"process {pid}" for pid in process.machine_processes(lab.directory)]
    found += [f"member {pid}" for pid in process.members(namespaces)]
    found += [line for line in mounts if str(lab.directory) in line]
    found += [str(group) for group in groups if group.exists()]
    found += [str(lab.directory)] if lab.directory.exists() else []
    return found


def cli(place: Path, command: str, *args: str) -> list[str]:
    """Return the command line of `pynet lab COMMAND --dir PLACE`."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE)!r})\n"
    code += "from cnmdriver.lab.cli import lab; lab()"
    return [sys.executable, "-c", code, command, f"--dir={place}", *args]


def start(argv: list[str]) -> subprocess.Popen[bytes]:
    """Start a program on the machine itself."""
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL)
