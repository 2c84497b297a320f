"""The two command lines as an administrator types them: what they print, and how they end."""

from __future__ import annotations

import io
import json
import re
import stat
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

import cloud.cli
import edge.cli
from scripts.lab.child import Child, free_port

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def run(side: str, *words: str | Path) -> Done:
    """Runs a command line: `run` as a process of its own, everything else in this one, which is quicker."""
    line = [str(word) for word in words]
    if line[0] == "run":
        command = [sys.executable, "-m", side, *line]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        return Done(done.returncode, done.stdout, done.stderr)
    status, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [f"radfleet-{side}", *line])
        try:
            {"edge": edge.cli, "cloud": cloud.cli}[side].main()
        except SystemExit as exc:
            status = int(exc.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def refused(done: Done, status: int) -> str:
    """Checks that a command ended as an error of ours does, and returns what it said."""
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: ")
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sides")


@pytest.fixture(scope="module")
def node(folder: Path) -> Path:
    """A founded node; its configuration."""
    (folder / "edge").mkdir()
    config = folder / "edge" / "edge.toml"
    config.write_text(f'[dicom]\nhost = "127.0.0.1"\nport = 0\n[web]\nport = {free_port()}\n')
    done = run("edge", "init", folder / "edge")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"http://127\.0\.0\.1:\d+/welcome/[\w-]{43}", done.stdout)) == 1
    return config


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Path:
    """A founded cloud without officers; its configuration."""
    (folder / "cloud").mkdir()
    config = folder / "cloud" / "cloud.toml"
    config.write_text(f"[people]\nport = {free_port()}\n[nodes]\nport = {free_port()}\n")
    done = run("cloud", "init", folder / "cloud")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"https://localhost:\d+/welcome/[\w-]{43}", done.stdout)) == 1
    return config


class TestEdge:
    def test_init_again_prints_no_second_link_and_replaces_nothing(self, node: Path) -> None:
        key = (node.parent / "state" / "site.key").read_bytes()
        done = run("edge", "init", node.parent)
        assert done.returncode == 0
        assert "/welcome/" not in done.stdout
        assert (node.parent / "state" / "site.key").read_bytes() == key

    def test_the_state_is_the_owners_alone(self, node: Path) -> None:
        state = node.parent / "state"
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert stat.S_IMODE((state / "site.key").stat().st_mode) == 0o600

    def test_init_writes_a_commented_file_where_there_is_none(self, tmp_path: Path) -> None:
        assert run("edge", "init", tmp_path / "new").returncode == 0
        text = (tmp_path / "new" / "edge.toml").read_text()
        for section in ("[node]", "[dicom]", "# [pacs]", "[web]", "[room]", "[series]", "[learning]"):
            assert section in text

    def test_all_faults_of_the_file_are_said_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "edge.toml").write_text('[dicom]\nport = "x"\n[web]\nhost = "10.0.0.1"\n[nonsense]\n')
        said = refused(run("edge", "run", "--config", tmp_path / "edge.toml"), 78)
        for key in ("dicom.port", "web", "nonsense"):
            assert f"{tmp_path / 'edge.toml'}: {key}: " in said
        assert said.count("Cure: ") == 3

    def test_running_a_node_that_is_not_there_says_what_to_do(self, tmp_path: Path) -> None:
        (tmp_path / "edge.toml").write_text("")
        assert "radfleet-edge init" in refused(run("edge", "run", "--config", tmp_path / "edge.toml"), 78)
        assert "run init" in refused(run("edge", "status", "--config", tmp_path / "absent.toml"), 78)

    def test_a_process_that_does_not_exist(self, node: Path) -> None:
        assert "intake, pipeline" in refused(run("edge", "run", "--only", "everything", "--config", node), 78)

    def test_status_before_anything_ran(self, node: Path) -> None:
        done = run("edge", "status", "--json", "--config", node)
        report = json.loads(done.stdout)
        assert report["node"] is None
        assert report["processes"] == {}
        assert report["report"]["slots"][0]["state"] == "COMMITTED"
        assert "not enrolled" in run("edge", "status", "--config", node).stdout

    def test_check_tells_every_fault_and_ends_with_78(self, node: Path) -> None:
        model = next((node.parent / "state" / "models").glob("*/golden.safetensors"))
        kept = model.read_bytes()
        model.write_bytes(kept[:-1] + b"x")
        said = refused(run("edge", "check", "--config", node), 78)
        model.write_bytes(kept)
        assert "every modality is refused" in said
        assert "golden.safetensors is missing or is not the file" in said

    def test_enrolling_with_what_is_no_token(self, node: Path) -> None:
        assert "not an enrolment token" in refused(
            run("edge", "enrol", "https://localhost:1", "x", "--config", node), 65
        )

    def test_a_person_gets_a_link(self, node: Path) -> None:
        done = run("edge", "person", "ada", "--role", "radiologist", "--config", node)
        assert re.search(r"/welcome/[\w-]{43}", done.stdout)
        refused(run("edge", "person", "ada", "--role", "king", "--config", node), 65)

    def test_a_node_that_is_not_enrolled_answers_and_stops_when_asked(self, node: Path, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "edge", "run", "--config", node]
        running = Child("edge", command, log=tmp_path / "edge.log")
        ready = node.parent / "state" / "run" / "ready.json"
        running.wait_ready("the node", ready.exists, seconds=90)
        facts = json.loads(ready.read_text())
        assert set(facts) == {"intake", "pipeline", "uplink", "web"}
        assert facts["uplink"]["node"] == "not enrolled"
        running.process.terminate()
        assert running.process.wait(40) == 0
        assert not any(Path(f"/proc/{one['pid']}").exists() for one in facts.values())


