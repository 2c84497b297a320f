"""The Conformance Statement is up to date, and what it claims is so at a running door."""

from __future__ import annotations

import datetime
import re
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pydicom.dataset import Dataset
from pynetdicom.sop_class import StorageCommitmentPushModel

from edge.intake import spool as spool_module
from edge.intake.commitment import WELL_KNOWN_INSTANCE, Asked, judge
from edge.intake.index import Index
from edge.intake.peers import Peer
from edge.intake.spool import Spool
from edge.intake.tls import Tls
from scripts.lab import conformance
from shared.errors import StateError
from tests.simulators import caller
from tests.simulators.caller import CT, DATA, RJ, VERIFICATION, Caller
from tests.simulators.modality import EXPLICIT, associate, encoded, phantom_study
from tests.simulators.node import make_door, make_spool

TEXT = conformance.FILE.read_text()
UNCOMPRESSED = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2")


def table(*head: str) -> list[list[str]]:
    """Returns the rows of the table with these headings, from the document and not from the code."""
    lines = TEXT.split("\n")
    at = lines.index(f"| {' | '.join(head)} |") + 2
    rows = []
    while lines[at].startswith("|"):
        rows.append([cell.strip() for cell in lines[at].strip("|").split("|")])
        at += 1
    return rows


def test_it_is_up_to_date() -> None:
    assert conformance.statement() == TEXT, "python -m scripts.lab.conformance"


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    one = make_spool(tmp_path)
    yield one
    one.close()


@pytest.fixture
def port(spool: Spool) -> Iterator[int]:
    door = make_door(spool)
    yield door.port
    door.stop()


def results(port: int, pairs: list[tuple[str, str]]) -> list[tuple[int, str]]:
    """Proposes a context for each (class, transfer syntax) and returns result and chosen transfer syntax of each."""
    found = []
    for at in range(0, len(pairs), 128):
        part = pairs[at : at + 128]
        with Caller(port) as one:
            body = one.associate([(2 * n + 1, uid, [syntax]) for n, (uid, syntax) in enumerate(part)])
            answers = {}
            position = 68
            while position < len(body):
                kind, length = body[position], int.from_bytes(body[position + 2 : position + 4], "big")
                if kind == 0x21:
                    inside = body[position + 4 : position + 4 + length]
                    answers[inside[0]] = (inside[2], inside[8:].decode().strip("\0"))
                position += 4 + length
            found += [answers[2 * n + 1] for n in range(len(part))]
            one.say(caller.pdu(caller.RELEASE, bytes(4)))
            one.hear()
    return found


def test_every_claimed_context_is_accepted(port: int) -> None:
    classes = [row[1] for row in table("SOP class", "UID")]
    syntaxes = [row[1] for row in table("transfer syntax", "UID")]
    assert len(classes) > 190
    assert len(syntaxes) > 40
    pairs = [(uid, syntax) for uid in classes for syntax in syntaxes]
    pairs += [(uid, syntax) for uid in (VERIFICATION, StorageCommitmentPushModel) for syntax in UNCOMPRESSED]
    assert results(port, pairs) == [(0, syntax) for _, syntax in pairs]


def test_what_is_not_claimed_is_refused_by_its_number(port: int) -> None:
    claimed = {row[1] for row in table("SOP class", "UID")}
    others = ["1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.31", "1.2.840.10008.3.1.2.3.3", "1.2.3.4"]
    assert not claimed & set(others)
    assert [result for result, _ in results(port, [(uid, EXPLICIT) for uid in others])] == [3] * len(others)
    unknown = [(CT, "1.2.3.4"), (CT, "1.2.840.10008.1.2.6.1"), (VERIFICATION, "1.2.840.10008.1.2.4.50")]
    assert [result for result, _ in results(port, unknown)] == [4] * len(unknown)


def test_the_first_claimed_transfer_syntax_of_several_is_taken(port: int) -> None:
    syntaxes = [row[1] for row in table("transfer syntax", "UID")]
    with Caller(port) as one:
        body = one.associate([(1, CT, syntaxes[::-1])])
        assert caller.item(0x40, syntaxes[0].encode()) in body


