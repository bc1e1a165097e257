"""Bindings: which MAC of an address is news to those who knew another."""

from dataclasses import replace
from ipaddress import ip_interface

from cnmdriver.driver.bindings import Bindings
from cnmdriver.model import Endpoint
from cnmdriver.plan import devices
from tests.fakes import cluster, level
from tests.unit.calls import Docker

FOUR, SIX = ip_interface("10.1.0.2/24"), ip_interface("fd00::2/64")
MAC, OTHER = devices.mac(FOUR.ip), "02:11:22:33:44:55"
ONE = Endpoint(network="n", id="e", host="h", boot="b", mac=MAC, ipv4=FOUR)


def test_a_mac_that_follows_is_no_news():
    """Whoever has an IPv4 address has the MAC that everybody knows."""
    bindings = Bindings()
    bindings.note(ONE)
    bindings.note(replace(ONE, id="f"))
    assert (bindings.news(), bindings.odd) == ({}, {})


def test_a_users_mac_comes_and_goes():
    """A MAC of the user's is news, and so is that it is gone; said once each."""
    bindings = Bindings()
    bindings.note(replace(ONE, mac=OTHER))
    assert bindings.news() == {"n": ((FOUR.ip, OTHER),)}
    bindings.note(replace(ONE, mac=OTHER))
    assert bindings.news() == {}
    bindings.note(ONE)
    assert bindings.news() == {"n": ((FOUR.ip, MAC),)}
    assert bindings.odd == {}


def test_an_address_with_another_beside_it():
    """An IPv6 address has the MAC of the IPv4 address it came with."""
    bindings = Bindings()
    bindings.note(replace(ONE, ipv6=SIX))
    assert bindings.news() == {"n": ((SIX.ip, MAC),)}
    bindings.note(replace(ONE, ipv6=SIX, sandbox="s"))
    assert bindings.news() == {}
    moved = ip_interface("10.1.0.9/24")
    mac = devices.mac(moved.ip)
    bindings.note(replace(ONE, ipv4=moved, ipv6=SIX, mac=mac))
    assert bindings.news() == {"n": ((SIX.ip, mac),)}


def test_a_network_that_is_gone():
    """Of a network that is gone nothing is kept."""
    bindings = Bindings()
    bindings.note(replace(ONE, mac=OTHER))
    bindings.forget("n")
    assert (bindings.news(), bindings.odd) == ({}, {})


async def test_hosts_tell_their_own(directory):
    """A host with containers on the network announces it there, others do not."""
    async with cluster(directory, 2) as rigs:
        one, other = (Docker(rig) for rig in rigs)
        for host in (one, other):
            await level(host.rig)
            await host.create(host.rig.site.host.name * 32, "10.1.0.0/24")
        await level(*rigs)
        await one.create_box("first", "h1" * 32)
        box = await one.create_box("box", "h1" * 32, mac=OTHER)
        await level(*rigs)
        where, device, address, mac = rigs[0].kernel.announced[-1]
        assert (where, device[:3], mac) == ("pynet", "pn-", OTHER)
        assert address == str(box.addresses[0].ip)
        assert rigs[1].kernel.announced == []
