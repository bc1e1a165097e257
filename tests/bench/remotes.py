"""
What one remote endpoint more costs a host, beside 10 to 10,000 that are there.

Measured from the record's arrival in the view to the kernel's answer, in a network
namespace of its own. The last column is how long it takes to write all from nothing.
"""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_network
from pathlib import Path

from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.driver.remotes import Remotes
from cnmdriver.driver.site import Site
from cnmdriver.model import Alive, Endpoint, Host, Member, Network, Subnet
from cnmdriver.plan import devices
from cnmdriver.store import records
from tests.fakes import rig

SIZES = (10, 100, 1_000, 10_000)
ROUNDS = 50
POOL4, POOL6 = ip_network("10.64.0.0/10"), ip_network("fd64::/64")
NET, FAR, VTEP = "bench", "far", "192.0.2.1"


def endpoint(number: int, host: str) -> Endpoint:
    """Return the record of an endpoint with addresses of both families."""
    four = IPv4Interface((POOL4[number + 2], POOL4.prefixlen))
    six = IPv6Interface((POOL6[number + 2], POOL6.prefixlen))
    return Endpoint(
        network=NET,
        id=f"endpoint{number}",
        host=host,
        boot="boot1",
        mac=devices.mac(four.ip),
        ipv4=four,
        ipv6=six,
    )


def refused() -> None:
    """End: what the kernel refuses is not worth measuring."""
    sys.exit("the kernel refused an entry: see above")


class Bench:
    """One host's view and kernel, fed with records by hand."""

    def __init__(self, site: Site) -> None:
        """Take a site that knows nothing yet."""
        self.site = site
        self.remotes = Remotes(site)
        self.remotes.alarm = refused
        self.revision = 1000

    def put(self, key: str, record: object | None) -> None:
        """Let a record arrive, or its deletion."""
        self.revision += 1
        value = None if record is None else records.encode(record)
        self.site.view.write(key, value, self.revision)

    async def start(self) -> None:
        """Make a network that this host carries, and another host."""
        here = self.site.host.id
        subnets = tuple(Subnet(space="bench", pool=pool) for pool in (POOL4, POOL6))
        network = Network(
            id=NET, mode="overlay", subnets=subnets, mtu=1450, vni=10_000_001,
            gateway="docker",
        )  # fmt: skip
        member = Member(network=NET, host=here, docker_id=NET)
        far = Host(
            id=FAR, name=FAR, version="bench", vtep=ip_address("192.0.2.2")
        )  # fmt: skip
        self.put(records.network(NET), network)
        self.put(records.member(NET, here), member)
        self.put(records.host(FAR), far)
        self.put(records.alive(FAR), Alive(instance="i", boot="b"))
        own = endpoint(-1, here)
        self.put(records.endpoint(NET, own.id), own)
        await self.site.dataplane.apply(self.site.network_plan(member))
        await self.remotes.carry(NET)

    async def change(self, number: int, *, there: bool) -> float:
        """Let an endpoint come or go; return the seconds until the kernel has it."""
        one = endpoint(number, FAR)
        begin = time.perf_counter()
        self.put(records.endpoint(NET, one.id), one if there else None)
        await self.remotes.update()
        return time.perf_counter() - begin

    async def fill(self, first: int, last: int) -> None:
        """Let many endpoints come at once."""
        for number in range(first, last):
            one = endpoint(number, FAR)
            self.put(records.endpoint(NET, one.id), one)
        await self.remotes.update()


async def measure() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        async with rig(Path(name)) as parts:
            here = parts.site.host.id
            kernel = Kernel(host=here, run_dir=Path(name, "run"))
            await kernel.open()
            host = Host(id=here, name="h1", version="bench", vtep=ip_address(VTEP))
            site = Site(host=host, boot="boot1", state=parts.state, dataplane=kernel)
            bench = Bench(site)
            await bench.start()
            print("remote endpoints    one more  one less  ratio   fill")
            await table(bench)
            await kernel.close()


async def table(bench: Bench) -> None:
    """Measure each size, and print a line for it."""
    have, first = 0, 0.0
    for size in SIZES:
        begin = time.perf_counter()
        await bench.fill(have, size)
        filled, have = time.perf_counter() - begin, size
        more, less = [], []
        for _ in range(ROUNDS):
            more.append(await bench.change(size, there=True))
            less.append(await bench.change(size, there=False))
        ms = [statistics.median(times) * 1000 for times in (more, less)]
        first = first or ms[0]
        print(
            f"{size:16,}  {ms[0]:7.2f} ms {ms[1]:6.2f} ms {ms[0] / first:6.2f}"
            f" {filled:6.2f} s"
        )


def main() -> None:
    """Go into namespaces of this program's own, and measure there."""
    if sys.argv[1:] != ["inside"]:
        argv = ["unshare", "--net", "--mount", sys.executable, "-m"]
        argv += ["tests.bench.remotes", "inside"]
        sys.exit(subprocess.run(argv, check=False).returncode)
    for command in (
        ("mount", "-t", "tmpfs", "none", "/run"),
        ("ip", "link", "set", "lo", "up"),
        ("ip", "addr", "add", f"{VTEP}/32", "dev", "lo"),
    ):
        subprocess.run(command, check=True)
    asyncio.run(measure())


if __name__ == "__main__":
    main()
