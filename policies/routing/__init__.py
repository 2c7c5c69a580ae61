"""Routers that learn which model answers which query best.

`targets` and `heads` distil outcomes into per-model predictions, `calibration` makes them
probabilities, `choice` weighs quality against cost, `familiarity` knows the limits of the training
data; `learned` and `clusters` are the policies, `fit` trains them, `file` stores them.
"""
