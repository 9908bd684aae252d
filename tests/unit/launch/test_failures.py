"""How the end of a job is told: exit codes, signals, words in the log, and a remedy for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config import Retries
from rlhf.launch import failures
from rlhf.launch.failures import REMEDIES, classify, count_failures, new_exit, note_exit, read_exits
from rlhf.launch.slurm import FAILURES


@pytest.mark.parametrize(
    ("code", "log", "expected"),
    [
        (0, [], ""),
        (75, [], "stopped"),
        (2, ["ConfigError: ppo.kl_coef"], "bad_input"),
        (1, ["StageError: the loss is nan"], "error"),
        (1, ["torch.OutOfMemoryError: CUDA out of memory."], "out_of_memory"),
        (1, ["numpy MemoryError"], "out_of_memory"),
        (-9, [], "out_of_memory"),
        (137, [], "out_of_memory"),
        (-11, [], "error"),
    ],
)
def test_kinds_of_failure(code: int, log: list[str], expected: str) -> None:
    assert classify(code, log) == expected


def test_every_kind_has_a_remedy_that_names_its_stage() -> None:
    kinds = {name for name in vars(failures) if name.isupper()} - {"EXITS", "REMEDIES", "SUBMITTED"}
    words = {getattr(failures, name) for name in kinds if isinstance(getattr(failures, name), str)}
    assert words == set(REMEDIES)
    assert set(FAILURES.values()) - {""} <= set(REMEDIES)
    assert "resources.ppo.memory" in failures.remedy("out_of_memory", "ppo")
    assert not any("STAGE" in failures.remedy(kind, "ppo") for kind in REMEDIES)


def test_the_retry_policy_speaks_of_kinds_that_exist() -> None:
    assert set(vars(Retries())) <= set(REMEDIES)


def test_ends_are_kept_in_order_and_counted_per_job_and_kind(tmp_path: Path) -> None:
    for job, failure in (("1", "preempted"), ("1", "preempted"), ("1", "error"), ("2", "error")):
        note_exit(tmp_path, new_exit(job, 0, 75, failure))
    found = read_exits(tmp_path)
    assert [entry.job for entry in found] == ["1", "1", "1", "2"]
    assert count_failures(found, "1", "preempted") == 2
    assert count_failures(found, "2", "preempted") == 0


@pytest.mark.parametrize(
    ("own", "scheduler", "expected"),
    [
        ("bad_input", "error", "bad_input"),
        ("stopped", "cancelled", "cancelled"),
        ("stopped", "", "stopped"),
        ("", "time_limit", "time_limit"),
        ("", "", ""),
    ],
)
def test_the_job_knows_best_but_for_who_stopped_it(own: str, scheduler: str, expected: str) -> None:
    assert failures.why(own, scheduler) == expected
