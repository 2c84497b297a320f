"""Officers, the release repository and the director: what they sign, what they refuse, and crashes in between."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import select
from tuf.api.metadata import Metadata, Targets

from cloud.objects import Objects
from cloud.registry import tables
from cloud.registry.director import Named
from cloud.registry.officer import create_officer, sign_proposal
from cloud.registry.repository import ReleaseRepository
from cloud.store import open_engine, upgrade
from edge.slots.verify import refresh
from shared.errors import PeerError, StateError, TrustError
from shared.package.release import node_path, release_path
from tests.simulators.package import MODEL, build_package, change_one_weight
from tests.simulators.release import CloudSide, HandClock, passing


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def cloud(tmp_path: Path, clock: HandClock) -> CloudSide:
    return CloudSide(tmp_path, clock)


def look_up(cloud: CloudSide, repository: str, target: str) -> Metadata | None:
    """What a client that pinned root 1 and knows nothing else is told about `target`."""
    folder = cloud.folder / ("registry" if repository == "release" else "director") / "metadata"
    root = (folder / "1.root.json").read_bytes()

    def get(path: str, _limit: int) -> bytes | None:
        file = folder / path.rpartition("/")[2]
        return file.read_bytes() if file.exists() else None

    found = refresh(root, {}, target, base=f"/tuf/{repository}/", get=get, now=cloud.clock.now())
    if found.error:
        raise found.error
    return found.target


class TestOfficer:
    def test_the_founding_release_and_the_next_are_found_by_a_client(self, cloud: CloudSide) -> None:
        cloud.release(2)
        for release in (1, 2):
            target = look_up(cloud, "release", release_path(release))
            assert target is not None
            assert target.hashes["sha256"] == cloud.digests[release]

    def test_signs_as_a_process_of_its_own(self, cloud: CloudSide) -> None:
        proposal = cloud.propose(2)
        code = (
            "import sys; from pathlib import Path; from cloud.registry.officer import sign_proposal; "
            "sign_proposal(*map(Path, sys.argv[1:]))"
        )
        for officer in cloud.officers:
            subprocess.run([sys.executable, "-c", code, officer, proposal], check=True, timeout=60)
        cloud.repository.publish(proposal)
        assert set(cloud.repository.releases()) == {1, 2}

    def test_refuses_a_package_that_is_not_its_manifest(self, cloud: CloudSide) -> None:
        proposal = cloud.propose(2)
        change_one_weight(proposal / "package" / MODEL)
        with pytest.raises(TrustError, match=MODEL):
            sign_proposal(cloud.officers[0], proposal)
        assert list((proposal / "signatures").iterdir()) == []

    def test_refuses_a_verdict_about_another_package(self, cloud: CloudSide) -> None:
        proposal = cloud.propose(2)
        (proposal / "verdict.json").write_bytes(passing(cloud.baseline))
        with pytest.raises(TrustError, match="verdict judged"):
            sign_proposal(cloud.officers[0], proposal)

    @pytest.mark.parametrize("decision", ["fail", "insufficient"])
    def test_refuses_a_verdict_that_does_not_pass(self, cloud: CloudSide, decision: str) -> None:
        proposal = cloud.propose(2)
        (proposal / "verdict.json").write_bytes(passing(cloud.digests[2], decision))
        with pytest.raises(TrustError, match=decision):
            sign_proposal(cloud.officers[0], proposal)
        cloud.build(3)
        with pytest.raises(TrustError, match=decision):
            cloud.repository.propose_release(
                cloud.packages / "3", cloud.digests[3], 3, passing(cloud.digests[3], decision)
            )

    def test_refuses_a_verdict_that_the_list_does_not_name(self, cloud: CloudSide) -> None:
        proposal = cloud.propose(2)
        record = msgspec.json.decode((proposal / "verdict.json").read_bytes())
        (proposal / "verdict.json").write_bytes(msgspec.json.encode(record | {"reasons": ["said later"]}))
        with pytest.raises(TrustError, match="another package or verdict"):
            sign_proposal(cloud.officers[0], proposal)

    def test_refuses_a_number_that_does_not_go_up(self, cloud: CloudSide) -> None:
        """Release 3 was signed by ada and never published; a release 2 proposed after it is older."""
        sign_proposal(cloud.officers[0], cloud.propose(3))
        late = cloud.propose(2)
        with pytest.raises(TrustError, match="not above"):
            sign_proposal(cloud.officers[0], late)

    def test_signs_the_same_proposal_again(self, cloud: CloudSide) -> None:
        proposal = cloud.propose(2)
        first = sign_proposal(cloud.officers[0], proposal)
        before = first.read_bytes()
        first.unlink()
        assert sign_proposal(cloud.officers[0], proposal).read_bytes() == before

    def test_refuses_a_list_that_drops_or_changes_a_release(self, cloud: CloudSide) -> None:
        proposal = cloud.propose(2)
        metadata = Metadata[Targets].from_bytes((proposal / "targets.json").read_bytes())
        del metadata.signed.targets[release_path(1)]
        (proposal / "targets.json").write_bytes(metadata.to_bytes())
        with pytest.raises(TrustError, match="more than add"):
            sign_proposal(cloud.officers[0], proposal)

    def test_refuses_a_second_root(self, cloud: CloudSide, tmp_path: Path, clock: HandClock) -> None:
        other = CloudSide(tmp_path / "other", clock)
        with pytest.raises(TrustError, match="another root"):
            sign_proposal(cloud.officers[0], other.repository.proposals / "root")

    def test_refuses_a_root_that_gives_the_cloud_an_officers_right(self, tmp_path: Path, clock: HandClock) -> None:
        cloud = CloudSide(tmp_path / "honest", clock)
        proposal = cloud.repository.proposals / "root"
        root = Metadata.from_bytes((proposal / "root.json").read_bytes())
        root.signed.add_key(root.signed.keys[root.signed.roles["snapshot"].keyids[0]], "targets")
        (proposal / "root.json").write_bytes(root.to_bytes())
        create_officer(tmp_path / "new", "new")
        with pytest.raises(TrustError, match="online key"):
            sign_proposal(tmp_path / "new", proposal)

    def test_a_threshold_of_one_is_refused(self, cloud: CloudSide, tmp_path: Path) -> None:
        proposal = cloud.repository.proposals / "root"
        root = Metadata.from_bytes((proposal / "root.json").read_bytes())
        root.signed.roles["targets"].threshold = 1
        (proposal / "root.json").write_bytes(root.to_bytes())
        create_officer(tmp_path / "new", "new")
        with pytest.raises(TrustError, match="need 2 officers"):
            sign_proposal(tmp_path / "new", proposal)

    def test_one_officer_twice_is_no_fleet(self, cloud: CloudSide, tmp_path: Path, clock: HandClock) -> None:
        public = cloud.officers[0] / "public.json"
        with pytest.raises(PeerError, match="at least 2 officers"):
            cloud.repository.propose_root([public, public])

    def test_a_folder_has_one_officer(self, cloud: CloudSide) -> None:
        with pytest.raises(StateError, match="another officer"):
            create_officer(cloud.officers[0], "mallory")
        with pytest.raises(PeerError):
            create_officer(cloud.officers[0], "../ada")


class TestFreshness:
    def test_a_month_of_refreshing_keeps_both_repositories_valid(self, cloud: CloudSide, clock: HandClock) -> None:
        cloud.release(2)
        cloud.name(2)
        for _ in range(90):
            clock.advance(timedelta(hours=8).total_seconds())
            cloud.repository.refresh()
            cloud.director.refresh()
            assert look_up(cloud, "release", release_path(2)) is not None
            assert look_up(cloud, "director", node_path("a", "node1")) is not None

    def test_nothing_is_signed_while_everything_is_fresh(self, cloud: CloudSide) -> None:
        assert not cloud.repository.refresh()
        assert not cloud.director.refresh()


class TestDirector:
    def test_names_and_takes_back(self, cloud: CloudSide) -> None:
        cloud.release(2)
        releases = cloud.repository.releases()
        cloud.director.assign({("a", "n"): Named(2), ("b", "n"): Named(1, downgrade=True)}, releases)
        said = cloud.director.assignments()
        assert (said["a", "n"].release, said["a", "n"].allow_downgrade_to) == (2, None)
        assert (said["b", "n"].release, said["b", "n"].allow_downgrade_to) == (1, 1)
        cloud.director.assign({("a", "n"): None}, releases)
        assert set(cloud.director.assignments()) == {("b", "n")}

    def test_names_only_what_is_published(self, cloud: CloudSide) -> None:
        cloud.propose(2)
        with pytest.raises(TrustError, match="not published"):
            cloud.director.assign({("a", "n"): Named(2)}, cloud.repository.releases())


class TestCrash:
    @pytest.mark.parametrize("write", range(1, 6))
    def test_cut_off_at_any_write_of_publishing(
        self, cloud: CloudSide, monkeypatch: pytest.MonkeyPatch, write: int
    ) -> None:
        """A client sees the old list or the new one; publishing again ends with the new one."""
        proposal = cloud.propose(2)
        for officer in cloud.officers:
            sign_proposal(officer, proposal)
        from cloud.registry import shelf

        original, done = shelf.atomic_write, []

        def cut(*args: object, **more: object) -> None:
            done.append(args)
            if len(done) == write:
                raise StateError("the power went")
            original(*args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(shelf, "atomic_write", cut)
        reached = write <= 3  # targets, snapshot, timestamp
        if reached:
            with pytest.raises(StateError):
                cloud.repository.publish(proposal)
        else:
            cloud.repository.publish(proposal)
        monkeypatch.undo()
        assert (look_up(cloud, "release", release_path(2)) is None) == reached
        assert look_up(cloud, "release", release_path(1)) is not None
        cloud.open_repository().publish(proposal)
        assert look_up(cloud, "release", release_path(2)) is not None

    def test_a_proposal_cut_off_is_not_there(self, cloud: CloudSide, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cloud.registry.repository.fsync_folder", lambda _p: None)
        monkeypatch.setattr(Path, "rename", _raise)
        with pytest.raises(OSError, match="cut"):
            cloud.propose(2)
        monkeypatch.undo()
        assert [p.name for p in cloud.repository.proposals.glob("[!.]*/")] == ["root"]
        assert cloud.repository.next_release() == 2
        cloud.release(2)
        assert cloud.repository.next_release() == 3

    def test_proposing_twice_is_one_proposal_even_after_it_was_published(self, cloud: CloudSide) -> None:
        first = cloud.propose(2)
        assert cloud.propose(2) == first
        cloud.sign_and_publish(first)
        assert cloud.propose(2) == first
        other = cloud.packages / "other"
        digest = build_package(other, 2, seed=77)
        with pytest.raises(TrustError, match="Another package"):
            cloud.repository.propose_release(other, digest, 2, passing(digest))

    def test_publishing_twice_writes_once(self, cloud: CloudSide) -> None:
        cloud.release(2)
        before = sorted((p.name, p.stat().st_mtime_ns) for p in (cloud.folder / "registry/metadata").iterdir())
        cloud.repository.publish(cloud.repository.proposals / "release-2")
        cloud.repository.publish(cloud.repository.proposals / "root")
        after = sorted((p.name, p.stat().st_mtime_ns) for p in (cloud.folder / "registry/metadata").iterdir())
        assert [b for b in before if b[0] != ".lock"] == [a for a in after if a[0] != ".lock"]


class TestTable:
    def test_follows_the_repository(self, cloud: CloudSide, tmp_path: Path, clock: HandClock) -> None:
        url = f"sqlite:///{tmp_path}/cloud.sqlite"
        upgrade(url)
        engine = open_engine(url)

        def states() -> dict[int, str]:
            with engine.begin() as conn:
                tables.sync(conn, cloud.repository, clock.now())
                assert tables.sync(conn, cloud.repository, clock.now()) == 0
                rows = conn.execute(select(tables.releases)).all()
                return {r.release: r.state for r in rows}

        assert states() == {1: "published"}
        proposal = cloud.propose(2)
        assert states() == {1: "published", 2: "proposed"}
        for officer in cloud.officers:
            sign_proposal(officer, proposal)
        assert states() == {1: "published", 2: "signed"}
        cloud.repository.publish(proposal)
        assert states() == {1: "published", 2: "published"}
        with engine.begin() as conn:
            row = conn.execute(select(tables.releases).where(tables.releases.c.release == 2)).one()
        assert row.verdict == passing(cloud.digests[2])
        assert row.package == cloud.digests[2]
        assert row.signed_at
        assert row.published_at

    def test_every_file_of_a_release_is_a_blob(self, cloud: CloudSide, tmp_path: Path) -> None:
        objects = Objects(str(tmp_path / "store"))
        cloud.blobs = objects  # type: ignore[assignment]
        cloud.repository = ReleaseRepository(
            cloud.folder / "registry", cloud.folder / "keys", blobs=objects, clock=cloud.clock
        )
        cloud.release(2)
        manifest = cloud.repository.manifest(2)
        for digest in (cloud.digests[2], *(f.sha256 for f in manifest.files)):
            assert objects.has(digest)


def _raise(*_: object) -> None:
    raise OSError("cut")


def test_online_keys_are_the_clouds_alone(cloud: CloudSide) -> None:
    keys = list((cloud.folder / "keys").iterdir())
    assert {k.name for k in keys} == {"tuf-snapshot.key", "tuf-timestamp.key", "director.key"}
    assert all(k.stat().st_mode & 0o077 == 0 for k in keys)
