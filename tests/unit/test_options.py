"""Options of `docker network create -o`: which are known, and what each may say."""

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnmdriver.errors import InvalidParameter
from cnmdriver.plan import options
from cnmdriver.plan.options import Options

KNOWN = (
    "pynet.attach, pynet.bridge, pynet.flood, pynet.gateway, pynet.host_access, "
    "pynet.host_binding, pynet.icc, pynet.masquerade, pynet.mode, pynet.mtu, "
    "pynet.prefix, pynet.spoof"
)


def test_nothing_said():
    """What was not said is None, so that a network that exists can fill it in."""
    assert options.parse({}) == Options(
        mode=None,
        mtu=None,
        bridge="",
        icc=None,
        masquerade=None,
        host_binding=None,
        gateway=None,
        flood=None,
        host_access=None,
        spoof=None,
        prefix="eth",
        unknown=(),
    )


def test_everything_said():
    """Each option of ours is read into its field."""
    said = {
        "pynet.mode": "overlay",
        "pynet.flood": "true",
        "pynet.host_access": "",
        "pynet.mtu": "1400",
        "pynet.bridge": "lab0",
        "pynet.icc": "false",
        "pynet.masquerade": "no",
        "pynet.host_binding": "192.0.2.1",
        "pynet.gateway": "docker",
        "pynet.prefix": "net",
        "pynet.spoof": "allow",
    }
    assert options.parse(said) == Options(
        spoof=True,
        mode="overlay",
        flood=True,
        host_access=True,
        mtu=1400,
        bridge="lab0",
        icc=False,
        masquerade=False,
        host_binding=IPv4Address("192.0.2.1"),
        gateway="docker",
        prefix="net",
    )


def test_docker_names():
    """The names Docker has for its own bridges mean the same."""
    said = {
        "com.docker.network.driver.mtu": "9000",
        "com.docker.network.bridge.name": "lab0",
        "com.docker.network.bridge.enable_icc": "false",
        "com.docker.network.bridge.enable_ip_masquerade": "false",
        "com.docker.network.bridge.host_binding_ipv4": "127.0.0.1",
        "com.docker.network.container_iface_prefix": "lab",
    }
    assert options.parse(said) == Options(
        mtu=9000,
        bridge="lab0",
        icc=False,
        masquerade=False,
        host_binding=IPv4Address("127.0.0.1"),
        prefix="lab",
    )


def test_options_of_others():
    """What other programs' options say is kept in order, and means nothing."""
    said = {"org.example.b": "1", "com.docker.network.x": "2", "pynet.mtu": "1500"}
    found = options.parse(said)
    assert found.unknown == ("com.docker.network.x", "org.example.b")
    assert found == Options(mtu=1500, unknown=found.unknown)


@pytest.mark.parametrize("key", ["pynet.mut", "pynet.", "mtu", "", "parent"])
def test_unknown_option(key):
    """A misspelt or bare word is refused, with the list of what there is."""
    with pytest.raises(InvalidParameter) as refused:
        options.parse({key: "x"})
    assert str(refused.value) == f"unknown option {key!r}: known are {KNOWN}"


def test_contradiction():
    """Two spellings of one option must agree; the text has both."""
    said = {
        "com.docker.network.bridge.name": "lab0",
        "com.docker.network.driver.mtu": "1400",
        "pynet.mtu": "1300",
    }
    with pytest.raises(InvalidParameter) as refused:
        options.parse(said)
    assert str(refused.value) == (
        "option pynet.mtu=1300 contradicts com.docker.network.driver.mtu=1400"
    )


def test_saying_it_twice():
    """Two spellings that say the same are one option."""
    said = {"com.docker.network.bridge.enable_icc": "0", "pynet.icc": "FALSE"}
    assert options.parse(said) == Options(icc=False)


@pytest.mark.parametrize(
    "text", ["true", "1", "t", "yes", "on", "", "True", "TRUE", "YES", "On"]
)
def test_yes(text):
    """There are many words for yes, of any case; an option alone is one."""
    assert options.boolean("k", text) is True


@pytest.mark.parametrize("text", ["false", "0", "f", "no", "off", "False", "OFF"])
def test_no(text):
    """There are many words for no, of any case."""
    assert options.boolean("k", text) is False


@pytest.mark.parametrize("text", [" ", "2", "ja", "truefalse", "none"])
def test_neither_yes_nor_no(text):
    """Any other word is refused, with what to say."""
    with pytest.raises(InvalidParameter) as refused:
        options.parse({"pynet.icc": text})
    assert str(refused.value) == f"option pynet.icc={text}: give true or false"


@pytest.mark.parametrize(
    ("text", "number"), [("68", 68), ("1500", 1500), ("65535", 65535), ("0068", 68)]
)
def test_mtu(text, number):
    """An MTU is a number of bytes that IPv4 can work with."""
    assert options.mtu("k", text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "67",
        "65536",
        "-1500",
        "+1500",
        "1_500",
        "1500.0",
        " 1500",
        "1500\n",
        "0x5dc",
        "²",
        "\N{ARABIC-INDIC DIGIT ONE}00",
        "0000065535999",
        "000001500" + "0" * 5000,
        "9" * 5000,
    ],
)
def test_bad_mtu(text):
    """Any other text is refused, however long, with the range."""
    with pytest.raises(InvalidParameter) as refused:
        options.parse({"pynet.mtu": text})
    assert str(refused.value) == f"option pynet.mtu={text}: give 68 to 65535 bytes"


