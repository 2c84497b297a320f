"""The edge's one TOML file: sections, limits with units, and the commented file that `init` writes."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from edge.forward.rules import SENT, Action, Priority, Rule
from shared.settings import Section, Settings, read_settings

AeTitle = Annotated[str, Field(pattern=r"^[\x21-\x5b\x5d-\x7e][\x20-\x5b\x5d-\x7e]{0,15}$")]
Port = Annotated[int, Field(ge=0, le=65535, description="a TCP port, 1 to 65535; 0 chooses a free one.")]


class NodeSection(Section):
    state: Path = Field(default=Path("state"), description="a folder that the node owns, on a local disk.")


class PeerSection(Section):
    ae_title: AeTitle = Field(description="an AE title of 1 to 16 characters, no backslash.")
    address: str = Field(default="", description="the peer's IP address or network; empty allows any.")
    port: int = Field(default=0, ge=0, le=65535, description="where the peer listens, for commitment reports.")
    associations: int = Field(default=112, ge=1, le=112, description="associations at a time, 1 to 112.")
    objects_per_second: float = Field(default=0.0, ge=0, description="objects a second, 0 for no limit.")
    object_limit_bytes: int = Field(default=4_294_967_296, ge=1, description="bytes of one object.")

    @model_validator(mode="after")
    def _address(self) -> PeerSection:
        if self.address:
            ipaddress.ip_network(self.address, strict=False)
        return self


class TlsSection(Section):
    port: Port = 2762
    certificate: Path = Field(description="a PEM file with the door's certificate chain.")
    key: Path = Field(description="a PEM file with the key of that certificate.")
    ca: Path = Field(description="a PEM file with the CAs of the clients that may call.")
    profile: Literal["bcp195", "non-downgrading"] = Field(
        default="bcp195", description='"bcp195" or "non-downgrading".'
    )
    only: bool = Field(
        default=True, description="true closes the plain port, and reports of Storage Commitment go out over TLS."
    )


class DicomSection(Section):
    ae_title: AeTitle = Field(default="RADFLEET", description="an AE title of 1 to 16 characters, no backslash.")
    host: str = Field(default="0.0.0.0", description="the address to listen on.")  # noqa: S104  modalities are on the network
    port: Port = 11112
    allow: list[PeerSection] = Field(default=[], description="a list of {ae_title, address}; empty lets nobody in.")
    private_classes: list[str] = Field(default=[], max_length=100, description="private storage SOP class UIDs.")
    tls: TlsSection | None = Field(default=None, description="a second port that speaks TLS with client certificates.")


class PacsSection(Section):
    ae_title: AeTitle = Field(description="the PACS's AE title.")
    host: str = Field(min_length=1, description="the PACS's host name or address.")
    port: int = Field(ge=1, le=65535, description="the PACS's DICOM port, 1 to 65535.")


_Pattern = Annotated[str, Field(min_length=1, max_length=128)]
Patterns = Annotated[
    list[_Pattern],
    Field(max_length=32, description="at most 32 shell patterns of at most 128 characters, any case; empty takes all."),
]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")]


class DestinationSection(Section):
    name: _Name = Field(description="1 to 32 letters, digits, dots, dashes; rules use it.")
    ae_title: AeTitle = Field(description="its AE title, 1 to 16 characters, no backslash.")
    host: str = Field(min_length=1, max_length=255, description="its host name or address.")
    port: int = Field(ge=1, le=65535, description="its DICOM port, 1 to 65535.")
    ca: Path | None = Field(default=None, description="a PEM file with the CAs that it is trusted by; turns on TLS.")
    certificate: Path | None = Field(default=None, description="a PEM file with our certificate chain, for TLS.")
    key: Path | None = Field(default=None, description="a PEM file with the key of that certificate.")

    @model_validator(mode="after")
    def _whole_tls(self) -> DestinationSection:
        if (self.certificate is None) != (self.key is None) or (self.certificate and self.ca is None):
            raise ValueError("certificate and key go together, and with ca")
        return self


class RuleSection(Section):
    name: str = Field(default="", max_length=64, description="a name for people, at most 64 characters.")
    action: Action = Field(description='"analyse", "forward", "both", "keep" or "ignore".')
    destinations: list[str] = Field(default=[], max_length=16, description="names of [[destination]], at most 16.")
    priority: Priority = Field(default="normal", description='"high", "normal" or "low".')
    modality: Patterns = Field(default=[])
    calling_ae: Patterns = Field(default=[])
    called_ae: Patterns = Field(default=[])
    sop_class: Patterns = Field(default=[])
    body_part: Patterns = Field(default=[])
    study_description: Patterns = Field(default=[])
    series_description: Patterns = Field(default=[])

    @model_validator(mode="after")
    def _destinations_where_sent(self) -> RuleSection:
        if (self.action in SENT) != bool(self.destinations):
            raise ValueError("forward and both need destinations, the other actions have none")
        return self


class FetchSection(Section):
    source: str = Field(description="name of the [[destination]] that is asked.")
    what: Literal["priors", "series"] = Field(description='"priors" or "series".')
    modality: Patterns = Field(default=[])
    body_part: Patterns = Field(default=[])
    count: int = Field(default=1, ge=1, le=20, description="how many priors, 1 to 20.")
    within_days: int = Field(default=1095, ge=1, le=36500, description="how old a prior may be, days, 1 to 36500.")


Origin = Annotated[str, Field(pattern=r"^https?://[0-9A-Za-z.\[\]:-]+$")]


class WebSection(Section):
    host: str = Field(default="127.0.0.1", description="the address to listen on.")
    port: Port = 8080
    certificate: Path | None = Field(default=None, description="a PEM file with the page's certificate chain.")
    key: Path | None = Field(default=None, description="a PEM file with the key of that certificate.")
    viewer_origins: list[Origin] = Field(
        default=[], max_length=16, description='origins such as "https://viewer.hospital", at most 16.'
    )

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
    retention_days: float = Field(default=14.0, gt=0, le=3650, description="days, above 0 and at most 3650.")
    keep_hours: float = Field(default=24.0, ge=0, le=87_600, description="hours, 0 to 87600.")


class SeriesSection(Section):
    quiet_s: float = Field(default=5.0, gt=0, le=600, description="seconds, above 0 and at most 600.")
    hard_limit_s: float = Field(default=120.0, gt=0, le=3600, description="seconds, above 0 and at most 3600.")


class LearningSection(Section):
    features: Literal["features", "off"] = Field(default="features", description='"features" or "off".')


_PEM = ("ca", "certificate", "key")


class EdgeConfig(Settings):
    """Everything an operator may set on a node; the paths are absolute."""

    model_config = SettingsConfigDict(env_prefix="RADFLEET_EDGE_")

    node: NodeSection = NodeSection()
    dicom: DicomSection = DicomSection()
    pacs: PacsSection | None = Field(None, description="where reports go; without this section they stay here.")
    destination: list[DestinationSection] = Field(
        [], max_length=32, description="at most 32, each with a name of its own."
    )
    rule: list[RuleSection] = Field(
        [], max_length=200, description="at most 200; forward and both name the [[destination]] they mean."
    )
    fetch: list[FetchSection] = Field([], max_length=32, description="at most 32; source names a [[destination]].")
    web: WebSection = WebSection()
    room: RoomSection = RoomSection()
    series: SeriesSection = SeriesSection()
    learning: LearningSection = LearningSection()

    @field_validator("destination")
    @classmethod
    def _names_once(cls, found: list[DestinationSection]) -> list[DestinationSection]:
        names = [one.name for one in found]
        if len(set(names)) < len(names):
            raise ValueError(
                f"names stand twice: {', '.join(sorted({name for name in names if names.count(name) > 1}))}"
            )
        return found

    @field_validator("rule", "fetch")
    @classmethod
    def _known_destinations(cls, found: list[Any], info: ValidationInfo) -> list[Any]:
        if "destination" not in info.data:
            return found  # its own faults are told
        known = {one.name for one in info.data["destination"]}
        wrong = [
            f"{info.field_name} {number} names {name!r}"
            for number, one in enumerate(found, 1)
            for name in (one.destinations if isinstance(one, RuleSection) else [one.source])
            if name not in known
        ]
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}: no such [[destination]], there are: {', '.join(known) or 'none'}")
        return found

    @property
    def rules(self) -> list[Rule]:
        """The [[rule]] sections in their order, each with a name."""
        return [
            Rule(**{**_tuples(one), "name": f"rule {number}" + (f" ({one.name})" if one.name else "")})
            for number, one in enumerate(self.rule, 1)
        ]

    @property
    def state(self) -> Path:
        return self.node.state

    @property
    def run_folder(self) -> Path:
        return self.node.state / "run"


def _tuples(section: Section) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in section.model_dump().items()}


def load_config(path: Path) -> EdgeConfig:
    """Returns the configuration in `path`, relative paths taken from its folder.

    Raises:
        ConfigError: see `shared.settings.read_settings`.
    """
    config = read_settings(path, EdgeConfig)
    home = path.resolve().parent
    web, tls = config.web, config.dicom.tls
    if tls:
        paths = {name: home / getattr(tls, name) for name in ("certificate", "key", "ca")}
        dicom = config.dicom.model_copy(update={"tls": tls.model_copy(update=paths)})
    else:
        dicom = config.dicom
    return config.model_copy(
        update={
            "destination": [
                one.model_copy(update={name: home / path for name in _PEM if (path := getattr(one, name))})
                for one in config.destination
            ],
            "dicom": dicom,
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
allow = []                   # who may call, e.g. [{ae_title = "CT*", address = "10.0.0.0/24"}]; empty: nobody.
                             # More keys: port (for commitment reports), associations, objects_per_second,
                             # object_limit_bytes. Unknown callers wait on the page, where one click admits them.
private_classes = []         # storage SOP class UIDs that no standard names

# [dicom.tls]                # a second port: TLS 1.2 or 1.3, client certificates required
# port = 2762
# certificate = "door.pem"   # read again when the files change
# key = "door.key"
# ca = "modalities.pem"
# profile = "bcp195"         # or "non-downgrading"
# only = true                # false keeps the plain port open as well; reports of Storage Commitment then go out plain

# [pacs]                     # where reports and evidence images are sent; without it they stay on the node
# ae_title = "PACS"
# host = "10.0.0.2"
# port = 104

# [[destination]]            # an archive that objects are forwarded to, and fetched from
# name = "archive"           # what rules call it
# ae_title = "ARCHIVE"
# host = "10.0.0.3"
# port = 104
# ca = "pacs-ca.pem"         # turns on TLS; certificate and key where the archive asks for ours

# [[rule]]                   # the first rule that matches decides; without one an object is analysed
# name = "mammography"
# modality = ["MG"]          # shell patterns, any case; also calling_ae, called_ae, sop_class (UID or keyword),
# body_part = ["BREAST*"]    # body_part, study_description, series_description
# action = "both"            # analyse, forward, both, keep (neither, but kept), ignore (neither)
# destinations = ["archive"]
# priority = "high"          # high, normal, low: the order in the queue, and what the archive is told; high is read
                             # before all others, as images are that say STAT or HIGH themselves

# [[fetch]]                  # asks an archive by C-FIND and C-MOVE; it must know our AE title, host and port
# source = "archive"
# what = "priors"            # of patient and modality, kept and not analysed; "series": images that a series lacks
# modality = ["CR", "DX"]    # of what arrives; body_part too
# count = 1                  # priors, the newest first
# within_days = 1095

[web]                        # the reading page
host = "127.0.0.1"           # another address needs certificate and key
port = 8080
# certificate = "web.pem"    # PEM files; secrets are only ever named by path
# key = "web.key"
viewer_origins = []          # other sites whose viewer (OHIF) may read /dicom-web with a bearer token

[room]
spool_limit_bytes = 50000000000       # above 80 % a warning, above 97 % no new association, full: 0xA700
quarantine_limit_bytes = 5000000000
retention_days = 14.0        # objects leave after so long, when they are answered, delivered and forwarded; so long
                             # a storage commitment holds. What is owed, or cannot be read, never leaves by itself.
keep_hours = 24.0            # above 80 % the oldest may leave early, but not before; never what was committed

[series]                     # when a CT or MR series counts as complete
quiet_s = 5.0                # seconds without a new image
hard_limit_s = 120.0         # seconds after the first image, whatever comes

[learning]
features = "features"        # "off": nothing derived from studies leaves this hospital
"""
