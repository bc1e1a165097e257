"""Users, passwords and certificates, on members that ask for them."""

import asyncio
import contextlib
import os
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cnmdriver.errors import StoreError
from cnmdriver.store.base import Change
from cnmdriver.store.etcd import Options
from cnmdriver.store.etcd.client import Token
from cnmdriver.store.etcd.rpc import grpc, pb
from cnmdriver.store.etcd.store import EtcdStore
from tests.store import etcd_server
from tests.store.etcd_server import Cluster

pytestmark = pytest.mark.etcd

Opened = Callable[..., EtcdStore]
PASSWORD = "s3cret-p4ss"
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    """Open stores, and close them at the end."""
    stores = []

    async def open_(options: Options, kind: type[EtcdStore] = EtcdStore) -> EtcdStore:
        store = kind(options)
        stores.append(store)
        await store.open()
        return store

    yield open_
    for store in stores:
        await store.close()


@dataclass
class Login:
    """A cluster that asks for passwords, and a user's file."""

    cluster: Cluster
    file: Path

    def options(self, **changes: object) -> Options:
        """Return the options of user pynet."""
        return self.cluster.options(
            **{"user": "pynet", "password_file": self.file, **changes}
        )


@pytest.fixture
def login(tmp_path, request):
    """Run a member with users; pynet may use /pynet/v1/."""
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    extra = ("--bcrypt-cost", "4", *getattr(request, "param", ()))
    with etcd_server.running(tmp_path, extra=extra) as cluster:
        cluster.add_user("pynet", PASSWORD, "/pynet/v1/")
        cluster.enable_auth()
        yield Login(cluster, file)


async def put(store: EtcdStore, **values: str) -> int:
    """Write some keys without looking."""
    return await store.commit(Change(puts={k: v.encode() for k, v in values.items()}))


# Users and passwords.


async def test_a_login_works(opened, login):
    """With the right password everything works, and the password's way is warned of."""
    with capture_logs() as logs:
        store = await opened(login.options())
    assert [entry["event"] for entry in logs] == ["store.plaintext_password"]
    lease = await store.lease(60)
    revision = await store.commit(Change(puts={"a": b"1"}), lease)
    await lease.keep()
    ((event,),) = [await anext(store.watch("", revision))]
    assert event.key == "a"
    await lease.revoke()
    assert (await store.read("")).items == {}


async def test_a_wrong_password_is_named(opened, login):
    """A wrong password names the user and the file, and shows nothing of either's."""
    login.file.write_text("another-s3cret")
    with pytest.raises(StoreError) as refused:
        await opened(login.options())
    text = f"does not know user pynet with the password of {login.file}"
    assert text in str(refused.value)
    assert "another" not in repr(refused.value)


async def test_a_missing_login_is_named(opened, login):
    """Without a user the sentence says what to set."""
    with pytest.raises(StoreError, match="etcd wants a login; set --store-user and"):
        await opened(login.cluster.options())


async def test_a_missing_password_file_is_named(opened, login):
    """A password file that cannot be read is named."""
    login.file.unlink()
    with pytest.raises(StoreError, match=f"cannot read {login.file}, which --store-pa"):
        await opened(login.options())


async def test_a_prefix_without_permission_is_named(opened, login):
    """A user who may not use the prefix is told so at each kind of call."""
    text = "user pynet may not use the keys under /other/; grant it, or set --store-pre"
    store = EtcdStore(login.options(prefix="/other/"))
    with pytest.raises(StoreError, match=text):
        await store.open()
    with pytest.raises(StoreError, match=text):
        await store.read("")
    with pytest.raises(StoreError, match=text):
        await put(store, a="1")
    async with asyncio.timeout(2):
        with pytest.raises(StoreError, match=text):
            await anext(store.watch("", 1))
    await store.close()


async def test_nothing_shows_a_secret(opened, login):
    """Neither password nor token stands in what an object says of itself."""
    store = await opened(login.options())
    token = store.client.token.text
    assert len(token) > 10
    shown = repr((store.options, vars(store.client), vars(store.client.token)["lock"]))
    assert PASSWORD not in shown
    assert token not in shown


