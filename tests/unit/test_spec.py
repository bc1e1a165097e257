"""What `plugin-spec/` says follows from the code, and is what Docker needs."""

import json
import subprocess
import sys
from pathlib import Path

from cnmdriver.admin.app import CALLS
from cnmdriver.admin.shapes import SHAPES
from cnmdriver.api.app import METHODS
from cnmdriver.settings import FIELDS, load

SPEC = Path(__file__).parents[2] / "plugin-spec"


def read(name):
    """Return a file of plugin-spec/ as JSON."""
    return json.loads((SPEC / name).read_text())


def test_it_is_fresh():
    """What is there is what `make spec` writes."""
    argv = [sys.executable, str(SPEC / "generate.py"), "--check"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_method_and_every_call_is_described():
    """Each has a path, and shapes are of calls that there are."""
    paths = read("docker.openapi.json")["paths"]
    assert {path.removeprefix("/") for path in paths} == METHODS.keys()
    paths = read("admin.openapi.json")["paths"]
    found = {
        (verb.upper(), path.removeprefix("/v1/"))
        for path, calls in paths.items()
        for verb in calls
    }
    assert found == CALLS.keys()
    assert SHAPES.keys() <= CALLS.keys()


def test_patterns_are_those_of_json_schema():
    """JSON Schema has no other anchors than ^ and $ (ECMA 262)."""
    for name in ("docker.openapi.json", "admin.openapi.json"):
        text = (SPEC / name).read_text()
        assert r"\\A" not in text
        assert r"\\Z" not in text


def test_the_plugins_settings():
    """Each setting that a plugin has can be set; as they are they are the defaults."""
    variables = read("config.json")["env"]
    settable = {v["name"] for v in variables if v["settable"]}
    left = {"socket", "state_dir", "run_dir", "socket_group"}
    assert settable == {f"PYNET_{name.upper()}" for name in FIELDS.keys() - left}
    environment = {v["name"]: v["value"] for v in variables if v["settable"]}
    assert load({}, environment) == load({"driver": "pynet:latest"}, {})


def test_discovery_files_name_one_socket():
    """Both forms of legacy discovery lead to where the daemon listens."""
    spec = (SPEC / "pynet.spec").read_text().strip()
    assert spec == "unix://" + FIELDS["socket"].default
    found = read("pynet.json")
    assert found == {"Name": "pynet", "Addr": spec}
