"""How the node gets its certificate: one token, a CA proved by its fingerprint, a key that never leaves."""

from __future__ import annotations

import base64
import binascii
import secrets
import ssl
from datetime import datetime
from pathlib import Path

import httpx
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    pkcs7,
)

from edge.identity import NodeIdentity, read_identity
from shared.errors import ConfigError, LinkError, PeerError, StateError, TrustError
from shared.files import atomic_write, read_limited
from shared.wire.enrolment import (
    ANSWER_LIMIT_BYTES,
    CACERTS_PATH,
    ENROL_PATH,
    RENEW_PATH,
    WELCOME_PATH,
    Token,
    Welcome,
    parse_token,
)
from shared.wire.identity import Identity, identity_of

TIMEOUT_S = 30.0
FILE_LIMIT_BYTES = 1_000_000


def enrol(url: str, token_text: str, state: Path) -> NodeIdentity:
    """Enrols the node and writes `node.json` and `pki/`; a second enrolment is a new incarnation.

    The token's secret is sent only over a connection whose CA has the fingerprint that the token carries.

    Raises:
        PeerError: not a token, or a cloud that answers what EST does not allow.
        TrustError: another CA than the token's, or the cloud refused the token.
        LinkError: the cloud cannot be reached.
        ConfigError: the address is not https.
    """
    token = parse_token(token_text)
    url = url.rstrip("/")
    if not url.startswith("https://"):
        raise ConfigError(f"{url} is not an https address.", cure="Use the people port, https://host:8443.")
    ca = _prove_ca(url, token)
    ca_pem = ca.public_bytes(Encoding.PEM)
    pki = state / "pki"
    pki.mkdir(mode=0o700, parents=True, exist_ok=True)
    with httpx.Client(verify=_context(ca_pem), timeout=TIMEOUT_S, trust_env=False) as client:
        welcome = _decode_welcome(_ask(client, "GET", url + WELCOME_PATH))
        key = Ed25519PrivateKey.generate()
        body = base64.encodebytes(make_request(key))
        answer = _ask(client, "POST", url + ENROL_PATH, body, auth=(token.id, token.secret))
    certificate = _certificate(answer, ca, key)
    identity = identity_of(certificate)
    _write_pki(pki, ca_pem, certificate, key, welcome)
    node = NodeIdentity(
        site=identity.site,
        node=identity.node,
        incarnation=secrets.token_hex(8),
        cloud_url=url,
        nodes_url=welcome.nodes_url,
        broker_host=welcome.broker_host,
        broker_port=welcome.broker_port,
    )
    atomic_write(state / "node.json", msgspec.json.format(msgspec.json.encode(node), indent=2), mode=0o644)
    return node


