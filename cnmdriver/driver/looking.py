"""
A look: all that is wanted on this host against all that its kernel has.

There can be tens of thousands of operations. They are put together and compared in
portions, and between two of these whoever works on a network goes first: a call of
Docker's waits for a portion, not for the look.
"""

from collections.abc import AsyncIterator, Iterable, Mapping
from itertools import chain, islice
from typing import Final, TypeVar

from cnmdriver.courtesy import Courtesy
from cnmdriver.driver.site import Site
from cnmdriver.plan import ops
from cnmdriver.plan.ops import Difference, Key, Op, Plan

PORTION: Final = 64
"""So many plans or operations are worked on without a break: about a millisecond."""

T = TypeVar("T")


class Look:
    """One comparison."""

    def __init__(self, site: Site) -> None:
        """Take the host."""
        self._site = site
        self._courtesy = Courtesy(site.locks.idle)
        self.found: Plan = ()
        """What the kernel had, once compared."""
        self.passed_over = False
        """Whether anything differed that was passed over."""

    async def difference(self) -> Difference:
        """
        Read the kernel, and compare it with what is wanted by then.

        What began or ceased to be wanted meanwhile may be read as it was or as it is,
        and is passed over.
        """
        before = await self._wanted()
        self.found = await self._site.dataplane.found(tuple(before.values()))
        # Asked for only now: a record is written before the kernel hears of it, so
        # whatever was found has its record by this time, or is to go.
        now = await self._wanted()
        difference = await self._contrast(now)
        moving = {k for k in difference.amiss() if before.get(k) != now.get(k)}
        self.passed_over = bool(moving)
        return ops.less(difference, moving)

    async def _wanted(self) -> Mapping[Key, Op]:
        """Put all plans together; what changes meanwhile is as it was or as it is."""
        site, basis = self._site, self._site.basis()
        if site.latest[0] != basis:
            wanted: dict[Key, Op] = {}
            async for plans in self._portions(site.plans()):
                wanted.update(ops.keyed(plans))
            if site.basis() != basis:
                return wanted
            site.latest = basis, wanted
        return site.latest[1]

    async def _contrast(self, want: Mapping[Key, Op]) -> Difference:
        have: dict[Key, Op] = {}
        async for plan in self._portions(self.found):
            have.update(ops.keyed((plan,)))
        surplus = (key for key in have if key not in want)
        keys = chain(want, surplus)
        return ops.together(
            [ops.contrast(some, want, have) async for some in self._portions(keys)]
        )

    async def _portions(self, things: Iterable[T]) -> AsyncIterator[tuple[T, ...]]:
        """Yield some at a time, and let others go first in between."""
        rest = iter(things)
        while some := tuple(islice(rest, PORTION)):
            yield some
            await self._courtesy.stand_back()
