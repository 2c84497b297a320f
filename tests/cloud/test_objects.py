"""The object store, over every kind of store that needs no other machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud.objects import Objects
from shared.errors import StateError, TrustError
from shared.files import sha256_hex


class TestObjects:
    @pytest.fixture(params=["folder", "memory"])
    def objects(self, request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
        return Objects(str(tmp_path / "o") if request.param == "folder" else f"memory://{tmp_path.name}")

    def test_named_by_its_digest(self, objects: Objects) -> None:
        digest = objects.put(b"some bytes")
        assert digest == sha256_hex(b"some bytes") == objects.put(b"some bytes")
        assert objects.has(digest)
        assert objects.length(digest) == 10
        assert objects.read(digest) == b"some bytes"
        with objects.open(digest) as file:
            file.seek(5)
            assert file.read(3) == b"byt"

    def test_absent(self, objects: Objects) -> None:
        assert not objects.has("0" * 64)
        for ask in (objects.read, objects.length, objects.open):
            with pytest.raises(StateError):
                ask("0" * 64)

    @pytest.mark.parametrize("name", ["", "../../etc/passwd", "0" * 63, "G" * 64, "A" * 64])
    def test_attack_names(self, objects: Objects, name: str) -> None:
        with pytest.raises(StateError):
            objects.has(name)


def test_attack_changed_in_the_folder(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    digest = objects.put(b"bytes")
    path = objects.path(digest)
    assert path is not None
    path.write_bytes(b"other")
    with pytest.raises(TrustError):
        objects.read(digest)
