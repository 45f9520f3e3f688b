"""What breaks a run off, planted; the state that was saved before stays whole, and the message says how to go on."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import model.training.loop
import model.training.optimizer
from model.checkpoint import load_checkpoint
from model.training.faults import BrokenRunError, TrainingError
from model.training.log import read_log
from model.training.loop import Run, train
from model.training.loss import Loss, compute_loss
from model.training.optimizer import AdaptiveOptimizer
from model.training.stopping import ECHO_SECONDS, StopRequest
from service.cli import main
from tests.model.training.runs import RECIPE, RECIPE_TOML, after, weights

Plant = Callable[[Loss, torch.nn.Module], None]


def plant(monkeypatch: pytest.MonkeyPatch, step: int, fault: Plant) -> None:
    """Let ``fault`` change the loss of one step, counted from 1."""
    calls = []

    def faulty(system: torch.nn.Module, *arguments: object) -> Loss:
        calls.append(None)
        loss = compute_loss(system, *arguments)
        if len(calls) == step:
            fault(loss, system)
        return loss

    monkeypatch.setattr(model.training.optimizer, "compute_loss", faulty)


def loss_is_nan(loss: Loss, _: torch.nn.Module) -> None:
    loss.total = loss.total * float("nan")


def gradient_is_nan(loss: Loss, system: torch.nn.Module) -> None:
    loss.total = loss.total + (0.0 * system.embedding.weight.sum()).sqrt()
    assert loss.total.isfinite()


def allocator_gives_up(loss: Loss, _: torch.nn.Module) -> None:
    torch.empty(1 << 50)


def python_gives_up(loss: Loss, _: torch.nn.Module) -> None:
    raise MemoryError


def gpu_gives_up(loss: Loss, _: torch.nn.Module) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


KEPT = "the state of step 3 in .*out is whole"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            loss_is_nan,
            rf"the loss is not finite in step 5: loss nan \(bits per byte: full \d.*; {KEPT}.*--initial .*out",
        ),
        (gradient_is_nan, rf"the gradient's norm is nan in step 5: loss \d.*; {KEPT}.*lower --learning-rate"),
        (allocator_gives_up, rf"out of memory in step 5; {KEPT}. --checkpointing .*--sequences or --length"),
        (python_gives_up, rf"out of memory in step 5; {KEPT}"),
        (gpu_gives_up, rf"out of memory in step 5; {KEPT}"),
    ],
)
def test_a_broken_step_leaves_the_last_state_untouched(
    fault: Plant, message: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(Run(corpus, out), RECIPE, stop_asked=after(3))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    plant(monkeypatch, 2, fault)
    with pytest.raises(BrokenRunError, match=message):
        train(Run(corpus, out, resume=True), RECIPE)
    later = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(read_log(out)) == 4
    assert before.keys() == later.keys()
    assert all(before[name] == later[name] for name in before if name != "log.csv")
    monkeypatch.undo()
    assert train(Run(corpus, out, resume=True), RECIPE).steps == 6


def test_a_run_that_saved_nothing_says_so(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, 1, loss_is_nan)
    with pytest.raises(BrokenRunError, match=r"nothing was saved in .*out yet.*: start another one, with a lower"):
        train(Run(corpus, tmp_path / "out"), RECIPE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.csv"]


def test_parameters_that_are_not_finite_are_never_saved(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AdaptiveOptimizer.optimize_step

    def breaking(self: AdaptiveOptimizer, tokens: torch.Tensor, reduced: object, number: int) -> object:
        taken = step(self, tokens, reduced, number)
        if number == 5:
            with torch.no_grad():
                self.model.router.raw_fading[0] = float("inf")
        return taken

    monkeypatch.setattr(AdaptiveOptimizer, "optimize_step", breaking)
    with pytest.raises(
        BrokenRunError, match=rf"1 tensors, router.raw_fading first, are not finite after step 6; {KEPT}"
    ):
        train(Run(corpus, tmp_path / "out"), RECIPE)
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())


def test_other_errors_are_not_explained_away(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(loss: Loss, system: torch.nn.Module) -> None:
        raise RuntimeError("shapes do not fit")

    plant(monkeypatch, 1, mistake)
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        train(Run(corpus, tmp_path / "out"), RECIPE)


def full_state_file(out: Path) -> None:
    (out / "training.pt.partial").symlink_to("/dev/full")


def files_stay_small(out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize(
    ("fault", "reason"), [(full_state_file, "No space left on device"), (files_stay_small, "File too large")]
)
def test_a_full_disk_leaves_the_last_state_untouched(
    fault: Callable[[Path], None], reason: str, corpus: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    train(Run(corpus, out), RECIPE, stop_asked=after(3))
    before = (out / "training.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        fault(out)
        message = rf"cannot write to .*out: .*{reason}.*; {KEPT}, and --resume goes on from it once that is mended"
        with pytest.raises(BrokenRunError, match=message):
            train(Run(corpus, out, resume=True), RECIPE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (out / "training.pt").read_bytes() == before
    assert not list(out.glob("*.partial"))
    assert load_checkpoint(out)
    train(Run(corpus, out, resume=True), RECIPE)
    train(Run(corpus, whole), RECIPE)
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(whole).items())


def test_an_output_that_cannot_be_written_is_refused_at_once(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot write .*log.csv: "):
        train(Run(corpus, tmp_path / "file" / "out"), RECIPE)


def test_a_broken_run_is_one_line_and_status_1(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE_TOML)
    plant(monkeypatch, 5, loss_is_nan)
    options = ["--recipe", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["train", str(corpus), *options]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rheostat: the loss is not finite in step 5: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_and_it_resumes(
    number: signal.Signals, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE_TOML)
    out = tmp_path / "out"
    options = ["--recipe", str(tmp_path / "recipe.toml"), "--output", str(out), "--device", "cpu"]
    command = ["train", str(corpus), *options, "--save-every", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", *command, "--steps", "1000000"], stderr=subprocess.PIPE, text=True
    )
    try:
        while process.poll() is None and not (out.exists() and len((out / "log.csv").read_text().splitlines()) > 3):
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    told = re.search(
        r"rheostat: stopped after step (\d+), saved in .*out; the same command with --resume goes on", errors
    )
    assert told
    done = int(told[1])
    assert int(read_log(out)[-1]["step"]) == done
    assert main([*command, "--steps", str(done + 2), "--resume"]) == 0
    assert int(read_log(out)[-1]["step"]) == done + 2


def test_a_signal_is_noted_with_its_echo_and_acts_when_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with StopRequest() as stop:
            assert stop.signal is None
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
            later = time.monotonic() + ECHO_SECONDS + 1.0
            monkeypatch.setattr(time, "monotonic", lambda: later)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)
