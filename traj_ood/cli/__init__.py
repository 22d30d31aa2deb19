"""The command ``traj-ood``: parse, call, print. One module for each group of commands."""

from traj_ood.cli import analyze, bench, compare, detect, export, inspect, new, report, train  # each registers its own
from traj_ood.cli.base import main

__all__ = ["analyze", "bench", "compare", "detect", "export", "inspect", "main", "new", "report", "train"]
