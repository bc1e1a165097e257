"""`pynet lab`: several Docker hosts on one machine."""

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from operator import methodcaller
from pathlib import Path

import click

from cnmdriver.lab.chaos import run
from cnmdriver.lab.lab import MTU, Lab
from cnmdriver.lab.machine import Machine
from cnmdriver.lab.node import Node
from cnmdriver.lab.process import LabError
from cnmdriver.lab.underlay import Underlay

DIRECTORY = Path("/run/pynet-lab")
PASS_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}
SERVING = ("up", "unhealthy")

where = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    default=DIRECTORY,
    show_default=True,
    help="Where the lab keeps its files.",
)


@click.group()
def lab() -> None:
    """Run several Docker hosts on this machine, each with a pynet of its own."""


@lab.command()
@where
@click.option("--hosts", default=2, show_default=True, help="How many hosts.")
@click.option(
    "--etcd",
    default=0,
    show_default=True,
    help="How many members the etcd cluster has that pynet keeps its records in.",
)
@click.option("--mtu", default=MTU, show_default=True, help="The underlay's MTU.")
@click.option(
    "--dockerd",
    default="dockerd",
    show_default=True,
    help="The dockerd to run; containerd and runc are first looked for beside it.",
)
@click.option(
    "--serve/--no-serve",
    default=True,
    show_default=True,
    help="Whether each host runs pynet.",
)
def up(
    directory: Path, hosts: int, etcd: int, mtu: int, dockerd: str, *, serve: bool
) -> None:
    """Start the lab."""
    with _one_sentence():
        made = Lab.create(
            directory, hosts, etcd=etcd, mtu=mtu, dockerd=dockerd, serve=serve
        )
        made.up()
        _print(made)


@lab.command()
@where
def down(directory: Path) -> None:
    """Stop the lab, however it ended, and remove all that it has made."""
    with _one_sentence():
        Lab.attach(directory).down()


@lab.command("exec", context_settings=PASS_ON)
@where
@click.argument("machine")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(directory: Path, machine: str, command: tuple[str, ...]) -> None:
    """Run a command on a machine, or in the `underlay`, which plays the outside."""
    with _one_sentence():
        _become(Lab.attach(directory).machine(machine), *command)


@lab.command(context_settings=PASS_ON)
@where
@click.argument("host")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def docker(directory: Path, host: str, args: tuple[str, ...]) -> None:
    """Run the Docker client on a host."""
    with _one_sentence():
        _become(Lab.attach(directory).host(host), "docker", *args)


@lab.command("ls")
@where
def list_machines(directory: Path) -> None:
    """List the machines of the lab, how they are, and who is cut from whom."""
    with _one_sentence():
        _print(Lab.attach(directory))