@given(st.text(max_size=20) | st.integers(0, 10**12).map("{:012}".format))
def test_mtu_is_never_out_of_range(text):
    """Whatever is said, what is accepted is an MTU."""
    try:
        found = options.mtu("k", text)
    except InvalidParameter:
        return
    assert 68 <= found <= 65535


@pytest.mark.parametrize(
    "text", ["b", "br-lan", "a.b", "_x", ".hidden", "A0_.-", "x" * 15, "...", "0"]
)
def test_device(text):
    """A device name has up to 15 letters, digits and some signs."""
    assert options.device("k", text) == text


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "-x", "x" * 16, "a b", "a/b", "a:b", 'a"b', "a\n", "brücke", "a;b"],
)
def test_bad_device(text):
    """Whatever a tool or the kernel could misread is no device name."""
    with pytest.raises(InvalidParameter) as refused:
        options.parse({"pynet.bridge": text})
    assert str(refused.value) == (
        f"option pynet.bridge={text}: give a device name of 1 to 15 letters, digits,"
        " _ . -"
    )


@pytest.mark.parametrize("text", ["e", "eth", "Net_0-", "x" * 10])
def test_prefix(text):
    """A prefix leaves room for the number Docker adds."""
    assert options.prefix("k", text) == text


@pytest.mark.parametrize("text", ["", "x" * 11, "0eth", "_x", "-x", "a.b", "eth\n"])
def test_bad_prefix(text):
    """What makes no interface name is refused."""
    with pytest.raises(InvalidParameter) as refused:
        options.parse({"pynet.prefix": text})
    assert str(refused.value) == (
        f"option pynet.prefix={text}: give 1 to 10 letters, digits, _ or -"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("127.0.0.1", IPv4Address("127.0.0.1")),
        ("0.0.0.0", IPv4Address(0)),
        ("fd00::1", IPv6Address("fd00::1")),
    ],
)
def test_host_binding(text, found):
    """A host binding is an address of either family."""
    assert options.address("k", text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "127.1",
        "10.0.0.1/24",
        "fe80::1%eth0",
        "fe80::1%0 } ; flush ruleset",
    ],
)
def test_bad_host_binding(text):
    """Other text is refused; a scope could carry anything into the ruleset."""
    with pytest.raises(InvalidParameter) as refused:
        options.parse({"pynet.host_binding": text})
    assert str(refused.value) == f"option pynet.host_binding={text}: give an IP address"


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("pynet.mode", "Overlay", "bridge or overlay"),
        ("pynet.mode", "", "bridge or overlay"),
        ("pynet.gateway", "host", "pynet or docker"),
        ("pynet.gateway", "Docker", "pynet or docker"),
    ],
)
def test_choice(key, text, words):
    """Of a list of words one must be given, as it is written."""
    with pytest.raises(InvalidParameter) as refused:
        options.parse({key: text})
    assert str(refused.value) == f"option {key}={text}: give {words}"


def test_a_bad_value_by_dockers_name():
    """The text has the option as the user typed it."""
    with pytest.raises(InvalidParameter) as refused:
        options.parse({"com.docker.network.driver.mtu": "x"})
    assert str(refused.value) == (
        "option com.docker.network.driver.mtu=x: give 68 to 65535 bytes"
    )


def test_choice_of_words():
    """A reader of words returns the word, and names them all when it is another."""
    read = options.choice("red", "green")
    assert read("k", "red") == "red"
    assert read("k", "green") == "green"
    with pytest.raises(InvalidParameter) as refused:
        read("k", "blue")
    assert str(refused.value) == "option k=blue: give red or green"


def test_spoof():
    """Spoofing is allowed or denied by name; anything else is no answer."""
    read = options.READERS["pynet.spoof"]
    assert (read("k", "allow"), read("k", "deny")) == (True, False)
    # A network's own option, as a command line that joins it has it.
    assert (read("k", "true"), read("k", "false")) == (True, False)
    for text in ("", "yes", "Allow"):
        with pytest.raises(InvalidParameter) as refused:
            read("k", text)
        assert str(refused.value) == f"option k={text}: give allow or deny"


@pytest.mark.parametrize(
    ("name", "text", "mode", "other"),
    [
        ("flood", "true", "overlay", "bridge"),
        ("flood", "false", "overlay", "bridge"),
        ("host_access", "false", "overlay", "bridge"),
        ("bridge", "br0", "bridge", "overlay"),
    ],
)
def test_options_of_one_mode(name, text, mode, other):
    """An option that only one mode has is refused elsewhere, whatever it says."""
    said = options.parse({f"pynet.{name}": text})
    options.check_mode(said, mode)
    with pytest.raises(InvalidParameter) as refused:
        options.check_mode(said, other)
    assert str(refused.value) == (
        f"option pynet.{name} is for mode {mode}, and the network's mode is {other}; "
        f"leave it out or give -o pynet.mode={mode}"
    )
    options.check_mode(Options(), other)


@pytest.mark.parametrize(
    ("said", "mode", "gateway"),
    [
        (None, "bridge", "pynet"),
        (None, "overlay", "docker"),
        ("docker", "bridge", "docker"),
        ("pynet", "overlay", "pynet"),
    ],
)
def test_gateway(said, mode, gateway):
    """The gateway is what the user says, else the mode's own."""
    assert options.gateway_of(Options(gateway=said), mode) == gateway
