"""Stages: run once, again when something that they read has changed, and on where they stopped."""

import json
from contextlib import suppress

import pytest

from models.downscale import stage as stages
from models.downscale.pipeline import (
    check_room,
    claimed,
    full_disk_named,
    needed_bytes,
    publish,
)
from models.downscale.recipe import QUICK_RECIPE, Recipe, read_recipe
from models.downscale.stage import Run, read_json, remembered, stage
from models.errors import OutputError

RAN = []


@stage("test-source")
def source(run, folder, name):
    """Reads the corpus of one domain and its file, if the recipe names one."""
    RAN.append(f"source/{name}")
    settings = run.recipe.domains[name]
    if not settings.corpus.startswith("tasks:"):
        run.read(folder.parents[2] / settings.corpus)
    (folder / "result").write_text(settings.corpus)


@remembered
def doubled(run, name):
    """A value in memory that two stages share."""
    return run.recipe.seed, (source(run, name) / "result").read_text()


@stage("test-one")
def one(run, folder, name):
    """Builds on a source, through memory."""
    RAN.append(f"one/{name}")
    (folder / "result").write_text(str(doubled(run, name)))


@stage("test-both")
def both(run, folder):
    """Builds on the memory of two sources and on a method of the recipe; reads no settings."""
    RAN.append("both")
    tokens = [run.recipe.adapt_of(name).tokens for name in run.domains]
    (folder / "result").write_text(str([tokens, *(doubled(run, name) for name in run.domains)]))


def recipe(**changes):
    """Two domains, one read from the file `a`."""
    content = {
        "name": "x",
        "base": {"checkpoint": "base"},
        "domains": {"a": {"corpus": "a"}, "b": {"corpus": "tasks:dates"}},
    }
    return Recipe.model_validate({**content, **changes})


@pytest.fixture
def bring(tmp_path):
    """Brings everything up to date for a recipe; returns the stages that ran."""
    (tmp_path / "a").write_text("first")

    def run_all(given=None):
        RAN.clear()
        run = Run(given or recipe(), tmp_path / "work", report=lambda line: None)
        for name in run.domains:
            one(run, name)
        both(run)
        return list(RAN)

    run_all()
    return run_all


EVERYTHING = ["one/a", "source/a", "one/b", "source/b", "both"]


def test_nothing_is_done_twice(bring):
    """The same recipe and files: every stage is skipped."""
    assert bring() == []


def test_each_kind_of_input_reruns_what_read_it(bring, tmp_path, monkeypatch):
    """A key, a key read by a method or from memory, a new entry of a table, a file's content and
    the code: the stages that read it run again, and those that build on them, and no others."""
    assert bring(recipe(select={"keep": 0.5})) == []  # nobody reads it
    assert bring(recipe(adapt_tokens={"a": 7})) == ["both"]
    assert bring(recipe(seed=5)) == ["one/a", "one/b", "both"]
    bring()
    (tmp_path / "a").write_text("second")
    assert bring() == ["source/a", "one/a", "both"]
    longer = {"corpus": "tasks:dates", "examples": 5}
    assert bring(recipe(domains={"a": {"corpus": "a"}, "b": longer})) == []  # reads `corpus` alone
    other = {"a": {"corpus": "a"}, "b": {"corpus": "tasks:lists"}}
    assert bring(recipe(domains=other)) == ["source/b", "one/b", "both"]
    assert bring(recipe(domains={**other, "c": longer})) == ["one/c", "source/c", "both"]
    monkeypatch.setattr(stages, "code_digest", lambda module: "other code")
    assert sorted(bring(recipe(domains=other))) == sorted(EVERYTHING)


def test_files_behind_links_count(bring, tmp_path):
    """A file of a folder that is linked into the one that was read has changed: so has that."""
    (tmp_path / "a").unlink()
    for name in ("a", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "b.txt").write_text("first")
    assert bring() == ["source/a", "one/a", "both"]
    assert bring() == []
    (tmp_path / "elsewhere" / "b.txt").write_text("second")
    assert bring() == ["source/a", "one/a", "both"]


