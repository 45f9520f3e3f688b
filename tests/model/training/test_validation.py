from __future__ import annotations

import math

import pytest
import torch

from model.training.firing import Reduced, choose_fires
from model.training.loss import cross_entropy
from model.training.validation import SHARES, validate
from tests.model.shapes import random_model, random_tokens


def test_each_rate_scores_as_a_whole_pass_at_its_fires() -> None:
    model, tokens = random_model(), random_tokens(6, 97)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    scores = validate(model, tokens)
    assert list(scores) == ["full", "three_quarters", "half", "quarter", "floor"]
    density = model.analyse(inputs).numpy()
    for name, share in SHARES.items():
        rate = float(share)
        fires = torch.ones_like(inputs, dtype=torch.bool)
        if rate < 1.0:
            fires = torch.from_numpy(choose_fires(model.tiles, density, Reduced(rate, False, None, 0.0)))
        assert fires.double().mean().item() == pytest.approx(rate, abs=0.05)
        expected = cross_entropy(model(inputs, fires), targets).mean().item() / math.log(2.0)
        assert scores[name] == pytest.approx(expected, abs=1e-5), name
    assert len(set(scores.values())) == len(scores)


def test_validation_changes_nothing_and_leaves_the_model_in_training() -> None:
    model, tokens = random_model().train(), random_tokens(2, 97)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert validate(model, tokens) == validate(model, tokens)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plain_model_is_validated_at_full_resolution_only() -> None:
    model, tokens = random_model(), random_tokens(2, 97)
    assert validate(model, tokens, plain=True) == {"full": validate(model, tokens)["full"]}
