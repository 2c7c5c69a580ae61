"""Greedy answers of one model to many questions, batched without padding.

Questions of equal prompt length share a batch, so every answer is the one that the question gets
alone, up to floating-point noise.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A greedy answer: its text, and the natural-log probability of each token, end included.

    `log_probabilities` covers the end token when the model wrote it within the limit.
    """

    text: str
    log_probabilities: tuple[float, ...]
    num_prompt_tokens: int
    finished: bool


@torch.inference_mode()
def complete(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 256,
) -> list[Completion]:
    """Greedy answers in the order of `questions`, each asked alone in the chat template."""
    prompts = [_prompt(tokenizer, question) for question in questions]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    found: dict[int, Completion] = {}
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            answers = _complete_batch(
                model, tokenizer, [prompts[i] for i in batch], max_new_tokens=max_new_tokens
            )
            found |= dict(zip(batch, answers, strict=True))
    return [found[i] for i in range(len(questions))]


def _prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def _complete_batch(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
) -> list[Completion]:
    end = tokenizer.eos_token_id
    cache = DynamicCache(config=model.config)
    tokens = torch.tensor(prompts)
    written: list[torch.Tensor] = []
    log_probabilities: list[torch.Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        best, token = logits.float().log_softmax(-1).max(-1)
        written.append(token)
        log_probabilities.append(best)
        ended |= token == end
        if bool(ended.all()):
            break
        tokens = token[:, None]
    ids, scores = torch.stack(written, 1).tolist(), torch.stack(log_probabilities, 1).tolist()
    completions = []
    for row, row_scores in zip(ids, scores, strict=True):
        finished = end in row
        num_words = row.index(end) if finished else len(row)
        completions.append(
            Completion(
                text=str(tokenizer.decode(row[:num_words], skip_special_tokens=True)),
                log_probabilities=tuple(row_scores[: num_words + finished]),
                num_prompt_tokens=len(prompts[0]),
                finished=finished,
            )
        )
    return completions
