from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.text import TextAssembler

stop_strings = st.lists(st.text("abé", min_size=1, max_size=4), max_size=3)


def assemble(content: bytes, stops: tuple[bytes, ...]) -> tuple[list[str], bool]:
    assembler, pieces = TextAssembler(stops), []
    for byte in content:
        text, stopped = assembler.push(byte)
        pieces.append(text)
        if stopped:
            return pieces, True
    return [*pieces, assembler.flush()], False


def cut(content: bytes, stops: tuple[bytes, ...]) -> tuple[str, bool]:
    """The plain twin: the content before the stop string that is complete first."""
    for end in range(1, len(content) + 1):
        found = [stop for stop in stops if content[:end].endswith(stop)]
        if found:
            return content[: end - max(map(len, found))].decode("utf-8", "replace"), True
    return content.decode("utf-8", "replace"), False


@given(st.text("abcé", max_size=30), stop_strings)
def test_released_text_is_the_text_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    encoded = tuple(stop.encode() for stop in stops)
    pieces, stopped = assemble(text.encode(), encoded)
    assert ("".join(pieces), stopped) == cut(text.encode(), encoded)


@given(st.binary(max_size=40))
def test_any_bytes_come_out_as_python_decodes_them(content: bytes) -> None:
    pieces, _ = assemble(content, ())
    assert "".join(pieces) == content.decode("utf-8", "replace")


def test_a_character_is_released_with_its_last_byte() -> None:
    pieces, _ = assemble("é€".encode(), ())
    assert pieces == ["", "é", "", "", "€", ""]


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    pieces, _ = assemble(b"xaab", (b"ab\n",))
    assert pieces == ["x", "", "a", "", "ab"]


@given(st.binary(max_size=10), st.binary(max_size=10))
def test_a_prefix_comes_first_and_joins_its_characters(prefix: bytes, content: bytes) -> None:
    assembler = TextAssembler((b"ab",), prefix)
    pieces = []
    for byte in content:
        text, stopped = assembler.push(byte)
        pieces.append(text)
        if stopped:
            break
    else:
        pieces.append(assembler.flush())
    end = content.find(b"ab")
    expected = prefix + (content if end < 0 else content[:end])
    assert "".join(pieces) == expected.decode("utf-8", "replace")
