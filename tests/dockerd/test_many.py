"""Many containers, one after the other and at once, on one network."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.tools import Scene, api, eventually, left_of_pynet, told

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.slow,
    pytest.mark.timeout(300),
]

IN_TURN = 100
AT_ONCE = 20
ROUNDS = 2


@pytest.fixture(scope="module")
def home(make_module_lab: Callable[..., Lab]) -> Host:
    """Return a host of its own, as the census is compared as a whole."""
    return make_module_lab().hosts[0]


@pytest.fixture
def scene(home: Host) -> Iterator[Scene]:
    """Return a scene on which nothing was before, and nothing is after."""
    before = census(home)
    with Scene(home) as made:
        yield made
    assert census(home) == before
    assert left_of_pynet(home) == []


def census(host: Host) -> Any:
    """Return all that pynet owns on a host."""
    return told(host, "census")


def start(scene: Scene, name: str, network: str) -> str:
    """Create and start a container; return its address."""
    host = scene.host
    scene.containers.append(name)
    body = {
        "Image": "busybox",
        "Cmd": ["sleep", "600"],
        "HostConfig": {"NetworkMode": network, "LogConfig": {"Type": "none"}},
    }
    api(host, "POST", f"/containers/create?name={name}", body)
    api(host, "POST", f"/containers/{name}/start")
    shown = api(host, "GET", f"/containers/{name}/json")
    return str(shown["NetworkSettings"]["Networks"][network]["IPAddress"])


def remove(scene: Scene, name: str) -> None:
    """Remove a running container."""
    api(scene.host, "DELETE", f"/containers/{name}?force=true")
    scene.containers.remove(name)


def taken(host: Host) -> list[str]:
    """Return all addresses that are taken."""
    found = told(host, "pools")
    return [a["address"] for pool in found for a in pool["addresses"]]


def test_many_in_turn(scene: Scene) -> None:
    """
    A hundred containers come and go, and leave the host as it was.

    1. A network with pynet's IPAM and one container that stays.
    2. The containers are started one after the other, and each is removed while the
       next one starts.

    Result: none gets the address of the one that stays; the census is what it was before
    them, and only the one container's address is taken.
    """
    host = scene.host
    network = scene.network("--ipam-driver=pynet", "--subnet=10.70.0.0/24")
    stays = scene.run(network)
    before, held = census(host), taken(host)
    going = None
    with ThreadPoolExecutor(1) as remover:
        for number in range(IN_TURN):
            name = f"turn{number}"
            assert start(scene, name, network) not in held
            if going is not None:
                going.result()
            going = remover.submit(remove, scene, name)
    assert census(host) == before
    assert taken(host) == held
    assert stays.pings("10.70.0.1")


def test_many_at_once(scene: Scene) -> None:
    """
    Twenty containers start at once and are removed at once, twice over.

    Result: twenty addresses each time, none twice, no error; the census is what it was
    before.
    """
    host = scene.host
    network = scene.network("--ipam-driver=pynet", "--subnet=10.71.0.0/24")
    before, held = census(host), taken(host)
    names = [f"once{number}" for number in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in range(ROUNDS):
            addresses = list(pool.map(lambda name: start(scene, name, network), names))
            assert len({*held, *addresses}) == len(held) + AT_ONCE
            assert sorted(taken(host)) == sorted([*held, *addresses])
            list(pool.map(lambda name: remove(scene, name), names))
    assert eventually(lambda: census(host) == before)
    assert taken(host) == held
