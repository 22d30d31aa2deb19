"""Prometheus metrics of the service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class ServiceMetrics:
    """Prometheus metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"namespace": "traj_ood", "registry": self.registry}
        self.requests = Counter("requests", "Requests to /v1/score by status", ["status"], **made)
        self.images = Counter("images", "Images by decision: ok, ood, invalid, uncalibrated", ["reason"], **made)
        self.seconds = Histogram("request_seconds", "From the request's head to its answer", buckets=_SECONDS, **made)
        self.batch = Histogram("batch_images", "Images judged together", buckets=(1, 2, 4, 8, 16, 32, 64), **made)
        self.lost = Counter("lost_rows", "Rows that could not be written to the log", **made)
        self.reloads = Counter("reloads", "Detectors taken while serving, and refused", ["outcome"], **made)
        self.detector = Gauge("detector_info", "The detector in use", ["digest"], **made)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is computed when metrics are requested."""
        Gauge(name, about, namespace="traj_ood", registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
