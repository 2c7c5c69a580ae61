"""Computes: the pool of models, the engines that run them, and how they are trained."""
