from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.budget import Reason
from service.engine.engine import Deadlines, Engine, Output
from service.engine.load import LoadControl
from service.engine.sequence import FinishReason, Sequence
from service.metrics import Metrics
from tests.service.engine.fakes import SIZES, FakeRunner, make_choices, make_engine, make_sequence


def engine_of(slots: int = 2, **options: object) -> tuple[Engine, FakeRunner, Metrics]:
    runner, ticks = FakeRunner(), itertools.count()
    engine, metrics = make_engine(runner, lambda: float(next(ticks)), slots, **options)
    return engine, runner, metrics


def run_to_end(engine: Engine) -> list[Output]:
    outputs: list[Output] = []
    while not engine.idle:
        outputs += engine.step()
        engine.check_integrity()
    return outputs


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics._registry.get_sample_value(name, labels) or 0.0


def spent(metrics: Metrics) -> float:
    """The counter of operations, over its labels."""
    (family,) = (family for family in metrics._registry.collect() if family.name == "rheostat_compute_flops")
    return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))


def ends(outputs: list[Output]) -> list[tuple[Sequence, FinishReason]]:
    return [(output.sequence, output.finish) for output in outputs if output.finish is not None]


def test_a_prompt_block_and_the_decoding_of_others_share_a_step() -> None:
    engine, runner, _ = engine_of()
    engine.add([make_sequence(prompt=2, max_tokens=4)])
    engine.add([make_sequence(prompt=4, max_tokens=3)])
    run_to_end(engine)
    assert runner.log == [
        "prefill 0", "prefill 1", "decode 0", "prefill 1", "decode 0", "decode 0 1", "decode 1"
    ]  # fmt: skip


def test_text_and_end_of_each_sequence() -> None:
    engine, _, _ = engine_of(slots=1)
    sequences = [make_sequence(max_tokens=3), make_sequence(max_tokens=5, stop=(b"aa",))]
    engine.add(sequences)
    outputs = run_to_end(engine)
    texts = ["".join(output.text for output in outputs if output.sequence is sequence) for sequence in sequences]
    assert texts == ["aaa", ""]
    assert ends(outputs) == [(sequences[0], FinishReason.LENGTH), (sequences[1], FinishReason.STOP)]


def test_spent_operations_add_up_to_the_counters() -> None:
    engine, _, metrics = engine_of()
    sequences = [make_sequence(prompt=n, max_tokens=n) for n in (1, 4, 7)]
    engine.add(sequences)
    run_to_end(engine)
    stages = {
        (stage, phase): value(metrics, "rheostat_compute_flops_total", stage=stage, phase=phase)
        for stage in ("encoder", "trunk")
        for phase in ("prefill", "decode")
    }
    assert sum(stages.values()) == sum(sequence.flops.total for sequence in sequences)
    assert stages["trunk", "decode"] == 5 * (0 + 3 + 6)
    assert value(metrics, "rheostat_compute_full_flops_total") == sum(sequence.full_flops for sequence in sequences)


