"""What a query looks like to a router: sparse features for its heads, a place among clusters.

`base` the contract, `ngrams` the default (n-grams that `hashing` finds, NumPy only), `neural` and
`finetuned` transformer encoders by path, `registry` encoders by kind; `tables` what is read fast.
"""
