"""
The door to etcd: the generated messages and stubs, on one channel per member.

Only what is generated in `etcd3.etcdrpc` is used. The library's own client loses broken
watches without a word and marks members as failed for minutes.

grpc.aio's channels belong to the loop they are made in.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

# Read at import; grpc writes lines of its own to stderr otherwise.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import etcd3.etcdrpc as pb
import grpc
import grpc.aio

__all__ = [
    "LEADER",
    "Ask",
    "Member",
    "Metadata",
    "NotConnectedError",
    "grpc",
    "pb",
    "prefix_end",
]

OPTIONS = (
    # etcd allows a ping in 5 s; more are answered by an end of all streams.
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 2000),
    # Without this one a stopped member is never noticed.
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # So long a member may take to answer a new connection.
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),
    # Whether a call may be repeated is for us to say.
    ("grpc.enable_retries", 0),
    # Two channels to one member, as in a change of certificates, share nothing.
    ("grpc.use_local_subchannel_pool", 1),
)
LEADER = ("hasleader", "true")
"""A member that is cut off from the others says so at once."""

Metadata = tuple[tuple[str, str], ...]
Ask = Callable[["Member", Metadata, float], Awaitable[Any]]
"""One attempt: which member, the call's metadata, and seconds to do it in."""


class NotConnectedError(Exception):
    """The member did not take a connection in time; nothing was sent."""


class Member:
    """One member of the cluster: a channel, and the services on it."""

    def __init__(self, endpoint: str, credentials: Any) -> None:
        """Connect, in the background; credentials None is plaintext."""
        self.endpoint = endpoint
        if credentials is None:
            channel = grpc.aio.insecure_channel(endpoint, options=OPTIONS)
        else:
            channel = grpc.aio.secure_channel(endpoint, credentials, options=OPTIONS)
        self.channel = channel
        self.kv = pb.KVStub(channel)
        self.watch = pb.WatchStub(channel)
        self.lease = pb.LeaseStub(channel)
        self.auth = pb.AuthStub(channel)

    async def connected(self, limit: float) -> None:
        """
        Wait for a connection or for its failure, which the next call then tells.

        Raises NotConnectedError if it takes too long, as with a stopped member.
        """
        until = asyncio.get_running_loop().time() + limit
        connecting = {
            grpc.ChannelConnectivity.IDLE,
            grpc.ChannelConnectivity.CONNECTING,
        }
        while self.channel.get_state(try_to_connect=True) in connecting:
            if asyncio.get_running_loop().time() > until:
                raise NotConnectedError
            # A wait for the state's change that is given up would outlive us.
            await asyncio.sleep(0.005)

    async def close(self, grace: float) -> None:
        """Let calls end for so many seconds, then cut them off."""
        await self.channel.close(grace)


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key behind all that start with a prefix; empty: no end."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"
