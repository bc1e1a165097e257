"""
Runs what the test asks for inside a guest: a line of JSON comes, one goes.

It speaks over a virtio port and not over the network, which the test changes.
"""

import json
import subprocess
from pathlib import Path

PORT = "/dev/virtio-ports/pynet.ctl"


def answer(line: bytes) -> dict[str, object]:
    """Run a command and return how it ended."""
    asked = json.loads(line)
    try:
        done = subprocess.run(
            asked["argv"],
            input=asked["input"],
            timeout=asked["timeout"],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"code": 255, "out": "", "err": str(error)}
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}


with Path(PORT).open("r+b", buffering=0) as port:
    port.write(b"ready\n")
    while True:
        line = b""
        while not line.endswith(b"\n"):
            line += port.read(65536) or b""
        port.writelines(
            json.dumps(answer(each)).encode() + b"\n" for each in line.splitlines()
        )
