"""Rows of a measurement: printed as a table, written as JSON, each beside the peer or limit of the same run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One figure. `beside` names the peer or limit measured in the same run, `beside_value` its figure."""

    name: str
    value: float
    unit: str
    beside: str = ""
    beside_value: float | None = None

    @property
    def ratio(self) -> float | None:
        """Returns value / beside_value, or None when there is nothing beside it."""
        return self.value / self.beside_value if self.beside_value else None


def machine() -> dict[str, str]:
    """Returns what the figures were measured on."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
    flags = Path("/proc/cpuinfo").read_text()
    return {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "vnni": str("avx512_vnni" in flags or "avx_vnni" in flags),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def show(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Prints the rows as one table."""
    table = Table(title=title, title_justify="left")
    for heading in ("what", "value", "unit", "beside", "its value", "ratio"):
        table.add_column(heading, justify="right" if heading in {"value", "its value", "ratio"} else "left")
    for row in rows:
        beside = "" if row.beside_value is None else _number(row.beside_value)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.name, _number(row.value), row.unit, row.beside, beside, ratio)
    console.print(table)


def write_json(path: Path, groups: dict[str, Sequence[Row]]) -> None:
    """Writes every row with its ratio, and the machine."""
    rows = {name: [{**asdict(row), "ratio": row.ratio} for row in group] for name, group in groups.items()}
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
