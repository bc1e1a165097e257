"""The archive for a bug report: what is in it, what is not, and for whom it is."""

import asyncio
import json
import stat
import tarfile
from dataclasses import asdict

import pytest
import structlog

from cnmdriver import daemon, logs
from cnmdriver.cli import report as module
from cnmdriver.redaction import scrubbed
from cnmdriver.settings import Settings
from tests import scene
from tests.unit.test_cli import pynet, served

PASSWORD = "correct-horse-battery"
TOKEN = "eyJhbGciOi.J9x"
KEY = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIIr\n-----END EC PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("etcds://root:hunter22@192.0.2.1:2379", "etcds://192.0.2.1:2379"),
        ('"password": "hunter22"', '"password": "(removed)"'),
        ("store_password=hunter22 x", "store_password=(removed) x"),
        ("PYNET_TOKEN='hunter22'", "PYNET_TOKEN='(removed)'"),
        ("Authorization: Bearer hunter22", "Authorization: (removed)"),
        (f"a {KEY} b", "a (removed) b"),
        (f"a {KEY[:50]}", "a (removed)"),
        ("the password is wrong", "the password is wrong"),
        ("ip link set eth0 up", "ip link set eth0 up"),
    ],
)
def test_what_looks_like_a_secret(text, left):
    """What is called a secret, or is a key, is taken out; other words stay."""
    assert scrubbed(text) == left


def test_known_secrets():
    """A secret that is known is taken out wherever it stands, unless it is a word."""
    assert scrubbed("x hunter22 y", ("hunter22",)) == "x (removed) y"
    assert scrubbed("a b c", ("b",)) == "a b c"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Serve a host in whose settings, options, names and log secrets are planted."""
    journal = logs.Journal()
    (tmp_path / "password").write_text(PASSWORD + "\n")
    (tmp_path / "key.pem").write_text(KEY)
    settings = Settings(
        store=f"etcds://root:{PASSWORD}@192.0.2.1:2379",
        store_password_file=str(tmp_path / "password"),
        store_key=str(tmp_path / "key.pem"),
        log_format="json",
    )
    kept = structlog.get_config()
    daemon.configure_logs(settings, journal)
    structlog.get_logger().info("store.away", error=f"login {PASSWORD} failed")
    structlog.get_logger().info("x", url=f"http://u:{TOKEN}@h/", key=KEY)
    structlog.get_logger().debug("too quiet")
    structlog.configure(**kept)

    async def prepare(made):
        await scene.populate(made)
        made.site.names[scene.WEB] = "a\x1b[2Jb"

    known = {"settings": asdict(settings)}
    with served(tmp_path, prepare, known, journal) as (made, path):
        monkeypatch.setenv("PYNET_ADMIN", str(path))
        yield made


def content(path):
    """Return the files of an archive."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        files = {m.name.partition("/")[2]: tar.extractfile(m).read() for m in members}
    assert {m.mode for m in members} == {0o600}
    return {name: data.decode() for name, data in files.items()}


def test_an_archive(planted, tmp_path):
    """All there is to know is in it, none of the secrets is, and it is the owner's."""
    path = tmp_path / "r.tar.gz"
    code, text = pynet("report", str(path))
    assert (code, text.split(",")[0]) == (0, f"wrote {path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files = content(path)
    wanted = {f"{name}.json" for name in module.ASKED}
    assert {"README", "versions.json", *wanted} <= set(files)
    everything = "\n".join(files.values())
    for secret in (PASSWORD, TOKEN, "MHcCAQEEIIr", "root:"):
        assert secret not in everything
    assert "192.0.2.1:2379" in files["settings.json"]
    lines = [json.loads(line) for line in json.loads(files["log.json"])["lines"]]
    assert [line["event"] for line in lines] == ["store.away", "x"]
    assert "(removed)" in lines[0]["error"]
    assert "ip link add" in files["explain.json"]
    for name in ("status", "diff", "census", "doctor", "networks"):
        assert "error" not in json.loads(files[f"{name}.json"])


def test_a_file_is_not_written_over(planted, tmp_path):
    """What is there stays, and the reason is one line."""
    path = tmp_path / "r.tar.gz"
    path.write_text("mine")
    code, text = pynet("report", str(path))
    assert code == 1
    assert text == f"Error: {path} is there already: name another file, or remove it\n"
    assert path.read_text() == "mine"


def test_a_place_that_cannot_be_written(planted, tmp_path):
    """A directory that is not there is an error in one line."""
    code, text = pynet("report", str(tmp_path / "none" / "r.tar.gz"))
    assert code == 1
    assert text.startswith("Error: cannot write ")


def test_a_name_of_its_own(planted, tmp_path, monkeypatch):
    """Without a name it has one with the host and the time, and JSON tells it."""
    monkeypatch.chdir(tmp_path)
    code, text = pynet("report", "--json")
    found = json.loads(text)
    assert code == 0
    assert found["file"].startswith("pynet-report-")
    assert (tmp_path / found["file"]).exists()
    assert "log.json" in found["content"]


def test_without_a_daemon(tmp_path):
    """Without a daemon there is what the machine itself tells, and that it is so."""
    path = tmp_path / "r.tar.gz"
    code, _ = pynet("report", "--admin", str(tmp_path / "none"), str(path))
    files = content(path)
    assert code == 0
    assert "pynet is not running" in files["daemon.txt"]
    assert json.loads(files["doctor.json"])["code"] == 2
    assert "python" in json.loads(files["versions.json"])


def test_doctor_without_a_daemon(tmp_path):
    """Without a daemon a doctor says so, how to start it, and looks at the machine."""
    code, text = pynet("doctor", "--admin", str(tmp_path / "none"))
    assert code == 2
    assert "pynet does not run here" in text
    assert "systemctl start pynet" in text
    assert "kernel" in text


def test_doctor(planted):
    """Findings are printed with what mends them; the exit code is the worst one's."""
    code, text = pynet("doctor")
    found = json.loads(pynet("doctor", "--json")[1])
    assert code == found["code"]
    for line in text.splitlines():
        assert line.isprintable()
    assert "ok leftovers" in text


def test_trace(planted):
    """A trace is printed in lines of 80 columns, but for what one copies."""
    code, text = pynet("trace", "10.1.0.2", "10.1.0.3")
    assert code == 0
    assert all(
        len(line) <= 80 and line.isprintable()
        for line in text.splitlines()
        if not line.startswith("remedy on h1: ")
    )
    assert "!! h1  interface" in text
    code, text = pynet("trace", "10.1.0.2", "10.1.0.3", "--json")
    assert json.loads(text)["reachable"] is True


def test_a_trace_that_is_refused(planted):
    """What cannot be traced is one line, and exit code 1."""
    code, text = pynet("trace", "nobody", "db")
    assert code == 1
    assert text.startswith("Error: no endpoint is called 'nobody'")
    assert len(text.splitlines()) == 1


def test_the_last_lines_are_kept():
    """Only the last lines are kept, a long one cut; odd values do no harm."""
    journal = logs.Journal()
    for number in range(logs.LATEST + 5):
        journal(None, "info", {"event": "x", "n": number})
    assert json.loads(journal.text()[0])["n"] == 5
    event = {"event": "y" * 9000, "odd": asyncio, "exc_info": True}
    assert journal(None, "info", event) is event
    assert len(journal.text()[-1]) == logs.LONGEST_LINE
