"""Energy measured at the engines and attributed to requests."""
