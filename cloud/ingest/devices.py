"""Which device keys may speak for a node: the certificates that enrolment issued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection, select

from cloud.access.tables import devices
from shared.errors import TrustError
from shared.wire.identity import Identity, identity_of


@dataclass(frozen=True, slots=True)
class Device:
    """One enrolled certificate: the node it names and the key it binds."""

    identity: Identity
    key: Ed25519PublicKey
    revoked: bool


class Devices(Protocol):
    """Returns the devices ever enrolled under a node's name."""

    def __call__(self, conn: Connection, identity: Identity, /) -> Sequence[Device]: ...


def enrolled_devices(conn: Connection, identity: Identity) -> Sequence[Device]:
    """Reads enrolment's table. Expiry is the broker's affair: a message sealed before it stays good."""
    rows = conn.execute(
        select(devices.c.certificate, devices.c.revoked).where(
            devices.c.site == identity.site, devices.c.node == identity.node
        )
    )
    found = []
    for row in rows:
        certificate = x509.load_der_x509_certificate(row.certificate)
        key = certificate.public_key()
        if not isinstance(key, Ed25519PublicKey):
            raise TrustError(f"The certificate of {identity.common_name} holds no Ed25519 key.")
        found.append(Device(identity_of(certificate), key, row.revoked))
    return found
