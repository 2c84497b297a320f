"""The two TOML files: what `init` writes is good, and all faults are told at once with file, key and cure."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

import cloud.config
import edge.config
from shared.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "side.toml"


def faults(module: ModuleType, path: Path, text: str) -> list[str]:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        module.load_config(path)
    assert str(path) in caught.value.message
    return list(caught.value.faults)


@pytest.mark.parametrize("module", [edge.config, cloud.config], ids=["edge", "cloud"])
def test_what_init_writes_says_the_defaults(module: ModuleType, path: Path) -> None:
    path.write_text(module.TEMPLATE)
    written = module.load_config(path)
    path.write_text("")
    assert module.load_config(path) == written
    assert written.state == path.parent / "state"


def test_all_faults_come_at_once_with_file_key_and_cure(path: Path) -> None:
    found = faults(
        edge.config,
        path,
        '[dicom]\nport = 70000\nae_title = "THIS TITLE IS FAR TOO LONG"\n'
        'allow = [{ae_title = "CT1", adress = "10.0.0.7"}]\n'
        "[series]\nquiet_s = -1\n[learning]\nfeatures = 3\n[spool]\n",
    )
    for key in ("dicom.port", "dicom.ae_title", "dicom.allow.0.adress", "series.quiet_s", "learning.features", "spool"):
        (fault,) = [fault for fault in found if f": {key}: " in fault]
        assert fault.startswith(f"{path}: {key}: ")
        assert "Cure: " in fault
    assert len(found) == 6
    assert "ae_title, address" in next(fault for fault in found if "adress" in fault)


def test_a_page_on_the_network_needs_a_certificate(path: Path) -> None:
    (fault,) = faults(edge.config, path, '[web]\nhost = "10.0.0.9"\n')
    assert "needs certificate and key" in fault
    (fault,) = faults(edge.config, path, '[web]\ncertificate = "web.pem"\n')
    assert "go together" in fault
    path.write_text('[web]\nhost = "10.0.0.9"\ncertificate = "web.pem"\nkey = "/etc/web.key"\n')
    web = edge.config.load_config(path).web
    assert (web.certificate, web.key) == (path.parent / "web.pem", Path("/etc/web.key"))


def test_a_pacs_is_whole_or_absent(path: Path) -> None:
    assert len(faults(edge.config, path, "[pacs]\nport = 104\n")) == 2
    path.write_text("")
    assert edge.config.load_config(path).pacs is None


def test_the_environment_overrides_a_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("[web]\nport = 1234\n[dicom]\nport = 5678\n")
    monkeypatch.setenv("RADFLEET_EDGE_WEB__PORT", "4321")
    config = edge.config.load_config(path)
    assert (config.web.port, config.dicom.port) == (4321, 5678)


def test_what_is_not_toml_says_where(path: Path) -> None:
    path.write_text("[web\n")
    with pytest.raises(ConfigError, match=r"not TOML.*line 1"):
        edge.config.load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        edge.config.load_config(path.with_name("absent.toml"))


def test_empty_urls_stand_for_the_state_folder(path: Path) -> None:
    path.write_text("")
    config = cloud.config.load_config(path)
    assert config.database.url == f"sqlite:///{path.parent / 'state' / 'cloud.sqlite'}"
    assert config.objects.url == str(path.parent / "state" / "objects")
    assert len(faults(cloud.config, path, '[database]\nurl = "mysql://x"\n[redis]\nurl = "x"\n')) == 2
