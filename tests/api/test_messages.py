"""Sections 4, 5, 7 and 9 of Docker's protocol: what each call says and is told."""

import json
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from cnmdriver.model import Attachment, PortRequest, Subnet
from tests.api.messages import (
    ENDPOINT,
    GENERIC,
    NETWORK,
    POOL_ID,
    PORTMAP,
    SANDBOX,
    SOUND,
    sound,
    without,
)

WITH_NETWORK = [m for m, request in SOUND.items() if "NetworkID" in request]
WITH_ENDPOINT = [m for m, request in SOUND.items() if "EndpointID" in request]
WITH_POOL = [m for m, request in SOUND.items() if "PoolID" in request]
CREATE = "NetworkDriver.CreateNetwork"
ENDPOINT_CALL = "NetworkDriver.CreateEndpoint"
JOIN = "NetworkDriver.Join"
PROGRAM = "NetworkDriver.ProgramExternalConnectivity"
REQUEST_POOL = "IpamDriver.RequestPool"
REQUEST_ADDRESS = "IpamDriver.RequestAddress"
BAD_IDS = ["", "x" * 129, "a/b", "a b", "a\n", "é", "a\x00", "$(id)"]


async def refused(docker, networks, method, request):
    """Check that a request is refused before anything is done; return the text."""
    reply = await docker.call(method, request)
    assert reply.status == 400
    assert reply.json["Err"] == reply.json["Error"]
    assert networks.calls == []
    return reply.json["Err"]


async def accepted(docker, networks, method, request):
    """Check that a request arrives; return its keyword arguments and the answer."""
    reply = await docker.call(method, request)
    assert (reply.status, reply.json.get("Err")) == (200, None)
    (_, _, kwargs) = networks.calls[-1]
    return kwargs, reply.json


# Ids.


@pytest.mark.parametrize("method", WITH_NETWORK)
@pytest.mark.parametrize("text", BAD_IDS)
async def test_bad_network_id_is_refused(docker, networks, method, text):
    """An id is 1 to 128 plain characters; the refusal names the field."""
    text = await refused(docker, networks, method, sound(method, NetworkID=text))
    assert "`$.NetworkID`" in text


@pytest.mark.parametrize("method", WITH_ENDPOINT)
@pytest.mark.parametrize("text", BAD_IDS)
async def test_bad_endpoint_id_is_refused(docker, networks, method, text):
    """An id is 1 to 128 plain characters; the refusal names the field."""
    text = await refused(docker, networks, method, sound(method, EndpointID=text))
    assert "`$.EndpointID`" in text


@pytest.mark.parametrize("method", WITH_POOL)
@pytest.mark.parametrize("text", ["", "x" * 257, "a b", "pool\n", "é"])
async def test_bad_pool_id_is_refused(docker, networks, method, text):
    """Only what RequestPool may have answered is a pool id."""
    text = await refused(docker, networks, method, sound(method, PoolID=text))
    assert "`$.PoolID`" in text


@pytest.mark.parametrize(
    ("method", "field"),
    [
        *((method, "NetworkID") for method in WITH_NETWORK),
        *((method, "EndpointID") for method in WITH_ENDPOINT),
        *((method, "PoolID") for method in WITH_POOL),
        (JOIN, "SandboxKey"),
        ("NetworkDriver.DiscoverNew", "DiscoveryType"),
        (REQUEST_POOL, "AddressSpace"),
        ("IpamDriver.ReleaseAddress", "Address"),
    ],
)
async def test_missing_field_is_refused_by_its_name(docker, networks, method, field):
    """A call without what it is about is refused, and the text names the field."""
    text = await refused(docker, networks, method, without(method, field))
    assert f"missing required field `{field}`" in text


@pytest.mark.parametrize(
    ("method", "field"),
    [(method, field) for method, request in SOUND.items() for field in request],
)
async def test_wrong_type_is_refused_by_its_name(docker, networks, method, field):
    """No field takes a value of another JSON type, and nothing is coerced."""
    wrong = "1" if field in ("DiscoveryType", "V6", "Options", "Interface") else 7
    text = await refused(docker, networks, method, sound(method, **{field: wrong}))
    assert text.startswith("cannot read the request: expected `")


