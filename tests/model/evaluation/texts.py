"""Documents and passages for tests of the evaluation."""

from __future__ import annotations

import random

import numpy as np
import torch

from model.evaluation.arms import Arm, Text
from model.evaluation.passages import Calibration, Cutter, Protocol, read_features
from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import Floats
from model.tokenizer import ByteTokenizer
from tests.model.shapes import random_tokens

TOKENS = random_tokens(4, 1024, seed=7)
CALIBRATION = Calibration(TOKENS, np.isin(TOKENS.numpy(), list(b" \t\n\r\f\v")))


def document(length: int, seed: int) -> bytes:
    """Words of a few letters, and passages of many, so that the density has something to tell."""
    source = random.Random(seed)
    text = bytearray()
    while len(text) < length:
        letters = source.choice([b"ab", b"abcd", bytes(range(33, 127))])
        for _ in range(source.randint(5, 20)):
            text += bytes(source.choices(letters, k=source.randint(1, 12))) + source.choice([b" ", b" ", b"\n"])
    return bytes(text[:length])


def read(model: AdaptiveAttentionSystem, protocol: Protocol, documents: list[bytes]) -> list[Text]:
    """The passages of documents, with their features."""
    cutter = Cutter(protocol, ByteTokenizer(), model.config.block_size, torch.device("cpu"))
    passages = [passage for content in documents for passage in cutter.cut(content)]
    return [Text(passage, read_features(model, passage.inputs)[0]) for passage in passages]


def signals(arm: Arm, texts: list[Text]) -> list[Floats]:
    return [arm.signal(text) for text in texts]
