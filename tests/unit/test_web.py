"""The web door without a browser: who may ask, what is answered, what is measured."""

import asyncio
import json
import re
import subprocess
import sys
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cnmdriver import listening
from cnmdriver.api.app import METHODS, runner
from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.errors import InvalidParameter, StoreError
from cnmdriver.insight.watching import Watching
from cnmdriver.logs import Journal
from cnmdriver.store.base import Change, RaceLostError
from cnmdriver.store.sqlite import SqliteStore
from cnmdriver.web import app as module
from cnmdriver.web.metrics import Metrics, TimedKernel
from tests import scene
from tests.web import scenes

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json"


@pytest.fixture
async def shown(tmp_path):
    """Serve a host with two networks."""
    async with scenes.shown(tmp_path) as made:
        await scene.populate(made.rig)
        yield made


@pytest.fixture
async def client():
    """Open a client."""
    async with aiohttp.ClientSession() as opened:
        yield opened


async def measured(client, shown):
    """Return the metrics by name and labels."""
    async with client.get(f"{shown.url}/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = await answer.text()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# Who may ask.


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:9000", 200),
        ("127.0.0.1:1", 200),
        ("127.1.2.3", 200),
        ("[::1]", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("evil.example:9000", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("192.0.2.1", 421),
        ("[2001:db8::1]:80", 421),
        ("", 421),
    ],
)
@pytest.mark.parametrize("path", ["/", "/topology", "/metrics", "/nothing"])
async def test_only_by_its_own_name(shown, client, host, status, path):
    """Who asks by a name that anybody may give to loopback is answered nothing."""
    async with client.get(shown.url + path, headers={"Host": host}) as answer:
        wanted = 404 if status == 200 and path == "/nothing" else status
        assert answer.status == wanted
        if wanted == 421:
            assert "localhost" in (await answer.json())["error"]


async def test_a_unix_socket_has_no_browser(shown, tmp_path):
    """On a Unix socket the name that is asked for does not matter."""
    page = module.application(
        shown.rig.site,
        info=shown.daemon.info,
        events=shown.daemon.events,
        scrape=lambda: asyncio.sleep(0, b""),
    )
    path = tmp_path / "web" / "m.sock"
    async with listening.listening(runner(page), path):
        assert path.stat().st_mode & 0o777 == 0o600
        connector = aiohttp.UnixConnector(str(path))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.get("http://pynet/topology") as answer,
        ):
            assert answer.status == 200


@pytest.mark.parametrize("path", ["/", "/page.js", "/topology", "/metrics", "/nothing"])
async def test_nothing_from_elsewhere(shown, client, path):
    """Every answer forbids a browser to load or to show it anywhere else."""
    async with client.get(shown.url + path) as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_it_only_reads(shown, client):
    """Nothing can be changed through this door."""
    for path in module.ANSWERS:
        for verb in ("post", "put", "delete"):
            async with client.request(verb, f"{shown.url}/{path}") as answer:
                assert answer.status == 405


def test_the_page_is_whole_and_its_own():
    """Every file of the page is served, and none names another place."""
    directory = Path(module.__file__).parent / "page"
    assert {p.name for p in directory.iterdir()} == {n for n, _ in module.PAGE.values()}
    for path in directory.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(https?:)?//[\w-]+\.\w", text), path
    script = "".join(p.read_text() for p in directory.glob("*.js"))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval", script
    )


async def test_a_port_that_is_taken(shown):
    """A port that another program has is an error that says what to do."""
    port = int(shown.url.rpartition(":")[2])
    page = runner(aiohttp.web.Application())
    with pytest.raises(InvalidParameter, match=rf"127.0.0.1 port {port}: .*choose"):
        async with listening.listening(page, ("127.0.0.1", port)):
            pass
    await page.cleanup()


# What is answered.


async def test_the_topology(shown, client):
    """The topology has the host, its networks, and its endpoints with their health."""
    async with client.get(f"{shown.url}/topology") as answer:
        found = await answer.json()
    (host,) = found["hosts"]
    assert (host["label"], host["state"], host["health"]) == ("h1", "alive", "well")
    assert [n["label"] for n in found["networks"]] == ["blue", "green"]
    assert [n["endpoints"] for n in found["networks"]] == [2, 2]
    by_name = {(e["label"], e["joined"]): e for e in found["endpoints"]}
    assert by_name["batch", False]["health"] == "away"
    assert by_name["batch", False]["why"] == ["it has not joined a sandbox"]
    assert by_name["db", True]["health"] == "well"
    assert found["counts"]["changes"] > 0


