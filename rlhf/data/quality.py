"""How annotators, or vendors (`source`), judge: against the others, and against the reward models.

Every check compares one name with the others on the same kinds of comparison, clustered by prompt.
A flag needs enough rows, a large difference and a p-value that holds for all names and checks
together (Bonferroni). Whoever is flagged leaves the reference of that check, and the rest is
compared again, so that one odd annotator with many rows does not make the others look odd.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.algo.intervals import proportion_interval
from rlhf.algo.twosample import (
    category_sums,
    shares_test,
    stratified_difference,
)
from rlhf.data.drift import percent
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
Integers = NDArray[np.integer[Any]]
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
    rows_of: Sequence[Integers]
    """Positions of every name's rows."""


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
    codes, rates = array("i"), array("d")
    strength_codes = {name: i for i, name in enumerate(STRENGTHS)}
    for row in rows:
        name = row[by]
        if name is None:
            continue
        # A source is what a stratum would hold fixed, when sources are what is compared.
        kind = (row["axis"],) if by == "source" else (row["axis"], row["source"])
        codes.extend(
            (
                names.setdefault(name, len(names)),
                strength_codes.get(row["strength"], len(STRENGTHS)),
                strata.setdefault(kind, len(strata)),
                prompts.setdefault(row["prompt"], len(prompts)),
            )
        )
        rates.extend(_rates(row))
    table = np.array(codes, dtype=np.int32).reshape(-1, 4)
    values = np.array(rates, dtype=np.float64).reshape(-1, len(RATES))
    owners, strengths, kinds, clusters = table.T
    measured = {rate.key: values[:, i] for i, rate in enumerate(RATES)}
    ends = np.cumsum(np.bincount(owners, minlength=len(names)))[:-1]
    rows_of = np.split(np.argsort(owners, kind="stable"), ends)
    return _Columns(list(names), owners, strengths, kinds, clusters, measured, rows_of)


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
    own = columns.rows_of[owner]
    counts = np.bincount(columns.strengths[own], minlength=len(STRENGTHS) + 1).tolist()
    strengths = dict(zip((*STRENGTHS, UNGRADED), counts, strict=True))
    row: Row = {
        "name": columns.names[owner],
        "n": len(own),
        "prompts": len(np.unique(columns.clusters[own])),
        "strengths": {name: n for name, n in strengths.items() if n or name != UNGRADED},
    }
    for rate in RATES:
        values = columns.rates[rate.key][own]
        counted = ~np.isnan(values)
        interval = proportion_interval(
            values[counted].tolist(), columns.clusters[own][counted].tolist(), level=level
        )
        limits = {k: None if math.isnan(v) else v for k, v in interval._asdict().items()}
        row[rate.key] = {**limits, "n": int(counted.sum())}
    return {**row, "flags": flags}


def _flags(columns: _Columns, level: float) -> list[list[str]]:
    """Return the flags of every name, in the order of the checks."""
    found: list[list[str]] = [[] for _ in columns.names]
    tests = len(columns.names) * (len(RATES) + 1)
    largest = (1.0 - level) / max(tests, 1)
    strengths = np.where(columns.strengths < len(STRENGTHS), columns.strengths, math.nan)
    for check in (*RATES, None):
        values = strengths if check is None else columns.rates[check.key]
        reference = np.flatnonzero(~np.isnan(values))
        if len(reference) > MAX_REFERENCE:
            drawn = np.linspace(0, len(reference) - 1, MAX_REFERENCE)
            reference = reference[drawn.astype(np.int64)]
        compared = list(range(len(columns.names)))
        while len(compared) > 1:
            reference = reference[np.isin(columns.owners[reference], compared)]
            flagged = {}
            for i in compared:
                own = columns.rows_of[i][~np.isnan(values[columns.rows_of[i]])]
                rest = reference[columns.owners[reference] != i]
                item = _finding(columns, check, own, rest)
                if item is not None and item.is_large and item.p_value <= largest:
                    flagged[i] = item
            if not flagged:
                break
            worst = min(flagged, key=lambda i: flagged[i].p_value)
            # Of two that differ nobody knows which one is odd.
            for i in flagged if len(compared) == 2 else [worst]:
                found[i].append(flagged[i].text)
                compared.remove(i)
    return found


def _finding(
    columns: _Columns, check: Rate | None, own: Integers, rest: Integers
) -> _Finding | None:
    """Compare a name's rows with the others', by strengths for None; None if there are too few."""
    for side in (own, rest):
        if len(side) < MIN_ROWS or len(np.unique(columns.clusters[side])) < MIN_PROMPTS:
            return None
    if check is None:
        return _strength_finding(columns, own, rest)
    return _rate_finding(columns, check, own, rest)


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
    text = rate.told.format(percent(share), len(own), percent(others))
    return _Finding(found.p_value, text, is_large)


def _strength_finding(columns: _Columns, own: Integers, rest: Integers) -> _Finding:
    sides = [
        category_sums(
            columns.strengths[side], columns.clusters[side], num_categories=len(STRENGTHS)
        )
        for side in (own, rest)
    ]
    first, second = sides
    test = shares_test(first, second)
    change = first.mean - second.mean
    most = int(np.argmax(change))
    text = (
        f"says {STRENGTHS[most]} in {percent(first.mean[most])} of {len(own)}, "
        f"others in {percent(second.mean[most])}"
    )
    distance = float(0.5 * np.abs(change).sum())
    return _Finding(test.p_value, text, distance >= STRENGTH_DISTANCE)
