"""Officers, a cloud and a node around the real registry and the real journal; the node port is a function call."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np

from cloud.registry.director import Director, Named
from cloud.registry.keys import create_online_keys
from cloud.registry.officer import create_officer, sign_proposal
from cloud.registry.repository import ReleaseRepository
from cloud.training.gate import Bars, Verdict
from edge.inference.engine import OnnxEngine, load_engine
from edge.inference.golden import golden_proof
from edge.slots.fetch import Fetcher
from edge.slots.journal import Journal
from edge.slots.swap import Policy, ServingRecord, Swapper, install_baseline
from shared.errors import LinkError, TrustError
from shared.files import atomic_write, sha256_hex
from shared.package.manifest import Manifest
from shared.wire.records import ReleaseOrder
from tests.simulators.package import SIDE, build_package


class HandClock:
    """A clock that moves when a test moves it; it starts at the machine's time, which python-tuf reads too."""

    def __init__(self) -> None:
        self._now = datetime.now(UTC)
        self._seconds = 0.0

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._seconds

    def advance(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)
        self._seconds += seconds


class FolderBlobs:
    """Content-addressed blobs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        atomic_write(self.folder / sha256_hex(data), data)
        return sha256_hex(data)


def passing(package: str, decision: str = "pass") -> bytes:
    """A gate's record for `package`."""
    return msgspec.json.encode(Verdict("0" * 64, package, decision, "weak", ["better at c"], Bars()))  # type: ignore[arg-type]


class CloudSide:
    """A cloud folder with the registry and director, and two officers with folders elsewhere."""

    def __init__(self, folder: Path, clock: HandClock) -> None:
        self.folder = folder / "cloud"
        self.packages = folder / "built"
        self.officers = [folder / "officers" / name for name in ("ada", "grace")]
        self.clock = clock
        create_online_keys(self.folder / "keys")
        self.blobs = FolderBlobs(self.folder / "objects")
        self.repository = self.open_repository()
        self.director = Director(self.folder / "director", self.folder / "keys", clock=clock)
        self.director_root = self.director.create()
        if self.repository.releases():  # the folder of an earlier process
            self.digests = {r: t.hashes["sha256"] for r, t in self.repository.releases().items()}
            self.baseline = self.digests[1]
            return
        self.baseline = build_package(self.packages / "1", 1)
        self.digests = {1: self.baseline}
        publics = [create_officer(o, o.name) for o in self.officers]
        founding = (self.packages / "1", self.baseline)
        self.sign_and_publish(self.repository.propose_root(publics, founding=founding))

    def open_repository(self) -> ReleaseRepository:
        return ReleaseRepository(self.folder / "registry", self.folder / "keys", blobs=self.blobs, clock=self.clock)

    def sign_and_publish(self, proposal: Path) -> None:
        for officer in self.officers:
            sign_proposal(officer, proposal)
        self.repository.publish(proposal)

    def build(self, release: int, **options: object) -> str:
        self.digests[release] = build_package(
            self.packages / str(release),
            release,
            seed=release,
            **options,  # type: ignore[arg-type]
        )
        return self.digests[release]

    def propose(self, release: int) -> Path:
        digest = self.digests.get(release) or self.build(release)
        return self.repository.propose_release(self.packages / str(release), digest, release, passing(digest))

    def release(self, release: int) -> ReleaseOrder:
        self.sign_and_publish(self.propose(release))
        return self.order(release)

    def order(self, release: int) -> ReleaseOrder:
        return ReleaseOrder(release, self.digests[release])

    def name(self, release: int, node: tuple[str, str] = ("a", "node1"), *, downgrade: bool = False) -> None:
        self.director.assign({node: Named(release, downgrade)}, self.repository.releases())


class NodeSide:
    """One node's state folder, its uplink half and its pipeline half; `restart` stands for a new process."""

    def __init__(
        self, folder: Path, cloud: CloudSide, clock: HandClock, node: tuple[str, str] = ("a", "node1")
    ) -> None:
        self.state = folder
        self.cloud = cloud
        self.clock = clock
        self.node = node
        self.online = True
        self.served: Mapping[str, Path] = {
            "/tuf/release/": cloud.folder / "registry" / "metadata",
            "/tuf/director/": cloud.folder / "director" / "metadata",
            "/blobs/": cloud.blobs.folder,
        }
        self.fetched: list[str] = []
        self.records: list[ServingRecord] = []
        self.nudges = 0
        self.policy = Policy(shadow_studies=2, shadow_seconds=10, provisional_studies=2, provisional_seconds=10)
        (folder / "models").mkdir(parents=True, exist_ok=True)
        self.journal = Journal(folder / "slots.sqlite", clock)
        install_baseline(folder / "models", self.journal, cloud.packages / "1")
        self.restart()

    def restart(self) -> None:
        self.journal.close()
        self.journal = Journal(self.state / "slots.sqlite", self.clock)
        self.fetcher = Fetcher(
            self.state / "models",
            self.journal,
            site=self.node[0],
            node=self.node[1],
            release_root=self.cloud.repository.root(),
            director_root=self.cloud.director_root,
            get=self.get,
            download=self.download,
            providers=["CPUExecutionProvider"],
            now=self.clock.now,
            nudge=self._nudge,
        )
        self.swapper = Swapper(
            self.state / "models",
            self.journal,
            load=load_one_thread,
            prove=golden_proof,
            record=self.records.append,
            clock=self.clock,
            policy=self.policy,
        )

    def _nudge(self) -> None:
        self.nudges += 1

    def get(self, path: str, max_length: int) -> bytes | None:
        if not self.online:
            raise LinkError("the cloud is away")
        self.fetched.append(path)
        file = self._file(path)
        if not file.exists():
            return None
        data = file.read_bytes()
        if len(data) > max_length:
            raise TrustError(f"{path} is longer than {max_length} bytes")
        return data

    def download(self, url_path: str, path: Path, sha256: str, length: int) -> None:
        data = self.get(url_path, length)
        if data is None or sha256_hex(data) != sha256:
            raise TrustError(f"{url_path} is not {sha256[:12]}")
        atomic_write(path, data)

    def _file(self, path: str) -> Path:
        prefix = next(p for p in self.served if path.startswith(p))
        return self.served[prefix] / path.removeprefix(prefix)

    def fetch(self, order: ReleaseOrder | None) -> None:
        while self.fetcher.step(order):
            pass

    def read_study(self) -> str:
        """One study, as the pipeline reads it: answered by what serves, then shown to the swapper."""
        engine, _, digest = self.swapper.serving()
        images = np.full((1, SIDE, SIDE), 100, np.uint8)
        self.swapper.observe(images, "xray", engine.run(images).logits)
        return digest

    def install(self, order: ReleaseOrder) -> None:
        """The whole way, with studies arriving between the steps."""
        self.fetch(order)
        for _ in range(12):
            self.swapper.step()
            self.read_study()

    def state_of(self, package: str) -> str:
        slot = self.journal.get(package)
        return slot.state if slot else ""

    def reason_of(self, package: str) -> str:
        slot = self.journal.get(package)
        return slot.reason if slot else ""

    @property
    def serving(self) -> str:
        return self.swapper.serving()[2]


def load_one_thread(folder: Path, manifest: Manifest) -> OnnxEngine:
    """The pipeline's engine on one thread."""
    return load_engine(folder, manifest, threads=1)
