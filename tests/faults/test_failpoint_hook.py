"""The hook of failpoints: what it is asked for, and at which step of which call it acts."""

import asyncio
import os
import subprocess
import sys
import time

import pytest
from structlog.contextvars import bind_contextvars, bound_contextvars

from cnmdriver import failpoints
from cnmdriver.errors import InvalidParameter, KernelError, StoreError

CALLS = ("NetworkDriver.Join", "NetworkDriver.Leave", "IpamDriver.RequestPool")


def hook(text):
    """Return the hook for a value of the variable."""
    found = failpoints.hook({"PYNET_FAILPOINT": text}, CALLS)
    assert found is not None
    return found


async def taken(step, *names, method):
    """Take steps within a call, as a request of its own."""
    with bound_contextvars(method="".join(list(method))):
        for name in names:
            await step(name)


@pytest.mark.parametrize("environment", [{}, {"PYNET_FAILPOINT": ""}])
def test_there_is_no_hook_unless_it_is_asked_for(environment):
    """Without the variable nothing of it runs."""
    assert failpoints.hook(environment, CALLS) is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("Join.3", "'Join.3' is no failpoint"),
        ("Join.3:die", "'Join.3:die' is no failpoint"),
        ("Join.0:kill", "is no failpoint"),
        ("Join:kill", "is no failpoint"),
        ("commit.never:kill", "is no failpoint"),
        ("Join.1:sleep=long", "is no failpoint"),
        ("Join.1:kill=3", "is no failpoint"),
        ("Jion.3:kill", "no call 'Jion'; known are Join, Leave, RequestPool"),
        ("commit.after:kill,trace,nonsense", "'nonsense' is no failpoint"),
    ],
)
def test_what_makes_no_sense_is_refused(text, part):
    """A failpoint that could never act is refused in a sentence."""
    with pytest.raises(InvalidParameter) as refusal:
        hook(text)
    assert part in str(refusal.value)


async def test_a_numbered_step_acts_in_its_call_alone():
    """The number counts the steps of one call; others of the name count anew."""
    step = hook("Join.2:error")
    await step("commit.before")
    await taken(step, "apply.a", "apply.b", "apply.c", method="NetworkDriver.Leave")
    await taken(step, "commit.before", method="NetworkDriver.Join")
    await taken(step, "commit.before", method="NetworkDriver.Join")
    with pytest.raises(KernelError, match=r"apply\.bridge failed"):
        await taken(step, "commit.after", "apply.bridge", method="NetworkDriver.Join")


async def test_calls_on_one_connection_are_told_apart():
    """A context that is used again, as a kept connection's is, begins to count anew."""
    step = hook("Join.2:error")
    for _ in range(3):
        bind_contextvars(method="x/NetworkDriver.Join"[2:])
        await step("commit.before")
    with pytest.raises(StoreError):
        await step("commit.after")


async def test_what_a_call_starts_counts_for_it():
    """Steps in tasks of a call are steps of that call."""
    step = hook("Join.3:error")
    with bound_contextvars(method="NetworkDriver.Join"):
        await asyncio.create_task(step("commit.before"))
        await step("commit.after")
        with pytest.raises(KernelError):
            await asyncio.create_task(step("clear.address"))


async def test_each_acts_once():
    """Who is named twice acts twice, and then never more."""
    step = hook("commit.after:error,commit.after:error")
    for _ in range(2):
        with pytest.raises(StoreError, match="as PYNET_FAILPOINT wants it"):
            await step("commit.after")
    await step("commit.after")


async def test_a_sleep_takes_its_time():
    """The step waits as long as it was said, in seconds."""
    step = hook("apply.device:sleep=0.2")
    begin = time.monotonic()
    await step("apply.device")
    assert 0.2 <= time.monotonic() - begin < 5


@pytest.mark.root
def test_a_daemon_with_a_wrong_failpoint_does_not_start(tmp_path):
    """It says what is wrong and exits as with any wrong setting, nothing else."""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "cnmdriver", "serve"],
        env={
            "PATH": os.environ["PATH"],
            "PYNET_FAILPOINT": "CreateNetwrok.1:kill",
            "PYNET_STATE_DIR": str(tmp_path / "state"),
            "PYNET_RUN_DIR": str(tmp_path / "run"),
            "PYNET_SOCKET": str(tmp_path / "pynet.sock"),
        },
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )
    assert done.returncode == 2
    assert "pynet: PYNET_FAILPOINT: Docker has no call 'CreateNetwrok'" in done.stderr
    assert "Traceback" not in done.stderr
