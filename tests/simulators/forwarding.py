"""A node's forwarding half: a spool filled by hand, and the parts of the forward process one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pydicom.dataset import FileDataset

from edge.forward.fetch import Fetcher
from edge.forward.follow import FetchRule, Follower
from edge.forward.peer import Peer
from edge.forward.queue import Queue
from edge.forward.routes import Routes
from edge.forward.rules import Rule
from edge.forward.sender import Sender
from edge.intake.part import Arriving
from scripts.lab.parts import Orthanc
from shared.clock import Clock
from tests.simulators.modality import encoded, phantom_study
from tests.simulators.node import make_spool
from tests.simulators.release import HandClock

OURS = "RADFLEET"
KEEP_S = 14 * 86400.0  # the retention


def receive(
    state: Path, objects: Sequence[FileDataset], *, calling: str = "MODALITY", clock: Clock | None = None
) -> None:
    """Stores objects in the node's spool as if `calling` had sent them."""
    spool = make_spool(state, clock)
    for item in objects:
        syntax = str(item.file_meta.TransferSyntaxUID)
        arriving = Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), syntax, calling, OURS)
        spool.store(arriving, [encoded(item)])
    spool.close()


def radiographs(count: int, *, first: int = 0) -> list[FileDataset]:
    """Returns radiographs of as many patients."""
    return [phantom_study("chest-xray", 0, seed=seed, patient=f"P{seed}")[0] for seed in range(first, first + count)]


def peer_of(orthanc: Orthanc, name: str) -> Peer:
    """Returns how the node calls an Orthanc."""
    return Peer(name, orthanc.aet, "127.0.0.1", orthanc.dicom_port)


class ForwardingNode:
    """Queue, follower and senders over one state folder; `random_unit` 1.0 gives the longest pauses."""

    def __init__(
        self,
        state: Path,
        rules: Sequence[Rule],
        peers: Sequence[Peer],
        *,
        fetches: Sequence[FetchRule] = (),
        clock: HandClock | None = None,
        random_unit: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.state = state
        self.clock = clock or HandClock()
        self.scratch = state / "scratch"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.queue = Queue(state / "forward.sqlite")
        self.fetches = fetches
        self._random_unit = random_unit
        titles = {peer.name: peer.ae_title for peer in peers}
        self.routes = Routes(rules, titles, lambda study: self.queue.is_prior(study, self.now()))
        spool, intake = state / "spool", state / "intake.sqlite"
        self.follower = Follower(
            intake, spool, self.queue, self.routes, fetches, quiet_s=5.0, keep_s=KEEP_S, clock=self.clock
        )
        self.senders = {peer.name: self.sender(peer) for peer in peers}

    def now(self) -> float:
        return self.clock.now().timestamp()

    def sender(self, peer: Peer) -> Sender:
        return Sender(
            self.queue,
            peer,
            spool=self.state / "spool",
            scratch=self.scratch,
            ours=OURS,
            clock=self.clock,
            random_unit=self._random_unit,
        )

    def fetcher(self, peer: Peer) -> Fetcher:
        return Fetcher(
            self.queue,
            peer,
            self.fetches,
            intake=self.state / "intake.sqlite",
            spool=self.state / "spool",
            ours=OURS,
            clock=self.clock,
            random_unit=self._random_unit,
        )

    def follow(self) -> int:
        """Routes everything that is new and returns how many objects that were."""
        total = 0
        while done := self.follower.step():
            total += done
        return total

    def send(self, name: str) -> int:
        """Sends what is due to one destination and returns how many objects left its queue."""
        total = 0
        while done := self.senders[name].step():
            total += done
        return total
