"""Small stand-ins for the two drivers: they remember their calls and do no more."""

from ipaddress import IPv4Address, IPv4Interface, IPv4Network, ip_address, ip_network

from cnmdriver.errors import NotFound
from cnmdriver.model import Attachment


class FakeNetworks:
    """A network driver that notes each call; `fails` and `waits` play trouble."""

    def __init__(self) -> None:
        self.calls = []
        self.fails = {}
        self.waits = {}
        self.done = []

    async def _note(self, name, /, *args, **kwargs) -> None:
        self.calls.append((name, args, kwargs))
        if name in self.waits:
            await self.waits[name]()
        if name in self.fails:
            raise self.fails[name]
        self.done.append(name)

    async def create(self, docker_id, **kwargs):
        await self._note("create", docker_id, **kwargs)

    async def delete(self, docker_id):
        await self._note("delete", docker_id)

    async def create_endpoint(self, docker_id, endpoint_id, **kwargs):
        await self._note("create_endpoint", docker_id, endpoint_id, **kwargs)
        return "" if kwargs["mac"] else "02:42:0a:01:00:02"

    async def delete_endpoint(self, docker_id, endpoint_id):
        await self._note("delete_endpoint", docker_id, endpoint_id)

    async def join(self, docker_id, endpoint_id, sandbox):
        await self._note("join", docker_id, endpoint_id, sandbox)
        return Attachment(
            device="pe-0123456789", prefix="eth", gateway4=IPv4Address("10.1.0.1")
        )

    async def leave(self, docker_id, endpoint_id):
        await self._note("leave", docker_id, endpoint_id)

    async def program(self, docker_id, endpoint_id, **kwargs):
        await self._note("program", docker_id, endpoint_id, **kwargs)

    async def revoke(self, docker_id, endpoint_id):
        await self._note("revoke", docker_id, endpoint_id)

    async def info(self, docker_id, endpoint_id):
        await self._note("info", docker_id, endpoint_id)

    async def allocate(self, docker_id, **kwargs):
        await self._note("allocate", docker_id, **kwargs)
        return {**kwargs["options"], "pynet.vni": "10000001"}

    async def free(self, docker_id):
        await self._note("free", docker_id)

    async def discover(self, address, **kwargs):
        await self._note("discover", address, **kwargs)

    def skips_gateway(self, options, *, internal):
        self.calls.append(("skips_gateway", (options,), {"internal": internal}))
        if "skips_gateway" in self.fails:
            raise self.fails["skips_gateway"]
        return internal


class FakeIpam:
    """An IPAM driver with one pool and one address, which notes each call."""

    def __init__(self, networks: FakeNetworks) -> None:
        self._note = networks._note

    async def request_pool(self, **kwargs):
        await self._note("request_pool", **kwargs)
        pool = kwargs["pool"] or ip_network("10.99.0.0/24")
        return f"{kwargs['space']}/{pool}", pool

    async def release_pool(self, pool_id):
        await self._note("release_pool", pool_id)

    async def request_address(self, pool_id, **kwargs):
        await self._note("request_address", pool_id, **kwargs)
        pool = IPv4Network("10.99.0.0/24")
        address = kwargs["address"] or ip_address("10.99.0.2")
        if address not in pool:
            raise NotFound(f"address {address} is not in the pool {pool}")
        return IPv4Interface((address, 24))

    async def release_address(self, pool_id, address):
        await self._note("release_address", pool_id, address)
