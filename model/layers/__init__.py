"""Layers: the Mamba-2 block and its parts."""
