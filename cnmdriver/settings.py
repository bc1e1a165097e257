"""
What an operator can set, and where each setting comes from.

A setting is one field of `Settings`: its type, default and help. The command line
(`--host-name`), the environment (`PYNET_HOST_NAME`), the file (`host_name = …` in TOML)
and the README's table all follow from it. The first of these that has a value wins.
"""

import contextlib
import dataclasses
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cnmdriver.errors import InvalidParameter

FILE = Path("/etc/pynet/pynet.toml")
DEFAULT_POOLS = "10.200.0.0/16/24,fd70:796e:6574::/48/64"
"""Out of the box: a private IPv4 range, and a ULA prefix (RFC 4193)."""


def setting(default: Any, text: str, *choices: str) -> Any:
    """Describe one setting."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The daemon's settings, checked."""

    socket: str = setting(
        "/run/docker/plugins/pynet.sock",
        "where Docker finds the driver; the file's name is the driver's",
    )
    driver: str = setting(
        "",
        "what Docker calls the driver; empty is the name of the socket. A managed "
        "plugin's has a tag: pynet:latest",
    )
    state_dir: str = setting("/var/lib/pynet", "what outlives a reboot")
    run_dir: str = setting("/run/pynet", "what does not: admin socket, boot id")
    store: str = setting(
        "",
        "where hosts agree: etcd://HOST:PORT,… (etcds:// with TLS), or sqlite:///PATH "
        "for one host; empty is store.db in the state directory",
    )
    store_prefix: str = setting(
        "/pynet/v1/", "keys of this cluster in etcd; several clusters can share one"
    )
    store_ca: str = setting("", "file with the CA that etcd's certificates are of")
    store_cert: str = setting("", "file with this host's certificate for etcd")
    store_key: str = setting("", "file with the certificate's key")
    store_user: str = setting("", "user of etcd")
    store_password_file: str = setting("", "file with the user's password, alone")
    host_name: str = setting("", "this host's name; empty is the machine's own")
    vtep: str = setting(
        "",
        "address or device of this host's end of the tunnels; empty is the one that "
        "leads to etcd, or else to the default route",
    )
    vxlan_port: int = setting(4789, "UDP port of the tunnels, the same on all hosts")
    namespace: str = setting(
        "pynet", "network namespace for the devices of overlay networks"
    )
    docker: str = setting(
        "unix:///run/docker.sock", "Docker's API, for names and audits; empty is off"
    )
    scope: str = setting("local", "what Docker is told", "local", "global")
    default_pools: str = setting(
        DEFAULT_POOLS, "pools for networks without --subnet: BASE/LENGTH,…"
    )
    grace: float = setting(60.0, "seconds before what nobody claims is given back")
    audit: float = setting(30.0, "seconds between two audits of the kernel")
    repair: bool = setting(
        True,
        "whether what others change of pynet's in the kernel is put right; false is to "
        "watch what breaks: it is reported and left",
    )
    dead_after: float = setting(
        86400.0,
        "seconds after which a host that is away counts as dead, and others give its "
        "addresses out",
    )
    socket_group: str = setting(
        "", "group that may use the plugin socket besides root; empty is none"
    )
    listen: str = setting(
        "",
        "where metrics and the web page are served: unix:///PATH, 127.0.0.1:PORT or "
        "[::1]:PORT; empty is nowhere",
    )
    log_format: str = setting(
        "auto", "auto is console on a terminal", "auto", "console", "json"
    )
    log_level: str = setting("info", "least level logged", "debug", "info", "warning")

    @property
    def store_url(self) -> str:
        """Return the store's address, the default spelled out."""
        return self.store or f"sqlite://{self.state_dir}/store.db"

    @property
    def driver_name(self) -> str:
        """Return what Docker calls the driver."""
        return self.driver or Path(self.socket).stem

    @property
    def name(self) -> str:
        """Return the host's name."""
        return self.host_name or socket.gethostname()


