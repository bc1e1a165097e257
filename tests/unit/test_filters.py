"""Which rule of a host's filters ends a packet's way, and which proves nothing."""

import json
from dataclasses import replace
from ipaddress import ip_address

import pytest

from cnmdriver.insight.filters import Packet, stop
from cnmdriver.plan.sight import Filters

VXLAN = Packet(
    hook="input",
    version=4,
    port=4789,
    source=ip_address("192.0.2.11"),
    target=ip_address("192.0.2.12"),
    enters="eth0",
)
OUT = Packet(
    hook="forward",
    version=4,
    protocol="tcp",
    enters="pn-0123456789",
    leaves="eth0",
    ours=(True, False),
)
OPEN = "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n"
SHUT = OPEN.replace("ACCEPT", "DROP")
USER = "-N DOCKER-USER\n-A FORWARD -j DOCKER-USER\n"
ACCEPTS = (
    "-A DOCKER-USER -m devgroup --src-group 0x706e -m comment --comment pynet "
    "-j ACCEPT\n"
)


def stopped(text, packet=VXLAN, tool="iptables"):
    """Return the rule that stops a packet, None if none does."""
    found = stop(Filters(listings=((tool, text),)), packet)
    return None if found is None else found.rule


@pytest.mark.parametrize(
    "rule",
    [
        "-p udp -m udp --dport 4789 -j DROP",
        "-p 17 -j REJECT --reject-with icmp-port-unreachable",
        "-j DROP",
        "-s 192.0.2.0/24 -j DROP",
        "-d 192.0.2.12/32 -i eth+ -j DROP",
        "-p udp -m multiport --dports 53,4000:5000 -j DROP",
        "! -s 198.51.100.0/24 -j DROP",
        "-p udp -m comment --comment 'no -j ACCEPT here' -j DROP",
        "-m conntrack --ctstate INVALID,NEW -j DROP",
        "-m addrtype --dst-type MULTICAST -j RETURN\n-A INPUT -j DROP",
        "-m limit --limit 3/sec -j LOG\n-A INPUT -j DROP",
    ],
)
def test_a_rule_that_stops(rule):
    """A rule all of whose words are known and fit is named as it stands."""
    assert stopped(OPEN + f"-A INPUT {rule}\n").startswith("-A INPUT ")


@pytest.mark.parametrize(
    "rule",
    [
        "-p tcp -j DROP",
        "-p udp -m udp --dport 53 -j DROP",
        "-s 198.51.100.0/24 -j DROP",
        "-i docker0 -j DROP",
        "! -i eth0 -j DROP",
        "-m conntrack --ctstate INVALID -j DROP",
        "-m limit --limit 3/sec -j DROP",
        "-m set --match-set bad src -j DROP",
        "-p udp --dport 4789 -j LOG --log-prefix x",
        "-j UNKNOWN",
        "-p udp --dport 4789 -j ACCEPT\n-A INPUT -j DROP",
        "-m limit --limit 3/sec -j WALL\n-A WALL -j DROP",
        "-m set --match-set good src -j ACCEPT\n-A INPUT -j DROP",
        "-j WALL\n-A WALL -m set --match-set good src -j RETURN\n-A WALL -j DROP",
        "-j WALL\n-A WALL -m addrtype --dst-type LOCAL -j RETURN\n-A WALL -j DROP",
    ],
)
def test_a_rule_that_does_not(rule):
    """What does not fit stops nothing, and what has unknown words proves nothing."""
    assert stopped(OPEN + f"-A INPUT {rule}\n") is None


def test_chains_that_call_each_other():
    """A rule in a chain that is called is found, and one that returns is left."""
    calls = OPEN + "-N ONE\n-N TWO\n-A INPUT -j ONE\n-A ONE -g TWO\n-A ONE -j DROP\n"
    assert stopped(calls + "-A TWO -s 192.0.2.11/32 -j DROP\n").startswith("-A TWO")
    assert stopped(calls + "-A TWO -j RETURN\n") is None
    assert stopped(OPEN + "-A INPUT -j INPUT\n") is None


def test_policies():
    """A policy stops what no rule lets pass, and the remedy lets just that pass."""
    found = stop(Filters(listings=(("iptables", SHUT),)), VXLAN)
    assert found.rule == "-P INPUT DROP"
    assert found.remedy == (
        "iptables -I INPUT -p udp -s 192.0.2.11 --dport 4789 -j ACCEPT"
    )
    assert stopped(SHUT + "-A INPUT -p udp -j ACCEPT\n") is None


def test_forwarding():
    """Pynet's exception is known, and what stands before it stops all the same."""
    assert stopped(SHUT, OUT) == "-P FORWARD DROP"
    assert stopped(SHUT + USER + ACCEPTS, OUT) is None
    wall = "-A FORWARD -i pn-0123456789 -j DROP\n"
    assert stopped(SHUT + wall + USER + ACCEPTS, OUT) == wall.strip()
    back = replace(OUT, ours=(False, True))
    assert stopped(SHUT + USER + ACCEPTS, back) == "-P FORWARD DROP"


def test_each_program_has_its_family():
    """IPv4 is not stopped by ip6tables; legacy tables count like the others."""
    rule = OPEN + "-A INPUT -j DROP\n"
    assert stopped(rule, tool="ip6tables") is None
    assert stopped(rule, replace(VXLAN, version=6), "ip6tables") is not None
    found = stop(Filters(listings=(("iptables-legacy", rule),)), VXLAN)
    assert found.remedy == "iptables-legacy -D INPUT -j DROP"


