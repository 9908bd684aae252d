"""Which of K sampled responses wins, which prompts are sampled, and the pool of earlier winners.

A row is one prompt with its scored responses, as a shard holds it: `prompt_id`, `is_safety` and
`responses`, each with `text`, `finished` and the raw scores `helpfulness` and `safety`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf.algo.diversity import mean_self_bleu
from rlhf.algo.rewards import below_threshold
from rlhf.algo.selection import best_of_n, max_and_median_against_n
from rlhf.data.prompts import keyed_digest, keyed_order
from rlhf.data.records import AXES, Prompt
from rlhf.data.split import prompt_key

Row = dict[str, Any]

MAX_DIVERSITY_PROMPTS = 1000
"""Prompts that Self-BLEU is measured on at most, evenly spread: its limits are narrow by then."""


def ranking_axis(row: Row, *, threshold: float) -> str:
    """Return the reward model that ranks a prompt's winner.

    The gate may pick different models for different responses to one prompt, and scores of
    different models are never compared. So: safety ranks if the prompt is tagged, or if no response
    that could win passes the gate; else helpfulness ranks, among those that pass.
    """
    could_win = [r for r in row["responses"] if r["finished"]]
    if row["is_safety"] or not any(_passes(r, threshold) for r in could_win):
        return "safety"
    return "helpfulness"


def choose_winner(row: Row, *, threshold: float) -> int | None:
    """Return the index of the best response, the first of equal ones; None if none is finished.

    Responses below the gate's threshold rank below every one that passes.
    """
    axis = ranking_axis(row, threshold=threshold)
    candidates = [
        index
        for index, response in enumerate(row["responses"])
        if response["finished"] and (axis == "safety" or _passes(response, threshold))
    ]
    if not candidates:
        return None
    return candidates[best_of_n([row["responses"][index][axis] for index in candidates])]


def selection_curves(rows: Sequence[Row]) -> Row:
    """Return expected maximum and median of n scores for n = 1..K, by axis (Fig. 7).

    Safety is read on prompts tagged is_safety and helpfulness on the others, ungated, so that each
    curve is on one model's scale.
    """
    curves = {}
    for axis in AXES:
        scores = [
            [response[axis] for response in row["responses"]]
            for row in rows
            if row["is_safety"] == (axis == "safety")
        ]
        if scores:
            maxima, medians = max_and_median_against_n(scores)
            curves[axis] = {"prompts": len(scores), "max": maxima, "median": medians}
    return curves


def usable_scores(row: Row, *, threshold: float) -> tuple[str, list[float], float]:
    """Return the axis of a prompt, its scores of responses that could win, and its lowest score.

    The axis is that of the tag, so that it is the same at every temperature: safety where the
    prompt is tagged. Else helpfulness, and only responses that pass the gate could win by it.
    """
    axis = "safety" if row["is_safety"] else "helpfulness"
    usable = [
        response[axis]
        for response in row["responses"]
        if response["finished"] and (axis == "safety" or _passes(response, threshold))
    ]
    return axis, usable, min(response[axis] for response in row["responses"])


def sweep_values(
    rows_T: Sequence[Sequence[Row]], *, threshold: float
) -> tuple[list[list[float]], list[str]]:
    """Return the best-of-K value of each prompt at each temperature, [T][P], and its axis, [P].

    The value is the highest raw score of a response that could win. Where none could, the prompt
    is lost to training, and counts with the lowest score that any response to it got at any
    temperature.
    """
    found = [[usable_scores(row, threshold=threshold) for row in rows] for rows in rows_T]
    lowest = [min(column[2] for column in columns) for columns in zip(*found, strict=True)]
    values = [
        [max(usable, default=lowest[p]) for p, (_, usable, _) in enumerate(of_temperature)]
        for of_temperature in found
    ]
    return values, [axis for axis, _, _ in found[0]]


def response_counts(rows: Sequence[Row], *, threshold: float) -> dict[str, int]:
    """Count responses, unfinished ones, and finished ones below the gate's threshold."""
    responses = [response for row in rows for response in row["responses"]]
    finished = [response for response in responses if response["finished"]]
    return {
        "sampled": len(responses),
        "unfinished": len(responses) - len(finished),
        "below_threshold": sum(not _passes(response, threshold) for response in finished),
    }


