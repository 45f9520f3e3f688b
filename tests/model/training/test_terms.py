"""The compute term, checkpointing and mixed precision."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from model.config import ModelConfig
from model.training.config import TrainingConfig
from model.training.expected import expected_rates
from model.training.firing import Reduced
from model.training.loss import (
    compute_error,
    compute_loss,
    density_regression,
    mean_ahead,
    propagation_error,
    recorded_inputs,
)
from model.training.optimizer import AdaptiveOptimizer
from tests.model.shapes import PROPAGATING, SHALLOW, SMALL, random_model, random_tokens

REDUCED = Reduced(rate=0.3, uniform=False, d_state=None, momentum=0.1)


def reference_rates(density: torch.Tensor, rate: float, window: int, spread: float) -> torch.Tensor:
    """The same by autograd through the average written out, and a threshold found on a grid."""
    level, levels = torch.zeros(len(density), dtype=torch.float64), []
    for t, value in enumerate(density.double().unbind(1)):
        level = level + (value - level) / min(t + 1, window)
        levels.append(level)
    logged = torch.stack(levels, 1).log()
    grid = torch.linspace(-10.0, 10.0, 20001, dtype=torch.float64)
    means = torch.stack([((logged.detach() - threshold) / spread).sigmoid().mean() for threshold in grid])
    threshold = grid[(means - rate).abs().argmin()]
    return ((logged - threshold) / spread).sigmoid().mean(1)


def test_expected_rates_and_their_gradient_equal_the_written_out_ones() -> None:
    values = torch.rand(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    results = []
    for function in (expected_rates, reference_rates):
        density = (values * torch.tensor([[0.5], [1.0], [3.0]])).requires_grad_()
        rates = function(density, 0.4, 8, 0.7)
        rates[1:].square().sum().backward()
        results.append((rates.detach(), density.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-3, rtol=2e-3)
    assert results[0][0].mean().item() == pytest.approx(0.4, abs=1e-6)
    assert results[0][0].diff().min() > 0.05


def test_a_text_that_differs_from_its_batch_has_a_compute_error_and_equal_texts_have_none() -> None:
    model = random_model()
    density = torch.rand(1, 200, generator=torch.Generator().manual_seed(0)) + 0.1
    assert compute_error(model, density.expand(3, -1), 0.3).item() == pytest.approx(0.0, abs=1e-9)
    unequal = compute_error(model, density * torch.tensor([[0.2], [1.0], [5.0]]), 0.3).item()
    share = model.cost.unit.trunk / model.cost.full_flops(1, 1)
    assert 0.01 * share**2 < unequal < share**2


def test_the_two_ends_alone_are_trained_as_beside_terms_without_weight() -> None:
    config = TrainingConfig(full_weight=0.6, floor_weight=0.4, exit_weight=0.0, lambda_info=0.0)
    gradients = []
    for ends_only in (True, False):
        model = random_model().requires_grad_(True).train()
        reduced = Reduced(0.0, uniform=False, d_state=None, momentum=0.1, ends_only=ends_only)
        loss = compute_loss(model, random_tokens(2, 65), reduced, config)
        loss.total.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()} | {"loss": loss.total.detach()})
        assert ("exit" in loss.bits) != ends_only
    for name, alone in gradients[0].items():
        beside = gradients[1][name]
        if alone is None:
            assert beside is None or not beside.count_nonzero(), name
        else:
            torch.testing.assert_close(alone, beside, msg=name)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_the_worth_ahead_is_a_mean_over_the_bytes_that_are_left(count: int) -> None:
    values = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([values[:, t : t + count].mean(1) for t in range(9)], 1)
    torch.testing.assert_close(mean_ahead(values, count), expected, atol=1e-6, rtol=0)


def test_the_density_learns_what_the_trunk_is_worth_where_it_always_fires() -> None:
    model = random_model().requires_grad_(True).train()
    hidden = torch.randn(1, 200, model.config.d_model, generator=torch.Generator().manual_seed(0))
    worth = (hidden[..., 0] > 0.0).float() * math.log(2.0)  # a bit, where the output's first channel says so
    fires = torch.ones(1, 200, dtype=torch.bool)
    measured = torch.zeros(1, 200, 4)
    optimizer = torch.optim.Adam(model.density.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        density = model.density.combine(model.density.learned(measured, hidden))
        density_regression(model, density, worth, torch.zeros_like(worth), fires).backward()
        optimizer.step()
    assert density[worth > 0.0].min() > 0.5
    assert density[worth == 0.0].max() < 0.5


def test_the_compute_term_moves_the_weights_of_the_density_so_that_texts_agree() -> None:
    model = random_model().requires_grad_(True).train()
    measured = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0))
    features = nn.functional.pad(measured, (0, 1))  # nothing learned
    features[1, :, 2] += 4.0  # one feature tells the texts apart
    model.density.mean.zero_()
    model.density.std.fill_(1.0)
    optimizer = torch.optim.Adam(model.density.parameters(), lr=0.1)
    errors = []
    for _ in range(150):
        optimizer.zero_grad()
        error = compute_error(model, model.density.combine(features), 0.3)
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.2 * errors[0]
    assert model.density.raw_weight[2] < model.density.raw_weight[[0, 1, 3]].min()


def test_reduced_passes_alone_train_what_states_read_between_fires() -> None:
    for reduced, trained in ((REDUCED, True), (Reduced(0.0, False, None, 0.1), False)):
        model = random_model(PROPAGATING).requires_grad_(True).train()
        config = TrainingConfig(floor_weight=0.25, lambda_info=0.0)
        compute_loss(model, random_tokens(2, 97), reduced, config).total.backward()
        read = [model.router.code, *(block.mixer.propagation for block in model.trunk)]
        assert all((one.weight.grad is not None and one.weight.grad.norm() > 0.0) == trained for one in read)


@pytest.mark.parametrize("shape", [PROPAGATING, SHALLOW], ids=["one stage", "stages"])
def test_what_states_read_between_fires_learns_from_what_a_fire_gives_them(shape: ModelConfig) -> None:
    """Written out: a byte's fire gives each block's convolution and recurrence all but z of its projection.

    Every fourth byte speaks for those after it.
    """
    model, tokens = random_model(shape).requires_grad_(True).train(), random_tokens(2, 60)
    hidden = model.encode(tokens, model.allocate_state(2).encoder).hidden
    with recorded_inputs(model) as recorded:
        _, entrances = model.combine_everywhere(hidden)
    error = propagation_error(model, entrances, recorded)
    entered, errors = model.router.to_trunk(hidden), []
    codes = [model.router.propagated(hidden)]
    for number, block in enumerate(model.trunk):
        if number in shape.shallow_depths:  # a stage begins: its states read what the one below leaves
            codes.append(model.router.propagated(entered.detach(), len(codes)))
        mixer = block.mixer
        given = mixer.in_proj(block.norm(entered))[:, ::4, mixer.d_inner :].double()
        read = mixer.propagation(codes[-1])[:, ::4].double()
        errors.append((((read - given) ** 2).mean((0, 1)) / given.var((0, 1))).mean())
        entered = block(entered, mixer.zero_state(2, hidden.device))[0]
    assert error.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    error.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {
        "router.code.weight",
        *(f"router.later_codes.{i}.weight" for i in range(len(shape.shallow_depths))),
        *(f"trunk.{i}.mixer.propagation.weight" for i in range(shape.trunk_layers)),
    }


def test_only_a_model_that_propagates_is_recorded_and_only_meanwhile() -> None:
    for shape, count in ((SMALL, 0), (PROPAGATING, 2)):
        model, tokens = random_model(shape).requires_grad_(True), random_tokens(1, 20)
        with recorded_inputs(model) as recorded:
            model(tokens)
            assert len(recorded) == count
        model(tokens)
        assert len(recorded) == count


@pytest.mark.parametrize("shape", [SMALL, PROPAGATING], ids=["skips", "propagates"])
@pytest.mark.parametrize("reduced", [REDUCED, Reduced(0.0, False, 8, 0.1), None])
def test_checkpointing_has_the_same_loss_and_gradients(reduced: Reduced | None, shape: ModelConfig) -> None:
    results = []
    for checkpointing in (False, True):
        model = random_model(shape).requires_grad_(True).train()
        model.gradient_checkpointing = checkpointing
        loss = compute_loss(model, random_tokens(2, 97), reduced, TrainingConfig())
        loss.total.backward()
        results.append((loss.total.item(), {name: p.grad for name, p in model.named_parameters()}))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        other = results[1][1][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            torch.testing.assert_close(other, gradient, atol=1e-7, rtol=1e-5)


def saved_bytes(*, checkpointing: bool) -> int:
    """Bytes of distinct storages that a training pass keeps for its backward pass."""
    model, kept = random_model().requires_grad_(True).train(), {}
    model.gradient_checkpointing = checkpointing

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute_loss(model, random_tokens(1, 513), None, TrainingConfig())
    assert loss.total.requires_grad
    return sum(kept.values())


def test_checkpointing_keeps_less() -> None:
    assert saved_bytes(checkpointing=True) < 0.5 * saved_bytes(checkpointing=False)


def test_low_precision_products_leave_states_and_sums_in_fp32() -> None:
    """What a GPU does under autocast, on a CPU."""
    model, tokens = random_model().requires_grad_(True).train(), random_tokens(2, 97)
    exact = compute_loss(model, tokens, REDUCED, TrainingConfig())
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute_loss(model, tokens, REDUCED, TrainingConfig())
        state = model.allocate_state(2)
        hidden = model.encode(tokens, state.encoder)
        model.combine(hidden.hidden, None, state)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(exact.total.item(), rel=0.05)
    assert loss.total.item() != exact.total.item()
    states = [*(t for block in (*hidden.states, *state.trunk, *state.decoder) for t in block.tensors())]
    assert {tensor.dtype for tensor in states} == {torch.float32}
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients)


def test_a_scaled_loss_makes_the_same_step_and_an_overflow_makes_none() -> None:
    results = []
    for scaled in (False, True):
        model = random_model().requires_grad_(True).train()
        optimizer = AdaptiveOptimizer(model, TrainingConfig())
        if scaled:
            optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer.optimize_step(random_tokens(2, 97), REDUCED, 60)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-4)
    optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer.optimize_step(random_tokens(2, 97) * 0 + 65, REDUCED, 61)
    assert optimizer.scaler.get_scale() < 2.0**127
    for before, after in zip(results[1], model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_the_loss_scale_is_resumed() -> None:
    optimizers = [AdaptiveOptimizer(random_model().requires_grad_(True), TrainingConfig()) for _ in range(2)]
    for optimizer, scale in zip(optimizers, (512.0, 8.0), strict=True):
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizers[0].scaler.scale(torch.ones(()))  # scales are made when they are needed
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].scaler.get_scale() == 512.0


@pytest.mark.parametrize(
    ("precision", "units", "accepted"),
    [("fp16", False, "'fp32'"), ("fp16", True, "'fp32', or 'bf16'"), ("bf16", False, "'fp32'")],
)
def test_mixed_precision_needs_a_gpu_or_a_cpu_with_units_for_it(
    precision: Literal["fp16", "bf16"], units: bool, accepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": units})
    with pytest.raises(ValueError, match=f"precision = '{precision}' needs a GPU; on this CPU it must be {accepted}$"):
        AdaptiveOptimizer(random_model(), TrainingConfig(precision=precision))


def test_bf16_products_of_a_cpu_change_a_step_a_little_and_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the units are missing the products are computed all the same, slowly: the model here is small."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    bits, parameters = [], []
    for config in (TrainingConfig(), TrainingConfig(precision="bf16")):
        model = random_model().requires_grad_(True).train()
        optimizer = AdaptiveOptimizer(model, config)
        bits.append(optimizer.optimize_step(random_tokens(2, 97), REDUCED, 60).bits)
        parameters.append(list(model.parameters()))
        assert torch.get_float32_matmul_precision() == "highest"
    assert {parameter.dtype for parameter in parameters[1]} == {torch.float32}
    assert bits[1] == pytest.approx(bits[0], rel=0.01)


def test_the_parts_of_the_loss_are_weighed_as_configured() -> None:
    totals = {}
    for info, compute in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        model = random_model()
        config = TrainingConfig(lambda_info=info, lambda_compute=compute)
        totals[info, compute] = compute_loss(model, random_tokens(2, 200), REDUCED, config).total.item()
    alone = [totals[key] - totals[0.0, 0.0] for key in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))]
    assert min(alone) > 0.0
    assert math.isclose(alone[2], alone[0] + alone[1], rel_tol=1e-4, abs_tol=1e-5)
    assert np.isfinite(list(totals.values())).all()
