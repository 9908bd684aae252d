"""When what failed is tried again: soon at first, then with longer and longer pauses."""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable
from dataclasses import dataclass

RETRY_SECONDS = 60.0
LONGEST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str
    seconds: float
    until: float


class Pauses:
    """Failures by what failed; each next pause is twice as long. A new start begins anew."""

    def __init__(self, first: float = RETRY_SECONDS, longest: float = LONGEST_SECONDS) -> None:
        self._first, self._longest = first, longest
        self._failures: dict[Hashable, _Failure] = {}

    def is_over(self, key: Hashable) -> bool:
        """Tell whether something may be tried now."""
        found = self._failures.get(key)
        return found is None or time.monotonic() >= found.until

    def begin(self, key: Hashable, message: str) -> tuple[float, bool]:
        """Note a failure; returns the seconds to the next try, and whether its message is new."""
        before = self._failures.get(key)
        seconds = self._first if before is None else min(2 * before.seconds, self._longest)
        self._failures[key] = _Failure(message, seconds, time.monotonic() + seconds)
        return seconds, before is None or before.message != message

    def forget(self, key: Hashable) -> None:
        """Note a success."""
        self._failures.pop(key, None)

    def keep(self, keys: Collection[Hashable]) -> None:
        """Forget everything but these."""
        self._failures = {key: found for key, found in self._failures.items() if key in keys}
