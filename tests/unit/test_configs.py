"""The configuration: every field declared, every file composed, the paper's numbers in place."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf import compose
from rlhf.config import Config, Engine, LauncherKind, Strategy, leaves
from rlhf.config.cluster import Resources
from rlhf.errors import ArtifactError, ConfigError
from rlhf.fingerprint import (
    PLAN_GROUPS,
    STAGE_GROUPS,
    differences,
    effects,
    flat_config,
    flatten,
    read_tree,
    relevant,
    stage_revision,
)

CONF = compose.conf_dir()
ROOT = CONF.parent
PAPER = [path.name for path in (CONF / "paper").glob("*.yaml")]


@cache
def config_of(*overrides: str) -> Config:
    return compose.load(overrides)


def test_every_field_declares_its_effect() -> None:
    undeclared = [
        key for key, effect, _ in leaves(Config()) if effect not in ("result", "execution")
    ]
    assert undeclared == []
    assert len(effects()) > 100


def test_execution_only_fields_are_those_that_cannot_change_results() -> None:
    allowed = re.compile(
        r"(paths|compute|distributed|resources|launcher|checkpoint|tracking|ingest|service|cost|model\.shape)\..*|.*micro_batch_size|recipe|run|on_change"
        r"|model\.(attention|gradient_checkpointing)"
        r"|generator\.(url|timeout_seconds|gpu_memory_utilization|cpu_kv_cache_gib)"
    )
    found = [key for key, effect in effects().items() if effect == "execution"]
    assert [key for key in found if not allowed.fullmatch(key)] == []


def test_every_group_with_result_fields_belongs_to_a_stage_or_to_the_plan() -> None:
    groups = {
        key.partition(".")[0]
        for key, effect in effects().items()
        if effect == "result" and "." in key
    }
    mapped = {key.partition(".")[0] for keys in STAGE_GROUPS.values() for key in keys}
    assert groups == mapped | set(PLAN_GROUPS)


@pytest.mark.parametrize("stage", sorted(STAGE_GROUPS))
def test_a_stage_reads_only_the_groups_of_its_fingerprint(stage: str) -> None:
    tree = ast.parse((ROOT / "rlhf" / "stages" / f"{stage}.py").read_text())
    names = {item.name for item in fields(Config)}
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in names and "config" in _owner(node)
    }
    harmless = {"compute", "paths", "checkpoint", "tracking", "ingest", "service", "seed", "run"}
    assert read - harmless <= {key.partition(".")[0] for key in STAGE_GROUPS[stage]}


def _owner(node: ast.Attribute) -> str:
    value = node.value
    if isinstance(value, ast.Name):
        return value.id
    return value.attr if isinstance(value, ast.Attribute) else ""


def test_single_settings_of_a_stage_exist() -> None:
    single = {key for keys in STAGE_GROUPS.values() for key in keys if "." in key}
    assert single <= set(effects())
    assert {key for key in relevant("reward", flat_config(Config())) if "evaluate" in key} == single


def test_changing_ppo_does_not_touch_supervised_fine_tuning() -> None:
    one = flat_config(config_of("recipe=quickstart"))
    two = flat_config(config_of("recipe=quickstart", "ppo.kl_coef=0.7"))
    assert relevant("sft", one) == relevant("sft", two)
    assert differences(relevant("ppo", one), relevant("ppo", two)) == ["ppo.kl_coef: 0.05 -> 0.7"]
    three = flat_config(config_of("recipe=quickstart", "seed=1", "ppo.micro_batch_size=2"))
    assert differences(relevant("ppo", one), relevant("ppo", three)) == ["seed: 0 -> 1"]


def test_revisions_are_read_without_importing(tmp_path: Path) -> None:
    for stage in STAGE_GROUPS:
        assert stage_revision(f"rlhf.stages.{stage}") >= 1
    assert stage_revision("fake_stages") == 1


@pytest.mark.parametrize("recipe", compose.recipes())
def test_every_recipe_composes_under_its_own_name(recipe: str) -> None:
    config = config_of(f"recipe={recipe}")
    assert (config.recipe, config.run) == (recipe, recipe)
    again = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(compose.freeze(config)))
    )
    assert again == config


@pytest.mark.parametrize("model", [path.stem for path in (CONF / "model").glob("*.yaml")])
def test_every_model_composes(model: str) -> None:
    expected = OmegaConf.load(CONF / "model" / f"{model}.yaml").path
    assert config_of("recipe=smollm2", f"model={model}").model.path == expected


@pytest.mark.parametrize("strategy", list(Strategy))
def test_every_strategy_composes(strategy: Strategy) -> None:
    config = config_of("recipe=quickstart", f"distributed={strategy.name}")
    assert config.distributed.strategy is strategy


@pytest.mark.parametrize("stage", ["sft", "reward", "rejection", "ppo"])
def test_adapters_are_refused_where_processes_share_a_model(stage: str) -> None:
    lora = ("recipe=quickstart", "model.lora.enabled=true", "ppo.batch_size=64")
    two = f"resources.{stage}.processes=2"
    for fine in (("distributed=ddp", two), ("distributed=zero2",)):
        config_of(*lora, *fine)
    with pytest.raises(
        ConfigError, match=f"=zero2 cannot work.*resources.{stage}.*distributed=ddp"
    ):
        config_of(*lora, "distributed=zero2", two)


def test_a_minibatch_that_processes_cannot_share_is_refused() -> None:
    settings = ("recipe=quickstart", "ppo.batch_size=24", "ppo.num_minibatches=4")
    config_of(*settings, "resources.ppo.processes=3")
    with pytest.raises(ConfigError, match=r"num_minibatches=6 cannot work.*the 4 processes"):
        config_of(*settings, "resources.ppo.processes=2", "resources.ppo.nodes=2")


@pytest.mark.parametrize("kind", list(LauncherKind))
def test_every_launcher_composes(kind: LauncherKind) -> None:
    assert config_of("recipe=quickstart", f"launcher={kind.name}").launcher.kind is kind


@pytest.mark.parametrize("recipe", compose.recipes())
def test_settings_are_flat_as_omegaconf_writes_them(recipe: str) -> None:
    """Fingerprints of finished nodes rest on this form, and run.yaml is written by OmegaConf."""
    config = config_of(f"recipe={recipe}", "model.path=toy", "rejection.temperatures=[0.7,1.0]")
    tree = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(tree, dict)
    assert flat_config(config) == flatten({str(name): value for name, value in tree.items()})
    assert compose.freeze(config) == OmegaConf.to_yaml(OmegaConf.structured(config))


def test_settings_are_read_as_omegaconf_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    texts = [
        "1e-3",
        "1e3",
        ".5",
        "-7",
        "0x10",
        "1_000",
        "1:30",
        "yes",
        "off",
        "null",
        "~",
        "",
        "on",
    ]
    texts += ["2020-01-02", "'1'", '"a: b"', "[a, 1, 2e-1, null]", "{deep: 1e-5}", ".inf", "v1.0"]
    path.write_text("".join(f"key{k}: {text}\n" for k, text in enumerate(texts)))
    assert repr(read_tree(path)) == repr(OmegaConf.to_container(OmegaConf.load(path)))
    path.write_text("sft:\n  epochs: 1\n  epochs: 2\n")
    with pytest.raises(ConfigError, match="epochs is given twice from line 2 on"):
        read_tree(path)
    path.write_text("- sft\n")
    with pytest.raises(ArtifactError, match=r"run\.yaml does not hold settings"):
        read_tree(path)


@pytest.mark.parametrize("engine", list(Engine))
def test_every_generator_composes(engine: Engine) -> None:
    assert config_of("recipe=quickstart", f"generator={engine.name}").generator.engine is engine


def test_the_engine_is_a_result_of_every_stage_that_samples() -> None:
    one = flat_config(config_of("recipe=quickstart"))
    two = flat_config(config_of("recipe=quickstart", "generator=vllm", "generator.url=http://a:1"))
    touched = {stage for stage in STAGE_GROUPS if relevant(stage, one) != relevant(stage, two)}
    assert touched == {"sweep", "sample", "rejection", "ppo", "evaluate", "collect"}
    assert differences(relevant("ppo", one), relevant("ppo", two)) == [
        "generator.engine: fused -> vllm"
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rejection.temperatures=[0.0,1.0]", r"temperatures=\[0.0, 1.0\] .*above 0"),
        ("rejection.temperatures=[-1,1]", "above 0"),
        ("rejection.temperatures=[1.0,inf]", "above 0"),
        ("rejection.temperatures=[1.0,nan]", "above 0"),
        ("rejection.temperatures=[1.0,1.2,1.0]", "each temperature once"),
        ("rejection.temperatures=[1.2]", "set rejection.sampling.temperature"),
        ("rejection.sweep_prompts=0", "rejection.sweep_prompts=0 .*at least 1"),
    ],
)
def test_impossible_sweeps_are_refused(override: str, words: str) -> None:
    config_of("recipe=quickstart", "rejection.temperatures=[1.3,0.7]")
    with pytest.raises(ConfigError, match=words):
        config_of("recipe=quickstart", override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rejection.sampling.top_k=0", r"rejection.sampling.top_k=0 .*null"),
        ("evaluate.sampling.top_p=0", r"evaluate.sampling.top_p=0.0 .*\(0, 1\]"),
        ("evaluate.sampling.top_p=1.1", r"\(0, 1\]"),
        ("ppo.sampling.top_k=50", r"ppo.sampling.top_k=50 .*whole softmax"),
        ("ppo.sampling.top_p=0.9", r"ppo.sampling.top_p=0.9 .*whole softmax"),
    ],
)
def test_impossible_cuts_of_the_softmax_are_refused(override: str, words: str) -> None:
    config_of("recipe=quickstart", "rejection.sampling.top_k=50", "evaluate.sampling.top_p=0.9")
    with pytest.raises(ConfigError, match=words):
        config_of("recipe=quickstart", override)


def test_a_sweep_makes_new_samples_and_nothing_else() -> None:
    one = flat_config(config_of("recipe=quickstart"))
    two = flat_config(config_of("recipe=quickstart", "rejection.temperatures=[0.7,1.3]"))
    touched = {stage for stage in STAGE_GROUPS if relevant(stage, one) != relevant(stage, two)}
    assert touched == {"sweep", "sample", "rejection"}


def test_every_stage_has_resources() -> None:
    assert {item.name for item in fields(Resources)} == set(STAGE_GROUPS)


def test_every_file_is_composed_by_a_test() -> None:
    known = {"run.yaml", "driver.yaml"}
    known |= {f"recipe/{name}.yaml" for name in compose.recipes()}
    known |= {f"model/{path.name}" for path in (CONF / "model").glob("*.yaml")}
    known |= {f"paper/{name}" for name in PAPER}
    known |= {f"distributed/{strategy.name}.yaml" for strategy in Strategy}
    known |= {f"launcher/{kind.name}.yaml" for kind in LauncherKind}
    known |= {f"generator/{engine.name}.yaml" for engine in Engine}
    assert {str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml")} == known


def test_files_name_only_settings_that_exist() -> None:
    for path in [*CONF.glob("recipe/*.yaml"), *CONF.glob("paper/*.yaml")]:
        tree = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(tree, dict)
        tree.pop("defaults", None)
        assert set(flatten({str(k): v for k, v in tree.items()})) <= set(effects()), path


PAPER_VALUES = {
    "sft.optimizer.lr": 2e-5,
    "sft.optimizer.weight_decay": 0.1,
    "sft.batch_size": 64,
    "sft.epochs": 2,
    "model.max_length": 4096,
    "reward.optimizer.lr": 1e-5,
    "reward.optimizer.warmup_fraction": 0.03,
    "reward.optimizer.warmup_steps_min": 5,
    "reward.optimizer.lr_floor": 0.1,
    "reward.epochs": 1,
    "reward.batch_size": 512,
    "reward.own_share_helpfulness": 0.5,
    "reward.own_share_safety": 0.9,
    "gate.threshold": 0.15,
    "ppo.optimizer.lr": 1e-6,
    "ppo.optimizer.lr_floor": 1.0,
    "ppo.optimizer.warmup_fraction": 0.0,
    "ppo.optimizer.warmup_steps_min": 0,
    "ppo.optimizer.beta1": 0.9,
    "ppo.optimizer.beta2": 0.95,
    "ppo.optimizer.eps": 1e-5,
    "ppo.optimizer.weight_decay": 0.1,
    "ppo.optimizer.max_grad_norm": 1.0,
    "ppo.batch_size": 512,
    "ppo.num_minibatches": 8,
    "ppo.num_ppo_epochs": 1,
    "ppo.clip_range": 0.2,
    "ppo.kl_coef": 0.01,
    "ppo.iterations": 400,
    "rounds.limit": 5,
    "rounds.schedule": ["rejection"] * 4 + ["rejection_ppo"],
}


def test_the_7b_recipe_has_what_the_paper_states() -> None:
    flat = flat_config(config_of("recipe=llama2_7b"))
    assert {key: flat[key] for key in PAPER_VALUES} == PAPER_VALUES


def test_the_70b_recipe_differs_from_the_7b_recipe_where_the_paper_says_so() -> None:
    small = flat_config(config_of("recipe=llama2_7b"))
    large = flat_config(config_of("recipe=llama2_70b"))
    found = differences(small, large)
    assert [text for text in found if not text.startswith("model.shape.")] == [
        "model.path: models/Llama-2-7b-hf -> models/Llama-2-70b-hf",
        "ppo.kl_coef: 0.01 -> 0.005",
        "recipe: llama2_7b -> llama2_70b",
        "reward.optimizer.lr: 1e-05 -> 5e-06",
        "run: llama2_7b -> llama2_70b",
    ]


def test_every_value_of_the_paper_file_says_whether_the_paper_states_it() -> None:
    text = (CONF / "paper" / "llama2.yaml").read_text()
    values = [line for line in text.splitlines() if re.match(r"\s+\w+: \S", line)]
    silent = [
        line
        for line in values
        if not re.search(r"# .*(stated|the same|the original policy|guards against)", line)
        and not re.search(r"schedule:|annotators:", line)
    ]
    assert len(values) > 60
    assert silent == []
