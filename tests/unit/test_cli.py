"""The commands of `pynet`, against a real admin door on a Unix socket."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web
from click.testing import CliRunner

from cnmdriver.admin.app import application
from cnmdriver.api.app import runner
from cnmdriver.cli import client as client_module
from cnmdriver.cli import table
from cnmdriver.cli.host import duration
from cnmdriver.cli.main import COMMANDS, main
from cnmdriver.cli.manual import PAGES
from cnmdriver.cli.objects import amount
from cnmdriver.insight import kernel
from tests import scene
from tests.fakes import rig


@contextmanager
def served(directory, prepare, known=None, journal=None):
    """Serve a host in a thread of its own; yield it and the path of its socket."""
    ready, over, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    path, hosts = directory / "admin.sock", []

    async def serve():
        async with rig(directory) as made:
            await prepare(made)
            info = {
                "pid": 7,
                "uptime": 3725.0,
                "store": "sqlite:///s",
                "docker": "off",
                **(known or {}),
            }
            app = application(
                made.site,
                info=lambda: info,
                remove_endpoint=made.networks.remove,
                release_address=made.ipam.release_address,
                journal=journal,
            )
            server = runner(app)
            await server.setup()
            await web.UnixSite(server, str(path)).start()
            hosts.append(made)
            ready.set()
            await over.wait()
            await server.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield hosts[0], path
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Serve a host with two networks, and let the commands find it."""
    monkeypatch.setattr(kernel, "PAUSE", 0)
    with served(tmp_path, scene.populate) as (made, path):
        monkeypatch.setenv("PYNET_ADMIN", str(path))
        yield made


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Serve a host with nothing on it."""

    async def nothing(_):
        pass

    with served(tmp_path, nothing) as (made, path):
        monkeypatch.setenv("PYNET_ADMIN", str(path))
        yield made


def pynet(*words):
    """Run a command; return its exit code and what it printed."""
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    return done.exit_code, done.output


def test_status(host):
    """A host that is well says so in few lines and exits with 0."""
    code, text = pynet("status")
    assert code == 0
    assert text.splitlines() == [
        "pynet   well",
        "daemon  version test, pid 7, up 1 h 2 min",
        f"host    h1 ({host.site.host.id})",
        f"store   sqlite:///s, at revision {host.site.view.revision}",
        "docker  off",
        "holds   networks 2, endpoints 4, ports 2, addresses 9",
    ]


def test_status_not_well(host):
    """A host that is not well says why and exits with 1, in JSON too."""
    host.kernel.ops.clear()
    code, text = pynet("status")
    assert code == 1
    assert "pynet   NOT well" in text
    assert "- the kernel differs from the plans: " in text
    code, text = pynet("status", "--json")
    assert (code, json.loads(text)["well"]) == (1, False)


def test_network_ls(host):
    """Networks are a table with short ids, a pool a line."""
    assert host
    code, text = pynet("network", "ls")
    lines = [line.split() for line in text.splitlines()]
    assert code == 0
    assert lines[0] == ["NETWORK", "ID", "MODE", "SUBNETS", "BRIDGE", "ENDPOINTS"]
    assert lines[1][:4] == ["blue", "b" * 12, "bridge", "10.1.0.0/24"]
    assert lines[2] == ["fd00:1::/64"]
    assert lines[3] == ["green", "9" * 12, "bridge", "10.2.0.0/24", "green0", "2"]


def test_network_inspect(host):
    """One network is told in pairs, with its endpoints."""
    assert host
    code, text = pynet("network", "inspect", "green")
    assert code == 0
    assert "options        pynet.bridge=green0\n               pynet.icc=false" in text
    assert "subnets        10.2.0.0/24, gateway 10.2.0.1" in text
    assert "batch" in text


def test_endpoint_ls(host):
    """Endpoints are told with address, device and whether they joined."""
    assert host
    _, text = pynet("endpoint", "ls")
    rows = [line.split() for line in text.splitlines()]
    assert ["batch", "e3" * 6, "green", "10.2.0.2/24", "pe-3f61bcc776", "no"] in rows


def test_endpoint_rm(host):
    """A removed endpoint is gone from the list; a name for two is refused."""
    assert pynet("endpoint", "rm", "db") == (0, f"removed db ({'e2' * 6})\n")
    assert scene.DB not in pynet("endpoint", "ls", "--json")[1]
    code, text = pynet("endpoint", "rm", "web")
    assert code == 1
    assert text == (
        "Error: 'web' can be 2 endpoints: say which of e1e1e1e1e1e1, e4e4e4e4e4e4\n"
    )
    assert host.site.endpoints(host.site.member(scene.GREEN).network)


def test_port_ls(host):
    """Ports are told with every address they lead to."""
    assert host
    _, text = pynet("port", "ls")
    rows = [line.split() for line in text.splitlines()]
    assert rows[1:] == [
        ["127.0.0.1", "5353/udp", "10.1.0.2:53", "web", "blue"],
        ["*", "8080/tcp", "10.1.0.2:80", "web", "blue"],
        ["[fd00:1::2]:80"],
    ]


def test_ipam_ls(host):
    """Pools come first, then every address with its owner."""
    assert host
    _, text = pynet("ipam", "ls")
    rows = [line.split() for line in text.splitlines()]
    assert rows[1] == ["10.1.0.0/24", "local", "blue", "3", "254"]
    owned = ["10.1.0.2", "10.1.0.0/24", "web", "e1" * 6, "bound", "this"]
    assert owned in rows


def test_ipam_release(host):
    """An address in use stays, one of a removed endpoint is given back."""
    assert host
    code, text = pynet("ipam", "release", "10.1.0.0/24", "10.1.0.3")
    assert code == 1
    assert text == (
        "Error: address 10.1.0.3 is used by endpoint db; remove that with "
        "pynet endpoint rm e2e2e2e2e2e2\n"
    )
    pynet("endpoint", "rm", "db")
    assert pynet("ipam", "release", "10.1.0.0/24", "10.1.0.3") == (
        0,
        "released 10.1.0.3 of local/10.1.0.0/24\n",
    )


def test_explain(host):
    """The text is printed as it is, for all networks or one."""
    assert host
    code, text = pynet("explain", "green")
    assert code == 0
    assert text.startswith("# What pynet holds on host h1")
    assert "network blue" not in text
    assert "network blue" in pynet("explain")[1]
    assert pynet("explain", "red")[0] == 1


def test_diff(host):
    """A difference is printed a line each and exits with 1, none with 0."""
    assert pynet("diff") == (0, "")
    key = next(key for key in host.kernel.ops if key[0] == "hold")
    del host.kernel.ops[key]
    assert pynet("diff") == (1, "+ hold tcp * 8080\n")
    code, text = pynet("diff", "--json")
    assert (code, json.loads(text)["lines"]) == (1, ["+ hold tcp * 8080"])


def test_census(host):
    """Every object of ours is a line."""
    _, text = pynet("census")
    assert "bridge   green0 mac=02:42:0a:02:00:01 mtu=1500\n" in text
    assert "element  inet pynet any4 tcp 8080 value=10.1.0.2:80\n" in text
    owned = json.loads(pynet("census", "--json")[1])["owned"]
    assert len(text.splitlines()) == len(owned) + 1
    assert host


def test_census_of_nothing(bare):
    """A host without anything of ours says so."""
    assert bare
    assert pynet("census") == (0, "pynet owns nothing on this host\n")


@pytest.mark.parametrize(
    "words",
    [
        ("network", "ls"),
        ("network", "inspect", "blue"),
        ("endpoint", "ls"),
        ("port", "ls"),
        ("ipam", "ls"),
        ("explain",),
    ],
)
def test_json(host, words):
    """Every command prints JSON on request, whole ids in it."""
    assert host
    code, text = pynet(*words, "--json")
    assert code == 0
    assert json.loads(text)


@pytest.mark.parametrize("words", [("network",), ("endpoint",), ("port",), ("ipam",)])
def test_tables_of_nothing(bare, words):
    """With nothing to list, a table is its head."""
    assert bare
    code, text = pynet(*words, "ls")
    assert (code, len(text.splitlines())) == (0, 1)


def test_admin_option(host, tmp_path, monkeypatch):
    """`--admin` wins over the variable."""
    assert host
    monkeypatch.setenv("PYNET_ADMIN", "/nonexistent")
    assert pynet("diff", "--admin", str(tmp_path / "admin.sock"))[0] == 0


def test_lines_fit_a_terminal(host):
    """No table needs more than 80 columns for a usual host, nor ends in blanks."""
    assert host
    for words in (
        ("network", "ls"),
        ("endpoint", "ls"),
        ("port", "ls"),
        ("ipam", "ls"),
    ):
        for line in pynet(*words)[1].splitlines():
            assert len(line) <= 80
            assert line == line.rstrip()


def test_long_names_stay_whole_in_a_pipe(host):
    """What is piped is neither cut nor folded, so that grep finds it."""
    host.site.names[scene.BLUE] = "n" * 120
    assert "n" * 120 + "  " in pynet("network", "ls")[1]


def test_names_cannot_move_the_cursor(host):
    """Escape sequences and markup in a name are shown, not obeyed."""
    host.site.names[scene.BLUE] = "\x1b[2J[red]x"
    text = pynet("network", "ls")[1]
    assert "?[2J[red]x" in text
    assert "\x1b" not in text


def test_not_running(tmp_path):
    """Without a daemon one line says so, and how to start it."""
    path = tmp_path / "admin.sock"
    code, text = pynet("status", "--admin", str(path))
    assert code == 1
    assert text == (
        f"Error: pynet is not running (no answer at {path}): start it with systemctl "
        "start pynet or pynet serve, or name its admin socket with --admin\n"
    )


def test_a_daemon_of_another_version(host, monkeypatch):
    """A daemon that has no such call is said to be of another version."""
    monkeypatch.setattr(
        client_module.Client, "get", lambda self, *parts: self.ask("GET", ("x",), {})
    )
    code, text = pynet("census")
    assert code == 1
    assert "is of another version than this command" in text
    assert "systemctl restart pynet" in text


@pytest.mark.parametrize("path", PAGES)
def test_help_is_a_page_of_the_manual(path):
    """The help of a command has examples that it understands, and exit codes."""
    code, text = pynet(*path.split(), "--help")
    assert code == 0
    assert "Examples:\n  pynet " in text or "Examples:\n    pynet " in text
    assert "Exit codes: 0 " in text
    for line in PAGES[path].examples:
        assert f" {line}\n" in text
        for word in re.findall(r"--[a-z-]+", line.partition("|")[0]):
            assert f"{word}" in text.replace(line, "")


def test_stale_socket(tmp_path):
    """A socket nobody listens on is no daemon either."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "s"))
    code, text = pynet("diff", "--admin", str(tmp_path / "s"))
    assert code == 1
    assert "pynet is not running" in text


