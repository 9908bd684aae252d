import json
import shutil
from pathlib import Path

import micro_models as micro
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config import Compute, Lora, Model, Precision
from rlhf.errors import ArtifactError, ConfigError
from rlhf.models.heads import HEAD, copy_head, init_head, read_head
from rlhf.models.loading import (
    add_adapter,
    autocast,
    load_policy,
    load_reward_model,
    load_tokenizer,
    merge_adapter,
    save_model,
    setup_torch,
)

SETTINGS = Model()
IDS = torch.tensor([[5, 6, 7, 1]])


@pytest.fixture
def policy_folder(tmp_path: Path) -> Path:
    save_model(micro.policy(), micro.tokenizer(), tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def reward_folder(tmp_path: Path) -> Path:
    save_model(micro.scorer(seed=4), micro.tokenizer(), tmp_path / "reward")
    return tmp_path / "reward"


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change weights of a saved model; names have __ for dots, None deletes."""
    file = folder / "model.safetensors"
    held = load_file(file)
    for name, value in changes.items():
        held.pop(name.replace("__", "."), None)
        if value is not None:
            held[name.replace("__", ".")] = value
    save_file(held, file, metadata={"format": "pt"})


def test_policy_comes_back_as_it_was_saved(policy_folder: Path) -> None:
    model = load_policy(policy_folder, model=SETTINGS, seed=9)
    assert micro.largest_difference(micro.weights(model), micro.weights(micro.policy())) == 0.0
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_saved_folder_loads_without_us(policy_folder: Path, reward_folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(policy_folder)
    torch.testing.assert_close(plain(IDS).logits, micro.policy()(IDS).logits)
    scorer = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    torch.testing.assert_close(scorer(IDS).logits, micro.scorer(seed=4)(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    assert tokenizer.chat_template == micro.tokenizer().chat_template
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert not list(policy_folder.glob("*.bin"))


def test_toy_is_the_tiny_llama_of_the_seed() -> None:
    a, b, c = (load_policy("toy", model=SETTINGS, seed=seed) for seed in (1, 1, 2))
    assert micro.largest_difference(micro.weights(a), micro.weights(b)) == 0.0
    assert micro.largest_difference(micro.weights(a), micro.weights(c)) > 0.0
    assert len(load_tokenizer("toy")) == a.config.vocab_size


def test_new_head_is_the_only_new_weight(policy_folder: Path) -> None:
    model = load_reward_model(policy_folder, model=SETTINGS, new_head=True, seed=3)
    expected = micro.scorer(seed=0)
    init_head(expected, seed=3)
    assert micro.largest_difference(micro.weights(model), micro.weights(expected)) == 0.0
    assert model(IDS).logits.shape == (1, 1)


def test_head_follows_its_seed_and_scale(policy_folder: Path) -> None:
    heads = [
        load_reward_model(policy_folder, model=SETTINGS, new_head=True, seed=s).score.weight
        for s in (3, 3, 4)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    wide = torch.nn.Module()
    wide.score = torch.nn.Linear(40_000, 1, bias=False)
    init_head(wide, seed=0)  # type: ignore[arg-type]
    assert wide.score.weight.std().item() == pytest.approx(40_001**-0.5, rel=0.02)


def test_head_init_leaves_the_global_rng_alone() -> None:
    model = micro.scorer()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    init_head(model, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_trained_reward_model_keeps_its_head(reward_folder: Path) -> None:
    model = load_reward_model(reward_folder, model=SETTINGS, new_head=False, seed=99)
    assert torch.equal(model.score.weight, micro.scorer(seed=4).score.weight)


def test_loading_without_a_head_is_refused(policy_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"newly initialised: score\.weight"):
        load_reward_model(policy_folder, model=SETTINGS, new_head=False, seed=0)


def test_renewing_a_head_is_refused(reward_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot get a new score\.weight"):
        load_reward_model(reward_folder, model=SETTINGS, new_head=True, seed=0)


def test_a_lost_trunk_weight_is_refused(policy_folder: Path) -> None:
    edit_weights(policy_folder, model__norm__weight=None)
    with pytest.raises(ArtifactError, match=r"newly initialised: model\.norm\.weight"):
        load_reward_model(policy_folder, model=SETTINGS, new_head=True, seed=0)
    with pytest.raises(ArtifactError, match=r"newly initialised: model\.norm\.weight"):
        load_policy(policy_folder, model=SETTINGS, seed=0)


def test_an_unexpected_weight_is_refused(policy_folder: Path, reward_folder: Path) -> None:
    edit_weights(reward_folder, v_head__weight=torch.zeros(1, 32))
    with pytest.raises(ArtifactError, match=r"unexpected: v_head\.weight"):
        load_reward_model(reward_folder, model=SETTINGS, new_head=False, seed=0)
    with pytest.raises(ArtifactError, match=r"unexpected: score\.weight"):
        load_policy(reward_folder, model=SETTINGS, seed=0)


def test_previous_head_is_copied(reward_folder: Path) -> None:
    model = micro.scorer(seed=0)
    copy_head(model, reward_folder)
    assert torch.equal(model.score.weight, micro.scorer(seed=4).score.weight)
    assert torch.equal(read_head(reward_folder), model.score.weight)


def test_a_head_of_another_model_is_refused(reward_folder: Path, policy_folder: Path) -> None:
    edit_weights(reward_folder, **{HEAD.replace(".", "__"): torch.zeros(1, 64)})
    with pytest.raises(ArtifactError, match="same base model"):
        copy_head(micro.scorer(), reward_folder)
    with pytest.raises(ArtifactError, match=r"holds no score\.weight"):
        copy_head(micro.scorer(), policy_folder)


def test_dropout_of_the_saved_config_is_turned_off(policy_folder: Path) -> None:
    file = policy_folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_dropout": 0.5}))
    model = load_policy(policy_folder, model=SETTINGS, seed=0)
    model.train()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_a_tokenizer_without_padding_gets_a_token_and_a_row(policy_folder: Path) -> None:
    file = policy_folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "<eos>"}))
    tokenizer = load_tokenizer(policy_folder)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    model = load_policy(policy_folder, model=SETTINGS, seed=0)
    scorer = load_reward_model(policy_folder, model=SETTINGS, new_head=True, seed=0)
    assert model.config.pad_token_id == scorer.config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    assert torch.isfinite(model(torch.tensor([[5, tokenizer.pad_token_id]])).logits).all()


def test_pickled_weights_are_refused(policy_folder: Path) -> None:
    torch.save(load_file(policy_folder / "model.safetensors"), policy_folder / "pytorch_model.bin")
    (policy_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_policy(policy_folder, model=SETTINGS, seed=0)


def test_a_missing_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_policy(tmp_path / "nowhere", model=SETTINGS, seed=0)


def test_saving_is_atomic_and_replaces(policy_folder: Path) -> None:
    save_model(micro.policy(seed=5), micro.tokenizer(), policy_folder)
    model = load_policy(policy_folder, model=SETTINGS, seed=0)
    assert micro.largest_difference(micro.weights(model), micro.weights(micro.policy(5))) == 0.0
    assert not list(policy_folder.parent.glob(".*.tmp"))


def test_untouched_adapter_merges_to_the_same_model(tmp_path: Path) -> None:
    model = micro.policy()
    wrapped = add_adapter(model, Lora(enabled=True, rank=2), task_type="CAUSAL_LM", seed=0)
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) > 0
    merge_adapter(wrapped, tmp_path / "adapter")
    assert micro.largest_difference(micro.weights(model), micro.weights(micro.policy())) == 0.0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_setup_fixes_threads_and_device() -> None:
    device = setup_torch(Compute(num_threads=1, device="cpu"))
    assert device == torch.device("cpu")
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_a_user_error() -> None:
    with pytest.raises(ConfigError, match=r"compute\.device=cuda"):
        setup_torch(Compute(num_threads=1, device="cuda"))


def test_autocast_follows_the_precision() -> None:
    layer, cpu = torch.nn.Linear(2, 2), torch.device("cpu")
    with autocast(Model(precision=Precision.bf16), cpu):
        assert layer(torch.ones(1, 2)).dtype is torch.bfloat16
    with autocast(Model(precision=Precision.fp32), cpu):
        assert layer(torch.ones(1, 2)).dtype is torch.float32


def test_a_tied_model_needs_no_head_of_its_own(policy_folder: Path, tmp_path: Path) -> None:
    held = load_file(policy_folder / "model.safetensors")
    assert "lm_head.weight" not in held
    untied = micro.policy()
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach() * 2)
    save_model(untied, micro.tokenizer(), tmp_path / "untied")
    model = load_policy(tmp_path / "untied", model=SETTINGS, seed=0)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    shutil.copytree(tmp_path / "untied", tmp_path / "lost")
    edit_weights(tmp_path / "lost", lm_head__weight=None)
    with pytest.raises(ArtifactError, match=r"newly initialised: lm_head\.weight"):
        load_policy(tmp_path / "lost", model=SETTINGS, seed=0)
