"""Replays a day of traffic over real outcomes, to see whether a budget controller earns its keep.

`traffic` when requests come, `scene` what is known and what is true of them, `offline` the optimum
that sees the whole day, `strategies` who decides, `replay` runs and compares, `plot` draws.
"""

from policies.budget.replay.replay import Replayed, replay_day
from policies.budget.replay.scene import Day, Scene
from policies.budget.replay.traffic import simulate_arrivals

__all__ = ["Day", "Replayed", "Scene", "replay_day", "simulate_arrivals"]
