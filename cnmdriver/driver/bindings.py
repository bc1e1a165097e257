"""
Which MAC each address of a network has, as far as a neighbour could be wrong about it.

A MAC follows from the IPv4 address, so that whoever has the address next has the MAC
that its neighbours know. It is otherwise where a user chose the MAC, and with the IPv6
address of an endpoint that has both: when such a binding changes, containers are told.
"""

from collections.abc import Mapping

from cnmdriver.model import Endpoint, IPAddress
from cnmdriver.plan import devices

News = tuple[tuple[IPAddress, str], ...]


class Bindings:
    """What was last known of addresses whose MAC does not follow from them."""

    def __init__(self) -> None:
        """Know of none."""
        self.odd: dict[str, dict[IPAddress, str]] = {}
        self.fresh: dict[str, dict[IPAddress, str]] = {}

    def note(self, endpoint: Endpoint) -> None:
        """Take in an endpoint's record."""
        odd = self.odd.setdefault(endpoint.network, {})
        for face in endpoint.addresses:
            usual = devices.mac(face.ip)
            if odd.get(face.ip, usual) != endpoint.mac:
                self.fresh.setdefault(endpoint.network, {})[face.ip] = endpoint.mac
            if endpoint.mac == usual:
                odd.pop(face.ip, None)
            else:
                odd[face.ip] = endpoint.mac
        if not odd:
            del self.odd[endpoint.network]

    def forget(self, network: str) -> None:
        """Drop what is known of a network that is gone."""
        self.odd.pop(network, None)
        self.fresh.pop(network, None)

    def news(self) -> Mapping[str, News]:
        """Return what changed since this was last asked, by network."""
        fresh, self.fresh = self.fresh, {}
        return {network: tuple(found.items()) for network, found in fresh.items()}