class Counting(EtcdStore):
    """A store that counts its logins."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.logins = 0
        login = self.client.login

        async def counted(*arguments):
            self.logins += 1
            return await login(*arguments)

        self.client.login = counted


@pytest.mark.parametrize("login", [("--auth-token-ttl", "1")], indirect=True)
async def test_a_token_that_is_over_is_renewed_once(opened, login):
    """
    When the token is over, each call goes on with one new login for all.

    1. A store has logged in, and a watch is open; nothing is called until etcd has
       forgotten the token.
    2. Twenty readings and a new watch come together; later a writing.
    Result: all succeed, by one more login; the open watch has the write.
    """
    store = await opened(login.options(), Counting)
    revision = await put(store, a="1")
    watch = store.watch("", revision)
    await anext(watch)
    waiting = asyncio.ensure_future(anext(watch))
    assert store.logins == 1
    await asyncio.sleep(2.5)
    watching = asyncio.ensure_future(anext(store.watch("", revision)))
    outcomes = await asyncio.gather(*(store.read("") for _ in range(20)))
    assert {len(listing.items) for listing in outcomes} == {1}
    assert store.logins == 2
    await put(store, b="1")
    async with asyncio.timeout(3):
        assert [event.key for event in await watching] == ["a"]
        assert [event.key for event in await waiting] == ["b"]


def test_a_late_refusal_keeps_the_new_token():
    """A call that was refused for an old token costs no further login."""
    token = Token(text="new", taken=True)
    token.drop("old")
    assert token.taken
    token.drop("new")
    assert not token.taken


@pytest.mark.parametrize("login", [("--auth-token-ttl", "1")], indirect=True)
async def test_a_write_logs_in_again(opened, login):
    """A write is repeated after a login, as it was refused; a lease is kept without."""
    store = await opened(login.options())
    lease = await store.lease(60)
    token = store.client.token.text
    await asyncio.sleep(2.5)
    await lease.keep()
    assert store.client.token.text == token
    await store.commit(Change(expect={"a": 0}, puts={"a": b"1"}), lease)
    assert store.client.token.text != token
    await lease.revoke()


async def test_a_changed_password_is_read_again(opened, login):
    """After a change of the password the file's new one is used."""
    store = await opened(login.options())
    token = pb.AuthenticateRequest(name="root", password="root")
    root = login.cluster.ask("Auth", "Authenticate", token).token
    with grpc.insecure_channel(login.cluster.endpoints[0]) as channel:
        pb.AuthStub(channel).UserChangePassword(
            pb.AuthUserChangePasswordRequest(name="pynet", password="n3w"),
            metadata=(("token", root),),
            timeout=5,
        )
    with pytest.raises(StoreError, match="with the password of"):
        await store.read("")
    login.file.write_text("n3w")
    assert (await store.read("")).items == {}


async def test_a_user_where_there_are_none(opened, tmp_path):
    """A user is no hindrance where etcd asks for none, nor when it begins to."""
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    with etcd_server.running(tmp_path, extra=("--bcrypt-cost", "4")) as cluster:
        store = await opened(cluster.options(user="pynet", password_file=file))
        await put(store, a="1")
        cluster.add_user("pynet", PASSWORD, "/pynet/v1/")
        cluster.enable_auth()
        await put(store, a="2")
        assert store.client.token.text


# Certificates.


@dataclass
class Authority:
    """A CA in a directory, made by the openssl program."""

    directory: Path
    ca: Path = field(init=False)

    def __post_init__(self) -> None:
        """Make the CA."""
        self.directory.mkdir()
        self.ca = self.directory / "ca.pem"
        openssl(
            "req", "-x509", *NEW_KEY, "-subj", f"/CN={self.directory.name}",
            "-keyout", self.directory / "ca.key", "-out", self.ca,
        )  # fmt: skip

    def make(self, name: str, address: str = "", days: int = 2) -> tuple[Path, Path]:
        """Make a certificate, for an address if it is a server's, and its key."""
        cert, key, request, more = (
            self.directory / f"{name}.{end}" for end in ("pem", "key", "csr", "cnf")
        )
        more.write_text(f"subjectAltName=IP:{address}\n" if address else "")
        openssl(
            "req", "-new", *NEW_KEY, "-subj", f"/CN={name}", "-keyout", key,
            "-out", request,
        )  # fmt: skip
        openssl(
            "x509", "-req", "-in", request, "-CA", self.ca,
            "-CAkey", self.directory / "ca.key", "-CAcreateserial",
            "-days", str(days), "-extfile", more, "-out", cert,
        )  # fmt: skip
        return cert, key


