"""From what came of requests to figures: rates, percentiles, and whether every request ended exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from benchmarks.load import End, Result

PERCENTILES = (50, 95, 99)


def percentiles(values: Collection[float]) -> dict[str, float | None]:
    """p50, p95 and p99, interpolated linearly; None where there are no values."""
    if not values:
        return {f"p{share}": None for share in PERCENTILES}
    found = np.percentile(list(values), PERCENTILES)
    return {f"p{share}": float(value) for share, value in zip(PERCENTILES, found, strict=True)}


def latencies(results: Collection[Result]) -> dict[str, dict[str, float | None]]:
    """Percentiles in seconds of answers: time to the first token, per token after it, to the end.

    The time per token is an answer's mean: a piece of text that arrives may be of several tokens.
    """
    answers = [result for result in results if result.end is End.ANSWER and result.events]
    return {
        "first_token": percentiles([result.events[0] - result.due for result in answers]),
        "inter_token": percentiles(
            [
                (result.events[-1] - result.events[0]) / (result.usage["completion_tokens"] - 1)
                for result in answers
                if len(result.events) > 1
            ]
        ),
        "end_to_end": percentiles([result.latency for result in answers]),
    }


def token_rate(results: Collection[Result], begin: float, end: float) -> float:
    """Generated tokens per second that arrived between two times, requests that began before or went on included.

    Between the first arrival and the last one: where whole answers come, few and large, the window's borders would
    otherwise count as idle time. 0 where fewer than two arrived.
    """
    arrivals = sorted(
        (event, result.usage.get("completion_tokens", len(result.events)) / len(result.events))
        for result in results
        for event in result.events
        if begin <= event <= end
    )
    if len(arrivals) < 2 or arrivals[0][0] == arrivals[-1][0]:
        return 0.0
    generated: float = sum(tokens for _, tokens in arrivals[1:])
    return generated / (arrivals[-1][0] - arrivals[0][0])


def count_ends(results: Collection[Result]) -> dict[str, int]:
    """Requests by how they ended; ``sent`` is their number, ``open`` those that did not end."""
    ends = Counter(result.end for result in results)
    return {"sent": len(results), "open": ends[None]} | {str(end): ends[end] for end in End}


def check_conservation(ends: Mapping[str, int], server: Mapping[str, float]) -> list[str]:
    """What is wrong between the requests as clients saw them and the server's counters over the same time.

    Args:
        ends: of :func:`count_ends`. server: ``finished``, ``rejected`` and ``failed`` requests.
    """
    pairs = {"finished": "answer", "rejected": "refused", "failed": "error"}
    wrong = [
        f"the server counts {server[ours]:g} {ours}, clients {ends[theirs]} of {theirs}"
        for ours, theirs in pairs.items()
        if server[ours] != ends[theirs]
    ]
    if ends["open"]:
        wrong.append(f"{ends['open']} requests did not end")
    return wrong


def by_time(
    results: Collection[Result], begin: float, seconds: float, bins: int, target: float
) -> list[dict[str, Any]]:
    """Requests by the time at which they were due, in equal bins: goodput, refusals, granted budget, latency.

    Args:
        target: seconds within which an answer is good.
    """
    width, rows = seconds / bins, []
    for index in range(bins):
        start = begin + index * width
        part = [result for result in results if start <= result.due < start + width]
        answers = [result for result in part if result.end is End.ANSWER]
        granted = [result.usage["compute"]["granted"] for result in answers]
        rows.append(
            {
                "seconds": (index + 0.5) * width,
                "goodput": sum(result.latency <= target for result in answers) / width,
                "refused": sum(result.end is End.REFUSED for result in part) / width,
                "granted": sum(granted) / len(granted) if granted else None,
                "latency": percentiles([result.latency for result in answers]),
            }
        )
    return rows
