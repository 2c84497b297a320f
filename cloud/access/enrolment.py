"""How a node gets its name: invitation, certificate request, certificate, renewal (in the shape of EST, RFC 7030)."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import Connection, Engine, and_, insert, select, update

from cloud.access import audit
from cloud.access.authority import Authority, read_csr
from cloud.access.tables import devices, invitations, nodes
from shared.clock import Clock
from shared.errors import PeerError, TrustError
from shared.signin import mint, token_digest
from shared.wire.identity import Identity

INVITATION_LIFETIME = timedelta(hours=1)


def invite(conn: Connection, clock: Clock, authority: Authority, site: str, node: str, *, actor: str) -> str:
    """Returns a single-use token for one node, good for INVITATION_LIFETIME; puts the node into the inventory.

    The token reads `id.secret.fingerprint`: with the CA's fingerprint the node can tell our server from another on
    its very first contact. Only the secret's digest is stored.

    Raises:
        PeerError: a name that topics and certificates cannot carry.
    """
    identity = Identity(site, node)
    where = and_(nodes.c.site == site, nodes.c.node == node)
    if conn.execute(select(nodes).where(where)).first() is None:
        conn.execute(insert(nodes).values(site=site, node=node, invited_at=clock.now()))
    identifier, secret = secrets.token_hex(8), mint()
    conn.execute(
        insert(invitations).values(
            id=identifier,
            site=site,
            node=node,
            digest=token_digest(secret),
            expires_at=clock.now() + INVITATION_LIFETIME,
        )
    )
    audit.record(conn, clock, actor=actor, action="enrolment.invited", subject=identity.common_name, id=identifier)
    return f"{identifier}.{secret}.{authority.fingerprint}"


def enrol(
    engine: Engine, clock: Clock, authority: Authority, identifier: str, secret: str, csr: bytes
) -> x509.Certificate:
    """Returns the device certificate for the node that the invitation names, and ends the invitation.

    A node that enrols again (a re-imaged one) replaces its earlier certificates. A refusal is audited in a
    transaction of its own, so it stays on record.

    Raises:
        TrustError: an unknown, used or expired invitation, or a wrong secret.
        PeerError: the request is not acceptable (see `read_csr`); the invitation stays good.
    """

    def accept(conn: Connection) -> x509.Certificate:
        invitation = conn.execute(select(invitations).where(invitations.c.id == identifier)).first()
        now = clock.now()
        if invitation is None or not hmac.compare_digest(invitation.digest, token_digest(secret)):
            raise TrustError("The enrolment token is not one of ours.", cure="Ask for a new invitation.")
        if invitation.expires_at < now:
            raise TrustError("The enrolment token has expired.", cure="Ask for a new invitation.")
        site, node = invitation.site, invitation.node
        ended = conn.execute(
            update(invitations)
            .where(invitations.c.id == identifier, invitations.c.used_at.is_(None))
            .values(used_at=now)
        )
        if ended.rowcount != 1:
            raise TrustError("The enrolment token was used before.", cure="Ask for a new invitation.")
        key = read_csr(csr, Identity(site, node))  # when it is refused, the invitation stays as it was
        conn.execute(update(devices).where(devices.c.site == site, devices.c.node == node).values(revoked=True))
        return _issue(conn, clock, authority, key, site, node, "enrolment.enrolled")

    return _audited(engine, clock, f"invitation {identifier[:16]}", accept)


def renew(engine: Engine, clock: Clock, authority: Authority, presented: bytes, csr: bytes) -> x509.Certificate:
    """Returns a fresh certificate for the node whose valid certificate (`presented`, DER) opened the connection.

    Raises:
        TrustError: the presented certificate is revoked or not one that we issued.
        PeerError: the request is not acceptable, or changes the device key.
    """

    def accept(conn: Connection) -> x509.Certificate:
        device = conn.execute(select(devices).where(devices.c.certificate == presented)).first()
        if device is None or device.revoked:
            raise TrustError("The certificate is revoked.", cure="Enrol the node again.")
        site, node = device.site, device.node
        key = read_csr(csr, Identity(site, node))
        if key.public_bytes_raw() != device.key:
            raise PeerError("A renewal keeps the device key.", cure="Enrol the node again to change it.")
        return _issue(conn, clock, authority, key, site, node, "enrolment.renewed")

    return _audited(engine, clock, "renewal", accept)


def device_of(conn: Connection, certificate: bytes, now: datetime) -> tuple[str, str] | None:
    """Returns (site, node) for a certificate (DER) that we issued and that still counts; None otherwise."""
    row = conn.execute(
        select(devices.c.site, devices.c.node).where(
            devices.c.certificate == certificate, devices.c.revoked.is_(False), devices.c.expires_at > now
        )
    ).first()
    return (row.site, row.node) if row else None


def revoke(conn: Connection, clock: Clock, site: str, node: str, *, actor: str) -> None:
    """Ends every certificate of a node: the node port and the worker refuse it from now on."""
    conn.execute(update(devices).where(devices.c.site == site, devices.c.node == node).values(revoked=True))
    audit.record(conn, clock, actor=actor, action="enrolment.revoked", subject=f"{site}/{node}")


def _issue(
    conn: Connection,
    clock: Clock,
    authority: Authority,
    key: Ed25519PublicKey,
    site: str,
    node: str,
    action: str,
) -> x509.Certificate:
    now = clock.now()
    certificate = authority.issue_device(key, Identity(site, node), now)
    serial = f"{certificate.serial_number:x}"
    conn.execute(
        insert(devices).values(
            serial=serial,
            site=site,
            node=node,
            key=key.public_bytes_raw(),
            certificate=certificate.public_bytes(Encoding.DER),
            issued_at=now,
            expires_at=certificate.not_valid_after_utc,
            revoked=False,
        )
    )
    audit.record(conn, clock, actor=f"node:{site}/{node}", action=action, subject=f"{site}/{node}", serial=serial)
    return certificate


def _audited(
    engine: Engine, clock: Clock, subject: str, accept: Callable[[Connection], x509.Certificate]
) -> x509.Certificate:
    try:
        with engine.begin() as conn:
            return accept(conn)
    except (PeerError, TrustError) as exc:
        with engine.begin() as conn:
            audit.record(conn, clock, actor="unknown", action="enrolment.refused", subject=subject, reason=exc.message)
        raise