def match(left, right, op="=="):
    """Return a match as nft prints it."""
    return {"match": {"op": op, "left": left, "right": right}}


PORT = {"payload": {"protocol": "udp", "field": "dport"}}
SOURCE = {"payload": {"protocol": "ip", "field": "saddr"}}
DEVICE = {"meta": {"key": "iifname"}}
DROP, ACCEPT = {"drop": None}, {"accept": None}


def ruleset(*rules, policy="accept", table="wall", name="in", family="inet"):
    """Return nftables with one base chain, and one it may call."""
    place = {"family": family, "table": table}
    base = {**place, "name": name, "hook": "input", "prio": 0, "policy": policy}
    chains = [{"chain": base}, {"chain": {**place, "name": "sub"}}]
    listed = [
        {"rule": {**place, "chain": chain, "handle": number, "expr": list(exprs)}}
        for number, (chain, *exprs) in enumerate(rules, 4)
    ]
    return json.dumps({"nftables": [{"metainfo": {}}, *chains, *listed]})


def nft_stopped(text, packet=VXLAN):
    """Return the remedy for what stops a packet, None if nothing does."""
    found = stop(Filters(ruleset=text), packet)
    return None if found is None else found.remedy


@pytest.mark.parametrize(
    "exprs",
    [
        [match(PORT, 4789), {"counter": {}}, DROP],
        [match(PORT, {"range": [4000, 5000]}), DROP],
        [match(PORT, {"set": [53, 4789]}), {"reject": None}],
        [match(PORT, 53, "!="), DROP],
        [match(SOURCE, "192.0.2.11"), DROP],
        [match(SOURCE, {"prefix": {"addr": "192.0.2.0", "len": 24}}), {"log": None}]
        + [DROP],
        [match(DEVICE, "eth0"), DROP],
        [match({"meta": {"key": "l4proto"}}, "udp"), DROP],
        [match({"ct": {"key": "state"}}, ["new", "invalid"], "in"), DROP],
    ],
)
def test_a_rule_of_nftables_that_stops(exprs):
    """A rule that fits is named by its handle, with how to delete it."""
    remedy = "nft delete rule inet wall in handle 4"
    assert nft_stopped(ruleset(("in", *exprs))) == remedy


@pytest.mark.parametrize(
    "exprs",
    [
        [match(PORT, 53), DROP],
        [match({"payload": {"protocol": "tcp", "field": "dport"}}, 4789), DROP],
        [match(SOURCE, "@bad"), DROP],
        [match(SOURCE, "192.0.2.99"), DROP],
        [match({"payload": {"protocol": "ip6", "field": "nexthdr"}}, "udp"), DROP],
        [match(PORT, 4789, "<"), DROP],
        [{"xt": None}, DROP],
        [{"limit": {"rate": 3}}, DROP],
        [{"counter": None}],
        [ACCEPT],
        [{"jump": {"target": "sub"}}],
        [{"return": None}],
        [{"vmap": {"key": PORT, "data": "@ports"}}],
        [match({"ct": {"key": "status"}}, "dnat"), DROP],
    ],
)
def test_a_rule_of_nftables_that_does_not(exprs):
    """What does not fit, or is not known to, stops nothing."""
    assert nft_stopped(ruleset(("in", *exprs))) is None


STATES = {
    "key": {"ct": {"key": "state"}},
    "data": {"set": [["established", ACCEPT], ["invalid", DROP]]},
}


def test_maps_of_verdicts():
    """A map that is known is looked into; one that is not may let anything pass."""
    states = ("in", {"vmap": STATES})
    assert nft_stopped(ruleset(states, policy="drop")).startswith("nft insert rule")
    new = {**STATES, "data": {"set": [["new", {"jump": {"target": "sub"}}]]}}
    assert nft_stopped(ruleset(("in", {"vmap": new}), ("sub", DROP))) == (
        "nft delete rule inet wall sub handle 5"
    )
    unknown = ("in", {"vmap": {"key": SOURCE, "data": "@hosts"}})
    assert nft_stopped(ruleset(unknown, ("in", DROP))) is None


def test_doubt():
    """What may have been passed or left before proves nothing any more."""
    odd = match(SOURCE, "@good")
    assert nft_stopped(ruleset(("in", odd, ACCEPT), ("in", DROP))) is None
    assert nft_stopped(ruleset(("in", odd, {"return": None}), ("in", DROP))) is None
    assert nft_stopped(ruleset(("in", odd, DROP), ("in", DROP))) is not None


def test_a_published_port():
    """What came to a published port is known as such, by both tools."""
    back = replace(OUT, ours=(False, False), translated=True)
    rule = "-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT\n"
    assert stopped(SHUT + rule, OUT) == "-P FORWARD DROP"
    assert stopped(SHUT + rule, back) is None


def test_chains_of_nftables():
    """Called chains are followed; iptables' and our own tables are left out."""
    called = ("in", {"jump": {"target": "sub"}}), ("sub", DROP)
    assert nft_stopped(ruleset(*called)) == "nft delete rule inet wall sub handle 5"
    assert nft_stopped(ruleset(("in", DROP), table="pynet")) is None
    assert nft_stopped(ruleset(("INPUT", DROP), name="INPUT")) is None
    assert nft_stopped(ruleset(("in", DROP), family="ip6")) is None
    assert nft_stopped(ruleset(("in", DROP)), replace(VXLAN, hook="output")) is None
    assert nft_stopped(ruleset(policy="drop")) == (
        "nft insert rule inet wall in ip saddr 192.0.2.11 udp dport 4789 accept"
    )
    assert nft_stopped(ruleset(("in", ACCEPT), policy="drop")) is None
