from __future__ import annotations

import pytest

from service.engine.scheduler import Limits, Scheduler
from service.engine.sequence import FinishReason, Phase, Sequence
from tests.service.engine.fakes import BLOCK, COST, SIZES, make_limits, make_sequence


def scheduler_of(slots: int, **limits: object) -> Scheduler:
    return Scheduler(make_limits(slots, **limits), SIZES)


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for sequence in sequences:
        tokens = len(sequence.prompt) + sequence.params.max_tokens
        sequence.reserved = round(sequence.grant.granted * COST.full_flops(tokens, 0))
        scheduler.add(sequence)


def test_equals_start_in_order_of_arrival() -> None:
    scheduler = scheduler_of(2)
    first, second, third = (make_sequence() for _ in range(3))
    add(scheduler, first, second, third)
    scheduler.schedule()
    assert scheduler.running == [first, second]
    assert scheduler.waiting == [third]
    scheduler.remove(first)
    scheduler.schedule()
    assert scheduler.running == [second, third]
    scheduler.check_integrity()


def test_a_cheap_sequence_passes_expensive_ones_and_a_lower_priority_number_passes_all() -> None:
    scheduler = scheduler_of(1)
    running, expensive, cheap = make_sequence(), make_sequence(prompt=100), make_sequence(prompt=100, budget=0.5)
    urgent, patient = make_sequence(prompt=500, priority=-1), make_sequence(prompt=1, priority=1)
    add(scheduler, running)
    scheduler.schedule()
    add(scheduler, patient, expensive, cheap, urgent)
    assert scheduler.waiting == [urgent, cheap, expensive, patient]


def test_an_expensive_sequence_is_not_passed_for_ever() -> None:
    scheduler = scheduler_of(1)
    expensive = make_sequence(prompt=1000)
    add(scheduler, expensive)
    passed = 0
    while expensive not in scheduler.running:
        add(scheduler, make_sequence(prompt=10, max_tokens=0))
        scheduler.schedule()
        if expensive not in scheduler.running:
            passed += 1
            scheduler.remove(scheduler.running[0])
        assert passed <= 101
    assert passed >= 99


def test_prompts_are_read_beside_decoding_up_to_the_work_of_one_block() -> None:
    scheduler = scheduler_of(6)
    writes = [make_sequence(), make_sequence()]
    add(scheduler, *writes)
    scheduler.schedule()
    for sequence in writes:
        sequence.phase = Phase.DECODE
    cheap = [make_sequence(prompt=10 * BLOCK, budget=0.5) for _ in range(3)]
    full = make_sequence(prompt=10 * BLOCK)
    add(scheduler, full, *cheap)
    batch = scheduler.schedule()
    assert batch.decode == writes
    assert batch.prefill == cheap[:2]
    assert len(batch) == 4
    for sequence in cheap:
        scheduler.remove(sequence)
    assert scheduler.schedule().prefill == [full], "one block is always read"


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9, 1.0])
def test_reading_keeps_to_its_share_of_the_time_of_running_streams(share: float) -> None:
    scheduler = scheduler_of(2, prefill_share=share)
    writes, reads = make_sequence(), make_sequence(prompt=10**6)
    add(scheduler, writes)
    scheduler.schedule()
    writes.phase = Phase.DECODE
    add(scheduler, reads)
    prefill = decode = 0.0
    for _ in range(2000):
        seconds = 7.0 if scheduler.schedule().prefill else 0.0
        prefill, decode = prefill + seconds, decode + 1.0
        scheduler.charge(seconds, 1.0)
    assert prefill / (prefill + decode) == pytest.approx(min(share, 7 / 8), rel=0.02)


@pytest.mark.parametrize(("cheap", "full"), [(1, 15), (8, 8), (15, 1), (0, 16)])
def test_dear_sequences_take_turns_where_cheap_ones_would_wait_for_them(cheap: int, full: int) -> None:
    scheduler = scheduler_of(16, decode_stretch=1.3)
    sequences = [make_sequence(budget=0.01) for _ in range(cheap)] + [make_sequence() for _ in range(full)]
    add(scheduler, *sequences)
    scheduler.schedule()
    for sequence in sequences:
        sequence.phase = Phase.DECODE
    steps = [scheduler.schedule().decode for _ in range(1000)]
    counts = [sum(sequence in step for step in steps) for sequence in sequences]
    share = min(sequence.grant.granted for sequence in sequences)
    room = 1.3 * 16 * share
    assert all(sum(sequence.grant.granted for sequence in step) <= room + 1e-6 for step in steps)
    assert counts[:cheap] == [1000] * cheap
    assert max(counts[cheap:]) - min(counts[cheap:]) <= 1, "those that take turns do so evenly"
    due = min(1.0, (room - cheap * share - 1.0) / full)  # less than one of them may be left over
    assert min(counts[cheap:]) >= 1000 * due - 1


def test_one_that_joins_neither_catches_up_nor_waits() -> None:
    scheduler = scheduler_of(4, decode_stretch=1.0)
    early = [make_sequence(budget=0.01), make_sequence(), make_sequence()]
    add(scheduler, *early)
    scheduler.schedule()
    for sequence in early:
        sequence.phase = Phase.DECODE
    for _ in range(100):
        scheduler.schedule()
    late = make_sequence()
    add(scheduler, late)
    scheduler.schedule()
    late.phase = Phase.DECODE
    steps = [scheduler.schedule().decode for _ in range(300)]
    counts = [sum(sequence in step for step in steps) for sequence in (*early[1:], late)]
    assert max(counts) - min(counts) <= 1


def test_nothing_holds_up_reading_while_nobody_generates() -> None:
    scheduler = scheduler_of(2, prefill_share=0.1)
    writes, reads = make_sequence(), make_sequence(prompt=100)
    add(scheduler, writes, reads)
    scheduler.schedule()
    writes.phase = Phase.DECODE
    scheduler.charge(1000.0, 1.0)
    assert not scheduler.schedule().prefill
    scheduler.remove(writes)
    assert scheduler.schedule().prefill == [reads]


def test_waiting_and_unknown_sequences_give_back_no_slot() -> None:
    scheduler = scheduler_of(1)
    runs, waits = make_sequence(), make_sequence()
    add(scheduler, runs, waits)
    scheduler.schedule()
    assert scheduler.remove(waits) is None
    assert scheduler.remove(make_sequence()) is None
    assert scheduler.remove(runs) == 0
    runs.finish = FinishReason.STOP
    scheduler.check_integrity()
    assert not scheduler.running
    assert not scheduler.waiting


def test_room_for_less_than_two_states_is_refused() -> None:
    with pytest.raises(ValueError, match="state_bytes = 300 must hold two states: at least 320"):
        Scheduler(Limits(4, 300, 1.0, BLOCK), SIZES)
