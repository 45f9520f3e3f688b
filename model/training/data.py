"""Training text: a folder of files, one per domain, held in memory as bytes.

A folder holds ``<domain>.<split>.txt`` or ``.txt.xz`` files; documents are UTF-8 and end in a NUL byte.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.tokenizer import DOCUMENT

SEPARATOR = 0


class CorpusError(ValueError):
    """The training text is missing or unusable."""


def read_bytes(path: Path) -> bytes:
    """The content of a text file, decompressed if its name ends in ``.xz``."""
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def read_documents(path: Path) -> list[bytes]:
    """The NUL-separated documents of a file, empty ones dropped.

    Raises:
        CorpusError: the file is missing, not readable, or holds no document.
    """
    try:
        content = read_bytes(path)
    except (OSError, lzma.LZMAError) as error:
        raise CorpusError(f"cannot read documents from {path}: {error}") from error
    documents = [document for document in content.split(b"\0") if document]
    if not documents:
        raise CorpusError(f"{path} holds no documents")
    return documents


@dataclass(frozen=True, slots=True)
class Domain:
    """One kind of text."""

    name: str
    text: NDArray[np.uint8]
    """Documents, each followed by ``SEPARATOR``."""
    starts: NDArray[np.int64]
    """Where each document begins in ``text``."""


class Corpus:
    """Random access to the training text of several domains.

    Batches are a pure function of (seed, step), so that a resumed run reads what it would have read, and runs with the
    same seed read the same bytes.
    """

    def __init__(self, domains: list[Domain], weights: Mapping[str, float] | None = None) -> None:
        self.domains = domains
        chosen = weights or self.sizes
        if set(chosen) != set(self.sizes):
            names, held = (", ".join(sorted(one)) for one in (chosen, self.sizes))
            raise CorpusError(f"weights name {names}; the corpus has {held}: give weights of these, or by size")
        share = np.array([chosen[domain.name] for domain in domains])
        if not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
            raise CorpusError(f"weights must be finite, not negative, not all zero: {chosen}")
        self.share = share / share.sum()

    @classmethod
    def open(cls, folder: Path, split: str, weights: Mapping[str, float] | None = None) -> Corpus:
        """Read every ``<domain>.<split>.txt[.xz]`` of a folder; domains weigh as their sizes if there are no weights.

        Raises:
            CorpusError: there is none, or one is unreadable.
        """
        paths = sorted(folder.glob(f"*.{split}.txt")) + sorted(folder.glob(f"*.{split}.txt.xz"))
        if not paths:
            raise CorpusError(f"{folder} holds no <domain>.{split}.txt or <domain>.{split}.txt.xz")
        domains = []
        for path in paths:
            documents = read_documents(path)
            text = np.frombuffer(b"\0".join(documents) + b"\0", dtype=np.uint8)
            lengths = np.array([len(document) + 1 for document in documents], dtype=np.int64)
            domains.append(Domain(path.name.split(".")[0], text, np.concatenate([[0], lengths.cumsum()[:-1]])))
        return cls(domains, weights)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of text by domain."""
        return {domain.name: len(domain.text) for domain in self.domains}

    def batch(self, seed: int, step: int, sequences: int, length: int) -> Tensor:
        """Tokens [sequences, length + 1], int64: half begin at a document, half anywhere."""
        random = np.random.default_rng([seed, step])
        rows = []
        for _ in range(sequences):
            domain = self.domains[random.choice(len(self.domains), p=self.share)]
            position = int(random.integers(len(domain.text)))
            if random.random() < 0.5:
                position = int(domain.starts[np.searchsorted(domain.starts, position, side="right") - 1])
            rows.append(_window(domain.text, position - 1, length + 1))
        return torch.from_numpy(np.stack(rows))


def _window(text: NDArray[np.uint8], start: int, length: int) -> NDArray[np.int64]:
    """``length`` tokens from ``start`` (-1 is the separator before the first document), wrapping at the end."""
    window = np.take(text, np.arange(start, start + length), mode="wrap").astype(np.int64)
    window[window == SEPARATOR] = DOCUMENT
    return window
