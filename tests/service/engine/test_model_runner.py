from __future__ import annotations

import os
import subprocess
import sys

WORK = """
import importlib, pkgutil, time
import model.ops
from numba.core.dispatcher import Dispatcher
from service.engine.engine import Engine
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Limits, Scheduler
from service.metrics import Metrics
from tests.service.engine.fakes import make_sequence
from tests.service.servers import tiny_model

modules = [importlib.import_module(f"model.ops.{module.name}") for module in pkgutil.iter_modules(model.ops.__path__)]
loops = {f.__name__: f for module in modules for f in vars(module).values() if isinstance(f, Dispatcher)}

def compiled():
    return {name: len(f.signatures) for name, f in loops.items()}

runner = ModelRunner(tiny_model())
assert not any(compiled().values())
runner.warm_up()
warm = compiled()
for loop in ("block_rows", "convolve_rows", "keep_window", "mixer_rows", "density_rows", "plan_block"):
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
assert all(sequence.finish is not None for sequence in sequences)
assert compiled() == warm, (compiled(), warm)
"""


def test_nothing_is_compiled_after_the_warm_up() -> None:
    """In a process of its own: in this one other tests may have compiled what the warm-up forgot."""
    result = subprocess.run(
        [sys.executable, "-c", WORK],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
