"""Continuous batching of sequences with different compute budgets."""
