"""Where a packet ends, in one line, from the steps and the probes of a trace."""

from collections.abc import Iterable
from dataclasses import dataclass

from cnmdriver.model import Hop
from cnmdriver.plan.sight import Echo

FAR_SIDE = "far side"
"""The step that says that the other host was not looked at."""
SMALL = 84
"""Bytes of an ordinary ping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A step, and the host it is on."""

    host: str
    hop: Hop


@dataclass(frozen=True, slots=True)
class Below:
    """What is known of what lies between two hosts."""

    base: Echo | None
    """A ping from end to end of the tunnels."""
    arrived: int | None
    """Frames that arrived while packets were sent, None if that is not known."""


def is_reached(probes: Iterable[Echo]) -> bool:
    """Tell whether every probe was answered, and there was one."""
    answers = [echo.answered for echo in probes]
    return bool(answers) and all(answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Where a packet ends, in one line, and what mends that."""

    line: str
    remedy: str = ""
    at: Seen | None = None
    """The step that is amiss, if one is."""


def judge(
    path: list[Seen], probes: tuple[Echo, ...], *, below: Below, there: str
) -> Verdict:
    """Say where a packet ends, or that it does not; `there` is the other host."""
    amiss = next((seen for seen in path if seen.hop.well is False), None)
    if is_reached(probes):
        return reached(probes, amiss)
    if amiss is not None:
        hop = amiss.hop
        line = f"dies on {amiss.host}, {hop.name}: {hop.found}"
        return Verdict(line=line, remedy=hop.remedy, at=amiss)
    if is_reached(echo for echo in probes if echo.size == SMALL):
        return too_large(next(echo for echo in probes if not echo.answered))
    unsent = next((echo.error for echo in probes if echo.error), "")
    if unsent or not probes:
        return unable(unsent)
    unseen = next((seen for seen in path if seen.hop.well is None), None)
    return beyond(below, there) if unseen is None else dark(unseen)


def dark(unseen: Seen) -> Verdict:
    """Say that it ends at what could not be looked at."""
    host, hop = unseen.host, unseen.hop
    if hop.name == FAR_SIDE:
        line = f"dies where this host cannot see: all of its own is well, {host} was "
        remedy = f"run pynet trace on {host}, or start pynet there"
        return Verdict(line=line + hop.found, remedy=remedy)
    line = f"dies where nobody looked: on {host}, {hop.name}: {hop.found}"
    return Verdict(line=line, remedy=hop.remedy or f"on {host}: pynet status")


def unable(error: str) -> Verdict:
    """Say that no packet left, though nothing amiss was seen."""
    if not error:
        return Verdict(line="nothing was sent: the two share no kind of address")
    return Verdict(
        line=f"no packet could be sent from the container: {error}",
        remedy="pynet status tells what the daemon may not do",
    )


def too_large(dead: Echo) -> Verdict:
    """Say that only small packets pass."""
    line = f"packets of {SMALL} bytes reach {dead.to}, those of {dead.size} die: "
    return Verdict(
        line=line + "something on the way has a smaller MTU",
        remedy="pynet doctor finds what the way has room for",
    )


def reached(probes: tuple[Echo, ...], amiss: Seen | None) -> Verdict:
    """Say that packets arrive, and what is not as it should be all the same."""
    times = {str(e.to): e.milliseconds for e in probes if e.size == SMALL}
    said = ", ".join(f"{to} answers in {ms:g} ms" for to, ms in times.items())
    if amiss is None:
        return Verdict(line=f"reachable: {said}")
    hop = amiss.hop
    line = f"reachable: {said}; but on {amiss.host}, {hop.name}: {hop.found}"
    return Verdict(line=line, remedy=hop.remedy, at=amiss)


def beyond(below: Below, there: str) -> Verdict:
    """Say what is left when nothing amiss was seen on any host."""
    base = below.base
    if base is None:
        return Verdict(
            line="dies although all is well: the container itself may drop pings",
            remedy="look at the container's own packet filter",
        )
    if not base.answered:
        line = "dies between the hosts: all is well on both, and "
        return Verdict(
            line=f"{line}{base.to} answers no ping either",
            remedy="look at what is between the hosts: cables, switches, routers",
        )
    advice = "let UDP of the tunnels' port pass between the hosts, both ways "
    advice += "(routers, security groups)"
    if below.arrived == 0:
        line = "dies between the hosts: all is well on both, pings of hosts pass, and "
        return Verdict(line=f"{line}no frame arrives at {there}", remedy=advice)
    line = f"dies beyond {there}'s tunnel: all is well on both hosts, frames arrive "
    return Verdict(
        line=line + "there, and no answer comes back",
        remedy=f"{advice}; or the container itself drops pings",
    )
