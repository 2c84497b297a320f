"""The private certificate authority: one ECDSA P-256 key that names the cloud's servers and every node.

The CA and the servers use P-256 because browsers refuse Ed25519 certificates; a device key is Ed25519, because the
same key signs the node's envelopes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import PeerError, StateError
from shared.files import atomic_write, read_limited
from shared.wire.identity import Identity

CA_LIFETIME = timedelta(days=3650)
SERVER_LIFETIME = timedelta(days=397)  # the longest that browsers accept
DEVICE_LIFETIME = timedelta(days=90)
BACKDATED = timedelta(days=2)  # a node whose clock is a little late must not refuse its own certificate
CSR_LIMIT_BYTES = 8_192
KEY_LIMIT_BYTES = 16_384
Extension = tuple[x509.ExtensionType, bool]  # critical?


@dataclass(frozen=True)
class Authority:
    """The CA's certificate and key (`ca.pem` and `ca.key` in the cloud's `pki` folder)."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return f"Authority({self.fingerprint[:12]})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the CA certificate (DER) in hexadecimal: what an invitation carries."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue_device(self, key: Ed25519PublicKey, node: Identity, now: datetime) -> x509.Certificate:
        """Returns a client certificate that names `<site>/<node>`, whatever the CSR asked for."""
        extensions: list[Extension] = [
            (x509.SubjectAlternativeName([x509.UniformResourceIdentifier(node.uri)]), False),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
        ]
        return self._issue(node.common_name, key, now, DEVICE_LIFETIME, extensions)

    def issue_service(
        self, name: str, key: ec.EllipticCurvePublicKey, hosts: Sequence[str], now: datetime
    ) -> x509.Certificate:
        """Returns a certificate for one of the cloud's own services: a server for `hosts`, a client without."""
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        extensions: list[Extension] = [(x509.ExtendedKeyUsage([usage]), False)]
        if hosts:
            extensions.append((x509.SubjectAlternativeName([_host(host) for host in hosts]), False))
        return self._issue(name, key, now, SERVER_LIFETIME, extensions)

    def _issue(
        self,
        name: str,
        key: Ed25519PublicKey | ec.EllipticCurvePublicKey,
        now: datetime,
        lifetime: timedelta,
        extensions: Sequence[Extension],
    ) -> x509.Certificate:
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(min(now + lifetime, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(authority, critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self.key, hashes.SHA256())


def create_authority(folder: Path, now: datetime) -> Authority:
    """Writes a new CA into `folder` (`ca.pem`, `ca.key` with mode 0600) and returns it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Radfleet private CA")
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    authority = Authority(certificate, key)
    _write_pair(folder, "ca", authority.pem, key)
    return authority


def load_authority(folder: Path) -> Authority:
    """Returns the CA that lies in `folder`; StateError when it is not there or not readable."""
    try:
        certificate = x509.load_pem_x509_certificate(read_limited(folder / "ca.pem", KEY_LIMIT_BYTES))
        key = load_pem_private_key(read_limited(folder / "ca.key", KEY_LIMIT_BYTES), None)
    except ValueError as exc:
        raise StateError(f"The CA in {folder} cannot be read: {exc}.", cure="Restore a backup.") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError(f"{folder / 'ca.key'} is not a P-256 key.", cure="Restore a backup.")
    return Authority(certificate, key)


def ensure_service(
    authority: Authority, folder: Path, file: str, name: str, hosts: Sequence[str], now: datetime
) -> None:
    """Makes `<file>.pem` and `<file>.key` in `folder` good: new, for other hosts, or in the last third of life."""
    path = folder / f"{file}.pem"
    if path.exists() and (folder / f"{file}.key").exists():
        old = x509.load_pem_x509_certificate(read_limited(path, KEY_LIMIT_BYTES))
        if _hosts(old) == set(hosts) and not renewal_due(old, now) and old.issuer == authority.certificate.subject:
            return
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue_service(name, key.public_key(), hosts, now)
    _write_pair(folder, file, certificate.public_bytes(Encoding.PEM) + authority.pem, key)


def read_csr(data: bytes, allowed: Identity) -> Ed25519PublicKey:
    """Returns the key of a certificate request after checking its proof of possession.

    The name comes from the inventory; a request that asks for another one is an attack or a mix-up, so it is refused
    rather than ignored.

    Raises:
        PeerError: too long, not PKCS #10, a wrong signature, not an Ed25519 key, or a foreign name in it.
    """
    if len(data) > CSR_LIMIT_BYTES:
        raise PeerError(f"A certificate request of {len(data)} bytes is refused.")
    try:
        csr = x509.load_der_x509_csr(data)
        key = csr.public_key()
        if not isinstance(key, Ed25519PublicKey):
            raise PeerError("The device key is not Ed25519.")
        if not csr.is_signature_valid:
            raise PeerError("The request is not signed by the key it carries.")
        names = [str(attribute.value) for attribute in csr.subject]
        san = _san(csr.extensions)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise PeerError(f"Not a certificate request: {exc}.") from exc
    if any(name != allowed.common_name for name in names) or any(
        not isinstance(entry, x509.UniformResourceIdentifier) or entry.value != allowed.uri for entry in san
    ):
        raise PeerError(f"The request asks for a name that is not {allowed.common_name}.")
    return key


def renewal_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Tells whether two thirds of the certificate's life are over."""
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return now > certificate.not_valid_before_utc + life * 2 / 3


def _san(extensions: x509.Extensions) -> Sequence[x509.GeneralName]:
    try:
        return list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _hosts(certificate: x509.Certificate) -> set[str]:
    return {str(entry.value) for entry in _san(certificate.extensions)}


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _write_pair(folder: Path, file: str, chain: bytes, key: ec.EllipticCurvePrivateKey) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    atomic_write(folder / f"{file}.key", pem, mode=0o600)
    atomic_write(folder / f"{file}.pem", chain, mode=0o644)