@lab.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="A lab that is up, or where to make one; without it one that is soon gone.",
)
@click.option("--seconds", default=180.0, show_default=True, help="How long.")
@click.option("--kills", default=0, help="Go on till so often a daemon was killed.")
@click.option("--seed", type=int, help="Which faults; the same make the same schedule.")
@click.option("--users", default=run.USERS, show_default=True, help="Users per host.")
@click.option("--keep", is_flag=True, help="Leave the lab up if a promise was broken.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def chaos(
    directory: Path | None,
    seconds: float,
    kills: int,
    seed: int | None,
    users: int,
    *,
    keep: bool,
    as_json: bool,
) -> None:
    """
    Kill, hang and cut off everything at random while containers come and go.

    In the end no address may have been given twice, all containers must reach each
    other, and removing them must leave nothing: exit code 1 if a promise was broken.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plan = run.Plan(
        seed=run.new_seed() if seed is None else seed,
        seconds=seconds,
        least_kills=kills,
        users=users,
    )
    with _one_sentence(), _place(directory) as place:
        notes = run.whole(place, plan, lambda text: click.echo(text, err=True), keep)
    if as_json:
        click.echo(json.dumps(notes.as_dict(), indent=2))
    else:
        click.echo("\n".join(notes.summary()))
    raise SystemExit(0 if notes.well else 1)


def _add_machine_command(name: str, text: str) -> None:
    @lab.command(name, help=text)
    @where
    @click.argument("machine")
    def command(directory: Path, machine: str) -> None:
        with _one_sentence():
            methodcaller(name.replace("-", "_"))(Lab.attach(directory).node(machine))


def _add_pair_command(name: str, text: str) -> None:
    @lab.command(name, help=text)
    @where
    @click.argument("first")
    @click.argument("second")
    def command(directory: Path, first: str, second: str) -> None:
        with _one_sentence():
            methodcaller(name, first, second)(Lab.attach(directory))


def _add_daemon_command(name: str, states: tuple[str, ...], text: str) -> None:
    @lab.command(name, help=f"{text} Without its name: all of the machine's.")
    @where
    @click.argument("machine")
    @click.argument("daemon", required=False)
    def command(directory: Path, machine: str, daemon: str | None) -> None:
        with _one_sentence():
            node = Lab.attach(directory).node(machine)
            for chosen in [daemon] if daemon else _in_state(node, states):
                methodcaller(name, chosen)(node)


_add_machine_command("unplug", "Pull out the cable of a host or member.")
_add_machine_command("plug", "Put the cable of a host or member back.")
_add_machine_command("power-cut", "End a host or member at once, with all it runs.")
_add_machine_command("power-on", "Boot a host or member, with its disk as it was.")
_add_pair_command("cut", "Drop all that two machines send each other.")
_add_pair_command("mend", "Let two machines reach each other again.")
_add_daemon_command("start", ("down",), "Start dockerd, pynet or etcd.")
_add_daemon_command("stop", SERVING, "End a daemon with SIGTERM.")
_add_daemon_command("kill", (*SERVING, "paused"), "Kill a daemon: no last words.")
_add_daemon_command("pause", SERVING, "Make a daemon hang.")
_add_daemon_command("resume", ("paused",), "Let a paused daemon go on.")


def _in_state(node: Node, states: tuple[str, ...]) -> list[str]:
    """Return the daemons of a machine that a command without a daemon is about."""
    found = [name for name in node.programs if node.state(name) in states]
    if not found:
        raise LabError(f"no daemon on {node.name} is {' or '.join(states)}")
    return found


def _become(machine: Machine, *command: str) -> None:
    argv = machine.enter(*command)
    os.execvpe(argv[0], argv, machine.environment())  # noqa: S606 - no shell wanted


def _print(shown: Lab) -> None:
    row = "{:<10} {:<14} {:<18} {:<5} {}".format
    click.echo(row("MACHINE", "ADDRESS", "IPV6", "POWER", "DAEMONS"))
    machines: tuple[Underlay | Node, ...] = (shown.outside, *shown.nodes)
    for machine in machines:
        addresses = (str(machine.address4), str(machine.address6))
        power = "on" if machine.is_on else "off"
        click.echo(row(machine.name, *addresses, power, _daemons(machine)))
    if shown.outside.is_on:
        for pair in sorted(map(sorted, shown.outside.cuts())):
            click.echo(f"{pair[0]} and {pair[1]} are cut from each other")


def _daemons(machine: Underlay | Node) -> str:
    if isinstance(machine, Underlay) or not machine.is_on:
        return "-"
    return ", ".join(f"{name} {machine.state(name)}" for name in machine.programs)


@contextlib.contextmanager
def _place(chosen: Path | None) -> Iterator[Path]:
    """Yield a lab's place; one that nobody chose goes with the lab that was there."""
    place = chosen or Path(tempfile.mkdtemp(prefix="pynet-chaos-"), "lab")
    try:
        yield place
    finally:
        if not chosen and not place.exists():
            place.parent.rmdir()


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except LabError as error:
        raise click.ClickException(str(error)) from error
