"""Two processes on a CPU, launched by torchrun, against one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.training.distributed import ALONE, Ranks, join_ranks
from model.training.log import LOSSES, read_log
from model.training.loop import Run, train
from model.training.validation import SHARES
from tests.model.training.runs import RECIPE_TOML, recipe, write_corpus

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

EQUAL = {
    "plain": recipe(plain=True, sequences=4),
    # Without what a process works out over its own rows: thresholds, and statistics.
    "elastic_at_a_stride": recipe(sequences=4, uniform_share=1.0, lambda_info=0.0),
}
"""Runs that several processes do exactly as one does, but for rounding."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left of the runs of ``rank_process.py``."""
    folder = tmp_path_factory.mktemp("ranks")
    write_corpus(folder / "corpus")
    command = [*TORCHRUN, "-m", "tests.model.training.rank_process", str(folder / "corpus"), str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stderr
    return folder


def left(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_have_the_loss_curve_of_one(name: str, launched: Path, tmp_path: Path) -> None:
    train(Run(launched / "corpus", tmp_path), EQUAL[name])
    alone, together = read_log(tmp_path), read_log(launched / name)
    assert [row["step"] for row in together] == ["1", "2", "3", "4", "5", "6"]
    compared = [f"loss_{one}" for one in LOSSES] + ["validation_full", "validation_floor", "learning_rate"]
    for row, other in zip(alone, together, strict=True):
        for column in compared:
            assert (row[column] == "") == (other[column] == ""), column
            if row[column]:
                assert float(other[column]) == pytest.approx(float(row[column]), abs=1e-5), (row["step"], column)
        assert float(other["gradient_norm"]) == pytest.approx(float(row["gradient_norm"]), rel=1e-3)


@pytest.mark.parametrize("name", [*EQUAL, "elastic"])
def test_both_processes_end_with_the_same_model(name: str, launched: Path) -> None:
    """To the last bit: parameters, running statistics, calibrated tables."""
    first, second = left(launched, name)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(second[key], value), key


def test_the_density_learns_from_the_texts_of_both(launched: Path, tmp_path: Path) -> None:
    """Where processes fit thresholds and statistics to their own rows, they come close to what one does, no closer."""
    train(Run(launched / "corpus", tmp_path), recipe())
    alone, together = read_log(tmp_path), read_log(launched / "elastic")
    assert float(together[0]["loss_full"]) == pytest.approx(float(alone[0]["loss_full"]), abs=1e-5)
    for rate in SHARES:
        column = f"validation_{rate}"
        assert float(together[-1][column]) == pytest.approx(float(alone[-1][column]), rel=0.05)


def test_sequences_that_cannot_be_shared_are_refused(launched: Path) -> None:
    assert left(launched, "indivisible") == ["sequences = 3 must be a multiple of the 2 processes"] * 2


def test_one_process_that_is_asked_to_stop_stops_both(launched: Path) -> None:
    assert [one["steps"].item() for one in left(launched, "stopped")] == [2, 2]


def test_a_loss_that_is_not_finite_on_one_process_stops_both(launched: Path) -> None:
    first, second = left(launched, "nan")
    for message in (first, second):
        assert message.startswith("the loss is not finite in step 5: loss ")
        assert f"the state of step 3 in {launched / 'nan'} is whole" in message
    assert "loss nan" not in first
    assert "loss nan" in second


def test_a_process_that_lost_another_says_so(launched: Path) -> None:
    first, second = left(launched, "lost")
    kept = f"in step 5; the state of step 3 in {launched / 'lost'} is whole"
    assert first.startswith(f"another process of the run broke off {kept}")
    assert second.startswith(f"out of memory {kept}")


def test_the_command_runs_under_torchrun_and_resumes(tmp_path: Path) -> None:
    corpus, file, out = write_corpus(tmp_path / "corpus"), tmp_path / "recipe.toml", tmp_path / "out"
    file.write_text(RECIPE_TOML)
    command = [*TORCHRUN, "-m", "service.cli", "train", str(corpus), "--recipe", str(file), "--output", str(out)]
    for more in (["--minutes", "0"], ["--resume"]):
        finished = subprocess.run([*command, "--device", "cpu", *more], capture_output=True, text=True, timeout=200)
        assert finished.returncode == 0, finished.stderr
        if more != ["--resume"]:
            assert finished.stderr.count("rheostat: stopped after step 1, saved in ") == 1
    assert [row["step"] for row in read_log(out)] == ["1", "2", "3", "4", "5", "6"]


def test_without_torchrun_a_process_is_alone() -> None:
    with join_ranks("cpu") as (ranks, device):
        assert (ranks, device) == (ALONE, "cpu")
    batch = torch.arange(8).view(4, 2)
    assert torch.equal(ALONE.rows(batch), batch)
    assert torch.equal(Ranks(1, 2).rows(batch), batch[2:])
