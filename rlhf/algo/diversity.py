"""How different the responses to one prompt are: Self-BLEU (paper Fig. 21; Zhu et al. 2018).

Shapes: K responses to a prompt.

Self-BLEU of a prompt is the mean over its K responses of BLEU-4 (Papineni et al. 2002) with that
response as hypothesis and the K - 1 others as references:

    BLEU = BP * exp(1/m * sum over n = 1..m of log p_n),    p_n = clipped matches / n-grams,
    BP = min(1, exp(1 - r / c)),    m = min(4, words of the hypothesis)

with c the words of the hypothesis and r the closest length of a reference, the shorter of two. 1:
all responses are the same; near 0: they share nothing. What the sources leave open, stated:

- words: case folded; runs of letters and digits, single signs, single CJK characters;
- no match of some n: 0.1 matches count (Chen and Cherry 2014, method 1, as in Zhu's own code); no
  common word at all: BLEU is 0;
- texts of fewer than 4 words: orders that the hypothesis is too short for are left out (m above),
  so that equal short answers get 1 and not almost 0;
- an empty text gets 1 if another one is empty too, else 0;
- one response alone has no diversity: None.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from rlhf.algo.intervals import clustered_bootstrap, interval_json

MAX_ORDER = 4
NO_MATCH = 0.1

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+|[^\w\s]")

Ngram = tuple[str, ...]


def words(text: str) -> list[str]:
    """Return the words of a text as Self-BLEU counts them."""
    return WORD.findall(text.casefold())


def self_bleu(texts: Sequence[str]) -> float | None:
    """Return the Self-BLEU of one prompt's K responses, in [0, 1]; None for fewer than two."""
    if len(texts) < 2:
        return None
    split = [words(text) for text in texts]
    counts = [[_ngrams(row, n) for n in range(1, MAX_ORDER + 1)] for row in split]
    lengths = [len(row) for row in split]
    allowed = [_two_largest([row[n] for row in counts]) for n in range(MAX_ORDER)]
    bleus = [
        _bleu(own, counts[own], allowed, lengths=lengths) if lengths[own] else _empty(lengths)
        for own in range(len(texts))
    ]
    return math.fsum(bleus) / len(bleus)


def mean_self_bleu(
    responses: Sequence[Sequence[str]],
    clusters: Sequence[Hashable],
    *,
    level: float,
    num_draws: int,
    seed: int,
) -> dict[str, Any]:
    """Return the mean over prompts with its bootstrap interval: mean, low, high and n.

    `responses` holds the K responses of each prompt, `clusters` one label per prompt. Prompts with
    a single response are left out of n.
    """
    found = [
        (value, cluster)
        for texts, cluster in zip(responses, clusters, strict=True)
        if (value := self_bleu(texts)) is not None
    ]
    interval = clustered_bootstrap(
        [value for value, _ in found],
        [cluster for _, cluster in found],
        num_draws=num_draws,
        seed=seed,
        level=level,
    )
    return interval_json(interval, len(found))


def _ngrams(row: list[str], n: int) -> Counter[Ngram]:
    return Counter(tuple(row[start : start + n]) for start in range(len(row) - n + 1))


def _two_largest(rows: Sequence[Counter[Ngram]]) -> dict[Ngram, tuple[int, int, int]]:
    """Return n-gram to (largest count, the text that has it, largest count in any other text).

    So the clip of every hypothesis is one look-up: K texts cost K passes and not K squared.
    """
    best: dict[Ngram, tuple[int, int, int]] = {}
    for index, row in enumerate(rows):
        for ngram, count in row.items():
            first, owner, second = best.get(ngram, (0, -1, 0))
            if count > first:
                best[ngram] = (count, index, first)
            elif count > second:
                best[ngram] = (first, owner, count)
    return best


def _bleu(
    own: int,
    counts: Sequence[Counter[Ngram]],
    allowed: Sequence[dict[Ngram, tuple[int, int, int]]],
    *,
    lengths: Sequence[int],
) -> float:
    """Return BLEU of text `own` against all others; it has at least one word."""
    length = lengths[own]
    logs = []
    for n in range(1, min(MAX_ORDER, length) + 1):
        matches = 0
        for ngram, count in counts[n - 1].items():
            first, owner, second = allowed[n - 1][ngram]
            matches += min(count, second if owner == own else first)
        if n == 1 and matches == 0:
            return 0.0
        logs.append(math.log((matches or NO_MATCH) / (length - n + 1)))
    others = [other for index, other in enumerate(lengths) if index != own]
    closest = min(others, key=lambda other: (abs(other - length), other))
    brevity = min(0.0, 1.0 - closest / length)
    return math.exp(brevity + math.fsum(logs) / len(logs))


def _empty(lengths: Sequence[int]) -> float:
    return float(sum(length == 0 for length in lengths) > 1)
