from __future__ import annotations

import pytest
import torch

from tests.model.shapes import SMALL, random_model


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
