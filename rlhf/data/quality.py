"""How annotators, or vendors (`source`), judge: against the others, and against the reward models.

Every check compares one name with the others on the same kinds of comparison, clustered by prompt.
A flag needs enough rows, a large difference and a p-value that holds for all names and checks
together (Bonferroni). Whoever is flagged leaves the reference of that check, and the rest is
compared again, so that one odd annotator with many rows does not make the others look odd.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.algo.intervals import proportion_interval
from rlhf.algo.twosample import (
    categorical_metric,
    category_sums,
    category_sums_of,
    difference_test,
    independent_spread,
    stratified_difference,
)
from rlhf.data.records import STRENGTHS

BY = ("annotator", "source")
LEVEL = 0.95
"""Confidence level of the intervals; 1 - LEVEL is the chance of any false flag in a report."""
MIN_ROWS = 30
MIN_PROMPTS = 10
"""Rows, and distinct prompts, that a name and the others need before a check says anything."""
MAX_REFERENCE = 20_000
"""Rows that stand for the others, evenly drawn: more would not make them known any better."""
UNGRADED = "ungraded"

STRENGTH_DISTANCE = 0.25
"""Smallest total variation between a name's strengths and the others' that is flagged."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate that is compared: its key in the report, the smallest difference that is flagged."""

    key: str
    smallest: float
    only_below: bool
    """Flag only who lies below the others."""
    told: str
    """The flag, with the name's share, its rows and the others' share."""


RATES = (
    Rate("longer_preferred", 0.15, False, "prefers the longer response in {} of {}, others in {}"),
    Rate("ties", 0.15, False, "calls {} of {} a tie, others {}"),
    Rate("agreement", 0.10, True, "agrees with the reward models in {} of {}, others in {}"),
)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Rows as columns [N]; `rates` hold NaN where a rate does not count a row."""

    names: list[str]
    owners: Integers
    strengths: Integers
    strata: Integers
    clusters: Integers
    rates: Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class _Finding:
    p_value: float
    text: str
    is_large: bool


def quality_report(
    rows: Iterable[Mapping[str, Any]], *, by: str = BY[0], level: float = LEVEL
) -> dict[str, Any]:
    """Return what each annotator or source does, most rows first, with flags in plain words.

    A row has annotator, source, axis, strength, tie and prompt (its cluster), lengths of both
    responses in `chosen_tokens` and `rejected_tokens` or in `_chars`, and may have `chosen_score`
    and `rejected_score` of the reward model of its axis, which must not have been trained on it.
    Rows of scores.jsonl and scores_before.jsonl are such rows. Rows without a name are left out.
    """
    columns = _columns(rows, by)
    flags = _flags(columns, level)
    report = [_row(columns, i, level, flags[i]) for i in range(len(columns.names))]
    return {"by": by, "rows": sorted(report, key=lambda row: (-row["n"], row["name"]))}


def _columns(rows: Iterable[Mapping[str, Any]], by: str) -> _Columns:
    names: dict[str, int] = {}
    strata: dict[tuple[str, ...], int] = {}
    prompts: dict[str, int] = {}
    codes: list[tuple[int, int, int, int]] = []
    rates: list[tuple[float, float, float]] = []
    strength_codes = {name: i for i, name in enumerate(STRENGTHS)}
    for row in rows:
        name = row[by]
        if name is None:
            continue
        # A source is what a stratum would hold fixed, when sources are what is compared.
        kind = (row["axis"],) if by == "source" else (row["axis"], row["source"])
        codes.append(
            (
                names.setdefault(name, len(names)),
                strength_codes.get(row["strength"], len(STRENGTHS)),
                strata.setdefault(kind, len(strata)),
                prompts.setdefault(row["prompt"], len(prompts)),
            )
        )
        rates.append(_rates(row))
    table = np.array(codes, dtype=np.int64).reshape(-1, 4)
    values = np.array(rates, dtype=np.float64).reshape(-1, len(RATES))
    owners, strengths, kinds, clusters = table.T
    measured = {rate.key: values[:, i] for i, rate in enumerate(RATES)}
    return _Columns(list(names), owners, strengths, kinds, clusters, measured)


def _rates(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return longer preferred, tie and agreement of one row; a half for equal values."""
    if row["tie"]:
        return math.nan, 1.0, math.nan
    unit = "tokens" if "chosen_tokens" in row else "chars"
    longer = _prefers(row[f"chosen_{unit}"], row[f"rejected_{unit}"])
    scores = row.get("chosen_score"), row.get("rejected_score")
    agreement = math.nan if None in scores else _prefers(*scores)
    return longer, 0.0, agreement


