"""What `/metrics` says, in the format of Prometheus."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Counters:
    """Counters of one server, with a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        self._requests = Counter(
            "dqe_requests", "Requests, by route and status.", ("route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "dqe_request_seconds",
            "Seconds that requests took.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._batches = Histogram(
            "dqe_batch_searches",
            "Searches answered together on the devices.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=registry,
        )
        self._feedback = Counter(
            "dqe_feedback", "Picks and rejections that were logged.", ("kind",), registry=registry
        )
        self._images = Gauge("dqe_index_images", "Images of the index.", registry=registry)
        self._uploads = Gauge("dqe_uploads", "Images that users gave.", registry=registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts a request that has ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, size: int) -> None:
        """Counts a batch of so many searches."""
        self._batches.observe(size)

    def feedback(self, kind: str) -> None:
        """Counts a line of the log."""
        self._feedback.labels(kind).inc()

    def text(self, images: int, uploads: int) -> bytes:
        """The page of metrics."""
        self._images.set(images)
        self._uploads.set(uploads)
        return prometheus_client.generate_latest(self._registry)