def test_every_claimed_status_of_a_c_store_is_provoked(
    spool: Spool, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = phantom_study("chest-ct", 0, seed=1, slices=1)[0]
    uid, data = str(item.SOPInstanceUID), encoded(item)
    item.PatientComments = "other bytes"
    other = encoded(item)
    item.PixelData = bytes(len(item.PixelData))
    pixels = encoded(item)
    item.SOPInstanceUID = "1.2.3.9"
    late = encoded(item)

    def failing(*_: object) -> None:
        raise StateError("The index failed.")

    with Caller(port) as one:
        one.associate()

        def patched(target: object, name: str, value: object, send: Callable[[], int]) -> int:
            with monkeypatch.context() as patch:
                patch.setattr(target, name, value)
                return send()

        provoked = {
            "stored": caller.send(one, uid, data),
            "duplicate": caller.send(one, uid, data),
            "conflict": caller.send(one, uid, other),
            "identity_conflict": caller.send(one, uid, pixels),
            "no_room": patched(spool_module, "_FREE_RESERVE_BYTES", 1 << 60, lambda: caller.send(one, "1.2.3.9", late)),
            "mismatch": caller.send(one, "1.2.3.4", data),
            "cut": caller.send(one, uid, data[:-3]),
            "bad_uid": caller.send(one, "1..2", data),
            "fault": patched(Index, "add", failing, lambda: caller.send(one, "1.2.3.9", late)),
        }
        one.say(caller.pdu(DATA, caller.value(1, 3, caller.command(field=0x0020, id=1, class_=CT, data=0x0101))))
        assert f"get {one.status():04X} (Unrecognized" in TEXT
        assert caller.send(one, "1.2.3.9", late) == 0
    assert {name: f"{status:04X}" for name, status in provoked.items()} == {
        name: status for name, status, _ in table("outcome", "status", "meaning")
    }
    counts = spool.counts()
    assert (counts["conflict"] if "conflict" in counts else counts["in_conflict"]) >= 2
    assert counts["identity_conflicts"] == 1


def test_every_claimed_rejection_is_provoked(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    door = make_door(spool, allow=(Peer("MODALITY", "127.0.0.1", associations=1),))

    def rejection(**said: int | bytes) -> tuple[int, ...]:
        with Caller(door.port) as one:
            one.say(caller.request(**said))  # type: ignore[arg-type]
            kind, body = one.hear()
            assert kind == RJ
            return tuple(body[1:4])

    try:
        found = {rejection(called=b"X"), rejection(calling=b"X"), rejection(application=b"1.2"), rejection(version=2)}
        with Caller(door.port) as one:
            one.associate()
            found.add(rejection())
        spool._limit_bytes = 0
        found.add(rejection())
    finally:
        door.stop()
        spool.close()
    claimed = {tuple(int(cell) for cell in row[:3]) for row in table("result", "source", "reason", "meaning")}
    assert found == claimed


def test_every_claimed_status_and_reason_of_a_commitment_is_provoked(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = phantom_study("chest-ct", 0, seed=1, slices=1)[0]
    with Caller(port) as one:
        one.associate()
        assert caller.send(one, str(item.SOPInstanceUID), encoded(item)) == 0
    reported: list[Dataset] = []
    association = associate(port, [(str(StorageCommitmentPushModel), EXPLICIT)])

    def ask(*references: tuple[str, str], action: int = 1, instance: str = WELL_KNOWN_INSTANCE) -> int:
        asked = Dataset()
        asked.TransactionUID = f"1.2.3.{len(reported) + 1}"
        asked.ReferencedSOPSequence = []
        for sop_class, uid in references:
            one = Dataset()
            one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = sop_class, uid
            asked.ReferencedSOPSequence.append(one)
        status, _ = association.send_n_action(asked, action, StorageCommitmentPushModel, instance)
        return int(status.Status)

    held = (CT, str(item.SOPInstanceUID))
    statuses = {ask(held), ask(held, action=2), ask(held, instance="1.2.3"), ask()}
    with monkeypatch.context() as patch:
        patch.setattr(Index, "promise", _broken)
        statuses.add(ask(held))
    association.release()
    assert {f"{one:04X}" for one in statuses} == {row[0] for row in table("N-ACTION status", "meaning")}

    report = judge(
        Asked("1.2", ((CT, "1.2.3.4"), ("1.2.840.10008.5.1.4.1.1.4", held[1]))), lambda uid: [CT] * (uid == held[1])
    )
    assert {f"{reason:04X}" for _, _, reason in report.failed} == {row[0] for row in table("failure reason", "meaning")}


def _broken(*_: object) -> None:
    raise StateError("The index failed.")


def test_the_claimed_identity_and_limits_are_announced(port: int) -> None:
    claimed = {row[0]: row[1] for row in table("item", "value")}
    with Caller(port) as one:
        body = one.associate(user=caller.item(0x53, b"\0\5\0\5"))
    assert caller.item(0x52, claimed["implementation class UID"].encode()) in body
    assert caller.item(0x55, claimed["implementation version name"].encode()) in body
    longest = int(claimed["maximum length received"].split()[0])
    assert caller.item(0x51, longest.to_bytes(4, "big")) in body
    assert caller.item(0x53, b"\0\1\0\1") in body


def _certificate(folder: Path, kind: str) -> tuple[Path, Path]:
    """A certificate of its own authority, with an RSA or an elliptic key."""
    key = rsa.generate_private_key(65537, 2048) if kind == "RSA" else ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "door")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, key_file = folder / f"{kind}.pem", folder / f"{kind}.key"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, key_file


def _negotiated(server: ssl.SSLContext, suite: str, files: tuple[Path, Path]) -> str:
    """Shakes hands in memory with TLS 1.2 and one suite; returns the suite, or nothing when there was no agreement."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers(suite)
    client.load_cert_chain(*files)
    one, two = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(one, two), server.wrap_bio(two, one, server_side=True)]
    try:
        for _ in range(6):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLError:
        return ""
    return (ends[1].cipher() or ("",))[0]


@pytest.mark.parametrize("profile", ["bcp195", "non-downgrading"])
def test_every_claimed_suite_is_negotiated_and_no_other(tmp_path: Path, profile: str) -> None:
    claimed = {suite for name, suite in table("profile", "suite") if name == profile}
    every = {suite for _, suite in table("profile", "suite")} | {"AES256-GCM-SHA384", "ECDHE-RSA-AES256-SHA384"}
    agreed = set()
    for kind in ("RSA", "ECDSA"):
        files = _certificate(tmp_path, kind)
        server = Tls(*files, files[0], profile).context()  # type: ignore[arg-type]
        agreed |= {suite for suite in every if _negotiated(server, suite, files) == suite}
    assert agreed == claimed
    assert server.minimum_version == ssl.TLSVersion.TLSv1_2
    assert server.verify_mode == ssl.CERT_REQUIRED


def test_no_claim_stands_on_a_name_that_the_dictionary_does_not_have() -> None:
    unnamed = [
        row for row in table("SOP class", "UID") + table("transfer syntax", "UID") if re.match(r"[\d.]+$", row[0])
    ]
    assert unnamed == []
