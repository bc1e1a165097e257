"""What all commands that ask the daemon share: two options, and how errors end."""

import functools
import json
import os
from collections.abc import Callable
from typing import Any

import click

from cnmdriver.cli.client import Client, ClientError

ADMIN = "/run/pynet/admin.sock"


def asks(command: Callable[..., None]) -> Callable[..., None]:
    """
    Give a command `--admin` and `--json`.

    It is called with a client first, and with the keyword `as_json`. What the client
    raises ends the program with one line and exit code 1.
    """

    @click.option(
        "--admin",
        metavar="PATH",
        envvar="PYNET_ADMIN",
        default=ADMIN,
        show_default=True,
        show_envvar=True,
        help="The daemon's admin socket.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
    @functools.wraps(command)
    def wrapped(*args: Any, admin: str, **kwargs: Any) -> None:
        try:
            command(Client(os.fspath(admin)), *args, **kwargs)
        except ClientError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


def show_json(content: object) -> None:
    """Print a value for programs."""
    click.echo(json.dumps(content, indent=2))
