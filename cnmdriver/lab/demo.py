"""
The story of a container network, told on two hosts of a lab (`make demo`).

Every command is printed with its result, and has beside it what must come out. The
first one that does otherwise ends the story, and the exit code is 1.
"""

import re
import shlex
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.process import Completed, LabError

READY_TIMEOUT = 5.0
WIDTH = 80
WORD = re.compile(r"(?:'[^']*'|[^\s'])+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """
    A command, and what must come of it.

    `host` is where it is typed; the line may be a pipeline. Without a host it is one of
    the lab's own: `pynet lab stop|start HOST DAEMON`.
    """

    host: str
    line: str
    expect: str
    fails: bool = False
    waits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A part of the story: a heading, what it shows, and the commands."""

    title: str
    text: str
    commands: tuple[Command, ...]


def does(host: str, line: str, expect: str) -> Command:
    """Return a command that succeeds and prints what `expect` matches."""
    return Command(host=host, line=line, expect=expect)


def soon(host: str, line: str, expect: str) -> Command:
    """Return a command that is tried until it does so: a server may still start."""
    return Command(host=host, line=line, expect=expect, waits=True)


def fails(host: str, line: str, expect: str) -> Command:
    """Return a command that must fail, with a reason that `expect` matches."""
    return Command(host=host, line=line, expect=expect, fails=True)


ID = r"^[0-9a-f]{64}$"
ANSWERED = r"^64 bytes from .* seq=0 "
OUTSIDE = "192.0.2.1"
H1, H2 = "192.0.2.11", "192.0.2.12"
SLEEP = "busybox sleep 600"
PLAIN = "docker network create --subnet 10.9.0.0/24 plain"
BLUE = (
    "docker network create -d pynet --ipam-driver pynet "
    "--subnet 10.1.0.0/24 --ipv6 --subnet fd01::/64 blue"
)
TUNNEL = "ip -n pynet -d link show type vxlan | grep -o 'vxlan id.*learning'"
WHERE_WEB_IS = "bridge -n pynet fdb | grep 02:42:0a:01:00:02"


def server(name: str, options: str) -> str:
    """Return the line that starts a web server on port 8080 of a container."""
    script = f"echo hello from {name} >index.html; httpd -f -p 8080"
    return f"docker run -d --name {name} {options} busybox sh -c '{script}'"


STORY = (
    Step(
        title="What one host gives",
        text="A network of mode bridge is a bridge on this host, a switch in the "
        "kernel, and each container is plugged into it. Containers reach each other "
        "by name, and the host is their router to the outside.",
        commands=(
            does(
                "h1",
                "docker network create -d pynet -o pynet.mode=bridge "
                "--subnet 10.2.0.0/24 local",
                ID,
            ),
            does("h1", server("alice", "--network local -p 8000:8080"), ID),
            does("h1", f"docker run -d --name bob --network local {SLEEP}", ID),
            does(
                "h1",
                "docker exec bob ping -c 1 alice | head -n 2",
                r"PING alice \(10\.2\.0\.2\)(?s:.*)seq=0",
            ),
            does("h1", f"docker exec bob ping -c 1 {OUTSIDE} | grep seq", ANSWERED),
        ),
    ),
    Step(
        title="A published port",
        text="`-p 8000:8080` gave alice's web server port 8000 of h1. It is one "
        "element of a map of the firewall; it translates, and opens nothing else.",
        commands=(
            soon("h2", f"busybox wget -qO- http://{H1}:8000/", "hello from alice"),
            fails("h2", f"busybox wget -qO- http://{H1}:8080/", "refused"),
            does(
                "h1",
                "nft list map inet pynet any4 | grep tcp",
                r"tcp \. 8000 : 10\.2\.0\.2 \. 8080",
            ),
        ),
    ),
    Step(
        title="What one host cannot give",
        text="A bridge ends at its host. So one pool on two hosts is two networks, "
        "here with Docker's own driver: a container asks for its neighbour's MAC, "
        "and nobody on its bridge answers.",
        commands=(
            does("h1", PLAIN, ID),
            does("h2", PLAIN, ID),
            does("h1", f"docker run -d --network plain --ip 10.9.0.2 {SLEEP}", ID),
            fails(
                "h2",
                "docker run --rm --network plain --ip 10.9.0.3 busybox "
                "ping -c 1 -W 1 10.9.0.2 | grep loss",
                "100% packet loss",
            ),
        ),
    ),
    Step(
        title="One network on two hosts",
        text="The same line on both. Docker gives the network another id on each host "
        "and tells no driver its name, so the pool makes it one network. The "
        "addresses are pynet's, because all hosts have to draw from one store.",
        commands=(
            does("h1", BLUE, ID),
            does("h1", server("web", "--network blue -p 80:8080"), ID),
            does("h2", BLUE, ID),
            does("h2", f"docker run -d --name client --network blue {SLEEP}", ID),
            does("h1", "docker network connect blue alice", "^$"),
            does(
                "h2",
                "pynet ipam ls | grep -E 'STATE|10.1.*bound'",
                r"10\.1\.0\.2 (?s:.*)10\.1\.0\.\d+ .* client ",
            ),
        ),
    ),
    Step(
        title="The first packet arrives",
        text="client on h2 reaches web on h1 at once, by IPv4 and by IPv6: h2 was told "
        "where web is when web was created. (By address: Docker resolves names only "
        "within a host.) bob, on h1 but not on blue, does not reach it.",
        commands=(
            does("h2", "docker exec client ping -c 1 10.1.0.2 | grep seq", ANSWERED),
            does("h2", "docker exec client ping -c 1 fd01::2 | grep seq", ANSWERED),
            soon("h2", "docker exec client wget -qO- http://10.1.0.2:8080/", "web"),
            fails(
                "h1",
                "docker exec bob ping -c 1 -W 1 10.1.0.2 | grep loss",
                "100% packet loss",
            ),
        ),
    ),
    Step(
        title="The way out, and ports that `docker ps` shows",
        text="The default route and `-p` of an overlay network are Docker's own: they "
        "use docker_gwbridge, by a second device of the container.",
        commands=(
            does("h2", "docker exec client ip route", r"default via .* dev eth1"),
            does(
                "h1",
                r"docker ps -f name=web --format 'table {{.Names}}\t{{.Ports}}'",
                r"web +0\.0\.0\.0:80->8080/tcp",
            ),
            does("h2", f"busybox wget -qO- http://{H1}:80/", "hello from web"),
        ),
    ),
    Step(
        title="The tunnel",
        text="The devices are in a namespace of pynet's own, out of reach of the "
        "host's firewall. A network has a bridge (pn-), a port for each container "
        "(pe-) and a VXLAN device (pv-), whose id, the VNI, is the same on both hosts.",
        commands=(
            does(
                "h1",
                "ip -n pynet -br link show group 28782 | cut -d '<' -f 1",
                "^pn-(?s:.*)^pv-(?s:.*)^pe-",
            ),
            does("h1", TUNNEL, rf"vxlan id \d+ local {H1}"),
            does("h2", TUNNEL, rf"vxlan id \d+ local {H2}"),
        ),
    ),
    Step(
        title="Who is where",
        text="Nothing is learnt and nothing is flooded. Each host has the MAC of every "
        "container in its forwarding table, with the host it is on (dst), and its "
        "address in the neighbour table, from which the bridge answers.",
        commands=(
            does(
                "h1",
                "bridge -n pynet fdb | grep 02:42:",
                rf"02:42:0a:01:00:[0-9a-f]+ dev pv-.* dst {H2} ",
            ),
            does("h1", "ip -n pynet neigh", r"^10\.1\.0\.\d+ dev pn-.* PERMANENT"),
            does(
                "h2",
                "bridge -n pynet fdb | grep dst",
                rf"02:42:0a:01:00:02 dev pv-.* dst {H1} ",
            ),
            does("h2", "ip -n pynet neigh", r"^fd01::2 dev pn-.* PERMANENT"),
        ),
    ),
    Step(
        title="What the hosts agree on",
        text="etcd holds hosts, networks, addresses and endpoints, as JSON. An address "
        "is a key that can be made only once; so no two hosts give out the same.",
        commands=(
            does(
                "h1",
                "etcdctl get --prefix /pynet/v1/networks/ | grep overlay",
                '"pool":"10.1.0.0/24".*"vni":',
            ),
            does(
                "h2",
                "etcdctl get --prefix --keys-only /pynet/v1/addresses/ | grep 10.1.",
                r"10\.1\.0\.2(?s:.*)10\.1\.0\.3",
            ),
            does(
                "h2",
                "pynet host ls",
                r"^h1 .* alive (?s:.*)^h2 .* alive ",
            ),
        ),
    ),
    Step(
        title="A container moves, with its address",
        text="web ends on h1 and starts on h2 with the address it had. Nothing old is "
        "left on h1: the MAC is now behind h2, and alice on h1 reaches it there.",
        commands=(
            does("h1", WHERE_WEB_IS, r"\A.* dev pe-.*\Z"),
            does("h1", "docker rm -f web", "^web$"),
            does("h2", server("web", "--network blue --ip 10.1.0.2 -p 80:8080"), ID),
            does("h1", WHERE_WEB_IS, rf"\A.* dev pv-.*\n.* dev pv-.* dst {H2} .*\Z"),
            does("h2", WHERE_WEB_IS, r"\A.* dev pe-.*\Z"),
            does("h1", "docker exec alice ping -c 1 10.1.0.2 | grep seq", ANSWERED),
        ),
    ),
    Step(
        title="Traffic does not need the daemon",
        text="alice on h1 pings web on h2 ten times a second. Meanwhile pynet ends on "
        "both hosts (by the lab, which is here what systemd is elsewhere). No packet "
        "is lost, and a new connection works.",
        commands=(
            does(
                "h1",
                "docker exec -d alice sh -c 'ping -i 0.1 -c 30 10.1.0.2 >/tmp/ping'",
                "^$",
            ),
            does("", "pynet lab stop h1 pynet", "^$"),
            does("", "pynet lab stop h2 pynet", "^$"),
            fails("h1", "pynet status", "pynet is not running"),
            does("h1", "docker exec alice wget -qO- http://10.1.0.2:8080/", "web"),
            does("", "pynet lab start h1 pynet", "^$"),
            does("", "pynet lab start h2 pynet", "^$"),
            soon("h1", "docker exec alice grep loss /tmp/ping", "^30 .* 30 .* 0% "),
        ),
    ),
    Step(
        title="The same by hand",
        text="`pynet explain` prints all that pynet did as commands one could type; "
        "here its headings, and what it says of the tunnel. `pynet diff` finds "
        "nothing in the kernel that is otherwise.",
        commands=(
            does(
                "h1",
                "pynet explain blue | grep -E '^# |pv-'",
                rf" type vxlan .* local {H1} (?s:.*) dst {H2} ",
            ),
            does(
                "h2",
                "pynet explain blue | grep -E 'type vxlan|dst'",
                rf" type vxlan .* local {H2} (?s:.*) dst {H1} ",
            ),
            does("h1", "pynet diff", "^$"),
            does("h2", "pynet diff", "^$"),
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
    """Start two hosts and etcd, play all steps there, and return the exit code."""
    click.echo(
        f"Two hosts, h1 ({H1}) and h2 ({H2}), each with a dockerd and a\n"
        "pynet of its own, and an etcd. They live in namespaces that end with the\n"
        "demo; the machine itself is not touched."
    )
    with Lab.create(directory, hosts=2, etcd=1) as lab:
        for number, step in enumerate(story, 1):
            click.secho(f"\n{number}. {step.title}", bold=True)
            click.echo(f"{textwrap.fill(step.text, WIDTH - 2)}\n")
            for command in step.commands:
                problem = perform(lab, command)
                if problem:
                    click.secho(f"\nStep {number} failed: {problem}", fg="red")
                    for host in lab.hosts:
                        log = host.log_tail("pynet")
                        click.echo(f"The end of pynet's log on {host.name}:\n{log}")
                    return 1
    click.secho("\nAll steps did what they say.", bold=True)
    return 0


def perform(lab: Lab, command: Command) -> str:
    """Run and print a command; return in what it differs from what must be, or ""."""
    click.secho(typed(command), fg="cyan")
    end = time.monotonic() + READY_TIMEOUT
    while True:
        done = run(lab, command)
        problem = difference(command, done)
        if not problem or not command.waits or time.monotonic() > end:
            break
        time.sleep(0.05)
    for line in output(done).splitlines():
        click.echo("\n".join(folded(line.expandtabs(4))))
    return problem


def typed(command: Command) -> str:
    """Return a command after its prompt, as one would type it in 80 columns."""
    words = [command.host + "$", *WORD.findall(command.line)]
    return " \\\n".join(rows(words, WIDTH - len(" \\"), " ", " " * 4))


def folded(line: str) -> list[str]:
    """Indent a line of output; where it is too long, break it at spaces or commas."""
    if len(line) <= WIDTH - 2:
        return [f"  {line}".rstrip()]
    pieces = re.findall(r"[^ ,]*[ ,]*", line)
    return rows(["  " + pieces[0], *pieces[1:]], WIDTH, "", " " * 6)


def rows(words: list[str], width: int, between: str, indent: str) -> list[str]:
    """Join words to rows of at most this width; only the first is not indented."""
    row, done = words[0], []
    for word in words[1:]:
        if len((row + between + word).rstrip()) > width:
            done.append(row.rstrip())
            row = indent + word
        else:
            row += between + word
    return [*done, row.rstrip()]


def run(lab: Lab, command: Command) -> Completed:
    """Run a command where it belongs; a pipeline fails as its first failing part."""
    if not command.host:
        return _direct(lab, command.line)
    host = lab.host(command.host)
    done = Completed(returncode=0, stdout="", stderr="")
    for part in parts(command.line):
        after = host.exec(*part, input=done.stdout, check=False)
        done = Completed(
            returncode=done.returncode or after.returncode,
            stdout=after.stdout,
            stderr=done.stderr + after.stderr,
        )
    return done


def parts(line: str) -> Iterator[list[str]]:
    """Cut a line as a shell does; `pynet` is this package, installed or not."""
    words: list[str] = []
    for word in [*shlex.split(line), "|"]:
        if word == "|":
            yield words
            words = []
        elif word == "pynet" and not words:
            words = [sys.executable, "-m", "cnmdriver"]
        else:
            words.append(word)


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


def _direct(lab: Lab, line: str) -> Completed:
    """Do what `pynet lab` would do with this lab's directory."""
    verb, name, daemon = shlex.split(line.removeprefix("pynet lab "))
    host: Host = lab.host(name)
    if verb == "stop":
        host.stop(daemon)
    else:
        host.start(daemon)
    return Completed(returncode=0, stdout="", stderr="")


def _end(signum: int, _: object) -> NoReturn:
    """Leave through every `with`, so that the lab is taken down."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
