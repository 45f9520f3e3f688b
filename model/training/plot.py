"""``rheostat plot-training``: the curves of one run, or of several side by side."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from model.training.log import read_log
from model.training.validation import SCORES, SHARES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {
    "full": "-",
    "shallow": (0, (3, 1, 1, 1, 1, 1)),
    "three_quarters": (0, (8, 2)),
    "half": "--",
    "quarter": "-.",
    "floor": ":",
}
"""Of the line, by trunk rate."""

EARLY = 0.1
"""Share of a run at its start whose height is cut off: it would hide all that comes after it."""

Curve = list[tuple[float, float]]
"""(megabytes read, bits per byte) of the rows that have both."""


def add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command on ``parser``."""
    parser.add_argument("runs", type=Path, nargs="+", help="folders that rheostat train wrote to")
    parser.add_argument("--output", type=Path, default=Path("training.svg"), help="picture: .svg, .png or .pdf")


def run_plot(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    runs: list[Path] = arguments.runs
    short = len({run.name for run in runs}) == len(runs)
    plot_training({run.name if short else str(run): read_curves(run) for run in runs}, arguments.output)
    print(arguments.output)
    return 0


def read_curves(run: Path) -> dict[str, Curve]:
    """The curves of a run by column, of training at full resolution and of validation at each rate.

    Raises:
        TrainingError: it has no log, or one with other columns.
    """
    rows = read_log(run)
    return {
        name: [(int(row["bytes"]) / 1e6, float(row[name])) for row in rows if row[name]]
        for name in ("loss_full", *(f"validation_{rate}" for rate in SCORES))
    }


def plot_training(runs: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Draw runs, by name, into the picture ``path``, whose ending says the format.

    Raises:
        ValueError: matplotlib is missing, or does not know the format.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'rheostat[plot]'") from error
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, curves in enumerate(runs.values()):
        _draw(axes, curves, f"C{number}")
    heights = [height for curves in runs.values() for height in _late(curves)]
    if heights:
        margin = 0.05 * (max(heights) - min(heights)) + 0.01
        axes.set_ylim(min(heights) - margin, max(heights) + margin)
    axes.set(xlabel="training text read (MB)", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    names = [Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(runs)]
    drawn = {rate for curves in runs.values() for rate in SCORES if curves[f"validation_{rate}"]}
    rates = [Line2D([], [], color="grey", ls=STYLES[rate], label=_label(rate)) for rate in SCORES if rate in drawn]
    training = Line2D([], [], color="grey", alpha=0.35, lw=1, label="training, full")
    axes.add_artist(axes.legend(handles=names, loc="upper right"))
    axes.legend(handles=[*rates, training], loc="upper center")
    figure.savefig(path)


def _draw(axes: Axes, curves: Mapping[str, Curve], color: str) -> None:
    for rate, style in STYLES.items():
        if curve := curves[f"validation_{rate}"]:
            axes.plot(*zip(*curve, strict=True), color=color, ls=style, marker="." if len(curve) == 1 else "")
    if curve := curves["loss_full"]:
        axes.plot(*zip(*curve, strict=True), color=color, alpha=0.35, lw=1, zorder=1)


def _late(curves: Mapping[str, Curve]) -> list[float]:
    """Heights that the picture must have room for."""
    end = max((curve[-1][0] for curve in curves.values() if curve), default=0.0)
    return [
        height
        for curve in curves.values()
        for megabytes, height in curve
        if megabytes >= EARLY * end and math.isfinite(height)
    ]


def _label(rate: str) -> str:
    return f"validation, {rate.replace('_', ' ')}" + (" of the trunk" if 0 < SHARES.get(rate, 0) < 1 else "")
