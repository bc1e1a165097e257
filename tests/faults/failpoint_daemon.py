"""
Start pynet over and over, each time in a moment, and say how it ended.

Run as a program, with a JSON object of settings and a file for the log: it imports
pynet once, and each daemon is a process forked from it. It takes a command a line and
answers each with one line:

    start GRACE FAILPOINTS    its process id
    kill                      its exit code, after a SIGKILL; minus the signal
    wait SECONDS              its exit code, "alive" if it has none by then
"""

import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import cnmdriver.store.etcd.store  # noqa: F401 - for the daemons to come
from cnmdriver import daemon, failpoints, settings


def main(given: dict[str, str], log: str) -> None:
    """Do what standard input says until it ends."""
    gc.freeze()
    child = 0
    for line in sys.stdin:
        verb, _, word = line.rstrip("\n").partition(" ")
        if verb == "start":
            grace, _, armed = word.partition(" ")
            child = forked({**given, "grace": grace}, log, armed)
            print(child, flush=True)
            continue
        if verb == "kill" and child:
            os.kill(child, signal.SIGKILL)
        print(ended(child, float(word or 10)) if child else "none", flush=True)


def forked(given: dict[str, str], log: str, armed: str) -> int:
    """Start a daemon and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with Path(os.devnull).open() as nothing, Path(log).open("a") as file:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ[failpoints.VARIABLE] = armed
        code = daemon.run(settings.load(given, {}))
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, seconds: float) -> str:
    """Wait for a daemon's end and tell it."""
    latest = time.monotonic() + seconds
    while time.monotonic() < latest:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    return "alive"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
