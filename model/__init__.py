"""Rheostat's model: an adaptive Mamba-2 language model over bytes."""
