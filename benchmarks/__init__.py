"""Measurements: one command each, JSON out."""
