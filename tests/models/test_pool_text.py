"""Policies written into pool files that people wrote."""

from pathlib import Path

import pytest
import yaml

from models.errors import PoolError
from models.pool_text import write_policies

POOL = """\
# ours
name: mine
policies:
  auto: {kind: fixed, plan: large}  # whoever asks
  # the cheap one
  cascade:
    kind: frugal
    # learned in May
    path: old.npz  # beside this file
    top:
    - large
    - small

    # what it does not know
    outside: auto

  best: {kind: fixed, plan: small}
# the end
"""


def test_what_stays_the_same_stays_to_the_letter(tmp_path: Path) -> None:
    """Only settings that differ change, new ones and new policies come first."""
    file = tmp_path / "pool.yaml"
    file.write_text(POOL)
    changed = {"kind": "frugal", "path": "new.npz", "top": ["small"], "stay_margin": 0.1}
    write_policies(file, {"cascade": changed, "new": {"kind": "fixed", "plan": "tiny"}})
    assert file.read_text() == (
        POOL.replace("old.npz", "new.npz")
        .replace("    - large\n    - small\n", "    - small\n")
        .replace("  auto:", "  new:\n    kind: fixed\n    plan: tiny\n  auto:")
        .replace("    kind: frugal\n", "    stay_margin: 0.1\n    kind: frugal\n")
    )
    before = file.read_text()
    write_policies(file, {"cascade": changed})
    assert file.read_text() == before


@pytest.mark.parametrize("text", ["name: mine\n", "name: mine\npolicies: {}\nengines: []\n"])
def test_a_pool_without_policies_gets_them(tmp_path: Path, text: str) -> None:
    """Also where it has an empty list of them."""
    file = tmp_path / "pool.yaml"
    file.write_text(text)
    write_policies(file, {"new": {"kind": "fixed"}})
    wanted = {**yaml.safe_load(text), "policies": {"new": {"kind": "fixed"}}}
    assert yaml.safe_load(file.read_text()) == wanted


def test_a_file_of_another_layout_is_left_alone(tmp_path: Path) -> None:
    """The message says what it should have."""
    file = tmp_path / "pool.yaml"
    file.write_text('{"name": "mine", "policies": {"auto": {"kind": "fixed"}}}')
    before = file.read_text()
    with pytest.raises(PoolError, match=r"cannot be written into it[^$]*new:"):
        write_policies(file, {"new": {"kind": "fixed"}})
    assert file.read_text() == before
