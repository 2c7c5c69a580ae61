"""Recipes: read whole, refused by name."""

import copy
from pathlib import Path

import pytest
import yaml

from models.downscale.recipe import DEFAULT_RECIPE, QUICK_RECIPE, MemberSettings, read_recipe
from models.errors import RecipeError

GOOD = {
    "name": "mine",
    "base": {"checkpoint": "base"},
    "domains": {"law": {"corpus": "law.jsonl"}, "sums": {"corpus": "tasks:arithmetic"}},
}


def write(folder, change=None):
    """A recipe file with one key changed, by its dotted path."""
    content = copy.deepcopy(GOOD)
    for path, value in (change or {}).items():
        *parents, last = path.split(".")
        at = content
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("file", [DEFAULT_RECIPE, QUICK_RECIPE], ids=["default", "quick"])
def test_shipped_recipes_are_valid(file):
    """Both recipes that come with Shoal read without an error and train their base themselves."""
    assert read_recipe(file).base.train is not None


def test_recipes_of_the_benches_are_valid():
    """What the documents say was run can be run."""
    folder = Path(__file__).parents[2] / "bench/downscale"
    recipes = [read_recipe(file) for file in folder.glob("*.yaml")]
    assert "smollm2" in {recipe.name for recipe in recipes}


def test_paths_start_at_the_recipe(tmp_path):
    """Relative paths are the recipe's neighbours; generators and 'domains' are no paths."""
    recipe = read_recipe(write(tmp_path))
    assert recipe.base.checkpoint == str(tmp_path / "base")
    assert recipe.domains["law"].corpus == str(tmp_path / "law.jsonl")
    assert recipe.domains["sums"].corpus == "tasks:arithmetic"
    assert recipe.general.corpus == "domains"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapt.tokenz": 5}, "adapt.tokenz: unknown key"),
        ({"adapt.tokens": 0}, "adapt.tokens: .* greater than 0"),
        ({"select.keep": 1.5}, "select.keep: .*, got 1.5"),
        ({"select.by": "luck"}, "select.by: .*'random'.*got 'luck'"),
        ({"members.parameters": "1/0"}, "'1/0' is neither a share of the base"),
        ({"members.parameters": "-3"}, "'-3' is neither a share"),
        ({"base.train": {"shape": {}}}, "base"),
        ({"domains.base": {"corpus": "x.txt"}}, "the name 'base' is reserved for the base"),
        ({"domains.fused": {"corpus": "x.txt"}}, "'fused' is reserved for a policy of the pool"),
        ({"domains.Law": {"corpus": "x.txt"}}, "'Law' and 'law' differ in case alone"),
        ({"domains.law.corpus": "domains"}, "only the general corpus may be 'domains'"),
        ({"adapt_tokens": {"lore": 5}}, "adapt_tokens: 'lore': it is no domain; .*law, sums, base"),
        (
            {"adapt_tokens": {"base": 5}, "members.adapters": {}},
            "adapt_tokens: 'base': adapters need the base as it is; allowed are law, sums",
        ),
        (
            {"adapt.distill": {"weight": 0.5, "teacher": "me"}},
            "distill.teacher: .*'domain'.*got 'me'",
        ),
        ({"adapt.distill": {"teacher": "domain"}}, "distill: .*weight: 0 leaves a teacher nothing"),
        ({"adapt.distill": {"meta": {}}}, "distill: .*weight: 0 leaves a teacher nothing"),
        (
            {"adapt.distill": {"weight": 0.5, "teacher_tokens": 9}},
            "teacher_tokens: 9 trains nobody where teacher is 'base'; allowed where it is 'domain'",
        ),
        (
            {"adapt.distill": {"weight": 0.5, "teacher": "trained"}},
            "'trained' is the base that adapt_tokens.base trains, .* allowed .* base, domain",
        ),
        (
            {"adapt.distill": {"weight": 0.5, "meta": {}}, "members.adapters": {}},
            "adapt.distill.meta: trains chunks; leave it out beside adapters",
        ),
        (
            {"adapt.distill": {"weight": 0.5, "meta": {"reward": "gold"}}},
            "distill.meta.reward: .*'binary' or 'real', got 'gold'",
        ),
    ],
)
def test_bad_values_are_named(tmp_path, change, message):
    """The error names the key, the value and what is allowed."""
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, change))


def test_unreadable_recipes(tmp_path):
    """A missing file and broken YAML are told apart."""
    with pytest.raises(RecipeError, match="there is no recipe at"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("{")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_recipe(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("given", "parameters"), [("1/8", 125_000), (0.5, 500_000), (300_000, 300_000), ("2_000", 2000)]
)
def test_member_sizes(given, parameters):
    """A share of the base or a number of parameters, both ways of writing them."""
    assert MemberSettings(parameters=given).target(1_000_000) == parameters


@pytest.mark.parametrize("name", ["results.json", "README.md", "plots", "cascade"])
def test_names_that_the_pool_needs_are_no_domains(tmp_path, name):
    """A chunk's folder would stand where a file of the pool does."""
    content = copy.deepcopy(GOOD)
    content["domains"][name] = {"corpus": "x.txt"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=f"the name '{name}' is reserved"):
        read_recipe(tmp_path / "recipe.yaml")


def test_defaults_are_what_won_here(tmp_path):
    """All examples are kept and labels alone teach (docs/downscale/results.md)."""
    recipe = read_recipe(write(tmp_path))
    assert (recipe.select.by, recipe.select.keep) == ("random", 1.0)
    assert recipe.adapt.distill.weight == 0
