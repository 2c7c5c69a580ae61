"""Routers that learn which model answers which query best.

`heads` predicts every model's score, `nearness` lets it bend and knows what training knew, `looks`
correct it by what a model makes of the prompt, `router` is all of them with an encoder, and its
file; `policy` weighs predicted quality against price, `probing` looks first where that may change
the choice; `fit` and `finetune` train.
"""
