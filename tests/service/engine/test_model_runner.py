from __future__ import annotations

import os
import subprocess
import sys

import pytest
from torch.utils.flop_counter import FlopCounterMode

from service.engine.model_runner import ModelRunner
from tests.model.shapes import without_compiled_code
from tests.service.engine.fakes import make_sequence
from tests.service.servers import tiny_model

WORK = """
import importlib, pkgutil, sys, time
import torch
import model.ops
from numba.core.dispatcher import Dispatcher
from service.engine.engine import Engine
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Limits, Scheduler
from service.metrics import Metrics
from tests.service.engine.fakes import make_sequence
from tests.service.servers import TINY, tiny_model

modules = [importlib.import_module(f"model.ops.{module.name}") for module in pkgutil.iter_modules(model.ops.__path__)]
loops = {f.__name__: f for module in modules for f in vars(module).values() if isinstance(f, Dispatcher)}

def compiled():
    return {name: len(f.signatures) for name, f in loops.items()}

rank = int(sys.argv[1])
stages = {"shallow_depths": (1,), "density_measured": False, "density_hidden": 8, "own_decoders": True}
shape = TINY.model_copy(update={"propagation_rank": rank} | stages if rank else {})
runner = ModelRunner(tiny_model(config=shape))
assert not any(compiled().values())
runner.warm_up()
warm = compiled()
used = ["encode_rows", "decode_rows", "keep_window", "mixer_rows", "density_rows", "plan_block", "draw_rows"]
used += ["enter_rows"] if rank else []
for loop in used:
    assert warm[loop] == 1, warm
limits = Limits.for_states(runner.state_sizes, running=5, block_size=runner.block_size)
engine = Engine(runner, Scheduler(limits, runner.state_sizes), Metrics("tiny"), time.monotonic)
sequences = [
    make_sequence(prompt, max_tokens, budget)
    for prompt, max_tokens, budget in [(1, 30, 1.0), (63, 9, 0.6), (64, 20, 0.4), (200, 5, 0.01), (130, 12, 0.8)]
]
engine.add(sequences)
while not engine.idle:
    engine.step()
    for sequence in sequences:  # the memory is short: a state that may still have bytes to read shrinks
        if sequence.slot is not None and sequence.prefilled:
            with torch.inference_mode():
                runner.pool.resize(sequence.slot, 4)
                runner.pool.set_depth(sequence.slot, shape.depths[0])  # and until the next step its trunk ends early
assert all(sequence.finish is not None for sequence in sequences)
assert compiled() == warm, (compiled(), warm)
"""


@pytest.mark.parametrize("rank", [0, 8], ids=["skips", "propagates"])
def test_nothing_is_compiled_after_the_warm_up(rank: int) -> None:
    """In a process of its own: in this one other tests may have compiled what the warm-up forgot."""
    result = subprocess.run(
        [sys.executable, "-c", WORK, str(rank)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr


def test_a_decoding_step_is_billed_what_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All budgets in a batch, one state shrunk. What torch does not see is taken off: recurrence and window."""
    without_compiled_code(monkeypatch)
    model = tiny_model()
    runner, config = ModelRunner(model), model.config
    sequences = [make_sequence(prompt=70, max_tokens=99, budget=budget) for budget in (1.0, 0.9, 0.8, 0.01)]
    for slot, sequence in enumerate(sequences):
        sequence.slot, sequence.columns = slot, config.d_state if slot else min(config.d_state_levels)
        while not sequence.prefilled:
            (outcome,) = runner.prefill([sequence])
            assert outcome is not None
            sequence.read += outcome.positions
        sequence.last_token = 65

    def unseen(width: int, columns: int) -> int:
        inner = config.inner(width)
        return 2 * config.d_conv * (inner + 2 * config.d_state) + 5 * inner * columns

    for _ in range(20):
        with FlopCounterMode(display=False) as counter:
            outcomes = runner.decode(sequences)
        booked = 0
        for sequence, outcome in zip(sequences, outcomes, strict=True):
            assert outcome is not None
            outer = (config.encoder_layers + config.decoder_layers) * unseen(config.d_model, config.d_state)
            trunk = len(outcome.tile_ends) * config.trunk_layers * unseen(config.d_trunk, sequence.columns)
            density = 2 * (2 * config.inner(config.d_model) + config.density_window) * config.d_state
            analysed = 0.0 < sequence.grant.rates.decode < 1.0
            booked += outcome.flops.total - outer - trunk - density * analysed
        assert counter.get_total_flops() == booked
