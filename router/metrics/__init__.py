"""Metrics for Prometheus: the same numbers whichever replica answers.

`families` lists every metric. Counters and histograms come from the ledger: the transaction that
writes a request's row also adds what `derive` finds in it to shared sums (`store`), so they are
exact for any number of replicas, survive restarts and pruning, and count nothing twice. Gauges are
read when somebody scrapes (`engines`, `budgets`), published by every replica (`live`), or worked
out now and then by one replica for all (`reports`). `metrics` puts them together; `exposition`
writes Prometheus' format.
"""
