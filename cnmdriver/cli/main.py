"""
The program `pynet`: the daemon, and the commands that ask it.

A subcommand is imported when it is used: the daemon needs no tables, and nobody else
needs the daemon.
"""

import importlib
from importlib import metadata

import click

from cnmdriver.cli.manual import told

COMMANDS = {
    "serve": ("cnmdriver.cli.serve:serve", "Run the daemon."),
    "status": ("cnmdriver.cli.host:status", "Tell whether all is well on this host."),
    "watch": ("cnmdriver.cli.watch:watch", "Show what happens, as it happens."),
    "network": ("cnmdriver.cli.objects:network", "Show networks."),
    "endpoint": ("cnmdriver.cli.objects:endpoint", "Show and remove endpoints."),
    "host": ("cnmdriver.cli.objects:host", "Show the hosts of the cluster."),
    "port": ("cnmdriver.cli.objects:port", "Show published ports."),
    "ipam": ("cnmdriver.cli.objects:ipam", "Show pools, release addresses."),
    "explain": ("cnmdriver.cli.host:explain", "Print what one would type instead."),
    "diff": ("cnmdriver.cli.host:diff", "Compare the kernel with the plans."),
    "census": ("cnmdriver.cli.host:census", "List all that pynet owns on this host."),
    "trace": ("cnmdriver.cli.checks:trace", "Find where a packet between two dies."),
    "doctor": ("cnmdriver.cli.checks:doctor", "Check this host and each other one."),
    "report": ("cnmdriver.cli.report:report", "Write an archive for a bug report."),
    "settings": ("cnmdriver.cli.setup:show_settings", "Print or check the settings."),
    "completion": ("cnmdriver.cli.setup:completion", "Print a shell's completion."),
    "clear": ("cnmdriver.cli.setup:clear", "Remove all of pynet from the kernel."),
    "lab": ("cnmdriver.lab.cli:lab", "Run several Docker hosts on this machine."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        if not isinstance(command, click.Command):
            return None
        return told(command, cmd_name)

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """Write the list of commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def version() -> str:
    """Return the installed version."""
    try:
        return metadata.version("cnmdriver")
    except metadata.PackageNotFoundError:
        return "unknown"


def print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """Print the version and end."""
    if value and not ctx.resilient_parsing:
        click.echo(f"pynet {version()}")
        ctx.exit()


@click.command(
    "pynet",
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="pynet COMMAND --help has options, examples and exit codes of each.",
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Give plain Docker hosts networks: a network and IPAM driver."""
