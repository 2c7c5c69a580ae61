"""What a query looks like to a router: sparse features for its heads, a place among clusters.

`base` the contract and encoders by kind, `ngrams` the default (NumPy only), `transformer` encoders
by path.
"""
