"""One TOML file a side, read once at start: all faults are reported together, each with file, key and cure.

An environment variable overrides a key: `RADFLEET_EDGE_WEB__PORT` stands for `[web] port` of the edge.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from shared.errors import ConfigError, RadfleetError
from shared.files import read_limited

SETTINGS_LIMIT_BYTES = 1_000_000


class Section(BaseModel):
    """One table of the TOML file; each field's description says what belongs there and is shown as the cure."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(BaseSettings):
    """A whole TOML file; subclasses set `env_prefix` and name their sections."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_nested_delimiter="__")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # the file comes in as `init`


S = TypeVar("S", bound=Settings)


def read_settings(path: Path, kind: type[S]) -> S:
    """Returns the settings in the TOML file at `path`.

    Raises:
        ConfigError: the file is missing or not TOML, or has faults: all of them, `file: key: what. Cure: …`.
    """
    try:
        values = tomllib.loads(read_limited(path, SETTINGS_LIMIT_BYTES).decode())
    except RadfleetError as exc:
        raise ConfigError(f"{path} cannot be read.", cure="Name the file with --config, or run init.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}.", cure="Correct that line.") from exc
    try:
        return kind(**values)
    except ValidationError as exc:
        faults = [f"{path}: {_key(e)}: {e['msg']}. Cure: {_cure(kind, e)}" for e in exc.errors()]
        raise ConfigError(f"{path} has {len(faults)} fault(s).", faults=faults) from exc


def _key(error: Any) -> str:
    return ".".join(str(part) for part in error["loc"]) or "(file)"


def _cure(kind: type[BaseModel], error: Any) -> str:
    model: type[BaseModel] | None = kind
    described = ""
    for part in error["loc"]:
        if model is None or not isinstance(part, str):
            continue  # an index into a list
        field = model.model_fields.get(part)
        if field is None:
            return f"remove it; known here: {', '.join(model.model_fields)}."
        described = field.description or described
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)), None)
    return described or "follow the comments that `init` writes."