def test_code_counts_without_its_comments(tmp_path, monkeypatch):
    """Comments and docstrings change no code; another number does, also in what is imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    bodies = {
        "lab.one": '"""One."""\n\n\ndef f():\n    """Doc."""\n    return 1  # why\n',
        "lab.two": "def f():\n    return 1\n",
        "lab.three": "def f():\n    return 3\n",
        "lab.four": "from lab.three import f\n",
        "lab.five": "from lab.two import f\n",
    }
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/__init__.py").write_text("")
    for name, body in bodies.items():
        (tmp_path / f"{name.replace('.', '/')}.py").write_text(body)
    ways = {name: stages.code_of(name) for name in bodies}
    assert ways["lab.one"]["lab.one"] == ways["lab.two"]["lab.two"]
    assert ways["lab.three"]["lab.three"] != ways["lab.two"]["lab.two"]
    assert "lab.three" in ways["lab.four"]
    assert len({stages.code_digest(name) for name in ("lab.two", "lab.three")}) == 2


def test_an_interrupted_stage_finds_what_it_left(tmp_path):
    """A stage that raised is not done; run again with the same inputs it finds its files, with
    others it finds an empty folder."""
    seen = []

    @stage("test-interrupted")
    def interrupted(run, folder):
        seen.append([run.recipe.seed, sorted(file.name for file in folder.iterdir())])
        if len(seen) != 2:
            (folder / "checkpoint").write_text("half")
            raise KeyboardInterrupt

    for seed in (1, 1, 2, 3):
        with suppress(KeyboardInterrupt):
            interrupted(Run(recipe(seed=seed), tmp_path, report=lambda line: None))
    fresh = ["started.json"]
    assert seen == [[1, fresh], [1, ["checkpoint", *fresh]], [2, fresh], [3, fresh]]


def test_the_manifest_names_what_was_read_and_the_time(tmp_path):
    """It holds keys with their values, files and stages with their hashes, and the time taken."""
    times = iter([10.0, 12.5])
    (tmp_path / "a").write_text("")
    run = Run(recipe(), tmp_path / "work", report=lambda _: None, clock=lambda: next(times))
    manifest = read_json(source(run, "a") / "manifest.json")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert manifest["read"]["recipe domains/a/corpus"] == json.dumps("a")
    assert manifest["read"][f"content {tmp_path / 'a'}"] == empty
    assert manifest["wall_clock_s"] == 2.5


def test_an_output_folder_in_use_is_refused(tmp_path):
    """A pool, an unfinished run, other files, a file in the way and a second run at the same time:
    each refusal says which, and resuming is possible where it makes sense."""
    out = tmp_path / "out"
    with claimed(out, resume=False):
        pass
    with (
        pytest.raises(OutputError, match="an unfinished run; pass --resume"),
        claimed(out, resume=False),
    ):
        pass
    with (
        claimed(out, resume=True),
        pytest.raises(OutputError, match="another run is at work"),
        claimed(out, resume=True),
    ):
        pass
    (out / "pool.yaml").write_text("")
    with pytest.raises(OutputError, match="a pool already"), claimed(out, resume=False):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"), claimed(tmp_path / "file", resume=True):
        pass


def test_publishing_replaces_an_earlier_pool(tmp_path):
    """Files and folders are put in place, old ones of the same name are gone, and the assembled
    pool stays for the next time."""
    out, assembled = tmp_path / "out", tmp_path / "out/.work/pool"
    (assembled / "base").mkdir(parents=True)
    for file in ("pool.yaml", "base/new", "manifest.json", "started.json"):
        (assembled / file).write_text("new")
    (out / "base").mkdir()
    for file in ("pool.yaml", "base/old", "notes"):
        (out / file).write_text("old")
    publish(assembled, out)
    publish(assembled, out)
    found = {str(f.relative_to(out)): f.read_text() for f in out.rglob("*") if f.is_file()}
    assert {k: v for k, v in found.items() if not k.startswith(".work")} == {
        "pool.yaml": "new", "base/new": "new", "notes": "old"
    }  # fmt: skip


def test_too_little_disk_is_found_before_work(tmp_path):
    """The message says how much is needed and how much there is; nothing was written."""
    recipe = read_recipe(QUICK_RECIPE)
    needed = needed_bytes(recipe, base_parameters=1_000_000_000, corpus_bytes=0)
    assert needed > 36e9
    with pytest.raises(OutputError, match=r"needs about [\d.]+ GiB of disk, 1\.0 GiB are free"):
        check_room(tmp_path / "out", needed, free=lambda _: 2**30)
    check_room(tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_is_said_in_one_line(tmp_path, error):
    """Python's error and safetensors' own both become one that says how to go on."""
    said = pytest.raises(OutputError, match=r"no space is left.*go on with --resume")
    with said, full_disk_named(tmp_path):
        raise error
    with pytest.raises(ValueError, match="another"), full_disk_named(tmp_path):
        raise ValueError("another")