@pytest.mark.parametrize("method", SOUND)
async def test_unknown_fields_pass(docker, method):
    """Newer Dockers may say more, at every level."""
    request = sound(method, NewField={"a": [1, None]}, Another=None)
    for value in list(request.values()):
        if isinstance(value, dict):
            value["com.docker.network.new"] = {"x": [1.5, None, True]}
    if method == "NetworkDriver.AllocateNetwork":
        del request["Options"]["com.docker.network.new"]
    if method == REQUEST_POOL:
        del request["Options"]["com.docker.network.new"]
    assert (await docker.call(method, request)).status == 200


@pytest.mark.parametrize(
    "method", [method for method, request in SOUND.items() if "Options" in request]
)
async def test_options_may_be_null_or_absent(docker, method):
    """Go writes an empty map as null, or not at all."""
    null = await docker.call(method, sound(method, Options=None))
    absent = await docker.call(method, without(method, "Options"))
    assert (null.status, absent.status) == (200, 200)


async def test_swarm_network_id_is_an_id(docker, networks):
    """Under swarm a network id has 25 characters of base 36."""
    request = sound(CREATE, NetworkID="6nrmfgj53bxwjbwql979h3xp8")
    await accepted(docker, networks, CREATE, request)
    assert networks.calls[0][1] == ("6nrmfgj53bxwjbwql979h3xp8",)


# CreateNetwork, AllocateNetwork, GwAllocCheck.


async def test_network_arrives_as_model_values(docker, networks):
    """Both families, gateways and reserved addresses, options and flags arrive."""
    request = {
        "NetworkID": NETWORK,
        "Options": {
            "com.docker.network.enable_ipv4": True,
            "com.docker.network.enable_ipv6": True,
            "com.docker.network.internal": True,
            GENERIC: {"pynet.mode": "bridge", "flag": ""},
        },
        "IPv6Data": [{"AddressSpace": "s", "Pool": "fd00:0::/64"}],
        "IPv4Data": [
            {
                "AddressSpace": "LocalDefault",
                "Pool": "10.20.0.0/16",
                "Gateway": "10.20.255.254/16",
                "AuxAddresses": {"nas": "10.20.200.1/16", "dns": "10.20.5.9/16"},
            }
        ],
    }
    kwargs, answer = await accepted(docker, networks, CREATE, request)
    assert answer == {}
    assert kwargs == {
        "subnets": (
            Subnet(
                space="LocalDefault",
                pool=ip_network("10.20.0.0/16"),
                gateway=ip_address("10.20.255.254"),
                reserved=(ip_address("10.20.5.9"), ip_address("10.20.200.1")),
            ),
            Subnet(space="s", pool=ip_network("fd00::/64")),
        ),
        "options": {"pynet.mode": "bridge", "flag": ""},
        "internal": True,
    }


async def test_null_ipam_passes_to_the_driver(docker, networks):
    """`--ipam-driver null` gives the pool 0.0.0.0/0 without a gateway."""
    data = [{"AddressSpace": "null", "Pool": "0.0.0.0/0"}]
    kwargs, _ = await accepted(docker, networks, CREATE, sound(CREATE, IPv4Data=data))
    assert kwargs["subnets"] == (Subnet(space="null", pool=ip_network("0.0.0.0/0")),)


@pytest.mark.parametrize("empty", [None, []])
async def test_network_of_ipv6_alone_has_no_ipv4(docker, networks, empty):
    """With `--ipv4=false` the list of IPv4 pools is empty."""
    request = sound(CREATE, IPv4Data=empty, IPv6Data=[{"Pool": "fd00::/64"}])
    kwargs, _ = await accepted(docker, networks, CREATE, request)
    assert [str(subnet.pool) for subnet in kwargs["subnets"]] == ["fd00::/64"]


async def test_several_subnets_of_a_family_arrive_in_order(docker, networks):
    """Several `--subnet` are several entries."""
    data = [{"Pool": "10.2.0.0/24"}, {"Pool": "10.1.0.0/24"}]
    kwargs, _ = await accepted(docker, networks, CREATE, sound(CREATE, IPv4Data=data))
    pools = [str(subnet.pool) for subnet in kwargs["subnets"]]
    assert pools == ["10.2.0.0/24", "10.1.0.0/24"]


