"""Texts as sets of word shingles, column by column: what fuzzy duplicates are compared by.

A shingle is three neighbouring words, hashed to 64 bits. Words are what is left of a text without
case, blanks and sentence punctuation, as in `split.fold_text`; in scripts without blanks (Chinese,
Japanese, Korean, Thai) every character is a word. No loop runs over rows or words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

SHINGLE_WORDS = 3
SEPARATORS = b".,;:!?'\"`"
WIDE_SEPARATORS = r"[\p{Z}\x{2018}\x{2019}\x{201c}\x{201d}\x{2026}]"
WORD_CHARACTERS = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}])"
FACTORS = (
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
    np.uint64(0xD6E8FEB86659FD93),
)
NEGATIONS = (
    # The t is what a word like don't leaves behind.
    "no not t never none nothing nobody nowhere neither nor cannot without dont doesnt didnt cant "
    "wont isnt arent wasnt werent shouldnt couldnt wouldnt unable false untrue "
    "nicht kein keine keinen nie ohne ne pas jamais sans nunca sin nao nem senza mai non"
)


@dataclass(frozen=True, slots=True)
class Shingles:
    """Shingles of n texts: those of text i are `hashes[offsets[i] : offsets[i + 1]]`, in order.

    `words` counts the words of each text.
    """

    hashes: Hashes
    offsets: Indices
    words: Indices

    def unique(self, index: int) -> Hashes:
        """Return the set of one text's shingles, sorted."""
        found: Hashes = np.unique(self.hashes[self.offsets[index] : self.offsets[index + 1]])
        return found


def jaccard(left: Hashes, right: Hashes) -> float:
    """Return |A and B| / |A or B| of two sorted sets; 0 when both are empty."""
    shared = np.intersect1d(left, right, assume_unique=True).size
    return float(shared / max(left.size + right.size - shared, 1))


def shingles(texts: pa.Array) -> Shingles:
    """Cut every text of a column without nulls into shingles.

    A text of fewer than three words is one shingle; one without a word has none.
    """
    words, offsets = _words(texts)
    encoded = words.dictionary_encode()
    hashes = _hash_words(encoded.dictionary)[encoded.indices.to_numpy()]
    return _join_words(hashes, offsets)


def guarded_words(text: str) -> list[str]:
    """Return a text's numbers and negations in their order.

    Texts that differ here say different things, however much else they share.
    """
    import pyarrow as pa

    words, _ = _words(pa.array([text]))
    return [word for word in words.to_pylist() if word in _negations() or _has_digit(word)]


def _words(texts: pa.Array) -> tuple[pa.Array, Indices]:
    """Return the folded words of all texts in order, and where each text's words begin."""
    import pyarrow as pa
    import pyarrow.compute as pc

    folded = texts.cast(pa.large_string())
    is_wide = pc.invert(pc.string_is_ascii(folded))
    wide = pc.utf8_normalize(folded.filter(is_wide), form="NFKC")
    wide = pc.replace_substring_regex(wide, WIDE_SEPARATORS, " ")
    wide = pc.replace_substring_regex(wide, WORD_CHARACTERS, r" \1 ")
    folded = pc.replace_with_mask(folded, is_wide, wide)
    folded = pc.utf8_lower(folded)
    _, borders, data = folded.buffers()
    blanked = bytes(data or b"").translate(bytes.maketrans(SEPARATORS, b" " * len(SEPARATORS)))
    plain = pa.LargeStringArray.from_buffers(
        len(folded), borders, pa.py_buffer(blanked), offset=folded.offset
    )
    # Blanks at either end would give empty words.
    split = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(plain))
    lengths = pc.list_value_length(split).to_numpy().astype(np.int64)
    words = split.flatten()
    lengths[pc.equal(pc.binary_length(pc.ascii_trim_whitespace(plain)), 0).to_numpy(False)] = 0
    return words.filter(pc.greater(pc.binary_length(words), 0)), _offsets(lengths)


def _hash_words(words: pa.Array) -> Hashes:
    import rensa

    (hashes,) = rensa.RMinHash.hash_token_sets([words.to_pylist()])
    return mix(np.array(hashes, dtype=np.uint64))


def mix(values: Hashes) -> Hashes:
    """Scramble 64-bit values so that every bit depends on all (the finaliser of splitmix64)."""
    mixed = values ^ (values >> np.uint64(30))
    mixed = mixed * FACTORS[0]
    mixed ^= mixed >> np.uint64(27)
    mixed *= FACTORS[1]
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _join_words(hashes: Hashes, offsets: Indices) -> Shingles:
    """Hash every three neighbours of a text together; a shorter text as a whole."""
    words = np.diff(offsets)
    total = hashes * FACTORS[0]
    is_kept = np.ones(len(hashes), dtype=bool)
    for step in range(1, SHINGLE_WORDS):
        follows = np.ones(len(hashes), dtype=bool)
        ends = (offsets[1:, None] - np.arange(1, step + 1)).ravel()
        follows[ends[ends >= np.repeat(offsets[:-1], step)]] = False
        later = hashes[step:] * FACTORS[step]
        later[~follows[: len(later)]] = 0
        total[: len(later)] += later
        is_kept &= follows
    short = (words > 0) & (words < SHINGLE_WORDS)
    is_kept[offsets[:-1][short]] = True
    counts = np.where(words > 0, np.maximum(words - SHINGLE_WORDS + 1, 1), 0)
    return Shingles(mix(total[is_kept]), _offsets(counts), words)


def _offsets(counts: Indices) -> Indices:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])


def _has_digit(word: str) -> bool:
    return any(letter.isdigit() for letter in word)


@cache
def _negations() -> frozenset[str]:
    return frozenset(NEGATIONS.split())
