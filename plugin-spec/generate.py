"""
Write what follows from the code: the two OpenAPI descriptions, the plugin's config.

    .venv/bin/python plugin-spec/generate.py            # or `make spec`
    .venv/bin/python plugin-spec/generate.py --check    # exit code 1 if one is stale
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from cnmdriver.admin.app import CALLS, STATUSES
from cnmdriver.admin.shapes import SHAPES, Refusal, Shape
from cnmdriver.api import app, wire
from cnmdriver.settings import FIELDS

HERE = Path(__file__).parent
Json = dict[str, Any]

VERSION = "3.1.0"
DIALECT = "https://spec.openapis.org/oas/3.1/dialect/base"
TITLE = "pynet: "
ANYTHING = {"description": "Any JSON."}
NAMED = "#/components/schemas/{name}"
NO_BUG = "^(?!internal error)"
"""A refusal says what the caller can do; another text would be a bug."""

DRIVERS = """\
What Docker asks of pynet's network driver and IPAM driver, on the plugin socket.

400 is a request that cannot be read or asks for what cannot be; 500 is an operation
that is refused in this state: a conflict, something unknown, exhausted or away. Docker
shows users nothing but the text.
"""
ADMIN = """\
What `pynet`'s commands ask of the daemon, on RUN_DIR/admin.sock, for root alone.
"""
SAID = {
    400: "The request cannot be read, or asks for what cannot be.",
    404: "There is no such thing here.",
    405: "The path has no such method.",
    409: "It clashes with what there is, or nothing is left.",
    500: "Refused in this state: a conflict, or something unknown, exhausted or away.",
    503: "The store is away.",
}

RIGHTS = ("net_admin", "net_raw", "net_bind_service", "sys_admin")
WRITABLE = "mount -o remount,bind,rw /proc/sys"
SERVE = "/opt/pynet/bin/pynet serve 2>&1"
FIXED = {"run_dir": "/host/run/pynet"}
"""Settings that the plugin's mounts decide."""
NAMED_SO = {"driver": "pynet:latest"}
"""What `build` replaces by the plugin's name."""
UNUSED = ("socket", "state_dir", "socket_group")
"""Settings that mean nothing in a plugin: Docker decides them."""


def main(words: list[str]) -> int:
    """Write the files, or with `--check` look whether they are as they would be."""
    stale = [
        path for path, text in files() if not path.exists() or path.read_text() != text
    ]
    if words == ["--check"]:
        for path in stale:
            print(f"{path.name} is stale: make spec", file=sys.stderr)
        return 1 if stale else 0
    for path, text in files():
        path.write_text(text)
    return 0


def files() -> Iterator[tuple[Path, str]]:
    """Yield each file with its text."""
    for name, made in (
        ("docker.openapi.json", docker()),
        ("admin.openapi.json", admin()),
        ("config.json", config()),
    ):
        yield HERE / name, json.dumps(made, indent=2, ensure_ascii=False) + "\n"


# The two APIs.


def docker() -> Json:
    """Describe what Docker calls."""
    kinds = [*(kind for m in app.METHODS.values() for kind in both(m)), wire.Refusal]
    schemas, components = described(kinds)
    refusal = {**components["Refusal"]}
    refusal["properties"] = {
        name: {**field, "pattern": NO_BUG}
        for name, field in refusal["properties"].items()
    }
    components["Refusal"] = refusal
    paths = {
        f"/{name}": {"post": method(name, row, schemas)}
        for name, row in app.METHODS.items()
    }
    return document("Docker's API", DRIVERS, paths, components)


def both(row: app.Method[Any]) -> tuple[Any, Any]:
    """Return the types of a method's request and of its answer."""
    return row.request, get_type_hints(row.answer)["return"]


def method(name: str, row: app.Method[Any], schemas: Mapping[Any, Json]) -> Json:
    """Describe one method."""
    request, answer = both(row)
    refused = content(schemas[wire.Refusal], app.MEDIA_TYPE)
    made: Json = {
        "operationId": name,
        "tags": [name.partition(".")[0]],
        "summary": doc(request).partition(";")[0].rstrip("."),
        "responses": {
            "200": {
                "description": doc(answer),
                **content(schemas[answer], app.MEDIA_TYPE),
            },
            "400": {"description": SAID[400], **refused},
            "500": {"description": SAID[500], **refused},
        },
    }
    if request is not wire.NoArguments:
        # Docker names no type, and none is asked for.
        made["requestBody"] = {"required": True, **content(schemas[request])}
    return made


def admin() -> Json:
    """Describe what the commands call."""
    plain = Shape(answer=Any, query={})
    shapes = {call: SHAPES.get(call, plain) for call in CALLS}
    schemas, components = described([*(s.answer for s in shapes.values()), Refusal])
    paths: Json = {}
    for (verb, path), shape in shapes.items():
        entry = paths.setdefault(f"/v1/{path}", {})
        entry[verb.lower()] = call(verb, path, shape, schemas)
    return document("the commands' API", ADMIN, paths, components)