@pytest.mark.parametrize(
    ("family", "change", "field"),
    [
        ("IPv4Data", {"Pool": "10.1.0.5/16"}, "Pool"),
        ("IPv4Data", {"Pool": "10.1.0.0"}, "Pool"),
        ("IPv4Data", {"Pool": "10.1.0.0/33"}, "Pool"),
        ("IPv4Data", {"Pool": "10.1.0.0/255.255.0.0"}, "Pool"),
        ("IPv4Data", {"Pool": "10.1.0.0/-1"}, "Pool"),
        ("IPv4Data", {"Pool": "10.1.0/16"}, "Pool"),
        ("IPv4Data", {"Pool": "010.1.0.0/16"}, "Pool"),
        ("IPv4Data", {"Pool": ""}, "Pool"),
        ("IPv4Data", {"Pool": "fd00::/64"}, "Pool"),
        ("IPv4Data", {"Pool": "10.1.0.0/16 "}, "Pool"),
        ("IPv4Data", {"Pool": "１0.1.0.0/16"}, "Pool"),  # noqa: RUF001
        ("IPv6Data", {"Pool": "10.1.0.0/16"}, "Pool"),
        ("IPv6Data", {"Pool": "fd00::1/64"}, "Pool"),
        ("IPv6Data", {"Pool": "fe80::%eth0/64"}, "Pool"),
        ("IPv4Data", {"Gateway": "10.1.0.1"}, "Gateway"),
        ("IPv4Data", {"Gateway": "10.1.0.1/24"}, "Gateway"),
        ("IPv4Data", {"Gateway": "10.1.0.1/32"}, "Gateway"),
        ("IPv4Data", {"Gateway": "10.2.0.1/16"}, "Gateway"),
        ("IPv4Data", {"Gateway": "fd00::1/16"}, "Gateway"),
        ("IPv4Data", {"Gateway": "gateway"}, "Gateway"),
        ("IPv4Data", {"AuxAddresses": {"nas": "10.1.0.9"}}, "AuxAddresses['nas']"),
        ("IPv4Data", {"AuxAddresses": {"nas": "10.2.0.9/16"}}, "AuxAddresses['nas']"),
        ("IPv4Data", {"AuxAddresses": {"nas": ""}}, "AuxAddresses['nas']"),
    ],
)
@pytest.mark.parametrize("method", [CREATE, "NetworkDriver.AllocateNetwork"])
async def test_bad_subnet_is_refused_by_the_name_of_its_field(
    docker, networks, method, family, change, field
):
    """Pools without host bits, of the right family; addresses with their prefix."""
    data = [{"AddressSpace": "s", "Pool": "10.1.0.0/16", **change}]
    text = await refused(docker, networks, method, sound(method, **{family: data}))
    assert text.startswith(f"{field} ")


async def test_host_bits_are_refused_with_the_pool_to_use(docker, networks):
    """The refusal tells what would be right."""
    request = sound(CREATE, IPv4Data=[{"Pool": "10.1.0.5/16"}])
    text = await refused(docker, networks, CREATE, request)
    assert text == (
        "Pool 10.1.0.5/16 has bits set right of its prefix; use 10.1.0.0/16"
    )


@pytest.mark.parametrize("method", [CREATE, "NetworkDriver.GwAllocCheck"])
@pytest.mark.parametrize("value", [7, None, True, ["a"], {"a": "b"}])
async def test_generic_option_that_is_no_text_is_refused(
    docker, networks, method, value
):
    """An option can only be text, and the refusal names it."""
    request = sound(method, Options={GENERIC: {"pynet.mtu": value}})
    text = await refused(docker, networks, method, request)
    assert text.startswith("option 'pynet.mtu' must be text, not ")


