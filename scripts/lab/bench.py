"""Measures by name, prints tables, writes JSON. Nothing here is a test: figures depend on the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from scripts.lab import (
    bench_answer,
    bench_burned_in,
    bench_corpora,
    bench_evidence,
    bench_inference,
    bench_intake,
    bench_kill,
    bench_learning,
    bench_reading,
    bench_variants,
)
from scripts.lab.table import Row, machine, show, write_json

BENCHES: dict[str, Callable[[], Sequence[Row]]] = {
    "intake": bench_intake.measure,
    "kill": bench_kill.measure,
    "corpora": bench_corpora.measure,
    "latency": bench_answer.measure_latency,
    "rate": bench_answer.measure_rate,
    "inference": bench_inference.measure,
    "reading": bench_reading.measure,
    "variants": bench_variants.measure,
    "learning": bench_learning.measure,
    "evidence": bench_evidence.measure,
    "burned-in": bench_burned_in.measure,
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Any of {', '.join(BENCHES)}; default: all.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows and the machine to this file.")] = None,
    seeds: Annotated[int, typer.Option(help="How many doors `kill` kills.")] = bench_kill.SEEDS,
) -> None:
    """Measures on this machine and prints each figure beside its peer or limit of the same run."""
    console = Console(highlight=False, width=150)
    unknown = [name for name in names or [] if name not in BENCHES]
    if unknown:
        console.print(f"There is no measurement {', '.join(unknown)}. Cure: choose from {', '.join(BENCHES)}.")
        raise typer.Exit(78)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))
    groups: dict[str, Sequence[Row]] = {}
    for name in names or BENCHES:
        with console.status(f"measuring {name}"):
            groups[name] = bench_kill.measure(seeds) if name == "kill" else BENCHES[name]()
        show(console, name, groups[name])
        if json:
            write_json(json, groups)


if __name__ == "__main__":
    typer.run(main)
