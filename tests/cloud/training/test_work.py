"""The trainer's jobs on the shipped baseline: refit, average, build; and what a package must survive on its way."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load
from sqlalchemy import insert, select

from cloud.objects import Objects
from cloud.rounds.machine import Built, Plan, Weights
from cloud.rounds.tables import campaigns, features, rounds, updates
from cloud.store import open_engine, upgrade
from cloud.training.packages import fetch_package, store_package
from cloud.training.refit import balanced, refit
from cloud.training.work import Workshop
from models.package import BASELINE, look
from models.reference import reference_set
from shared.clock import SystemClock
from shared.errors import StateError, TrustError
from shared.files import sha256_file
from shared.package.manifest import MANIFEST_NAME, decode_manifest
from shared.update.codec import encode
from shared.update.layout import Entry, Layout

CHAMPION = sha256_file(BASELINE / MANIFEST_NAME)
NOW = datetime(2026, 11, 22, tzinfo=UTC)
PLAN = Plan()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("cloud")
    url = f"sqlite:///{folder}/cloud.sqlite"
    upgrade(url)
    work = folder / "work"
    work.mkdir()
    made = Workshop(open_engine(url), Objects(str(folder / "objects")), work, SystemClock(), lambda: 7)
    store_package(made.objects, BASELINE, CHAMPION)
    made._reference = reference_set(0, 60)  # the whole one takes three times as long
    with made.engine.begin() as conn:
        row = {"id": "k", "state": "training", "champion": CHAMPION, "nodes": [], "plan": {}, "number": 1}
        conn.execute(insert(campaigns).values(**row, body={}, started_at=NOW, since=NOW))
    yield made
    made.engine.dispose()


def given(**more: object) -> dict:
    return msgspec.to_builtins({"champion": CHAMPION, "round": "k-1", "plan": PLAN, **more})


def send_features(shop: Workshop, *, held_out: bool, shift: float = 0.0) -> None:
    """A hospital's confirmed chest X-rays, as embeddings of the champion."""
    manifest = decode_manifest((BASELINE / MANIFEST_NAME).read_bytes())
    seen = look(BASELINE / manifest.variant(PLAN.variant).file, shop.reference())
    mine = np.flatnonzero(seen.cases.heads == 0)
    with shop.engine.begin() as conn:
        for i in mine:
            data = (seen.features[i] + shift).astype("<f2").tobytes()
            key = {"site": "a", "case": f"{i + 1000 * held_out:032x}", "package": CHAMPION, "variant": PLAN.variant}
            conn.execute(
                insert(features).values(
                    **key, head="chest-xray", label=int(seen.cases.labels[i]), held_out=held_out, data=data,
                    received_at=NOW,
                )
            )  # fmt: skip


def test_a_round_on_the_baseline(shop: Workshop) -> None:
    champion = {n: np.asarray(v, np.float32) for n, v in load((BASELINE / "weights.safetensors").read_bytes()).items()}
    # held-out rows alone teach nothing: the cloud may not train on them
    send_features(shop, held_out=True)
    first = msgspec.convert(shop.do("refit", given()), Weights)
    kept = load(shop.objects.read(first.file.sha256))
    assert all(np.array_equal(np.asarray(kept[name], np.float32), champion[name]) for name in champion)

    send_features(shop, held_out=False, shift=0.1)
    second = msgspec.convert(shop.do("refit", given()), Weights)
    refitted = load(shop.objects.read(second.file.sha256))
    changed = {n for n in champion if not np.array_equal(np.asarray(refitted[n], np.float32), champion[n])}
    assert changed == {"head.weight", "head.bias"}
    assert np.array_equal(refitted["head.weight"][3:], champion["head.weight"][3:])  # the other heads' rows
    assert refitted["stem.weight"].dtype == np.float16  # what nobody trains travels in half precision
    assert shop.do("refit", given()) == msgspec.to_builtins(second)  # done twice, the same

    layout = Layout(tuple(Entry(n, tuple(s)) for n, s in second.layout))
    rng = np.random.default_rng(0)
    delta = {e.name: (rng.normal(size=e.shape) * 1e-3).astype(np.float32) for e in layout.entries}
    coded = encode(delta, None, 0.2, rng)
    with shop.engine.begin() as conn:
        row = {"id": "k-1", "campaign": "k", "number": 1, "base": second.file.sha256, "layout": [], "max_norm": 9}
        conn.execute(insert(rounds).values(**row, collecting=False, opened_at=NOW))
        for site, cases, late in (("a", 10, False), ("b", 0, False), ("c", 10, True)):
            conn.execute(
                insert(updates).values(
                    round="k-1", site=site, node="n1", cases=cases, norm=1.0 if cases else 0.0, loss_before=1,
                    loss_after=1, blob=shop.objects.put(coded.blob) if cases else None, length=1, late=late,
                    received_at=NOW,
                )
            )  # fmt: skip
    third = msgspec.convert(shop.do("aggregate", given(weights=second)), Weights)
    averaged = load(shop.objects.read(third.file.sha256))
    for name, sent in coded.sent.items():
        np.testing.assert_allclose(averaged[name], np.asarray(refitted[name], np.float32) + sent, atol=1e-6)
    with shop.engine.connect() as conn:
        record = conn.execute(select(rounds.c.average)).scalar()
    assert [(p["site"], p["weight"]) for p in record["parts"]] == [("a", 10), ("b", 0)]

    built = msgspec.convert(shop.do("build", given(weights=third)), Built)
    folder = fetch_package(shop.objects, built.candidate, shop.work / "candidates")
    manifest = decode_manifest((folder / MANIFEST_NAME).read_bytes())
    assert manifest.release == 7
    assert manifest.provenance["champion"] == CHAMPION
    assert [row.head for row in built.reference] == ["chest-xray", "chest-ct", "brain-mri"]
    assert all(abs(row.auc_candidate - row.auc_champion) < 0.1 for row in built.reference)
    assert built.model.sha256 == sha256_file(folder / built.model.name)


def test_a_package_changed_in_the_store_is_refused(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path / "objects"))
    manifest = store_package(objects, BASELINE, CHAMPION)
    path = objects.path(manifest.file("weights.safetensors").sha256)
    assert path is not None
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(TrustError, match="changed in the store"):
        fetch_package(objects, CHAMPION, tmp_path / "packages")
    with pytest.raises(StateError, match="not in the store"):
        fetch_package(objects, "0" * 64, tmp_path / "packages")


class TestRefit:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    features = (np.eye(3, 16)[labels] * 2 + rng.normal(size=(90, 16))).astype(np.float32)
    head = (rng.normal(size=(3, 16)).astype(np.float32) * 0.1, np.zeros(3, np.float32))

    def fit(self, pull: float) -> tuple[np.ndarray, np.ndarray]:
        rows = balanced(self.features, self.labels, ["a"] * 90)
        return refit(*self.head, rows, pull=pull)

    def test_learns(self) -> None:
        weight, bias = self.fit(0.01)
        right = (self.features @ weight.T + bias).argmax(1) == self.labels
        assert right.mean() > 0.85

    def test_a_strong_pull_keeps_the_head(self) -> None:
        weight, _ = self.fit(1e6)
        np.testing.assert_allclose(weight, self.head[0], atol=1e-3)

    def test_a_small_hospital_is_heard_beside_a_large_one(self) -> None:
        rows = balanced(np.zeros((110, 2), np.float32), np.array([0, 1] * 55), ["big"] * 100 + ["small"] * 10)
        share = rows.weights[100:].sum()
        assert share == pytest.approx(np.sqrt(10) / (np.sqrt(10) + np.sqrt(100)), rel=1e-5)
