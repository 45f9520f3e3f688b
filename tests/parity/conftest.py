from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.model.shapes import without_compiled_code


@pytest.fixture(scope="module", params=["compiled", "plain"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both implementations of a pass and a step: the compiled loops of a CPU, and what other devices run."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        if request.param == "plain":
            without_compiled_code(patch)
        yield request.param
