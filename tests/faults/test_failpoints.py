"""
The daemon dies or is refused at any step of any call: nothing is lost, nothing is left.

All steps are tried, one after another, on a real kernel and a real store; Docker is
played, as a thousand times a real one would take too long. `test_failpoints_docker.py`
has the real one.
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest

from cnmdriver.cli.client import ClientError
from cnmdriver.errors import DriverError
from tests.dockerd.tools import eventually
from tests.faults.failpoint_world import KILLED, PATIENCE, SOON, World, differing
from tests.unit.calls import UDP, port

TOGETHER = ({"table", "element"}, {"fdb", "neighbour"})
"""What a handler does at once, and so is announced at once."""

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

Commands = Callable[[World], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What there is before, a command of Docker's, and the one that takes it back."""

    before: Commands
    do: Commands
    undo: Commands
    after: Commands
    shared: bool = False
    calls: frozenset[str] | None = None
    """The calls whose steps are tried; all, if it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of a call, by its number; `earlier` calls of that name take it before."""

    call: str
    number: int
    name: str
    earlier: int
    removing: bool

    def armed(self, action: str) -> str:
        """Return the failpoints that act here, and at no call before."""
        place = f"{self.call}.{self.number}"
        return ",".join([*[f"{place}:sleep=0"] * self.earlier, f"{place}:{action}"])


# The stories.


async def nothing(_: World) -> None:
    """Do nothing."""


async def create(world: World) -> None:
    """Create a network with a pool of its own choice, and one of pynet's."""
    options = {"pynet.icc": "false"}
    await world.create("10.61.0.0/24", "ipv6", options=options)


async def create_overlay(world: World) -> None:
    """Create an overlay whose gateway and member the host is."""
    options = {"pynet.gateway": "pynet", "pynet.host_access": "true"}
    await world.create("10.61.0.0/24", "fd61::/64", options=options)


async def remove(world: World) -> None:
    """Remove the network."""
    await world.docker.remove(world.network)


async def one_is_there(world: World) -> None:
    """Have a network with a container."""
    await world.create("10.61.0.0/24", "fd61::/64")
    await world.start(ports=(port(80, 8080),))


async def one_is_in_overlay(world: World) -> None:
    """Have an overlay with a container."""
    await create_overlay(world)
    await world.start(ports=(port(80, 8080),))


async def one_is_in_closed_overlay(world: World) -> None:
    """Have an overlay whose gateway is Docker's, with a container."""
    await world.create("10.61.0.0/24")
    await world.start()


async def one_is_built_in_place(world: World) -> None:
    """Have a network whose interfaces are built in the sandbox, with a container."""
    options = {"pynet.attach": "direct"}
    await world.create("10.61.0.0/24", "fd61::/64", options=options)
    await world.start(ports=(port(80, 8080),))


async def start(world: World) -> None:
    """Start a container with published ports, at an address of the user's choice."""
    ports = (port(80, 8081), port(53, protocol=UDP))
    await world.start(ip="10.61.0.7", ports=ports)


async def start_anywhere(world: World) -> None:
    """Start a container whose addresses pynet chooses."""
    await world.start(ports=(port(80, 8081),))


async def one_is_there_plainly(world: World) -> None:
    """Have a network whose addresses Docker gives out, with a container."""
    await world.create_plainly("10.61.0.0/24")
    await start_plainly(world)


async def start_plainly(world: World) -> None:
    """Start a container at an address that Docker has chosen."""
    await world.start(ports=(port(80),))


async def stop(world: World) -> None:
    """Stop the latest container."""
    await world.docker.stop(list(world.docker.boxes)[-1])


async def all_goes(world: World) -> None:
    """Stop the container and remove the network."""
    await stop(world)
    await remove(world)


STORIES = {
    "network": Story(before=nothing, do=create, undo=remove, after=nothing),
    "container": Story(before=one_is_there, do=start, undo=stop, after=all_goes),
    "plain-container": Story(
        before=one_is_there_plainly, do=start_plainly, undo=stop, after=all_goes
    ),
    "direct-container": Story(
        before=one_is_built_in_place,
        do=start,
        undo=stop,
        after=all_goes,
        calls=frozenset({"Join", "DeleteEndpoint", "ReleaseAddress"}),
    ),
    "overlay": Story(
        before=nothing, do=create_overlay, undo=remove, after=nothing, shared=True
    ),
    "overlay-container": Story(
        before=one_is_in_overlay,
        do=start_anywhere,
        undo=stop,
        after=all_goes,
        shared=True,
    ),
    "closed-overlay-container": Story(
        before=one_is_in_closed_overlay,
        do=start_anywhere,
        undo=stop,
        after=all_goes,
        shared=True,
    ),
}


# How they are played.


def steps_of(world: World, *, removing: bool) -> Iterator[tuple[str, int, str, bool]]:
    """Yield the steps that Docker's calls have taken since this was asked last."""
    for line in world.daemon.news():
        if line["event"] == "failpoint.step" and line["call"]:
            yield line["call"], line["number"], line["step"], removing


