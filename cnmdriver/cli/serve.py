"""`pynet serve`: the daemon. Its options are the fields of `Settings`."""

import faulthandler
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cnmdriver import settings
from cnmdriver.errors import InvalidParameter

BAD_SETTINGS = 2


def every_setting(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each setting."""
    for name, field in reversed(list(settings.FIELDS.items())):
        choices = field.metadata["choices"]
        shown = written(field.default)
        default = f"  [default: {shown}]" if shown else ""
        command = click.option(
            "--" + name.replace("_", "-"),
            name,
            type=click.Choice(choices) if choices else str,
            metavar=None if choices else metavar(field.default),
            help=field.metadata["help"] + default,
        )(command)
    return command


def written(default: object) -> str:
    """Write a default as a person would type it."""
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def metavar(default: object) -> str:
    """Return what the help calls a value."""
    return {float: "SECONDS", int: "NUMBER", bool: "true|false"}.get(
        type(default), "TEXT"
    )


@click.command()
@every_setting
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=f"settings file  [default: {settings.FILE}, if it is there]",
)
def serve(config: Path | None, **given: Any) -> None:
    """
    Run the daemon until it is told to stop.

    Every option can also be a line in the settings file (host_name = "a") or a variable
    (PYNET_HOST_NAME); the command line wins over variables, and these over the file.
    """

    def reread() -> settings.Settings:
        return settings.load(given, os.environ, config)

    try:
        loaded = reread()
    except InvalidParameter as error:
        click.echo(f"pynet: {error}", err=True)
        sys.exit(BAD_SETTINGS)
    # Imported late, so that a bad setting and --help answer at once.
    from cnmdriver.daemon import run  # noqa: PLC0415

    # A watchdog ends what hangs with SIGABRT: then the log says where it hung.
    faulthandler.enable(2)
    sys.exit(run(loaded, reread))
