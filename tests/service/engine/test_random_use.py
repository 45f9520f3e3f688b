"""Anything that may happen to an engine, in any order: nothing is lost, and nobody changes another's answer."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from model.cost import CostModel
from model.lm import AdaptiveAttentionSystem
from service.engine.budget import ComputeBudget, grant
from service.engine.engine import Deadlines, Engine, Output
from service.engine.load import LoadControl
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Limits, Scheduler
from service.engine.sequence import FinishReason, SamplingParams, Sequence, SharedPrompt
from service.metrics import Metrics
from tests.service.engine.fakes import SIZES, FakeRunner, make_choices, make_engine, make_sequence
from tests.service.servers import TINY, tiny_model


class EngineMachine(RuleBasedStateMachine):
    """Rules and invariants for any runner; subclasses make the engine and its sequences."""

    engine: Engine
    metrics: Metrics

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.sequences: list[Sequence] = []
        self.outputs: dict[Sequence, list[Output]] = {}

    def submit(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.arrived = self.now
            self.outputs[sequence] = []
        self.sequences += sequences
        self.engine.add(sequences)

    def receive(self, outputs: list[Output | None]) -> None:
        for output in outputs:
            if output is not None:
                seen = self.outputs[output.sequence]
                assert not (seen and seen[-1].finish), "nothing comes after the end"
                seen.append(output)

    @property
    def open(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.finish is None]

    @rule(count=st.integers(1, 6), seconds=st.sampled_from([0.0, 0.01, 0.3]))
    def step(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.now += seconds
            if not self.engine.idle:
                self.receive(self.engine.step())
                self.engine.check_integrity()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.open:
            chosen = data.draw(st.sampled_from(self.open))
            self.receive([self.engine.end(chosen, FinishReason.ABORT)])

    @invariant()
    def nothing_is_lost(self) -> None:
        self.engine.check_integrity()
        for sequence, outputs in self.outputs.items():
            assert (sequence.finish is not None) == any(output.finish is not None for output in outputs)
        self.engine.book()
        totals = self.totals()
        assert totals["compute_flops_total"] == sum(sequence.flops.total for sequence in self.sequences)
        assert totals["compute_full_flops_total"] == sum(sequence.full_flops for sequence in self.sequences)
        assert totals["generation_tokens_total"] == sum(sequence.generated for sequence in self.sequences)
        assert totals["prompt_tokens_total"] == sum(sequence.read - sequence.inherited for sequence in self.sequences)
        assert totals["request_success_total"] == len(self.sequences) - len(self.open)

    def teardown(self) -> None:
        steps = 0
        while self.sequences and not self.engine.idle:
            self.receive(self.engine.step())
            steps += 1
            assert steps < 10_000, "nothing ends any more"
        if self.sequences:
            self.nothing_is_lost()
            assert not self.open
            totals = self.totals()
            assert totals["num_requests_running"] == totals["num_requests_waiting"] == 0
            assert self.engine.runner.state_bytes["used"] == 0

    def totals(self) -> Counter[str]:
        """Every metric, summed over its labels."""
        found: Counter[str] = Counter()
        for metric in self.metrics._registry.collect():
            for sample in metric.samples:
                found[sample.name.removeprefix("rheostat_")] += sample.value
        return found


class WithoutModel(EngineMachine):
    """On a runner that fails when it is told to."""

    @initialize(slots=st.integers(1, 4), states=st.floats(2.0, 4.0), share=st.floats(0.05, 1.0))
    def begin(self, slots: int, states: float, share: float) -> None:
        self.runner = FakeRunner()
        self.engine, self.metrics = make_engine(
            self.runner, lambda: self.now, slots, state_bytes=int(states * SIZES[8]), prefill_share=share,
            decode_stretch=1.2, load=LoadControl(0.2), deadlines=Deadlines(queue=5.0, request=20.0),
        )  # fmt: skip

    @rule(
        n=st.integers(1, 4), prompt=st.integers(1, 9), max_tokens=st.integers(0, 6), least=st.sampled_from([0.6, 1.0]),
        priority=st.integers(-1, 1),
    )  # fmt: skip
    def arrive(self, n: int, prompt: int, max_tokens: int, least: float, priority: int) -> None:
        options = {"prompt": prompt, "max_tokens": max_tokens, "least": least, "priority": priority}
        self.submit(make_choices(n, **options) if n > 1 else [make_sequence(**options)])

    @rule(fault=st.sampled_from(["fail_prefill", "fail_decode", "fail_fork"]))
    def fail(self, fault: str) -> None:
        setattr(self.runner, fault, True)
        if not self.engine.idle:
            self.receive(self.engine.step())
        setattr(self.runner, fault, False)

    @rule(data=st.data())
    def sicken(self, data: st.DataObject) -> None:
        if self.open:
            self.runner.not_finite.add(data.draw(st.sampled_from(self.open)))


UNMEASURED = {"density_measured": False, "density_hidden": 8}
DEPTHS = {"propagation_rank": 8, "trunk_layers": 3, "shallow_depths": (1, 2), "own_decoders": True} | UNMEASURED
MODELS = (tiny_model(), tiny_model(config=TINY.model_copy(update=DEPTHS)))
"""One whose trunk skips what it does not run at and has one depth; one whose states read on, of several depths."""
BUDGETS = [1.0, 0.8, 0.6, 0.5, 0.3]


def new_engine(
    model: AdaptiveAttentionSystem, clock: Callable[[], float], *, slots: int, states: float, cached: int
) -> tuple[Engine, Metrics]:
    runner, metrics = ModelRunner(model, cached, workers=2), Metrics("tiny", model.config.d_state_levels)
    room = int(states * max(runner.state_sizes.values()))
    limits = Limits.for_states(
        runner.state_sizes, running=slots, block_size=runner.block_size, state_bytes=room, prefill_share=0.6, blocks=2,
        decode_stretch=1.1,
    )  # fmt: skip
    return Engine(runner, Scheduler(limits, runner.state_sizes), metrics, clock, load=LoadControl(0.2)), metrics


def make(
    cost: CostModel, prompt: int, text: int, budget: float, least: float, temperature: float, n: int
) -> list[Sequence]:
    """Choices after a prompt of so many tokens, of one of a few texts that share their beginnings."""
    tokens = [256, *(65 + (i * i) % 7 if i < 100 else 65 + (i * (text + 3)) % 11 for i in range(prompt - 1))]
    given, shared = grant(ComputeBudget(budget, min(least, budget)), cost), SharedPrompt() if n > 1 else None
    params = SamplingParams(max_tokens=9, temperature=temperature, seed=3, ignore_eos=True, logprobs=1)
    return [
        Sequence(tokens, params.of_choice(choice), given, arrived=0.0, choice=choice, shared=shared)
        for choice in range(n)
    ]


class WithModel(EngineMachine):
    """On a small model: a sequence that runs to its end has the tokens, and the scores, that it has alone."""

    alone: dict[tuple[object, ...], tuple[list[int], list[float]]] = {}  # noqa: RUF012 - shared by all runs

    model: AdaptiveAttentionSystem

    @initialize(slots=st.integers(1, 5), states=st.floats(2.0, 5.0), cached=st.sampled_from([0, 10**5, 10**7]))
    def begin(self, slots: int, states: float, cached: int) -> None:
        self.engine, self.metrics = new_engine(self.model, lambda: self.now, slots=slots, states=states, cached=cached)
        self.recipes: dict[Sequence, tuple[object, ...]] = {}

    @rule(
        prompt=st.integers(1, 3 * TINY.block_size), text=st.integers(0, 2), budget=st.sampled_from(BUDGETS),
        least=st.sampled_from([0.1, 0.5, 1.0]), temperature=st.sampled_from([0.0, 1.3]), n=st.integers(1, 3),
    )  # fmt: skip
    def arrive(self, prompt: int, text: int, budget: float, least: float, temperature: float, n: int) -> None:
        recipe = (prompt, text, budget, least, temperature)
        sequences = make(self.model.cost, *recipe, n)
        for sequence in sequences:
            if not sequence.grant.flexible:
                self.recipes[sequence] = (*recipe, sequence.choice)
        self.submit(sequences)

    def teardown(self) -> None:
        super().teardown()
        for sequence, recipe in getattr(self, "recipes", {}).items():
            if sequence.finish is FinishReason.LENGTH:
                assert scores(self.outputs[sequence]) == self.answer_alone(recipe)

    def answer_alone(self, recipe: tuple[object, ...]) -> tuple[list[int], list[float]]:
        key = (self.model.config.trunk_layers, *recipe)
        if key not in self.alone:
            *what, choice = recipe
            ticks = itertools.count()
            engine, _ = new_engine(self.model, lambda: float(next(ticks)), slots=1, states=2.0, cached=0)
            sequence = make(self.model.cost, *what, n=choice + 1)[choice]
            sequence.shared = None
            engine.add([sequence])
            outputs: list[Output] = []
            while not engine.idle:
                outputs += engine.step()
            self.alone[key] = scores(outputs)
        return self.alone[key]


def scores(outputs: list[Output]) -> tuple[list[int], list[float]]:
    """Tokens, and how probable they were."""
    found = [score for output in outputs for score in output.scores]
    return [score.token for score in found], [score.logprob for score in found]


TestWithoutModel = WithoutModel.TestCase
TestWithoutModel.settings = settings(settings.get_profile("unshrunk"), max_examples=40, stateful_step_count=50)


class WithOneDepth(WithModel):
    """The first model."""

    model = MODELS[0]


class WithDepths(WithModel):
    """The second."""

    model = MODELS[1]


FEW = settings(settings.get_profile("unshrunk"), max_examples=5, stateful_step_count=30)
TestWithOneDepth, TestWithDepths = WithOneDepth.TestCase, WithDepths.TestCase
TestWithOneDepth.settings = TestWithDepths.settings = FEW
