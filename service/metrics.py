"""Every metric of the server. Names and labels are fixed here; no label carries anything from a client."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from model.cost import Flops

_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATIOS = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
_ENDS = ("stop", "length", "abort", "queue_timeout", "timeout", "error")
_REJECTIONS = ("queue_full", "stopping", "unauthorized", "rate_limit")
_DECISIONS = ("requested", "floor", "depth", "maximum", "load")
_RETILES = ("load_lowered", "load_raised")
_STAGES = tuple(Flops().as_dict())
_PHASES = ("prefill", "decode")
_SHARES = ("requested", "granted", "spent")
_PARTS = ("schedule", "run", "postprocess")
_STATES = ("used", "cached")
_POWERS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

M = TypeVar("M", Counter, Gauge, Histogram)


class Metrics:
    """The server's metrics on a registry of its own, so that two servers in one process do not meet.

    A metric with labels is a dict of its children: looking them up by label costs more than counting, and they are
    exposed as 0 from the start, so that rates have a beginning. The engine thread and the event loop both count;
    prometheus-client locks for them.

    Args:
        model_name: of the served model. d_state_levels: sizes of the trunk's state.
    """

    def __init__(self, model_name: str, d_state_levels: Collection[int] = ()) -> None:
        self._registry = CollectorRegistry()
        shrinks = [(large, small) for small, large in itertools.combinations(sorted(d_state_levels), 2)]

        self.running = self._one(Gauge, "num_requests_running", "Requests that hold a state.")
        self.waiting = self._one(Gauge, "num_requests_waiting", "Requests that wait for one.")
        self.prompt_tokens = self._one(Counter, "prompt_tokens", "Prompt tokens read.")
        self.cached_tokens = self._one(Counter, "prompt_tokens_cached", "Prompt tokens found read in the prefix cache.")
        self.generation_tokens = self._one(Counter, "generation_tokens", "Tokens generated.")
        self.finished = self._each(Counter, "request_success", "Requests ended, by reason.", "finished_reason", _ENDS)
        self.rejected = self._each(
            Counter, "request_rejected", "Requests refused before they were queued.", "reason", _REJECTIONS
        )
        self.first_token = self._seconds("time_to_first_token_seconds", "Arrival to first token.")
        self.inter_token = self._seconds("inter_token_latency_seconds", "Between two tokens of a request.")
        self.request = self._seconds("e2e_request_latency_seconds", "Arrival to end.")
        self.queue = self._seconds("request_queue_time_seconds", "Arrival to first scheduled.")
        self.prefill = self._seconds("request_prefill_time_seconds", "First scheduled to first token.")
        self.decode = self._seconds("request_decode_time_seconds", "First token to end.")
        self.flops = self._by(
            Counter, "compute_flops", "Floating-point operations spent.", ("stage", "phase"),
            itertools.product(_STAGES, _PHASES),
        )  # fmt: skip
        self.full_flops = self._one(Counter, "compute_full_flops", "Operations of the same work at full resolution.")
        self.ratio = self._each(
            Histogram, "request_compute_ratio", "Share of full resolution, by request.", "kind", _SHARES,
            buckets=_RATIOS,
        )  # fmt: skip
        self.decisions = self._each(Counter, "budget_decisions", "Grants on arrival, by reason.", "reason", _DECISIONS)
        self.retile = self._each(Counter, "retile", "Grants changed while a request ran.", "cause", _RETILES)
        self.state_resize = self._by(
            Counter, "state_resize", "States of running requests shrunk, by columns.", ("from", "to"), shrinks
        )
        self.tile_size = self._one(Histogram, "tile_size_bytes", "Bytes per tile.", buckets=_POWERS)
        self.batch_size = self._one(Histogram, "batch_size", "Sequences per decoding step.", buckets=_POWERS)
        self.trunk_batch_size = self._one(
            Histogram, "trunk_batch_size", "Sequences per decoding step that fired.", buckets=_POWERS
        )
        self.step = self._each(
            Histogram, "engine_step_seconds", "Parts of an engine step.", "part", _PARTS, buckets=_SECONDS
        )
        self.state_bytes = self._each(Gauge, "state_pool_bytes", "Bytes of model states, by kind.", "kind", _STATES)
        self.state_buffers = self._one(
            Gauge, "state_buffer_bytes", "Bytes allocated for the states of generating requests, used or not."
        )
        self._each(Gauge, "model_info", "Always 1; the served model.", "model_name", [model_name])[model_name].set(1)

    def spent(self, flops: Iterable[Flops], full_flops: int, phase: str) -> None:
        """Count operations; the same figures are booked on the requests that they were spent on."""
        total = sum(flops, Flops())
        for stage, operations in total.as_dict().items():
            if operations:
                self.flops[stage, phase].inc(operations)
        self.full_flops.inc(full_flops)

    def render(self) -> tuple[bytes, str]:
        """The exposition of all metrics, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _one(self, kind: type[M], name: str, text: str, **options: Any) -> M:
        return kind(f"rheostat_{name}", text, registry=self._registry, **options)

    def _seconds(self, name: str, text: str) -> Histogram:
        return self._one(Histogram, name, text, buckets=_SECONDS)

    def _by(
        self,
        kind: type[M],
        name: str,
        text: str,
        labels: tuple[str, ...],
        values: Iterable[tuple[Any, ...]],
        **options: Any,
    ) -> dict[tuple[Any, ...], M]:
        """The children of a metric by the values of its labels."""
        metric = kind(f"rheostat_{name}", text, labels, registry=self._registry, **options)
        return {those: metric.labels(*those) for those in values}

    def _each(
        self, kind: type[M], name: str, text: str, label: str, values: Iterable[str], **options: Any
    ) -> dict[str, M]:
        """The same where there is one label."""
        children = self._by(kind, name, text, (label,), [(value,) for value in values], **options)
        return {value: child for (value,), child in children.items()}
