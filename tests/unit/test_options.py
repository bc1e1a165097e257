"""What `-o key=value` may say, and what it means."""

from ipaddress import ip_address

import pytest

from cnmdriver.errors import InvalidParameter
from cnmdriver.plan.options import Options, parse


def test_nothing_said():
    """Without options every field has its default."""
    assert parse({}) == Options(
        mode=None, mtu=None, bridge="", icc=True, masquerade=True,
        host_binding=None, gateway="pynet", prefix="eth", unknown=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("pynet.mode", "bridge", Options(mode="bridge")),
        ("pynet.mtu", "1400", Options(mtu=1400)),
        ("pynet.mtu", "68", Options(mtu=68)),
        ("pynet.mtu", "65535", Options(mtu=65535)),
        ("pynet.bridge", "br-lab.7", Options(bridge="br-lab.7")),
        ("pynet.bridge", "a" * 15, Options(bridge="a" * 15)),
        ("pynet.icc", "false", Options(icc=False)),
        ("pynet.masquerade", "0", Options(masquerade=False)),
        (
            "pynet.host_binding",
            "127.0.0.1",
            Options(host_binding=ip_address("127.0.0.1")),
        ),
        ("pynet.host_binding", "::1", Options(host_binding=ip_address("::1"))),
        ("pynet.gateway", "docker", Options(gateway="docker")),
        ("pynet.gateway", "pynet", Options()),
        ("pynet.prefix", "net", Options(prefix="net")),
        ("pynet.prefix", "a123456789", Options(prefix="a123456789")),
    ],
)
def test_our_options(key, text, expected):
    """Each option of ours sets its field."""
    assert parse({key: text}) == expected


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("com.docker.network.driver.mtu", "1400", Options(mtu=1400)),
        ("com.docker.network.bridge.name", "br0", Options(bridge="br0")),
        ("com.docker.network.bridge.enable_icc", "false", Options(icc=False)),
        (
            "com.docker.network.bridge.enable_ip_masquerade",
            "false",
            Options(masquerade=False),
        ),
        (
            "com.docker.network.bridge.host_binding_ipv4",
            "10.0.0.1",
            Options(host_binding=ip_address("10.0.0.1")),
        ),
        ("com.docker.network.container_iface_prefix", "net", Options(prefix="net")),
    ],
)
def test_dockers_names(key, text, expected):
    """The names of Docker's bridge driver mean the same."""
    assert parse({key: text}) == expected


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "t", "yes", "on", ""])
def test_yes(text):
    """A yes has many spellings; a bare `-o pynet.icc` is one."""
    assert parse({"pynet.icc": text}).icc is True


@pytest.mark.parametrize("text", ["false", "False", "0", "f", "no", "off"])
def test_no(text):
    """A no has as many."""
    assert parse({"pynet.icc": text}).icc is False


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("pynet.mode", "overlord", "option pynet.mode=overlord: give bridge"),
        ("pynet.mtu", "67", "option pynet.mtu=67: give 68 to 65535 bytes"),
        ("pynet.mtu", "65536", "option pynet.mtu=65536: give 68 to 65535 bytes"),
        ("pynet.mtu", "-1", "option pynet.mtu=-1: give 68 to 65535 bytes"),
        ("pynet.mtu", "1e3", "option pynet.mtu=1e3: give 68 to 65535 bytes"),
        ("pynet.mtu", "", "option pynet.mtu=: give 68 to 65535 bytes"),
        ("pynet.mtu", "\u0661\u0665\u0660\u0660", "give 68 to 65535 bytes"),
        ("pynet.mtu", "\u00b2\u00b2\u00b2", "give 68 to 65535 bytes"),
        ("pynet.mtu", "9" * 5000, "give 68 to 65535 bytes"),
        ("pynet.bridge", "", "option pynet.bridge=: give a device name of 1 to 15"),
        ("pynet.bridge", "a" * 16, "give a device name of 1 to 15 letters"),
        ("pynet.bridge", "a/b", "option pynet.bridge=a/b: give a device name"),
        ("pynet.bridge", "a b", "give a device name"),
        ("pynet.bridge", ".", "option pynet.bridge=.: give a device name"),
        ("pynet.bridge", "..", "option pynet.bridge=..: give a device name"),
        ("pynet.bridge", "br0\n", "give a device name"),
        ("pynet.prefix", "", "option pynet.prefix=: give 1 to 10 letters"),
        ("pynet.prefix", "0eth", "option pynet.prefix=0eth: give 1 to 10 letters"),
        ("pynet.prefix", "a" * 11, "give 1 to 10 letters, digits, _ or -"),
        ("pynet.icc", "maybe", "option pynet.icc=maybe: give true or false"),
        ("pynet.gateway", "none", "option pynet.gateway=none: give pynet or docker"),
        ("pynet.host_binding", "lo", "option pynet.host_binding=lo: give an IP"),
        ("pynet.host_binding", "10.0.0.0/8", "give an IP address"),
    ],
)
def test_bad_values(key, text, message):
    """A bad value is refused with the option, the value and what to give."""
    with pytest.raises(InvalidParameter) as refused:
        parse({key: text})
    assert message in str(refused.value)


def test_a_bad_value_by_dockers_name_is_told_so():
    """The sentence names the option as the user typed it."""
    with pytest.raises(InvalidParameter, match=r"com\.docker\.network\.driver\.mtu=x"):
        parse({"com.docker.network.driver.mtu": "x"})


@pytest.mark.parametrize("key", ["pynet.mut", "mtu", "flag", "pynet.", ""])
def test_unknown_options_of_ours(key):
    """An unknown option of ours, or a bare word, is refused with what is known."""
    with pytest.raises(InvalidParameter) as refused:
        parse({key: "1"})
    assert str(refused.value) == (
        f"unknown option {key!r}: known are pynet.bridge, pynet.gateway, "
        "pynet.host_binding, pynet.icc, pynet.masquerade, pynet.mode, pynet.mtu, "
        "pynet.prefix"
    )


def test_unknown_options_of_others():
    """Options with another's prefix are kept aside, in order."""
    parsed = parse({"org.x.y": "1", "com.docker.network.foo": "", "pynet.mtu": "1400"})
    assert parsed == Options(mtu=1400, unknown=("com.docker.network.foo", "org.x.y"))


def test_the_same_option_twice():
    """Both names of one option may say the same, but not contradict each other."""
    both = {"com.docker.network.driver.mtu": "1400", "pynet.mtu": "1400"}
    assert parse(both) == Options(mtu=1400)
    with pytest.raises(InvalidParameter) as refused:
        parse({**both, "pynet.mtu": "1500"})
    assert str(refused.value) == "option pynet.mtu=1500 contradicts pynet.mtu"