def load(
    given: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
) -> Settings:
    """
    Merge command line, environment and file.

    `given` has None for what was not said; `file` None is the usual place, if there is
    one. Raises InvalidParameter, naming the setting and where it came from.
    """
    values: dict[str, Any] = {}
    for source, name, value in sources(given, environment, file):
        values[name] = check(source, name, value)
    return Settings(**values)


def sources(
    given: Mapping[str, Any], environment: Mapping[str, str], file: Path | None
) -> list[tuple[str, str, Any]]:
    """Return every value that was given, the weakest source first."""
    found: list[tuple[str, str, Any]] = []
    path = file or FILE
    found += [(str(path), k, v) for k, v in read_file(path, must=bool(file)).items()]
    for name in FIELDS:
        variable = "PYNET_" + name.upper()
        if variable in environment:
            found.append((variable, name, environment[variable]))
    for name, value in given.items():
        if value is not None:
            found.append(("--" + name.replace("_", "-"), name, value))
    return found


def read_file(path: Path, *, must: bool) -> Mapping[str, Any]:
    """Read the TOML file; one that need not be there may be absent."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        if must:
            raise InvalidParameter(f"settings file {path} does not exist") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidParameter(f"settings file {path}: {error}") from None


def check(source: str, name: str, value: Any) -> Any:
    """Return a value in its setting's type; raises InvalidParameter."""
    if name not in FIELDS:
        raise InvalidParameter(
            f"{source}: no setting is called {name!r}; known are {', '.join(FIELDS)}"
        )
    default = FIELDS[name].default
    choices = FIELDS[name].metadata["choices"]
    if isinstance(default, bool):
        return yes_or_no(source, name, value)
    if isinstance(default, float):
        return seconds(source, name, value)
    if isinstance(default, int):
        return port(source, name, value)
    if not isinstance(value, str):
        raise InvalidParameter(f"{source}: {name} must be text, not {value!r}")
    if choices and value not in choices:
        raise InvalidParameter(f"{source}: {name} must be one of {', '.join(choices)}")
    if name == "listen":
        listener(source, value)
    return value


def yes_or_no(source: str, name: str, value: Any) -> bool:
    """Read a truth value."""
    text = str(value).lower() if isinstance(value, bool | str) else ""
    if text not in {"true", "false"}:
        raise InvalidParameter(f"{source}: {name} must be true or false, not {value!r}")
    return text == "true"


def listener(source: str, value: str) -> Path | tuple[str, int] | None:
    """
    Read where to listen: a socket's path, or a loopback address and a port.

    Empty is None. Raises InvalidParameter for anything else: whoever reaches it may
    read everything.
    """
    scheme, _, path = value.partition("://")
    if scheme == "unix" and path.startswith("/"):
        return Path(path)
    host, _, number = value.rpartition(":")
    with contextlib.suppress(ValueError):
        address = ip_address(host.removeprefix("[").removesuffix("]"))
        if address.is_loopback and (":" in str(address)) == host.startswith("["):
            return str(address), port(source, "the port of listen", number)
    if not value:
        return None
    raise InvalidParameter(
        f"{source}: listen must be unix:///PATH, 127.0.0.1:PORT or [::1]:PORT, not "
        f"{value!r}: whoever reaches it may read everything; to reach it from another "
        "machine, forward a port with ssh -L"
    )


def port(source: str, name: str, value: Any) -> int:
    """Read the number of a port."""
    text = "" if isinstance(value, bool) else str(value)
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 1 << 16):
        raise InvalidParameter(
            f"{source}: {name} must be a port from 1 to 65535, not {value!r}"
        )
    return int(text)


def seconds(source: str, name: str, value: Any) -> float:
    """Read a positive number of seconds."""
    try:
        number = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise InvalidParameter(
            f"{source}: {name} must be seconds above 0, not {value!r}"
        )
    return number


FIELDS: Mapping[str, dataclasses.Field[Any]] = {
    f.name: f for f in dataclasses.fields(Settings)
}
