"""No budget may score random bytes under eight bits: that would be reading the future."""

from __future__ import annotations

import random

from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from model.evaluation.strict import StrictEvaluation


def test_uniformly_random_bytes_cost_at_least_eight_bits(path: str) -> None:
    model = load_checkpoint(EMBEDDED_CHECKPOINT)
    evaluation = StrictEvaluation(model, [1.0, 0.7, 0.5, 0.3, model.cost.floor])
    evaluation.add(random.Random(0).randbytes(6000))
    assert all(score.bits_per_byte >= 8.0 for score in evaluation.scores)
    assert all(score.bytes == 6000 for score in evaluation.scores)