def _prefers(chosen: Any, rejected: Any) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _row(columns: _Columns, owner: int, level: float, flags: list[str]) -> Row:
    """Return the report's row of one name."""
    own = columns.owners == owner
    counts = np.bincount(columns.strengths[own], minlength=len(STRENGTHS) + 1).tolist()
    strengths = dict(zip((*STRENGTHS, UNGRADED), counts, strict=True))
    row: Row = {
        "name": columns.names[owner],
        "n": int(own.sum()),
        "prompts": len(np.unique(columns.clusters[own])),
        "strengths": {name: n for name, n in strengths.items() if n or name != UNGRADED},
    }
    for rate in RATES:
        values = columns.rates[rate.key][own]
        counted = ~np.isnan(values)
        interval = proportion_interval(
            values[counted], columns.clusters[own][counted].tolist(), level=level
        )
        limits = {k: None if math.isnan(v) else v for k, v in interval._asdict().items()}
        row[rate.key] = {**limits, "n": int(counted.sum())}
    return {**row, "flags": flags}


def _flags(columns: _Columns, level: float) -> list[list[str]]:
    """Return the flags of every name, in the order of the checks."""
    found: list[list[str]] = [[] for _ in columns.names]
    tests = len(columns.names) * (len(RATES) + 1)
    largest = (1.0 - level) / max(tests, 1)
    for check in range(len(RATES) + 1):
        compared = list(range(len(columns.names)))
        while len(compared) > 1:
            findings = {i: _finding(columns, check, i, compared) for i in compared}
            flagged = {
                i: item
                for i, item in findings.items()
                if item is not None and item.is_large and item.p_value <= largest
            }
            if not flagged:
                break
            worst = min(flagged, key=lambda i: flagged[i].p_value)
            # Of two that differ nobody knows which one is odd.
            for i in flagged if len(compared) == 2 else [worst]:
                found[i].append(flagged[i].text)
                compared.remove(i)
    return found


def _finding(columns: _Columns, check: int, owner: int, compared: Sequence[int]) -> _Finding | None:
    """Compare one name with the other compared ones; None where there are too few rows."""
    strengths = check == len(RATES)
    values = (
        np.where(columns.strengths < len(STRENGTHS), columns.strengths, math.nan)
        if strengths
        else columns.rates[RATES[check].key]
    )
    counted = ~np.isnan(values)
    own = np.flatnonzero(counted & (columns.owners == owner))
    rest = np.flatnonzero(counted & np.isin(columns.owners, compared) & (columns.owners != owner))
    if len(rest) > MAX_REFERENCE:
        rest = rest[np.linspace(0, len(rest) - 1, MAX_REFERENCE).astype(np.int64)]
    for side in (own, rest):
        if len(side) < MIN_ROWS or len(np.unique(columns.clusters[side])) < MIN_PROMPTS:
            return None
    if strengths:
        return _strength_finding(columns, own, rest)
    return _rate_finding(columns, RATES[check], own, rest)


def _rate_finding(columns: _Columns, rate: Rate, own: Integers, rest: Integers) -> _Finding | None:
    both = np.concatenate([own, rest])
    found = stratified_difference(
        columns.rates[rate.key][both],
        np.arange(len(both)) < len(own),
        columns.strata[both],
        columns.clusters[both],
    )
    if found is None:
        return None
    share = float(columns.rates[rate.key][own].mean())
    is_large = (
        -found.value >= rate.smallest if rate.only_below else abs(found.value) >= rate.smallest
    )
    others = min(1.0, max(0.0, share - found.value))
    text = rate.told.format(_percent(share), len(own), _percent(others))
    return _Finding(found.p_value, text, is_large)


def _strength_finding(columns: _Columns, own: Integers, rest: Integers) -> _Finding | None:
    sides = [
        category_sums(
            columns.strengths[side], columns.clusters[side], num_categories=len(STRENGTHS)
        )
        for side in (own, rest)
    ]
    kept = np.flatnonzero(sides[0].sums + sides[1].sums)
    if len(kept) < 2:
        return None
    first, second = (
        category_sums_of(side.sums[kept], side.products[np.ix_(kept, kept)], clusters=side.clusters)
        for side in sides
    )
    shares = (first.sums + second.sums) / (first.rows + second.rows)
    metric = categorical_metric(shares)
    test = difference_test(first, second, metric, spread=independent_spread(metric, shares))
    change = first.mean - second.mean
    most = int(np.argmax(change))
    text = (
        f"says {STRENGTHS[kept[most]]} in {_percent(first.mean[most])} of {len(own)}, "
        f"others in {_percent(second.mean[most])}"
    )
    distance = float(0.5 * np.abs(change).sum())
    return _Finding(test.p_value, text, distance >= STRENGTH_DISTANCE)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
