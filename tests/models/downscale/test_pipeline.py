"""The whole pipeline: what `shoal downscale --quick` writes, and what it refuses to begin."""

import json
import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.downscale.pipeline import downscale
from models.downscale.recipe import QUICK_RECIPE, Recipe, read_recipe
from models.errors import BaseError, CorpusError, DivergedError, OutputError
from models.pool import load_pool
from policies.base import Query
from policies.outcomes import read_outcomes
from policies.registry import build_policy
from tests.models.downscale.conftest import shoal_downscale
from tests.models.downscale.tiny_models import run, tiny_recipe

# The toy pool takes minutes where the machine is busy.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def recipe(tmp_path):
    """The tiny recipe."""
    return tiny_recipe(tmp_path)


def changed(recipe, **sections):
    """The recipe with some keys of some sections changed."""
    content = recipe.model_dump()
    for section, keys in sections.items():
        content[section] = {**content[section], **keys}
    return Recipe.model_validate(content)


@pytest.mark.slow
def test_the_toy_pool_is_whole_and_loads(toy_pool):
    """One chunk per domain beside the base, all of one tokenizer, chunks of one shape, each a third
    of the base within 2%."""
    pool = load_pool(toy_pool)
    domains = set(read_recipe(QUICK_RECIPE).domains)
    assert {model.name for model in pool.models} == {*domains, "base"}
    sizes = {model.name: model.card.parameters for model in pool.models}
    for domain in domains:
        assert sizes[domain] / sizes["base"] == pytest.approx(1 / 3, rel=0.021)
        assert pool.model(domain).spec.domains == (domain,)
    assert set(pool.policies) == {"auto", "cascade", "fused", "best-of"}
    for file in ("report.html", "laws.npz", "README.md", "outcomes.jsonl"):
        assert (toy_pool / file).stat().st_size > 0


@pytest.mark.slow
def test_the_base_that_is_served_learnt_as_much_as_the_chunks(toy_pool):
    """Cut first, then trained on all corpora for the tokens that the recipe gives to `base`: other
    weights than the chunks come from, less loss than a chunk's; the results tell what it took."""
    results = json.loads((toy_pool / "results.json").read_text())
    training = results["models"]["base"]["training"]
    assert training["tokens"] == pytest.approx(30_000, rel=0.1)
    assert sum(results["losses"]["base"].values()) < sum(results["losses"]["code"].values())
    served, cut_from = (
        AutoModelForCausalLM.from_pretrained(toy_pool / folder, dtype=torch.float32).state_dict()
        for folder in ("base", ".work/base/checkpoint")
    )
    moved = [
        name for name, one in served.items() if not one.equal(cut_from[name].bfloat16().float())
    ]
    assert moved


@pytest.mark.slow
def test_every_policy_of_the_toy_pool_is_built_and_decides(toy_pool):
    """Their files are beside the pool file, and what they did on the test stands in the results."""
    pool = load_pool(toy_pool)
    systems = {
        one["name"]: one for one in json.loads((toy_pool / "results.json").read_text())["systems"]
    }
    for name, spec in pool.policies.items():
        policy = build_policy(spec, folder=pool.folder, models=pool.facts())
        assert policy.decide(Query(text="What is 1 + 1?", prompt_tokens=10)).plan
        assert len(systems[name]["right"]) == len(systems["base"]["right"])


