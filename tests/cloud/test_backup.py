"""A backup brings back the keys, the registry and every row; a wrong or damaged one brings back nothing."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from cloud.access import audit, people
from cloud.access.authority import load_authority
from cloud.access.backup import MAGIC, PIECE_BYTES, read_backup, write_backup
from cloud.access.keys import load_keys
from cloud.access.tables import nodes
from cloud.config import CloudConfig, load_config
from cloud.parts import Cloud, found
from cloud.store import open_engine
from shared.errors import ConfigError, PeerError, TrustError
from tests.simulators.release import HandClock

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture
def config(tmp_path: Path) -> CloudConfig:
    (tmp_path / "cloud").mkdir()
    path = tmp_path / "cloud" / "cloud.toml"
    path.write_text("[people]\nport = 1\n[nodes]\nport = 2\n")
    config = load_config(path)
    found(config, HandClock())
    return config


@pytest.fixture
def passphrase(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.write_text("a few plain words\n")
    return path


@pytest.fixture
def backup(config: CloudConfig, passphrase: Path, tmp_path: Path) -> Path:
    cloud, file = Cloud(config), tmp_path / "cloud.backup"
    (config.state / "registry").mkdir(exist_ok=True)
    (config.state / "registry" / "large").write_bytes(b"x" * (PIECE_BYTES + 5))
    with cloud.engine.begin() as conn:
        conn.execute(insert(nodes).values(site="a", node="1", invited_at=NOON, report={"studies": 3}))
        audit.record(conn, HandClock(), actor="ada", action="test.wrote", subject="x")
    write_backup(config.state, cloud.engine, file, passphrase)
    return file


def test_everything_that_must_not_be_lost_comes_back(
    config: CloudConfig, backup: Path, passphrase: Path, tmp_path: Path
) -> None:
    state = tmp_path / "new" / "state"
    url = f"sqlite:///{state / 'cloud.sqlite'}"
    read_backup(backup, passphrase, state, url)

    assert load_authority(state / "pki").fingerprint == load_authority(config.pki).fingerprint
    assert load_keys(state / "keys").seal.raw == load_keys(config.keys).seal.raw
    for name in ("ca.key", "cloud.key"):
        assert stat.S_IMODE((state / "pki" / name).stat().st_mode) == 0o600
    for name in ("tuf-snapshot.key", "tuf-timestamp.key", "director.key", "sign.key"):
        assert (state / "keys" / name).read_bytes() == (config.keys / name).read_bytes()
    assert (state / "registry" / "large").stat().st_size == PIECE_BYTES + 5
    engine = open_engine(url)
    with engine.begin() as conn:
        row = conn.execute(select(nodes)).one()
        assert (row.site, row.invited_at, row.report) == ("a", NOON, {"studies": 3})
        before = audit.verify(conn)[0]
        audit.record(conn, HandClock(), actor="ada", action="test.wrote", subject="after")
        assert audit.verify(conn)[0] == before + 1
        assert people.has_people(conn)
    engine.dispose()


def test_no_secret_is_readable_in_the_file(config: CloudConfig, backup: Path) -> None:
    data = backup.read_bytes()
    assert data.startswith(MAGIC)
    for path in (config.pki / "ca.key", config.keys / "seal.key"):
        assert path.read_bytes()[30:60] not in data
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["passphrase", "changed", "cut at a piece", "cut", "other file"])
def test_a_backup_that_is_not_whole_restores_nothing(
    backup: Path, passphrase: Path, tmp_path: Path, damage: str
) -> None:
    data = bytearray(backup.read_bytes())
    head = len(MAGIC) + 16 + 7
    if damage == "passphrase":
        passphrase.write_text("another passphrase\n")
    elif damage == "changed":
        data[head + 1000] ^= 1
    elif damage == "cut at a piece":
        data = data[: head + PIECE_BYTES + 16]
    elif damage == "cut":
        data = data[:-1]
    else:
        data = bytearray(b"something else entirely, long enough to be a head")
    backup.write_bytes(data)
    state = tmp_path / "new" / "state"
    with pytest.raises((TrustError, PeerError)):
        read_backup(backup, passphrase, state, f"sqlite:///{state / 'cloud.sqlite'}")
    assert list(state.rglob("*")) == []


def test_a_cloud_that_is_there_is_not_overwritten(config: CloudConfig, backup: Path, passphrase: Path) -> None:
    with pytest.raises(ConfigError, match="There is a cloud"):
        read_backup(backup, passphrase, config.state, config.database.url)


def test_a_short_passphrase_is_refused(config: CloudConfig, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(ConfigError, match="too short"):
        write_backup(config.state, Cloud(config).engine, tmp_path / "file", tmp_path / "short")
    assert not (tmp_path / "file").exists()
