"""Pool files and cards: what is read, and what is refused before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from models.card import read_card
from models.errors import PoolError
from models.pool import load_pool
from router.config import ConfigError, load_args


def save_checkpoint(folder: Path, *, hidden: int = 16, words: tuple[str, ...] = ("a",)) -> int:
    """Write a tiny random Llama with a tokenizer; return transformers' parameter count."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=hidden,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(words)}
    Tokenizer(WordLevel(vocabulary, unk_token=words[0])).save(str(folder / "tokenizer.json"))
    return model.num_parameters()


def pool_data() -> dict[str, Any]:
    """Return a valid pool of two stacked chunks, for a test to spoil."""
    return {
        "name": "tiny",
        "engines": [{"name": "chunks", "kind": "stacked"}],
        "models": [
            {
                "name": name,
                "engine": "chunks",
                "checkpoint": name,
                "domains": [name],
                "usd_per_million_input_tokens": 0.5,
                "usd_per_million_output_tokens": 2,
            }
            for name in ("ada", "bob")
        ],
        "policies": {"auto": {"kind": "fixed", "plan": "ada"}},
    }


@pytest.fixture(name="folder")
def pool_folder(tmp_path: Path) -> Path:
    """Return a folder that holds the checkpoints of `pool_data`."""
    for name in ("ada", "bob"):
        save_checkpoint(tmp_path / name)
    return tmp_path


def write(folder: Path, data: Any) -> Path:
    """Write `data` as the folder's pool file."""
    file = folder / "pool.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def test_a_card_reports_the_checkpoint(tmp_path: Path) -> None:
    """Parameters, shape and context come from the checkpoint and agree with transformers."""
    parameters = save_checkpoint(tmp_path)
    card = read_card(tmp_path)
    assert card.parameters == parameters
    assert card.flops_per_token == 2 * parameters
    assert (card.shape.num_layers, card.shape.hidden_size, card.shape.head_dim) == (2, 16, 4)
    assert (card.shape.num_heads, card.shape.num_kv_heads) == (4, 2)
    assert card.context_tokens == 64


def test_a_pool_loads(folder: Path) -> None:
    """Models, engines and prices are found by name, from the file or its folder."""
    pool = load_pool(write(folder, pool_data()))
    assert pool == load_pool(folder)
    assert [model.name for model in pool.models_of("chunks")] == ["ada", "bob"]
    assert pool.engine_of("bob").kind == "stacked"
    facts = pool.facts()["ada"]
    assert facts.rates.usd_per_output_token == pytest.approx(2e-6)
    assert facts.domains == ("ada",)
    assert pool.policies["auto"] == {"kind": "fixed", "plan": "ada"}
    with pytest.raises(KeyError):
        pool.model("eve")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["flavour"], 1, "flavour: unknown key"),
        (["engines", 0, "kv_memory"], 1, r"engines.0.kv_memory: unknown key"),
        (["engines", 0, "kv_memory_bytes"], 0, "greater than 0, got 0"),
        (["engines", 0, "device"], "tpu", "got 'tpu'"),
        (["engines", 0, "dtype"], "int3", "float32.*got 'int3'"),
        (["engines"], [], "engines: .* got \\[\\]"),
        (["models", 1, "name"], "ada", "models: the name 'ada' is used 2 times"),
        (["models", 1, "name"], "auto", "'auto' is reserved"),
        (["models", 1, "name"], "a b", "got 'a b'"),
        (["models", 1, "engine"], "vroom", "'vroom' is unknown; allowed are chunks"),
        (["models", 1, "checkpoint"], "eve", "models.bob.checkpoint: there is no folder"),
        (
            ["models", 1, "checkpoint"],
            None,
            r"models\.bob\.checkpoint: the key is missing; the stacked engine",
        ),
        (["models", 1, "usd_per_million_input_tokens"], -1, "greater than or equal to 0"),
    ],
)
def test_a_bad_pool_file_is_refused(
    folder: Path, path: list[Any], value: Any, message: str
) -> None:
    """The error names the file, the key, the value and what is allowed."""
    data = pool_data()
    target: Any = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    file = write(folder, data)
    with pytest.raises(PoolError, match=message) as raised:
        load_pool(file)
    assert str(file) in str(raised.value)


def test_an_idle_engine_is_refused(folder: Path) -> None:
    """An engine without models is a mistake, not a waste of memory."""
    data = pool_data()
    data["engines"].append({"name": "spare", "kind": "stacked"})
    with pytest.raises(PoolError, match=r"engines\.spare runs no model"):
        load_pool(write(folder, data))


def test_stacked_members_need_one_shape(folder: Path) -> None:
    """Members of one stacked engine with different shapes are refused, naming both."""
    save_checkpoint(folder / "bob", hidden=32)
    with pytest.raises(PoolError, match=r"one shape, but 'bob' has .*hidden_size=32.*'ada' has"):
        load_pool(write(folder, pool_data()))


def test_stacked_members_need_one_tokenizer(folder: Path) -> None:
    """Members of one stacked engine with different tokenizers are refused."""
    save_checkpoint(folder / "bob", words=("b", "c"))
    with pytest.raises(PoolError, match="need one tokenizer, but that of 'bob' differs"):
        load_pool(write(folder, pool_data()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "does not hold a JSON object"),
        (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (
            lambda f: (f / "config.json").write_text(json.dumps({"model_type": "llama"})),
            "'num_attention_heads' is missing",
        ),
    ],
)
def test_a_broken_checkpoint_is_refused(folder: Path, spoil: Any, message: str) -> None:
    """What is missing or unsupported in a checkpoint is named."""
    spoil(folder / "ada")
    with pytest.raises(PoolError, match=message):
        load_pool(write(folder, pool_data()))


