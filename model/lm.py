"""The assembled language model: encoder -> density -> tiles -> trunk -> hold -> decoder -> head.

Source: ``AdaptiveAttentionSystem``, section 4.1 of the source document. At a fire rate of 1 the trunk reads every byte
and the model is a plain stack of Mamba-2 blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.adaptive.density import InformationDensityAnalyzer
from model.adaptive.router import CrossScaleRouter
from model.adaptive.tiling import Pace, TileManager, accrue
from model.config import ModelConfig
from model.cost import CostModel
from model.decoding import CODES_KEPT, StepOutput, SystemViews, make_views, read_codes, step_compiled, step_plain
from model.layers.compiled import read_stack
from model.layers.mamba2 import AdaptiveMambaBlock
from model.layers.norm import RMSNorm
from model.layers.propagation import Propagated
from model.ops.parallel import own_threads
from model.ops.recurrent import compiled
from model.ops.rows import take_rows
from model.ops.ssd import ScanTrace
from model.ops.tiling import Bytes
from model.ops.views import Viewed
from model.state import BlockState, DensityState, ModelState, RouterState

ALL = slice(None)

Run = tuple[int, int, int | None]
"""A run of positions: its start and end, and the size to which the trunk's state is brought before it, if any."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the encoder made of L positions."""

    hidden: Tensor
    """[B, L, d_model]."""
    states: tuple[BlockState, ...]
    trace: ScanTrace | None
    """Of the last block, if the density measures anything."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """What a stage of the trunk is given at L positions."""

    stage: int
    hidden: Tensor
    """[B, L, d_model] encoder outputs, and what the stages below have added to them."""
    inputs: Tensor
    """[B, L, d_trunk] what the stages below have left in the trunk; for the first, encoder outputs [B, L, d_model]."""


@dataclass(frozen=True, slots=True)
class PrefillOutput:
    """Result of reading a piece of prompt."""

    logits: Tensor | None
    """[V] after the last token, [L, V] after each where the piece is scored; None where no prediction was asked for."""
    tile_ends: list[int]
    """Offsets in the piece at which the trunk fired."""


class AdaptiveAttentionSystem(Viewed[SystemViews]):
    """A byte-level Mamba-2 language model whose trunk runs once per tile."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.cost = CostModel(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if not config.tied_head:
            self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
            nn.init.normal_(self.output.weight, std=0.02)

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
        later = config.shallow_depths
        self.later_density = nn.ModuleList(InformationDensityAnalyzer(config, config.d_trunk) for _ in later)
        self.later_tiles = nn.ModuleList(TileManager(config) for _ in later)
        # Copies: a decoder more changes the first value of no other weight.
        self.later_decoders = nn.ModuleList(deepcopy(self.decoder) for _ in later if config.own_decoders)
        self.gradient_checkpointing = False
        """Whether a pass that will be differentiated keeps only what goes in and out of each block."""

    def _make_views(self) -> SystemViews:
        return make_views(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def head_weight(self) -> Tensor:
        """[V, d_model] of both heads."""
        return self.embedding.weight if self.config.tied_head else self.output.weight

    def placement(self, depth: int | None = None) -> tuple[InformationDensityAnalyzer, TileManager]:
        """What places the stage that ends after ``depth`` blocks; None for the last."""
        return self.placements()[self.config.stage(depth)]

    def placements(self) -> list[tuple[InformationDensityAnalyzer, TileManager]]:
        """What places each stage of the trunk."""
        later = zip(self.later_density, self.later_tiles, strict=True)
        return [(self.density, self.tiles), *cast("list[tuple[InformationDensityAnalyzer, TileManager]]", list(later))]

    def decoders(self) -> list[nn.ModuleList]:
        """What reads the sum of what the stages add: one for all sequences, or one for each stage that is placed."""
        return [self.decoder, *cast("list[nn.ModuleList]", list(self.later_decoders))]

    def _decoder(self, stage: int) -> nn.ModuleList:
        """The blocks that follow where ``stage`` is placed."""
        return self.decoders()[stage if self.config.own_decoders else 0]

    def allocate_state(self, batch: int, *, d_state: int | None = None, depth: int | None = None) -> ModelState:
        """The state of ``batch`` sequences that have read nothing, the trunk's at ``d_state`` columns (default all).

        Its first ``depth`` blocks run (default all).
        """
        device = self.device

        def zeros(blocks: nn.ModuleList) -> tuple[BlockState, ...]:
            return tuple(block.mixer.zero_state(batch, device) for block in _blocks(blocks))

        counters = [torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(4)]
        quota = torch.zeros(batch, dtype=torch.float64, device=device)
        held = torch.zeros(batch, self.config.d_model, device=device)
        codes = torch.zeros(batch, CODES_KEPT, self.config.propagation_rank, device=device)
        state = ModelState(
            encoder=zeros(self.encoder),
            trunk=zeros(self.trunk),
            decoder=zeros(self.decoder),
            density=self.density.zero_state(batch, device),
            router=RouterState(held, counters[0], counters[1], quota, counters[2], codes, counters[3]),
            columns=torch.full((batch,), self.config.d_state, dtype=torch.int64, device=device),
            depth=torch.full((batch,), self.config.trunk_layers, dtype=torch.int64, device=device),
        )
        if depth is not None:
            self.set_depth(state, depth)
        if d_state is not None:
            self.resize_state_space(state, d_state)
        return state

    def resize_state_space(self, state: ModelState, d_state: int | Tensor, part: slice = ALL) -> None:
        """Run the trunk at ``d_state`` columns from here on (one size, or one per sequence [B]); routes live states.

        ``part`` are the blocks whose states are routed: whoever leaves some out routes them with another call.

        The tensors are as wide as the widest row needs. Bytes that the states have still to read may go on waiting: to
        read is linear in a state, with the same decay in all columns, and only columns of every size are written.

        Raises:
            ValueError: a size is not one of the levels.
        """
        columns = torch.as_tensor(d_state, device=state.columns.device).expand(len(state.columns))
        trunk = list(state.trunk)
        trunk[part] = [
            BlockState(block.conv_state, self.router.route_states(block.ssm_state, columns)) for block in trunk[part]
        ]
        state.trunk = tuple(trunk)
        state.columns = columns.clone()

    def set_depth(self, state: ModelState, depth: int) -> None:
        """Run ``depth`` blocks of the trunk from here on, in every row; bytes that wait are read as before.

        Blocks that did not run have read nothing: they go on from where they stood. What was held, when the trunk last
        fired, what was smoothed, and the states of decoders where each stage has its own are another stage's: unless
        all rows are there already, they begin anew.

        Raises:
            ValueError: the depth is not one of the model's.
        """
        if depth not in self.config.depths:
            raise ValueError(f"depth = {depth} must be one of {self.config.depths}")
        if bool((state.depth == depth).all()):
            return
        self.settle(state)
        state.depth = torch.full_like(state.depth, depth)
        state.density = self.density.zero_state(len(state.depth), self.device)
        router, held = state.router, torch.zeros_like(state.router.held)
        state.router = replace(router, held=held, last_fire=torch.zeros_like(router.last_fire))
        if self.config.own_decoders:
            state.decoder = tuple(block.map(torch.zeros_like) for block in state.decoder)

    def set_least_rates(self, rates: Sequence[float]) -> None:
        """Place each stage after the first from so many fires per byte on: ``least_rates`` of the config."""
        self.config = ModelConfig.model_validate(self.config.model_dump() | {"least_rates": tuple(rates)})
        self.cost = CostModel(self.config)

    def settle(self, state: ModelState) -> None:
        """Let the trunk's states read what they have put off, so that they are up to date; replaces them if need be."""
        waiting = state.router.waiting
        if waiting.device.type == "cpu" and bool(waiting.any()):  # elsewhere nothing ever waits
            state.trunk = tuple(block.map(Tensor.clone) for block in state.trunk)
            state.router = replace(state.router, waiting=waiting.clone())
            read_codes(self, state)

    def encode(self, tokens: Tensor, states: tuple[BlockState, ...]) -> Encoded:
        """Run the encoder over tokens [B, L] from ``states`` (not changed)."""
        traced = self.density.measured
        hidden, after, trace = self._run(self.encoder, self.embedding(tokens), states, traced=traced)
        return Encoded(hidden, after, trace if traced else None)

    def features(
        self, encoded: Encoded, state: DensityState, entrance: Entrance | None = None
    ) -> tuple[Tensor, DensityState]:
        """Density features [B, L, 5] of what was encoded from ``state`` on (not changed), and the state after it.

        ``entrance``: of the stage whose density it is; None for the first.
        """
        if entrance is not None and entrance.stage:
            analyzer, _ = self.placements()[entrance.stage]
            return cast(tuple[Tensor, DensityState], analyzer(entrance.inputs, None, None, state))
        exit_logits = self.exit_head(encoded.hidden) if self.density.measured else None
        return cast(tuple[Tensor, DensityState], self.density(encoded.hidden, exit_logits, encoded.trace, state))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of decoder outputs [..., d_model]."""
        return F.linear(self.final_norm(hidden), self.head_weight)

    def exit_head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the early exit, from encoder outputs [..., d_model]."""
        return F.linear(self.exit_norm(hidden), self.head_weight)

    def enter(self, hidden: Tensor, state: ModelState) -> list[Entrance]:
        """What each stage is given, up to the one that ``state.depth`` says; those below it run at every position.

        Args:
            hidden: [B, L, d_model] encoder outputs. state: before them, all rows at one depth; of its trunk the rows
                of the stages below are replaced by those after.
        """
        entrances, start = [Entrance(0, hidden, hidden)], 0
        for stage, end in enumerate(self.config.depths[: self.config.stage(_depth(state))]):
            below = entrances[-1]
            inputs = below.inputs if stage else self.router.to_trunk(hidden).to(hidden.dtype)
            left = self._run_trunk(inputs, None, None, state, slice(start, end))
            update = self.router.from_trunk(left - inputs, stage).to(hidden.dtype)
            entrances.append(Entrance(stage + 1, below.hidden + update, left))
            start = end
        return entrances

    def combine(
        self,
        hidden: Tensor,
        fires: Tensor | None,
        state: ModelState,
        *,
        propagate: bool = True,
        entrance: Entrance | None = None,
    ) -> Tensor:
        """Trunk, hold and decoder over L positions.

        Args:
            hidden: [B, L, d_model] encoder outputs. fires: [B, L] bool, where the stage runs at which the trunk ends,
                None for every position; stages below it run at all of them.
            state: before them, all rows at one depth; its trunk, decoder and router rows are replaced by those after.
            propagate: whether the states of the stage read the bytes between fires, if this model can: at the floor,
                where no fire will ever look at them, they do not.
            entrance: what the stage is given, where :meth:`enter` has said it; None to ask it here.

        Returns:
            [B, L, d_model] decoder outputs.
        """
        self.settle(state)
        given = self.enter(hidden, state)[-1] if entrance is None else entrance
        router, propagates = state.router, self.router.code is not None
        if fires is None and (propagates or bool((router.last_fire == router.positions).all())):
            spread = self._run_stage(given.inputs, given.stage, None, None, state)
            self.router.take(spread, router)
        else:
            fires = torch.ones_like(hidden[..., 0], dtype=torch.bool) if fires is None else fires
            count = fires.sum(1)
            most = int(count.max())
            places = torch.argsort((~fires).to(torch.int8), dim=1, stable=True)[:, :most]  # [B, K]
            propagated = stretch = None
            if not propagates:
                at = router.positions.unsqueeze(1) + places + 1  # the first byte is 1
                stretch = torch.diff(at, dim=1, prepend=router.last_fire.unsqueeze(1)).clamp_min(1).to(hidden.dtype)
            elif propagate:
                propagated = Propagated(self.router.propagated(given.inputs, given.stage), fires, places)
            selected = take_rows(given.inputs, places)
            if most or propagated is not None:
                lengths = None if bool((count == most).all()) else count
                updates = self._run_stage(selected, given.stage, stretch, lengths, state, propagated)
            else:
                updates = hidden[:, :0]
            spread = self.router.hold(updates, fires, router)
        output, state.decoder, _ = self._run(self._decoder(given.stage), given.hidden + spread, state.decoder)
        return output

    def combine_everywhere(self, hidden: Tensor) -> tuple[list[Tensor], list[Entrance]]:
        """Decoder outputs [B, L, d_model] of whole texts at each depth, the trunk run at every byte.

        A block runs once for all depths that have it; what :meth:`combine` would do at one of them is the same.

        Args:
            hidden: [B, L, d_model] encoder outputs.

        Returns:
            outputs by depth, and what each stage was given.
        """
        state = self.allocate_state(len(hidden))
        entrances = self.enter(hidden, state)
        last = self._run_stage(entrances[-1].inputs, entrances[-1].stage, None, None, state)
        sums = [*(entrance.hidden for entrance in entrances[1:]), entrances[-1].hidden + last]
        read = [self._run(self._decoder(stage), one, state.decoder)[0] for stage, one in enumerate(sums)]
        return read, entrances

    def _run_stage(
        self,
        selected: Tensor,
        stage: int,
        stretch: Tensor | None,
        lengths: Tensor | None,
        state: ModelState,
        propagated: Propagated | None = None,
    ) -> Tensor:
        """What a stage adds at outer width [B, K, d_model] to selected rows of what it is given [B, K, D].

        Of row i the first ``lengths[i]`` count (None: all K). The states of its blocks are replaced.
        """
        # Residuals keep their precision under autocast.
        entered = selected if stage else self.router.to_trunk(selected).to(selected.dtype)
        depth = self.config.depths[stage]
        left = self._run_trunk(entered, stretch, lengths, state, slice(self.config.base(depth), depth), propagated)
        return self.router.from_trunk(left - entered, stage).to(selected.dtype)

    def _run_trunk(
        self,
        entered: Tensor,
        stretch: Tensor | None,
        lengths: Tensor | None,
        state: ModelState,
        part: slice,
        propagated: Propagated | None = None,
    ) -> Tensor:
        """Some blocks of the trunk over [B, K, d_trunk]; their states are replaced."""
        width = state.trunk[part][0].ssm_state.shape[-1]
        columns = None if bool((state.columns == width).all()) else state.columns
        left, after, _ = self._run(self.trunk[part], entered, state.trunk[part], stretch, lengths, columns, propagated)
        state.trunk = state.trunk[: part.start] + after + state.trunk[part.stop :]
        return left

    def _run(
        self,
        blocks: nn.ModuleList,
        hidden: Tensor,
        states: tuple[BlockState, ...],
        stretch: Tensor | None = None,
        lengths: Tensor | None = None,
        columns: Tensor | None = None,
        propagated: Propagated | None = None,
        *,
        traced: bool = False,
    ) -> tuple[Tensor, tuple[BlockState, ...], ScanTrace | None]:
        """A stack of residual blocks over [B, L, D]; the states after, and the last block's trace if it is wanted."""
        if compiled(hidden):
            views = [block.views() for block in _blocks(blocks)]
            return read_stack(views, hidden, states, stretch, lengths, columns, propagated, traced=traced)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        after, trace = [], None
        for block, state in zip(blocks, states, strict=True):
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            wanted = traced and block is blocks[-1]
            hidden, new, trace = run(
                hidden, state, stretch, lengths=lengths, columns=columns, propagated=propagated, traced=wanted
            )
            after.append(new)
        return hidden, tuple(after), trace

    def forward(
        self, tokens: Tensor, fires: Tensor | None = None, *, d_state: int | None = None, depth: int | None = None
    ) -> Tensor:
        """Logits [B, L, V] of whole sequences.

        Args:
            tokens: [B, L] int64. fires: [B, L] bool, where the trunk's last stage runs; None for everywhere.
            d_state: state size of the trunk, one of the levels. depth: blocks of the trunk that run, one of the depths.
        """
        state = self.allocate_state(len(tokens), d_state=d_state, depth=depth)
        encoded = self.encode(tokens, state.encoder)
        return self.head(self.combine(encoded.hidden, fires, state))

    @torch.inference_mode()
    def analyse(self, tokens: Tensor, depth: int | None = None) -> Tensor:
        """Smoothed density [B, L] in bits (float64), by which the trunk's places are chosen, of sequences [B, L].

        It is that of the stage which ends after ``depth`` blocks; None for the last.
        """
        state = self.allocate_state(len(tokens), depth=depth)
        encoded = self.encode(tokens, state.encoder)
        features, after = self.features(encoded, state.density, self.enter(encoded.hidden, state)[-1])
        density, _ = self.placement(depth)
        return torch.from_numpy(density.smooth(density.combine(features), state.density, after))

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Tensor,
        state: ModelState,
        rate: float,
        *,
        predict: bool = True,
        score: bool = False,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> PrefillOutput:
        """Read a piece of one prompt, its tiles planned by the dynamic programme.

        Args:
            tokens: [1, L], at most ``block_size``; every piece of a prompt but the last has exactly that length.
            state: of one sequence, replaced by the state after the piece.
            rate: trunk fires per byte, 0 to 1. predict: whether the head runs; only a prompt's last piece needs it.
            score: the head runs at every position, and the trunk fires by the causal rule instead of the plan, which
                looks ahead inside the piece: the protocol of :mod:`model.evaluation.strict`.
            sizes: (offset in the piece, columns of the trunk's state), by rising offset: runs of tiles that are read at
                their own resolution. The router maps the live state where a run begins, before the byte at the offset,
                as :meth:`resize_state_space` does between two steps; the last run's size stays.

        Raises:
            ValueError: a size is not one of the levels, or the offsets do not rise inside the piece.
        """
        assert tokens.shape[0] == 1, "prompts are read one by one"
        assert 0 < tokens.shape[1] <= self.config.block_size
        with own_threads() if compiled(self.embedding.weight) else nullcontext():
            return self._read_piece(tokens, state, rate, sizes, predict=predict, score=score)

    def _read_piece(
        self,
        tokens: Tensor,
        state: ModelState,
        rate: float,
        sizes: Sequence[tuple[int, int]],
        *,
        predict: bool,
        score: bool,
    ) -> PrefillOutput:
        encoded = self.encode(tokens, state.encoder)
        state.encoder = encoded.states
        runs = _cut(sizes, tokens.shape[1])
        entrance = self._enter_runs(encoded.hidden, state, runs)
        plan = self._plan(encoded, entrance, state, rate, causal=score)
        quota = accrue(state.router.quota, rate, tokens.shape[1])
        fires = torch.from_numpy(plan.astype(bool)).to(tokens.device).unsqueeze(0)
        output = self._combine_runs(entrance, None if rate >= 1.0 else fires, state, runs, propagate=rate > 0.0)
        state.router.quota = quota
        logits = None
        if predict or score:
            logits = self.head(output if score else output[:, -1])[0]
        return PrefillOutput(logits, np.flatnonzero(plan).tolist())

    def _enter_runs(self, hidden: Tensor, state: ModelState, runs: list[Run]) -> Entrance:
        """What the placed stage is given, the states of those below resized where a run begins."""
        below, columns = slice(0, self.config.base(_depth(state))), state.columns
        parts = []
        for start, end, d_state in runs:
            if d_state is not None and below.stop:
                self.resize_state_space(state, d_state, below)
            parts.append(self.enter(hidden[:, start:end], state)[-1])
        state.columns = columns  # the other blocks are still at that size
        if len(parts) == 1:
            return parts[0]
        together = torch.cat([part.hidden for part in parts], 1)
        return Entrance(parts[0].stage, together, torch.cat([part.inputs for part in parts], 1))

    def _combine_runs(
        self, given: Entrance, fires: Tensor | None, state: ModelState, runs: list[Run], *, propagate: bool
    ) -> Tensor:
        """:meth:`combine` run by run, with the states that are not yet resized resized where one begins."""
        above = slice(self.config.base(_depth(state)), None)
        outputs = []
        for start, end, d_state in runs:
            if d_state is not None:
                self.resize_state_space(state, d_state, above)
            part = Entrance(given.stage, given.hidden[:, start:end], given.inputs[:, start:end])
            chosen = None if fires is None else fires[:, start:end]
            outputs.append(self.combine(part.hidden, chosen, state, propagate=propagate, entrance=part))
        return torch.cat(outputs, 1)

    def _plan(self, encoded: Encoded, entrance: Entrance, state: ModelState, rate: float, *, causal: bool) -> Bytes:
        """Fires of one block of one sequence; analyses it where the rate leaves a choice."""
        if not self.cost.analysed(rate):
            return np.full(encoded.hidden.shape[1], int(rate >= 1.0), np.uint8)
        before, (analyzer, tiles) = state.density, self.placements()[entrance.stage]
        features, state.density = self.features(encoded, before, entrance)
        density = analyzer.smooth(analyzer.combine(features), before, state.density)[0]
        router = state.router
        position, last_fire, fires = (int(count) for count in (router.positions, router.last_fire, router.fires))
        pace = Pace(position, last_fire, fires, router.quota.item())
        return tiles.online(density, rate, pace) if causal else tiles.plan(density, rate, pace)

    def step(self, tokens: Tensor, state: ModelState, rates: Tensor, rows: Tensor | None = None) -> StepOutput:
        """Read one token per sequence, the trunk only for those that fire.

        Args:
            tokens: [n]. state: of B sequences, advanced in place.
            rates: [n] float64 fires per byte, 0 to 1; sequences of all rates mix, and none changes another's logits.
            rows: [n] int64, those of the B that take part, each once; None for all. The others' states do not change.
        """
        if not torch.is_inference_mode_enabled():  # to enter it takes as long as a small block does
            with torch.inference_mode():
                return self.step(tokens, state, rates, rows)
        if compiled(state.router.held):
            step = step_compiled
        else:
            self.settle(state)
            step = step_plain
        if rows is None:
            return step(self, tokens, state, rates, None)
        # The large states are reached by row; the small ones are gathered.
        density, router = state.density.gather(rows), state.router.gather(rows)
        part = replace(state, density=density, router=router, columns=state.columns[rows], depth=state.depth[rows])
        output = step(self, tokens, part, rates, rows)
        state.density.scatter_(rows, density)
        state.router.scatter_(rows, router)
        return output


def _blocks(modules: nn.ModuleList) -> list[AdaptiveMambaBlock]:
    return cast("list[AdaptiveMambaBlock]", list(modules))


def _depth(state: ModelState) -> int:
    """The one depth of all rows."""
    depth = int(state.depth[0])
    assert bool((state.depth == depth).all()), "a pass runs at one depth"
    return depth


def _cut(sizes: Sequence[tuple[int, int]], length: int) -> list[Run]:
    """The runs of a piece of ``length`` positions in which ``sizes`` begin at offsets.

    Raises:
        ValueError: the offsets do not rise inside the piece.
    """
    bounds = [offset for offset, _ in sizes] + [length]
    if any(start >= end for start, end in pairwise(bounds)) or bounds[0] < 0:
        raise ValueError(f"sizes = {sizes} must have offsets that rise from 0 and end before {length}")
    runs: list[Run] = [(start, end, size) for (start, size), end in zip(sizes, bounds[1:], strict=True)]
    return [(0, bounds[0], None), *runs] if bounds[0] else runs
