"""
The root of a guest: Debian as debootstrap makes it, with what a Docker host has.

It is made once and kept in a directory; a second run only puts this checkout on it.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cnmdriver.lab import image as lab_image
from tests.setup.wheels import CHECKOUT, fetch

SUITE = "bookworm"
BASE = """
systemd systemd-sysv dbus udev kmod iproute2 python3 python3-venv ca-certificates procps
""".split()  # noqa: SIM905 - a list to read
HOST = """
iptables nftables docker.io firewalld etcd-server etcd-client iputils-ping
""".split()  # noqa: SIM905 - as above
GROUP = "/pynet-vm"
"""The control group of containers, which is this machine's."""
CGROUPS = """
[Unit]
Description=Control groups that Docker may write to
Before=docker.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'for each in /sys/fs/cgroup/*; do mount -o remount,bind,rw $each; done; true'
[Install]
WantedBy=docker.service
"""
"""systemd-nspawn leaves those of version 1 for reading."""
DOCKER = f"""
{{"cgroup-parent": "{GROUP}"}}
"""
WIRE = """
[Match]
Name=e*
[Network]
LinkLocalAddressing=ipv6
"""


def made(directory: Path) -> Path:
    """Return the root file system in a directory, made or brought up to date."""
    root = directory / "root"
    if not (directory / "whole").exists():
        debootstrap(directory, root)
        (directory / "whole").touch()
    furnish(root)
    return root


def debootstrap(directory: Path, root: Path) -> None:
    """Make the root file system from Debian's packages."""
    cache = directory / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    if root.exists():
        shutil.rmtree(root)
    run(
        *("debootstrap", "--variant=minbase", f"--cache-dir={cache}"),
        *(f"--include={','.join(BASE)}", SUITE, str(root)),
    )
    forbid = root / "usr/sbin/policy-rc.d"
    forbid.write_text("#!/bin/sh\nexit 101\n")
    forbid.chmod(0o755)
    with proc(root):
        apt = ("apt-get", "-q=2", "install", "--yes", "--no-install-recommends")
        run("env", "DEBIAN_FRONTEND=noninteractive", "chroot", str(root), *apt, *HOST)
    forbid.unlink()
    for package in (root / "var/cache/apt/archives").glob("*.deb"):
        shutil.move(package, cache / package.name)


@contextlib.contextmanager
def proc(root: Path) -> Iterator[None]:
    """Have /proc in a root meanwhile, as programs of packages need it."""
    run("mount", "-t", "proc", "proc", str(root / "proc"))
    try:
        yield
    finally:
        run("umount", str(root / "proc"))


def furnish(root: Path) -> None:
    """Put on it this checkout, its wheels and an image for containers."""
    (root / "etc/hostname").write_text("guest\n")
    (root / "etc/systemd/network/80-wire.network").write_text(WIRE)
    (root / "etc/systemd/system/cgroups.service").write_text(CGROUPS)
    (root / "etc/docker").mkdir(exist_ok=True)
    (root / "etc/docker/daemon.json").write_text(DOCKER)
    units = ("cgroups", "systemd-networkd", "docker")
    run("chroot", str(root), "systemctl", "--quiet", "enable", *units)
    off = ("etcd", "firewalld", "systemd-networkd-wait-online", "apt-daily.timer")
    run("chroot", str(root), "systemctl", "--quiet", "disable", *off)
    checkout = root / "root/pynet"
    shutil.rmtree(checkout, ignore_errors=True)
    shutil.copytree(
        CHECKOUT, checkout, ignore=shutil.ignore_patterns(".*", "tests", "build")
    )
    wheels = root / "root/wheels"
    wheels.mkdir(exist_ok=True)
    fetch(wheels, "--only-binary=:all:", "--python-version", "3.11")
    lab_image.write_image(root / "root/image.tar")


def run(*argv: str) -> None:
    """Run a program; its output is seen."""
    environment = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    subprocess.run(argv, check=True, env=environment)