@pytest.mark.parametrize("method", ["NetworkDriver.AllocateNetwork", REQUEST_POOL])
async def test_flat_option_that_is_no_text_is_refused(docker, networks, method):
    """Under swarm and for pools the user's options are at the top."""
    request = sound(method, Options={"a": "b", "c": 7})
    text = await refused(docker, networks, method, request)
    assert text.startswith("option 'c' must be text, not int")


@pytest.mark.parametrize(
    "options",
    [
        {GENERIC: "x"},
        {GENERIC: []},
        {"com.docker.network.internal": "true"},
        {"com.docker.network.internal": 1},
        {GENERIC: {f"k{n}": "" for n in range(257)}},
        {GENERIC: {"k": "x" * 70_000}},
        {GENERIC: {"k" * 5000: ""}},
    ],
)
async def test_bad_network_options_are_refused(docker, networks, options):
    """Docker's own options have their types, and all is bounded."""
    await refused(docker, networks, CREATE, sound(CREATE, Options=options))


@pytest.mark.parametrize("generic", [None, {}])
async def test_no_driver_options_is_an_empty_map(docker, networks, generic):
    """A network without `-o` has no options, whichever way Docker says so."""
    request = sound(CREATE, Options={GENERIC: generic})
    kwargs, _ = await accepted(docker, networks, CREATE, request)
    assert (kwargs["options"], kwargs["internal"]) == ({}, False)


async def test_too_many_subnets_are_refused(docker, networks):
    """Lists are bounded."""
    data = [{"Pool": f"10.{n}.0.0/16"} for n in range(65)]
    text = await refused(docker, networks, CREATE, sound(CREATE, IPv4Data=data))
    assert "`$.IPv4Data`" in text


async def test_allocation_answers_the_whole_map(docker, networks):
    """Under swarm the answered options replace the user's: his must be among them."""
    method = "NetworkDriver.AllocateNetwork"
    kwargs, answer = await accepted(docker, networks, method, SOUND[method])
    assert answer == {"Options": {"com.example.vni": "4242", "pynet.vni": "10000001"}}
    assert kwargs["subnets"][0].space == ""


@pytest.mark.parametrize("internal", [True, False])
async def test_gateway_check_answers_both_families(docker, networks, internal):
    """The driver decides by the options and by `--internal`."""
    options = {GENERIC: {"a": "b"}, "com.docker.network.internal": internal}
    kwargs, answer = await accepted(
        docker, networks, "NetworkDriver.GwAllocCheck", {"Options": options}
    )
    assert answer == {"SkipIPv4": internal, "SkipIPv6": internal}
    assert kwargs == {"internal": internal}


# CreateEndpoint.


async def test_endpoint_arrives_as_model_values(docker, networks):
    """Both addresses and the user's MAC arrive; no MAC is answered then."""
    interface = {
        "Address": "10.1.0.2/16",
        "AddressIPv6": "fd77:0:0:1::2/64",
        "MacAddress": "02:AB:cd:00:00:01",
    }
    options = {
        PORTMAP: [],
        "com.docker.network.endpoint.macaddress": "AkIKPAkJ",
        "com.docker.network.endpoint.dnsservers": ["192.0.2.53"],
        "com.example.qos": "gold",
        "com.docker.network.endpoint.ifname": "lan7",
    }
    request = sound(ENDPOINT_CALL, Interface=interface, Options=options)
    kwargs, answer = await accepted(docker, networks, ENDPOINT_CALL, request)
    assert kwargs == {
        "ipv4": ip_interface("10.1.0.2/16"),
        "ipv6": ip_interface("fd77:0:0:1::2/64"),
        "mac": "02:ab:cd:00:00:01",
        "attach": "",
    }
    assert answer == {"Interface": {}}
    assert networks.calls[0][1] == (NETWORK, ENDPOINT)


@pytest.mark.parametrize(
    "interface", [None, {}, {"Address": "", "AddressIPv6": "", "MacAddress": ""}]
)
async def test_endpoint_without_addresses_has_none(docker, networks, interface):
    """With the null IPAM all is empty: the driver decides."""
    request = sound(ENDPOINT_CALL, Interface=interface)
    kwargs, _ = await accepted(docker, networks, ENDPOINT_CALL, request)
    assert kwargs == {"ipv4": None, "ipv6": None, "mac": "", "attach": ""}