def test_counters_are_a_moment_behind_at_most_and_not_when_anything_begins_or_ends() -> None:
    now = [0.0]
    engine, metrics = make_engine(FakeRunner(), lambda: now[0], slots=2)
    short, long = make_sequence(prompt=2, max_tokens=8), make_sequence(prompt=2, max_tokens=99)

    def behind() -> float:
        return short.flops.total + long.flops.total - spent(metrics)

    engine.add([short, long])
    while not (short.prefilled and long.prefilled):
        engine.step()
        assert spent(metrics) > 0
        assert behind() == 0
    engine.step()
    assert behind() > 0
    now[0] += 0.02
    engine.step()
    assert behind() == 0
    while short.finish is None:
        engine.step()
        assert (behind() == 0) == (short.finish is not None)
    engine.step()
    assert behind() > 0
    engine.end(long, FinishReason.ABORT)
    assert behind() == 0


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_failed_step_ends_its_sequences_and_no_other(kind: str) -> None:
    engine, runner, metrics = engine_of()
    reads, generates = make_sequence(prompt=9), make_sequence(prompt=2, max_tokens=9)
    engine.add([generates])
    engine.step()
    engine.add([reads])
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
    engine, runner, metrics = engine_of(slots)
    sequences = [make_sequence(prompt=prompt, max_tokens=tokens) for prompt, tokens, _ in requests]
    outputs: list[Output] = []
    engine.add(sequences)
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


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_choices_of_a_prompt_read_it_once(max_tokens: int) -> None:
    engine, runner, metrics = engine_of(slots=2)
    choices = make_choices(3, prompt=5, max_tokens=max_tokens)
    engine.add(choices)
    outputs = run_to_end(engine)
    assert sum(line.startswith("prefill") for line in runner.log) == 3
    assert sum(line.startswith("fork") for line in runner.log) == 2
    assert Counter(sequence for sequence, _ in ends(outputs)) == Counter(choices)
    assert [sequence.generated for sequence in choices] == [max_tokens] * 3
    assert value(metrics, "rheostat_prompt_tokens_total") == 5
    assert sum(sequence.positions - sequence.inherited for sequence in choices) == 5 + 3 * max(max_tokens - 1, 0)
    assert not runner.ends
    assert not runner.held


@pytest.mark.parametrize("after", [1, 4])
def test_another_choice_reads_on_where_the_reader_ends_early(after: int) -> None:
    engine, runner, _ = engine_of(slots=1)
    choices = make_choices(3, prompt=5, max_tokens=4)
    engine.add(choices)
    outputs = [output for _ in range(after) for output in engine.step()]
    outputs.append(engine.end(choices[0], FinishReason.ABORT))
    outputs += run_to_end(engine)
    assert dict(ends(outputs)) == {choices[0]: FinishReason.ABORT} | dict.fromkeys(choices[1:], FinishReason.LENGTH)
    assert not runner.ends


def test_a_choice_that_fails_to_start_ends_alone() -> None:
    engine, runner, _ = engine_of(slots=1)
    choices = make_choices(2, prompt=2, max_tokens=1)
    engine.add(choices)
    runner.fail_fork = True
    assert dict(ends(run_to_end(engine))) == {choices[0]: FinishReason.LENGTH, choices[1]: FinishReason.ERROR}
    assert not runner.held
    assert not runner.ends


def test_a_sequence_whose_logits_are_no_numbers_fails_alone() -> None:
    engine, runner, _ = engine_of()
    sick, well = make_sequence(prompt=1), make_sequence(prompt=1)
    runner.not_finite.add(sick)
    engine.add([sick, well])
    assert dict(ends(run_to_end(engine))) == {sick: FinishReason.ERROR, well: FinishReason.LENGTH}


def test_what_waits_or_runs_for_too_long_ends() -> None:
    runner, now = FakeRunner(), [0.0]
    engine, metrics = make_engine(runner, lambda: now[0], slots=1, deadlines=Deadlines(queue=5.0, request=20.0))
    runs, waits = make_sequence(prompt=99), make_sequence(prompt=200)
    engine.add([runs, waits])
    engine.step()
    now[0] = 5.0
    assert not ends(engine.step())
    now[0] = 6.0
    assert ends(engine.step()) == [(waits, FinishReason.QUEUE_TIMEOUT)]
    now[0] = 21.0
    assert ends(engine.step()) == [(runs, FinishReason.TIMEOUT)]
    assert engine.idle
    assert not runner.held
    for reason in ("queue_timeout", "timeout"):
        assert value(metrics, "rheostat_request_success_total", finished_reason=reason) == 1