def openssl(*arguments: str | Path) -> None:
    """Run openssl."""
    argv = ["openssl", *map(str, arguments)]
    subprocess.run(argv, check=True, capture_output=True, timeout=20)


@dataclass
class Secured:
    """A member that speaks TLS and asks for certificates."""

    cluster: Cluster
    authority: Authority

    def options(self, name: str = "client", **changes: object) -> Options:
        """Return options with the certificate of that name."""
        directory = self.authority.directory
        files = {
            "ca": self.authority.ca,
            "cert": directory / f"{name}.pem",
            "key": directory / f"{name}.key",
            "tls": True,
        }
        return self.cluster.options(**{**files, **changes})

    def restart(self, days: int = 2, address: str = "") -> None:
        """Start the member, with a new certificate of its own."""
        server = self.cluster.servers[0]
        server.kill()
        cert, key = self.authority.make("server", address or server.address, days)
        server.extra = (
            "--cert-file", cert, "--key-file", key, "--client-cert-auth",
            "--trusted-ca-file", self.authority.ca, "--bcrypt-cost", "4",
        )  # fmt: skip
        self.cluster.start()
        for _ in range(200):
            with contextlib.suppress(OSError):
                ssl.get_server_certificate((server.address, server.client), timeout=1)
                return
            time.sleep(0.05)
        raise AssertionError("the member does not serve")


@pytest.fixture
def secured(tmp_path):
    """Run a member over TLS that wants certificates of its CA."""
    authority = Authority(tmp_path / "authority")
    cert, key = authority.make("client")
    with etcd_server.prepared(tmp_path, scheme="https") as cluster:
        found = Secured(cluster, authority)
        found.restart()
        cluster.credentials = grpc.ssl_channel_credentials(
            authority.ca.read_bytes(), key.read_bytes(), cert.read_bytes()
        )
        cluster.wait()
        yield found


@pytest.fixture
def brief(monkeypatch):
    """Let calls give up sooner than they do."""
    monkeypatch.setattr("cnmdriver.store.etcd.client.WHOLE", 1.0)


async def refusal(options: Options) -> str:
    """Return why a store cannot be opened."""
    store = EtcdStore(options)
    with pytest.raises(StoreError) as refused:
        await store.open()
    await store.close()
    return str(refused.value)


async def test_certificates_work(opened, secured):
    """With the right certificates everything works."""
    store = await opened(secured.options())
    revision = await put(store, a="1")
    ((event,),) = [await anext(store.watch("", revision))]
    assert event.key == "a"


async def test_certificates_that_cannot_work_are_named(secured, tmp_path, brief):
    """Each way in which certificates do not fit is told apart and named."""
    stranger = Authority(tmp_path / "stranger")
    cert, key = stranger.make("client")
    plain = secured.cluster.options()
    cases = {
        f"its certificate is not from {stranger.ca}; check": {"ca": stranger.ca},
        "its certificate is not from a CA of this system": {"ca": None},
        "it refused us: it wants one; check --store-cert": {"cert": None, "key": None},
        f"it refused the certificate {cert}; check": {"cert": cert, "key": key},
    }
    options = [secured.options(**changes) for changes in cases.values()]
    found = await asyncio.gather(*map(refusal, [*options, plain]))
    for text, expected in zip(found, [*cases, "if it speaks TLS, use"], strict=True):
        assert expected in text


