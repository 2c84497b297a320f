"""One node's clinical half: door, pipeline and sender over the shipped package; in this process, or as a child.

python -m tests.simulators.node door STATE            listens until killed, prints its port
python -m tests.simulators.node pipeline STATE PORT   answers and delivers to the PACS on PORT until killed
"""

from __future__ import annotations

import random
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edge.forward.routes import Routes
from edge.imaging.reading import Reader, read_object
from edge.inference.engine import OnnxEngine, load_engine
from edge.intake.door import Door
from edge.intake.peers import AllowList, Peer
from edge.intake.spool import Spool
from edge.pipeline import Pipeline
from edge.results.cases import CaseStore, Enqueue
from edge.results.documents import Builder
from edge.results.sender import Pacs, Sender
from edge.results.series import Rules
from edge.results.store import Store
from shared.clock import Clock, SystemClock
from shared.files import sha256_file
from shared.package.manifest import Manifest, verify_package

BASELINE = Path(__file__).parents[2] / "models" / "baseline"
SITE_KEY = b"a site's secret, thirty-two byte"
SPOOL_LIMIT_BYTES = 2_000_000_000


@cache
def baseline() -> tuple[OnnxEngine, Manifest, str]:
    """Returns the shipped package, loaded."""
    digest = sha256_file(BASELINE / "manifest.json")
    manifest = verify_package(BASELINE, digest)
    return load_engine(BASELINE, manifest, threads=2, variant="cpu-u8s8"), manifest, digest


class OneModel:
    """A node that never gets another model; it remembers what it was shown."""

    def __init__(self) -> None:
        self.served = baseline()
        self.observed: list[tuple[str, int]] = []

    def serving(self) -> tuple[OnnxEngine, Manifest, str]:
        return self.served

    def step(self) -> bool:
        return False

    def observe(self, images: np.ndarray, head: str, logits: np.ndarray) -> None:
        self.observed.append((head, len(images)))
        assert images.dtype == np.uint8
        assert logits.shape == (len(images), sum(len(h.classes) for h in self.served[1].heads))

    def failed(self, reason: str) -> bool:
        return False


def make_spool(state: Path, clock: Clock | None = None, **limits: int) -> Spool:
    return Spool(
        state / "spool",
        state / "intake.sqlite",
        **{"limit_bytes": SPOOL_LIMIT_BYTES, **limits},
        clock=clock or SystemClock(),
    )


def make_door(
    spool: Spool,
    *,
    allow: tuple[Peer, ...] = (Peer("MODALITY", "127.0.0.1"),),
    clock: Clock | None = None,
    **more: Any,
) -> Door:
    door = Door(
        spool,
        ae_title="RADFLEET",
        host="127.0.0.1",
        port=0,
        allow=AllowList(allow),
        nudge=lambda: None,
        clock=clock or SystemClock(),
        **more,
    )
    door.start()
    return door


def make_pipeline(
    state: Path,
    *,
    clock: Clock | None = None,
    enqueue: Enqueue | None = None,
    models: OneModel | None = None,
    quiet_s: float = 0.5,
    builder: Builder | None = None,
    routes: Routes | None = None,
    reader: Reader | None = None,
) -> Pipeline:
    return Pipeline(
        Store(state / "results.sqlite", state / "intake.sqlite"),
        state / "spool",
        models or OneModel(),
        cases=CaseStore(state / "cases" / "cases.sqlite"),
        labels=state / "labels.sqlite",
        site_key=SITE_KEY,
        rules=Rules(quiet_s=quiet_s, hard_limit_s=60),
        keep_s=14 * 86400,
        pacs=False,
        enqueue=enqueue,
        delivered=lambda: None,
        clock=clock or SystemClock(),
        readers=[reader.read if reader else read_object],
        builder=builder,
        routes=routes,
    )


def make_sender(state: Path, port: int, *, clock: Clock | None = None) -> Sender:
    return Sender(
        state / "results.sqlite",
        Pacs("PACS", "127.0.0.1", port),
        ae_title="RADFLEET",
        clock=clock or SystemClock(),
        random_unit=random.random,
    )


def run_until_idle(pipeline: Pipeline, *, seconds: float = 30.0) -> int:
    """Steps until there is nothing to do; returns how many steps did something."""
    end, steps = time.monotonic() + seconds, 0
    while pipeline.step():
        steps += 1
        assert time.monotonic() < end, "the pipeline does not come to rest"
    return steps


def main() -> None:
    role, state = sys.argv[1], Path(sys.argv[2])
    if role == "door":
        door = make_door(make_spool(state))
        print(door.port, flush=True)  # noqa: T201
        while True:
            time.sleep(1)
    sender = make_sender(state, int(sys.argv[3]))
    sender.start()
    pipeline = make_pipeline(state, builder=Builder(), reader=Reader())
    while True:
        if not pipeline.step():
            time.sleep(0.01)


if __name__ == "__main__":
    main()
