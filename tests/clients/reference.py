"""lm-evaluation-harness's own backend `hf` on the shipped pool's checkpoints, without Shoal.

`python reference.py SITE_PACKAGES OUT`, from the main environment, which has torch, with the
folder of the other environment's packages, which have the harness. Writes one JSON object: by
system (a member, or `pair`, the mean of two members' probabilities) what `evaluated` tells.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(sys.argv[1])

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.harness import MEMBERS, PAIR, POOL, evaluated


class Mixture(HFLM):
    """A member's backend that answers as the mean of several members' probabilities does."""

    def __init__(self, models: list[Any], **options: Any) -> None:
        super().__init__(pretrained=models[0], **options)
        self._models = models

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> Any:
        logits_MBTV = torch.stack([model(inps).logits for model in self._models])
        return torch.logsumexp(logits_MBTV.log_softmax(-1), 0) - torch.log(
            torch.tensor(len(self._models))
        )

    def _model_generate(self, context: Any, max_length: int, stop: Any, **options: Any) -> Any:
        """Draw the likeliest token, of one request at a time, until the end or the limit."""
        while context.shape[1] < max_length:
            token = self._model_call(context)[:, -1].argmax(-1, keepdim=True)
            context = torch.cat([context, token], 1)
            if token.item() == self.eot_token_id:
                break
        return context


def main() -> None:
    """Evaluate every member and the pair."""
    torch.set_num_threads(1)
    models = {
        name: AutoModelForCausalLM.from_pretrained(POOL / name, dtype="float32") for name in MEMBERS
    }
    tokenizer = AutoTokenizer.from_pretrained(POOL / MEMBERS[0])
    options: dict[str, Any] = {"tokenizer": tokenizer, "device": "cpu"}
    told = {
        name: evaluated(HFLM(pretrained=model, batch_size=16, **options))
        for name, model in models.items()
    }
    pair = [models[name] for name in PAIR]
    told["pair"] = evaluated(Mixture(pair, batch_size=1, **options))
    Path(sys.argv[2]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
