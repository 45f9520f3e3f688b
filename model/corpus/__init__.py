"""Builds the training and evaluation text from pinned packages: fetch, extract, clean, deduplicate, split."""
