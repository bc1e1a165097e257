"""`pynet network`, `endpoint`, `port` and `ipam`: what there is on this host."""

from datetime import datetime
from typing import Any

import click

from cnmdriver.cli import table
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
    table.show(
        ("NETWORK", "ID", "MODE", "SUBNETS", "BRIDGE", "ENDPOINTS"),
        [
            (n["name"], table.short(n["id"]), n["mode"])
            + (column(s["pool"] for s in n["subnets"]), n["bridge"], n["endpoints"])
            for n in found
        ],
    )


@network.command("inspect")
@click.argument("name")
@asks
def network_inspect(client: Client, name: str, *, as_json: bool) -> None:
    """Show one network, by its name or the start of its id."""
    found = client.get("networks", name)
    if as_json:
        show_json(found)
        return
    table.show((), facts(found))
    if found["members"]:
        click.echo()
        show_endpoints(found["members"])


def facts(found: Any) -> list[tuple[str, object]]:
    """Return what to say of a network, a line each."""
    said = ("name", "id", "mode", "bridge", "mtu", "internal", "icc", "masquerade")
    options = (f"{key}={value}" for key, value in found["options"].items())
    return [
        *((name, yes_or_no(found[name])) for name in said),
        ("default route", found["gateway"]),
        ("subnets", column(described(s) for s in found["subnets"])),
        ("options", column(options)),
        ("hosts", found["hosts"]),
        ("endpoints", found["endpoints"]),
    ]


def described(subnet: Any) -> str:
    """Return a subnet with its gateway."""
    gateway = f", gateway {subnet['gateway']}" if subnet["gateway"] else ""
    return f"{subnet['pool']}{gateway}"


@click.group()
def endpoint() -> None:
    """Show and remove endpoints."""


@endpoint.command("ls")
@asks
def endpoint_ls(client: Client, *, as_json: bool) -> None:
    """List the endpoints of this host."""
    found = client.get("endpoints")
    if as_json:
        show_json(found)
    else:
        show_endpoints(found)


def show_endpoints(found: Any) -> None:
    """Print endpoints."""
    table.show(
        ("ENDPOINT", "ID", "NETWORK", "ADDRESSES", "DEVICE", "JOINED"),
        [
            (e["name"], table.short(e["id"]), e["network"])
            + (column(e["addresses"]), e["device"], yes_or_no(e["joined"]))
            for e in found
        ],
    )


@endpoint.command("rm")
@click.argument("name")
@asks
def endpoint_rm(client: Client, name: str, *, as_json: bool) -> None:
    """
    Remove an endpoint, by its name or the start of its id.

    This is for what Docker left behind: a container that still runs loses its network.
    """
    done = client.delete("endpoints", name)
    if as_json:
        show_json(done)
    else:
        click.echo(
            f"removed {table.clean(done['name'])} ({table.short(done['removed'])})"
        )


@click.group()
def host() -> None:
    """Show the hosts of the cluster, or give one up."""


@host.command("ls")
@asks
def host_ls(client: Client, *, as_json: bool) -> None:
    """List the hosts that share the store, and how far each one's kernel is."""
    found = client.get("hosts")
    if as_json:
        show_json(found)
        return
    table.show(
        ("HOST", "ID", "VTEP", "STATE", "SINCE", "ENDPOINTS", "BEHIND"),
        [
            (h["name"] + (" (this)" if h["here"] else ""), h["id"][:8])
            + (h["vtep"] or "-", h["state"], moment(h["since"]))
            + (h["endpoints"], h["behind"])
            for h in found
        ],
    )


@host.command("rm")
@click.argument("name")
@click.option("--force", is_flag=True, help="although it is alive; it may come back")
@asks
def host_rm(client: Client, name: str, *, force: bool, as_json: bool) -> None:
    """
    Give up another host, by its name or id: what it has in the store is deleted.

    This is for a machine that is gone for good. After a day (dead_after) it happens by
    itself. The host comes back whole if it was not gone.
    """
    done = client.delete("hosts", name, **({"force": "true"} if force else {}))
    if as_json:
        show_json(done)
    else:
        click.echo(table.clean(f"removed {done['removed']}; {done['blocks']}"))


def moment(seconds: float | None) -> str:
    """Write a time as people read it, in this machine's zone."""
    if not seconds:
        return "-"
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


@click.group()
def port() -> None:
    """Show published ports."""


@port.command("ls")
@asks
def port_ls(client: Client, *, as_json: bool) -> None:
    """List the ports that this host publishes; docker port does not show them."""
    found = client.get("ports")
    if as_json:
        show_json(found)
        return
    table.show(
        ("HOST ADDRESS", "PORT", "TO", "ENDPOINT", "NETWORK"),
        [
            (p["host_ip"] or "*", f"{p['host_port']}/{p['protocol']}")
            + (column(target(a, p["port"]) for a in p["addresses"]),)
            + (p["endpoint"], p["network"])
            for p in found
        ],
    )


def target(address: str, port: int) -> str:
    """Write an address and a port."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@click.group()
def ipam() -> None:
    """Show pools, release addresses."""


@ipam.command("ls")
@asks
def ipam_ls(client: Client, *, as_json: bool) -> None:
    """List the pools that are handed out, and every address taken of them."""
    found = client.get("pools")
    if as_json:
        show_json(found)
        return
    table.show(
        ("POOL", "SPACE", "NETWORK", "TAKEN", "OF"),
        [
            (p["pool"], p["space"], p["network"] or "-", p["taken"], amount(p["size"]))
            for p in found
        ],
    )
    if any(p["addresses"] for p in found):
        click.echo()
        table.show(
            ("ADDRESS", "POOL", "OWNER", "ENDPOINT", "STATE", "HOST"),
            [
                (a["address"], p["pool"], *held(a))
                for p in found
                for a in p["addresses"]
            ],
        )


def held(address: Any) -> tuple[str, str, str, str]:
    """Return who has an address and how."""
    state = "bound" if address["bound"] else "provisional"
    host = "this" if address["here"] else address["host_name"]
    return (
        address["owner"] or "-",
        table.short(address["endpoint_id"]) or "-",
        state,
        host,
    )


def amount(number: int) -> str:
    """Write a number of addresses; of IPv6 pools nobody wants all digits."""
    return str(number) if number < 2**32 else f"2^{number.bit_length()}"


@ipam.command("release")
@click.argument("pool")
@click.argument("address")
@asks
def ipam_release(client: Client, pool: str, address: str, *, as_json: bool) -> None:
    """Give an ADDRESS back to its POOL, if nothing uses it any more."""
    done = client.delete("addresses", pool=pool, address=address)
    if as_json:
        show_json(done)
    else:
        click.echo(f"released {done['released']} of {done['pool']}")


def column(values: Any) -> str:
    """Return values for one cell, a line each."""
    return "\n".join(map(str, values)) or "-"


def yes_or_no(value: object) -> object:
    """Return a truth value in words, anything else as it is."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
