"""A/B experiments on routing policies: who sees which arm, and what the data allow one to say.

Pure decisions and statistics: this package knows no requests, no ledger and no clock.
"""
