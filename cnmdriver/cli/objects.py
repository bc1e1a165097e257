"""`pynet network`, `endpoint`, `port` and `ipam`: what there is on this host."""

from typing import Any

import click

from cnmdriver.cli.client import Client
from cnmdriver.cli.options import asks, show_json


@click.group()
def network() -> None:
    """Show networks."""


@network.command("ls")
@asks
def network_ls(client: Client, *, as_json: bool) -> None:
    """List the networks of this host."""
    found = client.get("networks")
    if as_json:
        show_json(found)
        return
    from cnmdriver.cli import table  # noqa: PLC0415

    table.show(
        ("Network", "Id", "Mode", "Subnets", "mtu", "Bridge", "endpoints"),
        (
            (n["name"], table.short(n["id"]), n["mode"])
            + (pools(n), n["mtu"], n["bridge"], n["endpoints"])
            for n in found
        ),
    )


def pools(found: Any) -> str:
    """Return the pools of a network, a line each."""
    return "\n".join(subnet["pool"] for subnet in found["subnets"])
