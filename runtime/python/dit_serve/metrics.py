"""The metrics that Prometheus reads at /metrics; docs/serving.md lists the names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from dit_runtime.serve.ticket import Stats
from dit_serve.models import Model

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

COUNTERS = {  # of the batcher's counts
    "dit_images": ("drawn", "images drawn"),
    "dit_step_calls": ("calls", "calls of the step stage"),
    "dit_step_samples": ("samples", "samples in these calls; by calls, the mean batch"),
    "dit_step_rows": ("rows", "rows in these calls: samples times groups of conditions"),
    "dit_refused_requests": ("refused", "refused because the deadline was out of reach"),
    "dit_late_requests": ("late", "not finished by their deadline"),
    "dit_cancelled_requests": ("cancelled", "left by their clients"),
    "dit_failed_requests": ("failed", "failed in an engine"),
}


class Metrics:
    def __init__(self, models: Mapping[str, Model]) -> None:
        disable_created_metrics()  # a series more for each of the others
        self.registry = CollectorRegistry()
        self._models = models
        labels = ["model", "code"]
        self.requests = Counter("dit_requests", "requests for images by answer", labels, registry=self.registry)
        self.latency = Histogram(
            "dit_request_seconds",
            "from a request's head to its answer",
            ["model"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.queue = Histogram(
            "dit_queue_seconds", "until an image was started", ["model"], buckets=BUCKETS, registry=self.registry
        )
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def image(self, model: str, stats: Stats) -> None:
        self.queue.labels(model).observe(stats.queue)

    def answer(self, model: str, code: int, seconds: float) -> None:
        """Count an answer; a model that is not served has no name here, because clients could invent any."""
        name = model if model in self._models else ""
        self.requests.labels(name, str(code)).inc()
        self.latency.labels(name).observe(seconds)

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the batchers."""
        counters = {name: CounterMetricFamily(name, text, labels=["model"]) for name, (_, text) in COUNTERS.items()}
        seconds = CounterMetricFamily("dit_stage_seconds", "in calls of a stage", labels=["model", "stage"])
        memo = CounterMetricFamily("dit_memo_rows", "rows of the stages before the loop", labels=["model", "result"])
        swaps = CounterMetricFamily("dit_swaps", "bundles that took the place of others", labels=["model", "result"])
        queued = GaugeMetricFamily("dit_queued_images", "waiting to be started", labels=["model"])
        active = GaugeMetricFamily("dit_active_images", "under way", labels=["model"])
        places = GaugeMetricFamily("dit_batch_places", "samples that may share a call", labels=["model"])
        info = GaugeMetricFamily("dit_bundle_info", "1, by the manifest's sha256", labels=["model", "sha256"])
        for name, model in self._models.items():
            batcher = model.batcher
            for counter, (count, _) in COUNTERS.items():
                counters[counter].add_metric([name], batcher.counts[count])
            for stage in ("step", "decode"):
                seconds.add_metric([name, stage], batcher.seconds[stage])
            memo.add_metric([name, "hit"], batcher.memo.hits)
            memo.add_metric([name, "miss"], batcher.memo.misses)
            for result in ("swapped", "refused"):
                swaps.add_metric([name, result], model.swaps[result])
            queued.add_metric([name], batcher.queued)
            active.add_metric([name], batcher.active)
            places.add_metric([name], batcher.places)
            info.add_metric([name, model.served.sha256], 1)
        yield from (*counters.values(), seconds, memo, swaps, queued, active, places, info)