@contextmanager
def stranger(path, answer):
    """Listen on a socket, answer one connection with these bytes, or never."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        over = threading.Event()

        def serve():
            with listening.accept()[0] as connection:
                connection.recv(4096)
                if answer is None:
                    over.wait(10)
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(10)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"", "is not pynet, or it just stopped"),
        (b"SSH-2.0-x\r\n", "is not pynet, or it just stopped"),
        (b"HTTP/1.1 500 x\r\nContent-Length: 2\r\n\r\nhm", "answered with HTTP 500"),
        (b"HTTP/1.1 200 x\r\nContent-Length: 2\r\n\r\nhm", "answered with HTTP 200"),
    ],
)
def test_answer_of_a_stranger(tmp_path, answer, text):
    """An answer that is none of pynet's is told in one line."""
    with stranger(tmp_path / "s", answer):
        code, said = pynet("status", "--admin", str(tmp_path / "s"))
    assert code == 1
    assert text in said
    assert len(said.splitlines()) == 1


def test_silent_daemon(tmp_path, monkeypatch):
    """A daemon that does not answer is waited for no longer than the limit."""
    monkeypatch.setattr(client_module, "LIMIT", 0.2)
    with stranger(tmp_path / "s", None):
        code, said = pynet("status", "--admin", str(tmp_path / "s"))
    assert code == 1
    assert "pynet did not answer within 0.2 s" in said


