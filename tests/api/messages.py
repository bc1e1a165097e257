"""A sound request for each method that has arguments, as Docker 29 sends it."""

import copy

NETWORK = "a" * 64
ENDPOINT = "b" * 64
SANDBOX = "/var/run/docker/netns/0123456789ab"
PORTMAP = "com.docker.network.portmap"
GENERIC = "com.docker.network.generic"
POOL_ID = "pynet-local/10.99.0.0/24"

_SUBNET = {
    "AddressSpace": "LocalDefault",
    "Pool": "10.1.0.0/16",
    "Gateway": "10.1.0.1/16",
    "AuxAddresses": {},
}
_OPTIONS = {
    "com.docker.network.enable_ipv4": True,
    "com.docker.network.enable_ipv6": False,
    GENERIC: {"com.example.site": "berlin"},
}
_PORTS = {
    "com.docker.network.endpoint.exposedports": [{"Proto": 6, "Port": 80}],
    PORTMAP: [
        {
            "Proto": 6,
            "IP": "",
            "Port": 80,
            "HostIP": "",
            "HostPort": 8080,
            "HostPortEnd": 8080,
        }
    ],
}
_IDS = {"NetworkID": NETWORK, "EndpointID": ENDPOINT}
_NODE = {
    "DiscoveryType": 1,
    "DiscoveryData": {"Address": "192.0.2.1", "BindAddress": "", "Self": False},
}

SOUND = {
    "NetworkDriver.AllocateNetwork": {
        "NetworkID": NETWORK[:25],
        "Options": {"com.example.vni": "4242"},
        "IPv4Data": [{**_SUBNET, "AddressSpace": ""}],
        "IPv6Data": None,
    },
    "NetworkDriver.FreeNetwork": {"NetworkID": NETWORK[:25]},
    "NetworkDriver.CreateNetwork": {
        "NetworkID": NETWORK,
        "Options": _OPTIONS,
        "IPv4Data": [_SUBNET],
        "IPv6Data": [],
    },
    "NetworkDriver.DeleteNetwork": {"NetworkID": NETWORK},
    "NetworkDriver.CreateEndpoint": {
        **_IDS,
        "Interface": {"Address": "10.1.0.2/16", "AddressIPv6": "", "MacAddress": ""},
        "Options": _PORTS,
    },
    "NetworkDriver.EndpointOperInfo": _IDS,
    "NetworkDriver.DeleteEndpoint": _IDS,
    "NetworkDriver.Join": {**_IDS, "SandboxKey": SANDBOX, "Options": _PORTS},
    "NetworkDriver.Leave": _IDS,
    "NetworkDriver.DiscoverNew": _NODE,
    "NetworkDriver.DiscoverDelete": _NODE,
    "NetworkDriver.ProgramExternalConnectivity": {**_IDS, "Options": _PORTS},
    "NetworkDriver.RevokeExternalConnectivity": _IDS,
    "NetworkDriver.GwAllocCheck": {"Options": _OPTIONS},
    "IpamDriver.RequestPool": {
        "AddressSpace": "pynet-local",
        "Pool": "10.99.0.0/24",
        "SubPool": "",
        "Options": {},
        "V6": False,
    },
    "IpamDriver.ReleasePool": {"PoolID": POOL_ID},
    "IpamDriver.RequestAddress": {"PoolID": POOL_ID, "Address": "", "Options": None},
    "IpamDriver.ReleaseAddress": {"PoolID": POOL_ID, "Address": "10.99.0.2"},
}
ARGUMENTLESS = [
    "Plugin.Activate",
    "NetworkDriver.GetCapabilities",
    "IpamDriver.GetCapabilities",
    "IpamDriver.GetDefaultAddressSpaces",
]
REMOVING = {
    "NetworkDriver.FreeNetwork": "free",
    "NetworkDriver.DeleteNetwork": "delete",
    "NetworkDriver.DeleteEndpoint": "delete_endpoint",
    "NetworkDriver.Leave": "leave",
    "NetworkDriver.RevokeExternalConnectivity": "revoke",
    "IpamDriver.ReleasePool": "release_pool",
    "IpamDriver.ReleaseAddress": "release_address",
}


def sound(method, **changes):
    """Return the method's sound request, with other values for some fields."""
    return {**copy.deepcopy(SOUND[method]), **changes}


def without(method, field):
    """Return the method's sound request without a field."""
    return {k: v for k, v in SOUND[method].items() if k != field}