def winners_from(
    rows: Sequence[Row],
    *,
    sources: Mapping[str, str],
    pool: Sequence[Row],
    num_samples: int,
    threshold: float,
) -> Row:
    """Count where winners come from: sources, ranking axes, position and length among the K.

    `sources` maps prompt id to source. `length_rank` 0 is the shortest of the K responses; of
    equally long ones, each has the middle rank, rounded down. `pool_rounds` counts the rows drawn
    from each earlier round's winners.
    """
    by_source: Counter[str] = Counter()
    axes: Counter[str] = Counter()
    sample_index, length_rank = [0] * num_samples, [0] * num_samples
    for row in rows:
        index = choose_winner(row, threshold=threshold)
        if index is None:
            continue
        by_source[sources[row["prompt_id"]]] += 1
        axes[ranking_axis(row, threshold=threshold)] += 1
        sample_index[index] += 1
        lengths = [response["num_tokens"] for response in row["responses"]]
        shorter = sum(length < lengths[index] for length in lengths)
        length_rank[shorter + (lengths.count(lengths[index]) - 1) // 2] += 1
    rounds = Counter(str(row["round"]) for row in pool)
    return {
        "sources": dict(sorted(by_source.items())),
        "axes": {axis: axes[axis] for axis in AXES},
        "sample_index": sample_index,
        "length_rank": length_rank,
        "pool_rounds": dict(sorted(rounds.items(), key=lambda item: int(item[0]))),
    }


def diversity(rows: Sequence[Row], *, level: float, num_draws: int, seed: int) -> Row:
    """Return the mean Self-BLEU of a prompt's responses, clustered by prompt (Fig. 21)."""
    step = -(-len(rows) // MAX_DIVERSITY_PROMPTS) or 1
    taken = rows[::step]
    return mean_self_bleu(
        [[response["text"] for response in row["responses"]] for row in taken],
        [prompt_key(row["prompt"]) for row in taken],
        level=level,
        num_draws=num_draws,
        seed=seed,
    )


def stratified(prompts: Sequence[Prompt], *, num_prompts: int | None, seed: int) -> list[Prompt]:
    """Draw prompts by the seed, keeping the share of safety prompts; None takes all."""
    order = keyed_order(prompts, seed=seed)
    if num_prompts is None or num_prompts >= len(order):
        return order
    safety = [prompt for prompt in order if prompt.is_safety]
    others = [prompt for prompt in order if not prompt.is_safety]
    num_safety = round(num_prompts * len(safety) / len(order))
    num_safety = max(num_safety, num_prompts - len(others))
    return safety[:num_safety] + others[: num_prompts - num_safety]


def draw_pool(
    earlier: Sequence[Row], winners: Sequence[Row], *, num_rows: int, seed: int
) -> list[Row]:
    """Draw earlier winners by the seed, each prompt's rounds side by side; repeats are left out.

    A row that says what this round's winner of the same prompt says adds nothing.
    """
    seen = {(row["prompt_id"], row["response"]) for row in winners}
    pool: dict[tuple[str, str], Row] = {}
    for row in earlier:
        key = (row["prompt_id"], row["response"])
        if key not in seen:
            pool[key] = row
    order = sorted(pool, key=lambda key: keyed_digest(f"{seed}/pool/{key[0]}/{key[1]}"))
    return [pool[key] for key in order[:num_rows]]


def _passes(response: Row, threshold: float) -> bool:
    return not bool(below_threshold(torch.tensor(response["safety"]), threshold=threshold))
