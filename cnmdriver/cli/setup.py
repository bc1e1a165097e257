"""`pynet settings`, `completion` and `clear`: what comes before and after serving."""

import asyncio
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from cnmdriver import settings
from cnmdriver.cli import table
from cnmdriver.errors import DriverError, InvalidParameter

REFUSED = 1
BAD_SETTINGS = 2
WIDTH = 88


@click.command("settings")
@click.option(
    "--check",
    is_flag=True,
    help="Print nothing, but say whether the file and PYNET_* variables are sound.",
)
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=f"What is checked.  [default: {settings.FILE}, if it is there]",
)
def show_settings(check: bool, config: Path | None) -> None:
    r"""
    Print a settings file with every setting, its default and what it is.

    All lines are comments, so that the file as it is changes nothing.

    \b
    Examples:
      pynet settings >/etc/pynet/pynet.toml
      pynet settings --check && systemctl reload pynet

    Exit codes: 0 well, 2 a setting that cannot work, which is named.
    """
    if not check:
        click.echo("\n".join(commented()))
        return
    try:
        load(config)
    except InvalidParameter as error:
        refuse(error, BAD_SETTINGS)


def load(config: Path | None) -> settings.Settings:
    """Read file and variables, and what they name; raises InvalidParameter."""
    # Imported late, so that the list of settings is printed at once.
    from cnmdriver.daemon import default_ranges  # noqa: PLC0415

    found = settings.load({}, os.environ, config)
    default_ranges(found)
    return found


def refuse(error: DriverError, code: int) -> None:
    """End the program with a sentence."""
    click.echo(f"pynet: {error}", err=True)
    sys.exit(code)


def commented() -> Iterator[str]:
    """Yield the lines of the file."""
    yield from (
        "# Settings of pynet, each with its default; take the # away to set one.",
        "# PYNET_* variables and flags of pynet serve win over this file. At systemctl",
        "# reload pynet, log_level and default_pools are read again; the others at its",
        "# next start. pynet settings --check says whether the file is sound.",
    )
    for name, field in settings.FIELDS.items():
        choices = field.metadata["choices"]
        told = f"; one of {', '.join(choices)}" if choices else ""
        text = textwrap.wrap(field.metadata["help"] + told, WIDTH - 2)
        # JSON's text and numbers are TOML's.
        value = json.dumps(field.default, ensure_ascii=False)
        yield from ("", *(f"# {line}" for line in text), f"#{name} = {value}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    r"""
    Print what makes a shell complete pynet's commands and options.

    \b
    bash:  pynet completion bash >/etc/bash_completion.d/pynet
    zsh:   pynet completion zsh >/usr/local/share/zsh/site-functions/_pynet
    fish:  pynet completion fish >/etc/fish/completions/pynet.fish

    A new shell then has it; eval "$(pynet completion bash)" is for this one.
    """
    made = get_completion_class(shell)
    program = click.get_current_context().find_root().command
    if made is not None:
        click.echo(made(program, {}, "pynet", "_PYNET_COMPLETE").source())


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what that would be.")
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=f"The daemon's settings.  [default: {settings.FILE}, if it is there]",
)
def clear(dry_run: bool, config: Path | None) -> None:
    r"""
    Remove all that pynet census lists: devices, firewall, namespace.

    This is for the day on which pynet leaves a host. The daemon must be stopped, and no
    container may use a network of pynet: those that do are named. Records stay in the
    state directory and in the store; a daemon that starts again makes of them what
    there was. Settings of the host that pynet turned on stay, and are listed.

    \b
    Examples:
      pynet clear --dry-run
      systemctl stop pynet.socket pynet && pynet clear

    Exit codes: 0 nothing of pynet is left; 1 it could not be done, for the reason told;
    2 a setting that cannot work, or a daemon that runs.
    """
    # Imported late, so that --help answers at once.
    from cnmdriver import clearing  # noqa: PLC0415

    try:
        done = asyncio.run(clearing.clear(load(config), really=not dry_run))
    except InvalidParameter as error:
        refuse(error, BAD_SETTINGS)
    except DriverError as error:
        refuse(error, REFUSED)
    else:
        show(done.removed, "would remove" if dry_run else "removed")
        show(done.foreign, "left, as another host's pynet marked it:")
        for path, old in done.settings.items():
            click.echo(
                f"stays: {path}, which was {table.clean(old)} before pynet; "
                f"sysctl -w {path.replace('/', '.')}={table.clean(old)}"
            )


def show(names: tuple[str, ...], verb: str) -> None:
    """Print a line for each object."""
    for name in names:
        click.echo(table.clean(f"{verb} {name}"))
