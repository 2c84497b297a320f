"""The edge's one TOML file: sections, limits with units, and the commented file that `init` writes."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from shared.settings import Section, Settings, read_settings

AeTitle = Annotated[str, Field(pattern=r"^[\x21-\x5b\x5d-\x7e][\x20-\x5b\x5d-\x7e]{0,15}$")]
Port = Annotated[int, Field(ge=0, le=65535, description="a TCP port, 1 to 65535; 0 chooses a free one.")]


class NodeSection(Section):
    state: Path = Field(default=Path("state"), description="a folder that the node owns, on a local disk.")


class PeerSection(Section):
    ae_title: AeTitle = Field(description="an AE title of 1 to 16 characters, no backslash.")
    address: str = Field(default="", description="the peer's IP address or network; empty allows any.")

    @model_validator(mode="after")
    def _address(self) -> PeerSection:
        if self.address:
            ipaddress.ip_network(self.address, strict=False)
        return self


class DicomSection(Section):
    ae_title: AeTitle = Field(default="RADFLEET", description="an AE title of 1 to 16 characters, no backslash.")
    host: str = Field(default="0.0.0.0", description="the address to listen on.")  # noqa: S104  modalities are on the network
    port: Port = 11112
    allow: list[PeerSection] = Field(default=[], description="a list of {ae_title, address}; empty lets nobody in.")


class PacsSection(Section):
    ae_title: AeTitle = Field(description="the PACS's AE title.")
    host: str = Field(min_length=1, description="the PACS's host name or address.")
    port: int = Field(ge=1, le=65535, description="the PACS's DICOM port, 1 to 65535.")


class WebSection(Section):
    host: str = Field(default="127.0.0.1", description="the address to listen on.")
    port: Port = 8080
    certificate: Path | None = Field(default=None, description="a PEM file with the page's certificate chain.")
    key: Path | None = Field(default=None, description="a PEM file with the key of that certificate.")

    @model_validator(mode="after")
    def _encrypted_off_loopback(self) -> WebSection:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        if self.certificate is None and self.host not in {"127.0.0.1", "::1", "localhost"}:
            raise ValueError(f"{self.host} is reachable from the network, so it needs certificate and key")
        return self


class RoomSection(Section):
    spool_limit_bytes: int = Field(default=50_000_000_000, ge=1_000_000, description="bytes, at least 1000000.")
    quarantine_limit_bytes: int = Field(default=5_000_000_000, ge=1_000_000, description="bytes, at least 1000000.")


class SeriesSection(Section):
    quiet_s: float = Field(default=5.0, gt=0, le=600, description="seconds, above 0 and at most 600.")
    hard_limit_s: float = Field(default=120.0, gt=0, le=3600, description="seconds, above 0 and at most 3600.")


class LearningSection(Section):
    features: Literal["features", "off"] = Field(default="features", description='"features" or "off".')


class EdgeConfig(Settings):
    """Everything an operator may set on a node; the paths are absolute."""

    model_config = SettingsConfigDict(env_prefix="RADFLEET_EDGE_")

    node: NodeSection = NodeSection()
    dicom: DicomSection = DicomSection()
    pacs: PacsSection | None = Field(None, description="where reports go; without this section they stay here.")
    web: WebSection = WebSection()
    room: RoomSection = RoomSection()
    series: SeriesSection = SeriesSection()
    learning: LearningSection = LearningSection()

    @property
    def state(self) -> Path:
        return self.node.state

    @property
    def run_folder(self) -> Path:
        return self.node.state / "run"


def load_config(path: Path) -> EdgeConfig:
    """Returns the configuration in `path`, relative paths taken from its folder.

    Raises:
        ConfigError: see `shared.settings.read_settings`.
    """
    config = read_settings(path, EdgeConfig)
    home = path.resolve().parent
    web = config.web
    return config.model_copy(
        update={
            "node": config.node.model_copy(update={"state": home / config.node.state}),
            "web": web.model_copy(
                update={
                    "certificate": web.certificate and home / web.certificate,
                    "key": web.key and home / web.key,
                }
            ),
        }
    )


TEMPLATE = """\
# Radfleet edge node. Research use only, not for diagnosis.
# Every key may be left out; what stands here is the default. Relative paths start at this file's folder.

[node]
state = "state"              # what the node owns: spool, results, labels, keys. On a local disk.

[dicom]                      # the door for modalities and the PACS (C-STORE, C-ECHO)
ae_title = "RADFLEET"
host = "0.0.0.0"
port = 11112                 # 0 chooses a free port and writes it to state/run/ports.json
allow = []                   # who may call, e.g. [{ae_title = "CT1", address = "10.0.0.7"}]; empty: nobody

# [pacs]                     # where reports and evidence images are sent; without it they stay on the node
# ae_title = "PACS"
# host = "10.0.0.2"
# port = 104

[web]                        # the reading page
host = "127.0.0.1"           # another address needs certificate and key
port = 8080
# certificate = "web.pem"    # PEM files; secrets are only ever named by path
# key = "web.key"

[room]
spool_limit_bytes = 50000000000       # a full spool answers 0xA700 to the modality
quarantine_limit_bytes = 5000000000

[series]                     # when a CT or MR series counts as complete
quiet_s = 5.0                # seconds without a new image
hard_limit_s = 120.0         # seconds after the first image, whatever comes

[learning]
features = "features"        # "off": nothing derived from studies leaves this hospital
"""
