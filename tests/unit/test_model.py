"""The records' few answers, and the errors' texts."""

from dataclasses import FrozenInstanceError, replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv6Address,
    IPv6Interface,
    ip_address,
    ip_interface,
    ip_network,
)

import pytest

from cnmdriver import errors, model
from cnmdriver.model import Endpoint, Member, Network, Subnet

FOUR = Subnet(
    space="local", pool=ip_network("10.1.0.0/24"), gateway=IPv4Address("10.1.0.1")
)
SIX = Subnet(space="local", pool=ip_network("fd00::/64"))
NETWORK = Network(id="n", mode="bridge", subnets=(FOUR, SIX), mtu=1500)


def test_gateway_has_the_prefix_of_its_pool():
    """A gateway as an interface has the pool's prefix length; none stays none."""
    assert FOUR.gateway_interface == IPv4Interface("10.1.0.1/24")
    assert SIX.gateway_interface is None
    six = replace(SIX, gateway=IPv6Address("fd00::1"))
    assert six.gateway_interface == IPv6Interface("fd00::1/64")


@pytest.mark.parametrize(
    ("address", "subnet"),
    [
        ("10.1.0.0", FOUR),
        ("10.1.0.255", FOUR),
        ("fd00::5", SIX),
        ("10.1.1.0", None),
        ("::1", None),
    ],
)
def test_subnet_of(address, subnet):
    """An address belongs to the subnet whose pool holds it."""
    assert NETWORK.subnet_of(ip_address(address)) is subnet


def test_has():
    """A network has the IP versions of its subnets."""
    assert NETWORK.has(4) is True
    assert NETWORK.has(6) is True
    assert replace(NETWORK, subnets=(FOUR,)).has(6) is False
    assert replace(NETWORK, subnets=(SIX,)).has(4) is False
    assert replace(NETWORK, subnets=()).has(4) is False


def test_endpoint_addresses():
    """IPv4 comes first, and what an endpoint has not got is left out."""
    four, six = ip_interface("10.1.0.2/24"), ip_interface("fd00::2/64")
    endpoint = Endpoint(network="n", id="e", host="h", boot="b", mac="m")
    assert endpoint.addresses == ()
    assert replace(endpoint, ipv6=six).addresses == (six,)
    assert replace(endpoint, ipv4=four).addresses == (four,)
    assert replace(endpoint, ipv6=six, ipv4=four).addresses == (four, six)


def test_interface():
    """An address and a pool's prefix length make an interface of the same family."""
    found = model.interface(ip_address("10.1.0.2"), ip_network("10.1.0.0/16"))
    assert found == IPv4Interface("10.1.0.2/16")
    found = model.interface(ip_address("fd00::2"), ip_network("fd00::/48"))
    assert found == IPv6Interface("fd00::2/48")


def test_defaults():
    """What nobody says of a network is what Docker's own bridge does."""
    assert (NETWORK.internal, NETWORK.icc, NETWORK.masquerade) == (False, True, True)
    assert NETWORK.gateway == "pynet"
    member = Member(network="n", host="h")
    assert (member.docker_id, member.prefix, member.claims) == ("", "eth", ())


def test_records_do_not_change():
    """A record is a value: another content is another value."""
    with pytest.raises(FrozenInstanceError):
        NETWORK.mtu = 9000  # type: ignore[misc]
    assert replace(NETWORK, mtu=9000) != NETWORK
    assert hash(replace(NETWORK)) == hash(NETWORK)


def test_protocols():
    """Protocols have the numbers of IANA and nftables' names."""
    assert model.PROTOCOLS == {6: "tcp", 17: "udp", 132: "sctp"}


@pytest.mark.parametrize(
    "kind",
    [
        errors.InvalidParameter,
        errors.NotFound,
        errors.Conflict,
        errors.Exhausted,
        errors.StoreError,
        errors.KernelError,
    ],
)
def test_errors_are_their_text(kind):
    """All errors are of one family, and their text is what was said."""
    error = kind("pool 10.1.0.0/24 is taken")
    assert isinstance(error, errors.DriverError)
    assert str(error) == "pool 10.1.0.0/24 is taken"
