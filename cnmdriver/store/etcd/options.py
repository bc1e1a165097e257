"""Where etcd is and how to log in there: the address an operator gives, checked."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from cnmdriver.errors import InvalidParameter

PREFIX = "/pynet/v1/"
PORT = 2379
SCHEMES = ("etcd", "etcds")
ENDPOINT = re.compile(
    r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%[\w.-]+)?\])(:(?P<port>[0-9]{1,5}))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """An etcd cluster, a prefix of its keys, and what a login needs; no secrets."""

    endpoints: tuple[str, ...]
    prefix: str = PREFIX
    """Ends with a slash, so that one cluster's keys never begin like another's."""
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str = ""
    password_file: Path | None = None
    tls: bool = False

    @property
    def root(self) -> bytes:
        """Return the prefix as etcd has it."""
        return self.prefix.encode()


def read_url(  # noqa: PLR0913  these are the operator's settings, one by one
    url: str,
    *,
    prefix: str = PREFIX,
    ca: Path | str | None = None,
    cert: Path | str | None = None,
    key: Path | str | None = None,
    user: str = "",
    password_file: Path | str | None = None,
) -> Options:
    """
    Read `etcd://[USER@]HOST[:PORT],…`, or `etcds://…` for TLS by the system's CAs.

    Empty text is as good as None. Raises InvalidParameter, which names the setting.
    """
    scheme, slashes, rest = url.partition("://")
    if scheme not in SCHEMES or not slashes:
        raise InvalidParameter(
            "the store's address must be etcd://HOST:PORT,… or etcds://HOST:PORT,…"
        )
    login, _, hosts = rest.rpartition("@")
    options = Options(
        endpoints=endpoints(hosts.removesuffix("/")),
        prefix=slashed(prefix),
        ca=path(ca),
        cert=path(cert),
        key=path(key),
        user=one_user(login, user),
        password_file=path(password_file),
        tls=scheme == "etcds" or any((ca, cert, key)),
    )
    check_pairs(options)
    return options


def endpoints(hosts: str) -> tuple[str, ...]:
    """Read a list of members, each with or without a port."""
    found: dict[str, None] = {}
    for text in hosts.split(","):
        matched = ENDPOINT.fullmatch(text)
        port = int(matched["port"] or PORT) if matched else 0
        if not matched or not 0 < port < 65536:
            raise InvalidParameter(
                f"{text!r} in the store's address is no HOST:PORT; IPv6 addresses "
                "stand in brackets, and a prefix is set by --store-prefix"
            )
        found[f"{matched['host']}:{port}"] = None
    return tuple(found)


def slashed(prefix: str) -> str:
    """Return the prefix with the slash that must end it."""
    if not prefix.strip("/"):
        raise InvalidParameter(
            "--store-prefix must not be empty: it keeps pynet's keys from others'"
        )
    return prefix.removesuffix("/") + "/"


def path(value: Path | str | None) -> Path | None:
    """Return a file's path, None if none is given."""
    return Path(value) if value else None


def one_user(login: str, user: str) -> str:
    """Return the user of the address or of the setting; they must not differ."""
    name, colon, _ = login.partition(":")
    if colon:
        raise InvalidParameter(
            "a password in the store's address shows in the list of processes; "
            "write it to a file and name that by --store-password-file"
        )
    name = unquote(name)
    if name and user and name != user:
        raise InvalidParameter(
            f"the store's address has user {name!r}, --store-user {user!r}; give one"
        )
    return name or user


def check_pairs(options: Options) -> None:
    """Raise InvalidParameter for one of two settings that need each other."""
    pairs = (
        ("--store-cert", options.cert, "--store-key", options.key),
        ("--store-user", options.user, "--store-password-file", options.password_file),
    )
    for first, one, second, two in pairs:
        if bool(one) != bool(two):
            has, lacks = (first, second) if one else (second, first)
            raise InvalidParameter(f"{has} needs {lacks} beside it")
