from __future__ import annotations

import pytest
import torch

from model.adaptive.router import CrossScaleRouter
from tests.model.shapes import SMALL, random_model, random_tokens


def test_a_fresh_update_is_passed_on_as_it_is_and_fades_with_age() -> None:
    router, held = random_model().router, torch.randn(5, SMALL.d_model)
    assert torch.equal(router.fade(held, torch.zeros(5)), held)
    sizes = torch.stack([router.fade(held, torch.full((5,), float(age))).abs() for age in range(6)])
    assert (sizes.diff(dim=0) < 0).all()


def test_a_state_goes_up_with_zeros_and_comes_down_unchanged() -> None:
    router, small = random_model().router, torch.randn(2, 3, 4, 4)
    large = router.route_states(small, torch.tensor([16, 16]))
    assert torch.equal(large[..., :4], small)
    assert not large[..., 4:].any()
    assert torch.equal(router.route_states(large, torch.tensor([4, 4])), small)


def test_going_down_folds_in_what_is_cut_off() -> None:
    router, large = random_model().router, torch.randn(2, 3, 4, 16)
    expected = large[..., :8] + large[..., 8:] @ router.fold["8"].t()
    torch.testing.assert_close(router.route_states(large, torch.tensor([8, 8])), expected)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="d_state = 5 must be one of"):
        random_model().router.route_states(torch.zeros(1, 1, 1, 16), torch.tensor([5]))


def test_sizes_differ_by_sequence_and_the_widest_sets_the_tensor() -> None:
    router, large = random_model().router, torch.randn(3, 3, 4, 16)
    mixed = router.route_states(large, torch.tensor([4, 16, 8]))
    for row, size in enumerate((4, 16, 8)):
        alone = router.route_states(large[row : row + 1], torch.tensor([size]))[0]
        torch.testing.assert_close(mixed[row, ..., :size], alone, atol=1e-6, rtol=1e-6)
        assert not mixed[row, ..., size:].any()


def test_routing_down_is_the_prefix_at_initialisation() -> None:
    router, large = CrossScaleRouter(SMALL), torch.randn(2, 3, 4, 16)
    assert torch.equal(router.route_states(large, torch.tensor([8, 8])), large[..., :8])


@pytest.mark.parametrize(
    "ends",
    [[0], [0, 1, 2], [6, 12, 19], [3, 4, 15], [19], []],
    ids=["first byte", "first run", "short last tile", "mixed", "one tile", "no fire"],
)
@pytest.mark.parametrize("cut", [1, 7, 16])
def test_tiles_across_calls_hold_and_fire_as_in_one_call(ends: list[int], cut: int) -> None:
    model, tokens = random_model(), random_tokens(1, 20)
    fires = torch.zeros(1, 20, dtype=torch.bool)
    fires[0, ends] = True
    whole, state, outputs = model(tokens, fires), model.allocate_state(1), []
    for part, plan in zip(tokens.split([cut, 20 - cut], 1), fires.split([cut, 20 - cut], 1), strict=True):
        encoded = model.encode(part, state.encoder)
        state.encoder = encoded.states
        outputs.append(model.head(model.combine(encoded.hidden, plan, state)))
    torch.testing.assert_close(torch.cat(outputs, 1), whole, atol=1e-4, rtol=1e-4)
    assert int(state.router.fires) == len(ends)


@pytest.mark.parametrize("fired", [True, False])
def test_a_sequence_of_one_byte(fired: bool) -> None:
    model, tokens = random_model(), random_tokens(1, 1)
    state = model.allocate_state(1)
    encoded = model.encode(tokens, state.encoder)
    model.combine(encoded.hidden, torch.tensor([[fired]]), state)
    assert bool(state.router.held.any()) is fired
    assert int(state.router.last_fire) == int(fired)
