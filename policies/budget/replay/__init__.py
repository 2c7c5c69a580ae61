"""Replays a day of traffic over real outcomes, to see whether a budget controller earns its keep.

`days` says who asks when and what is true of it, `strategies` who decides, `replay` plays, compares
with the optimum that sees the whole day, and draws.
"""

from policies.budget.replay.days import Day, Workload, simulate_arrivals
from policies.budget.replay.replay import ReplayedDay, replay_day, replay_scenarios

__all__ = ["Day", "ReplayedDay", "Workload", "replay_day", "replay_scenarios", "simulate_arrivals"]
