"""The grader `loss`: the reference's likelihood under each model of a pool."""

import asyncio
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.pool import DEFAULT_POOL, load_pool
from policies.errors import PolicyError
from policies.grading.base import GradingContext, Panel, Question
from router.learning.fusing import Likelihoods


def test_the_loss_is_that_of_transformers() -> None:
    """The label loss of the reference's tokens after the templated question, per byte."""
    question = Question(query="6 * 17 = ?", references=("102",))
    context = GradingContext(likelihood=Likelihoods(load_pool(DEFAULT_POOL)))
    names = ("arithmetic", "dates")
    sheet = asyncio.run(Panel(["loss"], context).grade(question, dict.fromkeys(names, "")))
    for name in names:
        folder = DEFAULT_POOL / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        said = [{"role": "user", "content": question.query}]
        prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        read = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        written = tokenizer("102", add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(read) + written])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([read + written]), labels=labels).loss
        per_byte = -float(loss) * len(written) / 3
        assert sheet.grades["loss"][name] == pytest.approx(per_byte, abs=1e-4)
        assert sheet.scores[name] == pytest.approx(math.exp(per_byte), abs=1e-4)


def test_without_weights_there_is_no_loss() -> None:
    """A server's models are refused before anything is asked."""
    with pytest.raises(PolicyError, match="needs a --pool"):
        Panel(["loss"], GradingContext())
