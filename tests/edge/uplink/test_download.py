"""Downloads over mutual TLS: resumed, verified, and never half under their name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge.uplink import download as download_module
from edge.uplink.desired import Obeyer
from edge.uplink.download import NodePort
from shared.errors import LinkError, TrustError
from shared.wire.records import Desired, JudgeTask, NamedFile, ReleaseOrder, TrainTask
from tests.simulators.https import NodePortServer

DATA = os.urandom(3_000_000)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NodePortServer]:
    made = NodePortServer(tmp_path)
    made.files[f"/blobs/{SHA}"] = DATA
    yield made
    made.close()


@pytest.fixture
def port(server: NodePortServer) -> Iterator[NodePort]:
    made = NodePort(
        server.url,
        ca=server.authority.ca,
        certificate=server.node.certificate,
        key=server.node.key_file,
    )
    yield made
    made.close()


def test_whole_and_once(server: NodePortServer, port: NodePort, tmp_path: Path) -> None:
    target = tmp_path / "blobs" / SHA
    for _ in range(2):
        port.download(f"/blobs/{SHA}", target, SHA, len(DATA))
    assert target.read_bytes() == DATA
    assert [file.name for file in target.parent.iterdir()] == [SHA]
    assert len(server.requests) == 1


def test_a_cut_is_resumed_where_it_was(server: NodePortServer, port: NodePort, tmp_path: Path) -> None:
    target = tmp_path / SHA
    server.cut_after = 2_000_000
    with pytest.raises(LinkError):
        port.download(f"/blobs/{SHA}", target, SHA, len(DATA))
    assert not target.exists()
    have = (tmp_path / f"{SHA}.part").stat().st_size
    assert have > 1_500_000
    port.download(f"/blobs/{SHA}", target, SHA, len(DATA))
    assert target.read_bytes() == DATA
    assert server.requests[1] == (f"/blobs/{SHA}", f"bytes={have}-")
    assert server.served <= len(DATA) + 500_000


def test_a_server_without_range_starts_over(server: NodePortServer, port: NodePort, tmp_path: Path) -> None:
    target = tmp_path / SHA
    (tmp_path / f"{SHA}.part").write_bytes(DATA[:1000])
    server.ignore_range = True
    port.download(f"/blobs/{SHA}", target, SHA, len(DATA))
    assert target.read_bytes() == DATA


def test_killed_before_the_rename(server: NodePortServer, port: NodePort, tmp_path: Path) -> None:
    (tmp_path / f"{SHA}.part").write_bytes(DATA)
    port.download(f"/blobs/{SHA}", tmp_path / SHA, SHA, len(DATA))
    assert (tmp_path / SHA).read_bytes() == DATA
    assert server.requests == []


@pytest.mark.parametrize("begun", [b"", b"something else" * 100])
def test_attack_other_bytes(server: NodePortServer, port: NodePort, tmp_path: Path, begun: bytes) -> None:
    """A changed file, or a part that somebody changed on the disk: refused, removed, and good the next time."""
    if begun:
        (tmp_path / f"{SHA}.part").write_bytes(begun)
    else:
        server.files[f"/blobs/{SHA}"] = DATA[:-1] + bytes([DATA[-1] ^ 1])
    with pytest.raises(TrustError, match="not the file"):
        port.download(f"/blobs/{SHA}", tmp_path / SHA, SHA, len(DATA))
    assert not list(tmp_path.glob(f"{SHA}*"))
    server.files[f"/blobs/{SHA}"] = DATA
    port.download(f"/blobs/{SHA}", tmp_path / SHA, SHA, len(DATA))
    assert (tmp_path / SHA).read_bytes() == DATA


def test_attack_longer_than_named(server: NodePortServer, port: NodePort, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="longer"):
        port.download(f"/blobs/{SHA}", tmp_path / SHA, SHA, 1000)
    assert sum(file.stat().st_size for file in tmp_path.glob(f"{SHA}*")) == 0


def test_attack_a_length_no_disk_holds(server: NodePortServer, port: NodePort, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="limit"):
        port.download(f"/blobs/{SHA}", tmp_path / SHA, SHA, download_module.LENGTH_LIMIT_BYTES + 1)
    assert server.requests == []


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_errors_are_the_links(server: NodePortServer, port: NodePort, tmp_path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(LinkError, match=str(status)):
        port.download(f"/blobs/{SHA}", tmp_path / SHA, SHA, len(DATA))
    assert not list(tmp_path.glob(f"{SHA}*"))


def test_get(server: NodePortServer, port: NodePort) -> None:
    server.files["/tuf/release/root.json"] = b"{}"
    assert port.get("/tuf/release/root.json", 2) == b"{}"
    assert port.get("/tuf/release/9.root.json", 2) is None
    with pytest.raises(TrustError, match="longer"):
        port.get("/tuf/release/root.json", 1)


def test_attack_no_certificate_of_the_fleet(server: NodePortServer, tmp_path: Path) -> None:
    from tests.simulators.pki import TestAuthority

    stranger = TestAuthority(tmp_path / "other").node("hosp-a", "n1")
    port = NodePort(server.url, ca=server.authority.ca, certificate=stranger.certificate, key=stranger.key_file)
    with pytest.raises(LinkError):
        port.get(f"/blobs/{SHA}", len(DATA))
    port.close()


# -- obeying


def train(round_id: str = "r1") -> TrainTask:
    weights = NamedFile("weights", SHA, len(DATA))
    return TrainTask(round_id, 1, "ab" * 32, weights, ["head"], 1, 0.1, 8, 7, 0.1, 1.0, "2026-01-01")


def wanted(serial: int, task: TrainTask | JudgeTask | None, order: ReleaseOrder | None = None) -> Desired:
    return Desired("n1", "hosp-a", serial, "2026-01-01T00:00:00+00:00", task, order)


@pytest.fixture
def orders() -> list[ReleaseOrder | None]:
    return []


@pytest.fixture
def obeyer(port: NodePort, tmp_path: Path, orders: list[ReleaseOrder | None]) -> Obeyer:
    def order_step(order: ReleaseOrder | None) -> bool:
        orders.append(order)
        return len(orders) % 3 != 0

    return Obeyer(tmp_path / "learning", port, order_step, wait=lambda _ceiling: 0.0)


def test_a_task_is_named_only_when_its_files_are_there(server: NodePortServer, obeyer: Obeyer, tmp_path: Path) -> None:
    task = tmp_path / "learning" / "task.json"
    server.cut_after = 1000
    with pytest.raises(LinkError):
        obeyer.step(wanted(1, train()))
    assert not task.exists()
    obeyer.step(wanted(1, train()))
    assert msgspec.json.decode(task.read_bytes(), type=TrainTask) == train()
    assert (tmp_path / "learning" / "blobs" / SHA).read_bytes() == DATA
    before = task.stat().st_mtime_ns
    obeyer.step(wanted(2, train()))
    assert task.stat().st_mtime_ns == before
    obeyer.step(wanted(3, None))
    assert not task.exists()


def test_blobs_of_older_tasks_are_removed(server: NodePortServer, obeyer: Obeyer, tmp_path: Path) -> None:
    obeyer.step(wanted(1, train()))
    other = os.urandom(1000)
    sha = hashlib.sha256(other).hexdigest()
    server.files[f"/blobs/{sha}"] = other
    file = NamedFile("m", sha, len(other))
    obeyer.step(wanted(2, JudgeTask("r1", "ab" * 32, "cd" * 32, file, file, "cpu-u8s8", "2026-01-01")))
    assert [blob.name for blob in (tmp_path / "learning" / "blobs").iterdir()] == [sha]


def test_attack_a_task_whose_file_is_another(server: NodePortServer, obeyer: Obeyer, tmp_path: Path) -> None:
    server.files[f"/blobs/{SHA}"] = bytes(len(DATA))
    for _ in range(3):
        obeyer.step(wanted(1, train()))
    assert not (tmp_path / "learning" / "task.json").exists()
    assert len(server.requests) == 1  # not tried for ever
    server.files[f"/blobs/{SHA}"] = DATA
    obeyer.step(wanted(2, train()))
    assert (tmp_path / "learning" / "task.json").exists()


def test_an_order_is_followed_step_by_step(obeyer: Obeyer, orders: list[ReleaseOrder | None]) -> None:
    order = ReleaseOrder(3, "ab" * 32)
    obeyer.step(wanted(1, None, order))
    assert orders == [order] * 3
