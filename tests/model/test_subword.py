from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers.decoders import WordPiece
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from model.checkpoint import CheckpointError, load_checkpoint, load_tokenizer, read_config, save_checkpoint
from model.convert import convert, round_checkpoint
from model.subword import SubwordError, SubwordTokenizer
from model.tokenizer import ByteTokenizer
from service.cli import main
from tests.model.subwords import END, VOCAB_SIZE, subwords, train_library, write_subword_source
from tests.model.test_convert import write_source

LIBRARY = train_library()
TOKENIZER = subwords(train_library())


@given(st.text(max_size=60))
def test_any_text_comes_back_whole_as_the_library_decodes_it(text: str) -> None:
    tokens = TOKENIZER.tokens(text)
    assert tokens == LIBRARY.encode(text).ids
    assert TOKENIZER.join(tokens) == text.replace(END, "").encode()
    assert TOKENIZER.decode(tokens) == LIBRARY.decode(tokens)


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=30))
def test_any_ids_decode_as_the_library_decodes_them(tokens: list[int]) -> None:
    assert TOKENIZER.decode(tokens) == LIBRARY.decode(tokens)


def test_characters_are_split_into_exact_bytes() -> None:
    tokens = TOKENIZER.tokens("🎉")
    assert len(tokens) > 1
    assert [TOKENIZER.token_bytes(token) for token in tokens] == [bytes([byte]) for byte in "🎉".encode()]
    assert TOKENIZER.token_name(tokens[0]) == "bytes:\\xf0"
    assert TOKENIZER.token_name(TOKENIZER.tokens("A")[0]) == "A"
    assert any(len(TOKENIZER.token_bytes(token)) > 1 for token in TOKENIZER.tokens("The parser"))


def test_special_and_unused_ids_stand_for_no_text() -> None:
    assert (TOKENIZER.token_bytes(0), TOKENIZER.token_name(0)) == (b"", END)
    assert (TOKENIZER.token_bytes(399), TOKENIZER.token_name(399)) == (b"", "<|399|>")
    assert TOKENIZER.tokens(f"a{END}") == [*TOKENIZER.tokens("a"), 0]


def test_added_tokens_are_their_own_text() -> None:
    library = train_library()
    library.add_tokens(["    ", "né"])
    tokenizer = subwords(library)
    tokens = tokenizer.tokens("x    né")
    assert [tokenizer.token_bytes(token) for token in tokens] == [b"x", b"    ", "né".encode()]


def test_prompts_begin_as_the_tokenizer_begins_texts() -> None:
    a = TOKENIZER.tokens("a")
    assert TOKENIZER.encode("a") == TOKENIZER.begin(a, text=False) == a
    assert TOKENIZER.encode("") == TOKENIZER.begin([], text=False) == [0]
    library = train_library(special=("<unused>", "<s>"))
    library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = subwords(library)
    assert tokenizer.start == 1
    assert tokenizer.encode("a") == library.encode("a").ids == [1, *tokenizer.tokens("a")]
    assert tokenizer.encode("<s>a") == tokenizer.encode("a")
    assert tokenizer.begin([5, 6], text=False) == [5, 6]
    assert tokenizer.encode("") == [1]


def test_truncation_and_padding_are_switched_off() -> None:
    library = train_library()
    library.enable_truncation(3)
    library.enable_padding(length=50)
    assert subwords(library).decode(subwords(library).tokens("a long enough text")) == "a long enough text"


def test_a_lone_surrogate_is_no_text() -> None:
    with pytest.raises(UnicodeEncodeError):
        TOKENIZER.tokens("\ud800")


