"""Sequences that share a pass or a batch neither see each other nor their padding nor their order."""

from __future__ import annotations

import pytest
import torch

from model.lm import AdaptiveAttentionSystem
from model.state import ModelState
from tests.model.shapes import PROPAGATING, random_model, random_tokens

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
SKIPS, PROPAGATES = random_model(), random_model(PROPAGATING)
MODELS = pytest.mark.parametrize("model", [SKIPS, PROPAGATES], ids=["skips", "propagates"])
RATES = (0.0, 0.03, 0.2, 0.5, 0.9, 1.0)


def packed(
    model: AdaptiveAttentionSystem, tokens: torch.Tensor, fires: torch.Tensor, state: ModelState
) -> torch.Tensor:
    encoded = model.encode(tokens, state.encoder)
    state.encoder = encoded.states
    return model.head(model.combine(encoded.hidden, fires, state))


def assert_same_rows(state: ModelState, row: int, alone: ModelState) -> None:
    for shared, own in zip(state.gather(torch.tensor([row])).tensors(), alone.tensors(), strict=True):
        torch.testing.assert_close(shared, own, **CLOSE)


def drawn_fires(length: int) -> torch.Tensor:
    random = torch.rand(len(RATES), length, generator=torch.Generator().manual_seed(3))
    return random < torch.tensor(RATES).unsqueeze(1)


@MODELS
def test_padding_of_rows_with_fewer_tiles_leaves_them_as_they_are_alone(
    path: str, model: AdaptiveAttentionSystem
) -> None:
    """Two calls: what padding did to a state would show in the second."""
    tokens, fires, state = random_tokens(len(RATES), 130), drawn_fires(130), model.allocate_state(len(RATES))
    assert len(set(fires.sum(1).tolist())) == len(RATES)
    parts = (slice(0, 70), slice(70, 130))
    together = torch.cat([packed(model, tokens[:, part], fires[:, part], state) for part in parts], 1)
    for row in range(len(RATES)):
        alone, here = model.allocate_state(1), slice(row, row + 1)
        logits = torch.cat([packed(model, tokens[here, part], fires[here, part], alone) for part in parts], 1)
        torch.testing.assert_close(together[here], logits, **CLOSE)
        assert_same_rows(state, row, alone)


@MODELS
def test_the_order_of_rows_in_a_pass_changes_nothing(path: str, model: AdaptiveAttentionSystem) -> None:
    tokens, fires, order = random_tokens(len(RATES), 90), drawn_fires(90), torch.tensor([4, 2, 0, 5, 1, 3])
    expected = packed(model, tokens, fires, model.allocate_state(len(RATES)))
    shuffled = packed(model, tokens[order], fires[order], model.allocate_state(len(RATES)))
    torch.testing.assert_close(shuffled, expected[order], **CLOSE)


@MODELS
@pytest.mark.parametrize("arrivals", [(0, 0, 0, 0), (0, 5, 20, 40), (40, 20, 5, 0), (7, 0, 30, 7)])
def test_requests_that_come_and_go_in_any_order_read_as_they_do_alone(
    path: str, model: AdaptiveAttentionSystem, arrivals: tuple[int, ...]
) -> None:
    """Each request reads 40 bytes in steps, from its arrival on, in one batch with whoever is there."""
    rates = torch.tensor([1.0, 0.5, 0.1, 0.9], dtype=torch.float64)
    tokens, waiting = random_tokens(4, 40), sorted(range(4), key=lambda row: arrivals[row])
    alone, logits = [], [[] for _ in range(4)]
    for row in range(4):
        state = model.allocate_state(1)
        alone.append([model.step(tokens[row, t : t + 1], state, rates[row : row + 1]).logits[0] for t in range(40)])
    running: list[int] = []
    batch: ModelState | None = None
    for now in range(80):
        stay = [index for index, row in enumerate(running) if now < arrivals[row] + 40]
        kept = [] if batch is None else [batch.gather(torch.tensor(stay, dtype=torch.int64))]
        running = [running[index] for index in stay]
        while waiting and arrivals[waiting[0]] == now:
            running.append(waiting.pop(0))
            kept.append(model.allocate_state(1))
        batch = ModelState.concatenate(kept)
        if running:
            column = torch.stack([tokens[row, now - arrivals[row]] for row in running])
            output = model.step(column, batch, rates[running])
            for row, row_logits in zip(running, output.logits, strict=True):
                logits[row].append(row_logits)
    for row in range(4):
        torch.testing.assert_close(torch.stack(logits[row]), torch.stack(alone[row]), **CLOSE)
