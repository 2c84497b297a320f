"""From a DICOM image to a better model running in three hospitals, on one machine, told as it happens.

1 found    CA, broker, Redis, cloud, PACS, three enrolled nodes
2 read     studies by `storescu`; answers, and what arrived back in the PACS
3 confirm  the radiologists' page: confirm or correct
4 learn    features, federated rounds, gate, two officers, rollout while studies keep arriving
5 re-read  held-out patients again: champion before, candidate after
6 stay     the pages stay open until Ctrl-C
"""

from __future__ import annotations

import itertools
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from scripts.lab import story
from scripts.lab.cases import Case, Source, draw_cases
from scripts.lab.child import wait_until
from scripts.lab.fleet import Fleet, Hospital
from scripts.lab.modality import store

SITES = ("hospital-a", "hospital-b", "hospital-c")
# Radiographs that each hospital's radiologist confirms or corrects; a third is held out for judging. Hospital C has
# more of them: a proof that its new model is better needs about 45 held-out cases there.
LEARNING_CASES = {"hospital-a": 48, "hospital-b": 48, "hospital-c": 132}
HELD_OUT_PATIENTS = 48  # radiographs a hospital that nobody learns from, read before and after
SECTIONS = 2  # CT series and MR series a hospital
SERIES_SLICES = 8
ANSWER_SECONDS = 120.0
CAMPAIGN_SECONDS = 400.0
MAX_ROUNDS = 6
ROLLOUT_SECONDS = 90.0


class NotBetterError(RuntimeError):
    """The campaign ended without a candidate that the gate lets pass."""


