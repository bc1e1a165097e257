"""`pynet report`: all there is to know of a fault, in one archive, without secrets."""

import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from cnmdriver.cli.client import Client, ClientError, NotRunningError
from cnmdriver.cli.main import version
from cnmdriver.cli.options import asks, show_json
from cnmdriver.redaction import scrubbed

ASKED = (
    *("status", "settings", "networks", "endpoints", "hosts", "ports", "pools"),
    *("diff", "census", "doctor", "explain", "log"),
)
"""What the daemon is asked for; each is a file of the archive."""
TOOLS: Mapping[str, tuple[str, ...]] = {
    "docker": ("docker", "version"),
    "ip": ("ip", "-V"),
    "iptables": ("iptables", "-V"),
    "nft": ("nft", "-v"),
    "etcdctl": ("etcdctl", "version"),
}
SYSTEMD = Path("/run/systemd/system")
JOURNAL = ("journalctl", "--no-pager", "-u", "pynet", "-n", "2000", "-o", "short-iso")
LIMIT = 10.0
"""Seconds for each program."""
README = """\
A report of pynet. Addresses, names of hosts, networks and containers are in it;
passwords, keys, tokens and users in addresses of the store are not. Look into it before
you give it to others.
"""


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@asks
def report(client: Client, file: Path | None, *, as_json: bool) -> None:
    """
    Write an archive for a bug report: FILE, or one in this directory with the time.

    It has versions, settings, status, census, diff, doctor, log and what there is of
    networks and hosts, without secrets. A file that is there is not written over.
    """
    path = file or Path(
        time.strftime(f"pynet-report-{platform.node()}-%Y%m%d-%H%M%S.tar.gz")
    )
    found = dict(collected(client))
    secrets = tuple(known_secrets(found.get("settings.json")))
    files = {name: scrubbed(text(value), secrets) for name, value in found.items()}
    try:
        write(path, files)
    except FileExistsError:
        raise click.ClickException(
            f"{path} is there already: name another file, or remove it"
        ) from None
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
    if as_json:
        show_json({"file": str(path), "content": sorted(files)})
    else:
        click.echo(
            f"wrote {path}, with {len(files)} files; look into it before you "
            "give it to others"
        )


def collected(client: Client) -> Iterator[tuple[str, object]]:
    """Yield the files; what cannot be had is an error in the file's place."""
    yield "README", README
    yield "versions.json", versions()
    for name in ASKED:
        try:
            yield f"{name}.json", client.get(name)
        except NotRunningError as error:
            yield "daemon.txt", str(error)
            # Imported late: with a daemon it is not needed.
            from cnmdriver.insight.doctor import alone  # noqa: PLC0415

            yield "doctor.json", alone()
            break
        except ClientError as error:
            yield f"{name}.json", {"error": str(error)}
    if SYSTEMD.exists() and shutil.which(JOURNAL[0]):
        yield "journal.txt", said(JOURNAL)


def versions() -> dict[str, str]:
    """Return versions of all that pynet works with."""
    return {
        "pynet": version(),
        "python": sys.version,
        "kernel": " ".join(platform.uname()),
        "system": release().get("PRETTY_NAME", ""),
        **{name: said(words) for name, words in TOOLS.items() if shutil.which(name)},
    }


def release() -> dict[str, str]:
    """Return what the distribution says of itself."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def said(words: tuple[str, ...]) -> str:
    """Run a program, and return what it printed or why it did not."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{words[0]}: {error}"
    return done.stdout.decode(errors="replace").strip()


def known_secrets(settings: object) -> Iterator[str]:
    """Yield the secrets that the settings lead to, to be looked for everywhere."""
    if not isinstance(settings, dict):
        return
    for name in ("store_password_file", "store_key"):
        path = Path(str(settings.get(name) or "/nonexistent"))
        try:
            content = path.read_text(errors="replace").strip()
        except OSError:
            continue
        yield content


def text(value: Any) -> str:
    """Write a file's content: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, indent=1) + "\n"


def write(path: Path, files: Mapping[str, str]) -> None:
    """Write the archive, for its owner alone; raises FileExistsError."""
    made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    top = path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
    with os.fdopen(made, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, content in sorted(files.items()):
            data = content.encode()
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size, info.mode, info.mtime = len(data), 0o600, int(time.time())
            tar.addfile(info, io.BytesIO(data))
