"""Check that the toy world is an honest test: several seeds, two negative controls, one table.

    python benchmarks/toy_world.py --seeds 0 1 2 --folder /tmp/toy-world

Every run is the real quickstart recipe. The controls are the same recipe with annotators that flip
coins (gold must not rise) and with annotators that like length (the promotion rule must refuse).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.artifacts import read_jsonl
from rlhf.data.ledger import Store
from rlhf.data.records import AXES, STRENGTHS, Comparison, Kind
from rlhf.toy.world import World

# The open comparisons are never flawed, so in the controls all of them go to the judges.
CONTROLS = {
    "shuffled": ["toy.shuffle_labels=true", "judge.share=1.0"],
    "length-bias": ["toy.length_bias=1.0", "judge.share=1.0"],
}


def run_recipe(folder: Path, *, seed: int, name: str, overrides: list[str]) -> Path:
    """Run the quickstart recipe to its end and return the run's folder."""
    command = [sys.executable, "-m", "rlhf.cli", "run", "recipe=quickstart", f"run={name}"]
    paths = [f"paths.runs={folder / 'runs'}", f"paths.store={folder / 'store'}"]
    subprocess.run([*command, *paths, f"seed={seed}", *overrides], check=True)
    return folder / "runs" / name


def comparisons_of(folder: Path, name: str) -> list[Comparison]:
    """Return every comparison the simulated annotators rated in a run."""
    store = Store(folder / "store", f"sim-{name}")
    return [row for id in store.ids(Kind.batch) for row in store.comparisons(Kind.batch, id)]


def rated_pairs(folder: Path, name: str) -> list[Comparison]:
    """Return what the annotators said, before ingest leaves out unsafe chosen responses."""
    paths = sorted((folder / "runs" / name).glob("round-*/collect/rated.jsonl"))
    return [Comparison(**row) for path in paths for row in read_jsonl(path)]


def gold_gap(world: World, row: Comparison) -> float:
    """Return gold(chosen) - gold(rejected) on the comparison's own axis."""
    chosen = world.gold(row.prompt, row.chosen).on_axis(row.axis)
    return chosen - world.gold(row.prompt, row.rejected).on_axis(row.axis)


def agreement(world: World, rows: list[Comparison]) -> dict[str, float]:
    """Return, per strength, how often the annotators' order is gold's order (ties left out)."""
    found = {}
    for strength in STRENGTHS:
        gaps = [gold_gap(world, r) for r in rows if r.strength == strength and not r.tie]
        gaps = [gap for gap in gaps if gap != 0]
        found[strength] = sum(gap > 0 for gap in gaps) / max(len(gaps), 1)
    return found


def half_credit(differences: list[float]) -> float:
    """Return the share of positive differences, zero counting one half."""
    return float(np.mean([1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences]))


def longer_wins(rows: list[Comparison]) -> float:
    """Return the accuracy of choosing the longer response."""
    return half_credit([float(len(r.chosen.split()) - len(r.rejected.split())) for r in rows])


def bag_of_words_accuracy(train: list[Comparison], heldout: list[Comparison]) -> float:
    """Fit a Bradley-Terry model on word counts by ridge regression, score held-out pairs."""
    words = sorted({w for r in train for text in (r.chosen, r.rejected) for w in text.split()})
    index = {word: i for i, word in enumerate(words)}

    def features(rows: list[Comparison]) -> np.ndarray:
        table = np.zeros((len(rows), len(index)))
        for i, row in enumerate(rows):
            for text, sign in ((row.chosen, 1), (row.rejected, -1)):
                for word, count in Counter(text.split()).items():
                    if word in index:
                        table[i, index[word]] += sign * count
        return table

    x, weights = features(train), np.zeros(len(index))
    for _ in range(500):
        probability = 1 / (1 + np.exp(x @ weights))
        weights += 0.5 * (x.T @ probability / len(x) - 1e-3 * weights)
    return half_credit(list(features(heldout) @ weights))


def baselines(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Measure what needs no reward model: annotators, gold, length and, per axis, bag of words."""
    world, rows = World(seed), [row for row in comparisons_of(folder, name) if not row.tie]
    found: dict[str, Any] = {"agreement": agreement(world, rated_pairs(folder, name))}
    for axis in AXES:
        train = [r for r in rows if r.axis == axis and not r.heldout]
        heldout = [r for r in rows if r.axis == axis and r.heldout]
        found[axis] = {
            "gold": half_credit([gold_gap(world, r) for r in heldout]),
            "longer": longer_wins(heldout),
            "bag_of_words": bag_of_words_accuracy(train, heldout),
        }
    return found


def summarise(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Join a run's report with its baselines."""
    report = json.loads((folder / "runs" / name / "report.json").read_text())
    last_round = max(row["round"] for row in report["reward_accuracy"])
    accuracy: dict[str, dict[str, float]] = {axis: {} for axis in AXES}
    for row in report["reward_accuracy"]:
        if row["round"] == last_round:
            accuracy[row["axis"]][row["strength"] or "all"] = row["accuracy"]
    versions = [
        {key: version.get(key) for key in ("name", "state", "gold")}
        for version in report["versions"]
    ]
    return {
        "run": name,
        "seed": seed,
        "accuracy": accuracy,
        "versions": versions,
        "baselines": baselines(folder, name, seed),
    }


def table(summaries: list[dict[str, Any]]) -> str:
    """Return the figures that the acceptance of the toy world is about, as Markdown."""
    lines = [
        "| run | axis | " + " | ".join(STRENGTHS) + " | all | gold | share | longer | words |",
        "|---|---|" + "---|" * (len(STRENGTHS) + 5),
    ]
    for summary in summaries:
        for axis in AXES:
            accuracy, floor = summary["accuracy"][axis], summary["baselines"][axis]
            share = accuracy["all"] / floor["gold"]
            values = [*(accuracy[s] for s in (*STRENGTHS, "all")), floor["gold"], share]
            values += [floor["longer"], floor["bag_of_words"]]
            cells = " | ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {summary['run']} | {axis} | {cells} |")
    lines += ["", "| run | version | state | gold helpfulness | violations | over-refusals |"]
    lines.append("|---|---|---|---|---|---|")
    for summary in summaries:
        for version in summary["versions"]:
            gold = version["gold"]
            keys = ("helpfulness", "violation_rate", "over_refusal_rate")
            cells = " | ".join(interval(gold[key]) if gold else "-" for key in keys)
            lines.append(f"| {summary['run']} | {version['name']} | {version['state']} | {cells} |")
    return "\n".join(lines) + "\n"


def interval(value: dict[str, float]) -> str:
    """Return a mean with its bounds."""
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def main() -> None:
    """Run all seeds and both controls, and write summary.json and summary.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--controls", nargs="*", choices=list(CONTROLS), default=list(CONTROLS))
    arguments, overrides = parser.parse_known_args()
    summaries = []
    for seed in arguments.seeds:
        name = f"toy-{seed}"
        run_recipe(arguments.folder, seed=seed, name=name, overrides=overrides)
        summaries.append(summarise(arguments.folder, name, seed))
    for control in arguments.controls:
        options = [*overrides, *CONTROLS[control]]
        run_recipe(arguments.folder, seed=0, name=f"toy-{control}", overrides=options)
        summaries.append(summarise(arguments.folder, f"toy-{control}", 0))
    (arguments.folder / "summary.json").write_text(json.dumps(summaries, indent=2) + "\n")
    (arguments.folder / "summary.md").write_text(table(summaries))
    sys.stdout.write(table(summaries))


if __name__ == "__main__":
    main()