def run(*words, **variables):
    """Run the program in a process of its own."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **variables},
    )


def test_help_lists_every_command():
    """The help names all commands and imports none of them."""
    code, text = pynet("--help")
    assert code == 0
    for name in COMMANDS:
        assert f"  {name} " in text
    probe = "import sys; from cnmdriver.cli.main import main; "
    probe += "main(['--help'], standalone_mode=False); "
    probe += "print([m for m in sys.modules if m.split('.')[0] in ('rich', 'aiohttp')])"
    assert run("-c", probe).stdout.endswith("[]\n")


def test_serve_imports_no_tools():
    """The daemon's command needs neither tables nor the lab."""
    probe = "import sys, cnmdriver.cli.main as m; m.main.get_command(None, 'serve'); "
    probe += "print([m for m in sys.modules if 'rich' in m or 'cnmdriver.lab' in m])"
    assert run("-c", probe).stdout == "[]\n"


def test_every_command_has_help():
    """Each command can be imported and says what it does."""
    for name in COMMANDS:
        code, text = pynet(name, "--help")
        assert (code, text.startswith("Usage: pynet")) == (0, True)


def test_version():
    """The version is that of the distribution, in one line."""
    code, text = pynet("--version")
    assert code == 0
    assert text.startswith("pynet ")


