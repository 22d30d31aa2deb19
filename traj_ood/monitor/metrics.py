"""Prometheus text of a finding, for the node exporter's textfile collector or a push gateway."""

from __future__ import annotations

import math

from traj_ood.errors import TrajOODError
from traj_ood.monitor.watch import Finding


def prometheus_text(finding: Finding, detector: str) -> str:
    """A finding as gauges ``traj_ood_monitor_*`` with the label ``detector``, in Prometheus' text format."""
    try:
        from prometheus_client import CollectorRegistry, Gauge, generate_latest
    except ImportError as error:
        raise TrajOODError("Prometheus text needs prometheus-client: pip install 'traj_ood[monitor]'") from error
    registry = CollectorRegistry()
    low, high = finding.interval or (math.nan, math.nan)
    nan = math.nan
    for name, about, value in (
        ("images", "Images judged", finding.images),
        ("invalid", "Images without a score", finding.invalid),
        ("ood", "Images above the threshold", finding.ood),
        ("ood_rate", "Share of scored images above the threshold", nan if finding.rate is None else finding.rate),
        ("ood_rate_low", "Lower end of its exact interval", low),
        ("ood_rate_high", "Upper end of its exact interval", high),
        ("ood_rate_expected", "Share of ID images above the threshold, at most", finding.expected),
        ("recent_ood_rate", "The share in the last window", finding.recent["rate"] if finding.recent else nan),
        ("log10_capital", "Log10 of the martingale's capital", math.log10(max(finding.capital, 1e-300))),
        ("log10_highest_capital", "Log10 of its highest capital", math.log10(finding.highest)),
        ("alarm", "1 when the stream is unlike the calibration", int(finding.is_alarm)),
    ):
        Gauge(f"traj_ood_monitor_{name}", about, ["detector"], registry=registry).labels(detector).set(value)
    return generate_latest(registry).decode()
