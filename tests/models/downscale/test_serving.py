"""Measured answers are those that a client would have got."""

import torch
from transformers import AutoModelForCausalLM

from models.downscale.answers import ask
from models.tasks import DOMAINS
from models.tasks.base import Split
from models.training.checkpoint import export_checkpoint
from models.training.scratch import build_model, build_tokenizer
from policies.plan import Answer
from tests.models.downscale.tiny_models import TINY


def test_answers_are_the_greedy_ones_of_transformers(tmp_path) -> None:
    """One after another in transformers, all at once here: the same texts and log-probabilities."""
    tokenizer = build_tokenizer()
    export_checkpoint(build_model(TINY, 1, tokenizer, seed=1).bfloat16(), tokenizer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    queries = [task.question for task in DOMAINS["text"].distinct(Split.TEST, 6, seed=0)]
    asked = [(query, Answer(members=("one",))) for query in queries]
    for query, written in zip(
        queries, ask({"one": tmp_path}, asked, max_new_tokens=5), strict=True
    ):
        messages = [{"role": "user", "content": query}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = output.sequences[0, ids.shape[1] :]
        assert written.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert written.num_prompt_tokens == ids.shape[1]
        logs = [
            one[0].log_softmax(-1)[token].item()
            for one, token in zip(output.logits, tokens, strict=True)
        ]
        assert abs(written.logprobs.mean - sum(logs) / len(logs)) < 2e-3
