"""`pynet lab`: several Docker hosts on one machine."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import click

from cnmdriver.lab.lab import Lab
from cnmdriver.lab.machine import Machine
from cnmdriver.lab.process import LabError

DIRECTORY = Path("/run/pynet-lab")
PASS_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}

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
def up(directory: Path, hosts: int, dockerd: str, *, serve: bool) -> None:
    """Start the lab."""
    with _one_sentence():
        made = Lab.create(directory, hosts, dockerd=dockerd, serve=serve)
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
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(directory: Path, host: str, command: tuple[str, ...]) -> None:
    """Run a command on a host, or in the `underlay`, which plays the outside."""
    with _one_sentence():
        _become(Lab.attach(directory).machine(host), *command)


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
def list_hosts(directory: Path) -> None:
    """List the hosts of the lab."""
    with _one_sentence():
        _print(Lab.attach(directory))


def _become(machine: Machine, *command: str) -> None:
    argv = machine.enter(*command)
    os.execvpe(argv[0], argv, machine.environment())  # noqa: S606 - no shell wanted


def _print(shown: Lab) -> None:
    row = "{:<10} {:<14} {:<18} {:<5} {:<8} {}".format
    click.echo(row("HOST", "ADDRESS", "IPV6", "POWER", "DOCKERD", "PYNET"))
    outside = shown.outside
    power = "on" if outside.is_on else "off"
    click.echo(
        row(outside.name, str(outside.address4), str(outside.address6), power, "-", "-")
    )
    for host in shown.hosts:
        docker_state = pynet_state = power = "off"
        if host.is_on:
            power = "on"
            docker_state = "up" if host.docker_answers() else "down"
            pynet_state = "up" if host.pynet_answers() else "down"
        addresses = (str(host.address4), str(host.address6))
        click.echo(row(host.name, *addresses, power, docker_state, pynet_state))


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except LabError as error:
        raise click.ClickException(str(error)) from error
