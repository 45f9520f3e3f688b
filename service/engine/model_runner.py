"""Runs the model for a batch. The only place where the engine and torch meet."""

from __future__ import annotations

import torch
from torch import Tensor

from model.cost import CostModel, Flops
from model.evaluation.tilings import TilingPlan, analyse_piece
from model.lm import AdaptiveAttentionSystem
from model.state import ModelState
from service.engine.sampling import sample, score
from service.engine.sequence import Outcome, Sequence, TokenScore
from service.engine.state_pool import StatePool


class ModelRunner:
    """A model and the states of the sequences that it is running. For one thread."""

    def __init__(self, model: AdaptiveAttentionSystem) -> None:
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
        """Read the next block of a prompt; after the last one, choose the first token if one is wanted."""
        assert sequence.slot is not None, "a running sequence has a slot"
        end = sequence.read + self._model.config.block_size
        piece = sequence.prompt[sequence.read : end]
        tokens = torch.tensor([piece], device=self._model.device)
        state = self.pool.alone(sequence.slot)
        if sequence.plans is not None:
            return self._analyse(tokens, state, sequence.plans)
        params, rate = sequence.params, sequence.prompt_rate
        predict = end >= len(sequence.prompt) and params.max_tokens > 0
        output = self._model.prefill(tokens, state, rate, predict=predict, score=params.score_prompt)
        heads = len(piece) if params.score_prompt else int(predict)
        logits = None if output.logits is None else output.logits.view(heads, -1)
        token = sample(logits[-1:], [sequence])[0] if logits is not None and predict else None
        following = sequence.prompt[sequence.read + 1 : end + 1] if params.score_prompt else []
        return Outcome(
            positions=len(piece),
            flops=self._flops(len(piece), len(output.tile_ends), heads, rate),
            full_flops=self.cost.full_flops(len(piece), heads),
            tile_ends=output.tile_ends,
            token=token,
            scores=self._score(logits, [*following, *([] if token is None else [token])], params.logprobs),
        )

    @staticmethod
    def _score(logits: Tensor | None, following: list[int], count: int | None) -> list[TokenScore]:
        """Scores of the tokens that follow the first positions of ``logits`` [L, V], if they are asked for."""
        if logits is None or count is None:
            return []
        return score(logits[: len(following)], following, [count] * len(following))

    def _analyse(self, tokens: Tensor, state: ModelState, plans: tuple[TilingPlan, ...]) -> Outcome:
        """Encoder and density of a block, and its tiles under each plan."""
        positions = tokens.shape[1]
        unit = self.cost.unit
        flops = Flops(encoder=positions * unit.encoder, density=positions * unit.density)
        # This work has no resolution to save at: what it costs is its full cost.
        return Outcome(positions, flops, flops.total, analysis=analyse_piece(self._model, tokens, state, plans))

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
        scores = self._score_rows(output.logits, chosen, sequences)
        return [
            Outcome(
                positions=1,
                flops=self._flops(1, int(fired), 1, rate),
                full_flops=self.cost.full_flops(1, 1),
                tile_ends=[0] if fired else [],
                token=token,
                scores=scores.get(row, []),
            )
            for row, (token, fired, rate) in enumerate(zip(chosen, output.fired.tolist(), rates, strict=True))
        ]

    @staticmethod
    def _score_rows(logits: Tensor, chosen: list[int], sequences: list[Sequence]) -> dict[int, list[TokenScore]]:
        """Scores of the chosen tokens, by row, where they are asked for."""
        wanted = [(row, s.params.logprobs) for row, s in enumerate(sequences) if s.params.logprobs is not None]
        if not wanted:
            return {}
        rows = [row for row, _ in wanted]
        scored = score(logits[rows], [chosen[row] for row in rows], [count for _, count in wanted])
        return {row: [one] for row, one in zip(rows, scored, strict=True)}

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
