"""The cloud's one TOML file: sections, and the commented file that `init` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.settings import Section, Settings, read_settings

PROCESSES = ("api", "ingest", "worker", "rounds", "trainer")
Port = Annotated[int, Field(ge=0, le=65535, description="a TCP port, 1 to 65535; 0 chooses a free one.")]
Name = Annotated[str, Field(min_length=1, max_length=253, description="a host name or address.")]


class CloudSection(Section):
    state: Path = Field(default=Path("state"), description="a folder that the cloud owns.")


class PeopleSection(Section):
    host: str = Field(default="127.0.0.1", description="the address to listen on.")
    port: Port = 8443
    name: Name = "localhost"


class NodesSection(Section):
    host: str = Field(default="127.0.0.1", description="the address to listen on.")
    port: Port = 8444
    name: Name = "localhost"


class BrokerSection(Section):
    host: Name = "localhost"
    port: int = Field(default=8883, ge=1, le=65535, description="the broker's TLS port, 1 to 65535.")


class RedisSection(Section):
    url: str = Field(
        default="redis://127.0.0.1:6379/0",
        pattern="^(redis|rediss|unix)://",
        description="redis://host:port/number, rediss:// or unix://.",
    )


class DatabaseSection(Section):
    url: str = Field(
        default="",
        pattern="^($|sqlite://|postgresql)",
        description="empty for SQLite in the state folder, or postgresql://user@host/name.",
    )


class ObjectsSection(Section):
    url: str = Field(default="", description="empty for a folder in the state folder, or s3://bucket/prefix.")


class RolloutSection(Section):
    soak_s: float = Field(default=600.0, ge=0, description="seconds, 0 or more.")
    deadline_s: float = Field(default=900.0, gt=0, description="seconds, above 0.")


class CloudConfig(Settings):
    """Everything an operator may set in the cloud; paths are absolute, empty URLs are filled in."""

    model_config = SettingsConfigDict(env_prefix="RADFLEET_CLOUD_")

    cloud: CloudSection = CloudSection()
    people: PeopleSection = PeopleSection()
    nodes: NodesSection = NodesSection()
    broker: BrokerSection = BrokerSection()
    redis: RedisSection = RedisSection()
    database: DatabaseSection = DatabaseSection()
    objects: ObjectsSection = ObjectsSection()
    rollout: RolloutSection = RolloutSection()

    @property
    def state(self) -> Path:
        return self.cloud.state

    @property
    def run_folder(self) -> Path:
        return self.state / "run"

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def keys(self) -> Path:
        return self.state / "keys"


def load_config(path: Path) -> CloudConfig:
    """Returns the configuration in `path`, relative paths taken from its folder.

    Raises:
        ConfigError: see `shared.settings.read_settings`.
    """
    config = read_settings(path, CloudConfig)
    state = path.resolve().parent / config.cloud.state
    return config.model_copy(
        update={
            "cloud": CloudSection(state=state),
            "database": DatabaseSection(url=config.database.url or f"sqlite:///{state / 'cloud.sqlite'}"),
            "objects": ObjectsSection(url=config.objects.url or str(state / "objects")),
        }
    )


TEMPLATE = """\
# Radfleet cloud. Research use only, not for diagnosis.
# Every key may be left out; what stands here is the default. Relative paths start at this file's folder.

[cloud]
state = "state"              # certificates, keys, SQLite, objects, registry

[people]                     # pages and API for people, and enrolment of nodes (TLS)
host = "127.0.0.1"
port = 8443                  # 0 chooses a free port and writes it to state/run/ports.json
name = "localhost"           # the name in links and in the server's certificate

[nodes]                      # downloads for nodes (TLS, device certificate required)
host = "127.0.0.1"
port = 8444
name = "localhost"           # the name by which nodes reach this port

[broker]                     # Mosquitto; deploy/mosquitto has its configuration
host = "localhost"           # the name by which nodes and the cloud reach it
port = 8883

[redis]
url = "redis://127.0.0.1:6379/0"

[database]
url = ""                     # empty: state/cloud.sqlite; or postgresql://user@host/name

[objects]
url = ""                     # empty: state/objects; or an fsspec URL such as s3://bucket/prefix

[rollout]
soak_s = 600.0               # seconds that a wave must serve a release well before the next wave gets it
deadline_s = 900.0           # seconds of silence that count as a failure
"""
