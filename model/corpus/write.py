"""Writes documents and their index, compressed, one file per domain and split."""

from __future__ import annotations

import hashlib
import lzma
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Self

END = b"\0"
"""Follows every document."""
PRESET = 6


class SplitWriter:
    """``<domain>.<split>.txt.xz`` and ``<domain>.<split>.index.tsv.xz`` (path, byte offset, byte length)."""

    def __init__(self, folder: Path, name: str) -> None:
        self._files = ExitStack()
        self._text = self._open(folder / f"{name}.txt.xz")
        self._index = self._open(folder / f"{name}.index.tsv.xz")
        self._hash = hashlib.sha256()
        self.documents = 0
        self.size = 0

    def _open(self, path: Path) -> IO[bytes]:
        return self._files.enter_context(lzma.open(path, "wb", preset=PRESET))

    def add(self, path: str, text: bytes) -> None:
        """Append a document, which holds no NUL byte."""
        assert END not in text
        self._index.write(f"{path}\t{self.size}\t{len(text)}\n".encode())
        for piece in (text, END):
            self._text.write(piece)
            self._hash.update(piece)
        self.documents += 1
        self.size += len(text) + 1

    def figures(self) -> dict[str, int | str]:
        """Documents, bytes (with their ends) and SHA-256 of the text."""
        return {"documents": self.documents, "bytes": self.size, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        """Finish both files."""
        self._files.close()


class CorpusWriter:
    """Opens a :class:`SplitWriter` for each domain and split that gets a document."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.splits: dict[str, SplitWriter] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.splits.values():
            writer.close()

    def add(self, domain: str, split: str, path: str, text: bytes) -> None:
        """Append a document to a split of a domain."""
        name = f"{domain}.{split}"
        if name not in self.splits:
            self.splits[name] = SplitWriter(self.folder, name)
        self.splits[name].add(path, text)

    def figures(self) -> dict[str, dict[str, int | str]]:
        """Those of every split, by ``<domain>.<split>``."""
        return {name: writer.figures() for name, writer in sorted(self.splits.items())}
