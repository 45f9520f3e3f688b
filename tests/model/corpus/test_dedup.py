import pytest

from model.corpus.dedup import Deduplicator, SeenSet
from model.corpus.recipe import Domain


def words(start, count=12):
    return b" ".join(b"word%d" % number for number in range(start, start + count))


def lines(start, count=20):
    return (
        b"\n".join(b"    the value of what is in the line number %d" % number for number in range(start, start + count))
        + b"\n"
    )


@pytest.mark.parametrize("repeats", ["documents", "paragraphs", "lines"])
def test_an_equal_document_is_dropped(repeats):
    seen = Deduplicator(Domain(repeats=repeats))
    text = lines(0)
    assert seen.reduce(text) == (text, None)
    assert seen.reduce(text) == (text, "equal_document")


def test_documents_may_share_paragraphs_and_lines_where_only_equal_ones_are_dropped():
    seen = Deduplicator(Domain())
    assert seen.reduce(lines(0)) == (lines(0), None)
    assert seen.reduce(lines(0) + lines(50, 1)) == (lines(0) + lines(50, 1), None)


def test_repeated_paragraphs_are_taken_out_and_short_ones_are_not():
    seen = Deduplicator(Domain(repeats="paragraphs", min_bytes=50))
    first = words(0) + b"\n\nNote\n\n" + words(100) + b"\n"
    assert seen.reduce(first) == (first, None)
    # The second paragraph repeats with other line ends; the heading repeats too, but is short.
    second = words(200) + b"\n\nNote\n\n" + words(100).replace(b" ", b"\n") + b"\n\n" + words(300) + b"\n"
    assert seen.reduce(second) == (words(200) + b"\n\nNote\n\n" + words(300) + b"\n", None)


def test_a_paragraph_that_repeats_within_a_document_is_taken_out():
    seen = Deduplicator(Domain(repeats="paragraphs", min_bytes=50))
    text = words(0) + b"\n\n" + words(50) + b"\n\n" + words(0) + b"\n"
    assert seen.reduce(text) == (words(0) + b"\n\n" + words(50) + b"\n", None)


def test_a_document_of_repeated_paragraphs_is_dropped_and_leaves_no_trace():
    seen = Deduplicator(Domain(repeats="paragraphs", min_bytes=150))
    seen.reduce(words(0, 40) + b"\n")
    new = words(100)
    assert seen.reduce(words(0, 40) + b"\n\n" + new + b"\n")[1] == "repeated_paragraphs"
    kept = new + b"\n\n" + words(200, 40) + b"\n"
    assert seen.reduce(kept) == (kept, None)


@pytest.mark.parametrize(("repeated", "reason"), [(8, None), (9, "mostly_seen")])
def test_code_is_dropped_when_more_than_two_fifths_of_it_was_seen(repeated, reason):
    seen = Deduplicator(Domain(repeats="lines"))
    seen.reduce(lines(10_000))
    text = lines(10_000, repeated) + lines(20_000, 20 - repeated)
    assert seen.reduce(text) == (text, reason)


def test_code_that_is_dropped_leaves_no_trace():
    seen = Deduplicator(Domain(repeats="lines"))
    seen.reduce(lines(10_000))
    assert seen.reduce(lines(10_000, 15) + lines(20_000, 5))[1] == "mostly_seen"
    assert seen.reduce(lines(20_000, 20))[1] is None


def test_short_lines_are_not_compared():
    seen = Deduplicator(Domain(repeats="lines"))
    text = b"return None\n" * 40
    seen.reduce(text)
    assert seen.reduce(text + b"pass\n")[1] is None


HEADER = b"".join(b"# Licence, line %d: all that is granted and all that is not.\n" % number for number in range(6))


@pytest.mark.parametrize("prefix", [b"", b"#!/usr/bin/python\n# -*- coding: utf-8 -*-\n\n"])
def test_a_repeated_licence_header_is_taken_out(prefix):
    seen = Deduplicator(Domain(repeats="lines"))
    first = prefix + HEADER + b"\n" + lines(0)
    assert seen.reduce(first) == (first, None)
    assert seen.reduce(prefix + HEADER + b"\n" + lines(1000)) == (prefix + lines(1000), None)


def test_a_short_comment_at_the_head_may_repeat():
    seen = Deduplicator(Domain(repeats="lines"))
    for start in (0, 1000):
        text = b"# A comment.\n" + lines(start)
        assert seen.reduce(text) == (text, None)


def test_nothing_but_a_repeated_header_is_dropped():
    seen = Deduplicator(Domain(repeats="lines"))
    seen.reduce(HEADER + lines(0))
    assert seen.reduce(HEADER + b"x = 1\n") == (b"x = 1\n", "repeated_header")


def test_a_set_of_fixed_size_forgets_nothing_and_mistakes_little():
    seen = SeenSet()
    for number in range(20_000):
        seen.add(b"in %d" % number)
    assert all(b"in %d" % number in seen for number in range(20_000))
    assert not any(b"out %d" % number in seen for number in range(20_000))
    assert len(seen.bits) == 64 << 20
