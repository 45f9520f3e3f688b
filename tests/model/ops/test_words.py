"""Matrices in bf16 beside fp32: the same products to the bit, and never of weights that are gone."""

from __future__ import annotations

import pytest
import torch
from numba.core.errors import TypingError

import model.ops.words
from model.convert import round_matrices
from model.ops.recurrent import project_rows
from model.ops.words import exact_in_bf16, readable
from tests.model.shapes import PROPAGATING, SMALL, random_model, random_tokens, step_through

RATES = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("width", [7, 8, 20, 256])
@pytest.mark.parametrize("outputs", [1, 4, 6, 257])
def test_a_product_has_the_same_bits_among_any_others(width: int, outputs: int) -> None:
    torch.manual_seed(width + outputs)
    x, weight = torch.randn(9, width), torch.randn(outputs, width).bfloat16().float()
    plain, packed = readable(weight, frozen=False), readable(weight, frozen=True)
    assert plain[1].size == 0
    assert packed[1].shape == weight.shape
    together = torch.from_numpy(project_rows(x.numpy(), plain))
    error = (together - (x.double() @ weight.double().T)).abs()
    assert (error <= 1e-6 * (x.abs() @ weight.abs().T) + 1e-7).all()
    for matrix in (plain, packed):
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 9):
            for start in range(9 - count + 1):
                part = x[start : start + count].contiguous().numpy()
                assert torch.equal(torch.from_numpy(project_rows(part, matrix)), together[start : start + count])


def test_rows_that_do_not_lie_one_after_the_other_are_refused() -> None:
    x = torch.randn(6, 8).numpy()[::2]
    with pytest.raises(TypingError, match="one after the other"):
        project_rows(x, readable(torch.randn(4, 8), frozen=True))


def test_numbers_that_bf16_lacks_are_not_packed() -> None:
    weight = torch.randn(3, 8)
    assert readable(weight, frozen=True)[1].size == 0
    assert exact_in_bf16(torch.tensor([0.0, -0.0, 1.5, float("inf")]))
    assert not exact_in_bf16(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("shape", [SMALL, PROPAGATING], ids=["skips", "propagates"])
def test_a_step_by_words_is_the_step_without(monkeypatch: pytest.MonkeyPatch, shape: object) -> None:
    system, tokens = random_model(shape), random_tokens(3, 60)
    round_matrices(system)
    by_words = step_through(system, tokens, RATES)
    assert all(block.views().step[5][1].size for block in (*system.encoder, *system.trunk, *system.decoder))
    assert system.views().head[1].size
    monkeypatch.setattr(model.ops.words, "exact_in_bf16", lambda _: False)
    system.eval()
    without = step_through(system, tokens, RATES)
    assert system.views().head[1].size == 0
    assert torch.equal(by_words[0], without[0])
    assert torch.equal(by_words[1], without[1])


def test_trained_and_loaded_weights_are_the_ones_that_run() -> None:
    system, tokens = random_model(), random_tokens(3, 20)
    round_matrices(system)
    before, weights = step_through(system, tokens, RATES)[0], random_model().state_dict()
    with torch.no_grad():
        system.train()
        system.trunk[0].mixer.in_proj.weight.mul_(2.0)
        system.trunk[0].mixer.D.mul_(2.0)
        trained = step_through(system, tokens, RATES)[0]
        system.trunk[0].mixer.in_proj.weight.mul_(2.0)
        system.trunk[0].mixer.D.mul_(2.0)
        further = step_through(system, tokens, RATES)[0]
        system.eval()
    assert not torch.equal(trained, before)
    assert not torch.equal(further, trained)
    assert torch.equal(step_through(system, tokens, RATES)[0], further)
    system.load_state_dict(weights)
    assert torch.equal(step_through(system, tokens, RATES)[0], step_through(random_model(), tokens, RATES)[0])
