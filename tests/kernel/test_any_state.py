"""
Any state follows any other, on the real kernel.

A walk draws whole commands of Docker's, single calls out of their place, deaths and
cancels at any step, and strangers that change what is ours. A death is an exception at
a step: what an operation takes back by itself is taken back then
(`test_crash_at_every_step` dies without). After each audit the kernel is what the
records say, and no container lost its device; at the end nothing is left.
"""

import pytest

from .conftest import run
from .machine import VTEP, drop_namespace, left_in_kernel
from .walk import Walk

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(110)]

ACTIONS = {
    Walk.create_network: 8,
    Walk.remove_network: 3,
    Walk.start_container: 14,
    Walk.stop_container: 6,
    Walk.forget_container: 1,
    Walk.single_call: 6,
    Walk.interfere: 10,
    Walk.die_soon: 4,
    Walk.cancel_soon: 3,
    Walk.audit: 5,
}
STEPS = 90


@pytest.mark.parametrize("seed", range(4))
async def test_any_state_follows_any_other(host, tmp_path, seed):
    """After each audit the kernel is as recorded; at the end nothing is left of it."""
    run("ip", "addr", "add", VTEP, "dev", "lo")
    walk = Walk(tmp_path, host, seed)
    await walk.up()
    try:
        for number in range(STEPS):
            (action,) = walk.random.choices(list(ACTIONS), list(ACTIONS.values()))
            print(number, action.__name__)
            await action(walk, *())
        await walk.let_go()
        kernel = walk.alive.kernel
        held = [op for op in await kernel.found() if not getattr(op, "keep", False)]
        assert (walk.alive.rig.records, held, left_in_kernel(tmp_path)) == ([], [], [])
    finally:
        for box in list(walk.sandboxes):
            walk.end_sandbox(box)
        await walk.down()
        drop_namespace(tmp_path)
