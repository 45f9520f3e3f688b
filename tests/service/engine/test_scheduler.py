from __future__ import annotations

from service.engine.scheduler import Scheduler
from service.engine.sequence import FinishReason, Phase
from tests.service.engine.fakes import make_sequence


def test_slots_are_given_in_order_of_arrival() -> None:
    scheduler = Scheduler(2)
    first, second, third = (make_sequence() for _ in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    scheduler.schedule()
    assert scheduler.running == [first, second]
    assert list(scheduler.waiting) == [third]
    scheduler.remove(first)
    scheduler.schedule()
    assert scheduler.running == [second, third]
    scheduler.check_integrity()


def test_one_prompt_at_a_time_runs_beside_all_decoding() -> None:
    scheduler = Scheduler(4)
    sequences = [make_sequence() for _ in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.schedule()
    sequences[0].phase = sequences[1].phase = Phase.DECODE
    batch = scheduler.schedule()
    assert batch.decode == sequences[:2]
    assert batch.prefill is sequences[2]
    assert len(batch) == 3


def test_waiting_and_unknown_sequences_give_back_no_slot() -> None:
    scheduler = Scheduler(1)
    runs, waits = make_sequence(), make_sequence()
    scheduler.add(runs)
    scheduler.add(waits)
    scheduler.schedule()
    assert scheduler.remove(waits) is None
    assert scheduler.remove(make_sequence()) is None
    assert scheduler.remove(runs) == 0
    runs.finish = FinishReason.STOP
    scheduler.check_integrity()
    assert not scheduler.running
    assert not scheduler.waiting
