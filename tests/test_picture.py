"""The dependency picture of docs and README, held by a test: who may import whom, and which names are ours."""

from __future__ import annotations

import ast
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("shared", "edge", "cloud", "models")
MAY_IMPORT = {"shared": set(), "models": {"shared"}, "edge": {"shared"}, "cloud": {"shared", "models"}}
NEVER = {
    "shared": {"torch", "paho", "pynetdicom", "onnxruntime"},
    "edge": {"torch"},
    "cloud": {"pynetdicom", "pydicom", "highdicom"},
    "models": set(),
}
# The learning process alone may train, so it alone sees torch and the architectures.
LEARNING = {"models", "torch"}


def imports(path: Path) -> set[str]:
    """Returns the top-level names that a file imports, at any depth of the code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def violations(root: Path, room: str) -> list[str]:
    """Returns `file -> name` for each import that the picture forbids."""
    others = set(ROOMS) | {"scripts", "tests", "deploy"}
    forbidden = (others - MAY_IMPORT[room] - {room}) | NEVER[room]
    found = []
    for path in sorted((root / room).rglob("*.py")):
        allowed = LEARNING if path.is_relative_to(root / "edge" / "learning") else set()
        found += [f"{path.relative_to(root)} -> {name}" for name in sorted(imports(path) & (forbidden - allowed))]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_the_picture_allows(room: str) -> None:
    assert violations(ROOT, room) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("edge/pipeline.py", "import cloud.rounds"),
        ("edge/inference/engine.py", "import torch"),
        ("cloud/rounds/guard.py", "from edge.pipeline import Pipeline"),
        ("shared/clock.py", "from edge import app"),
        ("models/hybrid.py", "import cloud"),
    ],
)
def test_a_broken_picture_is_seen(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"def late():\n    {line}\n")
    assert violations(tmp_path, file.split("/", maxsplit=1)[0]) == [
        f"{file} -> {line.split()[1].split('.', maxsplit=1)[0]}"
    ]


def test_no_pinned_dependency_owns_our_import_names() -> None:
    owners = packages_distributions()
    assert {room: set(owners.get(room, [])) - {"radfleet"} for room in ROOMS} == {room: set() for room in ROOMS}


def test_one_onnxruntime_and_the_exact_torch_are_pinned() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert pins[0] == "torch==2.13.0"
    assert all("==" in pin for pin in pins)
    assert sum(pin.startswith("onnxruntime") for pin in pins) == 1
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    both = [name for name, wants in extras.items() if {"onnxruntime", "onnxruntime-gpu"} <= set(wants)]
    assert both == []
    assert not any(want.startswith("onnxruntime") for want in extras["edge"])
