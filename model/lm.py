"""The assembled language model: encoder -> density -> tiles -> trunk -> hold -> decoder -> head.

Source: ``AdaptiveAttentionSystem``, section 4.1 of the source document. At a fire rate of 1 the trunk reads every byte
and the model is a plain stack of Mamba-2 blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adaptive.controller import advance, fire_step
from model.adaptive.density import InformationDensityAnalyzer
from model.adaptive.router import CrossScaleRouter
from model.adaptive.tiling import Pace, TileManager
from model.config import ModelConfig
from model.cost import CostModel
from model.layers.mamba2 import AdaptiveMambaBlock
from model.layers.norm import RMSNorm
from model.ops.rows import linear_rows
from model.ops.ssd import ScanTrace
from model.ops.tiling import Bytes
from model.state import BlockState, ModelState, RouterState


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the encoder made of L positions."""

    hidden: Tensor
    """[B, L, d_model]."""
    states: tuple[BlockState, ...]
    trace: ScanTrace
    """Of the last block."""


@dataclass(frozen=True, slots=True)
class PrefillOutput:
    """Result of reading a piece of prompt."""

    logits: Tensor | None
    """[V] after the last token, [L, V] after each where the piece is scored; None where no prediction was asked for."""
    tile_ends: list[int]
    """Offsets in the piece at which the trunk fired."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Result of reading one token per sequence."""

    logits: Tensor
    """[B, V]."""
    fired: Tensor
    """[B] bool: the trunk ran."""


