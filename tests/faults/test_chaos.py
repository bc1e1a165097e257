"""Random faults on three hosts; by hand: `pynet lab chaos --kills 1000`."""

import os
from pathlib import Path

import pytest

from cnmdriver.lab.chaos.run import Plan, new_seed, whole

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.slow]

SECONDS = 180.0


@pytest.mark.timeout(900)
def test_nothing_is_lost_in_chaos(tmp_path: Path) -> None:
    """
    Whatever fails at random: no address twice, nothing left, no step by hand.

    1. Start three hosts and three etcd members, and networks on all.
    2. Let users make and remove containers while daemons, dockerds, members, machines
       and cables fail, for three minutes, as a random seed says.
    3. Heal all, let all containers call each other, and remove everything.
    Result: the run's own oracle finds nothing. `PYNET_CHAOS_SEED` repeats a schedule.
    """
    chosen = os.environ.get("PYNET_CHAOS_SEED")
    plan = Plan(seed=int(chosen) if chosen else new_seed(), seconds=SECONDS)
    notes = whole(tmp_path / "lab", plan, print, keep=False)
    summary = "\n".join(notes.summary())
    print(summary)
    assert notes.well, f"seed {plan.seed}:\n{summary}"
    assert notes.commands["started"] > 0
    assert notes.kills.total() > 0
