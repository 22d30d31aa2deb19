"""``python -m traj_ood``, and the command ``traj-ood``."""

from __future__ import annotations

import gc
import sys

_NEW_OBJECTS = 100_000
"""Between two looks for garbage, in place of Python's 700: while torch is imported, a sixth of the time goes into them,
and what a module makes is no garbage."""


def run() -> None:
    """The command line; an interruption while it is still being loaded is one line, too."""
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])
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
