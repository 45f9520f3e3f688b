"""Reference points: what compressors make of the same bytes."""

from __future__ import annotations

import lzma
from collections.abc import Sequence

XZ = "xz -9"


def compressed_bits(documents: Sequence[bytes]) -> dict[str, float | None]:
    """Bits per byte of one stream over all documents by ``xz -9`` and ``zstd -19``; None where zstandard is missing."""
    text = b"".join(documents)
    streams = {XZ: lzma.compress(text, preset=9), "zstd -19": _zstd(text)}
    return {name: None if stream is None else 8.0 * len(stream) / len(text) for name, stream in streams.items()}


def _zstd(text: bytes) -> bytes | None:
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard.ZstdCompressor(level=19).compress(text)
