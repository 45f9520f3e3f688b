from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.layers.mamba2 import VariableStateSpaceModel
from tests.model.shapes import SMALL, random_model


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
