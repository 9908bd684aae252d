"""Which words a batch uses: a short vector per comparison for tests, and counts for people.

The vector is signed feature hashing (Weinberger et al. 2009): every distinct word of a comparison
adds +1 or -1 to one of `DIMENSIONS` buckets, then the vector gets length 1, so that long texts
weigh no more than short ones. Distances between mean vectors estimate distances between whole
vocabularies, and sums over clusters can be merged, which lists of words cannot.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

DIMENSIONS = 64
MAX_ROWS = 5_000
"""Comparisons of a batch whose words are looked at, drawn by the hash of their texts: the same ones
in any order of the rows."""
NUM_WORDS = 800
"""Most frequent words whose counts a profile keeps."""
MAX_WORD_CHARS = 40
MIN_CHANGE = 0.01
"""Smallest change of a word's share of the comparisons that is worth naming."""

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


class Vocabulary:
    """Vectors and word counts of comparisons, added a few at a time."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """In how many comparisons a word occurs."""
        self.vectors: list[NDArray[np.float64]] = []
        self._places = _Places()

    def add(self, texts: Iterable[str]) -> None:
        """Add one comparison: the texts of its turns and responses."""
        words = {word[:MAX_WORD_CHARS] for text in texts for word in WORD.findall(text.casefold())}
        self.counts.update(words)
        places = list(map(self._places.__getitem__, words))
        signed = np.bincount(np.array(places, dtype=np.int64), minlength=2 * DIMENSIONS)
        vector = (signed[::2] - signed[1::2]).astype(np.float64)
        length = float(np.linalg.norm(vector))
        self.vectors.append(vector / length if length else vector)

    def top(self) -> dict[str, int]:
        """Return the most frequent words with their counts, equal counts in alphabetical order."""
        ranked = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return dict(ranked[:NUM_WORDS])


class _Places(dict[str, int]):
    """Word to twice its bucket, plus one where its sign is negative; by hash, remembered."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        found = self[word] = int.from_bytes(digest, "big") % (2 * DIMENSIONS)
        return found


def changed_words(
    now: Mapping[str, int], now_rows: float, before: Mapping[str, int], before_rows: float
) -> tuple[list[str], list[str]]:
    """Return the words whose share of the comparisons rose and fell most, strongest first.

    Ranked by (p1 - p0) / sqrt(p (1 - p)) with p the pooled share; a word that one side does not
    list counts as absent there.
    """
    ranked = []
    for word in sorted({*now, *before}):
        first, second = now.get(word, 0), before.get(word, 0)
        change = first / now_rows - second / before_rows
        share = (first + second) / (now_rows + before_rows)
        if abs(change) >= MIN_CHANGE and share < 1.0:
            ranked.append((change / (share * (1.0 - share)) ** 0.5, word))
    ranked.sort(key=lambda item: (-item[0], item[1]))
    return (
        [word for score, word in ranked if score > 0],
        [word for score, word in reversed(ranked) if score < 0],
    )


def merged_counts(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Add up the word counts of several profiles."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)
