"""Results as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

MATCHED = 0.01
"""Largest difference of operations from the shipped rule's at which an arm counts as equal."""

FEW = 20
"""Documents below which intervals are too narrow to be trusted."""

_SHIPPED = "adaptive"
_HEAD = (
    "    budget   FLOPs   fires  bits/byte              95 %  recovered            95 %  adaptive's gain          95 %"
)


def table(results: Json) -> str:
    """The tables of all domains."""
    lines = [f"{results['documents']} documents, {results['bytes']:,} bytes, {results['model']}, {results['protocol']}"]
    for name, domain in results["domains"].items():
        lines += ["", *_domain(name, domain)]
    return "\n".join(lines)


def _domain(name: str, domain: Json) -> Iterator[str]:
    width = max(len(arm) for arm in domain["arms"])
    yield f"{name}: {domain['documents']} documents, {domain['bytes']:,} bytes"
    yield f"{'arm':{width}}{_HEAD}"
    for arm, rows in domain["arms"].items():
        for row in sorted(rows, key=lambda row: -float(row["flop_ratio"])):
            if arm == _SHIPPED or not _shared(row):
                yield f"{arm:{width}}{_row(arm, row)}"
    yield from _verdicts(domain)
    yield from _summary(domain)


def _shared(row: Json) -> bool:
    """Whether the row is an end of the dial, where arms do not differ."""
    return row["fire_rate"] in (0.0, 1.0)


def _row(arm: str, row: Json) -> str:
    recovered, gain = row["recovered"], row["adaptive_gain"]
    text = (
        f"  {row['label']:>8}  {row['flop_ratio']:6.3f}  {row['fire_rate']:6.3f}  {row['bits_per_byte']:9.4f}  "
        f"{_span(row['interval'], 4):>16}  {_number(recovered['value'], 3):>9}  {_span(recovered['interval'], 2):>14}"
    )
    if arm != _SHIPPED:
        text += f"  {_number(gain['value'], 3):>15}  {_span(gain['interval'], 2):>14}"
    if row["charge"]:
        text += f"  uncharged {_number(row['uncharged']['value'], 3)} {_span(row['uncharged']['interval'], 2)}"
    if arm != "uniform-rate" and abs(row["flops_to_adaptive"] - 1.0) > MATCHED:
        text += f"  {row['flops_to_adaptive']:.3f} of the FLOPs of {_SHIPPED}"
    return text.rstrip()


def _verdicts(domain: Json) -> Iterator[str]:
    """Where the shipped rule beats each other arm, and where it is beaten: those whose interval leaves 0 out."""
    for arm, rows in domain["arms"].items():
        between = [row for row in rows if not _shared(row) and row["adaptive_gain"]["interval"] is not None]
        if arm == _SHIPPED or not between:
            continue
        better = [row["label"] for row in between if row["adaptive_gain"]["interval"][0] > 0.0]
        worse = [row["label"] for row in between if row["adaptive_gain"]["interval"][1] < 0.0]
        undecided = [row["label"] for row in between if row["label"] not in (*better, *worse)]
        parts = (("better", better), ("worse", worse), ("undecided", undecided))
        found = "; ".join(f"{word} at {', '.join(labels)}" for word, labels in parts if labels)
        yield f"{_SHIPPED} against {arm}: {found}"


def _summary(domain: Json) -> Iterator[str]:
    if domain["range"]["value"] is not None:
        yield f"range, floor - full: {_estimate(domain['range'])}"
    monotone = domain["monotone"]
    if monotone["value"] is not None:
        verdict = "within noise" if monotone["within_noise"] else "not monotone"
        yield f"largest rise to the next dearer budget: {_estimate(monotone)}, {verdict}"
    for row in domain["plain"]:
        figures = f"{row['bits_per_byte']:.4f} {_span(row['interval'], 4)}".rstrip()
        yield f"plain {row['name']}: {row['flop_ratio']:.3f} of full, {figures}"
    for row in domain["frontier"]:
        beyond = ", beyond its end" if row["beyond"] else ""
        yield f"against the plain line at {row['label']}: {_estimate(row['gap'])}{beyond}"
    for name, bits in domain["references"].items():
        yield f"{name}: {'not installed' if bits is None else f'{bits:.4f} bits per byte'}"
    if domain["documents"] < FEW:
        yield f"intervals of fewer than {FEW} documents are too narrow: --document-bytes makes room for more"
    if any(row["charge"] for rows in domain["arms"].values() for row in rows):
        yield "plans that see their block are charged 0.04 bit per byte: an upper bound on what placement can give"


def _estimate(estimate: Json) -> str:
    return f"{estimate['value']:+.4f} {_span(estimate['interval'], 4)}".rstrip()


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _span(interval: list[float] | None, digits: int) -> str:
    return "" if interval is None else f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
