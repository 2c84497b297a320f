"""The trainer process: claims one job at a time, keeps its lease while it works, records the output."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

from cloud.training import jobs
from shared.clock import Clock
from shared.errors import LinkError, RadfleetError
from shared.log import get_logger

Work = Callable[[str, dict[str, Any]], dict[str, Any]]  # kind, input to output: Workshop.do


@dataclass(frozen=True)
class Trainer:
    """Does jobs of `engine`'s queue. Killed at any instruction, the next trainer does the same job again."""

    engine: Engine
    work: Work
    clock: Clock
    holder: str  # unique to this process

    def step(self) -> bool:
        """Does one job; False when there is none."""
        with self.engine.begin() as conn:
            job = jobs.claim(conn, self.holder, self.clock.now())
        if job is None:
            return False
        began = self.clock.monotonic()
        try:
            with self._kept(job):
                output = self.work(job.kind, job.input)
        except LinkError:
            raise  # the store or the database is away: the lease lapses and the job is done later
        except RadfleetError as exc:
            get_logger().error("training.failed", job=job.key, reason=str(exc))
            with self.engine.begin() as conn:
                jobs.fail(conn, job, str(exc))
            return True
        with self.engine.begin() as conn:
            recorded = jobs.finish(conn, job, output)
        seconds = round(self.clock.monotonic() - began, 2)
        get_logger().info("training.done", job=job.key, seconds=seconds, recorded=recorded)
        return True

    @contextmanager
    def _kept(self, job: jobs.Job) -> Iterator[None]:
        """Extends the job's lease from a thread of its own, because the work itself may take minutes."""
        over = threading.Event()

        def keep() -> None:
            while not over.wait(jobs.LEASE_S / 3):
                with self.engine.begin() as conn:
                    if not jobs.extend(conn, job, self.clock.now()):
                        return

        keeper = threading.Thread(target=keep, name=f"lease {job.key}", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()
