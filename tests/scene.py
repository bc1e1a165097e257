"""A host with something on it, made by the calls Docker would make."""

from ipaddress import IPv4Address, ip_interface, ip_network

from cnmdriver.model import TCP, UDP, PortRequest, Subnet
from tests.fakes import Rig

BLUE, GREEN = "b" * 64, "9" * 64
WEB, DB, BATCH = "e1" * 32, "e2" * 32, "e3" * 32
SANDBOX = "/var/run/docker/netns/"


async def network(rig: Rig, docker_id: str, *pools: str, **options: str) -> None:
    """Create a network whose pools and gateways come from our IPAM."""
    subnets = []
    for text in pools:
        cidr = ip_network(text)
        pool_id, _ = await rig.ipam.request_pool(
            space="local", pool=cidr, sub_pool=None, options={}, version=cidr.version
        )
        gateway = await rig.ipam.request_address(
            pool_id, address=cidr[1], gateway=True, name=""
        )
        subnets.append(Subnet(space="local", pool=cidr, gateway=gateway.ip))
    await rig.networks.create(
        docker_id,
        subnets=tuple(subnets),
        options={f"pynet.{name}": value for name, value in options.items()},
        internal=False,
    )


async def endpoint(rig: Rig, docker_id: str, endpoint_id: str, *addresses: str) -> None:
    """Create an endpoint whose addresses come from our IPAM."""
    faces = {ip_interface(a).version: ip_interface(a) for a in addresses}
    for face in faces.values():
        await rig.ipam.request_address(
            f"local/{face.network}", address=face.ip, gateway=False, name=""
        )
    await rig.networks.create_endpoint(
        docker_id, endpoint_id, ipv4=faces.get(4), ipv6=faces.get(6), mac=""
    )


async def populate(rig: Rig) -> None:
    """
    Make two networks with three endpoints.

    `blue` has both families, `web` and `db`; `green` has `batch`, which did not join
    yet, and `web` again. `web` publishes two ports.
    """
    rig.site.names.update(
        {BLUE: "blue", GREEN: "green", WEB: "web", DB: "db", BATCH: "batch"}
    )
    await network(rig, BLUE, "10.1.0.0/24", "fd00:1::/64")
    await network(rig, GREEN, "10.2.0.0/24", icc="false", bridge="green0")
    await endpoint(rig, BLUE, WEB, "10.1.0.2/24", "fd00:1::2/64")
    await endpoint(rig, BLUE, DB, "10.1.0.3/24", "fd00:1::3/64")
    await endpoint(rig, GREEN, BATCH, "10.2.0.2/24")
    await endpoint(rig, GREEN, "e4" * 32, "10.2.0.3/24")
    rig.site.names["e4" * 32] = "web"
    await rig.networks.join(BLUE, WEB, SANDBOX + "aaaaaaaaaaaa")
    await rig.networks.join(BLUE, DB, SANDBOX + "bbbbbbbbbbbb")
    await rig.networks.join(GREEN, "e4" * 32, SANDBOX + "aaaaaaaaaaaa")
    await rig.networks.program(BLUE, WEB, ports=(HTTP, DNS), ipv6=True)


HTTP = PortRequest(protocol=TCP, port=80, host_port=8080, host_port_end=8080)
DNS = PortRequest(
    protocol=UDP,
    port=53,
    host_ip=IPv4Address("127.0.0.1"),
    host_port=5353,
    host_port_end=5353,
)
