"""Attacks on the worker by somebody who can reach the broker. Each ends with what is still true on disk."""

from __future__ import annotations

import hashlib
import os
import struct

import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import update

from cloud.access.tables import devices
from cloud.ingest.replay import WINDOW
from shared.wire import envelope, topics
from shared.wire.chunks import Whole, pack, whole_of
from shared.wire.envelope import SealPrivate
from shared.wire.stages import STAGES, encode
from tests.cloud.ingest.conftest import Bench, Node, bench, node, redis_server
from tests.simulators.wire import features, update_of

__all__ = ["bench", "node", "redis_server"]

REFUSED = {
    "messages": 0, "effects": 0, "refusals": 1, "transfers": 0, "chunks": 0, "audit": 1, "objects": 0,
}  # fmt: skip


def assert_refused(bench: Bench, node: Node, message: tuple[str, bytes], why: str) -> None:
    receipt = bench.verdict(node, message)
    assert (receipt.id, receipt.verdict) == (message[0], "refused")
    assert why in receipt.reason
    assert bench.true_on_disk() == REFUSED
    again = bench.verdict(node, message)
    assert (again.verdict, bench.true_on_disk()) == ("refused", REFUSED)  # counted, not examined or audited again
    assert bench.one("SELECT times FROM refusals") == 2


def test_attack_forged_signature(bench: Bench, node: Node) -> None:
    message = node.message(features(1), device=Ed25519PrivateKey.generate())
    assert_refused(bench, node, message, "signature")


def test_attack_header_names_another_node(bench: Bench, node: Node) -> None:
    bench.node("hosp-b")
    assert_refused(bench, node, node.message(features(1), site="hosp-b"), "Names differ")


def test_attack_another_nodes_message_under_my_topic(bench: Bench, node: Node) -> None:
    other = bench.node("hosp-b")
    message = other.message(features(1))
    assert_refused(bench, node, message, "Names differ")
    assert bench.verdict(other, message).verdict == "accepted"  # its own delivery is not harmed


def test_attack_wrong_recipient_key(bench: Bench, node: Node) -> None:
    message = node.message(features(1), recipient=SealPrivate.generate().public)
    assert_refused(bench, node, message, "not ours")


def test_attack_unknown_device(bench: Bench) -> None:
    stranger = bench.node("hosp-z", enrolled=False)
    assert_refused(bench, stranger, stranger.message(features(1)), "not enrolled")


def test_attack_revoked_device(bench: Bench) -> None:
    revoked = bench.node("hosp-r", revoked=True)
    assert_refused(bench, revoked, revoked.message(features(1)), "revoked")


def test_attack_key_revoked_after_a_good_message(bench: Bench, node: Node) -> None:
    assert bench.verdict(node, node.message(features(1))).verdict == "accepted"
    with bench.engine.begin() as conn:
        conn.execute(update(devices).values(revoked=True))
    assert bench.verdict(node, node.message(features(2))).verdict == "refused"
    assert bench.one("SELECT count(*) FROM effects") == 1


def test_attack_replay_under_another_id_and_chunking(bench: Bench, node: Node) -> None:
    message = node.message(features(1))
    assert bench.verdict(node, message).verdict == "accepted"
    receipt = bench.verdict(node, ("ee" * 16, message[1]))
    assert (receipt.id, receipt.verdict) == (message[0], "duplicate")
    assert bench.one("SELECT count(*) FROM effects") == 1


def test_attack_sequence_used_twice(bench: Bench, node: Node) -> None:
    assert bench.verdict(node, node.message(features(1), sequence=9)).verdict == "accepted"
    receipt = bench.verdict(node, node.message(features(2), sequence=9))
    assert (receipt.verdict, "used before" in receipt.reason) == ("refused", True)
    assert bench.one("SELECT count(*) FROM effects") == 1
    fresh = node.message(features(3), sequence=9, incarnation="i2")  # set up anew, its numbers begin anew
    assert bench.verdict(node, fresh).verdict == "accepted"


def test_attack_replay_from_before_the_window(bench: Bench, node: Node) -> None:
    assert bench.verdict(node, node.message(features(1), sequence=WINDOW + 10)).verdict == "accepted"
    receipt = bench.verdict(node, node.message(features(2), sequence=10))
    assert (receipt.verdict, "replay window" in receipt.reason) == ("refused", True)
    assert bench.one("SELECT count(*) FROM effects") == 1


def test_attack_stage_swapped(bench: Bench, node: Node) -> None:
    """A good features message under the topic `update`, which has other limits and another handler."""
    message = node.message(features(1))
    bench.send(node.identity, message, "update")
    (receipt,) = bench.receipts()
    assert (receipt.verdict, bench.true_on_disk()) == ("refused", REFUSED)


def test_attack_zstd_bomb(bench: Bench, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(STAGES["features"].plain_limit + 1))

    class Bomber:
        def __init__(self, level: int) -> None: ...

        def compress(self, _record: bytes) -> bytes:
            return bomb

    with monkeypatch.context() as patch:
        patch.setattr(envelope.zstandard, "ZstdCompressor", Bomber)
        message = node.message(b"")
    assert_refused(bench, node, message, "decompressed")


def test_attack_not_a_record(bench: Bench, node: Node) -> None:
    assert_refused(bench, node, node.message(b"\xa4\xff\xff\xff\xff"), "not a FeatureBatch")


def test_attack_record_of_another_stage(bench: Bench, node: Node) -> None:
    assert_refused(bench, node, node.message(encode(update_of(b"x"))), "not a FeatureBatch")


def test_attack_chunk_with_a_false_digest(bench: Bench, node: Node) -> None:
    message_id, sealed = node.message(features(1))
    false = Whole(message_id, hashlib.sha256(b"other").digest(), len(sealed))
    bench.up.push(topics.up(node.identity, "features"), pack(false, 0, sealed))
    (receipt,) = bench.receipts()
    assert (receipt.verdict, bench.true_on_disk()) == ("refused", REFUSED)
    assert bench.verdict(node, (message_id, sealed)).verdict == "accepted"  # the true one is another whole


def test_attack_chunks_that_do_not_add_up(bench: Bench, node: Node) -> None:
    message = node.message(update_of(os.urandom(400_000)), "update")
    whole = whole_of(*message)
    for index in range(whole.count):
        bench.up.push(topics.up(node.identity, "update"), pack(whole, index, bytes(whole.length(index))))
    (receipt,) = bench.receipts()
    assert (receipt.verdict, bench.true_on_disk()) == ("refused", REFUSED)
    assert "add up" in receipt.reason


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"RFC1",
        b"RFC1" + bytes(48) + struct.pack(">QII", 2**60, 2**31, 0) + b"x",  # claims an exabyte
        b"RFC1" + bytes(48) + struct.pack(">QII", 10, 1, 0) + b"short",
        os.urandom(1000),
    ],
)
def test_attack_unreadable_chunks(bench: Bench, node: Node, payload: bytes) -> None:
    for _ in range(3):
        bench.up.push(topics.up(node.identity, "update"), payload)
    assert bench.receipts() == []  # nobody can be answered
    assert bench.true_on_disk() == REFUSED
    assert bench.one("SELECT times FROM refusals") == 3
    assert bench.worker.counts["unreadable"] == 3


def test_attack_strange_topics(bench: Bench) -> None:
    for topic in ("radfleet/1/x", "radfleet/1/hosp-a/n1/down/receipt", "a" * 500):
        bench.up.push(topic, b"x")
    assert bench.receipts() == []
    assert bench.worker.counts["unreadable"] == 3
    assert bench.true_on_disk() == REFUSED  # the one that names a node
