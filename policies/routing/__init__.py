"""Routers that learn which model answers which query best.

`targets`, `heads` and `differences` distil outcomes into per-model predictions, `landmarks` let
them bend, `calibration` makes them probabilities, `choice` weighs quality against cost, `topics`
and `bags` know the limits of the training data; `router` predicts (`nearness` for one query),
`learned` and `clusters` are the policies, `fit` and `finetune` train them, `file` stores them.
"""
