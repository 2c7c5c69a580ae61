"""From one checkpoint and a corpus per domain to a pool of chunks that can be served."""
