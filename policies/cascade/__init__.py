"""Cascades (FrugalGPT, Chen et al. 2023): which chains pay, and when an answer is good enough.

`base` is the contract of a scorer, `signals` what a scorer looks at, `scorer` the learned
P(correct | query, answer) in NumPy, `fit` its training with scikit-learn, `chains` the exact
threshold search, `frontier` the cost-quality frontier, `learn` the way from outcomes to a file
that `policies.frugal` serves.
"""
