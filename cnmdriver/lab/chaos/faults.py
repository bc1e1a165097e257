"""Make a fault on the machines of a lab, and undo it."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from cnmdriver.lab.chaos.history import History
from cnmdriver.lab.chaos.notes import WRONG, Notes
from cnmdriver.lab.chaos.schedule import CABLES, ETCD, Fault, kills
from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.node import Node
from cnmdriver.lab.process import LabError

MEND_LIMIT = 180.0
"""Seconds in which a daemon must have started again, whatever else is broken."""
RETRY = 0.5
LIVE = "--live-restore"


class Ground:
    """The machines of a lab, who is hurt now, and who was when."""

    def __init__(self, lab: Lab, history: History, notes: Notes) -> None:
        """Begin with nobody hurt."""
        self.lab = lab
        self.history = history
        self.notes = notes
        self.ended = threading.Event()
        self.live = {host.name: False for host in lab.hosts}
        self.hurt: dict[str, list[tuple[float, float | None]]] = {
            host.name: [] for host in lab.hosts
        }

    def make(self, fault: Fault) -> None:
        """Make a fault, keep it up as long as it lasts, and undo it."""
        self.look_after(fault)
        with self._hurting(fault):
            try:
                self.injure(fault)
                self.ended.wait(fault.lasts)
            finally:
                if not self.ended.is_set():
                    self.mend(fault)

    def injure(self, fault: Fault) -> None:
        """Begin a fault."""
        try:
            INJURIES[fault.what](self, fault)
        except LabError as error:
            # The cable of a machine that is off is gone: there is nothing to cut.
            if fault.lane != CABLES and not self.ended.is_set():
                self.notes.find(WRONG, f"{fault} could not be made: {error}")
            return
        self.notes.count("faults", fault.what)
        self.notes.count("kills", fault.what, kills(fault))

    def mend(self, fault: Fault) -> None:
        """Undo what a fault did, however far it came."""
        if fault.lane == CABLES:
            self.mend_cables()
            return
        nodes = [self.lab.node(name) for name in fault.where]
        for node in nodes:
            self.start(node, [LIVE] if fault.live else [])

    def mend_cables(self) -> None:
        """Let all machines reach each other again."""
        for pair in self.lab.outside.cuts():
            self.lab.mend(*pair)
        for host in self.lab.hosts:
            # One that is off gets a new cable when it boots.
            with suppress(LabError):
                host.plug()

    def heal(self) -> None:
        """Undo everything, on all machines."""
        self.mend_cables()
        for node in (*self.lab.members, *self.lab.hosts):
            self.start(node)

    def start(self, node: Node, live: Sequence[str] = ()) -> None:
        """Power a machine on, and start or resume its daemons; try again and again."""
        end = time.monotonic() + MEND_LIMIT
        while not self.ended.is_set():
            try:
                self._start(node, live)
                return
            except LabError as error:
                if time.monotonic() > end:
                    text = f"{node.name} did not come back: {error}"
                    self.notes.find(WRONG, text)
                    return
            self.ended.wait(RETRY)

    def look_after(self, fault: Fault) -> None:
        """Find daemons that have ended by themselves, before a fault is made."""
        if fault.lane != CABLES:
            names = fault.where if fault.lane != ETCD else ()
            self.find_ended([self.lab.node(name) for name in names])

    def find_ended(self, nodes: Sequence[Node]) -> None:
        """Note daemons that nobody has ended and that do not run, and start them."""
        for node in nodes:
            missing = [name for name in node.at_boot if node.service(name) is None]
            for name in missing:
                self.notes.find(
                    WRONG,
                    f"{name} on {node.name} has ended by itself; its log ends with:\n"
                    f"{node.log_tail(name)}",
                )
            if missing:
                self.start(node)

    def hurt_for(self, host: str, since: float, until: float) -> float:
        """Return how long in a time a host was not itself."""
        total = 0.0
        for begin, end in self.hurt[host]:
            last = until if end is None else min(end, until)
            total += max(0.0, last - max(begin, since))
        return total

    def _start(self, node: Node, live: Sequence[str]) -> None:
        if not node.is_on:
            node.boot()
        for name in node.at_boot:
            if node.service(name):
                node.resume(name)
                continue
            if name == "dockerd":
                self.live[node.name] = bool(live)
            node.start(name, live if name == "dockerd" else ())

    @contextmanager
    def _hurting(self, fault: Fault) -> Iterator[None]:
        names = [name for name in fault.where if fault.lane not in {ETCD, CABLES}]
        for name in names:
            self.hurt[name].append((time.monotonic(), None))
        try:
            yield
        finally:
            for name in names:
                begin, _ = self.hurt[name][-1]
                self.hurt[name][-1] = (begin, time.monotonic())


def _host(ground: Ground, fault: Fault) -> Host:
    return ground.lab.host(fault.where[0])


@contextmanager
def _ending_stays(ground: Ground, fault: Fault) -> Iterator[None]:
    """End the stays of a host, unless its containers outlive its dockerd."""
    name = fault.where[0]
    outlived = fault.live and ground.live[name]
    if not outlived:
        ground.history.end_host(name)
    try:
        yield
    finally:
        # Until it was gone, dockerd may have told somebody that containers run.
        if not outlived:
            ground.history.end_host(name)


def _kill_pynet(ground: Ground, fault: Fault) -> None:
    _host(ground, fault).kill_pynet()


def _restart_pynet(ground: Ground, fault: Fault) -> None:
    _host(ground, fault).stop_pynet()


def _pause_pynet(ground: Ground, fault: Fault) -> None:
    _host(ground, fault).pause("pynet")


def _kill_dockerd(ground: Ground, fault: Fault) -> None:
    with _ending_stays(ground, fault):
        _host(ground, fault).kill_dockerd()


def _restart_dockerd(ground: Ground, fault: Fault) -> None:
    with _ending_stays(ground, fault):
        _host(ground, fault).stop_dockerd()


def _kill_both(ground: Ground, fault: Fault) -> None:
    with _ending_stays(ground, fault):
        _host(ground, fault).kill_pynet()
        _host(ground, fault).kill_dockerd()


def _power_cut(ground: Ground, fault: Fault) -> None:
    with _ending_stays(ground, fault):
        _host(ground, fault).power_cut()


def _kill_etcd(ground: Ground, fault: Fault) -> None:
    for name in fault.where:
        ground.lab.member(name).kill_etcd()


def _restart_etcd(ground: Ground, fault: Fault) -> None:
    for name in fault.where:
        ground.lab.member(name).stop_etcd()


def _pause_etcd(ground: Ground, fault: Fault) -> None:
    for name in fault.where:
        ground.lab.member(name).pause()


def _cut(ground: Ground, fault: Fault) -> None:
    first, *others = fault.where
    for other in others:
        ground.lab.cut(first, other)


def _unplug(ground: Ground, fault: Fault) -> None:
    _host(ground, fault).unplug()


INJURIES: Mapping[str, Callable[[Ground, Fault], None]] = {
    "kill pynet": _kill_pynet,
    "restart pynet": _restart_pynet,
    "pause pynet": _pause_pynet,
    "pause pynet past its lease": _pause_pynet,
    "kill dockerd": _kill_dockerd,
    "restart dockerd": _restart_dockerd,
    "kill both": _kill_both,
    "power cut": _power_cut,
    "kill etcd": _kill_etcd,
    "restart etcd": _restart_etcd,
    "pause etcd": _pause_etcd,
    "cut host from one member": _cut,
    "cut host from all members": _cut,
    "cut hosts": _cut,
    "cut members": _cut,
    "unplug host": _unplug,
}
