"""The image that containers run: busybox, made here, as nothing can be pulled."""

import io
import shutil
import tarfile
from pathlib import Path

from cnmdriver.lab import process
from cnmdriver.lab.process import LabError

NAME = "busybox"
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
}
DIRECTORIES = {"etc": 0o755, "root": 0o700, "tmp": 0o1777, "var": 0o755}


def write_image(path: Path) -> None:
    """Write a root file system of static busybox and its applets as a tar file."""
    program = shutil.which("busybox")
    if program is None:
        raise LabError(
            "the lab needs a static busybox for its image: install busybox-static"
        )
    applets = process.run([program, "--list-full"]).stdout.split()
    with tarfile.open(path, "w") as tar:
        for name, mode in DIRECTORIES.items():
            _add(tar, name, mode, tarfile.DIRTYPE)
        for name, text in FILES.items():
            _add(tar, name, 0o644, data=text.encode())
        _add(tar, "bin/busybox", 0o755, data=Path(program).read_bytes())
        for applet in applets:
            if applet != "bin/busybox":
                _add(tar, applet, 0o777, tarfile.SYMTYPE, link="/bin/busybox")


def _add(
    tar: tarfile.TarFile,
    name: str,
    mode: int,
    kind: bytes = tarfile.REGTYPE,
    *,
    data: bytes = b"",
    link: str = "",
) -> None:
    member = tarfile.TarInfo(name)
    member.mode = mode
    member.type = kind
    member.size = len(data)
    member.linkname = link
    tar.addfile(member, io.BytesIO(data))