@pytest.mark.slow
def test_a_chunk_is_a_plain_checkpoint_that_generates(toy_pool):
    """transformers alone loads a chunk, with no code or class of ours, and it answers."""
    tokenizer = AutoTokenizer.from_pretrained(toy_pool / "numerals")
    model = AutoModelForCausalLM.from_pretrained(toy_pool / "numerals", dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write 12 in words."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]
    assert written.max() < len(tokenizer)


@pytest.mark.slow
def test_outcomes_are_what_routers_read(toy_pool):
    """Every member has a score on every held-out question of every domain, in both splits."""
    for split in ("router", "test"):
        rows = read_outcomes(toy_pool / "outcomes.jsonl", split=split)
        assert {tag for row in rows for tag in row.tags} >= {"arithmetic", "numerals", "code"}
        for row in rows:
            assert set(row.scores) == {"arithmetic", "numerals", "code", "base"}


@pytest.mark.slow
def test_nothing_is_done_twice(toy_pool):
    """With --resume and the same recipe every stage is skipped; without it the pool is refused."""
    before = {file: file.stat().st_mtime_ns for file in toy_pool.glob(".work/**/manifest.json")}
    again = shoal_downscale("--quick", "--out", toy_pool, "--resume")
    assert again.returncode == 0, again.stderr
    assert " done in " not in again.stdout + again.stderr
    assert {f: f.stat().st_mtime_ns for f in toy_pool.glob(".work/**/manifest.json")} == before
    load_pool(toy_pool)
    refused = shoal_downscale("--quick", "--out", toy_pool)
    assert refused.returncode == 2
    assert "holds a pool already; pass --resume" in refused.stderr


@pytest.mark.slow
def test_interrupted_training_goes_on_from_its_checkpoint(recipe, tmp_path, monkeypatch):
    """A run that is killed while a chunk trains leaves no pool; resumed, it keeps the finished
    stages, goes on from the checkpoint, and ends with the very weights of a run left alone."""
    from models.downscale import pipeline
    from models.training.loop import Trainer

    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    monkeypatch.setattr(pipeline, "measure", stop)
    recipe = changed(recipe, adapt={"checkpoint_every_s": 1e-6})
    with pytest.raises(Stop):
        run(recipe, tmp_path / "alone")

    step, left = Trainer.step, [20]

    def failing(self, rows, share, number):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, rows, share, number)

    out = tmp_path / "interrupted"
    monkeypatch.setattr(Trainer, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, out)
    assert not (out / "pool.yaml").exists()
    with pytest.raises(OutputError, match="an unfinished run; pass --resume"):
        run(recipe, out)
    monkeypatch.setattr(Trainer, "step", step)
    lines = []
    with pytest.raises(Stop):
        downscale(recipe, out, resume=True, report=lines.append)
    assert "cut/sums: unchanged" in lines
    for domain in recipe.domains:
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(o / f".work/adapt/{domain}").state_dict()
            for o in (out, tmp_path / "alone")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def trained(recipe, tmp_path, monkeypatch):
    """Runs everything up to the training; returns the stages that did any work."""
    from models.downscale import pipeline

    monkeypatch.setattr(pipeline, "measure", lambda *_: None)
    monkeypatch.setattr(pipeline, "pool", lambda _: tmp_path / "nowhere")
    monkeypatch.setattr(pipeline, "load_pool", lambda _: None)
    monkeypatch.setattr(pipeline, "publish", lambda *_: None)

    def ran(changed_recipe=recipe):
        lines = run(changed_recipe, tmp_path / "out", resume=(tmp_path / "out").exists())
        return {line.split(": done in")[0] for line in lines if ": done in" in line}

    ran()
    return ran


