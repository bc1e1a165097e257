"""
Docker and its daemon, as far as the exhaustive tests of failpoints need them.

The daemon is a real process on a real kernel and a real store, and is spoken to over
its sockets. Docker is played: its calls in its order with its roll-backs, its moves of
devices, its lists and events, and what it does when a daemon dies under a call: it
repeats the call without its body, takes it for failed, and never removes twice.
"""

import base64
import http.client
import json
import queue
import secrets
import socketserver
import sqlite3
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any, Self

from cnmdriver.cli.client import Client, UnixConnection
from cnmdriver.errors import DriverError
from cnmdriver.lab.host import PLUGIN_SOCKET, Host
from cnmdriver.lab.machine import wait_until
from cnmdriver.model import IPInterface, IPNetwork, PortRequest, Subnet
from cnmdriver.plan.ops import GROUP
from tests.unit.calls import Box, Docker, Net, families

ADMIN = "/run/pynet/admin.sock"
DOCKER = "/run/played-docker.sock"
LOG = "/run/pynet.log"
GRACE = 3.0
"""Seconds before what Docker has lost is given back."""
MOMENT = 0.05
"""The same where no call can be under way, for which that is meant."""
SOON = 1.0
"""Seconds in which a change that was put off should have been written."""
NAMES = {"name", "owner", "endpoint", "network"}
"""What the daemon shows by another name until it has Docker's lists."""
PATIENCE = 15.0
"""Seconds for that, on a machine that has much else to do."""
KEPT = ("hosts/", "alive/", "fence/", "kept/", "watermarks/", "cluster")
"""What stays in the store when no network is left."""
KILLED = "-9"


class RefusedError(DriverError):
    """The daemon refused a call."""


class LostError(DriverError):
    """The daemon died under a call, and refused the repetition, which has no body."""


# The daemon.


