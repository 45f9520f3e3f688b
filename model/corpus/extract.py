"""Turns files into text: plain text (also compressed), HTML without navigation, strings of R data."""

from __future__ import annotations

import gzip
import re
import struct
import textwrap
import zlib
from collections.abc import Callable
from typing import Any

from model.corpus.errors import BuildError

WIDTH = 79

_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_LISTS = frozenset({"dd", "dl", "dt", "ol", "ul"})
_TABLES = frozenset({"caption", "table", "tbody", "tfoot", "thead", "tr"})
_SECTIONS = frozenset({"address", "article", "aside", "blockquote", "body", "center", "details", "div", "fieldset"})
_OTHERS = frozenset({"figcaption", "figure", "hr", "main", "p", "section", "summary"})
_BLOCKS = _HEADINGS | _LISTS | _TABLES | _SECTIONS | _OTHERS
_CONTROLS = frozenset({"button", "form", "input", "nav", "select"})
_SKIPPED = _CONTROLS | {"audio", "canvas", "footer", "head", "iframe", "noscript", "script", "style", "svg"}
_NAVIGATION = re.compile(
    r"^(nav|navbar|navheader|navfooter|navigation|side-?bar\w*|sphinxsidebar|leftnav|toc|toc_?container|related|"
    r"breadcrumbs?|footer|header|headerlink|anchor|mark|skip-?to\w*|search\w*|sub|menu\w*|nosearch|fancy_?toc|"
    r"fancy-toc\d|toctree-wrapper|srclink|src|test-arrow|out-of-band|collapse-toggle|picker\w*|pickers|column2|"
    r"(trait|synthetic|blanket|foreign)-implementations(-list)?|implementors(-list)?|changelog|api_metadata|"
    r"gtoc|clear|user-?links?|nav-\w+|mobile-\w+|theme-?\w*|hideme|since|rightside)$",
    re.IGNORECASE,
)


def extract(kind: str, path: str, content: bytes) -> list[tuple[str, bytes]]:
    """The documents of a file as (path, UTF-8 expected): one, but for R data, which may hold several.

    Raises:
        BuildError: the file is not of its kind.
    """
    extractors: dict[str, Callable[[bytes], list[bytes]]] = {
        "text": lambda raw: [_decompressed(raw)],
        "html": lambda raw: [html_text(_decompressed(raw)).encode()],
        "r-strings": r_strings,
    }
    try:
        documents = extractors[kind](content)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise BuildError(f"cannot read {path} as {kind}: {error}") from error
    if len(documents) == 1:
        return [(path, documents[0])]
    return [(f"{path}#{number}", document) for number, document in enumerate(documents)]


def _decompressed(raw: bytes) -> bytes:
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


def require_lxml() -> None:
    """Raise :class:`BuildError` with what to install if HTML cannot be read."""
    try:
        import lxml.html  # noqa: F401
    except ImportError as error:
        raise BuildError("reading HTML needs lxml: pip install 'rheostat[data]'") from error


def html_text(raw: bytes) -> str:
    """The readable text of a page: its main part, blocks separated by an empty line, prose wrapped, <pre> kept.

    Menus, tables of contents, search boxes, permanent links and footers are left out.
    """
    # Optional: only the build of a corpus reads HTML.
    from lxml import html

    parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    if not raw.strip():
        return ""
    page = html.document_fromstring(raw, parser=parser)
    main = page.xpath("//main | //*[@role='main'] | //*[@id='main'] | //*[@id='content']")
    text = _Text()
    text.add(main[0] if main else page)
    text.end_block()
    return "\n\n".join(text.blocks) + "\n" if text.blocks else ""


class _Text:
    """Collects the blocks of a page."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.words: list[str] = []
        self.indent = ""
        self.first_indent = ""

    def end_block(self) -> None:
        text = " ".join("".join(self.words).split())
        self.words.clear()
        if text:
            self._append(
                textwrap.fill(
                    text,
                    WIDTH,
                    initial_indent=self.first_indent,
                    subsequent_indent=self.indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )

    def add(self, element: Any) -> None:
        tag = element.tag if isinstance(element.tag, str) else ""
        if tag and tag not in _SKIPPED and not _is_navigation(element):
            if tag == "pre":
                self.end_block()
                code = element.text_content().strip("\n").rstrip()
                if code.strip():
                    self._append(code)
            elif tag == "li":
                self._add_item(element)
            elif tag in _BLOCKS:
                self.end_block()
                self._add_content(element)
                self.end_block()
            elif tag == "br":
                self.words.append(" ")
            else:
                self._add_content(element)
                if tag in ("td", "th"):
                    self.words.append("  ")

    def _append(self, block: str) -> None:
        self.blocks.append(block)
        self.first_indent = self.indent

    def _add_item(self, element: Any) -> None:
        self.end_block()
        outer = self.indent
        self.first_indent, self.indent = f"{outer}- ", f"{outer}  "
        self._add_content(element)
        self.end_block()
        self.first_indent = self.indent = outer

    def _add_content(self, element: Any) -> None:
        self.words.append(element.text or "")
        for child in element:
            self.add(child)
            self.words.append(child.tail or "")


def _is_navigation(element: Any) -> bool:
    names = f"{element.get('class') or ''} {element.get('id') or ''} {element.get('role') or ''}".split()
    return any(_NAVIGATION.match(name) for name in names)


def r_strings(raw: bytes) -> list[bytes]:
    """The character vectors of a lazy-load database of R (``.rdb``), each as one text with an item per line.

    Such a file is a run of records: a 32-bit big-endian length and that many bytes compressed with zlib, which hold an
    object serialised in XDR (R Internals, section 1.8). Other objects are passed over.
    """
    texts = []
    while raw:
        unpack = zlib.decompressobj()
        record = unpack.decompress(raw[4:])
        if not unpack.eof:
            raise EOFError("a record is cut short")
        raw = unpack.unused_data
        lines = _character_vector(record)
        if lines:
            texts.append(b"\n".join(lines) + b"\n")
    return texts


_CHARACTER_VECTOR, _STRING = 16, 9


def _character_vector(record: bytes) -> list[bytes]:
    if record[:2] != b"X\n":
        return []
    position = 14
    if struct.unpack_from(">i", record, 2)[0] >= 3:  # version 3 names the encoding
        position += 4 + int(struct.unpack_from(">i", record, position)[0])
    flags, count = struct.unpack_from(">ii", record, position)
    position += 8
    if flags & 0xFF != _CHARACTER_VECTOR:
        return []
    lines = []
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", record, position)
        if flags & 0xFF != _STRING:
            raise EOFError("a character vector holds something else")
        position += 8
        lines.append(record[position : position + max(length, 0)])  # -1 stands for a missing string
        position += max(length, 0)
    return lines
