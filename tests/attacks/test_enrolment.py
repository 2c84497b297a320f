"""Attacks on enrolment, over real TLS with the node's real client: each ends by looking at what is still true."""

from __future__ import annotations

import base64
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from cloud.access import enrolment
from edge import enrolment as node_side
from shared.errors import LinkError, PeerError, TrustError
from shared.wire.enrolment import ENROL_PATH, RENEW_PATH, parse_token
from shared.wire.identity import Identity, identity_of
from tests.simulators.access import LiveCloud

Csr = Callable[[Ed25519PrivateKey], bytes]


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[LiveCloud]:
    live = LiveCloud(tmp_path).start()
    yield live
    live.stop()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "node"


def certificate(state: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((state / "pki" / "device.pem").read_bytes())


def post(cloud: LiveCloud, token: str, csr: bytes) -> httpx.Response:
    """The bare request, for what our own client would never send."""
    parts = parse_token(token)
    with cloud.browser() as client:
        return client.post(ENROL_PATH, content=base64.encodebytes(csr), auth=(parts.id, parts.secret))


def csr(*, name: str = "", uri: str = "") -> Csr:
    def build(key: Ed25519PrivateKey) -> bytes:
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else []
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
        if uri:
            san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
            builder = builder.add_extension(san, critical=False)
        return builder.sign(key, None).public_bytes(Encoding.DER)

    return build


def test_a_node_enrols_and_is_named_by_the_inventory(cloud: LiveCloud, state: Path) -> None:
    node = node_side.enrol(cloud.url, cloud.invite("hospital-a", "edge-1"), state)

    assert (node.site, node.node, node.nodes_url) == ("hospital-a", "edge-1", cloud.nodes_url)
    issued = certificate(state)
    assert identity_of(issued) == Identity("hospital-a", "edge-1")
    assert issued.not_valid_before_utc < cloud.clock.now()  # a node whose clock is late must not refuse it
    assert stat.S_IMODE((state / "pki" / "device.key").stat().st_mode) == 0o600
    with cloud.node(state) as client:
        assert client.get("/blobs/" + "0" * 64).status_code == 404  # known there, so let in
    assert cloud.audited() == ["enrolment.invited", "enrolment.enrolled"]


def test_the_device_key_never_reaches_the_cloud(cloud: LiveCloud, state: Path) -> None:
    node_side.enrol(cloud.url, cloud.invite(), state)
    key = load_pem_private_key((state / "pki" / "device.key").read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    secret, stored = key.private_bytes_raw(), b""
    for path in cloud.folder.rglob("*"):
        if path.is_file() and state not in path.parents:
            stored += path.read_bytes()
    assert secret not in stored
    assert key.public_key().public_bytes_raw() in stored  # the search finds what is there


def test_a_token_is_used_once(cloud: LiveCloud, state: Path, tmp_path: Path) -> None:
    token = cloud.invite()
    node_side.enrol(cloud.url, token, state)
    with pytest.raises(TrustError, match="used before"):
        node_side.enrol(cloud.url, token, tmp_path / "thief")
    assert not (tmp_path / "thief" / "node.json").exists()
    assert cloud.audited()[-1] == "enrolment.refused"
    with cloud.node(state) as client:
        assert client.get("/blobs/" + "0" * 64).status_code == 404  # the rightful node still counts


def test_an_expired_token_is_refused(cloud: LiveCloud, state: Path) -> None:
    token = cloud.invite()
    cloud.clock.advance(enrolment.INVITATION_LIFETIME.total_seconds() + 1)
    with pytest.raises(TrustError, match="expired"):
        node_side.enrol(cloud.url, token, state)
    assert cloud.audited()[-1] == "enrolment.refused"


def test_a_guessed_secret_is_refused_and_slowed_down(cloud: LiveCloud) -> None:
    token = parse_token(cloud.invite())
    guess = f"{token.id}.{'x' * 43}.{token.fingerprint}"
    answers = [post(cloud, guess, csr()(Ed25519PrivateKey.generate())) for _ in range(6)]
    assert [a.status_code for a in answers] == [403] * 5 + [400]
    assert "Too many" in answers[-1].json()["error"]


@pytest.mark.parametrize(
    "forged",
    [csr(name="hospital-b/edge-1"), csr(uri="spiffe://radfleet/hospital-b/edge-1"), csr(name="cloud")],
    ids=["foreign name", "forged SAN", "the cloud's own name"],
)
def test_a_request_for_another_name_is_refused(cloud: LiveCloud, forged: Csr) -> None:
    token = cloud.invite("hospital-a", "edge-1")
    refused = post(cloud, token, forged(Ed25519PrivateKey.generate()))
    assert refused.status_code == 400
    assert "not hospital-a/edge-1" in refused.json()["error"]
    assert cloud.audited()[-1] == "enrolment.refused"
    # The mistake did not cost the node its invitation.
    assert post(cloud, token, csr(name="hospital-a/edge-1")(Ed25519PrivateKey.generate())).status_code == 200


def test_a_request_without_proof_of_possession_is_refused(cloud: LiveCloud) -> None:
    whole = csr()(Ed25519PrivateKey.generate())
    refused = post(cloud, cloud.invite(), whole[:-1] + bytes([whole[-1] ^ 1]))
    assert refused.status_code == 400
    assert "not signed by the key" in refused.json()["error"]


def test_a_key_of_another_kind_is_refused(cloud: LiveCloud) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    refused = post(cloud, cloud.invite(), builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER))
    assert "not Ed25519" in refused.json()["error"]


@pytest.mark.parametrize("body", [b"", b"nonsense", b"\x30" * 100_000])
def test_what_is_no_request_is_refused(cloud: LiveCloud, body: bytes) -> None:
    assert post(cloud, cloud.invite(), body).status_code == 400


def test_a_cloud_in_between_is_seen_before_the_secret_is_sent(cloud: LiveCloud, state: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = LiveCloud(tmp_path / "other").start()
    try:
        with pytest.raises(TrustError, match="another fingerprint"):
            node_side.enrol(other.url, cloud.invite(), state)
        assert other.audited() == []
    finally:
        other.stop()
    assert not (state / "node.json").exists()


def test_the_node_port_wants_a_certificate_of_ours(cloud: LiveCloud, tmp_path: Path) -> None:
    with cloud.browser() as client, pytest.raises((httpx.RemoteProtocolError, httpx.ReadError, httpx.ConnectError)):
        client.get(cloud.nodes_url + "/blobs/" + "0" * 64)


def test_an_enrolled_again_node_loses_its_old_certificate(cloud: LiveCloud, state: Path, tmp_path: Path) -> None:
    node_side.enrol(cloud.url, cloud.invite(), state)
    again = node_side.enrol(cloud.url, cloud.invite(), tmp_path / "again")
    assert again.incarnation != (node_side.read_identity(state) or again).incarnation
    with cloud.node(state) as old, cloud.node(tmp_path / "again") as new:
        assert old.get("/blobs/" + "0" * 64).status_code == 403
        assert new.get("/blobs/" + "0" * 64).status_code == 404


def test_a_revoked_node_is_refused(cloud: LiveCloud, state: Path) -> None:
    node_side.enrol(cloud.url, cloud.invite(), state)
    with cloud.engine.begin() as conn:
        enrolment.revoke(conn, cloud.clock, "hospital-a", "edge-1", actor="test")
    with cloud.node(state) as client:
        assert client.get("/blobs/" + "0" * 64).status_code == 403
        assert client.post(RENEW_PATH, content=b"AAAA").status_code == 403


def test_renewal_at_two_thirds_of_life_keeps_the_key(cloud: LiveCloud, state: Path) -> None:
    node_side.enrol(cloud.url, cloud.invite(), state)
    before = certificate(state)
    assert not node_side.renew_if_due(state, cloud.clock.now())
    cloud.clock.advance(65 * 24 * 3600)
    assert node_side.renew_if_due(state, cloud.clock.now())
    after = certificate(state)
    assert after.public_key() == before.public_key()
    assert after.not_valid_after_utc > before.not_valid_after_utc
    assert cloud.audited()[-1] == "enrolment.renewed"


def test_renewal_with_another_key_is_refused(cloud: LiveCloud, state: Path) -> None:
    node_side.enrol(cloud.url, cloud.invite(), state)
    with cloud.node(state) as client:
        body = base64.encodebytes(csr()(Ed25519PrivateKey.generate()))
        assert client.post(RENEW_PATH, content=body).status_code == 400
    assert cloud.audited()[-1] == "enrolment.refused"


def test_a_cloud_that_is_away_is_a_link_error(state: Path, cloud: LiveCloud) -> None:
    token = cloud.invite()
    with pytest.raises(LinkError, match="cannot be reached"):
        node_side.enrol("https://localhost:9", token, state)
    with pytest.raises(PeerError, match="not an enrolment token"):
        node_side.enrol(cloud.url, "nonsense", state)
