"""The whole pipeline: what `shoal downscale --quick` writes, and what it refuses to begin."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.downscale.pipeline import downscale
from models.downscale.policies import fused_nll
from models.downscale.questions import questions
from models.downscale.recipe import QUICK_RECIPE, Recipe, read_recipe
from models.downscale.stage import Run
from models.errors import BaseError, CorpusError, DivergedError, OutputError
from models.pool import load_pool
from models.training.scratch import LlamaShape, build_model, build_tokenizer
from policies.base import Query
from policies.outcomes import read_outcomes
from policies.plan import Answer
from policies.registry import build_policy
from tests.models.downscale.conftest import shoal_downscale

# The toy pool takes minutes where the machine is busy.
pytestmark = pytest.mark.timeout(1200)

TINY = LlamaShape(
    hidden_size=32, num_layers=2, feed_forward_size=48, num_heads=4, num_kv_heads=2, head_size=8
)


def tiny_recipe(tmp_path):
    """A recipe on an untrained base and two files, small enough for seconds."""
    tokenizer = build_tokenizer()
    build_model(TINY, tokenizer, seed=0).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    for name in ("sums", "words"):
        lines = [{"question": f"{name} {i} + 1?", "answer": str(i + 1)} for i in range(120)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Recipe.model_validate(
        {
            "name": "tiny",
            "base": {"checkpoint": str(tmp_path / "checkpoint")},
            "domains": {
                name: {"corpus": str(tmp_path / f"{name}.jsonl")} for name in ("sums", "words")
            },
            "members": {"parameters": "1/2"},
            "cut": {"calibration_examples": 8},
            "adapt": {
                "tokens": 2_000, "rows_per_step": 4, "row_tokens": 32, "general_share": 0.2,
                "compiled": False, "precision": "float32",
            },
        }
    )  # fmt: skip


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


def run(recipe, out, *, resume=False):
    """Run the pipeline quietly; returns its report, line by line."""
    lines = []
    downscale(recipe, out, resume=resume, report=lines.append)
    return lines


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


_WORDS = {
    "fish": "salmon trout herring swim river deep cold scales gills net boat catch shoal tide",
    "bread": "flour water yeast oven crust dough knead warm butter loaf slice rye salt bake",
}


def recipe_of_texts(tmp_path):
    """The same recipe on two folders of texts of different words, in all formats, no question."""
    rng = random.Random(5)
    for name, words in _WORDS.items():
        (tmp_path / name).mkdir()
        for number in range(60):
            text = " ".join(rng.choices(words.split(), k=60))
            kind = ("txt", "md", "html")[number % 3]
            page = f"<html><body><nav>Menu</nav><p>{text}</p></body></html>"
            file = tmp_path / name / f"{number}.{kind}"
            file.write_text(page if kind == "html" else text)
        lines = (
            json.dumps({"text": " ".join(rng.choices(words.split(), k=60))}) for _ in range(60)
        )
        (tmp_path / name / "more.jsonl").write_text("\n".join(lines))
    content = tiny_recipe(tmp_path).model_dump()
    content["domains"] = {name: {"corpus": str(tmp_path / name)} for name in _WORDS}
    content["adapt"] |= {"tokens": 20_000, "row_tokens": 64, "general_share": 0.1}
    content["measure"] |= {"router_questions": 24, "test_questions": 16, "max_new_tokens": 4}
    return Recipe.model_validate(content)


@pytest.fixture(scope="module")
def text_pool(tmp_path_factory):
    """The recipe, the pool that was made of it, and what the run said."""
    folder = tmp_path_factory.mktemp("texts")
    made_of = recipe_of_texts(folder)
    return made_of, folder / "out", run(made_of, folder / "out")


@pytest.mark.slow
def test_folders_of_text_are_enough_for_a_whole_pool(text_pool):
    """Members are judged by their loss on held-out texts, per byte; the router and the policies
    learn from it, and the report and the cards say it."""
    _, out, lines = text_pool
    told = re.compile(r"measure/fish: \d\.\d+ nats per byte on 32 test texts")
    assert any(told.fullmatch(line) for line in lines)
    pool = load_pool(out)
    assert set(pool.policies) == {"auto", "cascade", "fused", "best-of"}
    rows = read_outcomes(out / "outcomes.jsonl")
    assert {row.split for row in rows} == {"router", "test"}
    for row in rows:
        assert set(row.scores) == {"fish", "bread", "base"}
        for name, score in row.scores.items():
            assert score == pytest.approx(math.exp(row.grades["loss"][name]))
    results = json.loads((out / "results.json").read_text())
    systems = {system["name"]: system for system in results["systems"]}
    own = {name: systems[name]["loss_by_domain"][name] for name in _WORDS}
    assert all(own[name] < systems["base"]["loss_by_domain"][name] - 0.3 for name in _WORDS)
    routed = systems["routed (by domain)"]
    assert routed["loss"]["value"] == pytest.approx(sum(own.values()) / 2, abs=1e-3)
    # Each domain has its own words: a router that learnt from the losses finds its chunk.
    assert systems["auto"]["loss"]["value"] == pytest.approx(routed["loss"]["value"], abs=0.02)
    fused = systems["fused"]["loss"]["value"]
    assert fused < min(systems[name]["loss"]["value"] for name in _WORDS)
    curve = results["fits"]["curves"]["loss/evidence/all"]
    assert curve["losses"][1] < curve["losses"][0]
    assert not any(key.startswith("error/") for key in results["fits"]["curves"])
    assert "Held-out loss" in (out / "report.html").read_text()
    assert "nats per byte" in (out / "fish/README.md").read_text()
    for spec in pool.policies.values():
        policy = build_policy(spec, folder=pool.folder, models=pool.facts())
        assert policy.decide(Query(text="salmon trout river", prompt_tokens=10)).plan


@pytest.mark.slow
def test_what_a_text_measures_is_what_transformers_computes(text_pool):
    """The loss of an opening's continuation under a chunk, in nats per byte; and that of the fused
    chunks is the weighted mixture's, the weights being the openings' evidence."""
    made_of, out, _ = text_pool
    asked = questions(Run(made_of, out / ".work", report=lambda _: None))
    rows = read_outcomes(out / "outcomes.jsonl")
    logs = {}
    for name in _WORDS:
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32)
        tokens = torch.tensor([asked[3].conversation.tokens])
        with torch.no_grad():
            every = model(tokens).logits[0, :-1].log_softmax(-1)
        told = every.gather(1, tokens[0, 1:, None])[:, 0].double().numpy()
        at = asked[3].conversation.is_answer.index(True) - 1
        logs[name] = told[:at].sum(), told[at:]
        per_byte = told[at:].sum() / len(asked[3].answer.encode())
        assert rows[3].grades["loss"][name] == pytest.approx(per_byte, abs=2e-4)
    plan = Answer(members=tuple(_WORDS), weighting="evidence", temperature=5.0)
    prompts = np.array([[prompt for prompt, _ in logs.values()]])
    answers = np.stack([answer for _, answer in logs.values()], axis=-1)[None]
    weights = np.exp((prompts[0] - prompts.max()) / 5.0)
    mixture = np.log(np.exp(answers[0]) @ (weights / weights.sum()))
    found = fused_nll([plan], tuple(_WORDS), answers, prompts)
    assert found == pytest.approx([-mixture.sum()])


def test_a_pool_within_its_own_corpus_is_refused(tmp_path):
    """The next run would read the report of this one."""
    with pytest.raises(OutputError, match=r"is within .*fish, which the run reads"):
        run(recipe_of_texts(tmp_path), tmp_path / "fish" / "out")


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
