from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.engine import Engine, Output
from service.engine.scheduler import Scheduler
from service.engine.sequence import FinishReason, Sequence
from service.metrics import Metrics
from tests.service.engine.fakes import FakeRunner, make_sequence


def make_engine(slots: int = 2) -> tuple[Engine, FakeRunner, Metrics]:
    runner, metrics = FakeRunner(), Metrics("fake")
    ticks = itertools.count()
    return Engine(runner, Scheduler(slots), metrics, lambda: float(next(ticks))), runner, metrics


def run_to_end(engine: Engine) -> list[Output]:
    outputs: list[Output] = []
    while not engine.idle:
        outputs += engine.step()
        engine.check_integrity()
    return outputs


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics._registry.get_sample_value(name, labels) or 0.0


def ends(outputs: list[Output]) -> list[tuple[Sequence, FinishReason]]:
    return [(output.sequence, output.finish) for output in outputs if output.finish is not None]


def test_a_prompt_block_and_the_decoding_of_others_share_a_step() -> None:
    engine, runner, _ = make_engine()
    engine.add(make_sequence(prompt=2, max_tokens=4))
    engine.add(make_sequence(prompt=4, max_tokens=1))
    run_to_end(engine)
    assert runner.log == ["prefill 0", "decode 0", "prefill 1", "decode 0", "prefill 1", "decode 0"]


def test_text_and_end_of_each_sequence() -> None:
    engine, _, _ = make_engine(slots=1)
    sequences = [make_sequence(max_tokens=3), make_sequence(max_tokens=5, stop=(b"aa",))]
    for sequence in sequences:
        engine.add(sequence)
    outputs = run_to_end(engine)
    texts = ["".join(output.text for output in outputs if output.sequence is sequence) for sequence in sequences]
    assert texts == ["aaa", ""]
    assert ends(outputs) == [(sequences[0], FinishReason.LENGTH), (sequences[1], FinishReason.STOP)]


def test_spent_operations_add_up_to_the_counters() -> None:
    engine, _, metrics = make_engine()
    sequences = [make_sequence(prompt=n, max_tokens=n) for n in (1, 4, 7)]
    for sequence in sequences:
        engine.add(sequence)
    run_to_end(engine)
    stages = {
        (stage, phase): value(metrics, "rheostat_compute_flops_total", stage=stage, phase=phase)
        for stage in ("encoder", "trunk")
        for phase in ("prefill", "decode")
    }
    assert sum(stages.values()) == sum(sequence.flops.total for sequence in sequences)
    assert stages["trunk", "decode"] == 5 * (0 + 3 + 6)
    assert value(metrics, "rheostat_compute_full_flops_total") == sum(sequence.full_flops for sequence in sequences)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_failed_step_ends_its_sequences_and_no_other(kind: str) -> None:
    engine, runner, metrics = make_engine()
    reads, generates = make_sequence(prompt=9), make_sequence(prompt=2, max_tokens=9)
    engine.add(generates)
    engine.step()
    engine.add(reads)
    setattr(runner, f"fail_{kind}", True)
    failed = ends(engine.step())
    assert failed == [(reads if kind == "prefill" else generates, FinishReason.ERROR)]
    setattr(runner, f"fail_{kind}", False)
    others = ends(run_to_end(engine))
    assert others == [(generates if kind == "prefill" else reads, FinishReason.LENGTH)]
    assert not runner.held
    assert value(metrics, "rheostat_request_success_total", finished_reason="error") == 1


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(0, 6)), max_size=8), st.integers(1, 3))
def test_every_sequence_ends_once_and_everything_is_given_back(
    requests: list[tuple[int, int, int]], slots: int
) -> None:
    """Requests of random sizes; each is cancelled after so many steps if it still runs (0: never)."""
    engine, runner, metrics = make_engine(slots)
    sequences = [make_sequence(prompt=prompt, max_tokens=tokens) for prompt, tokens, _ in requests]
    outputs: list[Output] = []
    for sequence in sequences:
        engine.add(sequence)
    step = 0
    while not engine.idle:
        outputs += engine.step()
        step += 1
        for sequence, (_, _, cancelled) in zip(sequences, requests, strict=True):
            if cancelled == step and (output := engine.end(sequence, FinishReason.ABORT)) is not None:
                outputs.append(output)
        engine.check_integrity()
    assert Counter(sequence for sequence, _ in ends(outputs)) == Counter(sequences)
    assert not runner.held
    assert value(metrics, "rheostat_num_requests_running") == value(metrics, "rheostat_num_requests_waiting") == 0
