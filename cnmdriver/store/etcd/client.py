"""
Calls to a cluster: fail-over between members, login, certificates that change.

A call goes to one member at a time, the one that answered last. Each attempt has a
second, more where answers take long, and the whole has three. An attempt that was not
accepted goes on to the next member; one whose outcome is unknown does so only if it may
happen twice.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog

from cnmdriver.errors import StoreError
from cnmdriver.store.base import UnknownOutcomeError
from cnmdriver.store.etcd import tls
from cnmdriver.store.etcd.faults import Fault, Verdict, judge
from cnmdriver.store.etcd.options import Options
from cnmdriver.store.etcd.rpc import (
    LEADER,
    Ask,
    Member,
    Metadata,
    NotConnectedError,
    grpc,
    pb,
)

ATTEMPT = 1.0
"""Seconds for one attempt at one member that answers as members do."""
PATIENT = 2.5
"""The same at most, where all are slow."""
SLACK = 2.0
"""How much longer than the last one an answer may take."""
WHOLE = 3.0
"""Seconds for a call, whatever happens."""
PAUSE = 0.1
"""Seconds between two rounds through all members."""
LOGINS = 3
"""Logins in one call: a member may not have heard yet of the newest token."""
CALLERS = {Verdict.COMPACTED, Verdict.NO_LEASE, Verdict.NO_LOGIN}
"""What only the caller knows how to go on from."""
CONNECT = 0.5
"""Seconds for a connection: what is not sent yet may go to another member."""
LOOK = 1.0
"""Seconds between two looks at the certificates' files."""
GRACE = 2.0
"""Seconds in which calls over an old certificate may end."""

log = structlog.get_logger()


class FaultError(Exception):
    """An attempt failed; what that means has been judged."""

    def __init__(self, fault: Fault) -> None:
        """Keep the judgement."""
        super().__init__(fault.text)
        self.fault = fault


@dataclass
class Call:
    """One call on its way from member to member."""

    doing: str
    until: float
    repeat: bool = True
    """Whether it may happen twice."""
    attempts: int = 0
    logins: int = 0
    last: str = ""


@dataclass
class Token:
    """What a login gave; one for all calls."""

    text: str = ""
    taken: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __repr__(self) -> str:
        """Show nothing."""
        return "Token()"

    def drop(self, text: str) -> None:
        """Forget a token that was refused, unless there is a newer one."""
        if text == self.text:
            self.taken = False


