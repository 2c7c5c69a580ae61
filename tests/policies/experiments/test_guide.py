"""The guide's configuration is one that the server takes, and it names every metric."""

from __future__ import annotations

from pathlib import Path

import yaml

from policies.experiments.metrics import METRICS
from policies.experiments.read import read_experiments
from policies.experiments.shadow import read_shadows

GUIDE = (Path(__file__).parents[3] / "docs/experiments/README.md").read_text()


def test_the_guides_configuration_is_read() -> None:
    """Copied as it stands, the example makes an experiment and a shadow."""
    example = yaml.safe_load(GUIDE.split("```yaml")[1].split("```")[0])
    [experiment] = read_experiments(example["experiments"], policies=example["policies"])
    [shadow] = read_shadows(example["shadows"], policies=["base"])
    assert experiment.control_arm.name == "cascade"
    assert experiment.stop_s == 1_798_070_400
    assert shadow.usd_per_day == 1.0


def test_the_guide_names_every_metric() -> None:
    """A metric that the code has and the table lacks, or the other way round, fails here."""
    table = GUIDE.split("|---|---|---|\n")[1].split("\n\n")[0]
    named = {
        name.strip(" `") for line in table.splitlines() for name in line.split("|")[1].split(",")
    }
    assert named == set(METRICS)
