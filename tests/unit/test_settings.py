"""Settings: where they come from, which wins, and what is refused."""

import dataclasses
import socket
from pathlib import Path

import pytest

from cnmdriver import settings
from cnmdriver.errors import InvalidParameter
from cnmdriver.settings import Settings

NAMES = (
    "socket, driver, state_dir, run_dir, store, store_prefix, store_ca, store_cert, "
    "store_key, store_user, store_password_file, host_name, vtep, vxlan_port, "
    "namespace, docker, scope, default_pools, grace, audit, repair, dead_after, "
    "socket_group, listen, log_format, log_level"
)


@pytest.fixture(autouse=True)
def no_file(tmp_path, monkeypatch):
    """Look for the usual file where there is none."""
    monkeypatch.setattr(settings, "FILE", tmp_path / "usual.toml")
    return settings.FILE


def written(tmp_path, text):
    """Write a settings file."""
    path = tmp_path / "given.toml"
    path.write_text(text)
    return path


def test_defaults():
    """Nobody says anything: one host, served out of the box."""
    assert settings.load({}, {}) == Settings(
        socket="/run/docker/plugins/pynet.sock",
        state_dir="/var/lib/pynet",
        run_dir="/run/pynet",
        store="",
        host_name="",
        docker="unix:///run/docker.sock",
        scope="local",
        default_pools="10.200.0.0/16/24,fd70:796e:6574::/48/64",
        grace=60.0,
        audit=30.0,
        log_format="auto",
        log_level="info",
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", None),
        ("unix:///run/pynet/m.sock", Path("/run/pynet/m.sock")),
        ("127.0.0.1:9000", ("127.0.0.1", 9000)),
        ("127.8.0.1:1", ("127.8.0.1", 1)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_where_to_listen(text, place):
    """Metrics and page are served on a Unix socket or a port of loopback."""
    assert settings.load({"listen": text}, {}).listen == text
    assert settings.listener("x", text) == place


@pytest.mark.parametrize(
    "text",
    ["0.0.0.0:9000", "[::]:9000", "192.0.2.1:80", ":9000", "9000", "localhost:9000"]
    + ["::1:9000", "[127.0.0.1]:9000", "unix://m.sock", "/run/m.sock", "http://[::1]:9"]
    + ["127.0.0.1", "[::ffff:127.0.0.1]:9000", "127.0.0.1:0", "127.0.0.1:65536"],
)
def test_where_not_to_listen(text):
    """Where others could reach it, or nobody, nothing is served: that is an error."""
    with pytest.raises(InvalidParameter, match=r"^PYNET_LISTEN: .* must be "):
        settings.load({}, {"PYNET_LISTEN": text})


def test_store_url():
    """The store is a file in the state directory, unless it is named."""
    assert Settings().store_url == "sqlite:///var/lib/pynet/store.db"
    assert Settings(state_dir="/s").store_url == "sqlite:///s/store.db"
    assert Settings(store="sqlite:///x").store_url == "sqlite:///x"


def test_name():
    """The host's name is the machine's own, unless it is given."""
    assert Settings().name == socket.gethostname()
    assert Settings(host_name="h1").name == "h1"


def test_precedence(tmp_path):
    """The command line wins over the environment, that over the file."""
    path = written(
        tmp_path, 'state_dir = "/file"\nrun_dir = "/file"\nhost_name = "file"\n'
    )
    environment = {"PYNET_RUN_DIR": "/env", "PYNET_HOST_NAME": "env", "HOME": "/root"}
    found = settings.load({"host_name": "argv", "store": None}, environment, path)
    assert (found.state_dir, found.run_dir, found.host_name) == (
        "/file",
        "/env",
        "argv",
    )
    assert found.store == ""


def test_empty_is_said():
    """An empty text is a value: it turns Docker's door off."""
    assert settings.load({"docker": ""}, {"PYNET_DOCKER": "unix:///x"}).docker == ""
    assert settings.load({}, {"PYNET_DOCKER": ""}).docker == ""


def test_usual_file(no_file):
    """The usual file is read where there is one."""
    no_file.write_text('scope = "global"\ngrace = 5\n')
    found = settings.load({}, {})
    assert (found.scope, found.grace) == ("global", 5.0)


def test_given_file_is_read_instead(tmp_path, no_file):
    """A named file takes the place of the usual one."""
    no_file.write_text('scope = "global"\nhost_name = "usual"\n')
    found = settings.load({}, {}, written(tmp_path, 'host_name = "given"\n'))
    assert (found.scope, found.host_name) == ("local", "given")


def refused(given=(), environment=(), file=None):
    """Return the text of the refusal."""
    with pytest.raises(InvalidParameter) as error:
        settings.load(dict(given), dict(environment), file)
    return str(error.value)


def test_file_must_be_there(tmp_path):
    """A file that was named must be there."""
    path = tmp_path / "none.toml"
    assert refused(file=path) == f"settings file {path} does not exist"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"scope = ", "Invalid value"),
        (b"\xff\xfe", "codec can't decode"),
        (b"scope", "Expected '='"),
    ],
)
def test_file_must_be_toml(tmp_path, content, why):
    """A file that cannot be read is named, with what is wrong in it."""
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    text = refused(file=path)
    assert text.startswith(f"settings file {path}: ")
    assert why in text


