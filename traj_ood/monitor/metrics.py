"""Prometheus text of the state of a stream, for the node exporter's textfile collector or a push gateway."""

from __future__ import annotations

import math

from traj_ood.errors import TrajOODError
from traj_ood.monitor.watch import StreamState


def prometheus_text(state: StreamState, detector: str) -> str:
    """The state as gauges ``traj_ood_monitor_*`` with the label ``detector``, in Prometheus' text format."""
    try:
        from prometheus_client import CollectorRegistry, Gauge, generate_latest
    except ImportError as error:
        raise TrajOODError("Prometheus text needs prometheus-client: pip install 'traj_ood[monitor]'") from error
    registry = CollectorRegistry()
    low, high = state.interval or (math.nan, math.nan)
    nan = math.nan
    for name, about, value in (
        ("images", "Images judged", state.images),
        ("invalid", "Images without a score", state.invalid),
        ("ood", "Images above the threshold", state.ood),
        ("ood_rate", "Share of scored images above the threshold", nan if state.rate is None else state.rate),
        ("ood_rate_low", "Lower end of its exact interval", low),
        ("ood_rate_high", "Upper end of its exact interval", high),
        ("ood_rate_expected", "Share of ID images above the threshold, at most", state.expected),
        ("recent_ood_rate", "The share in the last window", state.recent["rate"] if state.recent else nan),
        ("log10_capital", "Log10 of the martingale's capital", math.log10(max(state.capital, 1e-300))),
        ("log10_highest_capital", "Log10 of its highest capital", math.log10(state.highest)),
        ("alarm", "1 when the stream is unlike the calibration", int(state.is_alarm)),
    ):
        Gauge(f"traj_ood_monitor_{name}", about, ["detector"], registry=registry).labels(detector).set(value)
    return generate_latest(registry).decode()
