"""Outcomes from logs and data sets of others; `load` reads whatever a user points at."""
