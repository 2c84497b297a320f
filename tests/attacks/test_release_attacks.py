"""Attacks on a release, each ending with what lies on the node's disk and what serves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Targets

from cloud.registry.director import Director, Named
from cloud.registry.keys import load_key
from cloud.registry.officer import create_officer, sign_proposal
from edge.inference.engine import OnnxEngine
from edge.slots import verify
from edge.slots.fetch import RETRY_AFTER
from edge.slots.swap import Swapper
from shared.errors import LinkError, StateError, TrustError
from shared.files import sha256_hex
from shared.package.manifest import Manifest, decode_manifest
from shared.wire.records import ReleaseOrder
from tests.simulators.package import MODEL, change_one_weight
from tests.simulators.release import (
    CloudSide,
    HandClock,
    NodeSide,
    load_one_thread,
    passing,
)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def cloud(tmp_path: Path, clock: HandClock) -> CloudSide:
    return CloudSide(tmp_path, clock)


@pytest.fixture
def node(tmp_path: Path, cloud: CloudSide, clock: HandClock) -> NodeSide:
    return NodeSide(tmp_path / "node", cloud, clock)


def assert_untouched(node: NodeSide, order: ReleaseOrder, reason: str) -> None:
    """The package was refused for `reason` and is not on disk; the model in place serves, after a restart too."""
    assert node.state_of(order.package) == "REFUSED"
    assert reason in node.reason_of(order.package)
    assert not (node.state / "models" / order.package).exists()
    assert node.serving == node.cloud.baseline == node.read_study()
    node.restart()
    assert node.serving == node.cloud.baseline


def test_an_honest_release_is_installed(node: NodeSide, cloud: CloudSide) -> None:
    order = cloud.release(2)
    cloud.name(2)
    node.install(order)
    assert node.serving == order.package
    assert node.journal.committed() == (order.package, 2)
    assert node.records[-1].weights_loaded == sha256_hex((cloud.packages / "2" / MODEL).read_bytes())
    assert node.records[-1].pid == os.getpid()


class TestMetadata:
    def test_one_officer_alone_cannot_release(self, node: NodeSide, cloud: CloudSide) -> None:
        proposal = cloud.propose(2)
        sign_proposal(cloud.officers[0], proposal)
        with pytest.raises(TrustError, match="not signed by enough officers"):
            cloud.repository.publish(proposal)
        # The cloud publishes it all the same, with the keys that it has.
        forged = Metadata[Targets].from_bytes((proposal / "targets.json").read_bytes())
        signature = json.loads((proposal / "signatures" / "ada.json").read_bytes())["signatures"][0]
        forged.sign(load_key(cloud.officers[0] / "release.key"))
        assert signature["keyid"] in forged.signatures
        cloud.repository._shelf.write_targets(forged, cloud.clock.now())
        self._store(cloud, proposal)
        cloud.name(2)
        node.install(cloud.order(2))
        assert_untouched(node, cloud.order(2), "signed by 1/2 keys")

    def test_two_signatures_by_one_officer_are_one(self, node: NodeSide, cloud: CloudSide, tmp_path: Path) -> None:
        proposal = cloud.propose(2)
        sign_proposal(cloud.officers[0], proposal)
        shutil.copy(proposal / "signatures" / "ada.json", proposal / "signatures" / "grace.json")
        with pytest.raises(TrustError, match="not signed by enough officers"):
            cloud.repository.publish(proposal)

    def test_a_stranger_is_no_officer(self, cloud: CloudSide, tmp_path: Path) -> None:
        create_officer(tmp_path / "mallory", "mallory")
        proposal = cloud.propose(2)
        sign_proposal(cloud.officers[0], proposal)
        with pytest.raises(TrustError, match="did not sign"):
            sign_proposal(tmp_path / "mallory", proposal)
        sign_proposal(tmp_path / "mallory", proposal, check=lambda _p, _f, memory: memory)
        with pytest.raises(TrustError, match="not signed by enough officers"):
            cloud.repository.publish(proposal)

    def test_freeze(self, node: NodeSide, cloud: CloudSide, clock: HandClock) -> None:
        order = cloud.release(2)
        cloud.name(2)
        clock.advance(timedelta(days=2).total_seconds())  # nobody refreshes: the list is held back
        node.install(order)
        assert_untouched(node, order, "expired")
        cloud.repository.refresh()
        cloud.director.refresh()
        clock.advance(RETRY_AFTER.total_seconds())
        node.install(order)
        assert node.serving == order.package

    def test_freeze_of_the_director(self, node: NodeSide, cloud: CloudSide, clock: HandClock) -> None:
        order = cloud.release(2)
        cloud.name(2)
        clock.advance(timedelta(days=2).total_seconds())
        cloud.repository.refresh()
        node.install(order)
        assert_untouched(node, order, "expired")

    def test_a_clock_set_back_does_not_make_old_metadata_fresh(
        self, node: NodeSide, cloud: CloudSide, clock: HandClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The machine's clock says 1970, python-tuf believes it; the time floor that the node keeps does not."""

        class Clock1970(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:
                return datetime(1970, 1, 1, tzinfo=UTC)

        monkeypatch.setattr("tuf.ngclient._internal.trusted_metadata_set.datetime.datetime", Clock1970)
        order = cloud.release(2)
        cloud.name(2)
        clock.advance(timedelta(days=2).total_seconds())
        node.install(order)
        assert_untouched(node, order, "expired")

    @pytest.mark.parametrize("repository", ["registry", "director"])
    def test_rollback_to_older_metadata(
        self, node: NodeSide, cloud: CloudSide, tmp_path: Path, repository: str
    ) -> None:
        shutil.copytree(cloud.folder / repository / "metadata", tmp_path / "old")
        cloud.release(2)
        cloud.name(2)
        node.install(cloud.order(2))
        assert node.serving == cloud.digests[2]
        order = cloud.release(3)
        cloud.name(3)
        node.served = {
            **node.served,
            f"/tuf/{'release' if repository == 'registry' else repository}/": tmp_path / "old",
        }
        node.install(order)
        assert node.state_of(order.package) == "REFUSED"
        assert "must be >=" in node.reason_of(order.package)
        assert node.serving == cloud.digests[2]

    def test_endless_metadata(self, node: NodeSide, cloud: CloudSide) -> None:
        order = cloud.release(2)
        cloud.name(2)
        (cloud.folder / "registry" / "metadata" / "timestamp.json").write_bytes(b" " * 1_000_000)
        node.install(order)
        assert_untouched(node, order, "longer than allowed")

    def test_a_root_by_strangers_is_not_followed(
        self, node: NodeSide, cloud: CloudSide, tmp_path: Path, clock: HandClock
    ) -> None:
        """Mallory runs a whole registry of their own and serves its root as version 2."""
        mallory = CloudSide(tmp_path / "mallory", clock)
        order = mallory.release(2)
        mallory.name(2)
        metadata = mallory.folder / "registry" / "metadata"
        root = json.loads((metadata / "1.root.json").read_bytes())
        root["signed"]["version"] = 2
        (metadata / "2.root.json").write_text(json.dumps(root))
        node.served = {**node.served, "/tuf/release/": metadata, "/blobs/": mallory.blobs.folder}
        node.install(order)
        assert_untouched(node, order, "not to be trusted")

    @staticmethod
    def _store(cloud: CloudSide, proposal: Path) -> None:
        for file in (proposal / "package").iterdir():
            cloud.blobs.put(file.read_bytes())


class TestDirector:
    def test_assignment_of_another_node(self, node: NodeSide, cloud: CloudSide) -> None:
        order = cloud.release(2)
        cloud.name(2, ("b", "node1"))
        node.install(order)
        assert_untouched(node, order, "names no release for a/node1")

    def test_assignment_that_says_another_node_inside(
        self, node: NodeSide, cloud: CloudSide, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order = cloud.release(2)
        monkeypatch.setattr("cloud.registry.director.node_path", lambda _site, _node: "nodes/a/node1/manifest.json")
        cloud.name(2, ("b", "node1"))
        node.install(order)
        assert_untouched(node, order, "is for b/node1")

    def test_a_release_that_officers_never_signed(self, node: NodeSide, cloud: CloudSide) -> None:
        """The director is stolen: it names a package that it brought itself."""
        proposal = cloud.propose(2)
        target = Metadata[Targets].from_bytes((proposal / "targets.json").read_bytes()).signed.targets
        cloud.director.assign({("a", "node1"): Named(2)}, {2: target["releases/2/manifest.json"]})
        TestMetadata._store(cloud, proposal)
        node.install(cloud.order(2))
        assert_untouched(node, cloud.order(2), "not among those the officers signed")

    def test_another_signed_release_than_the_director_names(self, node: NodeSide, cloud: CloudSide) -> None:
        cloud.release(2)
        order = cloud.release(3)
        cloud.name(2)
        node.install(order)
        assert_untouched(node, order, "another manifest than the officers signed")

    def test_going_back_without_permission(self, node: NodeSide, cloud: CloudSide) -> None:
        newer = cloud.release(2)
        cloud.name(2)
        node.install(newer)
        cloud.name(1)
        node.install(cloud.order(1))
        assert node.state_of(cloud.baseline) == "REFUSED"
        assert "older than 2" in node.reason_of(cloud.baseline)
        assert node.serving == newer.package

    def test_going_back_with_signed_permission(self, node: NodeSide, cloud: CloudSide) -> None:
        cloud.name(1)
        newer = cloud.release(2)
        cloud.name(2)
        node.install(newer)
        cloud.name(1, downgrade=True)
        node.install(cloud.order(1))
        assert node.serving == cloud.baseline
        assert node.journal.committed() == (cloud.baseline, 1)
        assert node.journal.previous() == newer.package

    def test_permission_for_one_release_is_none_for_another(self) -> None:
        assignment = verify.Assignment("a", "node1", 2, "0" * 64, allow_downgrade_to=1)
        with pytest.raises(TrustError, match="older than 3"):
            verify._check_direction(assignment, verify.Serving("1" * 64, 3))

    def test_a_director_signed_by_another_key(self, node: NodeSide, cloud: CloudSide, tmp_path: Path) -> None:
        order = cloud.release(2)
        other = CloudSide(tmp_path / "other", cloud.clock)
        stolen = Director(tmp_path / "stolen", other.folder / "keys", clock=cloud.clock)
        stolen.create()
        stolen.assign({("a", "node1"): Named(2)}, cloud.repository.releases())
        node.served = {**node.served, "/tuf/director/": tmp_path / "stolen" / "metadata"}
        node.install(order)
        assert_untouched(node, order, "not to be trusted")


class TestArtefact:
    def test_a_truncated_model(self, node: NodeSide, cloud: CloudSide) -> None:
        order = cloud.release(2)
        cloud.name(2)
        blob = cloud.blobs.folder / sha256_hex((cloud.packages / "2" / MODEL).read_bytes())
        blob.write_bytes(blob.read_bytes()[:-1])
        node.install(order)
        assert_untouched(node, order, "/blobs/")

    def test_one_weight_changed_on_the_way(self, node: NodeSide, cloud: CloudSide) -> None:
        order = cloud.release(2)
        cloud.name(2)
        change_one_weight(cloud.blobs.folder / sha256_hex((cloud.packages / "2" / MODEL).read_bytes()))
        node.install(order)
        assert_untouched(node, order, "/blobs/")

    def test_one_weight_changed_on_the_nodes_disk(self, node: NodeSide, cloud: CloudSide) -> None:
        """Same graph, same names, same length: caught by digest before it is parsed."""
        order = cloud.release(2)
        cloud.name(2)
        node.fetch(order)
        model = node.state / "models" / order.package / MODEL
        length = model.stat().st_size
        change_one_weight(model)
        assert model.stat().st_size == length
        node.swapper.step()
        assert node.state_of(order.package) == "REFUSED"
        assert MODEL in node.reason_of(order.package)
        assert node.serving == cloud.baseline == node.read_study()

    def test_an_engine_that_holds_other_weights_than_the_file(self, node: NodeSide, cloud: CloudSide) -> None:
        """A stale engine cache: the file is right, the session is not, and says so by its digest."""
        order = cloud.release(2)
        cloud.name(2)
        node.fetch(order)
        node.swapper._load = lambda _folder, _manifest: old_engine(node)
        node.swapper.step()
        assert "The engine holds" in node.reason_of(order.package)
        assert node.serving == cloud.baseline == node.read_study()

    def test_an_engine_that_lies_about_its_digest(self, node: NodeSide, cloud: CloudSide) -> None:
        """The same stale engine with the right digest on its label: only its outputs give it away."""
        order = cloud.release(2)
        cloud.name(2)
        node.fetch(order)

        def stale(folder: Path, manifest: Manifest) -> OnnxEngine:
            engine = old_engine(node)
            engine.digest = manifest.file(MODEL).sha256
            return engine

        node.swapper._load = stale
        node.swapper.step()
        assert "differs from the golden outputs" in node.reason_of(order.package)
        assert node.serving == cloud.baseline == node.read_study()

    def test_the_committed_model_rots_on_disk(self, node: NodeSide, cloud: CloudSide) -> None:
        order = cloud.release(2)
        cloud.name(2)
        node.install(order)
        change_one_weight(node.state / "models" / order.package / MODEL)
        node.restart()
        assert node.serving == cloud.baseline
        assert node.state_of(order.package) == "ROLLED_BACK"
        node.install(order)  # the order stands: fetched again, whole
        assert node.serving == order.package

    def test_nothing_usable_is_said_and_not_served(self, node: NodeSide, cloud: CloudSide) -> None:
        change_one_weight(node.state / "models" / cloud.baseline / MODEL)
        with pytest.raises(StateError, match="no model"):
            node.restart()

    def test_a_manifest_of_another_release_number(self, node: NodeSide, cloud: CloudSide) -> None:
        """Officers sign blindly: the list says release 3, the manifest says 2."""
        digest = cloud.build(2)
        with pytest.raises(TrustError, match="not of release 3"):
            cloud.repository.propose_release(cloud.packages / "2", digest, 3, passing(digest))


class TestCloudCannotSign:
    def test_no_officers_key_is_in_the_clouds_state(self, cloud: CloudSide) -> None:
        cloud.release(2)
        found = find_private_keys(cloud.officers, cloud.folder)
        assert found == []
        plant = cloud.folder / "registry" / "planted"
        plant.write_bytes(b"x" + (cloud.officers[1] / "release.key").read_bytes())
        assert find_private_keys(cloud.officers, cloud.folder) == [plant]
        raw = load_key(cloud.officers[0] / "root.key")._private_key.private_bytes_raw()
        plant.write_bytes(b"x" + raw + b"y")
        assert find_private_keys(cloud.officers, cloud.folder) == [plant]

    def test_officers_keys_are_theirs_alone(self, cloud: CloudSide) -> None:
        for officer in cloud.officers:
            for key in ("root.key", "release.key"):
                assert (officer / key).stat().st_mode & 0o077 == 0

    def test_online_keys_sign_neither_root_nor_release(self, node: NodeSide, cloud: CloudSide) -> None:
        proposal = cloud.propose(2)
        forged = Metadata[Targets].from_bytes((proposal / "targets.json").read_bytes())
        for key in (cloud.folder / "keys").iterdir():
            forged.sign(load_key(key), append=True)
        cloud.repository._shelf.write_targets(forged, cloud.clock.now())
        TestMetadata._store(cloud, proposal)
        cloud.name(2)
        node.install(cloud.order(2))
        assert_untouched(node, cloud.order(2), "signed by 0/2 keys")


def old_engine(node: NodeSide) -> OnnxEngine:
    """What a cache keyed by graph and file name would give: the baseline's session."""
    folder = node.state / "models" / node.cloud.baseline
    return load_one_thread(folder, decode_manifest((folder / "manifest.json").read_bytes()))


def find_private_keys(officers: list[Path], state: Path) -> list[Path]:
    """Files below `state` that hold an officer's private key: PEM, its base64 body, raw seed or hexadecimal."""
    needles: list[bytes] = []
    for officer in officers:
        for name in ("root.key", "release.key"):
            pem = (officer / name).read_bytes()
            raw = load_key(officer / name)._private_key.private_bytes_raw()
            needles += [pem.split(b"\n")[1], raw, raw.hex().encode()]
    files = [p for p in sorted(state.rglob("*")) if p.is_file()]
    return [p for p in files if any(needle in p.read_bytes() for needle in needles)]


JOURNAL_STATES = [
    "OFFERED",
    "VERIFIED",
    "DOWNLOADED",
    "STAGED",
    "SHADOW",
    "READY",
    "PROVISIONAL",
    "COMMITTED",
]

_KILLED = """
import os, sys
from contextlib import contextmanager
from pathlib import Path
import tests.simulators.release as release
from edge.slots.journal import Journal

state, when, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
put, step, reached = Journal._put, Journal._step, []

def watched_put(self, db, package, number, at, *rest, **more):
    put(self, db, package, number, at, *rest, **more)
    if at == state and number == 2:
        reached.append(at)

@contextmanager
def watched_step(self):
    with step(self) as db:
        yield db
        if reached and when == "before the commit":
            os.kill(os.getpid(), 9)
    if reached:
        os.kill(os.getpid(), 9)

clock = release.HandClock()
cloud = release.CloudSide(folder, clock)
node = release.NodeSide(folder / "node", cloud, clock)
order = cloud.release(2)
cloud.name(2)
print(order.package, flush=True)
Journal._put, Journal._step = watched_put, watched_step
node.install(order)
"""


class TestKill:
    @pytest.mark.parametrize("when", ["before the commit", "after the commit"])
    @pytest.mark.parametrize("state", JOURNAL_STATES)
    def test_sigkill_at_every_step_of_the_journal(self, tmp_path: Path, state: str, when: str) -> None:
        """A real process dies at the step; the next one serves the old model or the new one, and reaches the new."""
        process = subprocess.run(
            [sys.executable, "-c", _KILLED, state, when, str(tmp_path)],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode == -9, process.stderr
        package = next(word for word in process.stdout.split() if len(word) == 64)  # beside lines of the log
        clock = HandClock()
        cloud = CloudSide(tmp_path, clock)
        node = NodeSide(tmp_path / "node", cloud, clock)
        expected = package if (state, when) == ("COMMITTED", "after the commit") else cloud.baseline
        assert node.serving == expected == node.read_study()
        clock.advance(RETRY_AFTER.total_seconds())
        node.install(ReleaseOrder(2, package))
        assert node.serving == package
        assert node.journal.committed() == (package, 2)

    def test_a_package_that_takes_the_process_down_is_given_up(self, node: NodeSide, cloud: CloudSide) -> None:
        order = cloud.release(2)
        cloud.name(2)
        node.fetch(order)
        for _ in range(3):
            node.journal.advance(order.package, "STAGED")  # ... and the process is gone
            node.restart()
        assert node.state_of(order.package) == "REFUSED"
        assert "3 times" in node.reason_of(order.package)
        clock = node.clock
        clock.advance(3600)
        node.install(order)
        assert node.serving == cloud.baseline

    def test_the_cloud_goes_away_in_mid_download(self, node: NodeSide, cloud: CloudSide) -> None:
        order = cloud.release(2)
        cloud.name(2)
        assert node.fetcher.step(order)
        assert node.fetcher.step(order)
        node.online = False
        with pytest.raises(LinkError):
            node.fetcher.step(order)
        assert node.state_of(order.package) == "VERIFIED"
        assert node.serving == cloud.baseline
        node.online = True
        node.install(order)
        assert node.serving == order.package


def test_a_swapper_needs_no_cloud(node: NodeSide, cloud: CloudSide) -> None:
    node.online = False
    node.clock.advance(timedelta(days=4000).total_seconds())
    node.restart()
    assert isinstance(node.swapper, Swapper)
    assert node.read_study() == cloud.baseline
