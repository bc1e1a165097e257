"""The README tells of every event of the log and every setting, and of no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import cnmdriver
from cnmdriver.cli.main import COMMANDS
from cnmdriver.settings import FIELDS

PACKAGE = Path(str(cnmdriver.__file__)).parent
README = PACKAGE.parent / "README.md"
LEVELS = {"info", "warning", "error", "exception", "critical"}


def events() -> dict[str, Path]:
    """Return the events that the daemon logs, but for debugging."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if PACKAGE / "lab" not in path.parents:
            found.update(dict.fromkeys(logged(ast.parse(path.read_text())), path))
    return found


def logged(tree: ast.Module) -> Iterator[str]:
    """Yield the events of a module; constants by their values."""
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="log"), attr=level),
                args=[event, *_],
            ) if level in LEVELS:
                name = event.id if isinstance(event, ast.Name) else None
                value = constants[name] if name else ast.literal_eval(event)
                assert re.fullmatch(r"[a-z]+\.[a-z_]+", value), value
                yield value


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table whose head begins with some words."""
    _, _, rest = README.read_text().partition(f"\n| {heading}")
    assert rest, heading
    lines = rest.splitlines()[2:]
    end = next(n for n, line in enumerate(lines) if not line.startswith("|"))
    return [re.split(r" \| ", line.strip("| ")) for line in lines[:end]]


def test_every_event_is_explained():
    """Each event has one row that says what it means and what to do."""
    told = [
        name
        for event, meaning, remedy in rows("event | meaning")
        for name in re.findall(r"`([a-z]+\.[a-z_]+)`", event)
        if meaning and remedy
    ]
    assert sorted(told) == sorted(set(told))
    used = events()
    assert len(used) > 40
    assert {e: str(p) for e, p in used.items() if e not in told} == {}
    assert [name for name in told if name not in used] == []


def test_every_setting_is_there():
    """Each setting has a row with its flag, its variable and its default."""
    text = "".join(" | ".join(row) + "\n" for row in rows("flag | variable"))
    for name in FIELDS:
        assert f"`--{name.replace('_', '-')}`" in text
        assert f"`PYNET_{name.upper()}`" in text


def test_every_command_is_there():
    """Each command but `serve`, which the settings are of, has a row."""
    text = "".join(row[0] + "\n" for row in rows("command | shows"))
    for name in COMMANDS.keys() - {"serve"}:
        assert re.search(rf"`(pynet )?{name}\b", text), name
