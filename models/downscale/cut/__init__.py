"""Which parts of the base a domain uses, and a chunk cut out of the base."""