async def test_answer_has_no_address_that_docker_sent(docker):
    """Docker refuses even the echo of an address: only the MAC it lacks is told."""
    reply = await docker.call(ENDPOINT_CALL, SOUND[ENDPOINT_CALL])
    assert reply.json == {"Interface": {"MacAddress": "02:42:0a:01:00:02"}}


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("Address", "10.1.0.2"),
        ("Address", "10.1.0.2/33"),
        ("Address", "fd00::2/64"),
        ("Address", "x"),
        ("Address", "1" * 65),
        ("AddressIPv6", "10.1.0.2/16"),
        ("AddressIPv6", "fd00::2"),
        ("AddressIPv6", "fe80::1%eth0/64"),
        ("MacAddress", "01:00:5e:00:00:01"),
        ("MacAddress", "ff:ff:ff:ff:ff:ff"),
        ("MacAddress", "00:00:00:00:00:00"),
        ("MacAddress", "02:42:0a:01:00"),
        ("MacAddress", "02:42:0a:01:00:02:03:04"),
        ("MacAddress", "02-42-0a-01-00-02"),
        ("MacAddress", "0242.0a01.0002"),
        ("MacAddress", "02:42:0a:01:00:0g"),
        ("MacAddress", "02:42:0a:01:00:02\n"),
    ],
)
async def test_bad_interface_is_refused_by_the_name_of_its_field(
    docker, networks, field, text
):
    """Addresses have their prefix and family; a MAC is one unicast address."""
    request = sound(ENDPOINT_CALL, Interface={field: text})
    text = await refused(docker, networks, ENDPOINT_CALL, request)
    assert f"Interface.{field}" in text


# Join.


async def test_join_answer_has_dockers_fields(docker, networks):
    """The device, its prefix and plain gateway addresses are told."""
    _, answer = await accepted(docker, networks, JOIN, SOUND[JOIN])
    assert answer == {
        "InterfaceName": {"SrcName": "pe-0123456789", "DstPrefix": "eth"},
        "Gateway": "10.1.0.1",
        "GatewayIPv6": "",
        "StaticRoutes": [],
        "DisableGatewayService": False,
    }
    assert networks.calls == [("join", (NETWORK, ENDPOINT, SANDBOX), {})]


async def test_join_answer_of_an_ipv6_endpoint(docker, networks):
    """A missing gateway is "", and the gateway service can be turned off."""

    async def join(*_):
        return Attachment(
            device="pe-1",
            prefix="lan",
            gateway6=ip_address("fd00::1"),
            disable_gateway_service=True,
        )

    networks.join = join
    reply = await docker.call(JOIN, SOUND[JOIN])
    assert reply.json == {
        "InterfaceName": {"SrcName": "pe-1", "DstPrefix": "lan"},
        "Gateway": "",
        "GatewayIPv6": "fd00::1",
        "StaticRoutes": [],
        "DisableGatewayService": True,
    }


async def test_join_ignores_the_generic_map_of_links(docker):
    """Docker 20.10 leaks a map with nulls when it knows the default bridge."""
    generic = {"ChildEndpoints": None, "ParentEndpoints": None}
    for method in (JOIN, PROGRAM):
        request = sound(method, Options={GENERIC: generic})
        assert (await docker.call(method, request)).status == 200


@pytest.mark.parametrize(
    "key", ["", "netns/0123", "/" + "x" * 1024, "/run/a\x00b", "/run/a\nb", "/"]
)
async def test_bad_sandbox_key_is_refused(docker, networks, key):
    """A sandbox is an absolute path of sane length."""
    text = await refused(docker, networks, JOIN, sound(JOIN, SandboxKey=key))
    assert "`$.SandboxKey`" in text


async def test_oper_info_is_an_object(docker):
    """`Value` must be an object, even an empty one."""
    method = "NetworkDriver.EndpointOperInfo"
    assert (await docker.call(method, SOUND[method])).json == {"Value": {}}


# Ports.