def test_file_must_be_a_file(tmp_path, no_file):
    """A directory is no file, also in the usual place."""
    assert refused(file=tmp_path).startswith(f"settings file {tmp_path}: ")
    no_file.mkdir()
    assert refused().startswith(f"settings file {no_file}: ")


def test_sources_are_named(tmp_path):
    """A refusal says where the bad value came from."""
    path = written(tmp_path, 'scope = "swarm"\n')
    why = "scope must be one of local, global"
    assert refused(file=path) == f"{path}: {why}"
    assert refused(environment={"PYNET_SCOPE": "x"}) == f"PYNET_SCOPE: {why}"
    assert refused({"scope": "x"}) == f"--scope: {why}"
    assert refused({"log_level": "x"}) == (
        "--log-level: log_level must be one of debug, info, warning"
    )
    assert refused({"log_format": ""}) == (
        "--log-format: log_format must be one of auto, console, json"
    )


def test_a_bad_value_is_refused_though_another_wins(tmp_path):
    """What is wrong in the file is told, whatever the command line says."""
    path = written(tmp_path, "grace = -1\n")
    assert refused({"grace": 5.0}, file=path).startswith(f"{path}: grace ")


def test_unknown_setting(tmp_path, no_file):
    """A misspelt setting is refused with all there are; the environment has others."""
    path = written(tmp_path, 'hostname = "h"\n')
    assert refused(file=path) == (
        f"{path}: no setting is called 'hostname'; known are {NAMES}"
    )
    assert refused({"host": "x"}) == (
        f"--host: no setting is called 'host'; known are {NAMES}"
    )
    assert settings.load({}, {"PYNET_HOSTNAME": "h", "pynet_scope": "x"}) == Settings()


@pytest.mark.parametrize("text", ["store = 5", "store = []", "[store]\nurl = 'x'"])
def test_text_must_be_text(tmp_path, text):
    """What should be text and is another type of TOML is refused."""
    path = written(tmp_path, text)
    assert refused(file=path).startswith(f"{path}: store must be text, not ")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("5", 5.0), (" 0.5 ", 0.5), (5, 5.0), (0.001, 0.001), ("1e3", 1000.0)],
)
def test_seconds(value, seconds):
    """Seconds are a number above 0, or its text."""
    assert settings.load({"grace": value}, {}).grace == seconds
    assert settings.check("s", "audit", value) == seconds


@pytest.mark.parametrize(
    "value",
    ["", "0", 0, -1, "-0.1", "nan", "inf", "-inf", float("inf"), "5s", [], {}, "x"]
    + [True],
)
def test_bad_seconds(value):
    """Whatever is no time to wait is refused with what it was."""
    assert refused({"grace": value}) == (
        f"--grace: grace must be seconds above 0, not {value!r}"
    )


@pytest.mark.parametrize("value", ["1", 4789, "65535"])
def test_port(value):
    """A port is a number, or its text."""
    assert settings.load({"vxlan_port": value}, {}).vxlan_port == int(value)


@pytest.mark.parametrize(
    "value", ["", "0", 0, -1, 65536, "9" * 99, "x", True, "٣", 1.5]
)
def test_bad_port(value):
    """Whatever is no port is refused with what it was."""
    assert refused({"vxlan_port": value}) == (
        f"--vxlan-port: vxlan_port must be a port from 1 to 65535, not {value!r}"
    )


@pytest.mark.parametrize(
    ("value", "said"), [("true", True), ("False", False), (True, True), (False, False)]
)
def test_truth(value, said):
    """A truth value is TOML's, or its word."""
    assert settings.load({"repair": value}, {}).repair is said


@pytest.mark.parametrize("value", ["", "yes", "0", 0, 1, [], "truee"])
def test_bad_truth(value):
    """Whatever is neither true nor false is refused with what it was."""
    assert refused({"repair": value}) == (
        f"--repair: repair must be true or false, not {value!r}"
    )


def test_every_setting_has_help():
    """Each setting says what it is, and its default is one of its choices."""
    assert ", ".join(settings.FIELDS) == NAMES
    for found in dataclasses.fields(Settings):
        assert found.metadata["help"]
        choices = found.metadata["choices"]
        assert not choices or found.default in choices


def test_every_setting_comes_from_everywhere(tmp_path):
    """A setting's value may come from each of the three sources."""
    for name, found in settings.FIELDS.items():
        text = {float: "7.5", int: "7", bool: "false"}.get(type(found.default), "x")
        text = found.metadata["choices"][-1] if found.metadata["choices"] else text
        text = "unix:///x" if name == "listen" else text
        given = settings.load({name: text}, {})
        assert given != Settings()
        assert settings.load({}, {f"PYNET_{name.upper()}": text}) == given
        assert settings.load({}, {}, written(tmp_path, f'{name} = "{text}"')) == given


def test_the_drivers_name():
    """The driver is called as its socket is, if nothing else is said."""
    assert Settings().driver_name == "pynet"
    assert Settings(socket="/run/docker/plugins/other.sock").driver_name == "other"
    assert Settings(driver="pynet:latest").driver_name == "pynet:latest"