def call(verb: str, path: str, shape: Shape, schemas: Mapping[Any, Json]) -> Json:
    """Describe one call."""
    names = re.findall(r"{(\w+)}", path)
    refused = content(schemas[Refusal])
    codes = sorted({*STATUSES.values(), 500})
    return {
        "operationId": f"{verb.lower()} {path}",
        "parameters": [
            *(parameter(n, "path", f"name or id of a {n}", must=True) for n in names),
            *(
                parameter(n, "query", meaning, must=shape.must)
                for n, meaning in shape.query.items()
            ),
        ],
        "responses": {
            "200": {"description": doc(shape.answer), **content(schemas[shape.answer])},
            **{str(c): {"description": SAID[c], **refused} for c in codes},
        },
    }


def parameter(name: str, where: str, meaning: str, *, must: bool) -> Json:
    """Describe a part of a path or query."""
    schema = {"type": "string", "minLength": 1}
    return {
        "name": name,
        "in": where,
        "required": must,
        "description": meaning,
        "schema": schema,
    }


def document(title: str, text: str, paths: Json, components: Json) -> Json:
    """Put a description together."""
    return {
        "openapi": VERSION,
        "info": {"title": TITLE + title, "description": text, "version": "1"},
        "jsonSchemaDialect": DIALECT,
        "paths": paths,
        "components": {"schemas": components},
    }


def content(schema: Json, kind: str = "application/json") -> Json:
    """Describe a body."""
    return {"content": {kind: {"schema": schema}}}


def described(kinds: Iterable[Any]) -> tuple[dict[Any, Json], Json]:
    """Return a schema for each type, and the components that these refer to."""
    several = list(hashed(kinds).values())
    schemas, components = msgspec.json.schema_components(
        several, schema_hook=lambda _: dict(ANYTHING), ref_template=NAMED
    )
    of = dict(zip(several, map(portable, schemas), strict=True))
    return of, portable(dict(sorted(components.items())))


def hashed(kinds: Iterable[Any]) -> dict[Any, Any]:
    """Return types, each once, in their order."""
    return {kind: kind for kind in kinds}


def portable(value: Any) -> Any:
    """Return a schema with patterns as JSON Schema has them (ECMA 262)."""
    if isinstance(value, list):
        return [portable(each) for each in value]
    if not isinstance(value, dict):
        return value
    made = {name: portable(each) for name, each in value.items()}
    if isinstance(made.get("pattern"), str):
        made["pattern"] = made["pattern"].replace(r"\A", "^").replace(r"\Z", "$")
    return made


def doc(kind: Any) -> str:
    """Return what a type says of itself, on one line."""
    # A list says what its items are.
    kind = next(iter(getattr(kind, "__args__", ())), kind)
    text = getattr(kind, "__doc__", None) or "Some JSON."
    return " ".join(text.partition("\n\n")[0].split())


# The managed plugin.


def config() -> Json:
    """Describe the plugin to Docker (docs.docker.com/engine/extend/config)."""
    rights = ",".join(f"+{name}" for name in RIGHTS)
    return {
        "description": "pynet: networks for Docker, of one host or of many",
        "documentation": "plugin-spec/README.md",
        # Docker gives a plugin its settings of the kernel read-only, more rights than
        # are asked for, and logs as errors what is written to standard error.
        "entrypoint": [
            "/bin/sh",
            "-c",
            " && exec ".join(
                (WRITABLE, f"setpriv --bounding-set=-all,{rights} {SERVE}")
            ),
        ],
        "workdir": "/",
        "interface": {
            "types": ["docker.networkdriver/1.0", "docker.ipamdriver/1.0"],
            "socket": "pynet.sock",
        },
        "network": {"type": "host"},
        "pidhost": True,
        # Without one Docker lets no mount out, and the namespace `pynet` is a mount.
        "propagatedMount": "/host/shared",
        "mounts": [
            # What is always there: if a source lacks at boot, dockerd does not start.
            bind("run", "/run", "/host/run", "rshared"),
            {
                **bind("state", "/var/lib/pynet", "/var/lib/pynet"),
                "settable": ["source"],
            },
        ],
        "env": [variable(name) for name in FIELDS if name not in UNUSED],
        "linux": {
            "capabilities": [f"CAP_{name.upper()}" for name in RIGHTS],
            "allowAllDevices": False,
            "devices": [],
        },
    }


def bind(name: str, source: str, destination: str, *options: str) -> Json:
    """Describe a mount."""
    return {
        "name": name,
        "description": "",
        "source": source,
        "destination": destination,
        "type": "bind",
        "options": ["rbind", *options],
    }


def variable(name: str) -> Json:
    """Describe a setting."""
    field = FIELDS[name]
    default = field.default
    text = f"{default:g}" if isinstance(default, float) else str(default)
    if isinstance(default, bool):
        text = text.lower()
    return {
        "name": f"PYNET_{name.upper()}",
        "description": field.metadata["help"],
        "settable": [] if name in FIXED else ["value"],
        "value": {**FIXED, **NAMED_SO}.get(name, text),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
