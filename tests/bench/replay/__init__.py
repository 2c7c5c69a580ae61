"""Replays a day of traffic over real outcomes, to see whether a budget controller earns its keep.

`days` says who asks when and what is true of it, `strategies` who decides, `replay` plays, compares
with the optimum that sees the whole day, and draws.
"""
