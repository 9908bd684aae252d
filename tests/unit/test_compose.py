"""From a command line to a Config: bases, refusals, messages with key, value and remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlhf import compose
from rlhf.defaults import stack
from rlhf.errors import ConfigError

Overrides = Callable[..., list[str]]
QUICK = "recipe=quickstart"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("ppo.kl_coef=abc", ["ppo.kl_coef=abc", "Float", "like the default"]),
        ("ppo.batch_size=1.5", ["ppo.batch_size=1.5", "Integer"]),
        ("ppo.kl_coeff=1", ["ppo.kl_coeff=1", "did you mean ppo.kl_coef?"]),
        ("kl_coef=1", ["kl_coef=1", "did you mean ppo.kl_coef?"]),
        ("modle=toy", ["modle=toy", "did you mean model?"]),
        ("+ppo.extra=1", ["ppo.extra", "unknown setting"]),
        ("model=foo", ["model=foo", "llama2_70b, llama2_7b, smollm2, toy"]),
        ("on_change=foo", ["on_change=foo", "refuse, rerun"]),
        ("rounds.schedule=[ppo,dpo]", ["rounds.schedule", "dpo", "rejection_ppo"]),
        ("rounds.schedule=[]", ["rounds.schedule=[]", "at least one stage"]),
        ("ppo=3", ["ppo=3", "single values"]),
        ("rounds=null", ["rounds=null", "single values"]),
        ("generator=tgi", ["generator=tgi", "hf, vllm, vllm_server"]),
        ("generator.url=gpu-7:8000", ["generator.url=gpu-7:8000", "http://127.0.0.1:8000"]),
        ("generator.url=http://gpu-7:port", ["generator.url=http://gpu-7:port"]),
        ("generator.url=http://me@gpu-7:80", ["generator.url=http://me@gpu-7:80"]),
        ("generator.url=http://gpu-7:80/v1", ["generator.url=http://gpu-7:80/v1"]),
        ("generator.timeout_seconds=0", ["generator.timeout_seconds=0", "above 0"]),
        (
            "generator.gpu_memory_utilization=1.5",
            ["generator.gpu_memory_utilization=1.5", "(0, 1]"],
        ),
        ("ppo.batch_size=7", ["ppo.batch_size=7", "multiple of ppo.num_minibatches"]),
        ("ppo.num_minibatches=0", ["ppo.num_minibatches=0", "at least 1"]),
        ("sft.batch_size=0", ["sft.batch_size=0", "at least 1"]),
        ("sft.optimizer.lr=-1", ["sft.optimizer.lr=-1", "positive"]),
        ("evaluate.sampling.temperature=0", ["evaluate.sampling.temperature=0", "above 0"]),
        (
            "ppo.sampling.max_new_tokens=256",
            ["ppo.sampling.max_new_tokens=256", "model.max_length"],
        ),
        ("data.heldout_share=1", ["data.heldout_share=1", "share"]),
        ("rejection.pool_share=1.5", ["pool_share", "1.5"]),
        ("rounds.limit=null", ["rounds.limit=null", "give a number"]),
        ("rounds.batches_per_round=2", ["rounds.batches_per_round=2", "leave it at 1"]),
        ("toy.enabled=false", ["collect.annotators=simulated", "toy.enabled=true"]),
        ("sft.skip=true", ["sft.skip=True", "must be trained first"]),
        ("judge.data=batches judge.share=1.0", ["judge.share=1.0", "judge.share=0.2"]),
        ("run=a/b", ["run=a/b", "letters"]),
        ("recipe=nix", ["recipe=nix", "quickstart"]),
        ("foo", ["foo", "EQUAL"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(override: str, parts: list[str]) -> None:
    overrides = override.split()
    given = overrides if override.startswith("recipe=") else [QUICK, *overrides]
    with pytest.raises(ConfigError) as caught:
        compose.load(given)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_without_a_recipe_the_recipes_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"no recipe given.*quickstart, smollm2"):
        compose.load([])
    assert compose.load([], needs_run=False).recipe == "none"


def test_a_run_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run.yaml").write_text("recipe: quickstart")
    with pytest.raises(ConfigError, match=r"run=foo does not exist .*there: other"):
        compose.load([f"paths.runs={tmp_path}", "run=foo"])


def test_a_run_that_exists_is_the_base_and_the_command_line_goes_on_top(tmp_path: Path) -> None:
    where = f"paths.runs={tmp_path}"
    first = compose.load([QUICK, where, "run=mine", "ppo.kl_coef=0.2", "sft.epochs=7"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run.yaml").write_text(compose.freeze(first))

    assert compose.load([where, "run=mine"]) == first
    assert compose.load([QUICK, where, "run=mine"]) == first
    assert compose.load_frozen(tmp_path / "mine") == first
    changed = compose.load([where, "run=mine", "ppo.kl_coef=0.3", "model=smollm2"])
    assert changed.ppo.kl_coef == 0.3
    assert changed.sft.epochs == 7
    assert changed.data.stream == "sim-mine"
    assert changed.model.path == "models/smollm2-135m"
    with pytest.raises(ConfigError, match=r"recipe=smollm2 .*started as recipe=quickstart"):
        compose.load([where, "run=mine", "recipe=smollm2"])


PLAIN_OVERRIDES = [
    ["seed=7", "ppo.kl_coef=1", "model.path=/models/a-b.c/d_1", "checkpoint.keep=9"],
    ["tracking.mode=none", "model.shape.hidden_size=null", "data.is_safety_default=TRUE"],
    ["paths.store=x/y", "data.stream=v1.0", "launcher.slurm.partition=5"],
    ["recipe=quickstart", "seed=1", "seed=-2"],
]
OTHER_OVERRIDES = [
    ["ppo.kl_coef=0.3"],
    ["ppo.kl_coef=1e-3"],
    ["ppo.kl_coef=inf"],
    ["rejection.temperatures=[0.7,1]"],
    ["model=smollm2"],
    ["data.stream='a b'"],
    ["data.stream=sim-${run}"],
    ["++seed=3"],
]


@pytest.fixture
def mine(tmp_path: Path) -> list[str]:
    """Return the overrides that name a run that exists."""
    config = compose.load([QUICK, f"paths.runs={tmp_path}", "run=mine", "sft.epochs=7"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run.yaml").write_text(compose.freeze(config))
    return [f"paths.runs={tmp_path}", "run=mine"]


@pytest.mark.parametrize("given", [[], *PLAIN_OVERRIDES])
def test_a_run_that_exists_is_read_without_hydra_as_with_it(
    given: list[str], mine: list[str]
) -> None:
    read = compose.load_plain([*mine, *given])
    assert read == compose.load_composed([*mine, *given])
    assert read is not None
    assert read.sft.epochs == 7


NEW_RUNS = [
    *([f"recipe={name}"] for name in compose.recipes()),
    *(
        [QUICK, f"{path.parent.name}={path.stem}"]
        for path in sorted(compose.conf_dir().glob("*/*.yaml"))
        if path.parent.name in compose.groups()
    ),
    ["recipe=llama2_7b", "model=llama2_70b", "seed=3", "run=other"],
    [QUICK, "launcher=slurm", "distributed=zero2", "rounds.limit=3", "model.path=a/b"],
]


@pytest.mark.parametrize("given", NEW_RUNS, ids=" ".join)
def test_a_new_run_is_composed_without_hydra_as_with_it(given: list[str]) -> None:
    read = compose.load_plain(given)
    assert read is not None
    assert read == compose.load_composed(given)


@pytest.mark.parametrize(
    "given", [["run=new"], [], ["recipe=none"], [QUICK, "model=big"], [QUICK, "paper=llama2"]]
)
def test_a_new_run_that_hydra_refuses_is_refused_in_its_words(given: list[str]) -> None:
    with pytest.raises(ConfigError) as composed:
        compose.load_composed(given)
    with pytest.raises(ConfigError) as read:
        compose.load(given)
    assert str(read.value) == str(composed.value)


def test_forms_of_defaults_that_are_not_known_are_left_to_hydra(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(compose.conf_dir(), conf)
    assert stack(conf, {"recipe": "quickstart"}) is not None
    recipe = conf / "recipe/quickstart.yaml"
    recipe.write_text(recipe.read_text().replace("override /model: toy", "optional /model: toy"))
    assert stack(conf, {"recipe": "quickstart"}) is None
    primary = conf / "run.yaml"
    assert stack(conf, {"recipe": "smollm2"}) is not None
    primary.write_text(primary.read_text().replace("  - _self_\n", "  - _self_\n  - extra\n"))
    assert stack(conf, {"recipe": "smollm2"}) is None


def test_a_run_is_called_and_lies_as_its_folder_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/quickstart").mkdir(parents=True)
    text = compose.freeze(compose.load([QUICK, "paths.runs=elsewhere", "run=before"]))
    Path("runs/quickstart/run.yaml").write_text(text)
    read = compose.load_plain([QUICK])
    assert read == compose.load_composed([QUICK])
    assert read is not None
    assert (read.run, read.paths.runs) == ("quickstart", "runs")


@pytest.mark.parametrize("given", OTHER_OVERRIDES)
def test_what_is_not_plain_is_left_to_hydra(given: list[str], mine: list[str]) -> None:
    assert compose.load_plain([*mine, *given]) is None
    assert compose.load([*mine, *given]) == compose.load_composed([*mine, *given])


@pytest.mark.parametrize(
    "given", ["recipe=smollm2", "ppo.kl_coef=abc", "ppo.kl_coeff=1", "ppo.batch_size=null", "ppo=3"]
)
def test_what_is_refused_is_refused_in_the_same_words(given: str, mine: list[str]) -> None:
    with pytest.raises(ConfigError) as composed:
        compose.load_composed([*mine, given])
    with pytest.raises(ConfigError) as read:
        compose.load([*mine, given])
    assert str(read.value) == str(composed.value)


def test_a_run_with_interpolations_is_left_to_hydra(mine: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine/run.yaml"
    path.write_text(path.read_text().replace("stream: sim-mine", "stream: sim-${run}"))
    assert compose.load_plain(mine) is None
    assert compose.load(mine).data.stream == "sim-mine"


@pytest.mark.parametrize("given", [*PLAIN_OVERRIDES, ["a=x-1.e/F", "b=e5", "c=/", "d=None", "e=N"]])
def test_plain_values_are_those_that_hydra_reads(given: list[str]) -> None:
    parsed = OverridesParser.create().parse_overrides(given)
    expected = {item.key_or_group: item.value() for item in parsed}
    assert repr(compose.plain_values(given)) == repr(expected)


def test_a_moved_run_is_read_where_it_lies(tmp_path: Path) -> None:
    config = compose.load([QUICK, "paths.runs=elsewhere"])
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart/run.yaml").write_text(compose.freeze(config))
    assert compose.load([QUICK, f"paths.runs={tmp_path}"]).paths.runs == str(tmp_path)
    assert compose.load_frozen(tmp_path / "quickstart").paths.runs == str(tmp_path)


def test_a_frozen_setting_that_no_longer_exists_is_named(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    text = compose.freeze(compose.load([QUICK])).replace("kl_coef:", "kl_coefficient:")
    (tmp_path / "quickstart/run.yaml").write_text(text)
    with pytest.raises(ConfigError, match="kl_coefficient"):
        compose.load_frozen(tmp_path / "quickstart")
    with pytest.raises(ConfigError, match="kl_coefficient"):
        compose.load([QUICK, f"paths.runs={tmp_path}"])


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["run=a,b"], "run", True),
        (["run=a"], "run", False),
        (["seed=range(3)"], "run", False),
        (["recipe=quickstart,smollm2"], "recipe", True),
    ],
)
def test_sweeps_are_recognised(overrides: list[str], key: str, expected: bool) -> None:
    assert compose.sweeps(overrides, key) is expected


def test_composing_imports_no_torch() -> None:
    code = (
        "import sys; from rlhf import compose; compose.load(['recipe=quickstart']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