def test_unknown_command():
    """A word that is no command is refused with 2."""
    assert pynet("frobnicate")[0] == 2


def test_module_is_the_program():
    """`python -m cnmdriver` is `pynet`."""
    assert run("-m", "cnmdriver", "--help").stdout.startswith("Usage: pynet ")


@pytest.mark.parametrize(
    ("words", "variables", "text"),
    [
        (("--grace", "soon"), {}, "--grace: grace must be seconds above 0, not 'soon'"),
        ((), {"PYNET_SCOPE": "all"}, "PYNET_SCOPE: scope must be one of local, global"),
        (("--config", "/nonexistent"), {}, "settings file /nonexistent does not exist"),
    ],
)
def test_serve_with_a_bad_setting(words, variables, text):
    """A bad setting is one line that names its source, and exit code 2."""
    done = run("-m", "cnmdriver", "serve", *words, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pynet: {text}\n"


def test_serve_help_has_every_setting():
    """Each setting is an option, with its default."""
    _, text = pynet("serve", "--help")
    for option in ("--socket", "--state-dir", "--log-level", "--config"):
        assert f"  {option} " in text
    assert "[local|global]" in text
    assert "[default: 60]" in " ".join(text.split())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (0.4, "0 s"),
        (59, "59 s"),
        (3600, "1 h"),
        (90061, "1 d 1 h"),
    ],
)
def test_duration(seconds, text):
    """A time is told in its two largest units."""
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(254, "254"), (2**64 - 1, "2^64")])
def test_amount(number, text):
    """The size of an IPv6 pool is told as a power of two."""
    assert amount(number) == text


def test_clean():
    """Line breaks make lines of a cell; other control characters are replaced."""
    assert table.clean("a\nb\rc\x07") == "a\nb?c?"
