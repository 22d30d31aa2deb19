"""Entry point of ``python -m traj_ood`` and of the command ``traj-ood``."""

from __future__ import annotations

import gc
import sys

_GC_THRESHOLD = 100_000
"""New objects between two garbage collections. With Python's 700, collections take a sixth of the time that importing
torch takes, and find nothing: what a module creates on import stays alive."""


def run() -> None:
    """Run the command line; Ctrl-C prints one line, also while the modules are still being imported."""
    gc.set_threshold(_GC_THRESHOLD, *gc.get_threshold()[1:])
    try:
        from traj_ood.cli import main
        from traj_ood.cli.console import leave
    except KeyboardInterrupt:
        print("traj-ood: interrupted", file=sys.stderr)
        sys.exit(130)
    try:
        main()
    except SystemExit as end:
        leave(end.code)


if __name__ == "__main__":
    run()
