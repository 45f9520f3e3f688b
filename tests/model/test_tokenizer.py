from __future__ import annotations

import pytest

from model.tokenizer import DOCUMENT, ByteTokenizer


@pytest.mark.parametrize("text", ["", "abc", "é€🙂", "\0"])
def test_text_comes_back(text: str) -> None:
    tokens = ByteTokenizer().encode(text)
    assert tokens[0] == DOCUMENT
    assert bytes(tokens[1:]) == text.encode()
    assert ByteTokenizer().decode(tokens) == text


def test_invalid_utf8_is_shown_and_a_lone_surrogate_refused() -> None:
    assert ByteTokenizer().decode([0xFF, 0x61]) == "\ufffda"
    with pytest.raises(UnicodeEncodeError):
        ByteTokenizer().encode("\ud800")
