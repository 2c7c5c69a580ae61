"""The ledger: one durable row per request, and what is derived from the rows.

`database` opens and migrates, `writer` records off the request path, `queries` sums, `feedback`
and `outcomes` join what users thought of an answer, `export` and `report` hand the rows on.
"""
