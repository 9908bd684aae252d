"""What changed in a batch against earlier ones: one line per measure, with a verdict.

A line is `look` or `stop` only if the change is beyond chance *and* large. Beyond chance: the test
of `algo.twosample`, which knows size and clusters, after Holm's correction over the lines. Large:
the effect, which does not grow with the number of rows, reaches the measure's threshold. A million
rows alone are no alarm, and twenty rows hardly ever are one. docs/drift.md explains each measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf.algo.twosample import (
    Test,
    difference_test,
    holm,
    shares_test,
)
from rlhf.data.arrival import Arrival, arrival_line
from rlhf.data.profile import (
    BINS_PER_OCTAVE,
    Measure,
    Profile,
    Words,
    merged_measure,
    merged_words,
    num_distinct_prompts,
)
from rlhf.data.vocabulary import DIMENSIONS, changed_words

AS_EXPECTED, LOOK, STOP = VERDICTS = ("as expected", "look", "stop")

LOOK_LEVEL = 0.05
STOP_LEVEL = 0.01
"""Largest p-value, corrected over the lines, of the two verdicts."""
MIN_PROMPTS = 10
"""Distinct prompts that both sides need before a line is judged."""
MAX_CHANGES = 4
"""Categories that a sentence names."""
MAX_WORDS = 8
MAX_TOLD = 3
"""Lines that the verdict in one line names."""
NAMED_CHANGE = 0.01
"""Smallest change of a share that a sentence names."""


class Thresholds(NamedTuple):
    """Smallest effects of the two verdicts."""

    look: float
    stop: float


SHARES = Thresholds(0.05, 0.25)
"""Of mixes (total variation: the share of the comparisons that would have to change) and of
lengths (Kolmogorov's largest distance of the cumulated shares, on the same scale)."""
VOCABULARY = Thresholds(0.05, 0.25)
"""Of the mean word vectors' distance, in standard deviations of single comparisons."""


@dataclass(frozen=True, slots=True)
class Aspect:
    """How a measure of the profile is tested and told."""

    name: str
    title: str
    ordered: bool = False
    shown: str = ""
    """The one category whose share is the line's value; "" for a whole mix."""
    told: str = ""
    """What a sentence calls that category; "" where the title does."""
    of: str = "the comparisons"


ASPECTS = (
    Aspect("strength", "strength"),
    Aspect("axis", "axis"),
    Aspect("source", "source"),
    Aspect("turns", "turns", ordered=True),
    Aspect("prompt_length", "prompt length", ordered=True),
    Aspect("response_length", "response length", ordered=True),
    Aspect("safety_bins", "safety labels (chosen/rejected)", of="the safety comparisons"),
    Aspect("new_prompts", "new prompts", shown="new"),
    Aspect("ties", "ties", shown="tie"),
    Aspect(
        "longer",
        "length preference",
        shown="chosen",
        told="longer response chosen",
        of="the comparisons without a tie",
    ),
)
"""The measures in the report's order; words come after them, then the reward models."""

Line = dict[str, Any]


def drift_report(
    profile: Profile, earlier: Sequence[Profile], *, arrivals: Sequence[Arrival] = ()
) -> dict[str, Any]:
    """Compare a batch's profile with those of earlier batches, in ingest order.

    Returns `batch`, `against`, `rows`, `verdict` and `lines`; a line has `measure`, `title`,
    `value`, `before`, `statistic`, `p_value` (corrected), `effect`, `verdict` and `text`.
    `arrivals` hold the reward models' accuracy on the batch before they were trained on it.
    """
    repeats = _repeats(earlier)
    lines = [_line(aspect, profile, earlier, repeats) for aspect in ASPECTS]
    lines.append(_vocabulary_line(profile, earlier, repeats))
    lines += [arrival_line(arrival) for arrival in arrivals]
    tested = [line for line in lines if line["p_value"] is not None]
    adjusted = holm([line["p_value"] for line in tested])
    for line, p_value in zip(tested, adjusted, strict=True):
        line["p_value"] = p_value
    for line in lines:
        _judge(line)
    return {
        "batch": profile["batch"],
        "against": [item["batch"] for item in earlier],
        "rows": profile["rows"],
        "verdict": max((line["verdict"] for line in lines), key=VERDICTS.index),
        "lines": lines,
    }


def headline(report: Mapping[str, Any]) -> str:
    """Return the verdict on a batch in one line, with the sentences that led to it."""
    against = report["against"]
    if not against:
        return f"drift of {report['batch']}: the first batch, nothing to compare with"
    number = f"{len(against)} earlier batches" if len(against) > 1 else against[0]
    found = [line for line in report["lines"] if line["verdict"] != AS_EXPECTED]
    found.sort(key=lambda line: line["verdict"] != STOP)
    parts = [line["text"] for line in found[:MAX_TOLD]]
    if len(found) > MAX_TOLD:
        parts.append(f"and {len(found) - MAX_TOLD} more")
    why = f" ({'; '.join(parts)})" if found else ""
    return f"drift of {report['batch']} against {number}: {report['verdict']}{why}"


def _line(aspect: Aspect, profile: Profile, earlier: Sequence[Profile], repeats: float) -> Line:
    """Return the line of one measure of the profiles, not judged yet."""
    now_part = profile["measures"].get(aspect.name)
    parts = [p["measures"][aspect.name] for p in earlier if aspect.name in p["measures"]]
    parts = [part for part in parts if part["counts"]]
    line = _empty_line(aspect.name, aspect.title)
    if not now_part or not now_part["counts"]:
        line["text"] = f"{aspect.title}: {_absent(aspect)}"
        return line
    if not parts:
        line["value"] = _value(aspect, merged_measure([now_part]))
        line["text"] = f"{aspect.title}: nothing to compare with"
        return line
    now, before = _aligned(now_part, parts)
    line |= {"value": _value(aspect, now), "before": _value(aspect, before)}
    if min(now.sums.clusters, before.sums.clusters) < MIN_PROMPTS:
        few = int(min(now.sums.clusters, before.sums.clusters))
        line["text"] = f"{aspect.title}: {few} prompts are too few to tell"
        return line
    test = shares_test(now.sums, before.sums, ordered=aspect.ordered, repeats=repeats)
    line |= {"statistic": test.statistic, "p_value": test.p_value}
    line["effect"] = _effect(now, before, ordered=aspect.ordered)
    line["thresholds"] = SHARES
    line["text"] = f"{aspect.title}: {_told(aspect, now, before)}"
    return line


def _absent(aspect: Aspect) -> str:
    if aspect.name == "new_prompts":
        return "nothing to compare with, no batch came before"
    return f"none of {aspect.of}"


def _empty_line(name: str, title: str) -> Line:
    names = ("value", "before", "statistic", "p_value", "effect", "thresholds")
    return {"measure": name, "title": title, **dict.fromkeys(names)}


def _judge(line: Line) -> None:
    """Fill in the verdict from p-value, effect and thresholds, and say so where nothing changed."""
    p_value, effect, thresholds = line["p_value"], line["effect"], line.pop("thresholds")
    quiet = line.pop("quiet", line["text"])
    line["verdict"] = AS_EXPECTED
    if p_value is None:
        return
    if p_value < STOP_LEVEL and effect >= thresholds.stop:
        line["verdict"] = STOP
    elif p_value < LOOK_LEVEL and effect >= thresholds.look:
        line["verdict"] = LOOK
    elif p_value >= LOOK_LEVEL:
        line["text"] = f"{quiet} (within chance)"
    else:
        line["text"] = f"{line['text']} (small)"


def _aligned(
    part: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]
) -> tuple[Measure, Measure]:
    """Return both sides over the same categories."""
    names = sorted({name for side in (part, *parts) for name in side["names"]})
    return merged_measure([part], names), merged_measure(parts, names)


