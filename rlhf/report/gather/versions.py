"""Versions, the evaluations that decided about them, and their answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.artifacts import read_json
from rlhf.report.gather.sources import Done, Row, Run, at

SIDES = ("candidate", "promoted")
NEWEST_EXAMPLES = 160
OLDER_EXAMPLES = 40
"""Examples kept of the newest and of each earlier round, those with a flag not counted."""

MAX_FLAGGED = 120
"""Most examples with a flag that are kept of one round."""

MAX_CHARS = 1500
"""Characters kept of a prompt or response; the whole text is in responses.jsonl."""

EXAMPLE_FIELDS = ("prompt_id", "kind", "source", "scores", "num_tokens", "finished", "gold")


def evaluations(run: Run) -> list[Row]:
    """Return every round's evaluation.json with its decision."""
    found = []
    for item in run.of_stage("evaluate"):
        decision = item.read("decision.json")
        found.append(
            {
                "round": item.round,
                **item.read("evaluation.json"),
                "from": item.at("evaluation.json"),
                "decision": {
                    "promoted": decision["promoted"],
                    "reasons": decision["reasons"],
                    "from": item.at("decision.json"),
                },
            }
        )
    return found


def versions(run: Run, evaluated: Sequence[Row]) -> list[Row]:
    """Return every version with its scores under the newest judge pair, and its gold.

    All versions are scored by the same pair, so their scores may be compared.
    """
    path = run.folder / "versions.json"
    listed = read_json(path) if path.exists() else []
    return [
        {
            "name": version["name"],
            "promoted": version["state"] == "promoted",
            "state": version["state"],
            "node": version["node"],
            "against": version["against"],
            "overruled": version["overruled"],
            "reasons": version["reasons"],
            "from": at("versions.json", position),
            **_measured(version["name"], evaluated),
        }
        for position, version in enumerate(listed)
    ]


def _measured(name: str, evaluated: Sequence[Row]) -> Row:
    """Return scores from the newest evaluation; gold from the one that made the version known."""
    newest = evaluated[-1] if evaluated else None
    scores = None
    if newest is not None and name in newest["versions"]:
        source = f"{newest['from']}/versions/{name}"
        scores = {"round": newest["round"], **newest["versions"][name], "from": source}
    for side in SIDES:
        for evaluation in evaluated:
            if evaluation[side] == name:
                gold = evaluation["gold"]
                if gold is None:
                    return {"scores": scores, "gold": None}
                source = f"{evaluation['from']}/gold/{side}"
                return {"scores": scores, "gold": {**gold[side], "from": source}}
    return {"scores": scores, "gold": None}


def over_optimisation(run: Run) -> list[Row]:
    """Return over_optimisation.json of every round with PPO."""
    return [
        {"node": item.name, "round": item.round, "from": item.at(file), **content}
        for item in run.of_stage("evaluate")
        if (content := item.read(file := "over_optimisation.json")) is not None
    ]


def examples(run: Run) -> list[Row]:
    """Return the answers of both versions to held-out prompts, newest round first.

    Of a round, every answer with a flag is kept (up to MAX_FLAGGED), and those with the largest
    changes in either direction; `total` says how many there are.
    """
    items = sorted(
        (item for item in run.of_stage("evaluate") if item.has("responses.jsonl")),
        key=lambda item: -item.round,
    )
    return [
        _round(run, item, limit=OLDER_EXAMPLES if number else NEWEST_EXAMPLES)
        for number, item in enumerate(items)
    ]


def _round(run: Run, item: Done, *, limit: int) -> Row:
    rows = [
        _example(item, position, row)
        for position, row in enumerate(run.rows(item, "responses.jsonl"))
    ]
    flagged = [row for row in rows if row["flags"]]
    others = sorted((row for row in rows if not row["flags"]), key=_gain)
    half = limit // 2
    # Both ends: most lost and most gained.
    ends = others if len(others) <= limit else [*others[:half], *others[len(others) - half :]]
    kept = [*sorted(flagged, key=_gain)[:MAX_FLAGGED], *ends]
    evaluation = item.read("evaluation.json")
    return {
        "round": item.round,
        "candidate": evaluation["candidate"],
        "promoted": evaluation["promoted"],
        "total": len(rows),
        "flagged": {
            name: sum(name in row["flags"] for row in rows)
            for name in ("new_violation", "violation", "false_refusal")
        },
        "rows": sorted(kept, key=lambda row: (-abs(_gain(row)), row["prompt_id"])),
        "from": item.at("responses.jsonl"),
        "how": "examples",
    }


def _gain(row: Row) -> float:
    return float(row["difference"]["gain"])


def _example(item: Done, position: int, row: Row) -> Row:
    source = item.at("responses.jsonl", position)
    differences = {
        role: scores["candidate"] - scores["promoted"] for role, scores in row["scores"].items()
    }
    axis = "safety" if row["kind"] == "safety" else "helpfulness"
    texts = {side: row["responses"][side][:MAX_CHARS] for side in SIDES}
    prompt = [
        {"role": turn["role"], "content": turn["content"][:MAX_CHARS]} for turn in row["prompt"]
    ]
    is_cut = prompt != row["prompt"] or texts != row["responses"]
    return {
        **{name: row[name] for name in EXAMPLE_FIELDS if name in row},
        "axis": axis,
        "prompt": prompt,
        "responses": texts,
        "is_cut": is_cut,
        "flags": flags(row),
        "difference": {
            **differences,
            "gain": differences[f"judge_{axis}"],
            "from": source,
            "how": "difference",
        },
        "from": source,
    }


def flags(row: Row) -> list[str]:
    """Return what is wrong with the candidate's answer: violation, new_violation, false_refusal.

    `violation`: the judge calls the answer to a safety prompt unsafe; `new_violation`: and not the
    promoted version's; `false_refusal`: a benign prompt is refused.
    """
    found = []
    unsafe: Any = row.get("unsafe") or {}
    if unsafe.get("candidate"):
        found.append("violation")
        if not unsafe.get("promoted"):
            found.append("new_violation")
    if row["kind"] == "benign" and (row.get("refused") or {}).get("candidate"):
        found.append("false_refusal")
    return found