@pytest.mark.parametrize(
    ("entry", "port"),
    [
        (
            {"Proto": 6, "Port": 80, "HostPort": 8080, "HostPortEnd": 8080},
            PortRequest(protocol=6, port=80, host_port=8080, host_port_end=8080),
        ),
        (
            {
                "Proto": 17,
                "Port": 53,
                "HostIP": "127.0.0.1",
                "HostPort": 0,
                "HostPortEnd": 0,
            },
            PortRequest(protocol=17, port=53, host_ip=ip_address("127.0.0.1")),
        ),
        (
            {"Proto": 6, "Port": 80, "HostIP": "::1", "HostPort": 8085},
            PortRequest(
                protocol=6,
                port=80,
                host_ip=ip_address("::1"),
                host_port=8085,
                host_port_end=8085,
            ),
        ),
        (
            {"Proto": 132, "Port": 80, "HostPort": 7000, "HostPortEnd": 7005},
            PortRequest(protocol=132, port=80, host_port=7000, host_port_end=7005),
        ),
        ({"Proto": 6, "Port": 65535}, PortRequest(protocol=6, port=65535)),
    ],
)
async def test_port_arrives_as_a_model_value(docker, networks, entry, port):
    """All forms of `-p` arrive; host port 0 leaves the choice to the driver."""
    request = sound(PROGRAM, Options={PORTMAP: [{"IP": "", "HostIP": "", **entry}]})
    kwargs, answer = await accepted(docker, networks, PROGRAM, request)
    assert kwargs == {"ports": (port,), "ipv6": True}
    assert answer == {}


@pytest.mark.parametrize("method", [PROGRAM, JOIN])
@pytest.mark.parametrize(
    "change",
    [
        {"Proto": 1},
        {"Proto": "tcp"},
        {"Proto": 256},
        {"Proto": -6},
        {"Proto": None},
        {"Port": 0},
        {"Port": 65536},
        {"Port": -1},
        {"Port": "80"},
        {"Port": 80.5},
        {"HostPort": -1},
        {"HostPort": 65536},
        {"HostPortEnd": 65536},
        {"HostPort": 8080, "HostPortEnd": 8079},
        {"HostPort": 0, "HostPortEnd": 8080},
        {"HostIP": "localhost"},
        {"HostIP": "10.0.0.0/8"},
        {"HostIP": "fe80::1%eth0"},
        {"HostIP": None},
    ],
)
async def test_bad_port_is_refused(docker, networks, method, change):
    """A port is of a protocol Docker knows, in range, on an address."""
    entry = {"Proto": 6, "Port": 80, "HostIP": "", "HostPort": 0, "HostPortEnd": 0}
    request = sound(method, Options={PORTMAP: [{**entry, **change}]})
    text = await refused(docker, networks, method, request)
    assert next(iter(change)) in text


@pytest.mark.parametrize("portmap", [None, []])
async def test_nothing_published_is_an_empty_list(docker, networks, portmap):
    """The list is there and empty when nothing is published."""
    request = sound(PROGRAM, Options={PORTMAP: portmap})
    kwargs, _ = await accepted(docker, networks, PROGRAM, request)
    assert kwargs["ports"] == ()


async def test_a_thousand_ports_fit(docker, networks):
    """The largest bodies Docker sends are port lists."""
    ports = [
        {"Proto": 6, "IP": "", "Port": n, "HostIP": "192.0.2.100", "HostPort": n}
        for n in range(1000, 2000)
    ]
    request = sound(PROGRAM, Options={PORTMAP: ports})
    kwargs, _ = await accepted(docker, networks, PROGRAM, request)
    assert len(kwargs["ports"]) == 1000


async def test_too_many_ports_are_refused(docker, networks):
    """Lists are bounded."""
    entry = {"Proto": 6, "Port": 80}
    request = sound(PROGRAM, Options={PORTMAP: [entry] * 8193})
    assert "of length <= 8192" in await refused(docker, networks, PROGRAM, request)


@pytest.mark.parametrize("flag", [True, False])
async def test_ipv6_host_ports_are_left_alone_if_docker_says_so(docker, networks, flag):
    """`no_proxy_6to4` true: another endpoint is the gateway for IPv6."""
    option = "com.docker.network.driver.private.no_proxy_6to4"
    request = sound(PROGRAM, Options={option: flag})
    kwargs, _ = await accepted(docker, networks, PROGRAM, request)
    assert kwargs["ipv6"] is not flag


