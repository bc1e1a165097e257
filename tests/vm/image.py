"""
The disk of a guest: Debian as debootstrap makes it, with what a Docker host has.

It is made once and kept in a directory; a second run only puts this checkout on it,
and with PYNET_VM_KEEP in the environment not even that.
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
iptables nftables docker.io firewalld etcd-server etcd-client iputils-ping linux-image-amd64
""".split()  # noqa: SIM905 - as above
MODULES = "virtio_pci virtio_blk ext4"
"""What the first file system needs; the rest is loaded from the disk."""
SIZE = "4G"
GROUP = "/pynet-vm"
"""The control group of containers: in namespaces it is this machine's."""
UNIT = """
[Unit]
Description=What the test asks for
DefaultDependencies=no
ConditionVirtualization=!container
After=systemd-udevd.service
StartLimitIntervalSec=0
[Service]
ExecStart=/usr/bin/python3 /root/agent.py
Restart=always
RestartSec=1
[Install]
WantedBy=sysinit.target
"""
CGROUPS = """
[Unit]
Description=Control groups that Docker may write to
ConditionVirtualization=container
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
    if not os.environ.get("PYNET_VM_KEEP"):
        furnish(root)
        (directory / "disk.img").unlink(missing_ok=True)
    return root


def disk_of(root: Path) -> Path:
    """Return the disk that QEMU boots, made of the root file system if need be."""
    disk = root.parent / "disk.img"
    if disk.exists():
        return disk
    run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(disk), SIZE)
    return disk


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
        tools = root / "etc/initramfs-tools"
        (tools / "conf.d/pynet").write_text("MODULES=list\n")
        (tools / "modules").write_text("\n".join(MODULES.split()) + "\n")
        run("chroot", str(root), "update-initramfs", "-u")
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
    """Put on it the agent, this checkout, its wheels and an image for containers."""
    (root / "etc/hostname").write_text("guest\n")
    (root / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
    shutil.copy(Path(__file__).with_name("agent.py"), root / "root/agent.py")
    (root / "etc/systemd/system/agent.service").write_text(UNIT)
    (root / "etc/systemd/network/80-wire.network").write_text(WIRE)
    (root / "etc/systemd/system/cgroups.service").write_text(CGROUPS)
    (root / "etc/docker").mkdir(exist_ok=True)
    (root / "etc/docker/daemon.json").write_text(DOCKER)
    units = ("agent", "cgroups", "systemd-networkd", "docker")
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
