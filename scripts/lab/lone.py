"""A node that nobody enrolled: door, pipeline and page, without cloud and PACS."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.lab.child import Child, descendants, free_port, listens, wait_until
from scripts.lab.fleet import BIN, Page, run


@dataclass
class LoneNode:
    """Its DICOM port, its signed-in page, and its processes."""

    folder: Path
    dicom_port: int
    page: Page
    children: list[Child]

    def process_ids(self) -> list[int]:
        """Returns the ids of the processes that live, each before those it started."""
        return [pid for child in self.children if child.alive() for pid in (child.pid, *descendants(child.pid))]

    def answers(self, studies: set[str], *, seconds: float = 120) -> list[dict[str, Any]]:
        """Returns the worklist rows of the studies, waiting until every one is answered."""
        rows: list[dict[str, Any]] = []

        def all_there() -> bool:
            rows[:] = [row for row in self.page.get("/api/worklist") if row["study"] in studies]
            return len(rows) == len(studies)

        wait_until("answers", all_there, seconds=seconds, every=0.1)
        return rows


@contextmanager
def lone_node(folder: Path) -> Iterator[LoneNode]:
    """Runs the node below `folder` until the block ends."""
    dicom_port, web_port = free_port(), free_port()
    config = folder / "edge.toml"
    config.write_text(
        f'[dicom]\nhost = "127.0.0.1"\nport = {dicom_port}\nallow = [{{ae_title = "MODALITY"}}]\n'
        f"[web]\nport = {web_port}\n[series]\nquiet_s = 0.5\n"
    )
    link = re.search(r"http\S+/welcome/\S+", run("radfleet-edge", "init", folder))
    assert link
    children: list[Child] = []
    try:
        for name in ("intake", "pipeline", "web"):
            command = [BIN / "radfleet-edge", "run", "--only", name, "--config", config]
            children.append(Child(name, command, log=folder / f"{name}.log"))
        children[0].wait_ready("the door", lambda: listens(dicom_port))
        children[1].wait_ready("the pipeline", (folder / "state" / "run" / "pipeline.json").exists, seconds=60)
        children[2].wait_ready("the page", lambda: listens(web_port), seconds=60)
        yield LoneNode(folder, dicom_port, Page(f"http://127.0.0.1:{web_port}", link[0], "administrator"), children)
    finally:
        for child in children:
            child.stop()
