"""The batches a run learned from: what ingest counted, what drifted, who annotated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.artifacts import read_json
from rlhf.data.arrival import Arrival
from rlhf.data.drift import drift_report
from rlhf.data.quality import quality_report
from rlhf.data.records import AXES
from rlhf.report.gather.sources import STORE, Row, Run

PROFILE = "profile.json"
WITHDRAWALS = "tombstones"
CORRECTION = "tombstone.json"
"""Where the store keeps rows that no longer count."""


def batches(run: Run) -> list[Row]:
    """Return every batch of the plan in order: its round, ingest's counts, its drift.

    `counts` and `drift` are None where the store, or the batch's profile, is not there.
    """
    found = []
    for number, item in enumerate(run.plan["rounds"]):
        for position, batch in enumerate(item["batches"]):
            found.append(
                {
                    "id": batch,
                    "round": item["round"],
                    "from": f"plan.json#/rounds/{number}/batches/{position}",
                    "counts": _counts(run, batch),
                    "accepted_by": _accepted(run, batch),
                    "drift": None,
                }
            )
    _add_drift(run, found)
    return found


def _counts(run: Run, batch: str) -> Row | None:
    manifest = run.batch_file(batch, "manifest.json")
    if manifest is None:
        return None
    source = run.batch_at(batch, "manifest.json", "counts")
    return {**manifest["counts"], "from": source}


def _accepted(run: Run, batch: str) -> Row | None:
    manifest = run.batch_file(batch, "manifest.json")
    if manifest is None or "accepted_by" not in manifest:
        return None
    return {**manifest["accepted_by"], "from": run.batch_at(batch, "manifest.json", "accepted_by")}


def _add_drift(run: Run, found: list[Row]) -> None:
    """Compare each batch that has a profile with all earlier ones that have one."""
    earlier: list[dict[str, Any]] = []
    sources: list[str] = []
    for row in found:
        profile = run.batch_file(row["id"], PROFILE)
        if profile is None:
            continue
        source = run.batch_at(row["id"], PROFILE)
        if earlier:
            is_alone = sum(other["round"] == row["round"] for other in found) == 1
            arrivals = list(_arrivals(run, row["round"])) if is_alone else []
            row["drift"] = {
                **drift_report(profile, earlier, arrivals=[arrival for arrival, _ in arrivals]),
                "from": [source, *sources, *(place for _, places in arrivals for place in places)],
                "how": "drift",
            }
        earlier.append(profile)
        sources.append(source)


def _arrivals(run: Run, round_: int) -> Iterator[tuple[Arrival, list[str]]]:
    """Yield what the reward models of the round before said about this round's only batch."""
    if run.settings is None:
        return
    for axis in AXES:
        models = {
            item.round: item for item in run.reward_models("reward") if item.option("axis") == axis
        }
        now, before = models.get(round_), models.get(round_ - 1)
        if now is None or before is None or not now.has("accuracy_before.json"):
            continue
        arrival = Arrival(
            axis=axis,
            on_arrival=now.read("accuracy_before.json"),
            heldout=before.read("accuracy.json"),
            level=run.settings["evaluate"]["level"],
        )
        yield arrival, [now.at("accuracy_before.json"), before.at("accuracy.json")]


def corrections(run: Run) -> list[Row]:
    """Return the stream's withdrawals and corrections in their order, without the row ids."""
    stream = run.stream_folder
    if stream is None:
        return []
    paths = [*stream.glob(f"{WITHDRAWALS}/*.json"), *stream.glob(f"batches/*/{CORRECTION}")]
    names = ("sequence", "what", "kind", "of", "by", "reason", "time", "num_rows")
    found = []
    for path in paths:
        tree = read_json(path)
        kept = {name: tree[name] for name in names}
        found.append({**kept, "from": f"{STORE}{path.relative_to(stream.parent)}#"})
    return sorted(found, key=lambda row: row["sequence"])


def quality(run: Run) -> list[Row]:
    """Return agreement, strengths and length preference per annotator, or per source, and axis.

    From the held-out comparisons that the newest reward models scored.
    """
    found = []
    for axis in AXES:
        scored = (i for i in run.reward_models("reward") if i.has("scores.jsonl"))
        item = run.newest(i for i in scored if i.option("axis") == axis)
        if item is None:
            continue
        rows = [row for row in run.rows(item, "scores.jsonl") if row["axis"] == axis]
        if rows:
            is_named = any(row.get("annotator") for row in rows)
            by = "annotator" if is_named else "source"
            found.append(
                {
                    "round": item.round,
                    "axis": axis,
                    **quality_report(rows, by=by),
                    "from": item.at("scores.jsonl"),
                    "how": "quality",
                }
            )
    return found
