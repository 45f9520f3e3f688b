"""What goes wrong while a corpus is built."""

from __future__ import annotations


class BuildError(ValueError):
    """The corpus cannot be built as asked; the message says why and what to do."""
