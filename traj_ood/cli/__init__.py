"""The command ``traj-ood``: parse, call, print. One module for each group of commands, which it registers with main."""

from traj_ood.cli import analyze, bench, calibrate, compare, detect, export, inspect, monitor, new, report, serve, train
from traj_ood.cli.base import main

__all__ = [
    "analyze",
    "bench",
    "calibrate",
    "compare",
    "detect",
    "export",
    "inspect",
    "main",
    "monitor",
    "new",
    "report",
]
__all__ += ["serve", "train"]
