"""Runs the model for a batch. The only place where the engine and torch meet."""

from __future__ import annotations

import torch

from model.cost import CostModel, Flops
from model.lm import AdaptiveAttentionSystem
from service.engine.sampling import sample
from service.engine.sequence import Outcome, Sequence
from service.engine.state_pool import StatePool


class ModelRunner:
    """A model and the states of the sequences that it is running. For one thread."""

    def __init__(self, model: AdaptiveAttentionSystem) -> None:
        model.config.require_bytes()
        self._model = model
        self.pool = StatePool(model)

    @property
    def name(self) -> str:
        """Of the model."""
        return self._model.config.name

    @property
    def cost(self) -> CostModel:
        """What the model costs."""
        return self._model.cost

    @property
    def state_bytes(self) -> int:
        """Bytes of all states held."""
        return self.pool.nbytes

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run both paths once, so that compiling and first allocations do not fall on the first request."""
        state = self._model.allocate_state(1)
        tokens = torch.zeros(1, self._model.config.block_size, dtype=torch.int64, device=self._model.device)
        self._model.prefill(tokens, state, 0.5)
        self._model.step(tokens[:, 0], state, torch.tensor([0.5], dtype=torch.float64, device=self._model.device))

    @torch.inference_mode()
    def prefill(self, sequence: Sequence) -> Outcome:
        """Read the next block of a prompt; after the last one, choose the first token."""
        assert sequence.slot is not None, "a running sequence has a slot"
        piece = sequence.prompt[sequence.read : sequence.read + self._model.config.block_size]
        tokens = torch.tensor([piece], device=self._model.device)
        last = sequence.read + len(piece) == len(sequence.prompt)
        rate = sequence.grant.rates.prefill
        output = self._model.prefill(tokens, self.pool.alone(sequence.slot), rate, predict=last)
        return Outcome(
            positions=len(piece),
            flops=self._flops(len(piece), len(output.tile_ends), int(last), rate),
            full_flops=self.cost.full_flops(len(piece), int(last)),
            tile_ends=output.tile_ends,
            token=None if output.logits is None else sample(output.logits.unsqueeze(0), [sequence])[0],
        )

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> list[Outcome]:
        """Read each sequence's last token and choose the next; the trunk runs only for those that fire."""
        device = self._model.device
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        tokens = torch.tensor([sequence.last_token for sequence in sequences], device=device)
        rates = [sequence.grant.rates.decode for sequence in sequences]
        output = self._model.step(
            tokens, self.pool.batch(slots), torch.tensor(rates, dtype=torch.float64, device=device)
        )
        chosen = sample(output.logits, sequences)
        return [
            Outcome(
                positions=1,
                flops=self._flops(1, int(fired), 1, rate),
                full_flops=self.cost.full_flops(1, 1),
                tile_ends=[0] if fired else [],
                token=token,
            )
            for token, fired, rate in zip(chosen, output.fired.tolist(), rates, strict=True)
        ]

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Drop the state of a sequence that ended."""
        self.pool.release(slot)

    def check_integrity(self, slots: set[int]) -> None:
        """Assert that states are held for these slots only, and are in order."""
        self.pool.check_integrity()
        assert self.pool.held <= slots

    def _flops(self, positions: int, tiles: int, logits: int, rate: float) -> Flops:
        return self.cost.flops(positions, tiles, logits, positions if self.cost.analysed(rate) else 0)
