"""A real byte-level tokenizer, and a Hugging Face folder of a random Mamba-2 that uses it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from model.subword import SubwordTokenizer
from tests.model.test_convert import write_source

END = "<|endoftext|>"
VOCAB_SIZE = 400
"""Of the model: there is room for more tokens than there are."""
TEXTS = [
    "The parser reads a file line by line. ",
    "def parse(line):\n    return line.split(',')\n",
    "日本語のテキスト。",
]


def train_library(texts: Iterable[str] = TEXTS, special: Iterable[str] = (END,)) -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2's, trained on a few strings; special tokens have the first ids."""
    library = tokenizers.Tokenizer(BPE())
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    library.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=340, special_tokens=list(special), initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(list(texts) * 4, trainer)
    return library


def subwords(library: tokenizers.Tokenizer) -> SubwordTokenizer:
    return SubwordTokenizer(library, VOCAB_SIZE, start=0, ends=(0,))


def write_subword_source(
    folder: Path, changes: dict | None = None, library: tokenizers.Tokenizer | None = None, **ids: object
) -> Mamba2ForCausalLM:
    """A folder with ``tokenizer.json``, and its model; ``ids`` go into its generation config."""
    model = write_source(folder, {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0} | (changes or {}))
    (library or train_library()).save(str(folder / "tokenizer.json"))
    if ids:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    return model