# Discovery.


@pytest.mark.parametrize(
    ("method", "gone"),
    [("NetworkDriver.DiscoverNew", False), ("NetworkDriver.DiscoverDelete", True)],
)
@pytest.mark.parametrize("own", [True, False])
async def test_discovered_host_is_told(docker, networks, method, gone, own):
    """The address, whether it went, and whether it is this host arrive."""
    data = {"Address": "192.0.2.1", "BindAddress": "", "Self": own}
    kwargs, _ = await accepted(
        docker, networks, method, sound(method, DiscoveryData=data)
    )
    assert networks.calls[0][1] == ("192.0.2.1",)
    assert kwargs == {"gone": gone, "own": own}


async def test_other_discoveries_are_none_of_ours(docker, networks):
    """Docker has types of news that are no hosts; they do no harm."""
    method = "NetworkDriver.DiscoverNew"
    for data in ([1, 2], None, {"Keys": []}):
        request = sound(method, DiscoveryType=2, DiscoveryData=data)
        assert (await docker.call(method, request)).status == 200
    assert networks.calls == []


@pytest.mark.parametrize("data", [None, {}, [], {"Address": ""}, {"Address": "host"}])
async def test_bad_host_is_refused(docker, networks, data):
    """A host has an address."""
    method = "NetworkDriver.DiscoverNew"
    await refused(docker, networks, method, sound(method, DiscoveryData=data))


# IPAM.


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (
            {"AddressSpace": "pynet-local"},
            {
                "space": "pynet-local",
                "pool": None,
                "sub_pool": None,
                "options": {},
                "version": 4,
            },
        ),
        (
            {"AddressSpace": "pynet-local", "Pool": "", "SubPool": "", "V6": True},
            {
                "space": "pynet-local",
                "pool": None,
                "sub_pool": None,
                "options": {},
                "version": 6,
            },
        ),
        (
            {
                "AddressSpace": "pynet-global",
                "Pool": "10.60.0.0/16",
                "SubPool": "10.60.7.0/24",
                "Options": {"pynet.network": "x"},
                "V6": False,
            },
            {
                "space": "pynet-global",
                "pool": ip_network("10.60.0.0/16"),
                "sub_pool": ip_network("10.60.7.0/24"),
                "options": {"pynet.network": "x"},
                "version": 4,
            },
        ),
    ],
)
async def test_pool_arrives_as_model_values(docker, networks, request_, expected):
    """Space, pool, sub-pool, options and family arrive."""
    kwargs, _ = await accepted(docker, networks, REQUEST_POOL, request_)
    assert kwargs == expected


async def test_pool_is_answered_with_its_id(docker):
    """The answer has the id, the pool as CIDR, and an empty map."""
    reply = await docker.call(REQUEST_POOL, SOUND[REQUEST_POOL])
    assert reply.json == {"PoolID": POOL_ID, "Pool": "10.99.0.0/24", "Data": {}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"Pool": "10.60.1.0/16"}, "Pool"),
        ({"Pool": "10.60.0.0"}, "Pool"),
        ({"Pool": "fd00::/64"}, "Pool"),
        ({"Pool": "10.60.0.0/16", "V6": True}, "Pool"),
        ({"Pool": "x"}, "Pool"),
        ({"Pool": "10.60.0.0/16", "SubPool": "10.60.7.1/24"}, "SubPool"),
        ({"Pool": "10.60.0.0/16", "SubPool": "fd00::/64"}, "SubPool"),
        ({"AddressSpace": "a/b"}, "AddressSpace"),
        ({"AddressSpace": "x" * 129}, "AddressSpace"),
    ],
)
async def test_bad_pool_is_refused_by_the_name_of_its_field(
    docker, networks, change, field
):
    """Pools and sub-pools have no host bits and the family of `V6`."""
    text = await refused(docker, networks, REQUEST_POOL, sound(REQUEST_POOL, **change))
    assert text.startswith(f"{field} ") or f"`$.{field}`" in text


