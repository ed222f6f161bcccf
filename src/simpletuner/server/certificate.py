"""A certificate of one's own: https for a server that no authority vouches for (`server --ssl`)."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from simpletuner.job import write_atomic

LASTS = timedelta(days=825)
"""No longer is accepted by every client."""
RENEWED_BEFORE = timedelta(days=30)


def prepare_certificate(certfile: Path, keyfile: Path) -> None:
    """Make both files, unless they are there and last for a while. Clients can trust `certfile` as its own authority.

    It is valid for localhost, the loopback addresses and this machine's name.
    """
    now = datetime.now(UTC)
    if keyfile.exists() and certfile.exists():
        made = x509.load_pem_x509_certificate(certfile.read_bytes())
        if made.not_valid_after_utc > now + RENEWED_BEFORE:
            return
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SimpleTuner")])
    addresses = [ipaddress.ip_address(address) for address in ("127.0.0.1", "::1")]
    names = [x509.DNSName(name) for name in dict.fromkeys(("localhost", *_machine_name()))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + LASTS)
        .add_extension(x509.SubjectAlternativeName([*names, *map(x509.IPAddress, addresses)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    # The key first: a certificate without its key would be taken for a whole pair at the next start.
    _write_private(
        keyfile,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    write_atomic(certfile, certificate.public_bytes(serialization.Encoding.PEM))


def _machine_name() -> list[str]:
    name = socket.gethostname().lower()
    return [name] if name.isascii() and name else []


def _write_private(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    beside.replace(path)
