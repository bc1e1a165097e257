"""What a browser and Prometheus see of two real hosts."""

import re
from collections.abc import Callable, Iterator

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.cluster import Cluster
from tests.dockerd.tools import eventually
from tests.web.browser import Browser, browser

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(240)]

PLACE = "127.0.0.1:9100"
SOON = 4.0
"""Seconds until it shows: one, on a machine that is four times slower."""


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return two hosts that can be looked at, and one etcd member."""
    return make_module_lab(2, etcd=1, pynet_args=("--listen", PLACE))


@pytest.fixture
def cluster(lab: Lab) -> Iterator[Cluster]:
    """Return the hosts, with networks of the test's own."""
    with Cluster(lab) as made:
        yield made


def metrics(host: Host) -> dict[str, float]:
    """Return what Prometheus would read."""
    text = host.exec("curl", "-sf", f"http://{PLACE}/metrics").stdout
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (s.rpartition(" ") for s in lines)}


def total(found: dict[str, float], name: str, *labels: str) -> float:
    """Return the sum of a metric over all but these labels."""
    return sum(
        value
        for key, value in found.items()
        if key.partition("{")[0] == name and all(label in key for label in labels)
    )


async def shows(page: Browser, text: str, seconds: float = 30.0) -> None:
    """Wait until a text is on the page."""
    await page.until(f"document.body.innerText.includes({text!r})", seconds)


async def test_a_browser_sees_it(cluster: Cluster) -> None:
    """
    The page of one host shows what Docker does on both, at once.

    1. A network, a container here and one there are made: each shows when Docker is
       done with it, this host's by its name.
    2. A device of the first is deleted: the event says that it was put right.
    3. The containers are removed.
    Result: the page shows none, and nothing went wrong in the browser.
    """
    first, second = cluster.scenes
    async with browser(("nsenter", f"--net={first.host.netns}")) as page:
        await page.look()
        await page.go(f"http://{PLACE}/")
        await page.until("document.querySelectorAll('.host').length === 2")
        network = cluster.network()
        await shows(page, network, SOON)
        here = first.run(network)
        await shows(page, here.name, SOON)
        there = second.run(network)
        await shows(page, there.ip(), SOON)
        await page.until("document.querySelectorAll('.chip.well').length === 2", SOON)
        await page.ask("document.querySelector('.network').click()")
        await page.until(
            "document.querySelector('#detail pre').innerText.includes('type vxlan')"
        )
        first.host.exec("ip", "-n", "pynet", "link", "set", bridge(first.host), "down")
        await shows(page, "sync.repair")
        first.remove(here)
        second.remove(there)
        await page.until("document.querySelectorAll('.chip').length === 0", SOON)
        assert page.complaints == []


def bridge(host: Host) -> str:
    """Return the bridge of the only network."""
    shown = host.exec("ip", "-n", "pynet", "-o", "link", "show", "type", "bridge")
    found = re.search(r"(pn-\w+)", shown.stdout)
    assert found
    return found[1]


def test_prometheus_sees_it(cluster: Cluster) -> None:
    """
    Calls, operations of store and kernel, sizes and the lag are counted as they are.

    1. A container is started on each of two hosts.
    2. The figures of the first are compared with those of before.
    Result: they have grown by what was done, and soon no kernel is behind.
    """
    first, second = cluster.scenes
    before = metrics(first.host)
    network = cluster.network()
    first.run(network)
    second.run(network)
    after = metrics(first.host)

    def more(name: str, *labels: str) -> float:
        return total(after, name, *labels) - total(before, name, *labels)

    assert more("pynet_docker_calls_total", 'NetworkDriver.Join"', '"ok"') == 1
    assert more("pynet_docker_call_seconds_count", "CreateEndpoint") == 1
    assert more("pynet_store_operations_total", '"commit"', '"ok"') >= 3
    assert more("pynet_kernel_operations_total", '"apply"', '"ok"') >= 2
    assert more("pynet_kernel_steps_total", '"apply"', '"device"') >= 3
    assert more("pynet_endpoints", '"here"') == 1
    assert more("pynet_endpoints", '"elsewhere"') == 1
    assert total(after, "pynet_hosts", '"alive"') == 2
    assert total(after, "pynet_store_away") == 0
    assert eventually(
        lambda: (
            total(metrics(first.host), "pynet_programming_lag_seconds_count")
            > total(before, "pynet_programming_lag_seconds_count")
        ),
        SOON,
    )
    assert eventually(
        lambda: (
            total(metrics(first.host), "pynet_host_endpoints_behind") == 0
            and total(metrics(second.host), "pynet_host_endpoints_behind") == 0
        ),
        10.0,
    )
