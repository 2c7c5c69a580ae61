"""Runs plans: any nesting of `Answer`, `Cascade` and `Best`, on engine clients."""
