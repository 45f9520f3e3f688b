"""Which texts are evaluated, and which thresholds are fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from model.evaluation.experiment import Domain
from model.evaluation.passages import Calibration, find_spaces
from model.tokenizer import Tokenizer
from model.training.data import read_documents

CALIBRATION = (16, 2048)
"""Texts, and tokens of each, that thresholds are fitted to: as many as training takes."""


def read_domains(sources: Iterable[tuple[str, Path]], max_bytes: int | None, most: int | None) -> list[Domain]:
    """The domains of files, by name: at most ``max_bytes`` of each, and of a document at most the first ``most``.

    Raises:
        CorpusError: a file cannot be read. ValueError: two domains have the same name.
    """
    domains: dict[str, Domain] = {}
    for name, path in sources:
        if name in domains:
            raise ValueError(f"two domains are called {name!r}: name them, as in other={path}")
        documents = [first_bytes(document, most) for document in read_documents(path)]
        domains[name] = Domain(name, spread(documents, max_bytes))
    return list(domains.values())


def spread(documents: list[bytes], max_bytes: int | None) -> list[bytes]:
    """Whole documents, evenly spread over the list: as many as ``max_bytes`` hold, at least one (None: every one)."""
    count = len(documents)
    sizes = np.array([len(document) for document in documents])
    if max_bytes is None or sizes.sum() <= max_bytes:
        return documents
    chosen = [0]
    for number in range(2, count):
        indices = np.arange(number) * count // number
        if sizes[indices].sum() <= max_bytes:
            chosen = indices.tolist()
    return [documents[index] for index in chosen]


def first_bytes(document: bytes, most: int | None) -> bytes:
    """At most the first ``most`` bytes of a document (None: all), and no part of a character."""
    if most is None or len(document) <= most:
        return document
    while most and document[most] & 0xC0 == 0x80:
        most -= 1
    return document[:most]


def read_calibration(
    paths: Sequence[Path], domains: Sequence[Domain], most: int | None, tokenizer: Tokenizer
) -> Calibration | None:
    """Texts [16, 2048], each from the start of a document on, spread over files; None without files.

    Documents whose first ``most`` bytes are evaluated are left out.

    Raises:
        CorpusError: a file cannot be read. ValueError: a file has too little beside them.
    """
    if not paths:
        return None
    evaluated = {document for domain in domains for document in domain.documents}
    count, length = CALIBRATION
    texts = []
    for number, path in enumerate(paths):
        documents = [document for document in read_documents(path) if first_bytes(document, most) not in evaluated]
        wanted = count * (number + 1) // len(paths) - count * number // len(paths)
        size = sum(map(len, documents))
        if size < wanted * length:
            raise ValueError(f"{path} holds {size} bytes beside what is evaluated, and {wanted * length} are needed")
        firsts = [index * len(documents) // wanted for index in range(wanted)]
        texts += [_text([*documents[first:], *documents[:first]], length, tokenizer) for first in firsts]
    return Calibration(torch.tensor(texts), np.stack([find_spaces(tokenizer, text) for text in texts]))


def _text(documents: Sequence[bytes], length: int, tokenizer: Tokenizer) -> list[int]:
    """The first ``length`` tokens of documents, each after the tokenizer's start, begun again where they end."""
    tokens: list[int] = []
    for document in cycle(documents):
        tokens += [tokenizer.start, *tokenizer.tokens_of_bytes(document)]
        if len(tokens) >= length:
            break
    return tokens[:length]
