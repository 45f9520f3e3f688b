from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.layers.mamba2 import AdaptiveMambaBlock, VariableStateSpaceModel
from model.layers.propagation import Propagated
from model.state import BlockState
from tests.model.shapes import PROPAGATING, SMALL, random_model


@pytest.fixture
def mixer() -> VariableStateSpaceModel:
    return random_model().trunk[0].mixer


def nested_twin(mixer: VariableStateSpaceModel, d_state: int) -> VariableStateSpaceModel:
    """A mixer built with the smaller state, from the same prefix of columns."""
    config = ModelConfig(**{**SMALL.model_dump(), "d_state": d_state, "d_state_levels": (d_state,)})
    twin = VariableStateSpaceModel(mixer.width, config, variable=False)
    inner, full = mixer.d_inner, mixer.d_state
    kept = [*range(inner), *range(inner, inner + d_state), *range(inner + full, inner + full + d_state)]
    rows = torch.tensor(
        [
            *range(inner),
            *(inner + row for row in kept),
            *range(2 * inner + 2 * full, 2 * inner + 2 * full + mixer.heads),
        ]
    )
    with torch.no_grad():
        twin.in_proj.weight.copy_(mixer.in_proj.weight[rows])
        twin.conv_weight.copy_(mixer.conv_weight[kept])
        twin.conv_bias.copy_(mixer.conv_bias[kept])
        for name in ("dt_bias", "A_log", "D"):
            getattr(twin, name).copy_(getattr(mixer, name))
        twin.norm.weight.copy_(mixer.norm.weight)
        twin.out_proj.weight.copy_(mixer.out_proj.weight)
    return twin


@pytest.mark.parametrize("d_state", [4, 8])
def test_a_smaller_state_is_the_block_built_from_its_prefix(mixer: VariableStateSpaceModel, d_state: int) -> None:
    with torch.no_grad():
        mixer.level_scale.fill_(1.0)
        hidden, device = torch.randn(2, 40, mixer.width), torch.device("cpu")
        state = mixer.resize_state_space(mixer.zero_state(2, device), d_state)
        output, after, _ = mixer(hidden, state)
        twin = nested_twin(mixer, d_state)
        expected, expected_after, _ = twin(hidden, twin.zero_state(2, device))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.ssm_state, expected_after.ssm_state, atol=1e-5, rtol=1e-5)


def test_a_live_state_survives_a_round_trip_in_its_prefix(mixer: VariableStateSpaceModel) -> None:
    with torch.no_grad():
        _, live, _ = mixer(torch.randn(2, 40, mixer.width), mixer.zero_state(2, torch.device("cpu")))
    there = mixer.resize_state_space(live, 8)
    back = mixer.resize_state_space(there, 16)
    assert there.ssm_state.shape[-1] == 8
    assert torch.equal(back.ssm_state[..., :8], live.ssm_state[..., :8])
    assert not back.ssm_state[..., 8:].any()
    assert torch.equal(back.conv_state, live.conv_state)


def test_linear_interpolation_destroys_what_nesting_preserves(mixer: VariableStateSpaceModel) -> None:
    """The source document's resize mixes neighbouring columns, which have nothing to do with each other."""
    with torch.no_grad():
        _, live, _ = mixer(torch.randn(2, 40, mixer.width), mixer.zero_state(2, torch.device("cpu")))
        kept = live.ssm_state[..., :8]
        nested = mixer.resize_state_space(live, 8).ssm_state
        linear = mixer.resize_state_space(live, 8, interpolation_mode="linear").ssm_state
    assert torch.equal(nested, kept)
    assert (linear - kept).norm() > 0.5 * kept.norm()


def test_bad_sizes_and_modes_are_refused(mixer: VariableStateSpaceModel) -> None:
    state = mixer.zero_state(1, torch.device("cpu"))
    with pytest.raises(ValueError, match="d_state = 5 must be one of"):
        mixer.resize_state_space(state, 5)
    with pytest.raises(ValueError, match="interpolation_mode = 'cubic'"):
        mixer.resize_state_space(state, 8, interpolation_mode="cubic")


@pytest.fixture
def block() -> AdaptiveMambaBlock:
    return random_model().trunk[0]


