"""Greedy answers and the intervals of their shares."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from models.tasks import DOMAINS, Split
from models.training.generate import complete
from models.training.shapes import Shape, build_model
from models.training.statistics import wilson_interval

_TINY = Shape(
    hidden_size=32,
    num_layers=1,
    feed_forward_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
)


def test_answers_do_not_depend_on_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each completion is transformers' greedy one for the question alone."""
    model = build_model(_TINY, tokenizer, seed=1)
    questions = [t.question for t in DOMAINS["text"].distinct(Split.TEST, 12, seed=0)]
    completions = complete(model, tokenizer, questions, max_new_tokens=5, batch_size=4)
    for question, completion in zip(questions, completions, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        assert isinstance(prompt, str)
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        output = model.generate(  # type: ignore[misc]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
        written = output[0, ids.shape[1] :]
        assert completion.text == tokenizer.decode(written, skip_special_tokens=True)
        assert completion.num_prompt_tokens == ids.shape[1]
        assert all(value <= 0 for value in completion.log_probabilities)


def test_wilson_interval() -> None:
    """The interval of 8 in 10 is the published one, and it stays within [0, 1]."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 5)[0] == 0
    assert wilson_interval(5, 5)[1] == 1
    with pytest.raises(ValueError, match="positive"):
        wilson_interval(0, 0)