@pytest.mark.parametrize("text", ["a: [", "\t", "just words"])
def test_a_file_that_is_no_pool_is_refused(tmp_path: Path, text: str) -> None:
    """Broken or unrelated YAML gives an error that names the file."""
    file = tmp_path / "pool.yaml"
    file.write_text(text)
    with pytest.raises(PoolError, match=r"pool\.yaml"):
        load_pool(file)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\nname: b\n", "the key 'name' stands twice"),
        ("policies:\n  auto: {kind: fixed, plan: a}\n  auto: {kind: fixed, plan: b}\n", "'auto'"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_said_twice_is_not_half_believed(tmp_path: Path, text: str, told: str) -> None:
    """YAML's own loader would take the last, say the second of two sections of policies."""
    (tmp_path / "pool.yaml").write_text(text)
    with pytest.raises(PoolError, match=f"pool.yaml is not valid YAML: .*{told}"):
        load_pool(tmp_path)
    with pytest.raises(ConfigError, match=f"pool.yaml is not valid YAML: .*{told}"):
        load_args(tmp_path / "pool.yaml")


def test_a_missing_pool_file_is_refused(tmp_path: Path) -> None:
    """A path with no pool file is named in the error."""
    with pytest.raises(PoolError, match="there is no pool file"):
        load_pool(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("engine", "checkpoint", "why"),
    [
        ({"kind": "stacked"}, "package:no-such-distribution/model.gguf", "is not installed"),
        ({"kind": "vllm"}, "bob", "it needs vLLM"),
    ],
    ids=["its file is missing", "its engine is missing"],
)
def test_a_pool_does_without_an_optional_model(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: dict[str, str],
    checkpoint: str,
    why: str,
) -> None:
    """The model and its engine are left out, the pool says why, and who stands in."""
    monkeypatch.setattr("models.engines.vllm.find_spec", lambda _: None)
    data = pool_data()
    data["engines"].append({"name": "own", **engine})
    data["models"][1] |= {"engine": "own", "checkpoint": checkpoint, "otherwise": "ada"}
    pool = load_pool(write(folder, data))
    assert [model.name for model in pool.models] == ["ada"]
    assert [kept.name for kept in pool.engines] == ["chunks"]
    assert pool.absent["bob"].otherwise == "ada"
    assert why in pool.absent["bob"].why
    del data["models"][1]["otherwise"]
    if "package" in checkpoint:
        with pytest.raises(PoolError, match=why):
            load_pool(write(folder, data))


def test_an_optional_model_that_is_there_is_served(folder: Path) -> None:
    """Nothing is left out where nothing is missing; a damaged checkpoint is still an error."""
    data = pool_data()
    data["models"][1]["otherwise"] = "ada"
    file = write(folder, data)
    assert not load_pool(file).absent
    (folder / "bob" / "config.json").write_text("{")
    with pytest.raises(PoolError, match=r"config\.json"):
        load_pool(file)


def test_a_stand_in_must_be_there(folder: Path) -> None:
    """Who stands in is another model of the pool, and one that can be had."""
    data = pool_data()
    for name in ("bob", "eve"):
        data["models"][1]["otherwise"] = name
        with pytest.raises(PoolError, match=f"otherwise: '{name}' is unknown; allowed are ada"):
            load_pool(write(folder, data))
    missing = "package:no-such-distribution/model.gguf"
    for model, other in zip(data["models"], ("bob", "ada"), strict=True):
        model |= {"otherwise": other, "checkpoint": missing}
    with pytest.raises(PoolError, match="cannot be had here either"):
        load_pool(write(folder, data))


def test_a_checkpoint_says_how_its_answers_are_drawn(folder: Path) -> None:
    """Its generation_config.json does, what is off left out, unless the pool file knows better or
    will have none of it."""
    makers = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "min_p": None, "max_new_tokens": 9}
    for name in ("ada", "bob"):
        (folder / name / "generation_config.json").write_text(json.dumps(makers))
    data = pool_data()
    data["models"][0]["sampling"] = {"top_p": 0.5, "min_p": 0.1}
    data["models"][1]["generation_config"] = False
    pool = load_pool(write(folder, data))
    assert pool.model("ada").sampling == {"temperature": 0.6, "top_p": 0.5, "min_p": 0.1}
    assert pool.model("bob").sampling == {}


@pytest.mark.parametrize(
    ("makers", "message"),
    [
        ({"temperature": "hot"}, "generation_config.json: temperature 'hot' is not allowed"),
        ({"top_p": 1.5}, "asks for answers drawn as no request may be: top_p.*generation_config"),
    ],
)
def test_settings_that_no_request_may_have_are_refused(
    makers: dict[str, Any], message: str, folder: Path
) -> None:
    """Before anything starts, by file, key and value."""
    (folder / "bob" / "generation_config.json").write_text(json.dumps(makers))
    with pytest.raises(PoolError, match=message):
        load_pool(write(folder, pool_data()))