class TestCloud:
    def test_init_again_prints_no_second_link_and_replaces_nothing(self, fleet: Path) -> None:
        key = (fleet.parent / "state" / "pki" / "ca.key").read_bytes()
        done = run("cloud", "init", fleet.parent)
        assert done.returncode == 0
        assert "/welcome/" not in done.stdout
        assert (fleet.parent / "state" / "pki" / "ca.key").read_bytes() == key

    def test_no_private_key_is_readable_by_others(self, fleet: Path) -> None:
        keys = list((fleet.parent / "state").rglob("*.key"))
        assert len(keys) == 9
        for key in keys:
            assert stat.S_IMODE(key.stat().st_mode) == 0o600, key

    def test_a_node_is_not_invited_before_there_is_something_it_could_trust(self, fleet: Path) -> None:
        refused(run("cloud", "invite", "hospital-a", "edge-1", "--config", fleet), 74)

    def test_which_nodes_must_be_said(self, fleet: Path) -> None:
        assert "--all" in refused(run("cloud", "rollout", "2", "--config", fleet), 78)

    def test_a_release_that_does_not_exist(self, fleet: Path) -> None:
        assert "not published" in refused(run("cloud", "rollout", "2", "--all", "--config", fleet), 65)

    def test_a_campaign_needs_nodes(self, fleet: Path) -> None:
        assert "No node serves" in refused(run("cloud", "campaign", "start", "--config", fleet), 65)

    def test_the_audit_log_is_verified(self, fleet: Path) -> None:
        done = run("cloud", "audit", "verify", "--config", fleet)
        assert re.search(r"^\d+ entries, unchanged\. Newest digest: [0-9a-f]{64}$", done.stdout.strip())

    def test_a_backup_is_restored_elsewhere(self, fleet: Path, tmp_path: Path) -> None:
        (tmp_path / "passphrase").write_text("a few plain words\n")
        words = [tmp_path / "backup", "--passphrase-file", tmp_path / "passphrase"]
        assert run("cloud", "backup", *words, "--config", fleet).returncode == 0
        (tmp_path / "cloud.toml").write_text("")
        assert run("cloud", "restore", *words, "--config", tmp_path / "cloud.toml").returncode == 0
        for name in ("pki/ca.key", "keys/seal.key", "keys/director.key"):
            assert (tmp_path / "state" / name).read_bytes() == (fleet.parent / "state" / name).read_bytes()
        refused(run("cloud", "restore", *words, "--config", fleet), 78)