async def test_what_is_amiss(shown, client):
    """A lost store, a host that is gone, a conflict: each is said where it belongs."""
    own = shown.rig.site.host.id

    def decide(draft):
        scenes.host(draft, scenes.host_id(2), 2, state="gone")
        scenes.host(draft, scenes.host_id(3), 3, state="resting")
        wide = scenes.network(draft, 1, [own, scenes.host_id(2)])
        scenes.endpoint(draft, wide, scenes.host_id(2), 1)

    await shown.rig.state.commit(decide)
    shown.daemon.conflicts = lambda: {scene.WEB: "address 10.1.0.2 is another's"}
    shown.rig.state.away = "etcd://u:pw@h does not answer"
    async with client.get(f"{shown.url}/topology") as answer:
        found = await answer.json()
    health = {h["label"]: h["health"] for h in found["hosts"]}
    assert health == {"h1": "amiss", "node-02": "amiss", "node-03": "away"}
    endpoints = {e["id"]: e for e in found["endpoints"]}
    assert endpoints[scene.WEB]["why"] == ["address 10.1.0.2 is another's"]
    hidden = endpoints[f"{2:064x}"]
    assert (hidden["health"], hidden["why"]) == (
        "away",
        ["hidden: host node-02 has no lease"],
    )
    assert found["away"]
    assert "address 10.1.0.2 is another's" in found["attention"]
    assert "pw" not in json.dumps(found)
    assert [h["behind"] for h in found["hosts"]] == [None, None, None]


async def test_explain(shown, client):
    """A network is explained by its id; one that has no part here is refused."""
    network = shown.rig.site.member(scene.BLUE).network
    async with client.get(
        f"{shown.url}/explain", params={"network": network}
    ) as answer:
        assert "======== network blue" in (await answer.json())["commands"]
    for other in ("", "none"):
        params = {"network": other}
        async with client.get(f"{shown.url}/explain", params=params) as answer:
            assert answer.status == 404
            assert "no part in the network" in (await answer.json())["error"]


async def test_a_store_that_hangs(shown, client, monkeypatch):
    """A store that does not answer keeps nothing else from being shown, at once."""

    async def hang(prefix):
        await asyncio.sleep(60)

    monkeypatch.setattr(shown.rig.state.store, "read", hang)
    async with asyncio.timeout(8), client.get(f"{shown.url}/topology") as answer:
        assert [h["behind"] for h in (await answer.json())["hosts"]] == [None]
    async with asyncio.timeout(8):
        found = await measured(client, shown)
    assert found["pynet_hosts", ("state", "alive")] == 1
    assert ("pynet_host_endpoints_behind", ("host", "h1")) not in found


async def test_a_kernel_that_hangs(shown, client, monkeypatch):
    """What does not answer in time is an error that says so, not a wait."""
    monkeypatch.setattr(module, "LIMIT", 0.1)
    shown.rig.kernel.drops = lambda: asyncio.sleep(60)
    async with client.get(f"{shown.url}/metrics") as answer:
        assert answer.status == 503
        assert "did not end within 0.1 s" in (await answer.json())["error"]


async def test_events_as_they_come(shown, client):
    """News comes as server-sent events; the end of the daemon ends them."""
    async with client.get(f"{shown.url}/events") as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        first = await answer.content.readline()
        assert json.loads(first.removeprefix(b"data: "))["changed"] is True
        await scene.endpoint(shown.rig, scene.BLUE, "e8" * 32, "10.1.0.9/24")
        async for line in answer.content:
            if line.startswith(b"data: "):
                events = json.loads(line.removeprefix(b"data: "))["events"]
                assert [e["event"] for e in events] == ["endpoint.came"]
                break
        shown.daemon.events.close()
        async with asyncio.timeout(10):
            assert set((await answer.content.read()).split()) <= {b":"}


# What is measured.


async def test_docker_calls(shown, client):
    """A call is counted by method and outcome, and its time is measured."""
    site = aiohttp.web.TCPSite
    await shown.daemon.plugin.setup()
    port = scenes.free_port()
    await site(shown.daemon.plugin, "127.0.0.1", port).start()
    for path in ("Plugin.Activate", "NetworkDriver.Join", "what/ever", "else"):
        async with client.post(f"http://127.0.0.1:{port}/{path}", json={}):
            pass
    await shown.daemon.plugin.cleanup()
    found = await measured(client, shown)
    name = "pynet_docker_calls_total"
    assert found[name, ("method", "Plugin.Activate"), ("outcome", "ok")] == 1
    refused = ("outcome", "InvalidParameter")
    assert found[name, ("method", "NetworkDriver.Join"), refused] == 1
    assert found[name, ("method", "unknown"), ("outcome", "HTTPNotFound")] == 2
    count = "pynet_docker_call_seconds_count"
    assert found[count, ("method", "Plugin.Activate")] == 1
    methods = {dict(k[1:]).get("method") for k in found} - {None}
    assert methods <= {*METHODS, "unknown"}


