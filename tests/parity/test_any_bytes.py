"""No byte string makes the embedded model produce anything but finite numbers."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from model.tokenizer import DOCUMENT

MODEL = load_checkpoint(EMBEDDED_CHECKPOINT)
RATES = (0.02, 0.5, 1.0)

repeats = st.builds(lambda part, times: (part * times)[:900], st.binary(min_size=1, max_size=9), st.integers(1, 900))


@settings(max_examples=20)
@given(text=st.one_of(st.binary(max_size=900), repeats), rate=st.sampled_from(RATES))
@example(text=b"", rate=0.5)
@example(text=bytes(900), rate=0.5)
@example(text=b"\xff" * 900, rate=0.02)
@example(text=bytes(range(256)) * 3, rate=0.5)
def test_every_number_stays_finite(path: str, text: bytes, rate: float) -> None:
    tokens = torch.tensor([[DOCUMENT, *text]])
    state = MODEL.allocate_state(1)
    for piece in tokens.split(MODEL.config.block_size, dim=1):
        logits = MODEL.prefill(piece, state, rate, score=True).logits
        assert logits.isfinite().all()
    rates = torch.tensor([rate], dtype=torch.float64)
    for column in tokens[:, :20].unbind(1):
        assert MODEL.step(column, state, rates).logits.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in state.tensors())
    density = MODEL.analyse(tokens)
    assert density.isfinite().all()
    assert (density > 0).all()
