"""Answers that must follow a JSON schema: which tokens may come next, by llguidance."""

from __future__ import annotations

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from models.errors import RequestError


class Grammar:
    """The state of one constrained answer."""

    def __init__(self, tokenizer: LLTokenizer, json_schema: str) -> None:
        """Compile `json_schema`; takes up to a second for a large one, and releases the GIL.

        Raises `RequestError` for a schema that is not valid or not supported.
        """
        grammar = LLMatcher.grammar_from_json_schema(json_schema)
        problem = LLMatcher.validate_grammar(grammar, tokenizer)
        if problem and not problem.startswith("WARNING"):
            raise RequestError(
                f"response_format: the JSON schema cannot be used: {problem}", "response_format"
            )
        self._matcher = LLMatcher(tokenizer, grammar)

    def allowed(self, vocab_size: int) -> Tensor:
        """Return which tokens may come next, [V], bool."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:vocab_size]
        return torch.from_numpy(allowed).bool()

    def accept(self, token: int) -> bool:
        """Take the next token; return whether the answer is complete and cannot go on."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())
