"""Stages: run once, again when an input changes, and on from where they were interrupted."""

import json

import pytest

from models.downscale.disk import check_room, needed_bytes
from models.downscale.errors import OutputError
from models.downscale.recipe import QUICK_RECIPE, read_recipe
from models.downscale.stage import Stages, claimed, publish


class Log:
    """Runs two stages, one upon the other, and notes which did any work."""

    def __init__(self, work):
        self.work, self.ran = work, []

    def run(self, first=1, second=1, files=()):
        """Run both with these settings; returns the names of those that did not skip."""
        stages, self.ran = Stages(self.work, report=lambda line: None), []
        stages.run("a", self._action("a"), settings={"x": first}, files=files)
        stages.run("b/c", self._action("b/c"), settings={"x": second}, upstream=["a"])
        return self.ran

    def _action(self, name):
        def action(folder):
            self.ran.append(name)
            (folder / "result").write_text(name)

        return action


def test_a_changed_input_reruns_what_depends_on_it(tmp_path):
    """Unchanged stages are skipped; a setting or a file changes its stage and those after it."""
    log, file = Log(tmp_path), tmp_path / "input"
    file.write_text("one")
    assert log.run(files=[file]) == ["a", "b/c"]
    assert log.run(files=[file]) == []
    assert log.run(second=2, files=[file]) == ["b/c"]
    file.write_text("two")
    assert log.run(second=2, files=[file]) == ["a", "b/c"]
    assert log.run(first=2, second=2, files=[file]) == ["a", "b/c"]
    assert (tmp_path / "b/c/result").read_text() == "b/c"


def test_an_interrupted_stage_finds_what_it_left(tmp_path):
    """A stage that raised is not done; run again with the same inputs it finds its files, with
    others it finds an empty folder."""
    stages = Stages(tmp_path, report=lambda line: None)

    def interrupted(folder):
        (folder / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    seen = []

    def look(folder):
        seen.append(sorted(file.name for file in folder.iterdir()))

    for name, settings in (("same", {"x": 1}), ("other", {"x": 2})):
        with pytest.raises(KeyboardInterrupt):
            stages.run(name, interrupted, settings={"x": 1})
        stages.run(name, look, settings=settings)
    assert seen == [["checkpoint", "started.json"], ["started.json"]]


def test_the_manifest_names_inputs_and_time(tmp_path):
    """It holds settings, files with their hashes, upstream stages and the time taken."""
    times = iter([10.0, 12.5])
    stages = Stages(tmp_path, report=lambda line: None, clock=lambda: next(times))
    (tmp_path / "input").write_text("")
    stages.run("a", lambda _: None, settings={"x": 1}, files=[tmp_path / "input"])
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert manifest["inputs"] == {
        "settings": {"x": 1}, "files": {str(tmp_path / "input"): empty}, "upstream": {}
    }  # fmt: skip
    assert manifest["wall_clock_s"] == stages.wall_clock_s("a") == 2.5


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
