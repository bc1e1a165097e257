"""One version up or down: files of another version, and neighbours of one."""

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import structlog

from cnmdriver import daemon
from cnmdriver.errors import Conflict
from cnmdriver.model import Endpoint, Host, Network
from cnmdriver.settings import Settings
from cnmdriver.store import local, records, sqlite
from cnmdriver.store.base import Change
from cnmdriver.store.local import LocalDatabase
from cnmdriver.store.mending import checksum
from cnmdriver.store.sqlite import SqliteStore
from cnmdriver.store.view import Draft
from tests.fakes import cluster, level, rig
from tests.unit.calls import Docker

POOL = "10.1.0.0/24"
ID = "0123456789abcdef"
HOST = Host(id=ID, name="h1", version="0.1.0")
LOCAL = """
CREATE TABLE facts (
    name TEXT PRIMARY KEY, value TEXT NOT NULL, checksum INTEGER NOT NULL
);
CREATE TABLE outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT, change TEXT NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE TABLE snapshot (
    key TEXT PRIMARY KEY, value TEXT NOT NULL, revision INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) WITHOUT ROWID;
"""
"""What 0.1.0 made, whose local database told no version."""
STORE = """
CREATE TABLE records (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL,
    lease INTEGER, checksum INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE state (
    name TEXT PRIMARY KEY, number INTEGER NOT NULL, checksum INTEGER NOT NULL
);
"""
OLDEST = "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Make a directory with a short path; leave the process's log as it was."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)
    structlog.reset_defaults()


