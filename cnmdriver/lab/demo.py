"""
The story of a container network, told on one host of a lab (`make demo`).

Every command is printed with its result, and has beside it what must come out. The
first one that does otherwise ends the story, and the exit code is 1.
"""

import re
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.process import Completed, LabError

READY_TIMEOUT = 5.0
TEXT_WIDTH = 78
LINE_WIDTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command on the host, what must come of it, and how much of it to print."""

    line: str
    expect: str
    fails: bool = False
    waits: bool = False
    head: int = 12
    tail: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A part of the story: a heading, what it shows, and the commands."""

    title: str
    text: str
    commands: tuple[Command, ...]


def does(line: str, expect: str, *, head: int = 12, tail: int = 0) -> Command:
    """Return a command that succeeds and prints what `expect` matches."""
    return Command(line=line, expect=expect, head=head, tail=tail)


def soon(line: str, expect: str) -> Command:
    """Return a command that is tried until it does so: a server may still start."""
    return Command(line=line, expect=expect, waits=True)


def fails(line: str, expect: str) -> Command:
    """Return a command that must fail, with a reason that `expect` matches."""
    return Command(line=line, expect=expect, fails=True)


ID = r"^[0-9a-f]{64}$"
OUTSIDE = "192.0.2.1"
WEB = "mkdir /www; echo hello from web >/www/index.html; httpd -f -p 8080 -h /www"

STORY = (
    Step(
        title="Two containers on one network",
        text="A network is a bridge, a switch in the kernel, and each container is "
        "plugged into it. They reach each other by address, and by name: Docker "
        "answers for the names.",
        commands=(
            does("docker network create -d pynet --subnet 10.1.0.0/24 blue", ID),
            does("docker run -d --name alice --network blue busybox sleep 600", ID),
            does("docker run -d --name bob --network blue busybox sleep 600", ID),
            does("docker exec alice ip -4 addr show eth0", "inet 10.1.0.2/24"),
            does("docker exec alice ping -c 1 10.1.0.3", "1 packets received"),
            does("docker exec bob ping -c 1 alice", r"PING alice \(10\.1\.0\.2\)"),
        ),
    ),
    Step(
        title="The way out",
        text="The host is the network's router: 10.1.0.1 is an address of its own. "
        f"Outside, {OUTSIDE} sees the host's address, not the container's.",
        commands=(
            does("docker exec alice ip route", "default via 10.1.0.1 dev eth0"),
            does(f"docker exec alice ping -c 1 {OUTSIDE}", "1 packets received"),
        ),
    ),
    Step(
        title="A published port",
        text="A web server listens on port 8080 of its container, and `-p 80:8080` "
        "gives it port 80 of the host.",
        commands=(
            does(
                "docker run -d --name web --network blue -p 80:8080 busybox "
                f"sh -c {shlex.quote(WEB)}",
                ID,
            ),
            soon("busybox wget -qO- http://192.0.2.11:80/", "hello from web"),
            does("docker exec alice wget -qO- http://web:8080/", "hello from web"),
            does("pynet port ls", r"80/tcp +10\.1\.0\.4:8080 +web"),
        ),
    ),
    Step(
        title="... and not the other way round",
        text="The container has no port 80, and the host no port 8080: publishing "
        "translates, it does not open anything else.",
        commands=(
            fails("docker exec alice wget -qO- http://web:80/", "refused"),
            fails("busybox wget -qO- http://192.0.2.11:8080/", "refused"),
        ),
    ),
    Step(
        title="Two networks that cannot reach each other",
        text="carol is on another network: what she sends to alice is dropped on the "
        "host. A container that is on both networks reaches both, and no third one "
        "reaches anything through it.",
        commands=(
            does("docker network create -d pynet --subnet 10.2.0.0/24 green", ID),
            does("docker run -d --name carol --network green busybox sleep 600", ID),
            fails("docker exec carol ping -c 1 -W 1 10.1.0.2", "100% packet loss"),
            does("docker network connect green alice", "^$"),
            does("docker exec carol ping -c 1 alice", r"PING alice \(10\.2\.0\.3\)"),
            fails("docker exec carol ping -c 1 -W 1 10.1.0.2", "100% packet loss"),
        ),
    ),
    Step(
        title="A network without a way out",
        text="Containers of an internal network have no default route: they reach "
        "each other and nobody else.",
        commands=(
            does(
                "docker network create -d pynet --internal --subnet 10.3.0.0/24 vault",
                ID,
            ),
            does("docker run -d --name dave --network vault busybox sleep 600", ID),
            does("docker run -d --name erin --network vault busybox sleep 600", ID),
            does("docker exec dave ping -c 1 erin", "1 packets received"),
            fails(f"docker exec dave ping -c 1 -W 1 {OUTSIDE}", "unreachable"),
            fails("docker exec dave ping -c 1 -W 1 10.1.0.2", "unreachable"),
        ),
    ),
    Step(
        title="What one sees of it on the host",
        text="pn-... is a network's bridge, pe-... the host's end of a container's "
        "cable. The firewall knows each network, and each published port, as an "
        "element of a set or map.",
        commands=(
            does("ip -br link", "pn-(?s:.*)pe-", head=20),
            does("bridge link", "pe-.* master pn-.* state forwarding", head=20),
            does("nft list table inet pynet", "hook postrouting", head=14),
            does("nft list map inet pynet any4", r"tcp \. 80 : 10\.1\.0\.4 \. 8080"),
        ),
    ),
    Step(
        title="The same by hand",
        text="All that pynet did for blue, as commands one could type; the ruleset "
        "comes first and is shortened here.",
        commands=(
            does("pynet explain blue", "ip link add pn-", head=8, tail=75),
            does("pynet diff", "^$"),
        ),
    ),
)


