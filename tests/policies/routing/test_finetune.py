"""Fine-tuned transformers as routers: the objective, the files, what is learned."""

from pathlib import Path

import numpy as np
import pytest

from policies.base import ModelFacts, Query
from policies.errors import PolicyError
from policies.footprint import Rates
from policies.outcomes import Outcome
from policies.plan import Answer
from policies.routing.finetune import FinetuneSettings, distillation_loss, finetune_router
from policies.routing.fit import FitSettings
from policies.routing.heads import Objective, distribution
from policies.routing.policy import Learned
from policies.routing.router import load_router, save_router
from tests.tiny_bert import save_bert

WORDS = ["add", "spell", "two", "three", "seven", "shark", "coral"]


def make_outcomes(num_queries: int, *, tagged: bool) -> list[Outcome]:
    """Return sums that `adder` knows and words that `speller` knows (seed 0)."""
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(num_queries):
        sums = bool(rng.integers(2))
        words = ("add", *rng.choice(WORDS[2:5], 3)) if sums else ("spell", rng.choice(WORDS[5:]))
        outcomes.append(
            Outcome(
                query=" ".join(words),
                scores={"adder": float(sums), "speller": float(not sums)},
                tags=(("sums" if sums else "words"),) if tagged else (),
            )
        )
    return outcomes


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer with random weights (seed 0) and its tokenizer, as a folder."""
    return save_bert(tmp_path_factory.mktemp("bert"), WORDS)


def test_the_loss_is_that_of_the_linear_heads() -> None:
    """KL of softmaxes plus cross-entropy over known scores, by hand; gradients stay finite."""
    import torch

    z = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, -0.5]], requires_grad=True)
    targets = np.array([[1.0, 0.0, np.nan], [0.0, 0.5, 1.0]])
    objective = Objective(temperature=0.5, tie_weight=0.7)
    loss = distillation_loss(z, torch.tensor(targets, dtype=torch.float32), objective)
    logits = z.detach().numpy().astype(float)
    r = 1 / (1 + np.exp(-logits))
    wanted = distribution(targets, temperature=0.5)
    got = distribution(np.where(np.isnan(targets), np.nan, r), temperature=0.5)
    divergence = np.nansum(wanted * (np.log(wanted + 1e-30) - np.log(got + 1e-30)))
    surprise = -np.nansum(targets * np.log(r) + (1 - targets) * np.log(1 - r))
    assert loss.item() == pytest.approx((divergence + 0.7 * surprise) / 2, rel=1e-4)
    loss.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert z.grad[0, 2] == 0


@pytest.mark.parametrize("tagged", [True, False])
def test_a_tuned_transformer_routes_and_moves_with_its_file(
    tiny_bert: Path, tmp_path: Path, tagged: bool
) -> None:
    """It learns who knows what, decides as a policy, and its folder may move with the router."""
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "router.npz"
    router = finetune_router(
        make_outcomes(160, tagged=tagged),
        path=str(tiny_bert),
        out=file.with_suffix(".encoder"),
        settings=FitSettings(num_clusters=2),
        training=FinetuneSettings(learning_rate=2e-3, epochs=4, batch_size=16, max_tokens=16),
    )
    save_router(router, file)
    losses = router.facts["training"]["held_out_losses"]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    assert router.facts["held_out"]["accuracy"] > 0.95
    stored = {path.name for path in file.with_suffix(".encoder").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= stored
    (tmp_path / "a").rename(tmp_path / "b")
    moved = load_router(tmp_path / "b" / "router.npz")
    texts = ["add two seven three", "spell shark"]
    np.testing.assert_allclose(moved.qualities(texts), router.qualities(texts), atol=1e-5)
    rates = Rates(usd_per_input_token=1e-7, usd_per_output_token=1e-7)
    facts = {name: ModelFacts(name=name, rates=rates) for name in router.models}
    policy = Learned(moved, models=facts, unfamiliar=Answer(members=("adder",)))
    decision = policy.decide(Query(text=texts[1]))
    assert decision.plan == Answer(members=("speller",)), decision.reason
    assert policy.decide(Query(text=texts[0], explain=True)).details["strongest_ngrams"] == []


def test_bad_training_settings_are_refused(tmp_path: Path) -> None:
    """The error names the setting; a folder without a model is refused before any training."""
    with pytest.raises(PolicyError, match=r"learning_rate: 2\.0"):
        FinetuneSettings(learning_rate=2.0)
    with pytest.raises(PolicyError, match="epochs 0"):
        FinetuneSettings(epochs=0)
    with pytest.raises(PolicyError, match="not a Hugging Face model's folder"):
        finetune_router(
            make_outcomes(40, tagged=True), path=str(tmp_path), out=tmp_path / "encoder"
        )
