"""Metrics for Prometheus: the same numbers whichever replica answers.

`families` lists every metric. Counters and histograms come from the ledger: the transaction that
writes a request's row also adds what `counting` finds in it to shared sums, so they are exact for
any number of replicas, survive restarts and pruning, and count nothing twice. Gauges are read when
somebody scrapes or published by every replica (`gauges`), or worked out now and then by one replica
for all (`reports`). `page` puts them together and writes Prometheus' format.
"""