async def test_sizes_and_troubles(shown, client):
    """What there is, what waits, and what is amiss is what the parts say."""
    shown.daemon.sync.repairs.update({"device": 3})
    shown.daemon.sync.problems = ("p",)
    shown.rig.kernel.drops = lambda: asyncio.sleep(0, {"mac": 7})
    found = await measured(client, shown)
    here, elsewhere = ("where", "here"), ("where", "elsewhere")
    assert found["pynet_networks", here] == 2
    assert found["pynet_endpoints", here] == 4
    assert found["pynet_endpoints", elsewhere] == 0
    assert found["pynet_addresses", here] == 9
    assert found[("pynet_pools",)] == 3
    assert found[("pynet_published_ports",)] == 2
    assert found["pynet_hosts", ("state", "alive")] == 1
    assert found["pynet_host_endpoints_behind", ("host", "h1")] == 0
    assert found["pynet_repairs_total", ("kind", "device")] == 3
    assert found["pynet_dropped_packets_total", ("kind", "mac")] == 7
    assert found[("pynet_unmended",)] == 1
    assert found[("pynet_store_away",)] == 0
    assert found[("pynet_outbox_changes",)] == 0
    assert found["pynet_build_info", ("version", "test")] == 1
    assert found[("pynet_start_time_seconds",)] > 1_700_000_000
    assert found[("pynet_store_revision",)] == shown.rig.site.view.revision
    shown.rig.state.away = "e"
    found = await measured(client, shown)
    assert found[("pynet_store_away",)] == 1
    assert ("pynet_host_endpoints_behind", ("host", "h1")) not in found


async def test_the_store_is_measured(tmp_path):
    """Each operation of the store is counted by what became of it, and timed."""
    metrics = Metrics(Journal(), "v")
    store = metrics.store(SqliteStore(tmp_path / "s.db"))
    await store.open()
    revision = await store.commit(Change(puts={"a": b"1"}))
    with pytest.raises(RaceLostError):
        await store.commit(Change(expect={"a": revision + 9}, puts={"a": b"2"}))
    assert (await store.read("")).items["a"].value == b"1"
    await store.close()
    with pytest.raises(StoreError):
        await store.read("")
    total = "pynet_store_operations_total"

    def value(name, **labels):
        return metrics.registry.get_sample_value(name, labels)

    assert value(total, operation="commit", outcome="ok") == 1
    assert value(total, operation="commit", outcome="RaceLostError") == 1
    assert value(total, operation="read", outcome="ok") == 1
    seconds = "pynet_store_operation_seconds_count"
    assert value(seconds, operation="commit") == 2
    assert value(seconds, operation="read") == 2


async def test_steps_of_the_kernel():
    """What the step hook announces of the kernel is counted by verb and kind."""
    metrics = Metrics(Journal(), "v")
    for name in ("apply.device", "apply.device", "clear.fdb", "commit.before"):
        await metrics.step(name)
    found = {
        tuple(sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "pynet_kernel_steps_total"
    }
    assert found == {("apply", "device"): 2, ("clear", "fdb"): 1}


async def test_the_lag_of_news(tmp_path):
    """The time from news of another host until the kernel has it is measured."""
    async with scenes.shown(tmp_path) as shown:
        remotes, rig = shown.daemon.remotes, shown.rig
        await remotes.update()
        rig.site.host = replace(rig.site.host, vtep=ip_address("192.0.2.1"))
        own, other = rig.site.host.id, scenes.host_id(2)

        def decide(draft):
            scenes.host(draft, own, 1)
            scenes.host(draft, other, 2)
            wide = scenes.network(draft, 1, [own, other])
            scenes.endpoint(draft, wide, own, 0)

        await rig.state.commit(decide)
        (member,) = rig.site.members()
        await rig.kernel.apply(rig.site.network_plan(member))
        await remotes.update()
        before = count(shown)
        remotes.wake()
        await rig.state.commit(
            lambda draft: scenes.endpoint(draft, f"{1:032x}", other, 1)
        )
        await remotes.update()
        assert count(shown) == before + 1


def count(shown):
    """Return how often a lag was measured."""
    name = "pynet_programming_lag_seconds_count"
    return shown.daemon.watching.registry.get_sample_value(name)


def test_nobody_measures_for_nobody(tmp_path):
    """Without a place to listen nothing stands before the kernel or the store."""
    given = {"host": "h" * 16, "run_dir": tmp_path, "step": None, "namespace": "n"}
    quiet, loud = Watching(Journal()), Metrics(Journal(), "v")
    assert type(quiet.kernel(**given)) is Kernel
    assert type(loud.kernel(**given)) is TimedKernel
    store = SqliteStore(tmp_path / "s.db")
    assert quiet.store(store) is store


def test_nobody_loads_it_for_nobody():
    """A daemon that is not looked at does not even load what measures."""
    program = "import sys, cnmdriver.daemon; print('prometheus_client' in sys.modules)"
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=25, check=True)
    assert done.stdout == "False\n"


async def test_the_dashboard_asks_for_what_there_is(shown, client):
    """Every metric that the dashboard asks for is one that is measured."""
    text = DASHBOARD.read_text()
    targets = [
        target["expr"]
        for panel in json.loads(text)["panels"]
        for target in panel.get("targets", ())
    ]
    asked = {name for expr in targets for name in re.findall(r"pynet_\w+", expr)}
    families = {
        family.name: family.type for family in shown.daemon.watching.registry.collect()
    }
    known = set()
    for name, kind in families.items():
        known |= {name}
        known |= {f"{name}_total"} if kind == "counter" else set()
        known |= (
            {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
            if (kind == "histogram")
            else set()
        )
        known |= {f"{name}_info"} if kind == "info" else set()
    assert asked - known == set()
    assert len(asked) > 15
