"""What can go wrong with the ledger.

ValueError
└── LedgerError   a database address, export target or file that cannot be used
"""


class LedgerError(ValueError):
    """A ledger that cannot be used as asked; the message names what, and what is allowed."""