def _effect(now: Measure, before: Measure, *, ordered: bool) -> float:
    """Return total variation, or Kolmogorov's distance for ordered categories."""
    change = now.sums.mean - before.sums.mean
    if ordered:
        return float(np.abs(np.cumsum(change)).max())
    return float(0.5 * np.abs(change).sum())


def _repeats(earlier: Sequence[Profile]) -> float:
    """Return how often a prompt of the earlier batches stands in their merged sums on average."""
    if not earlier:
        return 1.0
    total = sum(profile["prompts"]["distinct"] for profile in earlier)
    return float(total / num_distinct_prompts(earlier))


# Values and sentences


def _shares(measure: Measure) -> dict[Any, float]:
    return dict(zip(measure.names, measure.sums.mean.tolist(), strict=True))


def _value(aspect: Aspect, measure: Measure) -> Any:
    """Return what a measure is, as a report shows it."""
    shares = _shares(measure)
    if aspect.name == "turns":
        return 1.0 - shares.get(1, 0.0)
    if aspect.ordered:
        return median_length(measure)
    if aspect.shown:
        return shares.get(aspect.shown, 0.0)
    return {name: share for name, share in shares.items() if share > 0.0}


def median_length(measure: Measure) -> float:
    """Return the median in characters, interpolated inside its bin on the logarithmic scale."""
    shares = measure.sums.mean
    cumulated = np.cumsum(shares)
    at = int(np.searchsorted(cumulated, 0.5))
    inside = (0.5 - (cumulated[at] - shares[at])) / shares[at]
    return float(2.0 ** ((measure.names[at] + inside) / BINS_PER_OCTAVE))


