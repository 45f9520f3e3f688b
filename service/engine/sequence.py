"""One request as the engine sees it. Plain Python: no tensors."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import StrEnum

from model.cost import Flops
from model.evaluation.tilings import PieceAnalysis, TilingPlan
from model.tokenizer import ByteTokenizer, Tokenizer
from service.engine.budget import Grant, Reason
from service.engine.text import TextAssembler


class FinishReason(StrEnum):
    """How a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    """The client went away, or the server stopped."""
    QUEUE_TIMEOUT = "queue_timeout"
    """It waited too long for its turn."""
    TIMEOUT = "timeout"
    """It took too long in all."""
    ERROR = "error"


class Phase(StrEnum):
    """What a sequence is doing while it runs."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and when to stop. Checked by the API."""

    max_tokens: int = 16
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    top_k: int = 0
    """Draw from so many most probable tokens; 0 from all."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that prompt or text have (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that were generated."""
    frequency_penalty: float = 0.0
    """The same, once for each time."""
    seed: int | None = None
    stop: tuple[bytes, ...] = ()
    ignore_eos: bool = False
    """Go on after the end of the document."""
    echo: bool = False
    """The text begins with the prompt."""
    logprobs: int | None = None
    """Report the log-probability of each generated token and of so many of the most probable; None reports nothing."""
    score_prompt: bool = False
    """Report those of the prompt as well. It is then read by the causal rule, with the head at every position."""

    def of_choice(self, index: int) -> SamplingParams:
        """Those of one of several choices of a prompt: a given seed counts up, so that they differ."""
        return self if self.seed is None else replace(self, seed=self.seed + index)

    @property
    def penalised(self) -> bool:
        """Whether what was said before changes the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class ComputeUsage:
    """What a request was granted and what it spent; shares are of full resolution over the same bytes."""

    requested: float
    """The target that was asked for."""
    granted: float
    """What was granted: an average over the bytes where the server lowered it under load."""
    spent: float
    """What was spent."""
    spent_flops: int
    """Floating-point operations, a multiply-add as two."""
    full_flops: int
    """Those of the same bytes at full resolution."""
    tiles: int
    """How often the trunk fired: of several stages, the one that is placed."""
    mean_tile_bytes: float | None
    """None where it never fired."""
    depth: int | None
    """Blocks after which the stage ends that was placed at the end, those below it at every byte; None for all."""
    reason: str
    """Why so much was granted: `requested`, `floor`, `depth`, `maximum` or `load`."""
    d_state: int
    """Columns of the trunk's state at the end; fewer than the model has where memory was short."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """How probable the model held a token: natural logarithms, at temperature 1 and before penalties."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most probable tokens, best first; equal tokens have the very same float here and there."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one sequence got out of one step."""

    phase: Phase
    positions: int
    """Tokens that the model read."""
    flops: Flops
    full_flops: int
    """Operations of the same work at full resolution."""
    tile_ends: list[int] = field(default_factory=list)
    """Offsets among those positions at which the trunk fired."""
    token: int | None = None
    """The next token; None while the prompt is not finished, and where none is wanted."""
    scores: list[TokenScore] = field(default_factory=list)
    """Of the tokens that follow those positions, as far as they were asked for."""
    analysis: PieceAnalysis | None = None
    """Of those positions, where the sequence is there to be analysed."""


