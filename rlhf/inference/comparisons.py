"""Comparisons as a reward model sees them: encoded, capped, exchanged and scored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from rlhf.data.chat import encode_pair_sides
from rlhf.data.records import Comparison
from rlhf.data.split import prompt_key
from rlhf.inference.accuracy import ScoredPair
from rlhf.inference.scoring import HfScorer
from rlhf.processes import Processes

PAIRS_PER_CHUNK = 256
"""Comparisons encoded by one call, or scored between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Sides:
    """A comparison with both sides encoded: prompt, response, EOS."""

    comparison: Comparison
    chosen_ids: list[int]
    rejected_ids: list[int]


def encode(
    rows: Iterable[Comparison], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Sides]:
    """Encode both sides and return the comparisons of which neither exceeds `max_length`."""
    listed = list(rows)
    fitting = []
    for start in range(0, len(listed), PAIRS_PER_CHUNK):
        chunk = listed[start : start + PAIRS_PER_CHUNK]
        prompts = [row.prompt for row in chunk]
        encoded = encode_pair_sides(
            tokenizer,
            prompts + prompts,
            [row.chosen for row in chunk] + [row.rejected for row in chunk],
        )
        for row, chosen, rejected in zip(
            chunk, encoded[: len(chunk)], encoded[len(chunk) :], strict=True
        ):
            if max(len(chosen), len(rejected)) <= max_length:
                fitting.append(Sides(row, chosen, rejected))
    return fitting


def cap_by_prompt(rows: Sequence[Comparison], cap: int | None) -> list[Comparison]:
    """Keep at most `cap` comparisons per axis and batch, whole prompts in the order of their hash.

    The first prompt is kept even if it alone exceeds the cap.
    """
    if cap is None:
        return list(rows)
    groups: dict[tuple[str, str], dict[str, list[Comparison]]] = defaultdict(dict)
    for row in rows:
        groups[row.axis, row.batch_id].setdefault(prompt_key(row.prompt), []).append(row)
    kept: list[Comparison] = []
    for by_prompt in groups.values():
        taken: list[Comparison] = []
        for key in sorted(by_prompt):
            if taken and len(taken) + len(by_prompt[key]) > cap:
                break
            taken += by_prompt[key]
        kept += taken
    return kept


def exchange(row: Comparison) -> Comparison:
    """Return the comparison with its two answers exchanged."""
    return replace(
        row,
        chosen=row.rejected,
        rejected=row.chosen,
        chosen_safe=row.rejected_safe,
        rejected_safe=row.chosen_safe,
    )


def score_sides(
    scorer: HfScorer,
    rows: Sequence[Sides],
    *,
    on_chunk: Callable[[int, int], None],
    processes: Processes,
) -> list[ScoredPair]:
    """Score encoded comparisons chunk by chunk, calling `on_chunk(done, total)` after each.

    Processes share the chunks and get the scores of all; a chunk's scores are the same bits
    whoever scores it.
    """
    own: dict[int, list[float]] = {}
    for start in processes.share(list(range(0, len(rows), PAIRS_PER_CHUNK))):
        chunk = rows[start : start + PAIRS_PER_CHUNK]
        sides = [s.chosen_ids for s in chunk] + [s.rejected_ids for s in chunk]
        own[start] = scorer.score_ids(sides).tolist()
        on_chunk(min(start + len(chunk), len(rows)), len(rows))
    scores: dict[int, list[float]] = {}
    for found in processes.gather(own, "scores of all processes"):
        scores |= found
    pairs = []
    for start in sorted(scores):
        chunk = rows[start : start + PAIRS_PER_CHUNK]
        for index, row in enumerate(chunk):
            pairs.append(
                ScoredPair(
                    comparison=row.comparison,
                    cluster=prompt_key(row.comparison.prompt),
                    chosen_score=scores[start][index],
                    rejected_score=scores[start][len(chunk) + index],
                    chosen_tokens=len(row.chosen_ids),
                    rejected_tokens=len(row.rejected_ids),
                )
            )
    return pairs
