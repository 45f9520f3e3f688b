"""Plants faults of the kinds that state-space models really suffer from, one by one, and counts those that tests catch.

``python -m tests.mutation`` works in a temporary copy of the tree. A fault is a small edit that must fit the source
exactly once, so the list cannot rot unnoticed (``tests/test_mutation.py``). Exit status 1 if a fault survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("model", "tests")

SCAN = "model/ops/ssd.py"
MIXER = "model/layers/mamba2.py"
LOOPS = "model/ops/recurrent.py"
WORDS = "model/ops/words.py"
VIEWS = "model/ops/views.py"
RULE = "model/ops/tiling.py"
DENSITY = "model/adaptive/density.py"
SYSTEM = "model/lm.py"
ROUTER = "model/adaptive/router.py"

READING = "tests/parity/test_any_reading.py"
STEPS = "tests/parity/test_step_equals_forward.py"
CAUSAL = "tests/parity/test_causality.py"
PACKING = "tests/parity/test_packing.py"


class MutationError(RuntimeError):
    """A fault does not fit the source, or the tests say nothing about it."""


@dataclass(frozen=True)
class Mutation:
    """One fault: ``old`` in ``file`` becomes ``new``, and ``tests`` should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Plant the fault in the tree at ``root``.

        Raises:
            MutationError: ``old`` does not occur exactly once.
        """
        path = root / self.file
        source = path.read_text(encoding="utf-8")
        found = source.count(self.old)
        if found != 1:
            raise MutationError(f"{self.name}: {self.old!r} occurs {found} times in {self.file}, not once")
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")


MUTATIONS = (
    Mutation(
        "scan: sums start at the chunk, not at the sequence", SCAN,
        "states.append(torch.addcmul(new, kept, states[-1]))", "states.append(new)", (STEPS,),
    ),
    Mutation(
        "scan: initial state dropped", SCAN,
        "states = [initial]", "states = [torch.zeros_like(initial)]", (READING,),
    ),
    Mutation(
        "scan: decays of chunks one late where states pass at once", SCAN,
        "F.pad(log_decay, (0, 0, 1, 0))", "F.pad(log_decay, (0, 0, 0, 1))", ("tests/model/ops/test_ssd.py",),
    ),
    Mutation(
        "pass: convolution state dropped between pieces", MIXER,
        "window = torch.cat([state.conv_state, xBC_raw], dim=1)",
        "window = torch.cat([state.conv_state * 0, xBC_raw], dim=1)", (READING,),
    ),
    Mutation(
        "compiled pass: convolution state dropped between pieces", LOOPS,
        "window[at + k + taps - 1, first:last]", "projected[0, low:high]", (READING,),
    ),
    Mutation(
        "pass: a short piece keeps the oldest inputs of the convolution", MIXER,
        "conv_state = window[:, window.shape[1] - kept :]", "conv_state = window[:, :kept]", (READING,),
    ),
    Mutation(
        "tile pooled over its past instead of selected", SYSTEM,
        "take_rows(given.inputs, places)",
        "take_rows(given.inputs.cumsum(1) / given.inputs[..., :1].abs().gt(-1).cumsum(1), places)", (STEPS,),
    ),
    Mutation(
        "tile pooled over the bytes to come", SYSTEM,
        "take_rows(given.inputs, places)", "take_rows(given.inputs.flip(1).cumsum(1).flip(1), places)", (CAUSAL,),
    ),
    Mutation(
        "a decision sees the next byte", RULE,
        "density[t],",
        "density[min(t + 1, length - 1)],", (CAUSAL, STEPS),
    ),
    Mutation(
        "compiled: limits of dt ignored", LOOPS,
        "min(max(size, least), most) * math.exp", "size * math.exp", (STEPS,),
    ),
    Mutation(
        "plain: limits of dt ignored", MIXER,
        ".clamp(self.least_dt, self.most_dt)", "", (STEPS,),
    ),
    Mutation(
        "compiled: dt rectified without the soft part", LOOPS,
        "max(raw, np.float32(0.0)) + np.float32(math.log1p(math.exp(-abs(raw)))))",
        "max(raw, np.float32(0.0)))", (STEPS,),
    ),
    Mutation(
        "length of a tile lost where a piece of prompt begins", SYSTEM,
        "prepend=router.last_fire.unsqueeze(1)", "prepend=router.positions.unsqueeze(1)", (READING,),
    ),
    Mutation(
        "update held before the first fire", ROUTER,
        "dim=1), fires.cumsum(1)\n", "dim=1), fires.cumsum(1).clamp(1, updates.shape[1])\n", (READING, CAUSAL),
    ),
    Mutation(
        "pass: age off by one where the update fades", ROUTER,
        "take_rows(known, slot), position - last)", "take_rows(known, slot), position - last + 1)", (STEPS,),
    ),
    Mutation(
        "compiled step: age off by one where the update fades", LOOPS,
        "math.log1p(positions[b] - last_fire[b])", "math.log1p(positions[b] - last_fire[b] + 1)", (STEPS,),
    ),
    Mutation(
        "quota not carried over pieces", SYSTEM,
        "quota = accrue(state.router.quota, rate, tokens.shape[1])",
        "quota = accrue(state.router.quota * 0, rate, tokens.shape[1])", (READING,),
    ),
    Mutation(
        "window of the density not carried over pieces", DENSITY,
        "keys = torch.cat([state.keys, trace.B], dim=1)",
        "keys = torch.cat([state.keys * 0, trace.B], dim=1)", (STEPS,),
    ),
    Mutation(
        "smoothed density starts anew in each piece", DENSITY,
        "levels = before.level.cpu().numpy().copy()", "levels = np.zeros(len(density))", (STEPS,),
    ),
    Mutation(
        "compiled pass: padding advances a state", LOOPS,
        "count, at, window = lengths[b],", "count, at, window = gated.shape[1],", (PACKING,),
    ),
    Mutation(
        "plain pass: padding advances a state", MIXER,
        "dt = dt * (torch.arange(raw.shape[1], device=dt.device) < lengths.unsqueeze(1)).unsqueeze(-1)",
        "dt = dt * 1.0", (PACKING,),
    ),
    Mutation(
        "batch mates share a row of the state", LOOPS,
        "now, part = ssm_state[rows[i], h]", "now, part = ssm_state[i, h]", (PACKING,),
    ),
    Mutation(
        "compiled: weights rounded to bf16 unasked", WORDS,
        "frozen and exact_in_bf16(weight)", "frozen", (STEPS,),
    ),
    Mutation(
        "compiled: copies of weights outlive training", VIEWS,
        "if self._views is None or self.training:", "if self._views is None:", ("tests/model/ops/test_words.py",),
    ),
    Mutation(
        "compiled: scale of a state size dropped", LOOPS,
        "scale = level_scale[level]", "scale = _ONE", (STEPS,),
    ),
    Mutation(
        "stepping neglects that a running stretch goes on more easily", "model/adaptive/controller.py",
        "torch.where(running, -inertia, inertia)", "torch.where(running, inertia, inertia)", (READING,),
    ),
    Mutation(
        "compiled: the learned feature reads an output that is not normalised", "model/ops/features.py",
        "dot = dot * scale + inner_bias[unit]", "dot = dot + inner_bias[unit]",
        ("tests/model/ops/test_compiled_rows.py",),
    ),
    Mutation(
        "fused: no gradient through the size that the norm divides by", "model/ops/fused.py",
        " - values[c] * shrink", "", ("tests/model/ops/test_fused.py",),
    ),
    Mutation(
        "fused: the second part of the convolution has the gradient of the first", "model/ops/fused.py",
        "_through_silu(inner[first:], by_keys[b, t])", "_through_silu(inner[first:], by_x[b, t])",
        ("tests/model/ops/test_fused.py",),
    ),
    Mutation(
        "fused: no gradient through the size that the gated norm divides by", "model/ops/fused.py",
        " - gated[c] * shrink", "", ("tests/model/ops/test_fused.py",),
    ),
    Mutation(
        "fused scan: a decay's gradient neglects what stands after the inputs", "model/ops/fused_scan.py",
        " - dt[n, q, h] * by_dt[n, q, h]", "", ("tests/model/ops/test_fused_scan.py",),
    ),
    Mutation(
        "compiled pass: an output is added to the wrong rows", "model/layers/compiled.py",
        "rows = flat[start:end]", "rows = flat[: end - start]", ("tests/model/ops/test_compiled_rows.py",),
    ),
    Mutation(
        "a byte between fires leaves the convolution's inputs as they were", MIXER,
        "        _, after = ssd_step(x, self._dt(dt_raw, None)",
        "        state.conv_state.copy_(state.conv_state.roll(1, 1)); _, after = ssd_step(x, self._dt(dt_raw, None)",
        (STEPS, READING),
    ),
    Mutation(
        "compiled: a byte between fires is written into every column", LOOPS,
        "written = min(columns[i], levels[0])", "written = columns[i]", (STEPS, READING),
    ),
    Mutation(
        "compiled: columns that a byte between fires is not written into do not decay", LOOPS,
        "_fade_head(now, written, columns[i], faded)", "_fade_head(now, written, written, faded)", (STEPS, READING),
    ),
    Mutation(
        "compiled pass: a fire finds columns that have not decayed", LOOPS,
        "_fade_head(now, written, columns[b], faded[h])", "_fade_head(now, written, columns[b], _ONE)",
        (STEPS, READING),
    ),
    Mutation(
        "compiled: a fire does not wait for the bytes before it to be read", LOOPS,
        "np.flatnonzero(fired & (waiting > 0) | between", "np.flatnonzero(between", (STEPS, READING),
    ),
    Mutation(
        "compiled: the floor's states read on", LOOPS,
        "between = (rates > 0.0) & ~fired", "between = ~fired", (READING,),
    ),
    Mutation(
        "a block of a prompt without a fire is not read by the trunk's states", SYSTEM,
        "if most or propagated is not None:", "if most:", (READING,),
    ),
    Mutation(
        "compiled pass: codes stand at the wrong positions", "model/layers/compiled.py",
        "propagated.codes.flatten(0, 1)[rest]", "propagated.codes.flatten(0, 1).roll(1, 0)[rest]", (STEPS, READING),
    ),
    Mutation(
        "what waits is read by the blocks that run from now on", SYSTEM,
        "self.settle(state)\n        state.depth =", "state.depth =", ("tests/model/test_depth.py", READING),
    ),
    Mutation(
        "compiled: what waits is read by every block of the trunk", LOOPS,
        "for i in range(first, last):\n                levels",
        "for i in range(len(propagations)):\n                levels",
        ("tests/model/test_depth.py",),
    ),
    Mutation(
        "compiled: every stage leaves the trunk by the projection of the last", LOOPS,
        "rows, columns, first, last, blocks, ups[k])", "rows, columns, first, last, blocks, ups[-1])", (STEPS,),
    ),
    Mutation(
        "compiled: the stages below the one that is placed add nothing", LOOPS,
        "hidden[row] += update[i]", "hidden[row] += 0 * update[i]", (STEPS,),
    ),
    Mutation(
        "compiled: a later stage is placed by the thresholds of the first", "model/decoding.py",
        "tiles.fire_rows(density", "views.placements[0][1].fire_rows(density", (READING, "tests/model/test_depth.py"),
    ),
    Mutation(
        "the density of a later stage learns what all of the trunk is worth", "model/training/loss.py",
        "fresh.costs[stage - 1] if stage else floor_cost", "floor_cost", ("tests/model/test_depth.py",),
    ),
    Mutation(
        "compiled: every stage has the first one's decoder", LOOPS,
        "for i in range(depths[-1] + k * each, depths[-1] + (k + 1) * each):",
        "for i in range(depths[-1], depths[-1] + each):", (STEPS, "tests/model/test_depth.py"),
    ),
    Mutation(
        "in training every stage has the first one's decoder", SYSTEM,
        "read = [self._run(self._decoder(stage), one", "read = [self._run(self._decoder(0), one",
        ("tests/model/test_depth.py",),
    ),
    Mutation(
        "a decoder goes on from the states of another", SYSTEM,
        "block.map(torch.zeros_like) for block in state.decoder", "block for block in state.decoder",
        ("tests/model/test_depth.py",),
    ),
    Mutation(
        "full resolution learns from what it is to teach", "model/training/loss.py",
        "full_logits.detach()", "full_logits", ("tests/model/test_depth.py",),
    ),
    Mutation(
        "smaller depths draw reduced passes alike, whatever their blocks", "model/training/firing.py",
        "random.choice(shape.shallow_depths, p=blocks / blocks.sum())", "random.choice(shape.shallow_depths)",
        ("tests/model/test_depth.py",),
    ),
    Mutation(
        "a resize in mid-prompt does not reach the stages that run everywhere", SYSTEM,
        "if d_state is not None and below.stop:", "if False:", ("tests/parity/test_resolutions.py",),
    ),
    Mutation(
        "what another stage held is added to what this one does", SYSTEM,
        "router, held = state.router, torch.zeros_like(state.router.held)",
        "router, held = state.router, state.router.held", ("tests/model/test_depth.py", READING),
    ),
    Mutation(
        "operations of blocks that did not run billed", "model/cost.py",
        "tiles * self.tile(depth)", "tiles * self.tile()", ("tests/model/test_depth.py",),
    ),
    Mutation(
        "operations of the stages that run everywhere not billed", "model/cost.py",
        "trunk = positions * self.below(depth) +", "trunk =", ("tests/model/test_depth.py",),
    ),
    Mutation(
        "a stage placed with fewer fires than its least rate", "model/cost.py",
        "self.budget(max(rate, lowest), logits=1", "self.budget(lowest, logits=1", ("tests/model/test_depth.py",),
    ),
    Mutation(
        "a stage placed where its gain is not sure", "model/training/calibration.py",
        "pays = gains.mean(axis=1) > 2.0 * errors", "pays = gains.mean(axis=1) > 0.0 * errors",
        ("tests/model/training/test_parts.py",),
    ),
    Mutation(
        "operations between fires not billed", "model/cost.py",
        "read = max(analysed - tiles, 0)", "read = 0 * max(analysed - tiles, 0)", ("tests/model/test_cost.py",),
    ),
    Mutation(
        "operations of the density not billed", "model/cost.py",
        "density=analysed * self.density(depth)", "density=0", ("tests/model/test_cost.py",),
    ),
)  # fmt: skip


def copy_tree(source: Path, target: Path) -> Path:
    """Copy what a test run needs, compiled caches included: times are kept, so that they stay valid."""
    for name in COPIED:
        shutil.copytree(source / name, target / name)
    shutil.copy2(source / "pyproject.toml", target)
    return target


def run_tests(root: Path, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass in the tree at ``root``.

    Raises:
        MutationError: they did not run.
    """
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile", "unshrunk"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise MutationError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def survives(mutation: Mutation, pristine: Path) -> bool:
    """Plant one fault in a copy of the tree at ``pristine``; whether its tests pass all the same."""
    with tempfile.TemporaryDirectory() as folder:
        root = copy_tree(pristine, Path(folder))
        mutation.apply(root)
        return run_tests(root, mutation.tests)


def main() -> int:
    """Plant every fault; returns the exit status."""
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        pristine = copy_tree(ROOT, Path(folder))
        if not run_tests(pristine, tuple(sorted({test for one in MUTATIONS for test in one.tests}))):
            raise MutationError("the tests fail without any fault")
        for mutation in MUTATIONS:
            survived = survives(mutation, pristine)
            survivors += [mutation.name] * survived
            print(f"{'SURVIVED' if survived else 'caught'}: {mutation.name}", flush=True)
    print(f"planted {len(MUTATIONS)}, caught {len(MUTATIONS) - len(survivors)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
