from __future__ import annotations

import math
import random

import pytest
import torch

from model.adaptive.tiling import Pace
from model.evaluation.passages import PIECE
from model.evaluation.sources import first_bytes, spread
from model.evaluation.strict import StrictEvaluation
from model.tokenizer import DOCUMENT
from tests.model.shapes import random_model, step_through

DOCUMENT_TEXT = b"some text, and more of it. " * 8


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.6, 0.0])
def test_bits_are_those_of_reading_byte_by_byte(budget: float) -> None:
    model = random_model()
    budget = budget or model.cost.floor
    evaluation = StrictEvaluation(model, [budget])
    evaluation.add(DOCUMENT_TEXT)
    tokens = torch.tensor([[DOCUMENT, *DOCUMENT_TEXT]])
    rates = torch.tensor([model.cost.rates(budget).decode], dtype=torch.float64)
    logits, fires = step_through(model, tokens[:, :-1], rates)
    nats = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
    score = evaluation.scores[0]
    assert score.bits == pytest.approx(nats / math.log(2), rel=1e-4)
    assert (score.bytes, score.fires) == (len(DOCUMENT_TEXT), int(fires.sum()))
    length = len(DOCUMENT_TEXT)
    assert score.spent_flops == model.cost.flops(length, score.fires, length, length * (0 < rates.item() < 1)).total


def test_long_documents_are_carried_over_pieces() -> None:
    model, document = random_model(), random.Random(0).randbytes(PIECE + 700)
    evaluation = StrictEvaluation(model, [0.6])
    seen: list[int] = []
    evaluation.add(document, seen.append)
    assert seen == [PIECE, 700]
    with torch.no_grad():
        tokens = torch.tensor([[DOCUMENT, *document]])
        density = model.analyse(tokens[:, :-1])[0].numpy()
        fires = model.tiles.online(density, model.cost.rates(0.6).decode, Pace(0, 0, 0, 0.0))
        logits = model(tokens[:, :-1], torch.from_numpy(fires.astype(bool)).unsqueeze(0))
        nats = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
    assert evaluation.scores[0].bits == pytest.approx(nats / math.log(2), rel=1e-3)


def test_budgets_do_not_disturb_each_other() -> None:
    model = random_model()
    together = StrictEvaluation(model, [0.6, 1.0, 0.8])
    together.add(DOCUMENT_TEXT)
    for score in together.scores:
        alone = StrictEvaluation(model, [score.budget])
        alone.add(DOCUMENT_TEXT)
        assert alone.scores == [score]


def test_a_part_of_the_documents_is_spread_over_all() -> None:
    documents = [bytes([n]) * 10 for n in range(100)]
    assert spread(documents, None) == documents
    assert spread(documents, 100) == documents[::10]
    assert spread(documents, 109) == documents[::10]
    assert spread(documents, 1) == documents[:1]
    unequal = [b"x" * size for size in (1, 900, 1, 1, 1, 900, 1, 1)]
    assert sum(map(len, spread(unequal, 100))) <= 100


def test_the_first_bytes_of_a_document_are_whole_characters() -> None:
    assert first_bytes("aäö".encode(), None) == first_bytes("aäö".encode(), 5) == "aäö".encode()
    assert [first_bytes("aäö".encode(), most).decode() for most in (1, 2, 3, 4)] == ["a", "a", "aä", "aä"]
