"""Which split a document belongs to: a function of its path, so that it never moves between versions."""

from __future__ import annotations

import hashlib

TRAIN, VALID, TEST, UNSEEN = "train", "valid", "test", "unseen_projects"


def split_of(path: str) -> str:
    """Split of a document, from the first four bytes of the SHA-256 of its path: 2 % test, 2 % validation."""
    number = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4]) % 1000
    return TEST if number < 20 else VALID if number < 40 else TRAIN


def is_unseen(project: str) -> bool:
    """Whether a whole project is set apart, from the first byte of the SHA-256 of its name: about a tenth are."""
    return hashlib.sha256(project.encode()).digest()[0] < 26


def rank(path: str) -> bytes:
    """An order of documents that has nothing to do with what is in them."""
    return hashlib.sha256(b"rank:" + path.encode()).digest()
