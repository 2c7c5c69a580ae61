"""Hard caps: budgets per key and per server that hold however many replicas serve.

`amounts` counts, `limits` names caps and their windows, `book` is the arithmetic (pure, no clock,
no database), `store` keeps it in the ledger's database, `budgets` is what the ingress calls.
"""
