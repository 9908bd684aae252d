"""Job scripts and the queue's answers, without a Slurm; tests/cluster has the real one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rlhf import compose
from rlhf.config import Config
from rlhf.errors import ConfigError, LauncherError
from rlhf.launch.jobs import ENDED, PENDING, RUNNING
from rlhf.launch.slurm import SlurmLauncher, array_indices, call, check_template
from rlhf.nodes import Node
from rlhf.plan import build_plan

REWARD = Node("round-01/reward-safety", "reward", 1, ("sft",), {}, {"axis": "safety"})
SHARDS = [
    Node(f"round-01/sample-{i}", "sample", 1, ("sft",), {}, {"shard": i, "of": 3}) for i in range(3)
]


def config_of(folder: Path, *overrides: str) -> Config:
    paths = [f"paths.runs={folder / 'my runs'}", f"paths.store={folder / 'store'}"]
    return compose.load(["recipe=quickstart", "launcher=slurm", *paths, *overrides])


def options(script: str) -> list[str]:
    mark = "#SBATCH "
    return [line[len(mark) :] for line in script.splitlines() if line.startswith(mark)]


def test_a_job_asks_for_its_stages_resources_and_no_more(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        "resources.reward.nodes=2",
        "resources.reward.processes=4",
        "resources.reward.gpus=1",
        "resources.reward.cpus=6",
        "resources.reward.memory=200G",
        "resources.reward.time=4:00:00",
        "resources.ppo.time=9:00:00",
        "launcher.slurm.partition=main",
        "resources.reward.partition=gpu",
        "launcher.slurm.account=align",
        "launcher.slurm.extra=[--exclusive]",
    )
    found = options(SlurmLauncher(config).render([REWARD], ["12", "13"]))
    assert found[:2] == [
        "--job-name=quickstart:round-01/reward-safety",
        f"--comment=rlhf:{SlurmLauncher(config).key}:round-01/reward-safety",
    ]
    assert found[4:] == [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=24",
        "--partition=gpu",
        "--account=align",
        "--mem=200G",
        "--time=4:00:00",
        "--gres=gpu:4",
        "--exclusive",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--dependency=afterok:12:13",
        "--kill-on-invalid-dep=yes",
    ]


def test_every_dependency_is_afterok_and_only_roots_have_none(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    listing = {kind: {} for kind in ("batch", "sft", "prompts", "open")}
    for node in build_plan(config, listing, None).nodes:
        found = options(SlurmLauncher(config).render([node], list(node.after)))
        waits = [option for option in found if option.startswith("--dependency")]
        assert waits == ([f"--dependency=afterok:{':'.join(node.after)}"] if node.after else [])


def test_a_path_with_a_space_reaches_the_command_whole(tmp_path: Path) -> None:
    script = SlurmLauncher(config_of(tmp_path)).render([REWARD], [])
    last = script.strip().splitlines()[-1].replace("exec", "printf '%s\\n'", 1)
    words = subprocess.run(["bash", "-c", last], capture_output=True, text=True).stdout.split("\n")
    assert words[1:4] == ["-m", "rlhf.cli", "stage"]
    assert f"paths.runs={tmp_path / 'my runs'}" in words


def test_shards_are_one_array_whose_tasks_name_their_nodes(tmp_path: Path) -> None:
    script = SlurmLauncher(config_of(tmp_path)).render([SHARDS[0], SHARDS[2]], ["7_0", "7_1"])
    assert "--array=0,2" in options(script)
    # An array is waited for as a whole.
    assert "--dependency=afterok:7" in options(script)
    last = script.strip().splitlines()[-1].replace("exec", "echo", 1)
    task = {**os.environ, "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(["bash", "-c", last], capture_output=True, text=True, env=task)
    assert "stage round-01/sample-2 run=quickstart" in done.stdout


def test_a_script_is_valid_shell_and_holds_the_sites_setup(tmp_path: Path) -> None:
    config = config_of(tmp_path, "launcher.setup=['module load cuda','export A=1']")
    script = SlurmLauncher(config).render([REWARD], [])
    assert "\nmodule load cuda\nexport A=1\nexec " in script
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH; tests put programs there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_queue_is_read_by_comment_and_the_newest_job_counts(tmp_path: Path, stub: Path) -> None:
    launcher = SlurmLauncher(config_of(tmp_path))
    key = launcher.key
    rows = [
        f"4|4|N/A|TIMEOUT|TimeLimit|x|rlhf:{key}:sft",
        f"9|9|N/A|PENDING|Priority|2030-01-01T00:00:00|rlhf:{key}:sft",
        "5|5|N/A|RUNNING|None|x|rlhf:other:sft",
        "6|6|N/A|RUNNING|None|x|(null)",
        f"11|10|0|RUNNING|None|x|rlhf:{key}:round-01/sample",
        f"12|10|1|FAILED|NonZeroExitCode|x|rlhf:{key}:round-01/sample",
        f"20|20|[0-1]|CANCELLED|Dependency|x|rlhf:{key}:round-02/sample",
        f"13|13|N/A|CANCELLED|DependencyNeverSatisfied|x|rlhf:{key}:round-01/ppo",
        f"14|14|N/A|PENDING|DependencyNeverSatisfied|x|rlhf:{key}:round-01/evaluate",
        f"15|15|N/A|OUT_OF_MEMORY|OutOfMemory|x|rlhf:{key}:round-01/reward-safety",
    ]
    program(stub, "squeue", "cat <<'EOF'\n" + "\n".join(rows) + "\nEOF")
    jobs = launcher.poll()
    assert {name: (job.id, job.state, job.failure) for name, job in jobs.items()} == {
        "sft": ("9", PENDING, ""),
        "round-01/sample-0": ("10_0", RUNNING, ""),
        "round-01/sample-1": ("10_1", ENDED, "error"),
        "round-02/sample-0": ("20_0", ENDED, "cancelled"),
        "round-02/sample-1": ("20_1", ENDED, "cancelled"),
        "round-01/ppo": ("13", ENDED, "parent_failed"),
        "round-01/evaluate": ("14", ENDED, "parent_failed"),
        "round-01/reward-safety": ("15", ENDED, "out_of_memory"),
    }
    assert jobs["sft"].start == "2030-01-01T00:00:00"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("N/A", []), ("3", [3]), ("[0-2,7]", [0, 1, 2, 7]), ("0-3%2", [0, 1, 2, 3]), ("0,2", [0, 2])],
)
def test_array_indices_as_squeue_writes_them(text: str, expected: list[int]) -> None:
    assert array_indices(text) == expected


def test_submitting_names_the_jobs_of_nodes_and_shards(tmp_path: Path, stub: Path) -> None:
    launcher = SlurmLauncher(config_of(tmp_path))
    program(stub, "sbatch", "cat > /dev/null; echo '31;cluster'")
    assert launcher.submit([REWARD], []) == {REWARD.name: "31"}
    assert launcher.submit(SHARDS[1:], []) == {
        "round-01/sample-1": "31_1",
        "round-01/sample-2": "31_2",
    }


def test_two_runs_of_one_name_in_two_folders_do_not_share_jobs(tmp_path: Path) -> None:
    keys = {SlurmLauncher(config_of(tmp_path / name)).key for name in ("a", "b")}
    assert len(keys) == 2


def test_a_silent_or_refusing_or_absent_scheduler_is_one_clear_error(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(stub, "squeue", "sleep 5")
    with pytest.raises(LauncherError, match=r"no answer in 0\.2 s"):
        call(["squeue"], seconds=0.2)
    program(stub, "sbatch", "echo 'error: invalid partition' >&2; exit 1")
    with pytest.raises(LauncherError, match=r"invalid partition; correct launcher\.slurm"):
        call(["sbatch"], seconds=5)
    monkeypatch.setenv("PATH", str(stub))
    with pytest.raises(LauncherError, match="scancel is not installed here"):
        call(["scancel"], seconds=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@options@ @setup@", "@command@ is wrong"),
        ("@options@ @setup@ @command@ @walltime@", "@walltime@ is wrong"),
    ],
)
def test_a_template_with_other_marks_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "job.sh").write_text(text)
    config = config_of(tmp_path, f"launcher.template={tmp_path / 'job.sh'}")
    with pytest.raises(ConfigError, match=message):
        check_template(config)


def test_a_missing_template_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, f"launcher.template={tmp_path / 'none.sh'}")
    with pytest.raises(ConfigError, match=r"launcher\.template=.*none\.sh cannot be read"):
        check_template(config)
