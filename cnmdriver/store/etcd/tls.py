"""
Certificates: read from files, checked before they are used, looked at for changes.

grpc tells next to nothing about a certificate it cannot use, so the faults of our own
files are found here and named.
"""

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cnmdriver.errors import StoreError
from cnmdriver.store.etcd.options import Options
from cnmdriver.store.etcd.rpc import grpc

BUNDLES = (
    Path("/etc/ssl/certs/ca-certificates.crt"),
    Path("/etc/pki/tls/certs/ca-bundle.crt"),
)
"""Where systems keep their CAs; grpc would use a list of its own."""
VERSION, UTC_TIME = 0xA0, 0x17
"""DER tags (X.690; the certificate's fields are in RFC 5280)."""

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What the files held. It has the private key in it: never show it."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None

    def __repr__(self) -> str:
        """Show nothing."""
        return "Material()"


def authorities(options: Options) -> Path | None:
    """Return the file of CAs, the system's if none is set."""
    if options.ca:
        return options.ca
    usual = ssl.get_default_verify_paths().cafile
    candidates = [Path(usual), *BUNDLES] if usual else [*BUNDLES]
    return next((path for path in candidates if path.is_file()), None)


def stamp(options: Options) -> Stamp:
    """Return what changes when a file is written or replaced; cheap."""
    paths = (authorities(options), options.cert, options.key)
    return tuple(map(identity, paths))


def identity(path: Path | None) -> tuple[int, int, int]:
    """Return what changes with a file, zeros if there is none."""
    try:
        found = path.stat() if path else None
    except OSError:
        found = None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if found else (0, 0, 0)


def read(options: Options) -> Material:
    """Read the files and check them; raises StoreError, which names the file."""
    found = Material(
        ca=content("--store-ca", authorities(options)),
        cert=content("--store-cert", options.cert),
        key=content("--store-key", options.key),
    )
    if options.ca and found.ca:
        check_authorities(options.ca, found.ca)
    if options.cert and options.key and found.cert:
        check_pair(options.cert, options.key)
        check_dates(options.cert, found.cert)
    return found


def credentials(material: Material) -> Any:
    """Return grpc's form of it."""
    return grpc.ssl_channel_credentials(material.ca, material.key, material.cert)


def content(setting: str, path: Path | None) -> bytes | None:
    """Read one file."""
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        raise StoreError(
            f"cannot read {path}, which {setting} names: {error.strerror}"
        ) from None


def check_authorities(path: Path, pem: bytes) -> None:
    """Refuse a file without a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except ssl.SSLError:
        raise StoreError(
            f"{path}, which --store-ca names, has no certificate in PEM form"
        ) from None


def check_pair(cert: Path, key: Path) -> None:
    """Refuse what is no certificate, no key, or not of one pair."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        # An empty password, or OpenSSL would ask for one on the terminal.
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError) as error:
        mismatch = getattr(error, "reason", "") == "KEY_VALUES_MISMATCH"
        fault = (
            "are not of one pair"
            if mismatch
            else "are not a certificate and a key without password, in PEM form"
        )
        raise StoreError(
            f"{cert} and {key}, which --store-cert and --store-key name, {fault}"
        ) from None
    except OSError as error:
        raise StoreError(f"cannot read {cert} or {key}: {error.strerror}") from None


def check_dates(path: Path, pem: bytes) -> None:
    """Refuse a certificate that is over or not valid yet."""
    text = pem.decode("ascii", "replace")
    start = text.find(ssl.PEM_HEADER)
    end = text.find(ssl.PEM_FOOTER, start) + len(ssl.PEM_FOOTER)
    try:
        begins, ends = dates(ssl.PEM_cert_to_DER_cert(text[start:end]))
    except (ValueError, LookupError) as error:
        raise StoreError(f"cannot read the certificate {path}: {error}") from None
    now = datetime.now(UTC)
    if now > ends:
        raise StoreError(f"the certificate {path} expired on {ends:%Y-%m-%d %H:%M} UTC")
    if now < begins:
        raise StoreError(
            f"the certificate {path} is not valid before {begins:%Y-%m-%d %H:%M} UTC; "
            "check the clock"
        )


def dates(der: bytes) -> tuple[datetime, datetime]:
    """Return from when and until when a certificate is valid."""
    ((_, certificate),) = elements(der)
    fields = [f for f in elements(next(elements(certificate))[1]) if f[0] != VERSION]
    # Serial number, algorithm, issuer, validity.
    begins, ends = (moment(tag, text) for tag, text in elements(fields[3][1]))
    return begins, ends


def elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of the elements that stand in a row."""
    while der:
        tag, length, at = der[0], der[1], 2
        if length > 127:
            at += length - 128
            length = int.from_bytes(der[2:at])
        yield tag, der[at : at + length]
        der = der[at + length :]


def moment(tag: int, text: bytes) -> datetime:
    """Read a time as certificates have it."""
    form = "%y%m%d%H%M%SZ" if tag == UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(text.decode(), form).replace(tzinfo=UTC)