class Client:
    """The members of a cluster, one of which is asked."""

    def __init__(self, options: Options) -> None:
        """Take the address; nothing is connected yet."""
        self.options = options
        self.members: list[Member] = []
        self.at = 0
        self.newest = 0
        """The highest revision that the cluster was seen at."""
        self.token = Token()
        self.patience = ATTEMPT
        """Seconds that an attempt has now."""
        self.closed = False
        self.stamp: tls.Stamp = ()
        self.material: tls.Material | None = None
        self.looked = 0.0
        self.refused: tls.Stamp = ()
        self.tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Let begun calls end for a second, and let go of all connections."""
        self.closed = True
        members, self.members = self.members, []
        closing = [member.close(ATTEMPT) for member in members]
        await asyncio.gather(*closing, *self.tasks)

    async def call(
        self,
        doing: str,
        ask: Ask,
        *,
        repeat: bool = True,
        login: bool = True,
        until: float | None = None,
    ) -> Any:
        """
        Ask one member after the other until one answers.

        Raises StoreError if none did, FaultError for what the caller must handle, and
        UnknownOutcomeError for what must not be repeated.
        """
        call = Call(doing=doing, until=until or now() + WHOLE, repeat=repeat)
        while True:
            member = self.member()
            metadata = await self.metadata(doing, call.until) if login else (LEADER,)
            try:
                return await self.attempt(call, member, ask, metadata)
            except FaultError as error:
                self.failed(call, member, metadata, error.fault)
            call.attempts += 1
            await self.pause(call)

    async def revision(self) -> int:
        """Return the revision the cluster is at now."""
        request = pb.RangeRequest(key=self.options.root, count_only=True)
        response = await self.call(
            "read etcd",
            lambda member, metadata, left: member.kv.Range(
                request, metadata=metadata, timeout=left
            ),
        )
        return int(response.header.revision)

    async def attempt(
        self, call: Call, member: Member, ask: Ask, metadata: Metadata
    ) -> Any:
        """Ask one member once; raises FaultError."""
        try:
            await member.connected(min(CONNECT, self.left(call)))
            return await self.timed(
                ask(member, metadata, min(self.patience, self.left(call)))
            )
        except NotConnectedError:
            text = "it did not take a connection in time"
            raise FaultError(Fault(verdict=Verdict.NEXT, text=text)) from None
        except grpc.aio.AioRpcError as error:
            raise FaultError(judge(error, self.options)) from None
        except grpc.aio.UsageError:
            # New certificates were read, and the channel closed, before the call began.
            text = "the connection to it was closed"
            raise FaultError(Fault(verdict=Verdict.NEXT, text=text)) from None
        except asyncio.CancelledError:
            # A call on a channel that is closed says that it was cancelled.
            if cancelling():
                raise
            text = "the connection to it was closed"
            raise FaultError(Fault(verdict=Verdict.LOST, text=text)) from None

    async def timed(self, asking: Awaitable[Any]) -> Any:
        """Wait for an answer, and learn from it how long the next one may take."""
        begin = now()
        try:
            answer = await asking
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self.patience = min(PATIENT, SLACK * self.patience)
            raise
        self.patience = min(PATIENT, max(ATTEMPT, SLACK * (now() - begin)))
        return answer

    def failed(
        self, call: Call, member: Member, metadata: Metadata, fault: Fault
    ) -> None:
        """Decide on a failed attempt: raise, or return for the next."""
        call.last = f"{member.endpoint}: {fault.text}"
        if fault.verdict in CALLERS:
            raise FaultError(fault)
        if fault.verdict is Verdict.FINAL:
            raise StoreError(f"cannot {call.doing}: {fault.text}")
        if fault.verdict is Verdict.LOGIN:
            call.logins += 1
            self.token.drop(dict(metadata).get("token", ""))
            if call.logins >= LOGINS:
                raise StoreError(f"cannot {call.doing}: {fault.text}")
            return
        self.skip(member)
        if fault.verdict is Verdict.LOST and not call.repeat:
            raise UnknownOutcomeError(
                "the answer of etcd was lost, so nobody knows whether it was written: "
                + call.last
            )

    def left(self, call: Call) -> float:
        """Return how many seconds a call still has; never none, to tell why."""
        return max(call.until - now(), 0.01)

    async def pause(self, call: Call) -> None:
        """Wait a little between two rounds; raises StoreError when time is up."""
        left = call.until - now()
        if left <= 0:
            raise StoreError(
                f"cannot {call.doing}: no member of {', '.join(self.options.endpoints)}"
                f" did it within {WHOLE:g} s; {call.last}"
            )
        if call.attempts % len(self.options.endpoints) == 0:
            await asyncio.sleep(min(PAUSE, left))

    def member(self) -> Member:
        """Return the member to ask; raises StoreError if certificates are unusable."""
        if self.closed:
            raise StoreError("the connection to etcd is closed")
        self.refresh()
        return self.members[self.at % len(self.members)]

    def skip(self, member: Member) -> None:
        """Ask another from now on, if this is still the one that is asked."""
        if self.members and self.members[self.at % len(self.members)] is member:
            self.at = (self.at + 1) % len(self.members)

    # Login.

    async def metadata(self, doing: str, until: float) -> Metadata:
        """Return what goes with each call, logging in if that is due."""
        if not self.options.user:
            return (LEADER,)
        with explained(doing):
            async with asyncio.timeout_at(until), self.token.lock:
                if not self.token.taken:
                    self.token.text = await self.login(doing, until)
                    self.token.taken = True
                token = self.token.text
        return (LEADER, ("token", token)) if token else (LEADER,)

    async def login(self, doing: str, until: float) -> str:
        """Return a new token; empty if etcd asks for none."""
        request = pb.AuthenticateRequest(
            name=self.options.user, password=self.password()
        )
        try:
            response = await self.call(
                doing,
                lambda member, metadata, left: member.auth.Authenticate(
                    request, metadata=metadata, timeout=left
                ),
                login=False,
                until=until,
            )
        except FaultError:
            log.warning("store.no_login", why="etcd asks for no password")
            return ""
        return str(response.token)

    def password(self) -> str:
        """Read the password, anew for each login."""
        file = self.options.password_file
        try:
            return file.read_text().rstrip("\r\n") if file else ""
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", "it is no text")
            raise StoreError(
                f"cannot read {file}, which --store-password-file names: {reason}"
            ) from None

    # Connections.

    def refresh(self) -> None:
        """Connect, and do so anew when the certificates' files have changed."""
        if self.members and (not self.options.tls or now() < self.looked + LOOK):
            return
        self.looked = now()
        if not self.options.tls:
            self.connect(None)
            return
        stamp = tls.stamp(self.options)
        if self.members and stamp == self.stamp:
            return
        try:
            material = tls.read(self.options)
        except StoreError as error:
            if not self.members:
                raise
            # Half a rotation: the old ones serve until the new ones are whole.
            if stamp != self.refused:
                log.warning("store.certificates_unusable", error=str(error))
            self.refused = stamp
            return
        if material != self.material:
            self.connect(material)
        self.stamp, self.material = stamp, material

    def look_again(self) -> None:
        """Do not wait for the next look; before the first connection there is none."""
        self.looked, self.refused = float("-inf"), ()
        if self.members:
            self.refresh()

    def connect(self, material: tls.Material | None) -> None:
        """Make new channels; the old ones end when their calls have."""
        credentials = tls.credentials(material) if material else None
        old = self.members
        self.members = [Member(e, credentials) for e in self.options.endpoints]
        if old:
            log.info("store.certificates_renewed")
        for member in old:
            self.background(member.close(GRACE))

    def background(self, work: Coroutine[None, None, None]) -> None:
        """Run something that nobody waits for, and keep it from being collected."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def now() -> float:
    """Return the loop's clock."""
    return asyncio.get_running_loop().time()


def cancelling() -> bool:
    """Tell whether it is our own task that is asked to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn a time-out into a sentence."""
    try:
        yield
    except TimeoutError:
        raise StoreError(
            f"cannot {doing}: etcd did not answer a login within {WHOLE:g} s"
        ) from None
