"""The frontier as a picture: bits per byte against operations, one panel per domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.evaluation.arms import ADAPTIVE, ONLY, WITHOUT

Json = dict[str, Any]

_STRONG = (ADAPTIVE, "uniform")


def plot(results: Json, path: Path) -> None:
    """Draw results as ``rheostat evaluate`` writes them; single features, scored at few points, are left out.

    Bars are 95 % intervals of the difference to full resolution on the same documents.
    """
    domains = results["domains"]
    figure = Figure(figsize=(6.0 * len(domains), 4.9), layout="constrained")
    panels = figure.subplots(1, len(domains), squeeze=False)[0]
    for axes, (name, domain) in zip(panels, domains.items(), strict=True):
        others = [arm for arm in domain["arms"] if arm not in (*_STRONG, *ONLY, *WITHOUT)]
        for number, arm in enumerate((*_STRONG, *others)):
            if arm in domain["arms"]:
                _curve(axes, domain["arms"][arm], arm, color=f"C{number}", faint=arm in others)
        if domain["plain"]:
            _curve(axes, domain["plain"], "plain Mamba-2, separately trained", color="black", marker="s")
            _names(axes, domain["plain"])
        axes.set(title=f"{name}, {domain['bytes']:,} bytes", xlabel="FLOPs, share of full", ylabel="bits per byte")
        axes.grid(alpha=0.3)
    entries = panels[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=2 * len(panels) + 1, fontsize="small")
    bound = " (an upper bound: plans see their block)" if results["protocol"] == "P2" else ""
    figure.suptitle(f"{results['model']}, protocol {results['protocol']}{bound}")
    figure.savefig(path)


def _curve(axes: Axes, rows: Sequence[Json], label: str, *, color: str, faint: bool = False, marker: str = "o") -> None:
    rising = sorted(rows, key=lambda row: float(row["flop_ratio"]))
    bars = [_bar(row["above_full"]) for row in rising]
    axes.errorbar(
        [row["flop_ratio"] for row in rising],
        [row["bits_per_byte"] for row in rising],
        yerr=[[low for low, _ in bars], [high for _, high in bars]],
        label=label,
        color=color,
        marker=marker,
        markersize=3 if faint else 5,
        linewidth=0.8 if faint else 1.8,
        alpha=0.6 if faint else 1.0,
        capsize=2,
    )


def _names(axes: Axes, rows: Sequence[Json]) -> None:
    """Write each model's name beside its point; the dearest one's ends there, to stay inside the panel."""
    dearest = max(float(row["flop_ratio"]) for row in rows)
    for row in rows:
        last = row["flop_ratio"] == dearest
        axes.annotate(
            row["name"],
            (row["flop_ratio"], row["bits_per_byte"]),
            xytext=(0 if last else 5, 20 if last else 8),
            textcoords="offset points",
            horizontalalignment="right" if last else "left",
            fontsize="small",
        )


def _bar(above: Json) -> tuple[float, float]:
    """Lengths of an error bar under and over its point; none where there is no interval."""
    if above["interval"] is None:
        return 0.0, 0.0
    low, high = above["interval"]
    return max(above["value"] - low, 0.0), max(high - above["value"], 0.0)
