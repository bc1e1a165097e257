"""Raw sockets in any namespace."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tests.frames import ALL

from .conftest import CLONE_NEWNET, Namespace, call


@contextmanager
def inside(space: Namespace) -> Iterator[None]:
    """Be in a namespace."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    call("setns", space.fd, CLONE_NEWNET)
    try:
        yield
    finally:
        call("setns", before, CLONE_NEWNET)
        os.close(before)


@contextmanager
def plug(space: Namespace, device: str) -> Iterator[socket.socket]:
    """Open a raw socket on a device; it hears what arrives, as it arrives."""
    with inside(space):
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL))
    with opened:
        opened.bind((device, ALL))
        opened.settimeout(0.2)
        yield opened
