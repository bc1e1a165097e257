"""`make demo`: it tells its story to the end, and the machine does not notice."""

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cnmdriver
from cnmdriver.lab import demo, process
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.machine import wait_until

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(120)]

PACKAGE = Path(str(cnmdriver.__file__)).parent.parent
COUNTERS = re.compile(
    r"fs\.(dentry-state|file-nr|inode-nr|inode-state|quota)|kernel\.(ns_last_pid|random)"
    r"|kernel\.pty\.nr|net\.netfilter\.nf_conntrack_count"
)


def machine_state() -> dict[str, list[str]]:
    """Return what the demo must not change on the machine it runs on."""
    commands = {
        "links": ["ip", "-o", "link"],
        "addresses": ["ip", "-o", "addr"],
        "routes": ["ip", "route", "show", "table", "all"],
        "namespaces": ["ip", "netns"],
        "nft": ["nft", "-s", "list", "ruleset"],
        "iptables": ["iptables-save"],
        "ip6tables": ["ip6tables-save"],
        "mounts": ["cat", "/proc/self/mounts"],
        "sysctls": ["sysctl", "-a"],
    }
    state = {name: process.run(argv).stdout for name, argv in commands.items()}
    lines = {name: text.splitlines() for name, text in state.items()}
    for name in ("iptables", "ip6tables"):
        rules = [line for line in lines[name] if line[:1] != "#"]
        lines[name] = [re.sub(r"\[\d+:\d+\]", "", line) for line in rules]
    lines["routes"] = [line.strip() for line in lines["routes"]]
    lines["sysctls"] = [line for line in lines["sysctls"] if not COUNTERS.match(line)]
    return lines


def marked(mark: str) -> list[int]:
    """Return the processes that the demo with this mark has started, and it itself."""
    found = []
    for pid in process.processes():
        try:
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def start(mark: str, directory: Path) -> subprocess.Popen[str]:
    """Start the demo; all its processes carry the mark in their environment."""
    env = os.environ | {"DEMO_MARK": mark, "TMPDIR": str(directory)}
    return subprocess.Popen(
        [sys.executable, "-m", "cnmdriver.lab.demo"],
        cwd=PACKAGE,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_demo_plays_to_its_end_and_leaves_the_machine_as_it_was(tmp_path: Path) -> None:
    """
    The demo ends with 0 and printed every command, and nothing of it is left.

    1. The machine's links, routes, firewall, mounts and settings are noted.
    2. The demo runs, piped.

    Result: exit code 0, no colours, no line too long for a narrow window; the machine
    is as before, no process of the demo runs, and so none of its namespaces exists;
    its directory is empty.
    """
    mark = secrets.token_hex(8)
    before = machine_state()
    with start(mark, tmp_path) as child:
        assert child.stdout is not None
        said = child.stdout.read()
    assert child.returncode == 0, said
    shown = re.findall(r"^(?:h[12])?\$ (?:.*\\\n)*.*", said, re.MULTILINE)
    wanted = [demo.typed(c) for step in demo.STORY for c in step.commands]
    assert shown == wanted
    assert [line for line in said.splitlines() if len(line) > 80] == []
    assert "\x1b" not in said
    assert machine_state() == before
    assert marked(mark) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_demo_that_is_stopped_leaves_nothing(tmp_path: Path, signum: int) -> None:
    """A demo that is told to stop in the middle takes its lab down."""
    mark = secrets.token_hex(8)
    with start(mark, tmp_path) as child:
        assert child.stdout is not None
        while "docker run" not in child.stdout.readline():
            assert child.poll() is None
        child.send_signal(signum)
        child.stdout.read()
    assert child.returncode == 128 + signum
    assert wait_until(lambda: not marked(mark), 5.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (demo.does("h1", "true", "word"), "`true` should have printed 'word'"),
        (demo.does("h1", "false", ""), "`false` ended with 1"),
        (demo.fails("h1", "echo word", ""), "`echo word` should have failed"),
        (demo.fails("h1", "ls /none", "word"), "`ls /none` should have printed 'word'"),
        (demo.does("h1", "ls /none | cat", ""), "`ls /none | cat` ended with 2"),
        (
            demo.does("h1", "echo word | grep x", ""),
            "`echo word | grep x` ended with 1",
        ),
        (demo.does("h1", "echo word", "word"), ""),
        (demo.does("h1", "echo 'a | b' | tr a c", r"^c \| b$"), ""),
        (demo.fails("h1", "ls /none", "No such file"), ""),
        (demo.fails("h1", "ls /none | cat", "No such file"), ""),
    ],
)
def test_what_differs_from_the_expectation_is_told(
    bare: Lab, command: demo.Command, problem: str
) -> None:
    """A command that does not do what its step says is named, with what it lacks."""
    assert demo.perform(bare, command) == problem


def test_a_failing_step_ends_the_story(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step that fails is named, the exit code is 1, and the lab is gone."""
    step = demo.STORY[0]
    wrong = demo.fails("h1", "docker version", "")
    changed = demo.Step(
        title=step.title, text=step.text, commands=(wrong, *step.commands)
    )
    assert demo.play(place, (changed,)) == 1
    said = capsys.readouterr().out
    assert "Step 1 failed: `docker version` should have failed" in said
    assert "The end of pynet's log on h2:" in said
    assert "docker run" not in said
    assert not place.exists()


def test_a_long_command_is_broken_between_its_words() -> None:
    """What is typed can be copied: rows end with a backslash, never within quotes."""
    quoted = f"'{'b c ' * 10}'"
    command = demo.does("h1", f"echo {'a' * 40} {quoted}", "")
    assert demo.typed(command) == f"h1$ echo {'a' * 40} \\\n    {quoted}"
    assert demo.typed(demo.does("", "pynet lab stop", "")) == "$ pynet lab stop"


def test_a_long_line_of_output_is_folded() -> None:
    """Output is indented, and broken at spaces and commas where it is too long."""
    assert demo.folded("") == [""]
    assert demo.folded("a  b") == ["  a  b"]
    assert demo.folded(f"{'a' * 70} b,{'c' * 8} d") == [
        f"  {'a' * 70} b,",
        f"      {'c' * 8} d",
    ]


@pytest.fixture(scope="module")
def bare(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return a host without pynet; leave it as found."""
    return make_module_lab(serve=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a directory for a lab."""
    return tmp_path / "place"
