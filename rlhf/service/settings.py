"""Which settings a launch through the service may change, and how they are written.

Numbers, switches and choices; no paths, no addresses, no commands. The service itself, the
launcher, where data comes from and goes, and whether finished nodes are deleted are left to the
command line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from rlhf.config import Config
from rlhf.errors import ConfigError

CLOSED = ("ingest", "launcher", "on_change", "paths", "service", "tracking")
"""Groups and settings that only the command line may change."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that the service may change: `kind` is bool, int, float or a choice."""

    key: str
    kind: type
    optional: bool

    def text(self, value: object) -> str:
        """Return a value as it stands on a command line; raises ConfigError for another kind."""
        if self.optional and value in (None, "null", ""):
            return "null"
        found = self._read(value)
        if found is None:
            raise ConfigError(f"{self.key}={str(value)[:100]} cannot work: give {self.wanted}")
        return found

    @property
    def wanted(self) -> str:
        """Say which values the setting takes."""
        null = ", or null" if self.optional else ""
        if issubclass(self.kind, Enum):
            return f"one of {', '.join(self.kind.__members__)}{null}"
        names = {bool: "true or false", int: "a whole number", float: "a number"}
        return f"{names[self.kind]}{null}"

    def _read(self, value: object) -> str | None:
        if issubclass(self.kind, Enum):
            return value if isinstance(value, str) and value in self.kind.__members__ else None
        if self.kind is bool:
            text = str(value).lower()
            return text if isinstance(value, bool | str) and text in ("true", "false") else None
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        try:
            number = (
                int(value) if self.kind is int and not isinstance(value, float) else float(value)
            )
        except (ValueError, OverflowError):
            return None
        if self.kind is int and not isinstance(number, int):
            return None
        return repr(number) if math.isfinite(number) else None


@cache
def open_settings() -> Mapping[str, Setting]:
    """Return the settings that the service may change, by key."""
    return {
        item.key: item for item in _leaves(Config, "") if item.key.partition(".")[0] not in CLOSED
    }


def overrides_of(settings: Mapping[str, object]) -> list[str]:
    """Return settings as a command line has them; raises ConfigError for one that is not open."""
    known = open_settings()
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"{key[:100]} cannot be set through the service, which takes numbers, switches and "
                f"choices outside {', '.join(CLOSED)}: leave it out, or use `rlhf launch`"
            )
    return [f"{key}={known[key].text(value)}" for key, value in settings.items()]


def _leaves(group: Any, prefix: str) -> list[Setting]:
    hints = get_type_hints(group)
    found = []
    for item in fields(group):
        kind = hints[item.name]
        if is_dataclass(kind):
            found += _leaves(kind, f"{prefix}{item.name}.")
            continue
        plain, optional = _plain(kind)
        if isinstance(plain, type) and (plain in (bool, int, float) or issubclass(plain, Enum)):
            found.append(Setting(f"{prefix}{item.name}", plain, optional))
    return found


def _plain(kind: Any) -> tuple[Any, bool]:
    """Return a type without its None, and whether it had one."""
    if not isinstance(kind, UnionType):
        return kind, False
    options = [option for option in get_args(kind) if option is not NoneType]
    return (options[0] if len(options) == 1 else None), len(options) < len(get_args(kind))
