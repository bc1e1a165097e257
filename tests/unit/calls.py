"""Docker's side of the calls, in the order Docker makes them, roll-backs included."""

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface, ip_network

from cnmdriver.errors import DriverError
from cnmdriver.model import IPAddress, IPInterface, PortRequest, Subnet
from tests.fakes import Rig

TCP, UDP = 6, 17


def port(
    container: int,
    host: int = 0,
    end: int | None = None,
    *,
    ip: str | None = None,
    protocol: int = TCP,
) -> PortRequest:
    """Word `-p [ip:]host[-end]:container`."""
    return PortRequest(
        protocol=protocol,
        port=container,
        host_ip=ip_address(ip) if ip else None,
        host_port=host,
        host_port_end=host if end is None else end,
    )


@dataclass
class Net:
    """A network as Docker knows it."""

    id: str
    pools: list[tuple[str, str]] = field(default_factory=list)
    """Pool ids, each with its subnet."""
    held: list[tuple[str, IPAddress]] = field(default_factory=list)
    """Gateway and auxiliary addresses with their pool ids."""
    subnets: list[Subnet] = field(default_factory=list)


@dataclass
class Box:
    """A container's endpoint as Docker knows it."""

    id: str
    net: Net
    held: list[tuple[str, IPAddress]] = field(default_factory=list)
    addresses: list[IPInterface] = field(default_factory=list)


class Docker:
    """Makes the calls of one dockerd with pynet for both drivers."""

    def __init__(self, rig: Rig) -> None:
        """Call these drivers."""
        self.rig = rig
        self.checks = False
        """Whether it asks first if a gateway is needed, as 28.0 and later do."""
        self.nets: dict[str, Net] = {}
        self.boxes: dict[str, Box] = {}

    async def pool(
        self, cidr: str | None, *, sub: str | None = None, version: int = 4, **options
    ) -> str:
        """RequestPool; returns the pool's id."""
        pool_id, _ = await self.rig.ipam.request_pool(
            space="local",
            pool=ip_network(cidr) if cidr else None,
            sub_pool=ip_network(sub) if sub else None,
            options={k.replace("_", "."): v for k, v in options.items()},
            version=ip_network(cidr).version if cidr else version,
        )
        return pool_id

    async def address(
        self, pool_id: str, ip: str | None = None, *, gateway=False, name=""
    ) -> IPInterface:
        """RequestAddress."""
        return await self.rig.ipam.request_address(
            pool_id, address=ip_address(ip) if ip else None, gateway=gateway, name=name
        )

    async def create(
        self,
        name: str,
        *cidrs: str | None,
        gateway: str | None = None,
        aux: tuple[str, ...] = (),
        sub: str | None = None,
        internal: bool = False,
        options: dict[str, str] | None = None,
        **ipam: str,
    ) -> Net:
        """`docker network create -d pynet --ipam-driver pynet`."""
        net = Net(name)
        skip = self.checks and self.rig.networks.skips_gateway(
            options or {}, internal=internal
        )
        try:
            for cidr in cidrs or (None,):
                version = 6 if cidr == "ipv6" else 4
                text = None if cidr == "ipv6" else cidr
                await self.claim(
                    net, text, version, gateway="" if skip and not gateway else gateway,
                    aux=aux, sub=sub, ipam=ipam,
                )  # fmt: skip
            await self.rig.networks.create(
                name,
                subnets=tuple(net.subnets),
                options=options or {},
                internal=internal,
            )
        except DriverError:
            await self.give_back(net)
            raise
        self.nets[name] = net
        return net

    async def claim(self, net, cidr, version, *, gateway, aux, sub, ipam) -> None:
        """Claim one pool with its gateway, unless that is "", and auxiliary ones."""
        pool_id = await self.pool(cidr, sub=sub, version=version, **ipam)
        pool = ip_network("/".join(pool_id.split("/")[1:3]))
        net.pools.append((pool_id, str(pool)))
        own = None
        if gateway != "":
            own = (await self.address(pool_id, gateway, gateway=True)).ip
            net.held.append((pool_id, own))
        for text in aux:
            await self.address(pool_id, text)
            net.held.append((pool_id, ip_address(text)))
        net.subnets.append(
            Subnet(
                space="local",
                pool=pool,
                gateway=own,
                reserved=tuple(ip_address(text) for text in aux),
            )
        )

    async def give_back(self, net: Net) -> None:
        """Release a network's addresses and pools."""
        for pool_id, ip in net.held:
            await self.rig.ipam.release_address(pool_id, ip)
        for pool_id, _ in net.pools:
            await self.rig.ipam.release_pool(pool_id)

    async def remove(self, name: str) -> None:
        """`docker network rm`."""
        net = self.nets.pop(name)
        await self.give_back(net)
        await self.rig.networks.delete(name)

    async def start(
        self,
        box_id: str,
        name: str,
        *,
        ip: str | None = None,
        ports: tuple[PortRequest, ...] = (),
        mac: str = "",
    ) -> Box:
        """Start a container on a network."""
        box = await self.create_box(box_id, name, ip=ip, mac=mac)
        try:
            await self.rig.networks.join(name, box_id, f"/run/netns/{box_id}")
            await self.rig.networks.program(name, box_id, ports=ports, ipv6=True)
        except DriverError:
            await self.rig.networks.leave(name, box_id)
            await self.rig.networks.delete_endpoint(name, box_id)
            await self.release(box)
            raise
        return box

    async def create_box(self, box_id, name, *, ip=None, mac="") -> Box:
        """RequestAddress for each pool, then CreateEndpoint."""
        net = self.nets[name]
        box = Box(box_id, net)
        try:
            for pool_id, _ in net.pools:
                version = 6 if ":" in pool_id else 4
                own = ip if ip and ip_address(ip).version == version else None
                address = await self.address(pool_id, own, name=box_id)
                box.held.append((pool_id, address.ip))
                box.addresses.append(address)
            await self.rig.networks.create_endpoint(
                name, box_id, **families(box.addresses), mac=mac
            )
        except DriverError:
            await self.release(box)
            raise
        self.boxes[box_id] = box
        return box

    async def release(self, box: Box) -> None:
        """Release a container's addresses."""
        self.boxes.pop(box.id, None)
        for pool_id, ip in box.held:
            await self.rig.ipam.release_address(pool_id, ip)

    async def stop(self, box_id: str) -> None:
        """Stop a container."""
        box = self.boxes[box_id]
        await self.rig.networks.revoke(box.net.id, box_id)
        await self.rig.networks.leave(box.net.id, box_id)
        await self.rig.networks.delete_endpoint(box.net.id, box_id)
        await self.release(box)


def families(addresses) -> dict[str, IPInterface | None]:
    """Word addresses as CreateEndpoint does."""
    found = {a.version: a for a in map(ip_interface, addresses)}
    return {"ipv4": found.get(4), "ipv6": found.get(6)}
