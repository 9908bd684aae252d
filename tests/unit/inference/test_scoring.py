import micro_models as micro
import pytest
import torch

from rlhf.data.chat import encode_pair_side
from rlhf.data.collate import pad_left, pad_right
from rlhf.errors import DataError
from rlhf.inference.scoring import HfScorer


def one_by_one(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows])


def test_scores_equal_those_without_padding_in_input_order() -> None:
    model, rows = micro.scorer(), micro.token_lists(20, high=60)
    scorer = HfScorer(model, micro.tokenizer(), max_length=256, tokens_per_batch=150)
    torch.testing.assert_close(scorer.score_ids(rows), one_by_one(model, rows), atol=1e-5, rtol=0.0)


def test_left_and_right_padding_score_equally() -> None:
    model, rows = micro.scorer(), micro.token_lists(8, high=40)
    unpadded = one_by_one(model, rows)
    for pad in (pad_left, pad_right):
        with torch.no_grad():
            scores = model(
                input_ids=pad(rows, micro.PAD),
                attention_mask=pad([[1] * len(row) for row in rows], 0),
            ).logits.squeeze(-1)
        torch.testing.assert_close(scores, unpadded, atol=1e-5, rtol=0.0)


def test_the_score_is_read_at_eos() -> None:
    """Pad differs from EOS: what follows EOS is ignored, EOS itself is not."""
    model, tokenizer = micro.scorer(), micro.tokenizer()
    hidden = []
    model.score.register_forward_pre_hook(lambda _module, inputs: hidden.append(inputs[0]))
    scorer = HfScorer(model, tokenizer, max_length=256)
    rows = [[5, 6, 7, micro.EOS], [8, micro.EOS]]
    scores = scorer.score_ids(rows)
    # Both rows are one group, the shorter one first, padded to the longer one.
    by_hand = (hidden[0] @ model.score.weight.T).view(2, 4)
    shortest_first = [1, 3]
    for row, last, index in zip((1, 0), shortest_first, (0, 1), strict=True):
        torch.testing.assert_close(scores[row], by_hand[index, last].detach())
    without_eos = scorer.score_ids([[5, 6, 7], [8]])
    assert bool((scores != without_eos).all())


def test_different_answers_get_different_scores() -> None:
    scorer = HfScorer(micro.scorer(), micro.tokenizer(), max_length=256)
    prompt = [{"role": "user", "content": "what does the cat eat"}]
    scores = scorer([prompt, prompt], ["the cat eats fish", "the cat eats hay"])
    assert scores[0] != scores[1]
    assert scores.dtype is torch.float32


def test_text_is_encoded_as_in_training() -> None:
    tokenizer = micro.tokenizer()
    scorer = HfScorer(micro.scorer(), tokenizer, max_length=256)
    prompt = [{"role": "user", "content": "what does the cat eat"}]
    ids = encode_pair_side(tokenizer, prompt, "hay")
    assert ids[-1] == tokenizer.eos_token_id
    assert torch.equal(scorer([prompt], ["hay"]), scorer.score_ids([ids]))


def test_over_long_and_empty_rows_are_refused() -> None:
    scorer = HfScorer(micro.scorer(), micro.tokenizer(), max_length=4)
    assert scorer.score_ids([[5, 6, 7, 1]]).shape == (1,)
    with pytest.raises(DataError, match="row 1 has 5 tokens, but scoring takes 1 to 4"):
        scorer.score_ids([[5], [5, 6, 7, 8, 1]])
    with pytest.raises(DataError, match="row 0 has 0 tokens"):
        scorer.score_ids([[]])


def test_nothing_to_score() -> None:
    assert HfScorer(micro.scorer(), micro.tokenizer(), max_length=4).score_ids([]).shape == (0,)


def test_same_rows_same_bits() -> None:
    scorer = HfScorer(micro.scorer(), micro.tokenizer(), max_length=64, tokens_per_batch=100)
    rows = micro.token_lists(30)
    assert torch.equal(scorer.score_ids(rows), scorer.score_ids(rows))