def _told(aspect: Aspect, now: Measure, before: Measure) -> str:
    """Say what changed, largest change first."""
    value, earlier = _value(aspect, now), _value(aspect, before)
    if aspect.name == "turns":
        return f"more than one user turn {percent(earlier)} -> {percent(value)} of {aspect.of}"
    if aspect.ordered:
        return f"median {earlier:.0f} -> {value:.0f} characters"
    if aspect.shown:
        shares = f"{percent(earlier)} -> {percent(value)} of {aspect.of}"
        return f"{aspect.told} {shares}".lstrip()
    changes = {name: round(value.get(name, 0.0) - earlier.get(name, 0.0), 6) for name in now.names}
    names = sorted(changes, key=lambda name: (-abs(changes[name]), -changes[name], name))
    parts = []
    for name in names[:MAX_CHANGES]:
        share, was = value.get(name, 0.0), earlier.get(name, 0.0)
        if abs(share - was) < NAMED_CHANGE:
            continue
        if was == 0.0:
            parts.append(f"{name} is new: {percent(share)}")
        elif share == 0.0:
            parts.append(f"{name} is gone (was {percent(was)})")
        else:
            parts.append(f"{name} {percent(was)} -> {percent(share)}")
    return f"{', '.join(parts)} of {aspect.of}" if parts else "no share moved by a point"


def percent(share: float) -> str:
    """Return a share as people read it."""
    digits = 1 if 0.0 < share < 0.0095 else 0
    return f"{100 * share:.{digits}f} %"


def _vocabulary_line(profile: Profile, earlier: Sequence[Profile], repeats: float) -> Line:
    """Compare the mean word vectors and name the words whose use changed most."""
    line = _empty_line("vocabulary", "vocabulary")
    if not earlier:
        line["text"] = "vocabulary: nothing to compare with"
        return line
    now = merged_words([profile["vocabulary"]])
    before = merged_words([item["vocabulary"] for item in earlier])
    more, less = changed_words(now.counts, now.sums.rows, before.counts, before.sums.rows)
    line |= {"value": more[:MAX_WORDS], "before": less[:MAX_WORDS]}
    if min(now.sums.clusters, before.sums.clusters) < MIN_PROMPTS:
        few = int(min(now.sums.clusters, before.sums.clusters))
        line["text"] = f"vocabulary: {few} prompts are too few to tell"
        return line
    test, line["effect"] = _word_test(now, before, repeats)
    line |= {"statistic": test.statistic, "p_value": test.p_value, "thresholds": VOCABULARY}
    parts = [
        f"{title} {', '.join(words[:MAX_WORDS])}"
        for title, words in (("more", more), ("less", less))
        if words
    ]
    line["quiet"] = "vocabulary: no change"
    line["text"] = f"vocabulary: {'; '.join(parts) or 'no word moved by a point'}"
    return line


def _word_test(now: Words, before: Words, repeats: float) -> tuple[Test, float]:
    """Return the test of equal mean vectors and their distance, cleared of chance.

    distance^2 = max(0, |d|^2 - E|d|^2 under equal populations) / (1 - |mean|^2); single vectors
    have length 1, so 1 - |mean|^2 is the variance of a single comparison.
    """
    sides = (now.sums, before.sums)
    mean = (sides[0].sums + sides[1].sums) / (sides[0].rows + sides[1].rows)
    spread = float(1.0 - mean @ mean)
    metric: NDArray[np.float64] = np.eye(DIMENSIONS)
    test = difference_test(*sides, metric, spread=spread, repeats=repeats)
    difference = sides[0].mean - sides[1].mean
    quadratic = float(difference @ difference)
    chance = quadratic / test.statistic if test.statistic > 0.0 else quadratic
    return test, float((max(0.0, quadratic - chance) / spread) ** 0.5) if spread > 0.0 else 0.0
