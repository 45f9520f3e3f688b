"""Pictures of what :mod:`benchmarks.serving` and :mod:`benchmarks.overload` measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_serving(report: Mapping[str, Any], path: Path) -> None:
    """Throughput and latency against clients, per budget; latency against arrivals."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    throughput, latency, arrivals = figure.subplots(1, 3)
    for budget in sorted({row["budget"] for row in report["closed_loop"]}, reverse=True):
        rows = [row for row in report["closed_loop"] if row["budget"] == budget]
        clients = [row["clients"] for row in rows]
        label = f"budget {budget:g}"
        throughput.plot(clients, [row["tokens_per_second"] for row in rows], "o-", label=label)
        latency.plot(clients, [row["latency"]["inter_token"]["p95"] for row in rows], "o-", label=label)
    loads = [row["share_of_capacity"] for row in report["open_loop"]]
    for name, style in (("first_token", "s--"), ("end_to_end", "o-")):
        values = [row["latency"][name]["p95"] for row in report["open_loop"]]
        arrivals.plot(loads, values, style, label=name.replace("_", " "))
    for axes, x, y in (
        (throughput, "clients", "generated tokens / s"),
        (latency, "clients", "time per token, p95 (s)"),
        (arrivals, "arrivals / capacity", "latency, p95 (s)"),
    ):
        axes.set(xlabel=x, ylabel=y, ylim=(0, None))
        axes.legend()
    for axes in (throughput, latency):
        axes.set_xscale("log", base=2)
    figure.savefig(path)


def plot_overload(report: Mapping[str, Any], path: Path) -> None:
    """Goodput, granted budget and latency over time, one line per arm."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    goodput, granted, latency = figure.subplots(1, 3)
    for name, arm in report["arms"].items():
        rows = arm["over_time"]
        seconds = [row["seconds"] for row in rows]
        goodput.plot(seconds, [row["goodput"] for row in rows], label=name)
        granted.plot(seconds, [_or_gap(row["granted"]) for row in rows], label=name)
        latency.plot(seconds, [_or_gap(row["latency"]["p95"]) for row in rows], label=name)
    latency.axhline(report["latency_target_seconds"], color="grey", linestyle=":", label="target")
    for axes, label in (
        (goodput, "answers within the target / s"),
        (granted, "granted budget, mean"),
        (latency, "end to end, p95 (s)"),
    ):
        axes.set(xlabel="seconds", ylabel=label, ylim=(0, None))
        axes.legend()
    figure.savefig(path)


def _or_gap(value: float | None) -> float:
    """A line breaks at NaN."""
    return float("nan") if value is None else value
