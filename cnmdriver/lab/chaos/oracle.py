"""What must hold when all faults of a chaos run are over."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import permutations
from urllib.parse import quote

from cnmdriver.lab.chaos import docker
from cnmdriver.lab.chaos.history import KEPT, History, State, Stay, twice
from cnmdriver.lab.chaos.notes import DUPLICATES, LEAKS, MANUAL, WRONG, Notes
from cnmdriver.lab.chaos.users import LABEL, Net
from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.machine import wait_until
from cnmdriver.lab.process import LabError

PREFIX = "/pynet/v1/"
CALM_LIMIT = 90.0
CLEAN_LIMIT = 30.0
PINGS_AT_ONCE = 6
ACTIVE = "has active endpoints"
TRACE = "Traceback (most recent call last)"
TRACE_LINES = 40
TELLING = 12
"""Log lines shown about a finding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A running container, where its sandbox is, and its addresses on one network."""

    host: Host
    name: str
    sandbox: str
    addresses: tuple[str, ...]


def is_calm(host: Host) -> bool:
    """Tell whether a host says that all is well, and that nothing differs."""
    return not amiss(host)


def amiss(host: Host) -> str:
    """Return what a host says is wrong, nothing if all is well."""
    texts = []
    for command in ("status", "diff"):
        done = host.pynet(command, check=False)
        if done.returncode:
            texts.append(f"pynet {command} on {host.name}:\n{done.stdout}{done.stderr}")
    return "\n".join(texts)


def check_calm(lab: Lab, notes: Notes) -> None:
    """Wait until all hosts are well; note those that are not."""
    end = time.monotonic() + CALM_LIMIT
    for host in lab.hosts:
        if not wait_until(lambda host=host: is_calm(host), end - time.monotonic()):  # type: ignore[misc]
            notes.find(WRONG, f"not well {CALM_LIMIT:g} s after all: {amiss(host)}")


def check_history(lab: Lab, history: History, notes: Notes) -> None:
    """Note each address that two containers had at one time."""
    for one, other in twice(history.stays()):
        notes.find(
            DUPLICATES,
            f"{one.address} of {one.network}: {one} and {other}\n"
            f"{told(lab, (one.host, other.host), names(one, other))}",
        )


def names(*stays: Stay) -> set[str]:
    """Return the words by which logs may speak of stays."""
    return {stay.address for stay in stays}


def told(lab: Lab, hosts: Iterable[str], words: set[str]) -> str:
    """Return the last lines in which the daemons of hosts speak of something."""
    lines = []
    for name in sorted(set(hosts)):
        text = lab.host(name).log("pynet").splitlines()
        found = [line for line in text if any(word in line for word in words)]
        lines += [f"  {name}: {line}" for line in found[-TELLING:]]
    return "\n".join(lines)


def check_logs(lab: Lab, notes: Notes) -> None:
    """Note each daemon of ours that has logged a trace: nobody foresaw that."""
    for host in lab.hosts:
        lines = host.log("pynet").splitlines()
        found = [n for n, line in enumerate(lines) if line.startswith(TRACE)]
        if found:
            block = lines[max(0, found[0] - 2) : found[0] + TRACE_LINES]
            shown = "\n".join(line for line in block if not line.startswith("{"))
            notes.find(
                WRONG,
                f"pynet on {host.name} has logged {len(found)} traces; the first is\n"
                f"{shown}",
            )


def check_reach(lab: Lab, nets: Sequence[Net], history: History, notes: Notes) -> None:
    """Note the running containers of a network that do not reach each other."""
    for net in nets:
        places = [
            place
            for host in lab.hosts
            for place in running(host, net)
            if (place.name, net.key(host.name)) not in history.doubts
        ]
        groups = [places]
        if net.on:
            groups = [[p for p in places if p.host is host] for host in lab.hosts]
        for group in groups:
            _check_group(net, group, notes)


def _check_group(net: Net, group: Sequence[Place], notes: Notes) -> None:
    asked = [
        (one, other, address)
        for one, other in permutations(group, 2)
        for address in other.addresses
    ]
    notes.count("commands", "pairs pinged", len(asked))
    with ThreadPoolExecutor(PINGS_AT_ONCE) as pool:
        answers = pool.map(lambda pair: reaches(pair[0], pair[2]), asked)
        failed = [pair for pair, well in zip(asked, answers, strict=True) if not well]
    for one, other, address in failed:
        if not reaches(one, address):
            notes.find(
                WRONG,
                f"{one.name} on {one.host.name} does not reach {other.name} on "
                f"{other.host.name}, {address} of {net.name}\n"
                f"{traced(one, address)}",
            )


def traced(place: Place, address: str) -> str:
    """Return what `pynet trace` says of a way, and whether it is open after that."""
    begin = time.monotonic()
    try:
        text = place.host.pynet("trace", place.name, address, check=False).stdout
    except LabError as error:
        text = str(error)
    later = reaches(place, address)
    answer = "answers" if later else "does not answer"
    return f"{text}\n{time.monotonic() - begin:.1f} s later it {answer}"


def reaches(place: Place, address: str) -> bool:
    """Ping an address from a container, as its namespace is, once."""
    ping = ("busybox", "ping", "-c1", "-W2", address)
    try:
        enter = ("nsenter", f"--net={place.sandbox}")
        return place.host.exec(*enter, *ping, check=False).returncode == 0
    except LabError:
        return False


def running(host: Host, net: Net) -> Iterator[Place]:
    """Yield the containers that Docker says run on a network."""
    filters = json.dumps({"label": [LABEL], "status": ["running"]})
    answer = docker.ask(host, "GET", f"/containers/json?filters={quote(filters)}")
    if not answer.done:
        raise LabError(f"dockerd on {host.name} lists no containers: {answer.text}")
    for listed in answer.data:
        shown = docker.ask(host, "GET", f"/containers/{listed['Id']}/json").data
        place = shown["NetworkSettings"]["Networks"].get(net.name)
        if place:
            kinds = ("IPAddress", "GlobalIPv6Address")
            yield Place(
                host=host,
                name=shown["Name"].strip("/"),
                sandbox=shown["NetworkSettings"]["SandboxKey"],
                addresses=tuple(place[kind] for kind in kinds if place[kind]),
            )


def clear(lab: Lab, nets: Sequence[Net], notes: Notes) -> None:
    """Remove all containers and networks as a user does, once more what failed."""
    with ThreadPoolExecutor(len(lab.hosts)) as pool:
        list(pool.map(lambda host: _clear_containers(host, notes), lab.hosts))
    for host in lab.hosts:
        for net in nets:
            if net.on in {"", host.name}:
                _twice(notes, host, "network", "rm", net.name)


def _clear_containers(host: Host, notes: Notes) -> None:
    found = host.docker("ps", "-aq", "--filter", f"label={LABEL}").stdout.split()
    for container in found:
        _twice(notes, host, "rm", "-f", container)


def _twice(notes: Notes, host: Host, *words: str) -> None:
    texts = []
    for _ in range(2):
        begin = time.monotonic()
        try:
            done = host.docker(*words, check=False)
        except LabError as error:
            texts.append(str(error))
            continue
        if done.returncode == 0:
            break
        texts.append(f"{done.stderr.strip()} ({time.monotonic() - begin:.1f} s)")
        if ACTIVE in done.stderr and has_lost_count(host, words[-1]):
            notes.count("commands", "dockerd made to count anew")
            host.stop_dockerd()
            host.start_dockerd()
    command = f"docker {' '.join(words)} on {host.name}"
    if texts:
        notes.count("commands", "removals repeated")
        notes.refuse(f"in the end, {command}", texts[0])
    if len(texts) > 1:
        notes.find(MANUAL, f"{command} failed twice: {' / '.join(texts)}")


def has_lost_count(host: Host, network: str) -> bool:
    """
    Tell whether Docker takes a network for used that it knows no endpoint of.

    All who come and go change one object, and one may undo what another did; it counts
    again when it starts (libnetwork endpoint_cnt.go atomicIncDecEpCnt, endpoint.go
    cleanupLocalEndpoints).
    """
    shown = ("network", "inspect", "-f", "{{len .Containers}}", network)
    return host.docker(*shown).stdout.strip() == "0"


def check_left(lab: Lab, before: State, notes: Notes) -> None:
    """Note all that is there and was not at the start."""
    wait_until(lambda: not state(lab).beyond(before), CLEAN_LIMIT)
    for thing in state(lab).beyond(before):
        notes.find(LEAKS, thing)


def state(lab: Lab) -> State:
    """Return what pynet owns on each host, and what the store and dockerds have."""
    found: dict[str, tuple[str, ...]] = {"etcd": keys(lab.hosts[0])}
    questions: dict[str, Callable[[Host], tuple[str, ...]]] = {
        "census": census,
        "networks of docker": networks,
        "containers of docker": containers,
    }
    for host in lab.hosts:
        found |= {f"{what} on {host.name}": q(host) for what, q in questions.items()}
    return State(things=found)


def keys(host: Host) -> tuple[str, ...]:
    """Return what etcd has of pynet, less what hosts keep there."""
    done = host.exec("etcdctl", "get", "--prefix", PREFIX, "--keys-only")
    found = [line.removeprefix(PREFIX) for line in done.stdout.split()]
    return tuple(key for key in sorted(found) if not key.startswith(KEPT))


def census(host: Host) -> tuple[str, ...]:
    """Return what pynet owns on a host, and what it found of others."""
    shown = json.loads(host.pynet("census", "--json").stdout)
    things = [*shown["owned"], *shown["foreign"]]
    return tuple(sorted(json.dumps(thing, sort_keys=True) for thing in things))


def networks(host: Host) -> tuple[str, ...]:
    """Return the names of a dockerd's networks."""
    shown = host.docker("network", "ls", "--format", "{{.Name}}").stdout
    # Docker makes it for the first overlay network and keeps it.
    return tuple(sorted(name for name in shown.split() if name != "docker_gwbridge"))


def containers(host: Host) -> tuple[str, ...]:
    """Return the names of a dockerd's containers."""
    shown = host.docker("ps", "-a", "--format", "{{.Names}}").stdout
    return tuple(sorted(shown.split()))
