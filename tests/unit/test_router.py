"""The host as a router: the gateway's MAC, and where relayed connections go."""

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from cnmdriver.model import TCP, Endpoint, Network, Published, Subnet
from cnmdriver.plan import router
from cnmdriver.plan.ops import Hold

NETWORK = Network(id="red", mode="bridge", subnets=(), mtu=1450)
ENDPOINT = Endpoint(network="red", id="web", host="h", boot="b", mac="m")
PORT = Published(protocol=TCP, port=80, host_ip=None, host_port=8080)


@pytest.mark.parametrize(
    ("gateways", "mac"),
    [
        (("10.1.0.1",), "02:42:0a:01:00:01"),
        (("10.2.0.1", "10.1.0.1"), "02:42:0a:01:00:01"),
        (("fd00::1", "10.1.0.1"), "02:42:0a:01:00:01"),
        (("fd00::1", None), "02:42:cb:2a:2b:4d"),
        ((None,), "02:42:b1:f5:1a:51"),
        ((), "02:42:b1:f5:1a:51"),
    ],
)
def test_mac(gateways, mac):
    """The MAC follows the lowest gateway, IPv4 before IPv6, or the network's id."""
    subnets = tuple(
        Subnet(
            space="s",
            pool=ip_network("10.0.0.0/8"),
            gateway=None if gateway is None else ip_address(gateway),
        )
        for gateway in gateways
    )
    assert router.mac(replace(NETWORK, subnets=subnets)) == mac


@pytest.mark.parametrize(
    ("host_ip", "own", "target"),
    [
        (None, ("10.1.0.2/24", "fd00::2/64"), "fd00::2"),
        (None, ("10.1.0.2/24", None), "10.1.0.2"),
        ("127.0.0.1", ("10.1.0.2/24", "fd00::2/64"), "10.1.0.2"),
        ("127.0.0.1", (None, "fd00::2/64"), "fd00::2"),
        ("::1", ("10.1.0.2/24", "fd00::2/64"), "fd00::2"),
        ("::1", ("10.1.0.2/24", None), "10.1.0.2"),
        ("::1", (None, None), None),
    ],
)
def test_relayed(host_ip, own, target):
    """What is relayed goes to the host address's own family where it can."""
    four, six = (None if a is None else ip_interface(a) for a in own)
    endpoint = replace(ENDPOINT, ipv4=four, ipv6=six)
    address = None if host_ip is None else ip_address(host_ip)
    found = router.relayed(address, endpoint)
    assert found == (None if target is None else ip_address(target))
    port = replace(PORT, host_ip=address)
    assert router.hold(port, endpoint) == Hold(
        protocol=TCP, address=address, port=8080, target=found, target_port=80
    )
