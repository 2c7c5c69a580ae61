"""Fused distributions equal references computed from separate transformers models."""

from pathlib import Path

import pytest
import torch

from tests.models.engines.stacked.tiny import (
    VOCAB_SIZE,
    answer,
    build_engine,
    load_reference,
    request,
    save_checkpoint,
)

PROMPT = [17, 250, 3, 99, 301, 8]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random checkpoints (seeds 0 to 2)."""
    root = tmp_path_factory.mktemp("fusion")
    return [save_checkpoint(root / f"{s}", seed=s, initializer_range=0.08) for s in range(3)]


WEIGHTS = {"uniform": None, "skewed": (0.1, 6.0, 2.5), "one-hot": (0.0, 0.0, 3.0)}


def test_fused_tokens_and_logprobs(folders: list[Path]) -> None:
    """Mixture and product, uniform, skewed and one-hot, in one batch: 12 greedy tokens and their
    20 best log-probabilities at every step."""
    cases = [(rule, weights) for rule in ("mixture", "product") for weights in WEIGHTS.values()]
    answers = answer(
        build_engine(folders),
        *(
            request(
                PROMPT,
                ("m2", "m0", "m1"),
                rule=rule,
                weights=weights,
                max_tokens=12,
                top_logprobs=20,
                ignore_eos=True,
            )
            for rule, weights in cases
        ),
    )
    references = [load_reference(folders[i]) for i in (2, 0, 1)]
    for (rule, weights), chunks in zip(cases, answers, strict=True):
        tokens = list(PROMPT)
        relative = torch.tensor(weights or (1.0, 1.0, 1.0), dtype=torch.float64)
        for token in (token for chunk in chunks for token in chunk.tokens):
            with torch.inference_mode():
                logp = torch.stack(
                    [
                        reference(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
                        for reference in references
                    ]
                )
            share = (relative / relative.sum())[:, None]
            expected = (
                (share * logp.exp()).sum(0).log()
                if rule == "mixture"
                else (share * logp).sum(0).log_softmax(-1)
            )
            assert token.token_id == int(expected.argmax())
            assert token.logprob == pytest.approx(float(expected.max()), abs=1e-4)
            best = expected.topk(20)
            assert [top.logprob for top in token.top] == pytest.approx(
                best.values.tolist(), abs=1e-4
            )
            tokens.append(token.token_id)


def test_impossible_tokens_stay_finite() -> None:
    """A token that no member allows has a finite log-probability, and the rest still sums to 1."""
    from models.engines.stacked.fusion import mixture

    logp = torch.full((1, 2, VOCAB_SIZE), -1e4)
    logp[0, 0, 3] = logp[0, 1, 4] = 0.0
    fused = mixture(logp, torch.tensor([[0.25, 0.75]]))
    assert fused.isfinite().all()
    assert fused.exp()[0, [3, 4]].tolist() == pytest.approx([0.25, 0.75])
