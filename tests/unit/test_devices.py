"""Names, MACs and marks: fixed for ever, as other releases must find them again."""

import re
from ipaddress import ip_address, ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnmdriver.model import Endpoint
from cnmdriver.plan import devices


def test_names_are_what_they_were():
    """A device's name follows from the id alone, and is the same in every release."""
    assert devices.bridge("n1") == "pn-56c6370b78"
    assert devices.port("e1") == "pe-a5f9e3fefd"
    assert devices.peer("e1") == "pc-a5f9e3fefd"


@given(st.text())
def test_names_fit(identity):
    """Whatever the id, a name has at most 15 bytes of letters, digits and a dash."""
    for name in (devices.bridge, devices.port, devices.peer):
        assert re.fullmatch(r"p[nec]-[0-9a-f]{10}", name(identity))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.1.2.3", "02:42:0a:01:02:03"),
        ("255.0.0.254", "02:42:ff:00:00:fe"),
        ("fd00::1", "02:42:c0:fd:32:4d"),
    ],
)
def test_a_mac_follows_from_the_address(address, expected):
    """A MAC is locally administered unicast, and the same whenever asked."""
    assert devices.mac(ip_address(address)) == expected


def test_an_endpoints_mac():
    """The first address counts; without one it is the id."""
    both = (ip_interface("10.0.0.2/24"), ip_interface("fd00::2/64"))
    assert devices.endpoint_mac(both, "e1") == "02:42:0a:00:00:02"
    assert devices.endpoint_mac(both[1:], "e1") == devices.mac(ip_address("fd00::2"))
    assert devices.endpoint_mac((), "e1") == "02:42:a5:f9:e3:fe"


def test_marks():
    """The alias names host, kind and id, and an endpoint's is read back."""
    mark = devices.alias("0123456789abcdef", "endpoint", "e1")
    assert mark == "pynet:01234567:endpoint:e1"
    assert devices.endpoint_id(mark) == "e1"


@pytest.mark.parametrize(
    "alias", [None, "", "x", "pynet:0:network:n1", "pynet:0:endpoint", "a:b:endpoint:c"]
)
def test_other_marks_are_no_endpoints(alias):
    """Any other alias has no endpoint."""
    assert devices.endpoint_id(alias) == ""


@pytest.mark.parametrize(
    ("sandbox", "boot", "expected"),
    [("/s", "b1", True), ("/s", "b2", False), ("", "b1", False)],
)
def test_who_lives(sandbox, boot, expected):
    """An endpoint lives if it has a sandbox, of this boot."""
    endpoint = Endpoint(
        network="n", id="e", host="h", boot=boot, mac="m", sandbox=sandbox
    )
    assert devices.is_live(endpoint, "b1") is expected
