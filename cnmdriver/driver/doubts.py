"""
Networks of this host that Docker may not have.

A creation that fails in Docker after it succeeded here is not taken back: Docker sends
no DeleteNetwork for it. So it is when a daemon dies in CreateNetwork: Docker repeats
the call, before 29 with an empty body, is refused, and releases the pools. Two things
raise a doubt: a network without endpoints that an earlier life left, and a pool that is
released while its network is there. Docker's own list then tells.
"""

from collections.abc import Callable, Iterable

from cnmdriver.driver.site import Site


class Doubts:
    """The networks in doubt, by what Docker calls them."""

    def __init__(self, site: Site) -> None:
        """Doubt nothing yet."""
        self.site = site
        self.names: set[str] = set()
        self.alarm: Callable[[], None] = lambda: None
        """Called when there is something to look up."""

    def begin(self) -> None:
        """Doubt what an earlier life left, unless it is in use."""
        for member in self.site.members():
            if not self.site.endpoints(member.network):
                self.names.add(member.docker_id)

    def add(self, docker_id: str) -> None:
        """Doubt a network."""
        self.names.add(docker_id)
        self.alarm()

    def end(self, docker_ids: Iterable[str]) -> None:
        """Doubt networks no longer: Docker has them, or they are gone."""
        self.names.difference_update(docker_ids)
