"""Values that are made from files, and made again after the files have changed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Cache:
    """Values that are made once per key and mark, one at a time per key."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._guard = threading.Lock()
        self._locks: dict[Hashable, threading.Lock] = {}
        self._found: OrderedDict[Hashable, tuple[Hashable, Any]] = OrderedDict()

    def get(self, key: Hashable, mark: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value that belongs to a mark; whoever asks meanwhile waits for the same."""
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            with self._guard:
                if key in self._found and self._found[key][0] == mark:
                    self._found.move_to_end(key)
                    return self._found[key][1]
            value = make()
            with self._guard:
                self._found[key] = (mark, value)
                self._found.move_to_end(key)
                while len(self._found) > self._size:
                    old, _ = self._found.popitem(last=False)
                    self._locks.pop(old, None)
            return value
