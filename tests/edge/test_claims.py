"""The pipeline follows intake's index: after the index was named anew, what is known is passed without a wait."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge.intake.index import Index
from edge.results.store import Store

KNOWN = 5000


def _add(index: Index, numbers: Sequence[int], series: str) -> None:
    row = {
        "offset": 0,
        "length": 10,
        "sop_class": "1.2",
        "study": "1.2",
        "series": series,
        "modality": "CT",
        "transfer_syntax": "1.2.840.10008.1.2.1",
        "calling_ae": "A",
        "called_ae": "B",
        "address": "",
        "association": "a",
        "received_at": 0.0,
        "stored_at": 0.0,
        "conflict": 0,
        "fault": "",
        "patient": "",
        "state": "kept",
    }
    index.add([row | {"digest": f"{n:064d}", "file": f"{n}.dcm", "sop_instance": f"1.3.{n}"} for n in numbers])


def _claim_all(store: Store) -> list[str]:
    claimed = []
    while one := store.claim(1.0):
        with store.writing():
            store.finish(one, "slice")
        claimed.append(one.sop_instance)
    return claimed


def test_what_is_known_in_an_index_with_a_new_name_costs_one_claim_and_one_write(tmp_path: Path) -> None:
    index = Index(tmp_path / "intake.sqlite")
    _add(index, range(KNOWN), "1.2.1")
    store = Store(tmp_path / "results.sqlite", tmp_path / "intake.sqlite")
    assert len(_claim_all(store)) == KNOWN
    index.rename()
    _add(index, [KNOWN], "1.2.2")
    written: list[str] = []
    store._db.set_trace_callback(lambda sql: written.append(sql) if sql.startswith("COMMIT") else None)
    found = store.claim(2.0)
    assert found is not None
    assert found.sop_instance == f"1.3.{KNOWN}"
    assert len(written) == 1
    assert store.claim(2.0) is None
    index.rename()  # and nothing new at all
    assert store.claim(2.0) is None
    assert len(written) == 2
    assert store.claim(2.0) is None
    assert len(written) == 2
    store.close()
    index.close()


def test_a_series_is_unread_only_while_something_of_it_is_new(tmp_path: Path) -> None:
    index = Index(tmp_path / "intake.sqlite")
    _add(index, range(1, 1500), "1.2.1")
    store = Store(tmp_path / "results.sqlite", tmp_path / "intake.sqlite")
    _claim_all(store)
    index.rename()
    assert not store.unread("1.2.1")  # the cursor stands at the beginning again
    _add(index, range(1500, 1516), "1.2.2")
    _add(index, [1516], "1.2.1")
    assert store.unread("1.2.1")
    assert store.unread("1.2.2")
    assert len(_claim_all(store)) == 17
    assert not store.unread("1.2.1")
    assert not store.unread("1.2.2")
    store.close()
    index.close()
