"""
Devices that are deleted together.

The kernel waits some 16 ms for each request that deletes a device, and no longer for
one that deletes a whole group. That deletes whatever is in the group: so it is a new
one each time, and is looked at before.
"""

import errno
import os
import secrets
from collections.abc import Collection, Mapping

from cnmdriver.dataplane import rtnetlink
from cnmdriver.dataplane.rtnetlink import DELETE_LINK, GROUP, SET_LINK
from cnmdriver.plan import ops


def remove(indexes: Collection[int], back: int = ops.GROUP) -> bool:
    """
    Delete devices of the thread's namespace; those that are gone are well.

    Tells whether it was done; if others are in the group too, all of ours go `back`
    to theirs. Raises OSError for what the kernel refused.
    """
    group = fresh_group()
    left = moved(dict.fromkeys(indexes, group))
    if not left:
        return True
    if members(group) != left:
        moved(dict.fromkeys(left, back))
        return False
    request = (DELETE_LINK, 0, rtnetlink.link(0) + rtnetlink.number(GROUP, group))
    rtnetlink.done([request])
    return True


def fresh_group() -> int:
    """Choose a group that nobody else will have chosen."""
    return secrets.randbelow((1 << 31) - (1 << 16)) + (1 << 16)


def moved(groups: Mapping[int, int]) -> set[int]:
    """Put devices into groups; return those that are there."""
    codes = rtnetlink.asked([
        (SET_LINK, 0, rtnetlink.link(index) + rtnetlink.number(GROUP, group))
        for index, group in groups.items()
    ])  # fmt: skip
    found = dict(zip(groups, codes, strict=True))
    for code in found.values():
        if code not in {0, errno.ENODEV}:
            raise OSError(code, os.strerror(code))
    return {index for index, code in found.items() if not code}


def members(group: int) -> set[int]:
    """Return the devices that are in a group."""
    mark = rtnetlink.number(GROUP, group)
    found, _ = rtnetlink.links()
    return {rtnetlink.index(packed) for packed in found if mark in packed}
