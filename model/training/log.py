"""The log of a run: ``log.csv``, one row every few steps."""

from __future__ import annotations

import csv
import io
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from model.training.faults import TrainingError
from model.training.validation import SCORES

LOG_FILE = "log.csv"

LOSSES = ("full", "shallow", "reduced", "floor", "exit")
"""Bits per byte of training text by pass: at full resolution, at smaller depths, at any reduced rate, without the
trunk, early exit."""

COLUMNS = (
    "step",
    "bytes",
    "seconds",
    "learning_rate",
    *(f"loss_{name}" for name in LOSSES),
    *(f"validation_{name}" for name in SCORES),
    "gradient_norm",
    "memory_mib",
)
"""Losses and the gradient's norm are means over the steps since the row before; seconds are those spent in steps, over
all sessions; a row that no validation belongs to, and a pass that did not occur, leave their columns empty."""


class TrainingLog:
    """Appends rows to a run's log.

    Args:
        folder: of the run. steps: those that the run has done; rows after them are dropped, since they will be written
            again.

    Raises:
        TrainingError: the log of an earlier session has other columns, or none can be written here.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self._path = folder / LOG_FILE
        kept = [row for row in read_log(folder) if int(row["step"]) <= steps] if self._path.exists() else []
        rows = [list(COLUMNS), *([row[name] for name in COLUMNS] for row in kept)]
        partial = folder / f"{LOG_FILE}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(map(_line, rows)), encoding="utf-8")
            partial.replace(self._path)
        except OSError as error:
            raise TrainingError(f"cannot write {self._path}: {error.strerror}") from error

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row; every key must be a column."""
        unknown = row.keys() - set(COLUMNS)
        assert not unknown, f"no columns for {sorted(unknown)}"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line([_written(row[name]) if name in row else "" for name in COLUMNS]))


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log by column; a row that was cut off is left out.

    Raises:
        TrainingError: there is no log, or its columns are others.
    """
    path = folder / LOG_FILE
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror}") from error
    header = rows[0] if rows else []
    if header != list(COLUMNS):
        raise TrainingError(f"{path} has the columns {','.join(header)}, not {','.join(COLUMNS)}")
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows[1:] if len(row) == len(COLUMNS)]


def peak_memory(device: torch.device) -> float:
    """The most MiB that were in use so far: of the GPU's, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


class Means:
    """Means of named values since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Count one value of each name."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1

    def peek(self) -> dict[str, float]:
        """The means so far."""
        return {name: total / count for name, (total, count) in self._sums.items()}

    def take(self) -> dict[str, float]:
        """The means so far; counts from nothing afterwards."""
        means = self.peek()
        self._sums.clear()
        return means


def _written(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.8g}"


def _line(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
