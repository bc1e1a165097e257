"""Names, MACs and marks of devices."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnmdriver.model import Endpoint
from cnmdriver.plan import devices


def test_names():
    """A name is a kind's prefix and ten digits of the id's SHA-256."""
    assert devices.bridge("red") == "pn-b1f51a511f"
    assert devices.port("red") == "pe-b1f51a511f"
    assert devices.peer("red") == "pc-b1f51a511f"
    assert devices.vxlan("red") == "pv-b1f51a511f"
    assert devices.gateway_port("red") == "pgp-b1f51a511f"
    assert devices.gateway("red") == "pg-b1f51a511f"
    assert devices.access_port("red") == "php-b1f51a511f"
    assert devices.access("red") == "ph-b1f51a511f"
    assert devices.bridge("blue") == "pn-16477688c0"
    assert devices.digest("red") == "b1f51a511f"
    assert devices.digest("red", 3) == "b1f"
    assert len(devices.digest("red", 64)) == 64


@given(st.text(max_size=70))
def test_names_fit(identity):
    """Whatever the id, the kernel takes the name, and no two kinds share one."""
    kinds = (
        devices.bridge,
        devices.vxlan,
        devices.port,
        devices.peer,
        devices.gateway_port,
        devices.gateway,
        devices.access_port,
        devices.access,
    )
    names = {kind(identity) for kind in kinds}
    assert len(names) == len(kinds)
    assert all(re.fullmatch("p[a-z]{1,2}-[0-9a-f]{10}", name) for name in names)
    assert all(len(name) <= 15 for name in names)


def test_alias():
    """The alias says whose device it is: host, kind and the whole id."""
    found = devices.alias("0123456789abcdef", "endpoint", "e" * 64)
    assert found == "pynet:01234567:endpoint:" + "e" * 64
    assert devices.endpoint_id(found) == "e" * 64
    assert devices.kind(found) == "endpoint"
    assert devices.kind("pynet:01234567:network:abc") == "network"


@pytest.mark.parametrize(
    "alias",
    [
        None,
        "",
        "pynet",
        "pynet:01234567:network:abc",
        "pynet:01234567:endpoint",
        "pynet:01234567:endpoint:a:b",
        "other:01234567:endpoint:abc",
        "x:pynet:01234567:endpoint:abc",
        "a:b:endpoint:c",
    ],
)
def test_alias_of_others(alias):
    """An alias that is not an endpoint's names none."""
    assert devices.endpoint_id(alias) == ""


@pytest.mark.parametrize(
    ("address", "mac"),
    [
        ("10.1.0.2", "02:42:0a:01:00:02"),
        ("255.255.255.255", "02:42:ff:ff:ff:ff"),
        ("0.0.0.0", "02:42:00:00:00:00"),
        ("fd00::1", "02:42:cb:2a:2b:4d"),
    ],
)
def test_mac(address, mac):
    """The same address has the same MAC always: IPv4 as it is, IPv6 as a hash."""
    assert devices.mac(ip_address(address)) == mac


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**128 - 1), st.text())
def test_macs_are_local_unicast(four, six, identity):
    """A derived MAC is well formed, locally administered and unicast."""
    for mac in (
        devices.mac(IPv4Address(four)),
        devices.mac(IPv6Address(six)),
        devices.endpoint_mac((), identity),
    ):
        assert re.fullmatch("02:42(:[0-9a-f]{2}){4}", mac)


def test_endpoint_mac():
    """An endpoint's MAC follows its first address, or its id without one."""
    four, six = ip_interface("10.1.0.2/24"), ip_interface("fd00::1/64")
    assert devices.endpoint_mac((four, six), "red") == "02:42:0a:01:00:02"
    assert devices.endpoint_mac((six,), "red") == "02:42:cb:2a:2b:4d"
    assert devices.endpoint_mac((), "red") == "02:42:b1:f5:1a:51"


@pytest.mark.parametrize(
    "alias", [None, "", "eth0", "pynet:0:network", "x:0:network:1", "pynet:0:a:b:c"]
)
def test_kind_of_others(alias):
    """An alias that is not ours has no kind."""
    assert devices.kind(alias) == ""


@given(st.text(), st.integers(0, 2**32 - 1))
def test_bridge_mac(identity, four):
    """The MAC of an overlay's bridge is local unicast, and never that of an address."""
    mac = devices.bridge_mac(identity)
    assert re.fullmatch("0e(:[0-9a-f]{2}){5}", mac)
    assert mac != devices.mac(IPv4Address(four))
    assert devices.bridge_mac("red") == "0e:b1:f5:1a:51:1f"


@pytest.mark.parametrize(
    ("mac", "address"),
    [
        ("02:42:0a:01:00:02", "fe80::42:aff:fe01:2/64"),
        ("00:00:5e:00:53:01", "fe80::200:5eff:fe00:5301/64"),
        ("ff:ff:ff:ff:ff:ff", "fe80::fdff:ffff:feff:ffff/64"),
    ],
)
def test_link_local(mac, address):
    """The link-local address is what the kernel itself would derive from the MAC."""
    assert devices.link_local(mac) == ip_interface(address)


def test_colons():
    """Twelve digits become six pairs."""
    assert devices.colons("0123456789ab") == "01:23:45:67:89:ab"


@pytest.mark.parametrize(
    ("sandbox", "boot", "live"),
    [
        ("/var/run/netns/x", "boot1", True),
        ("/var/run/netns/x", "boot2", False),
        ("", "boot1", False),
        ("", "boot2", False),
    ],
)
def test_is_live(sandbox, boot, live):
    """An endpoint lives once it has joined, until the host is booted again."""
    endpoint = Endpoint(
        network="n", id="e", host="h", boot="boot1", mac="", sandbox=sandbox
    )
    assert devices.is_live(endpoint, boot) is live
