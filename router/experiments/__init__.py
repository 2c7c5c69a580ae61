"""Experiments in the server: who gets which arm, feedback, reports, guardrails and shadows.

The decisions and the statistics are `policies.experiments`; here they meet requests and ledger.
"""
