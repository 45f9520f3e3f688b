"""Every metric of the server. Names and labels are fixed here; no label carries anything from a client."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from model.cost import Flops

_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATIOS = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
_ENDS = ("stop", "length", "abort", "error")
_REJECTIONS = ("queue_full", "stopping", "unauthorized", "rate_limit")
_DECISIONS = ("requested", "floor", "maximum")
_STAGES = tuple(Flops().as_dict())
_PHASES = ("prefill", "decode")
_SHARES = ("requested", "granted", "spent")
_PARTS = ("schedule", "run", "postprocess")
_POWERS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


M = TypeVar("M", Counter, Gauge, Histogram)


class Metrics:
    """The server's metrics on a registry of its own, so that two servers in one process do not meet.

    The methods are called by the engine thread and by the event loop; prometheus-client locks for both.
    """

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry

        def make(kind: type[M], name: str, text: str, labels: dict[str, tuple[str, ...]], **options: Any) -> M:
            metric = kind(f"rheostat_{name}", text, tuple(labels), registry=registry, **options)
            for values in itertools.product(*labels.values()) if labels else ():
                metric.labels(*values)  # exposed as 0 from the start, so that rates have a beginning
            return metric

        def counter(name: str, text: str, **labels: tuple[str, ...]) -> Counter:
            return make(Counter, name, text, labels)

        def gauge(name: str, text: str, **labels: tuple[str, ...]) -> Gauge:
            return make(Gauge, name, text, labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...], **labels: tuple[str, ...]) -> Histogram:
            return make(Histogram, name, text, labels, buckets=buckets)

        self.running = gauge("num_requests_running", "Requests that hold a state.")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for one.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens read.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.finished = counter("request_success", "Requests ended, by reason.", finished_reason=_ENDS)
        self.rejected = counter("request_rejected", "Requests refused before they were queued.", reason=_REJECTIONS)
        self.first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self.inter_token = histogram("inter_token_latency_seconds", "Between two tokens of a request.", _SECONDS)
        self.request = histogram("e2e_request_latency_seconds", "Arrival to end.", _SECONDS)
        self.queue = histogram("request_queue_time_seconds", "Arrival to first scheduled.", _SECONDS)
        self.prefill = histogram("request_prefill_time_seconds", "First scheduled to first token.", _SECONDS)
        self.decode = histogram("request_decode_time_seconds", "First token to end.", _SECONDS)
        self.flops = counter("compute_flops", "Floating-point operations spent.", stage=_STAGES, phase=_PHASES)
        self.full_flops = counter("compute_full_flops", "Operations of the same work at full resolution.")
        self.ratio = histogram("request_compute_ratio", "Share of full resolution, by request.", _RATIOS, kind=_SHARES)
        self.decisions = counter("budget_decisions", "Grants, by reason.", reason=_DECISIONS)
        self.tile_size = histogram("tile_size_bytes", "Bytes per tile.", _POWERS)
        self.batch_size = histogram("batch_size", "Sequences per decoding step.", _POWERS)
        self.trunk_batch_size = histogram("trunk_batch_size", "Sequences per decoding step that fired.", _POWERS)
        self.step = histogram("engine_step_seconds", "Parts of an engine step.", _SECONDS, part=_PARTS)
        self.state_bytes = gauge("state_pool_bytes", "Bytes of the states of running sequences.", kind=("used",))
        info = gauge("model_info", "Always 1; the model that is served.", model_name=(model_name,))
        info.labels(model_name).set(1)

    def spent(self, flops: Flops, full_flops: int, phase: str) -> None:
        """Count operations; the same figures are booked on the request that they were spent on."""
        for stage, operations in flops.as_dict().items():
            if operations:
                self.flops.labels(stage, phase).inc(operations)
        self.full_flops.inc(full_flops)

    def render(self) -> tuple[bytes, str]:
        """The exposition of all metrics, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
