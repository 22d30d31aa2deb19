"""The command line ``traj-ood``. Each module defines one group of commands and registers it with ``main``."""

from traj_ood.cli import (  # noqa: F401
    analyze,
    bench,
    calibrate,
    compare,
    detect,
    export,
    inspect,
    monitor,
    new,
    report,
    serve,
    train,
)
from traj_ood.cli.base import main

__all__ = ["main"]