class Demo:
    """The story's state: the fleet, what was sent, and how long each stage took."""

    def __init__(self, folder: Path, source: Source, console: Console) -> None:
        self.fleet = Fleet(folder)
        self.source = source
        self.console = console
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.confirmed: dict[str, int] = {}
        self.before: dict[str, list[tuple[Case, dict[str, Any]]]] = {}
        self.after: dict[str, list[tuple[Case, dict[str, Any]]]] = {}

    def _progress(self) -> Progress:
        words = TextColumn("{task.description}")
        return Progress(
            SpinnerColumn(), words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=self.console
        )

    def run(self) -> None:
        """Tells stages 1 to 5; raises NotBetterError when no candidate passes."""
        # The modalities draw their patients while the machine waits for servers to start.
        with self._stage("1 found"), ThreadPoolExecutor(1) as pool:
            drawing = pool.submit(self._draw)
            self._found()
            learning, held_out = drawing.result()
        with self._stage("2 read"):
            answers = self._read(learning)
            self.before = self._read(held_out)
            self._probabilities(self.before)
            story.answers(self.console, answers, self.fleet)
        with self._stage("3 confirm"):
            self._confirm(answers)
        with self._stage("4 learn"):
            campaign = self._learn()
        with self._stage("4 sign and roll out"):
            self._roll_out(campaign)
        with self._stage("5 re-read"):
            again = {site: [case.again() for case in cases] for site, cases in held_out.items()}
            self.after = self._read(again)
            self._probabilities(self.after)
        story.comparison(self.console, self.before, self.after)
        story.moved(self.console, self.fleet)
        story.wire(self.console, self.fleet)
        story.seconds(self.console, self.seconds)

    def stop(self) -> None:
        """Stops every child process and says so."""
        self.console.print(f"Stopped: {', '.join(self.fleet.stop())}.")

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.console.rule(f"[bold]{name}", align="left")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began

    def _found(self) -> None:
        with self._progress() as progress:
            task = progress.add_task("CA, Redis, officers, broker, cloud", total=5)
            self.fleet.found()
            progress.update(task, advance=1, description="PACS (Orthanc)")
            self.fleet.start_pacs()
            progress.update(task, advance=1, description="enrolling nodes")
            for site in SITES:
                self.fleet.enrol(site)
                progress.update(task, advance=1)
            for hospital in self.fleet.hospitals:
                hospital.wait_ready()
            progress.update(task, description="CA, broker, Redis, cloud, PACS, three nodes")

    def _draw(self) -> tuple[dict[str, list[Case]], dict[str, list[Case]]]:
        """Returns the cases that hospitals learn from, and those that nobody learns from."""
        learning = {site: self._cases(site, LEARNING_CASES[site], "learning") for site in SITES}
        return learning, {site: self._cases(site, HELD_OUT_PATIENTS, "held-out", sections=0) for site in SITES}

    def _cases(self, site: str, radiographs: int, purpose: str, *, sections: int = SECTIONS) -> list[Case]:
        folder = self.folder / "modality" / site / purpose
        folder.mkdir(parents=True)
        scanner = site.removeprefix("hospital-").upper()
        return draw_cases(
            self.source, folder, scanner=scanner, purpose=purpose, radiographs=radiographs,
            sections=sections, slices=SERIES_SLICES,
        )  # fmt: skip

    def _read(self, cases: dict[str, list[Case]]) -> dict[str, list[tuple[Case, dict[str, Any]]]]:
        """Sends every case to its hospital and returns each with its answer."""
        with self._progress() as progress:
            tasks = {
                h.site: progress.add_task(f"{h.site}: storescu to answer", total=len(cases[h.site]))
                for h in self.fleet.hospitals
            }
            threads = [
                threading.Thread(target=self._send, args=(h, cases[h.site]), daemon=True) for h in self.fleet.hospitals
            ]
            for thread in threads:
                thread.start()

            found: dict[str, dict[str, dict[str, Any]]] = {h.site: {} for h in self.fleet.hospitals}

            def all_answered() -> bool:
                for h in self.fleet.hospitals:
                    wanted = {case.study for case in cases[h.site]}
                    found[h.site] = {r["study"]: r for r in worklist(h) if r["study"] in wanted}
                    progress.update(tasks[h.site], completed=len(found[h.site]))
                return all(len(found[h.site]) == len(cases[h.site]) for h in self.fleet.hospitals)

            wait_until("every study's answer", all_answered, seconds=ANSWER_SECONDS, every=0.5)
            for thread in threads:
                thread.join()
        return {site: [(case, found[site][case.study]) for case in cases[site]] for site in cases}

    def _probabilities(self, found: dict[str, list[tuple[Case, dict[str, Any]]]]) -> None:
        """Adds every class's probability to each row, as the study's own page shows them."""
        for hospital in self.fleet.hospitals:
            for _, row in found[hospital.site]:
                classes = hospital.page.get(f"/api/answers/{row['answer']}")["classes"]
                row["probabilities"] = {one["name"]: one["probability"] for one in classes}

    def _send(self, hospital: Hospital, cases: list[Case]) -> None:
        for start in range(0, len(cases), 12):
            files = [file for case in cases[start : start + 12] for file in case.files]
            sent = store(files, port=hospital.dicom_port, called="RADFLEET")
            hospital.sent += sent.offered
            hospital.accepted += sent.accepted

    def _confirm(self, answers: dict[str, list[tuple[Case, dict[str, Any]]]]) -> None:
        """Does what the reading page does when a radiologist clicks: same address, same sign-in."""
        with self._progress() as progress:
            for hospital in self.fleet.hospitals:
                rows = answers[hospital.site]
                task = progress.add_task(f"{hospital.site}: confirmed or corrected", total=len(rows))
                corrected = 0
                for case, row in rows:
                    hospital.page.post(f"/api/answers/{row['answer']}/label", label=case.label)
                    corrected += case.label != row["finding_name"]
                    progress.advance(task)
                self.confirmed[hospital.site] = len(rows)
                progress.update(
                    task, description=f"{hospital.site}: {len(rows)} confirmed, {corrected} of them corrected"
                )

    def _learn(self) -> dict[str, Any]:
        cloud = self.fleet.cloud
        page = cloud.page
        wait_until(
            "the features of every confirmed case",
            lambda: all(self.fleet.features(h.site) >= self.confirmed[h.site] for h in self.fleet.hospitals),
            seconds=60,
            every=0.5,
        )
        for hospital in self.fleet.hospitals:
            self.console.print(
                f"{hospital.site}: features of {self.fleet.features(hospital.site)} confirmed cases arrived"
            )
        campaign = page.post("/api/campaigns", plan={"max_rounds": MAX_ROUNDS})["id"]
        told: set[str] = set()

        def ended() -> bool:
            row = next(c for c in page.get("/api/campaigns") if c["id"] == campaign)
            story.tell_campaign(self.console, row, told)
            return row["state"] in {"registered", "exhausted", "stopped"}

        wait_until("the campaign", ended, seconds=CAMPAIGN_SECONDS, every=0.5)
        row: dict[str, Any] = next(c for c in page.get("/api/campaigns") if c["id"] == campaign)
        if row["state"] != "registered":
            raise NotBetterError(f"No candidate passed the gate: {row['reason']}. The champion stays.")
        return row

    def _roll_out(self, campaign: dict[str, Any]) -> None:
        """Signs with both officers, rolls out to all, and keeps sending studies while every node swaps."""
        cloud = self.fleet.cloud
        release, proposal = story.proposal(cloud)
        self.console.print(f"release {release} proposed; two officers sign in processes of their own")
        cloud.sign(proposal, self.fleet.officers)
        cloud.page.post("/api/rollouts", release=release)
        stop = threading.Event()
        sent: dict[str, list[Case]] = {h.site: [] for h in self.fleet.hospitals}

        def keep_sending(hospital: Hospital) -> None:
            for case, _ in itertools.cycle(self.before[hospital.site]):
                if stop.is_set():
                    return
                again = case.again()
                self._send(hospital, [again])
                sent[hospital.site].append(again)
                stop.wait(0.5)

        threads = [threading.Thread(target=keep_sending, args=(h,), daemon=True) for h in self.fleet.hospitals]
        for thread in threads:
            thread.start()
        try:
            story.watch_rollout(self.console, self.fleet, release, seconds=ROLLOUT_SECONDS)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        story.none_lost(self.console, self.fleet, sent, worklist)


def main(
    once: Annotated[
        bool, typer.Option("--once", help="End after the tables instead of keeping the pages open.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Real images with labels.csv in place of phantoms.")] = None,
    state: Annotated[Path | None, typer.Option(help="Where everything is kept; default: a temporary folder.")] = None,
) -> None:
    """From a DICOM image to a better model running in three hospitals. Research use only, not for diagnosis."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    folder = state or Path(tempfile.mkdtemp(prefix="radfleet-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        console.print(f"{folder} is not empty. Cure: give --state a new folder.")
        raise typer.Exit(78)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same orderly end as Ctrl-C
    demo = Demo(folder, Source(data), console)
    console.print(f"everything is kept below {folder}")
    code = 1
    try:
        demo.run()
        code = 0
        story.addresses(console, demo.fleet)
        if not once:
            console.print("The pages stay open. Ctrl-C ends.")
            signal.pause()
    except NotBetterError as exc:
        console.print(f"[bold]{exc}[/]")
    except KeyboardInterrupt:
        code = 130
    finally:
        demo.stop()
        if state is None and code == 0:
            shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(code)


def worklist(hospital: Hospital) -> list[dict[str, Any]]:
    """Returns the hospital's worklist as the page's own interface gives it."""
    rows: list[dict[str, Any]] = hospital.page.get("/api/worklist")
    return rows


if __name__ == "__main__":
    typer.run(main)