@pytest.mark.slow
def test_each_input_reruns_exactly_what_depends_on_it(recipe, tmp_path, trained):
    """A corpus, a held-out file, the base's files and keys of the recipe, one after another. What
    mixes in general data from all corpora depends on all of them."""
    adapts = {"adapt/sums", "adapt/words"}

    def stages_of(*names):
        return {f"{stage}/{name}" for stage in names for name in recipe.domains}

    assert trained() == set()
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write('\n{"question": "One more?", "answer": "Yes", "split": "train"}')
    own = {f"{stage}/sums" for stage in ("corpora", "lengths", "calibrate", "cut", "select")}
    assert trained() == own | adapts
    held_out = {"corpus": str(tmp_path / "words.jsonl"), "held_out": str(tmp_path / "held.jsonl")}
    lines = (json.dumps({"question": f"h{i}?", "answer": "x"}) for i in range(8))
    (tmp_path / "held.jsonl").write_text("\n".join(lines))
    with_file = changed(recipe, domains={"words": held_out})
    of_words = {one.replace("sums", "words") for one in own}
    assert trained(with_file) == of_words | adapts
    with (tmp_path / "held.jsonl").open("a") as file:
        file.write('\n{"question": "i?", "answer": "x"}')
    assert trained(with_file) == of_words | adapts
    assert trained(changed(with_file, measure={"test_questions": 7})) == set()
    assert trained(changed(with_file, adapt={"tokens": 1_500})) == adapts
    assert trained(changed(with_file, cut={"calibration_examples": 9})) == (
        stages_of("calibrate", "cut") | adapts
    )
    (tmp_path / "checkpoint/generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    everything = stages_of("lengths", "calibrate", "cut", "select") | adapts | {"base"}
    assert trained(changed(with_file, cut={"calibration_examples": 9})) == everything


@pytest.mark.slow
def test_each_part_of_a_teaching_reruns_what_depends_on_it(recipe, tmp_path, trained):
    """A teacher per domain reads the domain alone: another corpus leaves it, other tokens train all
    of them anew, and how much a teacher weighs is the members' matter. The fine-tuned base teaches
    all; MPDistil takes the teachers as they are and needs none of their lessons."""

    def stages_of(*names):
        return {f"{stage}/{name}" for stage in names for name in recipe.domains}

    def taught(**keys):
        distill = {"weight": 0.5, "teacher": "domain", **keys}
        return changed(recipe, adapt={"distill": distill}, adapt_tokens={"base": 1_000})

    assert trained(taught()) == stages_of("teacher", "lessons", "adapt")
    assert trained(taught()) == set()
    assert trained(taught(weight=0.4)) == stages_of("adapt")
    assert trained(taught(teacher_tokens=900)) == stages_of("teacher", "lessons", "adapt")
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write('\n{"question": "One more?", "answer": "Yes", "split": "train"}')
    of_sums = {
        f"{stage}/sums"
        for stage in ("corpora", "lengths", "calibrate", "cut", "select", "teacher", "lessons")
    }
    assert trained(taught(teacher_tokens=900)) == of_sums | stages_of("adapt")
    meta = {"loss": "competitive", "quiz_share": 0.3, "every_steps": 2, "episode_steps": 2}
    assert trained(taught(teacher_tokens=900, meta=meta)) == stages_of("adapt")
    assert trained(taught(teacher_tokens=900, meta=meta)) == set()
    meta["reward"] = "real"
    assert trained(taught(teacher_tokens=900, meta=meta)) == stages_of("adapt")
    by_trained = {"trained-base/1000", "lessons/general"}
    assert trained(taught(teacher="trained")) == by_trained | stages_of("adapt")
    assert trained(taught(teacher="base")) == {"lessons/general"} | stages_of("adapt")


def test_what_cannot_work_is_refused_before_anything_is_written(recipe, tmp_path, monkeypatch):
    """A foreign architecture, a missing corpus and a full disk leave no output folder."""
    out = tmp_path / "out"
    missing = recipe.model_copy(
        update={"domains": {**recipe.domains, "more": recipe.domains["sums"].model_copy(
            update={"corpus": str(tmp_path / "none.jsonl")})}}
    )  # fmt: skip
    with pytest.raises(CorpusError, match="more: there is no corpus at"):
        run(missing, out)
    with pytest.raises(OutputError, match=r"needs about [0-9.]+ GiB of disk"):
        run(changed(recipe, members={"parameters": 10**12}), out)
    config = tmp_path / "checkpoint/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "gpt2"}))
    with pytest.raises(BaseError, match="'gpt2' is not supported"):
        run(recipe, out)
    assert not out.exists()


def test_bad_corpora_leave_no_pool(recipe, tmp_path):
    """An empty corpus is named; nothing that looks like a pool is left."""
    (tmp_path / "words.jsonl").write_text("")
    with pytest.raises(CorpusError, match=r"words: .*the corpus is empty"):
        run(recipe, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".work"]


def test_texts_too_short_to_measure_are_refused_before_training(recipe, tmp_path):
    """A held-out part of a few letters says nothing; that is said at once."""
    lines = (json.dumps({"text": chr(97 + i % 26) + str(i // 26)}) for i in range(200))
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    with pytest.raises(CorpusError, match=r"sums: nothing of the held-out split .* be measured"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out/.work/calibrate").exists()


def test_examples_that_do_not_fit_are_said_and_too_few_refused(recipe, tmp_path):
    """Long conversations are never cut: they are counted, with what would hold them; where hardly
    any fits, the run ends before any training."""
    for number, long in enumerate((range(0, 120, 2), range(120))):
        lines = [
            {"question": f"{'deep ' * 40 if i in long else ''}{i} + 1?", "answer": str(i + 1)}
            for i in range(120)
        ]
        (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
        out = tmp_path / f"out-{number}"
        if number:
            with pytest.raises(CorpusError, match=r"words: \d+ of \d+ .* adapt.row_tokens, 32"):
                run(recipe, out)
            assert not (out / ".work/calibrate").exists()
        else:
            told = []
            with pytest.raises(BaseError):
                downscale(changed(recipe, members={"parameters": 100}), out, report=told.append)
            assert any("left out" in line and "would hold" in line for line in told)


def test_a_loss_that_is_not_finite_stops_the_run(recipe, tmp_path):
    """Weights that overflow are found at the first step, and named; nothing is published."""
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(DivergedError, match="the loss is nan at step 0"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out/pool.yaml").exists()


def test_a_member_that_cannot_be_cut_is_an_error_of_its_size(recipe, tmp_path):
    """A chunk too small for any shape is refused, with both sizes."""
    with pytest.raises(BaseError, match="no shape of 100 parameters"):
        run(changed(recipe, members={"parameters": 100}), tmp_path / "out")


def test_the_command_wants_one_recipe(tmp_path):
    """Neither none nor two; a broken recipe is an error of the user's, without a traceback."""
    assert "give either a recipe or --quick" in shoal_downscale("--out", tmp_path / "o").stderr
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"name": "x", "domain": {}}))
    done = shoal_downscale(tmp_path / "bad.yaml", "--out", tmp_path / "o")
    assert done.returncode == 2
    assert re.search(r"shoal downscale: .*domain: unknown key", done.stderr)
    assert "Traceback" not in done.stderr