def main() -> int:
    """Tell the story on a lab of its own, and take that down; return the exit code."""
    signal.signal(signal.SIGTERM, _end)
    try:
        with tempfile.TemporaryDirectory(prefix="pynet-demo-") as directory:
            return play(Path(directory, "lab"))
    except LabError as error:
        click.echo(f"the demo stopped: {error}", err=True)
        return 1
    except KeyboardInterrupt:
        return 130


def play(directory: Path, story: tuple[Step, ...] = STORY) -> int:
    """Start one host, play all steps there, and return the exit code."""
    click.echo("This is host h1, with a dockerd and a pynet of its own. It lives in")
    click.echo("namespaces that end with the demo; the machine itself is not touched.")
    with Lab.create(directory, hosts=1) as lab:
        host = lab.hosts[0]
        for number, step in enumerate(story, 1):
            click.secho(f"\n{number}. {step.title}", bold=True)
            click.echo(f"{click.wrap_text(step.text, TEXT_WIDTH)}\n")
            for command in step.commands:
                problem = perform(host, command)
                if problem:
                    click.secho(f"\nStep {number} failed: {problem}", fg="red")
                    click.echo(f"The end of pynet's log:\n{host.log_tail('pynet')}")
                    return 1
    click.secho("\nAll steps did what they say.", bold=True)
    return 0


def perform(host: Host, command: Command) -> str:
    """Run and print a command; return in what it differs from what must be, or ""."""
    click.secho(f"$ {command.line}", fg="cyan")
    end = time.monotonic() + READY_TIMEOUT
    while True:
        done = host.exec(*words(command.line), check=False)
        problem = difference(command, done)
        if not problem or not command.waits or time.monotonic() > end:
            break
        time.sleep(0.05)
    lines = output(done).splitlines()
    for line in lines if problem else shortened(lines, command):
        click.echo(f"  {line[:LINE_WIDTH].expandtabs(4)}" if line else "")
    return problem


def words(line: str) -> list[str]:
    """Cut a line as a shell does; `pynet` is this package, installed or not."""
    program, *rest = shlex.split(line)
    if program == "pynet":
        return [sys.executable, "-m", "cnmdriver", *rest]
    return [program, *rest]


def output(done: Completed) -> str:
    """Return all that a command printed."""
    return (done.stdout + done.stderr).strip("\n")


def difference(command: Command, done: Completed) -> str:
    """Tell what a command should have done and did not."""
    name = f"`{command.line}`"
    if command.fails and done.returncode == 0:
        return f"{name} should have failed"
    if not command.fails and done.returncode != 0:
        return f"{name} ended with {done.returncode}"
    if not re.search(command.expect, output(done), re.MULTILINE):
        return f"{name} should have printed {command.expect!r}"
    return ""


def shortened(lines: list[str], command: Command) -> list[str]:
    """Return the first and last lines, with a note of how many are left out."""
    left_out = len(lines) - command.head - command.tail
    if left_out <= 1:
        return lines
    note = f"... {left_out} more lines ..."
    return [*lines[: command.head], note, *lines[len(lines) - command.tail :]]


def _end(signum: int, _: object) -> NoReturn:
    """Leave through every `with`, so that the lab is taken down."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