class Daemon:
    """The daemon of a lab's host, started by `failpoint_daemon`."""

    def __init__(self, host: Host, **given: str) -> None:
        """Name its settings; nothing runs yet."""
        self.host = host
        settings = json.dumps({"log_format": "json", **given})
        starter = (sys.executable, "-m", "tests.faults.failpoint_daemon", settings, LOG)
        self.starter = host.popen(*starter)
        self.plugin: UnixConnection | None = None
        self.seen = 0

    def ask(self, line: str) -> str:
        """Give the starter a command and return its answer."""
        pipe = self.starter
        assert pipe.stdin is not None
        assert pipe.stdout is not None
        pipe.stdin.write(line + "\n")
        pipe.stdin.flush()
        answer = pipe.stdout.readline().strip()
        assert answer, f"the starter of daemons ended: {pipe.stdout.read()}"
        return answer

    def start(self, armed: str = "", grace: float = GRACE) -> None:
        """Start it, with failpoints; return when it serves."""
        self.ask(f"start {grace} {armed}")
        assert wait_until(self.serves, 20.0), self.log()[-3000:]

    def serves(self) -> bool:
        """Try to connect to its socket."""
        self.forget()
        plugin = UnixConnection(str(self.host.socket(PLUGIN_SOCKET)))
        try:
            plugin.connect()
        except OSError:
            plugin.close()
            state = self.ask("wait 0.001")
            assert state == "alive", f"{state}: {self.log()[-3000:]}"
            return False
        self.plugin = plugin
        return True

    def forget(self) -> None:
        """Close the connection, if there is one."""
        if self.plugin is not None:
            self.plugin.close()
            self.plugin = None

    def kill(self) -> None:
        """Kill it."""
        self.forget()
        assert self.ask("kill") == KILLED

    def close(self) -> None:
        """Kill it and its starter."""
        self.forget()
        with suppress(BrokenPipeError):
            self.starter.communicate("kill\n", timeout=10)

    def restart(self, armed: str = "", grace: float = GRACE) -> None:
        """Kill it and start it, with failpoints."""
        self.kill()
        self.news()
        self.start(armed, grace)

    def post(self, method: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Make a call as Docker does, on a connection that is kept."""
        if self.plugin is None:
            self.plugin = UnixConnection(str(self.host.socket(PLUGIN_SOCKET)))
        self.plugin.request("POST", f"/{method}", body)
        answer = self.plugin.getresponse()
        return answer.status, json.loads(answer.read())

    def log(self) -> str:
        """Return all it has logged."""
        path = self.host.socket(LOG)
        return path.read_text(errors="replace") if path.exists() else ""

    def news(self) -> list[dict[str, Any]]:
        """Return what it has logged since this was asked last."""
        text = self.log()
        fresh, self.seen = text[self.seen :], len(text)
        lines = [line for line in fresh.splitlines() if line.startswith("{")]
        assert "Traceback" not in fresh, fresh
        return [json.loads(line) for line in lines]


# What Docker tells its daemon of its own accord.


class Lists(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Docker's API: its lists, and an event for each change."""

    daemon_threads = True
    docker: Docker

    def __init__(self, path: str, docker: Docker) -> None:
        """Serve what this Docker has."""
        super().__init__(path, Asked)
        self.docker = docker
        self.hearers: list[queue.SimpleQueue[str]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Let daemons go that die while they ask."""

    def close(self) -> None:
        """Stop serving."""
        self.tell("end")
        self.shutdown()
        self.server_close()
        Path(str(self.server_address)).unlink()

    def tell(self, event: str = "{}\n") -> None:
        """Tell that something has changed."""
        for hearer in self.hearers:
            hearer.put(event)

    def networks(self) -> list[dict[str, Any]]:
        """List networks as Docker does."""
        return [
            {
                "Id": net.id,
                "Name": f"net{net.id[:4]}",
                "Driver": "pynet",
                "IPAM": {"Config": [{"Subnet": str(s.pool)} for s in net.subnets]},
                "Containers": {
                    box.id: {"EndpointID": box.id, "Name": f"box{box.id[:4]}"}
                    for box in list(self.docker.boxes.values())
                    if box.net.id == net.id
                },
            }
            for net in list(self.docker.nets.values())
        ]


class Asked(BaseHTTPRequestHandler):
    """A question to Docker's API."""

    server: Lists

    def address_string(self) -> str:
        return ""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        """Answer."""
        if self.path.startswith("/events"):
            self.events()
            return
        networks = self.server.networks()
        *_, name = self.path.split("/")
        one = [net for net in networks if net["Id"] == name]
        found: object = networks if name == "networks" else one[0] if one else None
        data = json.dumps(found).encode()
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def events(self) -> None:
        """Send events until nobody hears them."""
        heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.server.hearers.append(heard)
        self.send_response(200)
        self.end_headers()
        try:
            while (event := heard.get()) != "end":
                self.wfile.write(event.encode())
        except OSError:
            pass
        finally:
            self.server.hearers.remove(heard)


# Docker's calls.


class Played(Docker):
    """A Docker that gives out the addresses of networks without a pool of pynet's."""

    def __init__(self, world: "World") -> None:
        """Make its calls in a world."""
        super().__init__(world)  # type: ignore[arg-type]
        self.given = 1

    async def create_box(
        self, box_id: str, name: str, *, ip: str | None = None, mac: str = ""
    ) -> Box:
        net = self.nets[name]
        if net.pools:
            return await super().create_box(box_id, name, ip=ip, mac=mac)
        self.given = self.given % 250 + 1
        pool = net.subnets[0].pool
        face = ip_interface((pool.network_address + self.given, pool.prefixlen))
        box = Box(box_id, net, addresses=[face])
        await self.rig.networks.create_endpoint(
            name, box_id, **families(box.addresses), mac=mac
        )
        self.boxes[box_id] = box
        return box


class World:
    """A host with its daemon, and Docker's side of it; `close` ends the daemon."""

    def __init__(self, host: Host, **given: str) -> None:
        """Start the daemon."""
        self.host = host
        self.stack = ExitStack()
        self.networks = Networks(self)
        self.ipam = Ipam(self)
        self.docker = Played(self)
        lists = Lists(str(host.socket(DOCKER)), self.docker)
        self.lists = lists
        self.stack.callback(lists.close)
        self.daemon = Daemon(host, docker=f"unix://{DOCKER}", **given)
        self.deaths: list[str] = []
        """The calls under which it died."""
        self.refusals: list[str] = []
        """What it refused."""
        self.sandboxes: dict[str, tuple[str, str]] = {}
        """Sandbox and device of each endpoint that has joined."""
        self.disconnected: list[str] = []
        """Sandboxes that live on without the endpoint that was built in them."""
        self.network = ""
        """What Docker calls the latest network."""
        self.daemon.start()
        self.empty = self.look()
        self.before = self.empty
        """What there is when the commands begin that are disturbed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the daemon and Docker's API."""
        self.daemon.close()
        self.stack.close()

    # What its user does.

    def begin(self, armed: str) -> None:
        """Start the daemon anew, with failpoints."""
        self.deaths.clear()
        self.refusals.clear()
        self.daemon.restart(armed)

    async def create(self, *pools: str, **options: Any) -> None:
        """Create a network; Docker's id for it is a new one each time."""
        name = secrets.token_hex(32)
        await self.docker.create(name, *pools, **options)
        self.network = name

    async def create_plainly(self, cidr: str) -> None:
        """Create a network whose addresses are Docker's own business."""
        net = Net(secrets.token_hex(32))
        pool = ip_network(cidr)
        gateway = pool.network_address + 1
        net.subnets.append(Subnet(space="LocalDefault", pool=pool, gateway=gateway))
        await self.networks.create(
            net.id, subnets=net.subnets, options={}, internal=False
        )
        self.docker.nets[net.id] = net
        self.network = net.id

    async def start(self, **options: Any) -> None:
        """Start a container on the network, with a new id each time too."""
        await self.docker.start(secrets.token_hex(32), self.network, **options)

    def tell(self) -> None:
        """Tell the daemon what Docker has, and wait until it has read that."""
        self.lists.tell()
        wanted = {*self.docker.nets, *self.docker.boxes}

        def told() -> bool:
            shown = [*self.admin.get("networks"), *self.admin.get("endpoints")]
            named = {each["id"] for each in shown if not named_by_id(each)}
            return named >= wanted

        assert wait_until(told, PATIENCE), self.daemon.log()[-3000:]

    async def succeeds(self, command: Callable[[Self], Awaitable[None]]) -> bool:
        """Give Docker a command and tell whether it succeeds."""
        try:
            await command(self)
        except DriverError:
            return False
        finally:
            self.lists.tell()
        return True

    # Calls.

    def call(self, method: str, **content: object) -> dict[str, Any]:
        """Make a call; raises RefusedError, or LostError if the daemon died."""
        try:
            status, answer = self.daemon.post(method, json.dumps(content).encode())
        except (OSError, http.client.HTTPException):
            self.lost(method)
        if status != 200:
            self.refusals.append(f"{method}: {answer['Err']}")
            raise RefusedError(answer["Err"])
        return answer

    def lost(self, method: str) -> None:
        """Start the daemon that died again; Docker repeats the call to its loss."""
        assert self.daemon.ask("wait 10") == KILLED, self.daemon.log()[-3000:]
        self.deaths.append(method)
        self.daemon.start()
        status, answer = self.daemon.post(method, b"")
        assert status == 400, answer
        raise LostError(method)

    def removal(self, method: str, **content: object) -> None:
        """Make a call that removes; Docker passes over its failure, for good."""
        with suppress(RefusedError, LostError):
            self.call(method, **content)

    def command(self, *words: str) -> str:
        """Run a command on the host."""
        return self.host.exec(*words).stdout

    # What there is.

    @property
    def admin(self) -> Client:
        """Return a client of the daemon's other socket."""
        return Client(str(self.host.socket(ADMIN)))

    def look(self) -> dict[str, Any]:
        """Return what the kernel, the daemon and the store have."""
        names = ("networks", "endpoints", "ports", "pools")
        return {
            "census": self.admin.get("census")["owned"],
            **{name: nameless(self.admin.get(name)) for name in names},
            "keys": self.keys(),
        }

    def settles(self, wanted: dict[str, Any], *, alone: bool) -> None:
        """
        Let all become as it was.

        That takes the grace time, unless a daemon that is started anew is given less;
        if it must come about `alone`, the daemon stays.
        """
        begin = time.monotonic()
        if not alone and self.look() != wanted:
            self.daemon.restart(grace=MOMENT)
        while (found := self.look()) != wanted:
            passed = time.monotonic() - begin
            assert passed < PATIENCE, differing(wanted, found)
            # The next audit would come by itself, and the next change as well.
            self.daemon.post("Plugin.Activate", b"")
            if passed > SOON:
                self.change()
            time.sleep(0.05)
        while self.disconnected:
            box = self.disconnected.pop()
            assert self.command("ip", "-n", box, "-o", "link").count("\n") == 1
            self.command("ip", "netns", "del", box)

    def change(self) -> None:
        """Let Docker change something in the store."""
        ask = {"AddressSpace": "local", "Pool": "10.62.0.0/24"}
        pool = self.call("IpamDriver.RequestPool", **ask)["PoolID"]
        self.call("IpamDriver.ReleasePool", PoolID=pool)

    def keys(self) -> list[str]:
        """Return what the store has of networks, asking no code of pynet's."""
        found = self.etcd_keys() if self.host.software.endpoints else self.sqlite_keys()
        return [key for key in found if not key.startswith(KEPT)]

    def sqlite_keys(self) -> list[str]:
        """Return the keys of the embedded store."""
        database = sqlite3.connect(self.host.directory / "pynet/store.db", timeout=5)
        try:
            found = database.execute("SELECT key FROM records ORDER BY key").fetchall()
        finally:
            database.close()
        return [key for (key,) in found]

    def etcd_keys(self) -> list[str]:
        """Return the keys in etcd."""
        prefix = b"/pynet/v1/"
        ends = {"key": prefix, "range_end": prefix[:-1] + b"0"}
        wish = {k: base64.b64encode(v).decode() for k, v in ends.items()}
        address, _, port = self.host.software.endpoints[0].rpartition(":")
        connection = http.client.HTTPConnection(address, int(port), timeout=10)
        connection.sock = self.host.tcp_socket()
        connection.sock.connect((address, int(port)))
        try:
            connection.request("POST", "/v3/kv/range", json.dumps(wish))
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        keys = [base64.b64decode(item["key"]) for item in answer.get("kvs", ())]
        return [key.removeprefix(prefix).decode() for key in keys]

    def left(self) -> list[str]:
        """Name what is pynet's on the host, asking no code of pynet's."""
        links = self.command("ip", "-o", "link", "show", "group", str(GROUP))
        tables = self.command("nft", "list", "tables").splitlines()
        rules = [
            rule
            for tool in ("iptables", "ip6tables")
            for rule in self.command(tool, "-S").splitlines()
            if "pynet" in rule
        ]
        spaces = self.command("ip", "netns", "list").splitlines()
        return [
            *links.splitlines(),
            *(table for table in tables if "pynet" in table),
            *rules,
            *(space for space in spaces if "pynet" in space),
            *self.command("ss", "-Hlntu").splitlines(),
            *self.keys(),
        ]


def named_by_id(shown: dict[str, Any]) -> bool:
    """Tell whether the daemon has no name for something yet."""
    return str(shown["id"]).startswith(str(shown["name"]))


def nameless(shown: Any) -> Any:
    """Return what the daemon shows without names."""
    if isinstance(shown, list):
        return [nameless(each) for each in shown]
    if isinstance(shown, dict):
        return {k: nameless(v) for k, v in shown.items() if k not in NAMES}
    return shown


def differing(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """Say in which parts two views differ."""
    parts = [
        name for name in {**wanted, **found} if wanted.get(name) != found.get(name)
    ]
    return "\n".join(
        f"{name}:\n  {json.dumps(wanted.get(name))}\n  {json.dumps(found.get(name))}"
        for name in parts
    )


class Networks:
    """The network driver, as `tests.unit.calls.Docker` calls it."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def create(
        self, docker_id: str, *, subnets: Any, options: Any, internal: bool
    ) -> None:
        data: dict[int, list[dict[str, str]]] = {4: [], 6: []}
        for subnet in subnets:
            size = subnet.pool.prefixlen
            own = {"AddressSpace": subnet.space, "Pool": str(subnet.pool)}
            if subnet.gateway is not None:
                own["Gateway"] = f"{subnet.gateway}/{size}"
            data[subnet.pool.version].append(own)
        generic = {"com.docker.network.generic": options}
        inside = {"com.docker.network.internal": True} if internal else {}
        self.world.call(
            "NetworkDriver.CreateNetwork",
            NetworkID=docker_id,
            Options=generic | inside,
            IPv4Data=data[4],
            IPv6Data=data[6],
        )

    async def delete(self, docker_id: str) -> None:
        self.world.removal("NetworkDriver.DeleteNetwork", NetworkID=docker_id)

    async def create_endpoint(
        self, docker_id: str, endpoint_id: str, *, ipv4: Any, ipv6: Any, mac: str
    ) -> str:
        answer = self.world.call(
            "NetworkDriver.CreateEndpoint",
            NetworkID=docker_id,
            EndpointID=endpoint_id,
            Interface={
                "Address": str(ipv4 or ""),
                "AddressIPv6": str(ipv6 or ""),
                "MacAddress": mac,
            },
            Options={},
        )
        return str(answer["Interface"]["MacAddress"])

    async def join(self, docker_id: str, endpoint_id: str, sandbox: str) -> None:
        box = self.box(endpoint_id)
        self.world.command("ip", "netns", "add", box)
        try:
            answer = self.world.call(
                "NetworkDriver.Join",
                NetworkID=docker_id,
                EndpointID=endpoint_id,
                SandboxKey=f"/run/netns/{box}",
                Options={},
            )
        except DriverError:
            self.world.command("ip", "netns", "del", box)
            raise
        device = answer["InterfaceName"]["SrcName"]
        if device:
            self.world.command(
                *("ip", "link", "set", device, "netns", box, "name", "eth0", "up")
            )
        self.world.sandboxes[endpoint_id] = (box, device)

    def box(self, endpoint_id: str) -> str:
        """Name an endpoint's sandbox."""
        return f"box-{endpoint_id[:12]}"

    async def leave(self, docker_id: str, endpoint_id: str) -> None:
        self.world.removal(
            "NetworkDriver.Leave", NetworkID=docker_id, EndpointID=endpoint_id
        )
        box, device = self.world.sandboxes.pop(endpoint_id, ("", ""))
        if box and not device:
            # What was built there is the driver's to take back, and nothing else does.
            self.world.disconnected.append(box)
        elif box:
            back = f"link set eth0 down netns 1 name {device}".split()
            self.world.command("ip", "-n", box, *back)
            self.world.command("ip", "netns", "del", box)

    async def delete_endpoint(self, docker_id: str, endpoint_id: str) -> None:
        self.world.removal(
            "NetworkDriver.DeleteEndpoint", NetworkID=docker_id, EndpointID=endpoint_id
        )

    async def program(
        self, docker_id: str, endpoint_id: str, *, ports: Any, ipv6: bool
    ) -> None:
        del ipv6
        self.world.call(
            "NetworkDriver.ProgramExternalConnectivity",
            NetworkID=docker_id,
            EndpointID=endpoint_id,
            Options={"com.docker.network.portmap": [portmap(port) for port in ports]},
        )

    async def revoke(self, docker_id: str, endpoint_id: str) -> None:
        self.world.removal(
            "NetworkDriver.RevokeExternalConnectivity",
            NetworkID=docker_id,
            EndpointID=endpoint_id,
        )


def portmap(port: PortRequest) -> dict[str, object]:
    """Word a published port as Docker does."""
    return {
        "Proto": port.protocol,
        "IP": "",
        "Port": port.port,
        "HostIP": str(port.host_ip or ""),
        "HostPort": port.host_port,
        "HostPortEnd": port.host_port_end,
    }


class Ipam:
    """The IPAM driver, as `tests.unit.calls.Docker` calls it."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def request_pool(
        self, *, space: str, pool: Any, sub_pool: Any, options: Any, version: int
    ) -> tuple[str, IPNetwork]:
        answer = self.world.call(
            "IpamDriver.RequestPool",
            AddressSpace=space,
            Pool=str(pool or ""),
            SubPool=str(sub_pool or ""),
            Options=options,
            V6=version == 6,
        )
        return answer["PoolID"], ip_network(answer["Pool"])

    async def release_pool(self, pool_id: str) -> None:
        self.world.removal("IpamDriver.ReleasePool", PoolID=pool_id)

    async def request_address(
        self, pool_id: str, *, address: Any, gateway: bool, name: str
    ) -> IPInterface:
        kind = {"RequestAddressType": "com.docker.network.gateway"} if gateway else None
        answer = self.world.call(
            "IpamDriver.RequestAddress",
            PoolID=pool_id,
            Address=str(address or ""),
            Options=kind,
        )
        return ip_interface(answer["Address"])

    async def release_address(self, pool_id: str, address: Any) -> None:
        self.world.removal(
            "IpamDriver.ReleaseAddress", PoolID=pool_id, Address=str(address)
        )
