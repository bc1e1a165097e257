"""
What etcd's and grpc's errors mean: whom to ask next, and what to tell the operator.

The one question that matters for a write is whether it can still happen. Only what is
known not to have been accepted may be sent again; all else is `LOST`.
"""

from dataclasses import dataclass
from enum import Enum, auto

from cnmdriver.store.etcd.options import Options
from cnmdriver.store.etcd.rpc import grpc

FULL = "etcd is full: compact, defragment and `etcdctl alarm disarm`"


class Verdict(Enum):
    """What can be done about a failed attempt."""

    NEXT = auto()
    """It was not accepted: ask the next member."""
    LOST = auto()
    """The outcome is unknown: repeat only what may happen twice."""
    LOGIN = auto()
    """The token is over: log in again."""
    COMPACTED = auto()
    """The revision is forgotten: begin anew."""
    NO_LEASE = auto()
    """The lease has ended."""
    NO_LOGIN = auto()
    """There are no users."""
    FINAL = auto()
    """It will not get better by repeating."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A failed attempt, judged."""

    verdict: Verdict
    text: str


RULES: tuple[tuple[str, Verdict, str], ...] = (
    (
        "unable to get local issuer certificate",
        Verdict.NEXT,
        "its certificate is not from {ca}; check --store-ca",
    ),
    (
        "self-signed certificate",
        Verdict.NEXT,
        "its certificate is not from {ca}; check --store-ca",
    ),
    ("certificate has expired", Verdict.NEXT, "its certificate has expired; renew it"),
    (
        "certificate is not yet valid",
        Verdict.NEXT,
        "its certificate is not valid yet; check the clocks",
    ),
    (
        "Hostname Verification Check failed",
        Verdict.NEXT,
        "its certificate is for another name; name it as the certificate does",
    ),
    (
        "TSI_DATA_CORRUPTED",
        Verdict.LOST,
        "it refused {cert}; check --store-cert and --store-key",
    ),
    (
        "Handshake read failed",
        Verdict.NEXT,
        "it gave no answer in TLS; if it speaks none, use etcd:// without certificates",
    ),
    ("failed to connect to all addresses", Verdict.NEXT, ""),
    ("DNS resolution failed", Verdict.NEXT, "its name is not known"),
    ("errors resolving", Verdict.NEXT, "its name is not known"),
    ("etcdserver: no leader", Verdict.NEXT, "it is cut off from the other members"),
    ("too many requests", Verdict.NEXT, "it has too many requests"),
    ("invalid auth token", Verdict.LOGIN, "the login has run out"),
    ("revision of auth store is old", Verdict.LOGIN, "the login has run out"),
    (
        "authentication failed, invalid user ID or password",
        Verdict.FINAL,
        "etcd does not know {user} with the password of {password_file}",
    ),
    (
        "permission denied",
        Verdict.FINAL,
        "{user} may not use the keys under {prefix}; grant it, or set --store-prefix",
    ),
    ("database space exceeded", Verdict.FINAL, FULL),
    ("revision has been compacted", Verdict.COMPACTED, "it has been compacted"),
    ("authentication is not enabled", Verdict.NO_LOGIN, "it asks for no login"),
    ("requested lease not found", Verdict.NO_LEASE, "the lease has run out"),
)


def judge(error: grpc.aio.AioRpcError, options: Options) -> Fault:
    """Say what a failed call means."""
    name, details = error.code().name, error.details() or ""
    fault = read_text(details, options)
    if fault is not None:
        return fault
    if name == "DEADLINE_EXCEEDED" or "deadline exceeded" in details:
        return Fault(verdict=Verdict.LOST, text="it did not answer in time")
    if name == "UNAVAILABLE":
        return Fault(verdict=Verdict.LOST, text=brief(details, options))
    if name in {"CANCELLED", "UNKNOWN", "INTERNAL"}:
        return Fault(verdict=Verdict.LOST, text=details or name)
    return Fault(verdict=Verdict.FINAL, text=f"{name}: {details}")


def read_text(details: str, options: Options) -> Fault | None:
    """Judge by the text alone, as it also stands in a refused watch."""
    if "user name is empty" in details:
        return no_login(options)
    for fragment, verdict, text in RULES:
        if fragment in details:
            return Fault(
                verdict=verdict, text=fill(text, options) or brief(details, options)
            )
    return None


def no_login(options: Options) -> Fault:
    """Judge a call without a token: etcd may have begun to ask for one since."""
    if options.user:
        return Fault(verdict=Verdict.LOGIN, text="etcd wants a login")
    return Fault(
        verdict=Verdict.FINAL,
        text="etcd wants a login; set --store-user and --store-password-file, or "
        "--store-cert and --store-key",
    )


def fill(text: str, options: Options) -> str:
    """Put the operator's own settings into a text."""
    return text.format(
        ca=options.ca or "a CA of this system",
        cert=f"the certificate {options.cert}" if options.cert else "us: it wants one",
        user=f"user {options.user}" if options.user else "the certificate's user",
        password_file=options.password_file,
        prefix=options.prefix,
    )


def brief(details: str, options: Options) -> str:
    """Return the last of grpc's nested reasons."""
    if not options.tls and "Socket closed" in details:
        return "it closed the connection (if it speaks TLS, use etcds://)"
    reason = details.rpartition("Failed to connect to remote host: ")[2]
    return reason.removeprefix("etcdserver: ")