def changed(change: str) -> tokenizers.Tokenizer:
    library = train_library()
    if change == "decoder":
        library.decoder = WordPiece()
    elif change == "no decoder":
        described = json.loads(library.to_str())
        library = tokenizers.Tokenizer.from_str(json.dumps(described | {"decoder": None}))
    elif change == "pre_tokenizer":
        library.pre_tokenizer = Whitespace()
    elif change == "suffix":
        library.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    elif change == "bytes":
        library.model = BPE(vocab={"a": 1, "b": 2}, merges=[])
    elif change == "piece":
        library.model = BPE(vocab={"▁a": 1}, merges=[])
    elif change == "large":
        library.add_tokens([AddedToken(f"more {number}") for number in range(100)])
    return library


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("decoder", "only byte-level tokenizers are supported (decoder ByteLevel), not WordPiece"),
        ("no decoder", "only byte-level tokenizers are supported (decoder ByteLevel), not None"),
        ("pre_tokenizer", "no pre_tokenizer or normalizer is ByteLevel"),
        ("suffix", "its post_processor must add nothing to a text but one token in front"),
        ("bytes", "241 bytes have no token of their own"),
        ("piece", "the token '▁a' is not byte-level: '▁' stands for no byte"),
        ("large", "tokens up to id 420, the model 400"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(SubwordError) as raised:
        subwords(changed(change))
    assert message in str(raised.value)


def test_a_conversion_keeps_the_tokenizer_and_where_sequences_begin_and_end(tmp_path: Path) -> None:
    source, ours = tmp_path / "source", tmp_path / "ours"
    write_subword_source(source, {"bos_token_id": 5, "eos_token_id": 6})
    convert(source, ours)
    assert (ours / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert read_config(ours).special_tokens.model_dump() == {"start": 5, "ends": (6,)}
    tokenizer = load_tokenizer(ours)
    assert isinstance(tokenizer, SubwordTokenizer)
    assert (tokenizer.start, tokenizer.ends, tokenizer.vocab_size) == (5, {6}, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("ids", "start", "ends"),
    [
        ({"bos_token_id": 3, "eos_token_id": [7, 8]}, 3, {7, 8}),
        ({"bos_token_id": None, "eos_token_id": 9}, 9, {9}),
        ({"eos_token_id": None}, 0, set()),
    ],
)
def test_the_generation_config_wins(tmp_path: Path, ids: dict, start: int, ends: set[int]) -> None:
    write_subword_source(tmp_path / "source", **ids)
    convert(tmp_path / "source", tmp_path / "ours")
    tokenizer = load_tokenizer(tmp_path / "ours")
    assert (tokenizer.start, tokenizer.ends) == (start, ends)


def test_without_a_generation_config_the_config_counts(tmp_path: Path) -> None:
    write_subword_source(tmp_path / "source", {"eos_token_id": 11})
    (tmp_path / "source" / "generation_config.json").unlink()
    convert(tmp_path / "source", tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").ends == {11}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"bos_token_id": None, "eos_token_id": None}, "one of bos_token_id and eos_token_id must be set"),
        ({"eos_token_id": [400]}, "the special token 400 must be one of the model's, 0 to 399"),
        ({"eos_token_id": -1}, "ends.0: Input should be greater than or equal to 0"),
        ({"bos_token_id": "0"}, "bos_token_id: Input should be a valid integer"),
    ],
)
def test_unusable_special_tokens_are_named(
    tmp_path: Path, ids: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_subword_source(tmp_path / "source", **ids)
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "ours")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_damaged_tokenizer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_subword_source(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "ours")]) == 2
    assert "tokenizer.json is no tokenizer: " in capsys.readouterr().err


def test_a_checkpoint_and_its_tokenizer_belong_together(tmp_path: Path) -> None:
    write_subword_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours")
    path = tmp_path / "ours" / "tokenizer.json"
    content = path.read_text()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer.json"):
        load_tokenizer(tmp_path / "ours")
    save_checkpoint(load_checkpoint(tmp_path / "ours"), tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"vocab_size = 400 must be 257 to read bytes, and there is no .*json"):
        load_tokenizer(tmp_path / "ours")
    path.write_text(content)
    with pytest.raises(CheckpointError, match="special_tokens is missing"):
        load_tokenizer(tmp_path / "ours")


def test_a_checkpoint_without_one_reads_bytes(tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours")
    assert isinstance(load_tokenizer(tmp_path / "ours"), ByteTokenizer)


def test_a_rounded_checkpoint_keeps_its_tokenizer(tmp_path: Path) -> None:
    write_subword_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "exact")
    round_checkpoint(tmp_path / "exact", tmp_path / "rounded")
    tokens = load_tokenizer(tmp_path / "exact").tokens("The parser")
    assert load_tokenizer(tmp_path / "rounded").tokens("The parser") == tokens
    assert read_config(tmp_path / "rounded") == read_config(tmp_path / "exact")
