from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.ops.rows import linear_rows, softplus_rows


@pytest.mark.parametrize("width", [32, 192, 384, 512])
def test_a_product_of_a_row_does_not_depend_on_the_number_of_rows(width: int) -> None:
    torch.manual_seed(width)
    rows, weight = torch.randn(24, width), torch.randn(257, width)
    together = linear_rows(rows, weight)
    for count in range(1, 24):
        assert torch.equal(linear_rows(rows[:count], weight), together[:count])
        assert torch.equal(linear_rows(rows[-count:], weight), together[-count:])
    torch.testing.assert_close(together, F.linear(rows, weight))


@pytest.mark.parametrize("width", [1, 3, 6, 8, 257])
def test_softplus_of_a_value_does_not_depend_on_its_place(width: int) -> None:
    torch.manual_seed(width)
    values = 20 * torch.randn(24, width)
    together = softplus_rows(values)
    for count in range(1, 24):
        assert torch.equal(softplus_rows(values[-count:]), together[-count:])
    torch.testing.assert_close(together, F.softplus(values))
