"""Cascades (FrugalGPT, Chen et al. 2023): which chains pay, and when an answer is good enough.

`base` is the contract of a scorer, `scorer` the learned P(correct | query, answer) in NumPy,
`transformer` another, `learned` the file that `policies.frugal` serves. What makes it: `answers`
the table of real answers, `fit` the scorer's training, `frontier` the exact threshold search,
`learn` from one to the other, and what it is worth.
"""
