"""Users of a chaos run: each has some containers on one host, and never rests."""

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cnmdriver.lab import image
from cnmdriver.lab.chaos import docker
from cnmdriver.lab.chaos.docker import Answer
from cnmdriver.lab.chaos.faults import Ground
from cnmdriver.lab.chaos.notes import WRONG
from cnmdriver.lab.host import Host

LABEL = "pynet-chaos"
BOUND = 30.0
"""Seconds a command may take, those not counted in which its host was hurt."""
MOST = 4
"""Containers a user has at most."""
REST = (0.0, 0.4)
PORTS = range(20000, 20020)
PAST = {
    "start": "started again",
    "stop": "stopped",
    "restart": "restarted",
    "kill": "killed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A network that users know: its name, how it is made, and what `--ip` may be."""

    name: str
    create: tuple[str, ...]
    static: tuple[str, ...] = ()
    on: str = ""
    """The only host that has it; all have it if this is empty."""

    def key(self, host: str) -> str:
        """Return what is one for all containers that reach each other."""
        return f"{self.name}@{host}" if self.on else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One request to Docker, and how a person would have typed it."""

    words: str
    method: str
    path: str
    body: Mapping[str, Any] | None = None


def created(
    name: str,
    net: Net,
    address: str = "",
    port: int | None = None,
    *,
    always: bool = False,
) -> Command:
    """Return the command that makes a container; a port of 0 is Docker's choice."""
    words = ["docker create --name", name, "--network", net.name]
    endpoint: dict[str, Any] = {}
    host: dict[str, Any] = {"NetworkMode": net.name}
    exposed: dict[str, Any] = {}
    if address:
        words.append(f"--ip {address}")
        endpoint["IPAMConfig"] = {"IPv4Address": address}
    if port is not None:
        words.append(f"-p {port}:80")
        host["PortBindings"] = {"80/tcp": [{"HostPort": str(port)}]}
        exposed["80/tcp"] = {}
    if always:
        words.append("--restart always")
        host["RestartPolicy"] = {"Name": "always"}
    return Command(
        words=" ".join(words),
        method="POST",
        path=f"/containers/create?name={name}",
        body={
            "Image": image.NAME,
            "Cmd": ["sleep", "36000"],
            "Labels": {LABEL: ""},
            "ExposedPorts": exposed,
            "HostConfig": host,
            "NetworkingConfig": {"EndpointsConfig": {net.name: endpoint}},
        },
    )


def changed(verb: str, name: str) -> Command:
    """Return the command that starts, stops, restarts or kills a container."""
    more = "?t=0" if verb in {"stop", "restart"} else ""
    return Command(
        words=f"docker {verb} {name}",
        method="POST",
        path=f"/containers/{name}/{verb}{more}",
    )


def removed(name: str) -> Command:
    """Return the command that removes a container, running or not."""
    return Command(
        words=f"docker rm -f {name}",
        method="DELETE",
        path=f"/containers/{name}?force=1",
    )


def plugged(verb: str, net: Net, name: str) -> Command:
    """Return the command that connects or disconnects a container."""
    return Command(
        words=f"docker network {verb} {net.name} {name}",
        method="POST",
        path=f"/networks/{net.name}/{verb}",
        body={"Container": name},
    )


@dataclass(slots=True, kw_only=True)
class Known:
    """What a user last saw of a container."""

    running: bool = False
    networks: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class User:
    """A thread that makes, changes and removes containers of its own."""

    ground: Ground
    host: Host
    number: int
    nets: Sequence[Net]
    stop: threading.Event
    count: int = 0
    life: int = 0
    containers: dict[str, Known] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The name of the container that was made last."""
        return f"{self.host.name}-u{self.number}-c{self.count}"

    def work(self) -> None:
        """Go on until told to stop."""
        name = f"{self.ground.notes.seed} {self.host.name} {self.number}"
        rng = random.Random(name)  # noqa: S311 - the seed makes the run
        while not self.stop.is_set():
            if self.catch_up():
                self.turn(rng)
            self.stop.wait(rng.uniform(*REST))
        self.settle()

    def settle(self) -> None:
        """Start what does not run, and one container on each network, in peace."""
        if self.ground.ended.is_set():
            return
        if not self.catch_up():
            self.ground.notes.find(
                WRONG, f"dockerd on {self.host.name} does not answer"
            )
        for name in sorted(self.containers):
            if not self.containers[name].running:
                self.begin(name)
        for net in self.nets:
            self.count += 1
            name = self.name
            self.containers[name] = Known()
            if self.do(created(name, net), name):
                self.begin(name)

    def begin(self, name: str) -> None:
        """Start a container, when nothing stands in the way but what others have."""
        self.ground.history.end(name)
        if self.do(changed("start", name), name):
            self.ground.notes.count("commands", "started in the end")

    def turn(self, rng: random.Random) -> None:
        """Do one thing."""
        if not self.containers or (len(self.containers) < MOST and rng.random() < 0.4):
            self.run(rng)
            return
        name = rng.choice(sorted(self.containers))
        rng.choices(ACTS, WEIGHTS)[0](self, rng, name)

    def run(self, rng: random.Random) -> None:
        """Make a container and start it, as `docker run` does."""
        self.count += 1
        name = self.name
        net = rng.choice(self.nets)
        command = created(
            name,
            net,
            rng.choice(net.static) if net.static and rng.random() < 0.25 else "",
            rng.choice((*PORTS, 0)) if rng.random() < 0.25 else None,
            always=rng.random() < 0.3,
        )
        self.containers[name] = Known()
        if self.do(command, name) and self.do(changed("start", name), name):
            self.ground.notes.count("commands", "started")

    def change(self, rng: random.Random, name: str) -> None:
        """Start a container that does not run, or stop or restart one that does."""
        running = self.containers[name].running
        verb = rng.choice(("stop", "restart", "kill")) if running else "start"
        self.ground.history.end(name)
        if self.do(changed(verb, name), name):
            self.ground.notes.count("commands", PAST[verb])

    def remove(self, _rng: random.Random, name: str) -> None:
        """Remove a container."""
        self.ground.history.end(name)
        if self.do(removed(name), name):
            self.ground.notes.count("commands", "removed")

    def plug(self, rng: random.Random, name: str) -> None:
        """Connect a container to one more network, or disconnect it from one."""
        known = self.containers[name].networks
        net = rng.choice(self.nets)
        verb = "disconnect" if net.name in known else "connect"
        key = net.key(self.host.name)
        self.ground.history.end(name, key)
        if self.do(plugged(verb, net, name), name, key):
            self.ground.notes.count("commands", f"{verb}ed")

    def do(self, command: Command, name: str, network: str = "") -> bool:
        """Give a command, note how it ended and look at the container after it."""
        peace = self.stop.is_set()
        answer = self.give(command)
        if answer.done:
            self.ground.history.trust(name, network)
        else:
            self.ground.history.doubt(name, network)
            self.ground.notes.refuse(
                f"{self.ground.history.now():.1f} s, on {self.host.name}: "
                f"{command.words}",
                answer.text,
                peace=peace,
            )
        self.look(name)
        return answer.done

    def give(self, command: Command) -> Answer:
        """Ask Docker, and note a command that hung."""
        begin = time.monotonic()
        answer = docker.ask(self.host, command.method, command.path, command.body)
        end = time.monotonic()
        hurt = self.ground.hurt_for(self.host.name, begin, end)
        if end - begin - hurt > BOUND and not self.ground.ended.is_set():
            self.ground.notes.find(
                WRONG,
                f"`{command.words}` on {self.host.name} took {end - begin:.0f} s, "
                f"{hurt:.0f} of them under a fault; it ended "
                f"{self.ground.history.now():.1f} s after the start",
            )
        return answer

    def look(self, name: str) -> bool:
        """Read a container from Docker, and tell whether that was possible."""
        life = self.ground.history.life(self.host.name)
        answer = docker.ask(self.host, "GET", f"/containers/{name}/json")
        if answer.status == 404:
            self.containers.pop(name, None)
            self.unsure.discard(name)
            return True
        if not answer.done:
            self.unsure.add(name)
            return False
        self.unsure.discard(name)
        running = bool(answer.data["State"]["Running"])
        networks = answer.data["NetworkSettings"]["Networks"]
        self.containers[name] = Known(running=running, networks=tuple(networks))
        if running:
            keys = {net.name: net.key(self.host.name) for net in self.nets}
            found = [
                (keys[network], place[kind])
                for network, place in networks.items()
                for kind in ("IPAddress", "GlobalIPv6Address")
                if place[kind] and network in keys
            ]
            self.ground.history.begin(self.host.name, name, found, life)
        return True

    def catch_up(self) -> bool:
        """Look at all containers that a fault may have ended; tell if that was done."""
        life = self.ground.history.life(self.host.name)
        if life != self.life:
            self.unsure |= set(self.containers)
        if not all(self.look(name) for name in sorted(self.unsure)):
            return False
        self.life = life
        return True


ACTS: Sequence[Callable[[User, random.Random, str], None]] = (
    User.change,
    User.plug,
    User.remove,
)
WEIGHTS = (4, 4, 3)
"""How often users do which of them."""