async def test_a_member_without_tls_is_named(brief, tmp_path):
    """TLS to a member that has none is told."""
    with etcd_server.running(tmp_path) as plain:
        options = plain.options(tls=True)
        assert (
            "it gave no answer in TLS; if it speaks none, use etcd://"
            in await refusal(options)
        )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"days": -1}, "its certificate has expired; renew it"),
        ({"address": "127.1.2.3"}, "its certificate is for another name"),
    ],
)
async def test_a_members_bad_certificate_is_named(secured, settings, text, brief):
    """A member's certificate that is over, or another's, is told."""
    secured.restart(**settings)
    assert text in await refusal(secured.options())


async def test_our_own_files_are_checked_first(secured, tmp_path):
    """Faults of our own files are named without asking etcd."""
    secured.cluster.end()
    make, files = secured.authority.make, secured.authority.directory
    other = make("other")[1]
    over = make("over", days=-1)[0]
    garbage = tmp_path / "garbage"
    garbage.write_text("no certificate")
    locked = tmp_path / "locked.key"
    openssl(
        "ec",
        "-in",
        files / "client.key",
        "-aes128",
        "-passout",
        "pass:x",
        "-out",
        locked,
    )
    cert = files / "client.pem"
    cases = {
        f"the certificate {over} expired on 20": {
            "cert": over,
            "key": files / "over.key",
        },
        f"{cert} and {other}, which --store-cert and --store-key name, are not of": {
            "key": other
        },
        f"{garbage} and .* are not a certificate and a key": {"cert": garbage},
        f"{cert} and {locked}, .* are not .* key without password": {"key": locked},
        f"{garbage}, which --store-ca names, has no certificate": {"ca": garbage},
        f"cannot read {files}/none, which --store-ca": {"ca": files / "none"},
        f"cannot read {files}/none, which --store-key": {"key": files / "none"},
    }
    for text, changes in cases.items():
        assert re.search(text, await refusal(secured.options(**changes)))


def replace(name: str, *pairs: tuple[Path, Path]) -> None:
    """Put files in the place of others, as a renewal does."""
    for source, target in pairs:
        shutil.copy(source, f"{target}.{name}")
        Path(f"{target}.{name}").replace(target)


async def test_renewed_certificates_are_used(opened, secured, monkeypatch):
    """
    A certificate that is replaced is used without a restart, and costs no event.

    1. etcd takes the certificate's name for the user; alice may not use the prefix, bob
       may. The store opens as alice.
    2. The certificate is replaced by bob's: first the one file, then the key.
    Result: with half of it the old one serves; with both the store is bob, and a watch
    that was open as bob goes on when his certificate is renewed.
    """
    monkeypatch.setattr("cnmdriver.store.etcd.client.LOOK", 0.0)
    cluster, make = secured.cluster, secured.authority.make
    cert, key = make("used")
    alice, bob = make("alice"), make("bob")
    cluster.add_user("alice", "x", "/alice/")
    cluster.add_user("bob", "x", "/pynet/v1/")
    cluster.enable_auth()
    replace("alice", (alice[0], cert), (alice[1], key))
    store = EtcdStore(secured.options("used"))
    refused = "the certificate's user may not use the keys under /pynet/v1/"
    with pytest.raises(StoreError, match=refused):
        await store.open()
    replace("half", (bob[0], cert))
    with capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(StoreError, match=refused):
                await store.read("")
    assert [entry["event"] for entry in logs] == ["store.certificates_unusable"]
    replace("whole", (bob[1], key))
    watch = store.watch("", await put(store, a="1"))
    await anext(watch)
    waiting = asyncio.ensure_future(anext(watch))
    newer = make("bob")
    replace("newer", (newer[0], cert), (newer[1], key))
    before = store.client.members
    await store.read("")
    assert store.client.members is not before
    await asyncio.gather(*store.client.tasks)
    await put(store, b="1")
    async with asyncio.timeout(3):
        assert [event.key for event in await waiting] == ["b"]
    await watch.aclose()
    await store.close()


async def test_touched_files_change_nothing(opened, secured, monkeypatch):
    """Files that are written anew with the same content keep the connections."""
    monkeypatch.setattr("cnmdriver.store.etcd.client.LOOK", 0.0)
    store = await opened(secured.options())
    before = store.client.members
    for path in secured.authority.directory.glob("client.*"):
        os.utime(path)
    await store.read("")
    assert store.client.members is before