def make(path: Path, script: str, **rows: list[tuple[object, ...]]) -> None:
    """Make a database with tables and rows."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(script)
        for table, values in rows.items():
            marks = ", ".join("?" * len(values[0]))
            db.executemany(f"INSERT INTO {table} VALUES ({marks})", values)


def host_facts(**more: str) -> list[tuple[object, ...]]:
    """Return rows of facts."""
    facts = {"host": ID, **more}
    return [(name, value, checksum(name, value)) for name, value in facts.items()]


def store_rows(schema: int) -> dict[str, list[tuple[object, ...]]]:
    """Return rows of a store with one record."""
    key, value = records.host(ID), records.encode(HOST)
    numbers = {"revision": 7, "schema": schema}
    return {
        "records": [(key, value, 7, None, checksum(key, value, 7))],
        "state": [(n, v, checksum(n, v)) for n, v in numbers.items()],
    }


def settings(directory: Path) -> Settings:
    """Put everything below one directory."""
    return Settings(
        socket=f"{directory}/plugins/pynet.sock",
        state_dir=str(directory),
        run_dir=f"{directory}/run",
        docker="",
        log_format="json",
    )


async def test_state_of_the_version_before(directory):
    """What 0.1.0 left is opened as it is: the same host, the same records."""
    make(directory / "local.db", LOCAL, facts=host_facts())
    make(directory / "store.db", STORE, **store_rows(sqlite.VERSION))
    async with rig(directory) as parts:
        assert parts.site.host.id == ID
        assert parts.state.view.get(Host, records.host(ID)) == HOST
        assert await parts.state.local.fact(local.SCHEMA_FACT) == str(local.VERSION)
    assert not [*directory.glob("*.schema-*"), *directory.glob("*.broken-*")]


async def test_a_local_database_of_the_first_version(directory):
    """Files without checksums are made anew, and kept beside as they were."""
    path = directory / "local.db"
    rest = LOCAL.partition(";")[2].replace(",\n    checksum INTEGER NOT NULL", "")
    make(path, OLDEST + rest, facts=[("host", ID)])
    opened = LocalDatabase(path)
    await opened.open()
    assert (opened.host, opened.mended) == (ID, "")
    await opened.close()
    with closing(sqlite3.connect(directory / "local.db.schema-0")) as kept:
        assert kept.execute("SELECT * FROM facts").fetchall() == [("host", ID)]


@pytest.mark.parametrize("which", ["local.db", "store.db"])
def test_newer_state_is_refused(directory, capsys, monkeypatch, which):
    """Files of a newer version end the start at once, with code 2, and stay as is."""
    monkeypatch.setattr(daemon, "NAME", f"\0pynet-test-{directory.name}")
    directory.chmod(0o700)
    newer = {"schema": str(local.VERSION + 1)} if which == "local.db" else {}
    make(directory / "local.db", LOCAL, facts=host_facts(**newer))
    schema = sqlite.VERSION + (which == "store.db")
    make(directory / "store.db", STORE, **store_rows(schema))
    before = (directory / which).read_bytes()
    monkeypatch.setattr(daemon, "PATIENCE", 3600.0)
    assert daemon.run(settings(directory)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert f"{directory / which} has schema {3 if which == 'store.db' else 2}" in line
    assert "use the newer pynet" in line
    assert (directory / which).read_bytes() == before


async def test_a_cluster_of_a_newer_schema_is_refused(directory):
    """A host does not join a store whose schema it does not know."""
    store = SqliteStore(directory / "store.db")
    await store.open()
    value = b'{"schema": 1, "record": {"id": "c", "schema": 2}}'
    await store.commit(Change(puts={records.CLUSTER: value}))
    await store.close()
    with pytest.raises(Conflict, match="the store has schema 2, this pynet knows 1"):
        async with rig(directory):
            pass


# Neighbours.


def renewed(value: bytes, schema: int) -> bytes:
    """Return a record as a newer pynet would write it."""
    found = json.loads(value)
    found["record"]["colour"] = "red"
    return json.dumps({**found, "schema": schema}).encode()


async def stored(docker: Docker) -> dict[str, bytes]:
    """Return what is in the store."""
    listing = await docker.rig.state.store.read("")
    return {key: item.value for key, item in listing.items.items()}


async def test_neighbours_of_a_newer_version(directory):
    """
    A host works beside a newer one, whose records it reads and does not write.

    1. The newer host has a network with a container; its own records have a newer
       schema and a field that nobody else knows, the network and its pool the field.
    2. The older one joins, starts and stops a container, and leaves.
    Result: it sees the other's container; every record of the newer host is byte for
    byte what it was, and what both write keeps the field.
    """
    async with cluster(directory, 2) as rigs:
        old, new = (Docker(one) for one in rigs)
        await new.create("n" * 64, POOL)
        await new.start("e" * 64, "n" * 64)
        mine = rigs[1].site.host.id
        before = await stored(new)
        own = {
            key: renewed(value, 2)
            for key, value in before.items()
            if key.startswith(("hosts/", "members/", "endpoints/"))
            and mine in value.decode() + key
        }
        assert len(own) == 3
        shared = {
            key: renewed(value, 1)
            for key, value in before.items()
            if key.startswith(("networks/", "pools/"))
        }
        assert len(shared) == 2
        await rigs[1].state.store.commit(Change(puts=own | shared))
        await level(*rigs)
        await old.create("o" * 64, POOL)
        await old.start("f" * 64, "o" * 64)
        await level(*rigs)
        seen = [*rigs[0].state.view.all(Endpoint, "endpoints/")]
        assert {one.id for one in seen} == {"e" * 64, "f" * 64}
        await old.stop("f" * 64)
        await old.remove("o" * 64)
        after = await stored(new)
        assert {key: after[key] for key in own} == own
        for key in shared:
            assert json.loads(after[key])["record"]["colour"] == "red"


async def test_what_both_change_keeps_what_one_does_not_know(directory):
    """A record with an unknown field that this host changes keeps the field."""
    async with rig(directory) as parts:
        docker = Docker(parts)
        await docker.create("n" * 64, POOL)
        (network,) = parts.state.view.all(Network, "networks/")
        key = records.network(network.id)
        value = renewed((await stored(docker))[key], 1)
        await parts.state.store.commit(Change(puts={key: value}))
        await parts.state.relist()

        def change(draft: Draft) -> None:
            found = draft.get(Network, key)
            draft.put(key, type(found)(**{**fields(found), "mtu": 1400}))

        await parts.state.commit(change)
        record = json.loads((await stored(docker))[key])["record"]
        assert (record["mtu"], record["colour"]) == (1400, "red")


def fields(record: Network) -> dict[str, object]:
    """Return a record's fields."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


async def test_a_newer_record_is_never_rewritten(directory):
    """What a newer schema wrote can be deleted, and not changed."""
    async with rig(directory) as parts:
        key = records.host("x")
        value = renewed(records.encode(Host(id="x", name="x", version="9")), 2)
        await parts.state.store.commit(Change(puts={key: value}))
        await parts.state.relist()
        assert parts.state.view.get(Host, key).name == "x"
        draft = Draft(parts.state.view)
        with pytest.raises(Conflict, match=f"record {key} was written by a newer"):
            draft.put(key, Host(id="x", name="y", version="1"))
        await parts.state.commit(lambda draft: draft.delete(key))
        assert key not in await stored(Docker(parts))
        assert key not in parts.state.view.newer
        assert key not in parts.state.view.unknown
