"""What an endpoint's port lets out: whole plans."""

import re
from dataclasses import replace
from ipaddress import ip_interface, ip_network

import pytest

from cnmdriver.model import Endpoint, Network, Subnet
from cnmdriver.plan import antispoof, overlay
from cnmdriver.plan.ops import Element

FOUR = Subnet(space="local", pool=ip_network("10.1.0.0/24"))
SIX = Subnet(space="local", pool=ip_network("fd00::/64"))
NETWORK = Network(id="red", mode="bridge", subnets=(FOUR, SIX), mtu=1450)
ENDPOINT = Endpoint(
    network="red",
    id="web",
    host="0123456789",
    boot="b",
    mac="02:42:0a:01:00:02",
    ipv4=ip_interface("10.1.0.2/24"),
    ipv6=ip_interface("fd00::2/64"),
)
PORT = '"pe-4b5e57f6eb"'


def element(name, *item):
    """Return an element about the port."""
    return Element(where="blue", family="bridge", set=name, item=(PORT, *item))


def test_endpoint():
    """A port lets out its MAC, its addresses and the one of its link, and comes last."""
    assert antispoof.endpoint(NETWORK, ENDPOINT, "blue") == (
        element("macs", "02:42:0a:01:00:02"),
        element("ips4", "10.1.0.2"),
        element("ips6", "fd00::2"),
        element("ips6", "fe80::42:aff:fe01:2"),
        element("targets", "0xfd000000000000000000000000000002"),
        element("targets", "0xfe8000000000000000420afffe010002"),
        element("ports"),
    )


def test_endpoint_of_one_family():
    """Without IPv6 the link's own address is let out still, as any kernel uses it."""
    found = antispoof.endpoint(NETWORK, replace(ENDPOINT, ipv6=None), "blue")
    sets = [op.set for op in found]
    assert sets == ["macs", "ips4", "ips6", "targets", "ports"]


def test_spoofing_allowed():
    """On a network where containers may spoof nothing is looked at."""
    assert antispoof.endpoint(replace(NETWORK, spoof=True), ENDPOINT, "blue") == ()


@pytest.mark.parametrize("pool", ["169.254.9.0/24", "fe80::/64"])
def test_link_local_pool(pool):
    """Where link-local addresses are given, no others of that kind pass."""
    network = replace(NETWORK, subnets=(Subnet(space="l", pool=ip_network(pool)), SIX))
    found = antispoof.endpoint(network, ENDPOINT, "blue")
    assert found[-2:] == (element("assigned"), element("ports"))


def test_every_set_that_is_filled_is_there():
    """Elements only go to sets that both tables declare, and none is for nothing."""
    declared = set(re.findall(r"^\tset (\w+)", antispoof.TEXT, re.MULTILINE))
    pool = Subnet(space="l", pool=ip_network("169.254.0.0/24"))
    network = replace(NETWORK, subnets=(pool,))
    assert {op.set for op in antispoof.endpoint(network, ENDPOINT, "x")} == declared
    both = set(re.findall(r"^\tset (\w+)", overlay.TEXT, re.MULTILINE))
    assert both == {*declared, "gateways"}


def test_every_drop_is_counted():
    """What is dropped as spoofed is counted by its kind, all kinds declared."""
    drops = [x for x in antispoof.TEXT.splitlines() if x.endswith("drop")]
    kinds = {re.search('counter name "(\\w+)" drop', line)[1] for line in drops}
    declared = re.findall(r"^\tcounter (\w+)", antispoof.TEXT, re.MULTILINE)
    assert kinds == set(declared)


def test_the_tables():
    """The two tables differ, and are marked as such."""
    one, other = antispoof.table("host"), overlay.table("blue")
    assert one.text.startswith(antispoof.TEXT)
    assert one.mark != other.mark
    assert (one.family, one.name, one.where) == ("bridge", "pynet", "host")
