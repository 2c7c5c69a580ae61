"""Decides: plans, routing policies, laws and budgets. Knows nothing of serving or tensors."""
