"""Routers that learn which model answers which query best.

`heads` predicts every model's score, `nearness` lets it bend and knows what training knew, `router`
is both with an encoder, and its file; `policy` weighs predicted quality against price; `fit` and
`finetune` train.
"""
