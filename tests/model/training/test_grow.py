"""A trunk that grows in a trained plain model, and the floor's own share of the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.checkpoint import read_config
from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from model.training.config import TrainingConfig
from model.training.faults import TrainingError
from model.training.firing import Reduced
from model.training.grow import grow
from model.training.loop import Run, train
from model.training.loss import compute_loss
from tests.model.shapes import SHALLOW, SMALL, random_model, random_tokens
from tests.model.training.runs import CONFIG, RECIPE, SHAPE, recipe, weights

PLAIN = ModelConfig(**{**SMALL.model_dump(), "d_trunk": 32, "trunk_layers": 1, "decoder_layers": 0})


@pytest.mark.parametrize("shape", [SMALL, SHALLOW], ids=["one stage", "stages"])
@pytest.mark.parametrize("d_trunk", [48, 32])
def test_a_grown_model_computes_what_the_plain_one_did(d_trunk: int, shape: ModelConfig) -> None:
    plain, tokens = random_model(PLAIN), random_tokens(2, 90)
    plain.trunk[0].mixer.tile_exponent.zero_()
    grown = grow(plain, shape.model_copy(update={"d_trunk": d_trunk})).eval().requires_grad_(False)
    expected = plain(tokens)
    for fires in (None, torch.zeros(2, 90, dtype=torch.bool), torch.arange(180).view(2, 90) % 3 == 0):
        torch.testing.assert_close(grown(tokens, fires), expected, atol=1e-4, rtol=1e-4)


def test_the_trunk_of_a_grown_model_learns() -> None:
    model = grow(random_model(PLAIN), SMALL).requires_grad_(True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves the way out of the trunk only
        optimizer.zero_grad()
        compute_loss(model, random_tokens(1, 65), None, CONFIG).total.backward()
        optimizer.step()
    gradient = model.trunk[0].mixer.in_proj.weight.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": 2}, "has 2 blocks, and encoder and decoder together 3"),
        ({"d_model": 64, "d_trunk": 64}, "has another shape outside the trunk"),
    ],
)
def test_another_shape_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        grow(random_model(PLAIN), SMALL.model_copy(update=changes))


def test_a_run_that_grows_a_trunk(corpus: Path, tmp_path: Path) -> None:
    plain, grown = tmp_path / "plain", tmp_path / "grown"
    shape = PLAIN.model_copy(update={"name": "plain"})
    train(Run(corpus, plain), recipe(plain=True, steps=2).model_copy(update={"model": shape}))
    still = recipe(steps=1, learning_rate=1e-9, weight_decay=0.0)
    train(Run(corpus, grown, grow=plain), still)
    assert read_config(grown).model == SHAPE
    assert read_config(grown).provenance["bytes"] == 3 * CONFIG.sequences * CONFIG.length
    torch.testing.assert_close(weights(grown)["embedding.weight"], weights(plain)["embedding.weight"])
    with pytest.raises(TrainingError, match="has 4 blocks"):
        train(Run(corpus, tmp_path / "other", grow=grown), RECIPE)


def test_the_floors_share_of_the_loss_is_of_a_pass_that_never_fires() -> None:
    model, tokens = random_model().requires_grad_(True).train(), random_tokens(2, 65)
    only_floor = TrainingConfig(full_weight=0.0, floor_weight=1.0, exit_weight=0.0, lambda_info=0.0, lambda_compute=0.0)
    gradients = []
    for rate in (0.5, 0.0):
        model.zero_grad()
        loss = compute_loss(model, tokens, Reduced(rate=rate, uniform=True, d_state=None, momentum=0.1), only_floor)
        loss.total.backward()
        gradients.append(gradient(model))
        assert set(loss.bits) == {"full", "floor", "exit"} | ({"reduced"} if rate else set())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-5)
    assert float(gradients[0].abs().max()) > 0.0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.trunk.parameters())


def gradient(model: AdaptiveAttentionSystem) -> torch.Tensor:
    found = model.encoder[0].get_parameter("mixer.in_proj.weight").grad
    assert found is not None
    return found.clone()


def test_shares_of_the_loss_are_at_most_the_whole() -> None:
    with pytest.raises(ValueError, match=r"full_weight \+ shallow_weight \+ floor_weight = 1.2 must be at most 1"):
        TrainingConfig(full_weight=0.9, floor_weight=0.3)
