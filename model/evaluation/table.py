"""Results as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

MATCHED = 0.01
"""Largest difference of operations from the shipped rule's at which an arm counts as equal."""


def table(results: Json) -> str:
    """The tables of all domains."""
    lines = [f"{results['documents']} documents, {results['bytes']:,} bytes, {results['model']}, {results['protocol']}"]
    for name, domain in results["domains"].items():
        lines += ["", *_domain(name, domain)]
    return "\n".join(lines)


def _domain(name: str, domain: Json) -> Iterator[str]:
    width = max(len(arm) for arm in domain["arms"])
    yield f"{name}: {domain['documents']} documents, {domain['bytes']:,} bytes"
    yield (
        f"{'arm':{width}}  {'budget':>8}  {'FLOPs':>6}  {'fires':>6}  {'bits per byte':>13} {'95 %':>16}  "
        f"{'recovered':>9} {'95 %':>14}  {'adaptive +':>10} {'95 %':>14}"
    )
    for arm, rows in domain["arms"].items():
        for row in rows:
            if arm != "adaptive" and row["adaptive_gain"] == 0.0:
                continue  # an end, which all arms share
            rate = "" if row["fire_rate"] is None else f"{row['fire_rate']:.3f}"
            own = arm == "adaptive"
            far = "" if arm == "uniform-rate" or abs(row["flops_to_adaptive"] - 1.0) <= MATCHED else " FLOPs differ"
            yield (
                f"{arm:{width}}  {row['label']:>8}  {row['flop_ratio']:6.3f}  {rate:>6}  {row['bits_per_byte']:13.4f} "
                f"{_span(row['interval'], 4):>16}  {_number(row['recovered'], 3):>9} "
                f"{_span(row['recovered_interval'], 2):>14}  {'' if own else _number(row['adaptive_gain'], 3):>10} "
                f"{'' if own else _span(row['adaptive_gain_interval'], 2):>14}{far}"
            ).rstrip()
    yield from _summary(domain)


def _summary(domain: Json) -> Iterator[str]:
    if domain["range"]["value"] is not None:
        yield f"range, floor - full: {domain['range']['value']:.4f} {_span(domain['range']['interval'], 4)}"
    monotone = domain["monotone"]
    if monotone["largest_rise"] is not None:
        verdict = "within noise" if monotone["within_noise"] else "not monotone"
        rise = f"{monotone['largest_rise']:+.4f} {_span(monotone['interval'], 4)}"
        yield f"largest rise to the next dearer budget: {rise}, {verdict}"
    for row in domain["plain"]:
        yield (
            f"plain {row['name']}: {row['flop_ratio']:.3f} of full, {row['bits_per_byte']:.4f} "
            f"{_span(row['interval'], 4)}"
        )
    for row in domain["frontier"]:
        yield (
            f"against the plain line at {row['label']}: {row['gap']:+.4f} {_span(row['interval'], 4)}"
            f"{', beyond its end' if row['beyond'] else ''}"
        )
    for name, bits in domain["references"].items():
        yield f"{name}: {'not installed' if bits is None else f'{bits:.4f} bits per byte'}"
    if any(row["charge"] for rows in domain["arms"].values() for row in rows):
        yield "plans that see their block are charged 0.04 bit per byte: an upper bound on what placement can give"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _span(interval: list[float] | None, digits: int) -> str:
    return "" if interval is None else f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