@dataclass(slots=True, eq=False)
class SharedPrompt:
    """A prompt after which several choices are wanted: the first that runs reads it, the others start at its end."""

    reader: Sequence | None = None
    """The choice that reads it, or has read it."""
    read: bool = False
    waiting: int = 0
    """Choices that have not started."""
    last_fire: int = 0
    columns: int = 0
    """Both at the prompt's end."""
    scores: list[TokenScore] = field(default_factory=list)
    """Of the prompt, where they are asked for."""

    @property
    def kept(self) -> bool:
        """Whether the state at its end is still needed."""
        return self.read and self.waiting > 0

    def finish_reading(self, reader: Sequence) -> None:
        """Note where the prompt ended."""
        self.read = True
        self.last_fire, self.columns = reader.last_fire, reader.columns


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt, what was generated, and what it cost so far."""

    prompt: list[int]
    """Tokens, as ``tokenizer`` begins them."""
    params: SamplingParams
    grant: Grant
    arrived: float
    """Clock time in seconds."""
    priority: int = 0
    """Lower ones go first."""
    choice: int = 0
    """Number among the choices of its prompt."""
    shared: SharedPrompt | None = None
    """Where the prompt has other choices."""
    salt: str = ""
    """Who may share states of equal prompts with whom."""
    order: tuple[int, float, int] = (0, 0.0, 0)
    """Its place in every queue, set by the scheduler."""
    prefix_key: bytes = b""
    """Of the blocks of the prompt that were read, where states of prompts are cached."""
    reserved: int = 0
    """Operations that it may come to, from the moment it waits."""
    columns: int = 0
    """Of the trunk's state, while it runs."""
    compute_had: float = 0.0
    """By which those that generate take turns: tokens at full resolution that theirs amount to."""
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)
    """Of the model."""
    phase: Phase = Phase.PREFILL
    slot: int | None = None
    """Of the state pool, while it runs."""
    read: int = 0
    """Tokens of the prompt that the model has read."""
    positions: int = 0
    """Tokens that the state has seen."""
    inherited: int = 0
    """Of these, how many were read for another sequence; they are on no bill of this one."""
    last_token: int = field(init=False)
    generated: int = 0
    finish: FinishReason | None = None
    tiles: int = 0
    last_fire: int = 0
    flops: Flops = field(default_factory=Flops)
    full_flops: int = 0
    granted: Counter[float] = field(default_factory=Counter)
    """Operations at full resolution of what was done, by the share that was granted for it."""
    regranted: bool = False
    """Whether the grant was ever changed."""
    scheduled: float | None = None
    first_token: float | None = None
    latest_token: float | None = None
    plans: tuple[TilingPlan, ...] | None = None
    """Tilings to work out; the model is then not run beyond what they need."""
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token was generated; kept where penalties need it."""
    said: set[int] = field(default_factory=set)
    """Tokens of the prompt, but for a start, and generated; kept where the repetition penalty needs it."""
    text: TextAssembler = field(init=False)
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.last_token = self.prompt[-1]
        prefix = self.tokenizer.join(self.prompt) if self.params.echo else b""
        self.text = TextAssembler(self.params.stop, prefix)
        if self.params.repetition_penalty != 1.0:
            self.said.update(self.prompt[self.prompt[0] == self.tokenizer.start :])
        # Reproducible by the client's seed; not a secret.
        self.random = random.Random(self.params.seed)  # noqa: S311

    @property
    def prefilled(self) -> bool:
        """The whole prompt has been read."""
        return self.read == len(self.prompt)

    @property
    def prompt_rate(self) -> float:
        """Trunk fires per byte of the prompt; where it is scored the head runs at every byte, as in generating."""
        rates = self.grant.rates
        return rates.decode if self.params.score_prompt else rates.prefill

    @property
    def depth(self) -> int | None:
        """Blocks after which the trunk's stage ends that is placed; None for all."""
        return self.grant.rates.depth

    def regrant(self, grant: Grant) -> bool:
        """Go on with another grant; whether that changes anything."""
        if grant == self.grant:
            return False
        self.grant, self.regranted = grant, True
        return True

    def inherit(self, positions: int, last_fire: int) -> None:
        """Start from a state that has read the first ``positions`` tokens of the prompt."""
        self.read = self.positions = self.inherited = positions
        self.last_fire = last_fire

    def account(self, flops: Flops, full_flops: int) -> None:
        """Book operations that were spent on this sequence."""
        self.flops = self.flops + flops
        self.full_flops += full_flops
        # The share then follows from how much of the request is prompt: there the head runs once, in all.
        share = flops.total / full_flops if self.grant.settled and full_flops else self.grant.granted
        self.granted[share] += full_flops

    def close_tiles(self, ends: list[int]) -> list[int]:
        """Book tiles that ended at these offsets from ``positions``; their sizes in bytes."""
        sizes = []
        for end in ends:
            here = self.positions + end + 1
            sizes.append(here - self.last_fire)
            self.last_fire = here
        self.tiles += len(ends)
        return sizes

    def finish_reading(self) -> str:
        """End a sequence that wants no token, once its prompt is read; the text that may be sent now."""
        if self.params.max_tokens or not self.prefilled:
            return ""
        self.finish = FinishReason.LENGTH
        return self.text.flush()

    def accept(self, token: int) -> str:
        """Take a generated token; the text that may be sent now. Sets ``finish`` if it was the last."""
        self.generated += 1
        self.last_token = token
        if self.params.penalised:
            self.counts[token] += 1
            self.said.add(token)
        if token in self.tokenizer.ends and not self.params.ignore_eos:
            self.finish = FinishReason.STOP
            return self.text.flush()
        text = ""
        for byte in self.tokenizer.token_bytes(token):
            released, stopped = self.text.push(byte)
            text += released
            if stopped:
                self.finish = FinishReason.STOP
                return text
        if self.generated >= self.params.max_tokens:
            self.finish = FinishReason.LENGTH
            text += self.text.flush()
        return text

    def usage(self) -> ComputeUsage:
        """The bill so far."""
        return total_usage([self])


def total_usage(sequences: Collection[Sequence]) -> ComputeUsage:
    """The bill so far of sequences (at least one) that share a request."""
    grant = next(iter(sequences)).grant
    spent_flops = sum(sequence.flops.total for sequence in sequences)
    full_flops = sum(sequence.full_flops for sequence in sequences)
    tiles = sum(sequence.tiles for sequence in sequences)
    positions = sum(sequence.positions - sequence.inherited for sequence in sequences)
    reasons = [sequence.grant.reason for sequence in sequences]
    depths = [sequence.depth for sequence in sequences if sequence.depth is not None]
    lowered = any(sequence.regranted for sequence in sequences) or Reason.LOAD in reasons
    granted = sum((sequence.granted for sequence in sequences), Counter[float]())
    if len(granted) > 1:
        share = sum(share * operations for share, operations in granted.items()) / full_flops
    else:
        share = next(iter(granted), grant.granted)  # to the last bit what was granted
    return ComputeUsage(
        requested=grant.requested,
        granted=share,
        spent=spent_flops / full_flops if full_flops else 0.0,
        spent_flops=spent_flops,
        full_flops=full_flops,
        tiles=tiles,
        mean_tile_bytes=positions / tiles if tiles else None,
        depth=min(depths, default=None),
        reason=(Reason.LOAD if lowered else grant.reason).value,
        d_state=min(sequence.columns for sequence in sequences),
    )