def distinct(taken: list[tuple[str, int, str, bool]]) -> Iterator[Step]:
    """Yield the steps that some work lies before."""
    counts: dict[tuple[str, int], int] = {}
    last = ("", "")
    for call, number, name, removing in taken:
        earlier = counts.get((call, number), 0)
        counts[call, number] = earlier + 1
        verb, _, kind = name.partition(".")
        one = number > 1 and last[0] == verb
        if not (one and any({kind, last[1]} <= kinds for kinds in TOGETHER)):
            yield Step(
                call=call, number=number, name=name, earlier=earlier, removing=removing
            )
        last = (verb, kind)


async def enumerated(world: World, story: Story) -> list[Step]:
    """Play a story undisturbed and return all its steps."""
    world.daemon.restart("trace")
    await story.do(world)
    world.tell()
    taken = list(steps_of(world, removing=False))
    await story.undo(world)
    taken += steps_of(world, removing=True)
    steps = distinct(taken)
    return [s for s in steps if story.calls is None or s.call in story.calls]


async def play(world: World, story: Story, step: Step, action: str) -> None:
    """Play a story that is disturbed at a step, and repeated by its user."""
    alone = action == "error"
    world.begin(step.armed(action))
    done = await world.succeeds(story.do)
    if not step.removing:
        check_hit(world, step, action)
    if not done and alone and not step.call.startswith("Request"):
        # What an address or a pool was taken for Docker does not learn: they lapse.
        eventually(lambda: world.look() == world.before, SOON)
        found = world.look()
        assert found == world.before, differing(world.before, found)
    if not done and not await world.succeeds(story.do):
        # What Docker forgot in the midst of its creation has its pools for that long.
        assert action == "kill"
        assert "is in use on this host by network" in world.refusals[-1]
        world.settles(world.before, alone=alone)
        world.daemon.restart()
        await story.do(world)
    world.tell()
    check_whole(world)
    await story.undo(world)
    world.lists.tell()
    if step.removing:
        check_hit(world, step, action)
    world.settles(world.before, alone=alone)


def check_hit(world: World, step: Step, action: str) -> None:
    """Fail unless the daemon died, or said that it was refused, at the step."""
    hits = [line for line in world.daemon.news() if line["event"] == "failpoint.hit"]
    assert [hit["step"] for hit in hits[step.earlier :]] == [step.name]
    if action == "kill":
        assert [method.split(".")[1] for method in world.deaths] == [step.call]
    for text in world.refusals:
        assert "failed, as PYNET_FAILPOINT wants it" in text


def check_whole(world: World) -> None:
    """Fail unless all that Docker has is there, no address twice, and the kernel so."""
    # A daemon that was killed leaves what is gone once Docker's list is known.
    eventually(lambda: world.admin.get("diff")["lines"] == [], PATIENCE)
    assert world.admin.get("diff")["lines"] == []
    found = world.look()
    assert {n["id"] for n in found["networks"]} >= set(world.docker.nets)
    given = [address for e in found["endpoints"] for address in e["addresses"]]
    assert len(set(given)) == len(given)
    # What Docker forgot, and could tell by no call, is there for the grace time.
    endpoints = {e["id"]: e["addresses"] for e in found["endpoints"] if e["joined"]}
    for box in world.docker.boxes.values():
        assert endpoints[box.id] == [str(address) for address in box.addresses]


@pytest.mark.parametrize("action", ["kill", "error"])
@pytest.mark.parametrize("name", STORIES)
async def test_each_step(name, action, make_lab):
    """Repeated by its user, each command does what it should; nothing is left, twice."""
    story = STORIES[name]
    lab = make_lab(etcd=1 if story.shared else 0, serve=False)
    store = {"store": f"etcd://{lab.members[0].address4}:2379"} if story.shared else {}
    with World(lab.hosts[0], **store) as world:
        at_first = world.left()
        await story.before(world)
        world.tell()
        world.before = world.look()
        steps = await enumerated(world, story)
        for step in steps:
            try:
                await play(world, story, step, action)
            except (AssertionError, DriverError, ClientError) as error:
                words = f"{action} at {step}: {error}\n{world.daemon.log()[-5000:]}"
                raise AssertionError(words) from error
        await story.do(world)
        await story.undo(world)
        await story.after(world)
        world.settles(world.empty, alone=True)
        # What was on its way out at the latest comparison is gone at the next.
        eventually(lambda: not world.admin.get("status")["attention"], PATIENCE)
        assert world.admin.get("status")["attention"] == []
        assert world.left() == at_first


@pytest.mark.parametrize("before", [one_is_there, one_is_built_in_place])
async def test_killed_between_the_answer_and_the_removal(before, make_lab):
    """What Docker was told is removed is removed, by whoever comes next."""
    with World(make_lab(serve=False).hosts[0]) as world:
        await before(world)
        world.tell()
        world.before = world.look()
        await start(world)
        world.tell()
        world.begin("clear.device:kill")
        await stop(world)
        if not world.deaths:
            assert world.daemon.ask("wait 10") == KILLED
            world.daemon.start()
        assert "NetworkDriver.DeleteEndpoint" not in world.deaths
        world.settles(world.before, alone=False)
        await all_goes(world)
        world.settles(world.empty, alone=True)
