"""
What the help of each command says besides: examples, and exit codes.

It is here and not at each command, so that one can read through it; a command that
says both itself has no entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import click

ASKED = "0 done; 1 refused, or pynet does not answer; 2 wrong use."
"""Exit codes of a command that asks the daemon."""


@dataclass(frozen=True, slots=True)
class Page:
    """Command lines as one would type them, and what the exit codes mean."""

    examples: tuple[str, ...]
    codes: str = ASKED

    def epilog(self) -> str:
        r"""Return it as click writes it; after \b it leaves lines alone."""
        lines = "\n".join(f"  {line}" for line in self.examples)
        return f"\b\nExamples:\n{lines}\n\nExit codes: {self.codes}"


PAGES: Mapping[str, Page] = {
    "serve": Page(
        (
            "pynet serve",
            "pynet serve --store etcd://192.0.2.101:2379 --vtep eth1",
            "PYNET_LOG_LEVEL=debug pynet serve --config ./pynet.toml",
        ),
        "0 told to stop; 1 what the same settings may do later, as there is no "
        "address for tunnels yet; 2 a setting that cannot work, or another daemon "
        "that runs here. SIGHUP reads log_level, default_pools and certificates "
        "again; SIGTERM and SIGINT stop, and leave the networks working.",
    ),
    "status": Page(
        ("pynet status", "pynet status --json | jq -r '.attention[]'"),
        "0 well; 1 something needs attention, or pynet does not answer; 2 wrong use.",
    ),
    "watch": Page(
        ("pynet watch", "pynet watch --json | jq -r '.event'"),
        "0 ended by Ctrl-C; 1 pynet did not answer at the start; 2 wrong use.",
    ),
    "network ls": Page(("pynet network ls", "pynet network ls --json")),
    "network inspect": Page(("pynet network inspect blue",)),
    "endpoint ls": Page(
        ("pynet endpoint ls", "pynet endpoint ls --json | jq -r '.[].mac'")
    ),
    "endpoint rm": Page(("pynet endpoint rm web", "pynet endpoint rm 1a2b3c4d5e6f")),
    "host ls": Page(("pynet host ls",)),
    "host rm": Page(("pynet host rm host3", "pynet host rm host3 --force")),
    "port ls": Page(("pynet port ls",)),
    "ipam ls": Page(("pynet ipam ls",)),
    "ipam release": Page(("pynet ipam release 10.1.0.0/24 10.1.0.7",)),
    "explain": Page(
        ("pynet explain blue", "pynet explain >net.sh && unshare -n bash -e net.sh")
    ),
    "diff": Page(
        ("pynet diff", "pynet diff --json | jq .lacking"),
        "0 no difference; 1 a difference, or pynet does not answer; 2 wrong use.",
    ),
    "census": Page(("pynet census", "pynet census --json | jq '.owned | length'")),
    "trace": Page(
        ("pynet trace web db", "pynet trace web 10.1.0.32 --json | jq -r .verdict"),
        "0 packets arrive; 1 they do not, or pynet does not answer; 2 wrong use.",
    ),
    "doctor": Page(
        ("pynet doctor", "pynet doctor --json | jq -r '.findings[].what'"),
        "0 nothing amiss; 1 warnings; 2 errors, pynet does not run, or wrong use.",
    ),
    "report": Page(("pynet report", "pynet report /tmp/bug.tar.gz")),
}


def told(command: click.Command, path: str) -> click.Command:
    """Add to the help of a command, and of those below it."""
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            told(each, f"{path} {name}")
    elif path in PAGES and command.epilog is None:
        command.epilog = PAGES[path].epilog()
    return command
