"""Graders: how good each model's answer to a question is, in [0, 1].

`base` the contract, and graders by name; `texts` and `numbers` compare with a reference; `programs`
runs code and commands; `networks` asks an encoder or a reward model; `judge` a language model.
"""
