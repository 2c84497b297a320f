"""A search over a large index: in order, page by page, and never all of it in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge.intake.index import Index
from edge.web.dicomweb.query import parse
from edge.web.dicomweb.retention import Retention, Uids
from edge.web.dicomweb.search import Found, Headers, search


def _add(index: Index, numbers: Sequence[int], *, bytes_: str = "", state: str = "kept") -> None:
    row = {
        "offset": 0,
        "length": 10,
        "sop_class": "1.2",
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
        "state": state,
    }
    index.add(
        [
            row
            | {
                "digest": f"{bytes_}{n:060d}",
                "file": f"{bytes_}{n}.dcm",
                "study": f"1.1.{n // 500}",
                "series": f"1.2.{n // 100}",
                "sop_instance": f"1.3.{n}",
            }
            for n in numbers
        ]
    )


def _ask(state: Path, *parameters: tuple[str, str]) -> tuple[list[str], bool]:
    retention = Retention(state / "intake.sqlite", state)
    found: Found = search(retention, Headers(retention), parse("instances", parameters), Uids(), "http://x")
    return [one["00080018"]["Value"][0] for one in found.results], found.more


@pytest.mark.parametrize("key", [(), (("SOPClassUID", "1.*"),), (("ModalitiesInStudy", "CT"),)])
def test_pages_of_instances_are_parts_of_one_order(tmp_path: Path, key: tuple[tuple[str, str], ...]) -> None:
    index = Index(tmp_path / "intake.sqlite")
    _add(index, range(1200))
    _add(index, [3], bytes_="other")  # other bytes under a UID: the newer ones are shown, where they came
    _add(index, [4], bytes_="away", state="evicted")
    everything = [f"1.3.{n}" for n in range(1200) if n != 3] + ["1.3.3"]
    for offset, limit in (
        (0, 5),
        (2, 3),
        (495, 10),
        (1190, 10),
        (1190, 9),
        (1195, 20),
        (100, 1050),
        (2000, 5),
        (0, 1300),
    ):
        found, more = _ask(tmp_path, *key, ("offset", str(offset)), ("limit", str(limit)))
        assert found == everything[offset : offset + limit]
        assert more == (offset + limit < 1200)
    index.close()


def test_a_small_page_of_a_large_index_takes_little_memory(tmp_path: Path) -> None:
    index = Index(tmp_path / "intake.sqlite")
    _add(index, range(20_000))
    index.close()
    tracemalloc.start()
    try:
        assert _ask(tmp_path, ("limit", "1"), ("offset", "15000")) == (["1.3.15000"], True)
        assert _ask(tmp_path, ("limit", "1"), ("SOPClassUID", "1.*")) == (["1.3.0"], True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000