@pytest.mark.parametrize("d_state", [4, 8])
@pytest.mark.parametrize("scale", [1.4, -0.6])
def test_resized_weights_do_what_the_block_does_at_that_level(
    block: AdaptiveMambaBlock, d_state: int, scale: float
) -> None:
    """In the middle of a sequence: the live state goes down with the weights."""
    mixer, hidden = block.mixer, torch.randn(2, 50, block.mixer.width)
    with torch.no_grad():
        mixer.level_scale.fill_(scale)
        _, live, _ = mixer(hidden[:, :23], mixer.zero_state(2, torch.device("cpu")))
        live = mixer.resize_state_space(live, d_state)
        expected, expected_after, _ = block(hidden[:, 23:], live)
        block.resize_state_space(d_state)
        output, after, _ = block(
            hidden[:, 23:], BlockState(narrow_taps(live.conv_state, mixer, d_state), live.ssm_state)
        )
    assert block.mixer.d_state == d_state
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.ssm_state, expected_after.ssm_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("d_state", [4, 8])
def test_resized_weights_read_between_fires_as_the_block_does_at_that_level(d_state: int) -> None:
    block = random_model(PROPAGATING).trunk[0]
    mixer, fires = block.mixer, torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    fires[:, :20] = True
    places = torch.argsort((~fires).to(torch.int8), dim=1, stable=True)[:, : int(fires.sum(1).max())]
    propagated = Propagated(torch.randn(2, 50, PROPAGATING.propagation_rank), fires, places)
    hidden = torch.randn(2, places.shape[1], mixer.width)
    with torch.no_grad():
        live = mixer.resize_state_space(mixer.zero_state(2, hidden.device), d_state)
        expected, expected_after, _ = block(hidden, live, propagated=propagated)
        block.resize_state_space(d_state)
        output, after, _ = block(hidden, block.mixer.zero_state(2, hidden.device), propagated=propagated)
    counted = torch.arange(places.shape[1]) < fires.sum(1, keepdim=True)
    torch.testing.assert_close(output[counted], expected[counted], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.ssm_state, expected_after.ssm_state, atol=1e-5, rtol=1e-5)


def narrow_taps(conv_state: torch.Tensor, mixer: VariableStateSpaceModel, d_state: int) -> torch.Tensor:
    x, B, C = conv_state.split([mixer.d_inner, mixer.d_state, mixer.d_state], dim=-1)
    return torch.cat([x, B[..., :d_state], C[..., :d_state]], dim=-1)


def test_grown_weights_change_nothing_until_trained_and_can_be_trained(block: AdaptiveMambaBlock) -> None:
    hidden, device = torch.randn(2, 50, block.mixer.width), torch.device("cpu")
    expected, _, _ = block(hidden, block.mixer.zero_state(2, device))
    block.resize_state_space(24)
    assert block.mixer.levels == (4, 8, 16, 24)
    block.requires_grad_(True)
    output, after, _ = block(hidden, block.mixer.zero_state(2, device))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert after.ssm_state[..., 16:].any()
    output.square().sum().backward()
    assert (block.mixer.conv_weight.grad[-8:] != 0).any()


def test_weights_make_the_round_trip_down_and_up_in_their_prefix(block: AdaptiveMambaBlock) -> None:
    hidden, device = torch.randn(2, 50, block.mixer.width), torch.device("cpu")
    block.resize_state_space(8)
    expected, _, _ = block(hidden, block.mixer.zero_state(2, device))
    block.resize_state_space(16)
    output, _, _ = block(hidden, block.mixer.zero_state(2, device))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_weights_that_are_not_preserved_are_new(block: AdaptiveMambaBlock) -> None:
    before = block.mixer.out_proj.weight.clone()
    block.resize_state_space(8, preserve_weights=False)
    assert not torch.isclose(block.mixer.out_proj.weight, before).all()
    assert block.mixer.level_scale.eq(1).all()
    assert block.mixer.out_proj.weight.requires_grad == before.requires_grad


def test_a_round_trip_of_a_live_state_costs_at_most_what_was_cut_off(mixer: VariableStateSpaceModel) -> None:
    """A later read differs by C of the cut columns times the decayed state in them, and by no more; nesting beats
    interpolation by far.
    """
    hidden = torch.randn(2, 60, mixer.width)
    with torch.no_grad():
        _, live, _ = mixer(hidden[:, :40], mixer.zero_state(2, torch.device("cpu")))
        truth, kept, _ = mixer(hidden[:, 40:], live)
        gaps = {}
        for mode in ("nested", "linear"):
            back = mixer.resize_state_space(mixer.resize_state_space(live, 8, mode), 16, mode)
            output, after, _ = mixer(hidden[:, 40:], back)
            gaps[mode] = (output - truth).norm() / truth.norm()
            if mode == "nested":
                cut = live.ssm_state[..., 8:].norm()
                assert (after.ssm_state - kept.ssm_state).norm() <= cut * (1 + 1e-6)
                assert torch.equal(back.ssm_state[..., :8], live.ssm_state[..., :8])
    assert gaps["nested"] < gaps["linear"]