def test_load_lowers_what_allows_it_and_raises_it_again() -> None:
    runner, now = FakeRunner(), [0.0]
    engine, metrics = make_engine(runner, lambda: now[0], slots=2, load=LoadControl(1.0))
    fixed = make_sequence(prompt=2, max_tokens=90, budget=1.0)
    lowered = make_sequence(prompt=2, max_tokens=90, budget=1.0, least=0.6)
    waits = make_sequence(prompt=2, max_tokens=99, budget=1.0)
    engine.add([fixed, lowered, waits])
    grants = []
    for step in range(40):
        now[0] = step / 4
        engine.step()
        grants.append(lowered.grant.granted)
        if step == 20:
            engine.end(waits, FinishReason.ABORT)
    assert fixed.grant.granted == 1.0
    assert grants[4] == 1.0
    assert min(grants) == 0.6
    assert grants.index(0.6) - grants.index(0.9) == 12, "a step down each second"
    assert grants[-1] > 0.6
    run_to_end(engine)
    usage = lowered.usage()
    assert usage.reason == "load"
    assert 0.6 < usage.granted < 1.0
    assert lowered.granted.total() == lowered.full_flops
    assert sorted({round(share, 9) for share in lowered.granted}) == [0.6, 0.7, 0.8, 0.9, 1.0]
    assert fixed.usage().granted == 1.0
    assert value(metrics, "rheostat_retile_total", cause="load_lowered") == 4
    assert value(metrics, "rheostat_retile_total", cause="load_raised") >= 1


def test_what_arrives_under_load_is_lowered_from_the_start() -> None:
    runner, now = FakeRunner(), [0.0]
    load = LoadControl(1.0)
    engine, metrics = make_engine(runner, lambda: now[0], load=load)
    assert load.update(10.0, longest_wait=5.0)
    arrives = make_sequence(prompt=2, max_tokens=1, budget=1.0, least=0.6, arrived=10.0)
    now[0] = 10.0
    engine.add([arrives])
    assert (arrives.grant.granted, arrives.grant.reason) == (pytest.approx(0.9), Reason.LOAD)
    assert value(metrics, "rheostat_budget_decisions_total", reason="load") == 1


def test_what_arrives_long_after_the_load_gets_what_it_asks_for() -> None:
    runner, now = FakeRunner(), [0.0]
    engine, _ = make_engine(runner, lambda: now[0], slots=1, load=LoadControl(1.0))
    engine.add([make_sequence(prompt=99), make_sequence(prompt=199)])
    for second in range(12):
        now[0] = float(second)
        engine.step()
    assert engine.load.ease == 0.0
    engine.end_all(FinishReason.ABORT)
    now[0] = 100.0
    engine.add([late := make_sequence(least=0.6)])
    assert (late.grant.granted, late.grant.reason) == (1.0, Reason.REQUESTED)


def test_states_that_allow_it_shrink_before_others_wait() -> None:
    engine, _, _ = engine_of(slots=3, state_bytes=2 * SIZES[8])
    lowers, fixed = make_sequence(max_tokens=9, least=0.5), make_sequence(max_tokens=9)
    engine.add([lowers, fixed])
    engine.step()
    late = make_sequence(prompt=1, max_tokens=40)
    engine.add([late])
    engine.step()
    assert (lowers.columns, fixed.columns, late.slot) == (8, 8, None), "shrinking one does not make room enough"
    engine.end(fixed, FinishReason.ABORT)
    engine.add([later := make_sequence(prompt=1, max_tokens=60, least=0.5)])
    engine.step()
    engine.check_integrity()
    assert late.slot is not None
    assert later.slot is None
    engine.end(late, FinishReason.ABORT)
    run_to_end(engine)
    assert lowers.usage().d_state == 8


def test_a_shrunk_state_makes_room() -> None:
    engine, _, metrics = engine_of(slots=3, state_bytes=2 * SIZES[8] + SIZES[4])
    lowers, fixed = make_sequence(max_tokens=9, least=0.5), make_sequence(max_tokens=9)
    engine.add([lowers, fixed])
    engine.step()
    late = make_sequence(prompt=1, max_tokens=2)
    engine.add([late])
    engine.step()
    engine.check_integrity()
    assert (lowers.columns, fixed.columns, late.columns) == (4, 8, 8)
    assert value(metrics, "rheostat_state_resize_total", **{"from": "8", "to": "4"}) == 1
    run_to_end(engine)
    assert lowers.usage().d_state == 4
    assert value(metrics, "rheostat_state_pool_bytes", kind="used") == 0
