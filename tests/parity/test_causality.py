"""What comes later changes nothing that came before."""

from __future__ import annotations

import pytest
import torch

from model.adaptive.tiling import Pace
from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from tests.model.shapes import PROPAGATING, SMALL, random_model, random_tokens

CUT = 100
START = Pace(position=0, last_fire=0, fires=0, quota=0.0)


def two_texts() -> tuple[torch.Tensor, torch.Tensor]:
    """The same text but for everything from ``CUT`` on."""
    one, other = random_tokens(1, 180), random_tokens(1, 180, seed=9)
    other[:, :CUT] = one[:, :CUT]
    assert (one[:, CUT:] != other[:, CUT:]).float().mean() > 0.5
    return one, other


def online_logits(model: AdaptiveAttentionSystem, tokens: torch.Tensor, rate: float) -> torch.Tensor:
    fires = model.tiles.online(model.analyse(tokens)[0].numpy(), rate, START)
    return model(tokens, torch.from_numpy(fires.astype(bool)).unsqueeze(0))


@pytest.mark.parametrize("shape", [SMALL, PROPAGATING], ids=["skips", "propagates"])
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1, 0.0])
def test_a_changed_suffix_changes_no_earlier_logit_under_online_firing(
    path: str, rate: float, shape: ModelConfig
) -> None:
    model = random_model(shape)
    before = [online_logits(model, tokens, rate)[:, :CUT] for tokens in two_texts()]
    torch.testing.assert_close(*before, atol=1e-6, rtol=0)


def test_a_changed_suffix_does_change_later_logits(path: str) -> None:
    model = random_model()
    one, other = (online_logits(model, tokens, 0.5)[:, CUT:] for tokens in two_texts())
    assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_the_plan_of_a_block_does_not_depend_on_later_blocks(path: str, rate: float) -> None:
    model, plans = random_model(), []
    for tokens in two_texts():
        state = model.allocate_state(1)
        plans.append([
            model.prefill(piece, state, rate).tile_ends for piece in tokens.split(SMALL.block_size, dim=1)
        ])  # fmt: skip
    whole_blocks = CUT // SMALL.block_size
    assert plans[0][:whole_blocks] == plans[1][:whole_blocks]
    assert plans[0][whole_blocks:] != plans[1][whole_blocks:]
