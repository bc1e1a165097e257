"""
A chaos run: users on every host, faults below them, and then the truth.

The lab's hosts get some networks; users make, change and remove containers all the
time, while a schedule of faults (`schedule.py`) is played. In the end all is healed,
and it is looked whether an address was given twice, who reaches whom, and, when all is
removed again, whether anything is left.
"""

import random
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnmdriver.lab.chaos import oracle
from cnmdriver.lab.chaos.faults import Ground
from cnmdriver.lab.chaos.history import History
from cnmdriver.lab.chaos.notes import WRONG, Notes
from cnmdriver.lab.chaos.schedule import Fault, schedule
from cnmdriver.lab.chaos.users import Net, User
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.process import LabError

HOSTS = 3
MEMBERS = 3
USERS = 2
"""Users on each host."""
JOIN_LIMIT = 240.0
"""Seconds in which every thread must have come to its end."""
POLL = 0.2
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is to be."""

    seed: int
    seconds: float
    least_kills: int = 0
    users: int = USERS


def new_seed() -> int:
    """Return a seed that no run had."""
    return random.SystemRandom().randrange(1_000_000)


def whole(place: Path, plan: Plan, say: Say, keep: bool) -> Notes:
    """
    Make a chaos run in the lab of a directory, and return what was found.

    Where there is no lab yet, one of three hosts and three members is made, and taken
    down in the end; with `keep` only if nothing was found.
    """
    say(f"seed {plan.seed}: `pynet lab chaos --seed {plan.seed}` makes these faults")
    if (place / "lab.json").exists():
        return play(Lab.attach(place), plan, say)
    lab = Lab.create(place, HOSTS, etcd=MEMBERS)
    lab.up()
    kept = False
    try:
        notes = play(lab, plan, say)
        kept = keep and not notes.well
    finally:
        if kept:
            say(f"the lab is kept: pynet lab ls --dir {place}")
        else:
            _take_down(lab)
    return notes


def _take_down(lab: Lab) -> None:
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        lab.down()
        # A thread that was just making a fault may have booted a machine again.
        lab.down()
    finally:
        signal.signal(signal.SIGINT, old)


def play(lab: Lab, plan: Plan, say: Say) -> Notes:
    """Make a chaos run on a lab that is up, and return what was found."""
    nets = networks(lab)
    before = oracle.state(lab)
    make(lab, nets)
    notes = Notes(seed=plan.seed, say=say)
    history = History()
    ground = Ground(lab, history, notes)
    try:
        hurt(ground, nets, plan, say)
        judge(ground, nets, say)
        oracle.check_left(lab, before, notes)
    except LabError as error:
        notes.find(WRONG, f"the run could not be completed: {error}")
    finally:
        ground.ended.set()
        notes.seconds = history.now()
    return notes


def judge(ground: Ground, nets: Sequence[Net], say: Say) -> None:
    """Check all that must hold, and remove everything."""
    lab, notes = ground.lab, ground.notes
    oracle.check_calm(lab, notes)
    oracle.check_history(lab, ground.history, notes)
    say("calm: who reaches whom?")
    oracle.check_reach(lab, nets, ground.history, notes)
    say("removing all")
    oracle.clear(lab, nets, notes)
    oracle.check_logs(lab, notes)


def networks(lab: Lab) -> tuple[Net, ...]:
    """Return the networks of a run: three of all hosts, and one of each host's own."""
    some = [f"10.77.0.{number}" for number in range(2, 12)]
    shared = (
        Net(
            name="chaos-wide",
            create=pools("10.77.0.0/24", "fd77::/64"),
            static=tuple(some),
        ),
        Net(
            name="chaos-own",
            create=("-o", "pynet.gateway=pynet", *pools("10.78.0.0/24", "fd78::/64")),
        ),
        Net(name="chaos-small", create=pools("10.79.0.0/28")),
    )
    own = [
        Net(
            name=f"chaos-{host.name}",
            create=("-o", "pynet.mode=bridge", *pools(f"10.80.{number}.0/24")),
            on=host.name,
        )
        for number, host in enumerate(lab.hosts)
    ]
    return (*shared, *own)


def pools(*subnets: str) -> tuple[str, ...]:
    """Return the options that give a network its subnets; the second is IPv6."""
    six = ("--ipv6",) if len(subnets) > 1 else ()
    return (*six, *(word for subnet in subnets for word in ("--subnet", subnet)))


def make(lab: Lab, nets: Sequence[Net]) -> None:
    """Create the networks on their hosts."""
    for net in nets:
        for host in lab.hosts:
            if net.on in {"", host.name}:
                kind = ("-d", "pynet", "--ipam-driver", "pynet")
                host.docker("network", "create", *kind, *net.create, net.name)


def hurt(ground: Ground, nets: Sequence[Net], plan: Plan, say: Say) -> None:
    """Let users work and faults happen, till the schedule is over."""
    faults = schedule(
        plan.seed,
        [host.name for host in ground.lab.hosts],
        [member.name for member in ground.lab.members],
        seconds=plan.seconds,
        least_kills=plan.least_kills,
    )
    end = 0.0 if plan.least_kills else plan.seconds
    stop = threading.Event()
    users = [
        User(ground=ground, host=host, number=number, stop=stop, nets=known)
        for host in ground.lab.hosts
        for known in [[net for net in nets if net.on in {"", host.name}]]
        for number in range(plan.users)
    ]
    lanes = [Lane(ground, name, faults, end, say) for name in sorted(lanes_of(faults))]
    working = [spawn(user.work, ground) for user in users]
    hurting = [spawn(lane.work, ground) for lane in lanes]
    try:
        wait_for(hurting, ground)
        ground.ended.wait(max(0.0, end - ground.history.now()))
        say("all faults are over: healing")
        ground.heal()
        ground.find_ended(ground.lab.nodes)
        oracle.check_calm(ground.lab, ground.notes)
    finally:
        stop.set()
    wait_for(working, ground, JOIN_LIMIT)


def lanes_of(faults: Sequence[Fault]) -> set[str]:
    """Return the names of the lanes that have faults."""
    return {fault.lane for fault in faults}


@dataclass(slots=True)
class Lane:
    """Makes the faults of one lane in their order, none before its time."""

    ground: Ground
    name: str
    faults: Sequence[Fault]
    end: float
    say: Say

    def work(self) -> None:
        """Play the lane; one that is late drops what would last beyond the end."""
        for fault in self.faults:
            if fault.lane != self.name:
                continue
            now = self.ground.history.now
            if self.ground.ended.wait(max(0.0, fault.at - now())):
                return
            if self.end and now() + fault.lasts > self.end:
                continue
            self.say(f"{now():7.1f} s  {fault}")
            self.ground.make(fault)


def spawn(work: Callable[[], None], ground: Ground) -> threading.Thread:
    """Start a thread; what it dies of is a finding."""

    def whole() -> None:
        try:
            work()
        except (LabError, OSError, LookupError, TypeError, ValueError) as error:
            if not ground.ended.is_set():
                ground.notes.find(WRONG, f"the run itself is at fault: {error!r}")

    thread = threading.Thread(target=whole, daemon=True)
    thread.start()
    return thread


def wait_for(
    threads: Sequence[threading.Thread], ground: Ground, limit: float = 1e9
) -> None:
    """Wait for threads to end; note those that do not."""
    end = ground.history.now() + limit
    for thread in threads:
        while thread.is_alive() and ground.history.now() < end:
            # In small steps: Python hears of Ctrl-C between them.
            thread.join(POLL)
    if any(thread.is_alive() for thread in threads):
        ground.notes.find(WRONG, f"a user's command did not end within {limit:g} s")
