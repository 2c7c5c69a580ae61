"""A/B experiments on routing policies: who sees which arm, and what the data allow one to say.

`experiment` says what one is, `read` reads and places them, `assignment` draws arms, `shadow` asks
another policy beside; `effects` sums and compares, `sequences` hold at every look, `analysis` makes
the `report`, `replay` asks what another policy would have earned. Pure decisions and statistics:
this package knows no requests, no ledger and no clock.
"""
