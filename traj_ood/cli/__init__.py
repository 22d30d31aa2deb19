"""The command ``traj-ood``: parse, call, print. One module for each group of commands."""

from traj_ood.cli import (
    analyze,
    bench,
    detect,
    export,
    inspect,
    new,
    report,
    train,
)  # each registers its commands with main
from traj_ood.cli.base import main

__all__ = ["analyze", "bench", "detect", "export", "inspect", "main", "new", "report", "train"]