def renew_if_due(state: Path, now: datetime) -> bool:
    """Fetches a fresh certificate for the same key once two thirds of the old one's life are over; True if it did.

    Raises:
        LinkError: the cloud cannot be reached; try again later.
        TrustError: the cloud refused.
    """
    node = read_identity(state)
    pki = state / "pki"
    if node is None:
        return False
    old = x509.load_pem_x509_certificate(read_limited(pki / "device.pem", FILE_LIMIT_BYTES))
    life = old.not_valid_after_utc - old.not_valid_before_utc
    if now < old.not_valid_before_utc + life * 2 / 3:
        return False
    ca_pem = read_limited(pki / "ca.pem", FILE_LIMIT_BYTES)
    ca = x509.load_pem_x509_certificate(ca_pem)
    key = load_pem_private_key(read_limited(pki / "device.key", FILE_LIMIT_BYTES), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise StateError("pki/device.key is not an Ed25519 key.", cure="Enrol the node again.")
    context = _context(ca_pem)
    context.load_cert_chain(pki / "device.pem", pki / "device.key")
    with httpx.Client(verify=context, timeout=TIMEOUT_S, trust_env=False) as client:
        answer = _ask(client, "POST", node.nodes_url + RENEW_PATH, base64.encodebytes(make_request(key)))
    certificate = _certificate(answer, ca, key)
    if identity_of(certificate) != Identity(node.site, node.node):
        raise TrustError("The cloud answered with another node's certificate.")
    atomic_write(pki / "device.pem", certificate.public_bytes(Encoding.PEM) + ca_pem, mode=0o644)
    return True


def make_request(key: Ed25519PrivateKey) -> bytes:
    """Returns a PKCS #10 request (DER) that proves possession of `key` and asks for no name: the cloud knows it."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, None).public_bytes(Encoding.DER)


def _prove_ca(url: str, token: Token) -> x509.Certificate:
    """Returns the CA whose fingerprint the token carries; nothing secret is sent on this connection."""
    with httpx.Client(verify=False, timeout=TIMEOUT_S, trust_env=False) as client:  # noqa: S501  see the docstring
        offered = _certificates(_ask(client, "GET", url + CACERTS_PATH))
    for certificate in offered:
        if secrets.compare_digest(certificate.fingerprint(hashes.SHA256()).hex(), token.fingerprint):
            return certificate
    raise TrustError(
        f"{url} is not the cloud that gave this token: its CA has another fingerprint.",
        cure="Check the address; somebody may be in between.",
    )


def _ask(
    client: httpx.Client,
    method: str,
    url: str,
    body: bytes | None = None,
    auth: tuple[str, str] | None = None,
) -> bytes:
    headers = {"Content-Type": "application/pkcs10"} if body is not None else {}
    try:
        with client.stream(method, url, content=body, headers=headers, auth=auth) as answer:
            data = b""
            for piece in answer.iter_bytes():
                data += piece
                if len(data) > ANSWER_LIMIT_BYTES:
                    raise PeerError(f"{url} answers more than {ANSWER_LIMIT_BYTES} bytes.")
    except (httpx.HTTPError, ssl.SSLError) as exc:
        raise LinkError(f"{url} cannot be reached: {exc}.", cure="Check address, network and name.") from exc
    if answer.status_code == 200:
        return data
    try:
        said = msgspec.json.decode(data, type=dict[str, str])
    except msgspec.MsgspecError:
        said = {"error": f"status {answer.status_code}"}
    message = f"The cloud refused: {said.get('error', '')}"
    kind = TrustError if answer.status_code in {401, 403} else PeerError if answer.status_code < 500 else LinkError
    raise kind(message, cure=said.get("cure", ""))


def _certificates(data: bytes) -> list[x509.Certificate]:
    try:
        return pkcs7.load_der_pkcs7_certificates(base64.b64decode(b"".join(data.split()), validate=True))
    except (ValueError, binascii.Error) as exc:
        raise PeerError("The cloud's answer is not a list of certificates.") from exc


def _certificate(data: bytes, ca: x509.Certificate, key: Ed25519PrivateKey) -> x509.Certificate:
    found = _certificates(data)
    if len(found) != 1:
        raise PeerError("The cloud's answer is not one certificate.")
    try:
        found[0].verify_directly_issued_by(ca)
    except Exception as exc:  # InvalidSignature, ValueError or TypeError: each means "not its CA's"
        raise TrustError("The certificate is not from the CA that the token names.") from exc
    if found[0].public_key() != key.public_key():
        raise TrustError("The certificate is for another key.")
    return found[0]


def _context(ca_pem: bytes) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca_pem.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _decode_welcome(data: bytes) -> Welcome:
    try:
        return msgspec.json.decode(data, type=Welcome)
    except msgspec.MsgspecError as exc:
        raise PeerError(f"The cloud's welcome is malformed: {exc}.") from exc


def _write_pki(
    pki: Path, ca_pem: bytes, certificate: x509.Certificate, key: Ed25519PrivateKey, welcome: Welcome
) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    atomic_write(pki / "device.key", pem, mode=0o600)
    atomic_write(pki / "device.pem", certificate.public_bytes(Encoding.PEM) + ca_pem, mode=0o644)
    atomic_write(pki / "ca.pem", ca_pem, mode=0o644)
    atomic_write(pki / "cloud-sign.pub", welcome.sign_key.encode(), mode=0o644)
    atomic_write(pki / "cloud-seal.pub", welcome.seal_key, mode=0o644)
    atomic_write(pki / "tuf-root.json", welcome.tuf_root, mode=0o644)
    atomic_write(pki / "director-root.json", welcome.director_root, mode=0o644)