@pytest.mark.parametrize(
    ("address", "options", "expected"),
    [
        ("", None, {"address": None, "gateway": False, "name": ""}),
        (
            "10.99.0.9",
            {"RequestAddressType": "com.docker.network.gateway"},
            {"address": ip_address("10.99.0.9"), "gateway": True, "name": ""},
        ),
        (
            "",
            {
                "com.docker.network.endpoint.name": "web",
                "com.docker.network.endpoint.macaddress": "02:42:00:00:00:01",
                "com.docker.network.ipam.serial": "true",
            },
            {"address": None, "gateway": False, "name": "web"},
        ),
    ],
)
async def test_address_arrives_as_model_values(
    docker, networks, address, options, expected
):
    """The wanted address, whether for a gateway, and the name for whom arrive."""
    request = sound(REQUEST_ADDRESS, Address=address, Options=options)
    kwargs, _ = await accepted(docker, networks, REQUEST_ADDRESS, request)
    assert kwargs == expected


async def test_address_is_answered_with_the_prefix_of_its_pool(docker):
    """A plain address, or one with /32, is of no use to Docker."""
    reply = await docker.call(REQUEST_ADDRESS, SOUND[REQUEST_ADDRESS])
    assert reply.json == {"Address": "10.99.0.2/24", "Data": {}}


@pytest.mark.parametrize("method", [REQUEST_ADDRESS, "IpamDriver.ReleaseAddress"])
@pytest.mark.parametrize(
    "text", ["10.99.0.2/24", "x", "10.99.0", "fe80::1%eth0", "1" * 65]
)
async def test_bad_address_is_refused(docker, networks, method, text):
    """Addresses of pools are plain ones."""
    text = await refused(docker, networks, method, sound(method, Address=text))
    assert text.startswith("Address ") or "`$.Address`" in text


async def test_release_without_an_address_is_refused(docker, networks):
    """There is no releasing of nothing."""
    method = "IpamDriver.ReleaseAddress"
    await refused(docker, networks, method, sound(method, Address=""))


async def test_ipv6_addresses_are_values(docker, networks):
    """Any spelling of an address is the same address."""
    method = "IpamDriver.ReleaseAddress"
    for text in ("fd77:0:0:1::2", "fd77:0000:0:1:0:0:0:2"):
        request = {"PoolID": "pynet-local/fd77:0:0:1::/64", "Address": text}
        await accepted(docker, networks, method, request)
        assert networks.calls[-1][1][1] == ip_address("fd77:0:0:1::2")


async def test_error_texts_repeat_little_of_hostile_input(docker, networks):
    """What is refused is shown quoted and short."""
    request = sound(CREATE, Options={GENERIC: {"k\n\x1b[31m" + "x" * 1000: 7}})
    text = await refused(docker, networks, CREATE, request)
    assert len(text) < 250
    assert text.isprintable()


async def test_body_is_read_as_utf_8(docker, networks):
    """Text that is not UTF-8 is refused."""
    body = json.dumps(SOUND[JOIN]).encode().replace(b"b" * 64, b"\xff" * 64)
    reply = await docker.post(f"/{JOIN}", body)
    assert reply.status == 400
    assert networks.calls == []


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("Address", "224.0.0.2/24"),
        ("Address", "127.1.0.2/24"),
        ("Address", "0.0.0.0/24"),
        ("AddressIPv6", "ff00::2/64"),
        ("AddressIPv6", "::1/64"),
    ],
)
async def test_an_address_that_no_host_has(docker, networks, field, text):
    """Such an endpoint is refused: no host could read its record."""
    request = sound(ENDPOINT_CALL, Interface={field: text})
    said = await refused(docker, networks, ENDPOINT_CALL, request)
    assert said.startswith(f"Interface.{field} {text} is no address for a container")


@pytest.mark.parametrize("text", ["/run/\x85", "/run/\x9b1m"])
async def test_control_characters_in_a_sandbox_key(docker, networks, text):
    """A terminal takes some characters above ASCII for commands as well."""
    said = await refused(docker, networks, JOIN, sound(JOIN, SandboxKey=text))
    assert "`$.SandboxKey`" in said
