"""Runs the model for a batch. The only place where the engine and torch meet."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from model.cost import CostModel, Flops
from model.evaluation.tilings import TilingPlan, analyse_piece, analysis_flops
from model.lm import AdaptiveAttentionSystem
from model.ops.parallel import set_loop_threads
from model.state import ModelState
from service.engine.prefix_cache import PrefixCache, Snapshot, extend_key, first_key
from service.engine.sampling import sample, score, warm_up_draws
from service.engine.sequence import Outcome, Phase, Sequence, SharedPrompt, TokenScore
from service.engine.state_pool import Part, StatePool
from service.engine.workers import make_workers

logger = logging.getLogger(__name__)


def _use_threads(count: int) -> None:
    """Share the compiled loops that this thread starts among so many threads, which does not change their bits.

    Those of matrix products may change with their threads, and with them an answer with who else is served: they get
    one wherever they run.
    """
    torch.set_num_threads(1)
    set_loop_threads(count)


class ModelRunner:
    """A model and the states of the sequences that it is running. For one thread.

    Args:
        model: on the device that it is to run on. prefix_cache_bytes: of states kept of prompts that were read.
        workers: threads that the model runs in side by side: prompts, and parts of a decoding batch. More than one
            make sense on a CPU only.
    """

    def __init__(self, model: AdaptiveAttentionSystem, prefix_cache_bytes: int = 0, workers: int = 1) -> None:
        self._model = model
        self._workers = workers
        self._executor = make_workers(workers, partial(_use_threads, 1))
        self._lock = threading.Lock()
        self.pool = StatePool(model)
        self.prefixes: PrefixCache[ModelState] = PrefixCache(prefix_cache_bytes)

    @property
    def cost(self) -> CostModel:
        """What the model costs."""
        return self._model.cost

    @property
    def block_size(self) -> int:
        """Tokens of a prompt that are read at once."""
        return self._model.config.block_size

    @property
    def state_sizes(self) -> Mapping[int, int]:
        """Bytes of one state by the columns that it runs at."""
        return self.pool.sizes

    @property
    def state_bytes(self) -> Mapping[str, int]:
        """Bytes of the states that requests hold, and of those of prompts that were read before."""
        return {"used": self.pool.used_bytes, "cached": self.prefixes.nbytes}

    @property
    def buffer_bytes(self) -> int:
        """Bytes allocated for the states of generating sequences."""
        return self.pool.buffer_bytes

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every path once, so that compiling and first allocations do not fall on the first request."""
        state = self._model.allocate_state(1)
        tokens = torch.zeros(1, self._model.config.block_size, dtype=torch.int64, device=self._model.device)
        self._model.prefill(tokens, state, 0.5)
        self._model.step(tokens[:, 0], state, torch.tensor([0.5], dtype=torch.float64, device=self._model.device))
        if self._model.config.propagation_rank:
            state.router.waiting.fill_(1)  # whether or not the trunk has run: what waits is read before a depth changes
            self._model.settle(state)
        warm_up_draws()

    def resume(self, sequence: Sequence) -> None:
        """Before a prompt is read: start behind as many of its blocks as were read before for the same client."""
        if not self._cacheable(sequence):
            return
        assert sequence.slot is not None, "a running sequence has a slot"
        found, key = None, first_key(sequence.salt)
        for start in range(0, len(sequence.prompt) - 1, self.block_size):  # one token at least is read, for its logits
            sequence.prefix_key = key
            end = start + self.block_size
            key = extend_key(key, sequence.prompt[start:end], sequence.prompt_rate, sequence.depth)
            snapshot = self.prefixes.find(key) if end < len(sequence.prompt) else None
            if snapshot is None:
                break
            found = snapshot
        if found is not None:
            self.pool.put(sequence.slot, found.state)
            sequence.inherit(found.positions, found.last_fire)

    def prefill(self, sequences: list[Sequence]) -> list[Outcome | None]:
        """Read the next block of each prompt; after the last one, choose the first token if one is wanted.

        None for one that failed; the log says why.
        """
        if len(sequences) > 1:
            return list(self._executor.map(self._try_block, sequences))
        _use_threads(self._workers)
        return [self._try_block(sequence) for sequence in sequences]

    def _try_block(self, sequence: Sequence) -> Outcome | None:
        try:
            return self.prefill_block(sequence)
        except Exception:
            logger.exception("reading a prompt failed; its sequence ends")
            return None

    @torch.inference_mode()
    def prefill_block(self, sequence: Sequence) -> Outcome:
        """Read the next block of one prompt; may be called for several at a time."""
        assert sequence.slot is not None, "a running sequence has a slot"
        end = sequence.read + self.block_size
        piece = sequence.prompt[sequence.read : end]
        tokens = torch.tensor([piece], device=self._model.device)
        state = self.pool.alone(sequence.slot, sequence.columns)
        self.pool.set_depth(sequence.slot, sequence.depth)
        if sequence.plans is not None:
            return self._analyse(tokens, state, sequence.plans)
        params, rate = sequence.params, sequence.prompt_rate
        last = end >= len(sequence.prompt)
        predict = last and params.max_tokens > 0
        output = self._model.prefill(tokens, state, rate, predict=predict, score=params.score_prompt)
        heads = len(piece) if params.score_prompt else int(predict)
        logits = None if output.logits is None else output.logits.view(heads, -1)
        if last and sequence.shared is not None and sequence.shared.waiting:
            self.pool.keep_end(sequence.shared, sequence.slot, logits[-1] if logits is not None and predict else None)
        if not last and self._cacheable(sequence):
            self._remember(sequence, piece, state)
        token = self._choose(logits[-1:], [sequence])[0] if logits is not None and predict else None
        following = sequence.prompt[sequence.read + 1 : end + 1] if params.score_prompt else []
        return Outcome(
            Phase.PREFILL,
            positions=len(piece),
            flops=self._flops(len(piece), len(output.tile_ends), heads, rate, sequence),
            full_flops=self.cost.full_flops(len(piece), heads),
            tile_ends=output.tile_ends,
            token=token,
            scores=self._score(logits, [*following, *([] if token is None else [token])], params.logprobs),
        )

    @torch.inference_mode()
    def fork(self, sequence: Sequence) -> Outcome:
        """Start at the end of a prompt that another choice has read, and choose the first token if one is wanted."""
        assert sequence.slot is not None, "a running sequence has a slot"
        assert sequence.shared is not None, "another choice has read the prompt"
        end = self.pool.end(sequence.shared)
        self.pool.put(sequence.slot, end.state)
        sequence.inherit(len(sequence.prompt), sequence.shared.last_fire)
        nothing = Outcome(Phase.PREFILL, 0, Flops(), 0, scores=list(sequence.shared.scores))
        if end.logits is None:
            return nothing
        logits = end.logits.unsqueeze(0)
        (token,) = self._choose(logits, [sequence])
        return replace(
            nothing, token=token, scores=nothing.scores + self._score(logits, [token], sequence.params.logprobs)
        )

    def _cacheable(self, sequence: Sequence) -> bool:
        """Whether the state of a prompt's blocks is what any reader of the same bytes at the same rate would have."""
        whole = sequence.columns == max(self.state_sizes)
        return self.prefixes.enabled and whole and sequence.plans is None and not sequence.params.score_prompt

    def _remember(self, sequence: Sequence, piece: list[int], state: ModelState) -> None:
        """Keep the state after a whole block of a prompt that is not its last."""
        sequence.prefix_key = extend_key(sequence.prefix_key, piece, sequence.prompt_rate, sequence.depth)
        kept = state.map(lambda tensor: tensor)  # reading on replaces tensors, it does not change them
        last_fire = int(state.router.last_fire)
        with self._lock:
            self.prefixes.store(sequence.prefix_key, Snapshot(kept, sequence.read + len(piece), last_fire, kept.nbytes))

    @staticmethod
    def _choose(logits: Tensor, sequences: list[Sequence]) -> list[int]:
        """One token per row.

        Raises:
            FloatingPointError: a row is not finite throughout.
        """
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("the model's logits are not finite")
        return sample(logits, sequences)

    @staticmethod
    def _score(logits: Tensor | None, following: list[int], count: int | None) -> list[TokenScore]:
        """Scores of the tokens that follow the first positions of ``logits`` [L, V], if they are asked for."""
        if logits is None or count is None:
            return []
        return score(logits[: len(following)], following, [count] * len(following))

    def _analyse(self, tokens: Tensor, state: ModelState, plans: tuple[TilingPlan, ...]) -> Outcome:
        """Encoder and density of a block, and its tiles under each plan."""
        positions = tokens.shape[1]
        flops = analysis_flops(self._model, plans, positions)
        # This work has no resolution to save at: what it costs is its full cost.
        return Outcome(
            Phase.PREFILL, positions, flops, flops.total, analysis=analyse_piece(self._model, tokens, state, plans)
        )

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> list[Outcome | None]:
        """Read each sequence's last token and choose the next; the trunk runs only for those that fire.

        A sequence whose logits are not finite gets None.
        """
        by_slot = {sequence.slot: sequence for sequence in sequences if sequence.slot is not None}
        for slot, sequence in by_slot.items():
            self.pool.join(slot)
            self.pool.set_depth(slot, sequence.depth)
        parts = [
            part for arena in self.pool.arenas for part in arena.parts(by_slot.keys(), self._workers) if part.slots
        ]
        groups = [[by_slot[slot] for slot in part.slots] for part in parts]
        others = [self._executor.submit(self._decode_part, *one) for one in zip(groups[1:], parts[1:], strict=True)]
        results = [self._decode_part(groups[0], parts[0]), *(future.result() for future in others)]
        outcomes = dict(zip(chain(*groups), chain(*results), strict=True))
        return [outcomes[sequence] for sequence in sequences]

    @torch.inference_mode()
    def _decode_part(self, sequences: list[Sequence], part: Part) -> list[Outcome | None]:
        """The same for one part of an arena."""
        device = self._model.device
        tokens = torch.tensor([sequence.last_token for sequence in sequences], device=device)
        rates = [sequence.grant.rates.decode for sequence in sequences]
        wanted = torch.tensor(rates, dtype=torch.float64, device=device)
        output = self._model.step(tokens, part.states, wanted, part.rows)
        sound, logits = [True] * len(sequences), output.logits
        if not math.isfinite(float(logits.sum())):  # one number that is not finite shows in the sum
            sound, logits = logits.isfinite().all(-1).tolist(), logits.nan_to_num()
        chosen = sample(logits, sequences)
        scores = self._score_rows(logits, chosen, sequences)
        full_flops = self.cost.full_flops(1, 1)
        return [
            Outcome(
                Phase.DECODE,
                positions=1,
                flops=self._flops(1, int(fired), 1, rates[row], sequence),
                full_flops=full_flops,
                tile_ends=[0] if fired else [],
                token=token,
                scores=scores.get(row, []),
            )
            if sound[row]
            else None
            for row, (sequence, token, fired) in enumerate(zip(sequences, chosen, output.fired.tolist(), strict=True))
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
    def resize(self, sequence: Sequence) -> None:
        """Go on with ``sequence.columns`` of the trunk's state."""
        assert sequence.slot is not None, "a running sequence has a slot"
        self.pool.resize(sequence.slot, sequence.columns)

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Drop the state of a sequence that ended."""
        self.pool.release(slot)

    def drop_end(self, prompt: SharedPrompt) -> None:
        """Drop what was kept of the end of a prompt; nothing happens if nothing was."""
        self.pool.drop_end(prompt)

    def close(self) -> None:
        """Let the threads go."""
        self._executor.shutdown(wait=False)

    def check_integrity(self, slots: set[int]) -> None:
        """Assert that states are held for these slots only, and are in order."""
        self.pool.check_integrity()
        self.prefixes.check_integrity()
        assert self.pool.held <= slots

    def _flops(self, positions: int, tiles: int, logits: int, rate: float, sequence: Sequence) -> Flops:
        analysed = positions if self.cost.analysed(rate) else 0
        return self.cost.flops(positions, tiles, logits, analysed, sequence.columns, depth=sequence.depth)
