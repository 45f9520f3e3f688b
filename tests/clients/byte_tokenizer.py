"""Make the server's tokens a folder that transformers reads, for clients that want a tokenizer of their own.

    python tests/clients/byte_tokenizer.py FOLDER

Ids are those of ``POST /tokenize``: 0 to 255 are the bytes of UTF-8, 256 separates documents. Needs ``transformers``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SEPARATOR = "<|document|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding without a merge. The library writes printable bytes as themselves, others as U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
    tokenizer = Tokenizer(BPE(vocab=letters | {SEPARATOR: 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR)


if __name__ == "__main__":
    byte_tokenizer().save_pretrained(Path(sys.argv[1]))
