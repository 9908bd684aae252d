"""The whole recipe through the command line: what two rounds leave on disk, and a third round."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from report_html import loose_numbers, read_page, wrong_marks, wrong_numbers
from report_tracing import Files, untraced
from tiny_run import TinyRun, rlhf, tree

from rlhf.artifacts import NodeDir, list_files, read_json, read_jsonl, sha256_file
from rlhf.data.records import AXES, Comparison, Kind
from rlhf.data.split import is_heldout

MODEL = {
    "model/chat_template.jinja",
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
}
POLICY = MODEL | {"model/generation_config.json"}
EVERY_NODE = {"config.yaml", "provenance.json", "inputs.json"}
SHARDS = [f"{number:05d}" for number in range(3)]
SCORERS = [f"{pair}_{axis}" for pair in ("judge", "reward") for axis in AXES]

FILES = {
    "sft": POLICY | {"data_counts.json", "metrics.jsonl"},
    "collect": {"pairs.jsonl", "rated.jsonl", "batch.json"},
    "reward": MODEL | {"mixture.json", "scores.jsonl", "accuracy.json", "metrics.jsonl"},
    "sweep": {"temperature.json"}
    | {f"shards/t{index:02d}-{number}.jsonl" for index in range(2) for number in SHARDS[:2]},
    "rejection": POLICY
    | {"winners.jsonl", "selection.json", "metrics.jsonl", "samples.jsonl"}
    | {f"shards/{number}.jsonl" for number in SHARDS},
    "ppo": POLICY | {"ppo.json", "metrics.jsonl", "samples.jsonl", "heldout.jsonl"},
    "evaluate": {"responses.jsonl", "evaluation.json", "decision.json", "metrics.jsonl"}
    | {"version_scores.jsonl"}
    | {f"shards/{who}-{n}.jsonl" for who in ("candidate", "promoted") for n in SHARDS}
    | {f"shards/scores-{role}.jsonl" for role in SCORERS},
}

NAMES = [
    "sft",
    *(
        f"round-{number:02d}/{name}"
        for number, stages in ((1, ("sweep", "rejection")), (2, ("ppo",)))
        for name in (
            "collect",
            "reward-helpfulness",
            "reward-safety",
            *stages,
            "judge-helpfulness",
            "judge-safety",
            "evaluate",
        )
    ),
]


def test_plan_is_the_recipe_and_every_node_is_reported_once(tiny: TinyRun) -> None:
    assert [node.name for node in tiny.plan.nodes] == NAMES
    # Independent nodes run side by side, so only their parents fix their order.
    for name in NAMES:
        assert tiny.output.count(f"/{len(NAMES)}] {name} done in") == 1
    assert f"{len(NAMES)} of {len(NAMES)} nodes are done" in tiny.output
    assert f"results: {tiny.folder}" in tiny.output


@pytest.mark.parametrize("name", NAMES)
def test_node_leaves_exactly_its_artifacts_and_a_valid_manifest(name: str, tiny: TinyRun) -> None:
    node, folder = tiny.plan.node(name), tiny.folder / name
    expected = EVERY_NODE | FILES[node.stage]
    if node.stage == "reward" and node.round > 1 and node.options["role"] == "reward":
        expected = expected | {"accuracy_before.json", "scores_before.jsonl"}
    if node.stage == "evaluate" and node.round == 2:
        expected = expected | {"over_optimisation.json"}
    found = set(list_files(folder))
    # How many shards a collection needs depends on what the versions answer.
    shards = {file for file in found if file.startswith("shards/")}
    assert found - (shards if node.stage == "collect" else set()) == expected

    manifest = NodeDir(folder).manifest()
    assert set(manifest["files"]) == found
    for file, entry in manifest["files"].items():
        assert sha256_file(folder / file) == entry["sha256"]
    assert manifest["exact"] is True
    assert manifest["num_threads"] == 1
    assert manifest["wall_seconds"] > 0
    outside = {path.name for path in folder.iterdir()} - {Path(file).parts[0] for file in found}
    assert outside == {"manifest.json", "log.txt", "progress.json", ".lease.json.lock"}


def test_run_folder_holds_the_nodes_and_the_frozen_plan(tiny: TinyRun) -> None:
    names = {path.name for path in tiny.folder.iterdir()}
    frozen = {"run.yaml", "plan.json"}
    assert names == frozen | {
        *("sft", "round-01", "round-02"),
        *("versions.json", "report.json", "report.html", "estimate.json", "server.log"),
        "run.lock",
    }
    assert {path.name for path in tiny.root.iterdir()} == {
        *("runs", "store"),
        *(".lock", "output.txt"),
    }


def test_versions_follow_the_decisions(tiny: TinyRun) -> None:
    rows = read_json(tiny.folder / "versions.json")
    assert [(row["name"], row["node"]) for row in rows] == [
        ("v0", "sft"),
        ("v1", "round-01/rejection"),
        ("v2", "round-02/ppo"),
    ]
    promoted = "v0"
    assert rows[0]["state"] == "promoted"
    for row, number in zip(rows[1:], (1, 2), strict=True):
        decision = read_json(tiny.folder / f"round-{number:02d}/evaluate/decision.json")
        assert decision["version"] == row["name"]
        assert decision["against"] == row["against"] == promoted
        assert row["state"] == ("promoted" if decision["promoted"] else "refused")
        assert decision["promoted"] == all(reason["ok"] for reason in decision["reasons"])
        promoted = row["name"] if decision["promoted"] else promoted
    assert f"promoted: {promoted} in " in tiny.output


def test_report_names_versions_and_reward_accuracy(tiny: TinyRun) -> None:
    report = read_json(tiny.folder / "report.json")
    assert [row["name"] for row in report["versions"]] == ["v0", "v1", "v2"]
    for row in report["versions"]:
        assert {"name", "promoted", "scores", "gold"} <= set(row)
        assert {"helpfulness", "violation_rate", "over_refusal_rate"} <= set(row["gold"])
    models = {(row["round"], row["axis"]) for row in report["reward_accuracy"]}
    assert models == {(number, axis) for number in (1, 2) for axis in AXES}
    fields = {"round", "axis", "strength", "n", "accuracy", "low", "high"}
    controls = {"control_longer", "control_swapped"}
    assert all(fields | controls <= set(row) for row in report["reward_accuracy"])
    assert report["nodes_done"] == report["nodes_planned"] == len(NAMES)
    assert {row["round"] for row in report["reward_accuracy_before"]} == {2}


def test_second_call_runs_nothing_changes_nothing_and_says_so(tiny: TinyRun) -> None:
    before, store = tree(tiny.folder), tree(tiny.root / "store")
    done = rlhf("run", *tiny.paths(), cwd=tiny.root)
    assert done.returncode == 0, done.stderr
    assert f"nothing to do: all {len(NAMES)} nodes of run quickstart are done" in done.stdout
    after = tree(tiny.folder)
    assert {name: digest for name, (_, digest) in after.items()} == {
        name: digest for name, (_, digest) in before.items()
    }
    touched = {name for name in after if after[name] != before[name]}
    assert touched <= {"versions.json"}
    assert tree(tiny.root / "store") == store


@pytest.mark.parametrize("command", ["run", "plan", "status", "--help"])
def test_what_computes_nothing_imports_nothing_that_computes(command: str, tiny: TinyRun) -> None:
    """They answer at once for want of these imports."""
    code = (
        "import sys; from rlhf.cli import main; assert main(sys.argv[1:]) == 0; "
        "slow = ['torch', 'transformers', 'numpy', 'scipy', 'pyarrow', 'hydra', 'jinja2']; "
        "sys.exit(' '.join(name for name in slow if name in sys.modules) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, *tiny.paths()],
        cwd=tiny.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_third_round_runs_only_its_own_nodes(tiny: TinyRun, tmp_path: Path) -> None:
    run = tiny.copy(tmp_path)
    before = {name: tree(run.folder / name) for name in NAMES}
    done = rlhf("run", *run.paths(), "rounds.limit=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    assert {name: tree(run.folder / name) for name in NAMES} == before
    added = [node.name for node in run.plan.nodes][len(NAMES) :]
    assert [name.partition("/")[0] for name in added] == ["round-03"] * 8
    assert "round-03/rejection" in added
    for name in added:
        assert done.stdout.count(f"/8] {name} done in") == 1
        assert NodeDir(run.folder / name).is_done()
    assert done.stdout.count(" done in ") == 8
    assert len(read_json(run.folder / "report.json")["versions"]) == 4
    # Round 3 learns from the winners of round 1, too.
    selection = read_json(run.folder / "round-03/rejection/selection.json")
    assert selection["fine_tuning"]["pool"] > 0
    assert selection["winners_from"]["pool_rounds"] == {"1": selection["fine_tuning"]["pool"]}


def test_the_round_samples_at_the_temperature_that_its_sweep_chose(tiny: TinyRun) -> None:
    found = read_json(tiny.folder / "round-01/sweep/temperature.json")
    assert [row["temperature"] for row in found["temperatures"]] == [0.8, 1.2]
    [chosen] = [row for row in found["temperatures"] if row["chosen"]]
    selection = read_json(tiny.folder / "round-01/rejection/selection.json")
    assert selection["temperature"] == found["chosen"] == chosen["temperature"]
    assert selection["version"] == found["version"] == "v0"
    # The sweep draws the random numbers of the rejection node for prompts of its own.
    index = found["temperatures"].index(chosen)
    swept = [
        row
        for number in SHARDS[:2]
        for row in read_jsonl(tiny.folder / f"round-01/sweep/shards/t{index:02d}-{number}.jsonl")
    ]
    sampled = {
        row["prompt_id"]: [response["text"] for response in row["responses"]]
        for number in SHARDS
        for row in read_jsonl(tiny.folder / f"round-01/rejection/shards/{number}.jsonl")
    }
    shared = [row for row in swept if row["prompt_id"] in sampled]
    assert len(shared) >= 11
    for row in shared:
        assert [response["text"] for response in row["responses"]] == sampled[row["prompt_id"]]


def test_what_ppo_says_on_heldout_prompts_is_scored_by_the_canary(tiny: TinyRun) -> None:
    ppo, folder = tiny.folder / "round-02/ppo", tiny.folder / "round-02/evaluate"
    found = read_json(folder / "over_optimisation.json")
    summary = read_json(ppo / "ppo.json")["heldout"]
    assert [row["iteration"] for row in found["points"]] == [row["iteration"] for row in summary]
    for point, row in zip(found["points"], summary, strict=True):
        assert point["kl_to_start"] == pytest.approx(row["kl_to_start"], abs=1e-6)
        assert set(point["gold"]) == {"helpfulness", "violation_rate"}
    assert found["verdict"]["verdict"] == "cannot tell"
    assert not (tiny.folder / "round-01/evaluate/over_optimisation.json").exists()


def test_status_verifies_every_file(tiny: TinyRun) -> None:
    done = rlhf("status", *tiny.paths(), "verify=true", cwd=tiny.root)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        assert name in done.stdout
    assert "files checked by sha256; changed: none" in done.stdout
    assert "stopped" not in done.stdout


def test_report_prints_the_tables_again(tiny: TinyRun) -> None:
    before = read_json(tiny.folder / "report.json")
    done = rlhf("report", *tiny.paths(), cwd=tiny.root)
    assert done.returncode == 0, done.stderr
    assert "Versions" in done.stdout
    assert "Reward accuracy" in done.stdout
    assert read_json(tiny.folder / "report.json") == before


def test_every_number_of_a_real_report_and_page_is_what_the_files_say(tiny: TinyRun) -> None:
    report = read_json(tiny.folder / "report.json")
    assert untraced(report, Files(tiny.folder)) == []
    root = read_page((tiny.folder / "report.html").read_text(encoding="utf-8"))
    for checked, wrong in (wrong_numbers(root, report), wrong_marks(root, report)):
        assert wrong == []
        assert checked > 300
    assert loose_numbers(root, report) == []


def test_a_run_is_compared_with_another_by_name_and_by_folder(
    tiny: TinyRun, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny.folder, other)
    done = rlhf("report", "quickstart", str(other), *tiny.paths(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = tiny.folder.parent / "compare-quickstart-other.html"
    assert f"compared: {written}" in done.stdout
    for path in (written, written.with_suffix(".json")):
        path.unlink()
    one = rlhf("report", str(other), cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    assert read_json(other / "report.json") == read_json(tiny.folder / "report.json")
    for names, message in (
        (("no-such",), "no-such is neither a run in"),
        (("a", "b", "c"), "not 3"),
    ):
        refused = rlhf("report", *names, *tiny.paths(), cwd=tmp_path)
        assert refused.returncode == 2
        assert message in refused.stderr


# Held-out data


def test_no_heldout_prompt_is_sampled_on_or_trained_on(tiny: TinyRun) -> None:
    data = tiny.config.data
    share, salt = data.heldout_share, data.heldout_salt
    trained = [
        row["prompt"]
        for file in (
            "round-01/rejection/winners.jsonl",
            "round-01/rejection/samples.jsonl",
            *(f"round-01/rejection/shards/{number}.jsonl" for number in SHARDS),
            "round-02/ppo/samples.jsonl",
        )
        for row in read_jsonl(tiny.folder / file)
    ]
    assert trained
    assert not any(is_heldout(prompt, share=share, salt=salt) for prompt in trained)
    for number in (1, 2):
        rows = read_jsonl(tiny.folder / f"round-{number:02d}/evaluate/responses.jsonl")
        assert len(rows) == 12
        assert all(is_heldout(row["prompt"], share=share, salt=salt) for row in rows)

    counts = read_json(tiny.folder / "sft/data_counts.json")
    demonstrations = tiny.store.conversations("toy-sft")
    kept = [not is_heldout(row.messages, share=share, salt=salt) for row in demonstrations]
    assert counts["trained"] == sum(kept)
    assert 0 < counts["heldout"] == len(kept) - sum(kept)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("number", [1, 2])
def test_reward_models_train_on_all_and_only_training_comparisons(
    number: int, axis: str, tiny: TinyRun
) -> None:
    """Own comparisons are never dropped without a cap, so their number tells who was there."""
    folder = tiny.folder / f"round-{number:02d}" / f"reward-{axis}"
    mixture = read_json(folder / "mixture.json")
    rows = [row for k in range(number) for row in comparisons(tiny, f"round-{k + 1:02d}")]
    assert mixture["num_own"] == sum(row.axis == axis and not row.heldout for row in rows)
    assert mixture["num_other"] <= sum(row.axis != axis and not row.heldout for row in rows)
    assert mixture["rows"] == mixture["num_own"] + mixture["num_other"]
    scored = {row["id"] for row in read_jsonl(folder / "scores.jsonl")}
    assert scored
    assert scored == {row.id for row in rows if row.heldout}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("number", [1, 2])
def test_judges_and_reward_models_share_no_comparison(
    number: int, axis: str, tiny: TinyRun
) -> None:
    folder = tiny.folder / f"round-{number:02d}"
    judge = read_json(folder / f"judge-{axis}" / "mixture.json")
    reward = read_json(folder / f"reward-{axis}" / "mixture.json")
    assert set(judge["batches"]) == {"toy-open"}
    assert set(reward["batches"]) == {f"round-{k + 1:02d}" for k in range(number)}
    reserved = tiny.store.comparisons(Kind.open, "toy-open")
    assert judge["rows"] == sum(row.axis == axis and not row.heldout for row in reserved)
    collected = [row for k in range(number) for row in comparisons(tiny, f"round-{k + 1:02d}")]
    assert not {content(row) for row in reserved} & {content(row) for row in collected}


def comparisons(tiny: TinyRun, batch: str) -> list[Comparison]:
    return tiny.store.comparisons(Kind.batch, batch)


def content(row: Comparison) -> tuple[str, frozenset[str]]:
    return row.prompt[-1]["content"], frozenset((row.chosen, row.rejected))
