"""Splits, normalisation and the contract that every domain keeps."""

import random
from itertools import islice

import pytest

from models.tasks import DOMAINS, domain
from models.tasks.base import Domain, Draft, Skill, Split, check, normalise, split_of


def test_splits_are_stable() -> None:
    """The split of an instance never changes, on any machine."""
    splits = [split_of(("add", 37, b)) for b in range(58, 70)]
    assert splits == [split_of(("add", 37, b)) for b in range(58, 70)]
    assert [str(s)[:2] for s in splits] == [
        "ro",
        "tr",
        "tr",
        "tr",
        "tr",
        "tr",
        "tr",
        "tr",
        "tr",
        "ro",
        "tr",
        "tr",
    ]


def test_splits_have_their_shares() -> None:
    """About 80%, 10% and 10% of the instances are in train, router and test."""
    splits = [split_of(("n", n)) for n in range(5000)]
    for split, share in ((Split.TRAIN, 0.8), (Split.ROUTER, 0.1), (Split.TEST, 0.1)):
        assert splits.count(split) / len(splits) == pytest.approx(share, abs=0.02)


def test_a_primitive_fact_is_always_trained() -> None:
    """An instance of None stays in train."""
    assert split_of(None) is Split.TRAIN


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("split", Split)
def test_draws_are_of_the_split_asked_for(name: str, split: Split) -> None:
    """Every draft that a domain turns into a task hashes to the task's split."""
    drafts: list[Draft] = []

    def recorded(skill: Skill) -> Skill:
        def draw(rng: random.Random) -> Draft:
            drafts.append(skill.draw(rng))
            return drafts[-1]

        return Skill(name=skill.name, weight=skill.weight, draw=draw, held_out=skill.held_out)

    watched = Domain(name=name, skills=tuple(map(recorded, DOMAINS[name].skills)))
    for task in islice(watched.stream(split, seed=3), 200):
        assert task.split is split
        assert task.domain == name
        assert split_of(drafts[-1].instance) is split
        assert drafts[-1].answer == task.answer


@pytest.mark.parametrize("name", DOMAINS)
def test_no_question_is_in_two_splits(name: str) -> None:
    """A question seen in training is never asked in router or test."""
    asked = {
        split: {task.question for task in islice(DOMAINS[name].stream(split, seed=4), 2000)}
        for split in Split
    }
    assert not asked[Split.TRAIN] & asked[Split.TEST]
    assert not asked[Split.TRAIN] & asked[Split.ROUTER]
    assert not asked[Split.ROUTER] & asked[Split.TEST]


@pytest.mark.parametrize("name", DOMAINS)
def test_streams_repeat_for_the_same_seed(name: str) -> None:
    """The same seed gives the same tasks and another seed gives others."""
    first, again, other = (
        list(islice(DOMAINS[name].stream(Split.TEST, seed=seed), 30)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", DOMAINS)
def test_distinct_questions(name: str) -> None:
    """A sample of distinct tasks has the size asked for and no question twice."""
    tasks = DOMAINS[name].distinct(Split.ROUTER, 300, seed=0)
    assert len({task.question for task in tasks}) == len(tasks) == 300


@pytest.mark.parametrize("name", DOMAINS)
def test_answers_are_short_and_normal(name: str) -> None:
    """An answer is not empty, is its own normal form and fits in a few tokens."""
    for task in islice(DOMAINS[name].stream(Split.TRAIN, seed=5), 500):
        assert task.answer
        assert len(task.answer) <= 24
        assert normalise(task.answer) == task.answer


def test_check_forgives_space_and_a_full_stop_only() -> None:
    """Surrounding space and one full stop are forgiven; case and wording are not."""
    assert check("95", " 95.\n")
    assert not check("95", "95..")
    assert not check("True", "true")
    assert not check("95", "It is 95")


def test_an_unknown_domain_is_refused_by_name() -> None:
    """The error names the domain asked for and those there are."""
    with pytest.raises(ValueError, match=r"'poetry'.*arithmetic"):
        domain("poetry")


def test_a_skill_without_held_out_instances_is_a_defect() -> None:
    """A domain says which skill has no instance in the split."""

    def only_train(rng: random.Random) -> Draft:
        return Draft(instance=None, question="?", answer=str(rng.random()))

    broken = Domain(name="d", skills=(Skill(name="s", weight=1, draw=only_train),))
    with pytest.raises(RuntimeError, match="d/s"):
        next(broken.stream(Split.TEST, seed=0))
