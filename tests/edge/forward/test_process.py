"""The forward process as it really runs: killed in the middle of its queue, and asked by page and command to retry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from scripts.lab.child import Child, free_port, listens, wait_until
from scripts.lab.fleet import BIN, Page, run
from scripts.lab.parts import Orthanc, start_orthanc
from tests.simulators.forwarding import radiographs, receive
from tests.simulators.modality import phantom_study, storescu, write_files

pytestmark = pytest.mark.e2e


def configure(folder: Path, archives: dict[str, Orthanc], rules: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "edge.toml"
    destinations = "".join(
        f'[[destination]]\nname = "{name}"\nae_title = "{one.aet}"\nhost = "127.0.0.1"\nport = {one.dicom_port}\n'
        for name, one in archives.items()
    )
    config.write_text(f'[dicom]\nhost = "127.0.0.1"\nport = 0\n[web]\nport = {free_port()}\n{destinations}{rules}')
    return config


@contextmanager
def process(config: Path, name: str) -> Iterator[Child]:
    command = [BIN / "radfleet-edge", "run", "--only", name, "--config", config]
    child = Child(name, command, log=config.parent / f"{name}.log")
    try:
        yield child
    finally:
        child.stop()


def test_a_process_killed_in_its_queue_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    archives = {"one": start_orthanc(tmp_path / "o1", aet="ONE"), "two": start_orthanc(tmp_path / "o2", aet="TWO")}
    try:
        config = configure(tmp_path / "n", archives, '[[rule]]\naction = "both"\ndestinations = ["one", "two"]\n')
        objects = phantom_study("chest-ct", 0, seed=1, slices=240)
        receive(config.parent / "state", objects)
        one, kills = archives["one"], 0
        with process(config, "forward") as forward:
            while kills < 4:
                seen = one.count()
                wait_until("a few more", lambda seen=seen: one.count() >= min(seen + 20, 240), every=0.005)
                if one.count() == 240:
                    break
                forward.kill()
                kills += 1
                forward.restart()
            assert kills, "it was never killed in the middle"
            for archive in archives.values():
                wait_until("all objects", lambda archive=archive: archive.count() == 240, seconds=120)
            wait_until("empty queues", lambda: sent(config) == {"one": (0, 240, 0), "two": (0, 240, 0)})
        assert {name: archive.count() for name, archive in archives.items()} == {"one": 240, "two": 240}
    finally:
        for archive in archives.values():
            archive.child.stop()


def sent(config: Path) -> dict[str, tuple[int, int, int]]:
    listed = json.loads(run("radfleet-edge", "forward", "list", "--json", "--config", config))
    return {one["name"]: (one["waiting"], one["sent"], one["dead"]) for one in listed["destinations"]}


def test_an_administrator_retries_a_dead_letter_on_the_page(tmp_path: Path) -> None:
    archive = start_orthanc(tmp_path / "o1", aet="ONE")
    config = configure(tmp_path / "n", {"one": archive}, '[[rule]]\naction = "forward"\ndestinations = ["one"]\n')
    link = re.search(r"http\S+/welcome/\S+", run("radfleet-edge", "init", config.parent))
    assert link
    (item,) = radiographs(1)
    receive(config.parent / "state", [item])
    item.ImageComments = "other bytes under the same UID"
    receive(config.parent / "state", [item])
    try:
        with process(config, "web") as web, process(config, "forward"):
            url = link[0].split("/welcome/")[0]
            web.wait_ready("the page", lambda: listens(int(url.rsplit(":", 1)[1])), seconds=60)
            page = Page(url, link[0], "administrator")
            wait_until("a dead letter", lambda: len(page.get("/api/forwarding")["dead"]) == 1)
            (letter,) = page.get("/api/forwarding")["dead"]
            assert "same SOP Instance UID" in letter["error"]
            browser = httpx.Client(base_url=url, timeout=30)
            browser.post("/login", data={"name": "administrator", "password": page.password})
            shown = browser.get("/forwarding").text
            assert "Research use only, not for diagnosis" in shown
            assert item.SOPInstanceUID in shown
            mark = re.search('name="csrf" value="([0-9a-f]+)"', shown)
            assert mark
            assert browser.post("/forwarding/retry", data={"number": letter["id"]}).status_code == 403
            answer = browser.post("/forwarding/retry", data={"number": letter["id"], "csrf": mark[1]})
            assert answer.status_code == 303
            wait_until("it was sent", lambda: page.get("/api/forwarding")["destinations"][0]["sent"] == 2)
            assert page.get("/api/forwarding")["dead"] == []
            assert archive.count() == 1  # Orthanc keeps the first of the two, as it was told
            auditor = run("radfleet-edge", "person", "ann", "--role", "auditor", "--config", config).strip()
            watching = Page(url, auditor, "ann")
            assert watching.get("/api/forwarding")["destinations"][0]["name"] == "one"
            refused = watching._http.post("/forwarding/retry", data={"number": letter["id"]})
            assert refused.status_code == 403
    finally:
        archive.child.stop()


def test_a_whole_node_reads_forwards_and_says_so(tmp_path: Path) -> None:
    archive = start_orthanc(tmp_path / "o1", aet="ONE")
    config = configure(
        tmp_path / "n",
        {"one": archive},
        '[[rule]]\nname = "knees"\nbody_part = ["KNEE"]\naction = "keep"\n'
        '[[rule]]\nmodality = ["DX", "CR"]\naction = "both"\ndestinations = ["one"]\npriority = "high"\n',
    )
    config.write_text(config.read_text().replace("port = 0\n", 'port = 0\nallow = [{ae_title = "MODALITY"}]\n'))
    link = re.search(r"http\S+/welcome/\S+", run("radfleet-edge", "init", config.parent))
    assert link
    chest, knee = radiographs(2)
    knee.BodyPartExamined = "KNEE"
    node = Child("node", [BIN / "radfleet-edge", "run", "--config", config], log=config.parent / "node.log")
    try:
        node.wait_ready("the node", lambda: "READY all" in node.tail(200), seconds=120)
        assert "READY forward" in node.tail(200)
        ports = json.loads((config.parent / "state" / "run" / "ports.json").read_text())
        assert storescu(ports["dicom"], write_files(tmp_path / "f", [chest, knee])).returncode == 0
        page = Page(link[0].split("/welcome/")[0], link[0], "administrator")
        wait_until("it was sent", lambda: page.get("/api/forwarding")["destinations"][0]["sent"] == 1)
        wait_until("it was answered", lambda: len(page.get("/api/worklist")) == 1, seconds=60)
        assert page.get("/api/worklist")[0]["study"] == chest.StudyInstanceUID
        wait_until("the knee was kept", lambda: page.get("/api/forwarding")["not_read"] == {"keep": 1})
        assert [one.tags["SOPInstanceUID"] for one in archive.instances()] == [chest.SOPInstanceUID]
    finally:
        node.stop()
        archive.child.stop()