class AdaptiveAttentionSystem(nn.Module):
    """A byte-level Mamba-2 language model whose trunk runs once per tile."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.cost = CostModel(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)

        def blocks(count: int, width: int, *, variable: bool = False) -> nn.ModuleList:
            return nn.ModuleList(AdaptiveMambaBlock(width, config, variable=variable) for _ in range(count))

        self.encoder = blocks(config.encoder_layers, config.d_model)
        self.trunk = blocks(config.trunk_layers, config.d_trunk, variable=True)
        self.decoder = blocks(config.decoder_layers, config.d_model)
        self.density = InformationDensityAnalyzer(config)
        self.tiles = TileManager(config)
        self.router = CrossScaleRouter(config)
        self.exit_norm = RMSNorm(config.d_model, config.norm_eps)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def allocate_state(self, batch: int, *, d_state: int | None = None) -> ModelState:
        """The state of ``batch`` sequences that have read nothing, the trunk's at ``d_state`` columns (default all)."""
        device = self.device

        def zeros(blocks: Iterable[nn.Module]) -> tuple[BlockState, ...]:
            return tuple(block.mixer.zero_state(batch, device) for block in _blocks(blocks))

        trunk = zeros(self.trunk)
        if d_state is not None:
            mixers = (block.mixer for block in _blocks(self.trunk))
            trunk = tuple(m.resize_state_space(s, d_state) for m, s in zip(mixers, trunk, strict=True))
        counters = [torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(3)]
        quota = torch.zeros(batch, dtype=torch.float64, device=device)
        held = torch.zeros(batch, self.config.d_model, device=device)
        return ModelState(
            encoder=zeros(self.encoder),
            trunk=trunk,
            decoder=zeros(self.decoder),
            density=self.density.zero_state(batch, device),
            router=RouterState(held, counters[0], counters[1], quota, counters[2]),
        )

    def encode(self, tokens: Tensor, states: tuple[BlockState, ...]) -> Encoded:
        """Run the encoder over tokens [B, L] from ``states`` (not changed)."""
        hidden, after, trace = _run(self.encoder, self.embedding(tokens), states)
        assert trace is not None, "the encoder has at least one block"
        return Encoded(hidden, after, trace)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of decoder outputs [..., d_model]; the weights are the embedding's."""
        return F.linear(self.final_norm(hidden), self.embedding.weight)

    def exit_head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the early exit, from encoder outputs [..., d_model]."""
        return F.linear(self.exit_norm(hidden), self.embedding.weight)

    def combine(self, encoded: Encoded, fires: Tensor | None, state: ModelState) -> Tensor:
        """Trunk, hold and decoder over L positions.

        Args:
            encoded: of the same positions. fires: [B, L] bool, None for every position.
            state: before them; its trunk, decoder and router rows are replaced by those after them. For rows with
                different numbers of fires the trunk rows are not valid afterwards (B > 1 serves training).

        Returns:
            [B, L, d_model] decoder outputs.
        """
        router, hidden = state.router, encoded.hidden
        length = hidden.shape[1]
        offsets = torch.arange(1, length + 1, device=hidden.device)
        position = router.positions.unsqueeze(1) + offsets  # [B, L], the first byte is 1
        if fires is None:
            update, state.trunk = self._run_trunk(hidden, None, state.trunk)
            spread, router.held, last = update, update[:, -1], position
            router.fires = router.fires + length
        else:
            count = fires.sum(1)
            most = int(count.max())
            index = torch.argsort((~fires).to(torch.int8), dim=1, stable=True)[:, :most]  # [B, K]
            at = position.gather(1, index)
            stretch = torch.diff(at, dim=1, prepend=router.last_fire.unsqueeze(1)).clamp_min(1)
            updates = router.held.unsqueeze(1)
            if most:
                selected = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
                update, state.trunk = self._run_trunk(selected, stretch.to(hidden.dtype), state.trunk)
                updates = torch.cat([updates, update], dim=1)  # [B, 1 + K, d_model]
            slot = fires.cumsum(1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            last = torch.where(fires, position, 0).cummax(1).values.maximum(router.last_fire.unsqueeze(1))
            router.held = updates[torch.arange(len(count), device=count.device), count]
            spread = self.router.fade(updates.gather(1, slot), position - last)
            router.fires = router.fires + count
        # Copies: the two are advanced in place, and are the same tensor where every position fires.
        router.last_fire, router.positions = last[:, -1].clone(), position[:, -1].clone()
        output, state.decoder, _ = _run(self.decoder, hidden + spread, state.decoder)
        return output

    def _run_trunk(
        self, selected: Tensor, stretch: Tensor | None, states: tuple[BlockState, ...]
    ) -> tuple[Tensor, tuple[BlockState, ...]]:
        """The trunk's update at outer width [B, K, d_model] for selected encoder outputs [B, K, d_model]."""
        entered = self.router.to_trunk(selected)
        left, after, _ = _run(self.trunk, entered, states, stretch)
        return self.router.from_trunk(left - entered), after

    def forward(self, tokens: Tensor, fires: Tensor | None = None, *, d_state: int | None = None) -> Tensor:
        """Logits [B, L, V] of whole sequences.

        Args:
            tokens: [B, L] int64. fires: [B, L] bool, where the trunk runs; None for everywhere.
            d_state: state size of the trunk, one of the levels.
        """
        state = self.allocate_state(len(tokens), d_state=d_state)
        encoded = self.encode(tokens, state.encoder)
        return self.head(self.combine(encoded, fires, state))

    @torch.inference_mode()
    def analyse(self, tokens: Tensor) -> Tensor:
        """Density [B, L] in bits of whole sequences [B, L]."""
        state = self.allocate_state(len(tokens))
        encoded = self.encode(tokens, state.encoder)
        features, _ = self.density(self.exit_head(encoded.hidden), encoded.trace, state.density)
        return self.density.combine(features)

    @torch.inference_mode()
    def prefill(
        self, tokens: Tensor, state: ModelState, rate: float, *, predict: bool = True, score: bool = False
    ) -> PrefillOutput:
        """Read a piece of one prompt, its tiles planned by the dynamic programme.

        Args:
            tokens: [1, L], at most ``block_size``; every piece of a prompt but the last has exactly that length.
            state: of one sequence, replaced by the state after the piece.
            rate: trunk fires per byte, 0 to 1. predict: whether the head runs; only a prompt's last piece needs it.
            score: the head runs at every position, and the trunk fires by the causal rule instead of the plan, which
                looks ahead inside the piece: the protocol of :mod:`model.evaluation.strict`.
        """
        assert tokens.shape[0] == 1, "prompts are read one by one"
        assert 0 < tokens.shape[1] <= self.config.block_size
        encoded = self.encode(tokens, state.encoder)
        state.encoder = encoded.states
        plan = self._plan(encoded, state, rate, causal=score)
        quota = state.router.quota + rate * tokens.shape[1]
        fires = torch.from_numpy(plan.astype(bool)).to(tokens.device).unsqueeze(0)
        output = self.combine(encoded, None if rate >= 1.0 else fires, state)
        state.router.quota = quota
        logits = None
        if predict or score:
            logits = self.head(output if score else output[:, -1])[0]
        return PrefillOutput(logits, np.flatnonzero(plan).tolist())

    def _plan(self, encoded: Encoded, state: ModelState, rate: float, *, causal: bool) -> Bytes:
        """Fires of one block of one sequence; analyses it where the rate leaves a choice."""
        if not self.cost.analysed(rate):
            return np.full(encoded.hidden.shape[1], int(rate >= 1.0), np.uint8)
        features, state.density = self.density(self.exit_head(encoded.hidden), encoded.trace, state.density)
        density = self.density.combine(features)[0].double().cpu().numpy()
        router = state.router
        position, last_fire, fires = (int(count) for count in (router.positions, router.last_fire, router.fires))
        pace = Pace(position, last_fire, fires, router.quota.item())
        return self.tiles.online(density, rate, pace) if causal else self.tiles.plan(density, rate, pace)

    @torch.inference_mode()
    def step(self, tokens: Tensor, state: ModelState, rates: Tensor) -> StepOutput:
        """Read one token per sequence, the trunk only for those that fire.

        Args:
            tokens: [B]. state: of B sequences, replaced by the state after the token.
            rates: [B] float64 fires per byte, 0 to 1; sequences of all rates mix, and none changes another's logits.
        """
        hidden, state.encoder, trace = _step(self.encoder, self.embedding(tokens), state.encoder)
        assert trace is not None, "the encoder has at least one block"
        fired = self._fire(hidden, trace, state, rates)
        router = state.router
        age = router.positions + 1 - router.last_fire
        if bool(fired.any()):
            self._step_trunk(hidden, state, fired, age)
        advance(router, fired, rates)
        spread = self.router.fade(router.held, router.positions - router.last_fire)
        output, state.decoder, _ = _step(self.decoder, hidden + spread, state.decoder)
        return StepOutput(linear_rows(self.final_norm(output), self.embedding.weight), fired)

    def _fire(self, hidden: Tensor, trace: ScanTrace, state: ModelState, rates: Tensor) -> Tensor:
        """[B] bool: which sequences fire. Only those whose rate leaves a choice are analysed."""
        chosen = (rates > 0.0) & (rates < 1.0)
        fired = rates >= 1.0
        index = chosen.nonzero().squeeze(-1)
        if not len(index):
            return fired
        exit_logits = linear_rows(self.exit_norm(hidden[index]), self.embedding.weight)
        decide = self._decide if hidden.is_cuda else self._decide_compiled
        fired[index] = decide(exit_logits, trace, state, rates, index)
        return fired

    def _decide(self, exit_logits: Tensor, trace: ScanTrace, state: ModelState, rates: Tensor, index: Tensor) -> Tensor:
        """Whether the rows ``index`` [n] fire [n]; their density state is advanced. ``exit_logits``: [n, V]."""
        part = ScanTrace(
            trace.x[index], trace.dt[index], trace.A, trace.B[index], trace.C[index], trace.before[index],
            trace.after[index],
        )  # fmt: skip
        features, after = self.density.step(exit_logits, part, state.density.gather(index))
        state.density.scatter_(index, after)
        return fire_step(
            self.density.combine(features), rates[index], self.tiles.log_threshold(rates[index]), self.tiles.tau,
            state.router.gather(index), (self.config.min_tile_size, self.config.max_tile_size),
        )  # fmt: skip

    def _decide_compiled(
        self, exit_logits: Tensor, trace: ScanTrace, state: ModelState, rates: Tensor, index: Tensor
    ) -> Tensor:
        """The same on a CPU, compiled."""
        density = self.density.step_rows(exit_logits, trace, state.density, index)
        return self.tiles.fire_rows(density, rates, state.router, index)

    def _step_trunk(self, hidden: Tensor, state: ModelState, fired: Tensor, age: Tensor) -> None:
        """Run the trunk for the rows that fire, and hold its update."""
        index = fired.nonzero().squeeze(-1)
        entered = hidden[index]
        if self.router.down is not None:
            entered = linear_rows(entered, self.router.down.weight)
        rows = tuple(block.gather(index) for block in state.trunk)
        left, after, _ = _step(self.trunk, entered, rows, age[index].to(hidden.dtype))
        update = left - entered
        if self.router.up is not None:
            update = linear_rows(update, self.router.up.weight)
        for block, new in zip(state.trunk, after, strict=True):
            block.scatter_(index, new)
        state.router.held.index_copy_(0, index, update)


def _blocks(modules: Iterable[nn.Module]) -> Iterable[AdaptiveMambaBlock]:
    for module in modules:
        assert isinstance(module, AdaptiveMambaBlock)
        yield module


def _run(
    blocks: nn.ModuleList, hidden: Tensor, states: tuple[BlockState, ...], stretch: Tensor | None = None
) -> tuple[Tensor, tuple[BlockState, ...], ScanTrace | None]:
    """A stack of residual blocks over [B, L, D]; the states after, and the last block's trace."""
    after, trace = [], None
    for block, state in zip(blocks, states, strict=True):
        update, new, trace = block(hidden, state, stretch)
        hidden = hidden + update
        after.append(new)
    return hidden, tuple(after), trace


def _step(
    blocks: nn.ModuleList, hidden: Tensor, states: tuple[BlockState, ...], stretch: Tensor | None = None
) -> tuple[Tensor, tuple[BlockState, ...], ScanTrace | None]:
    """A stack of residual blocks over one position [B, D]; otherwise as :func:`_run`."""
    after, trace = [], None
    for block, state in zip(_blocks(blocks), states, strict=True):
        update, new, trace = block.step(hidden, state, stretch)
        hidden = hidden + update
        after.append(new)
    return hidden, tuple(after), trace
