"""``python -m traj_ood``, and the command ``traj-ood``."""

from __future__ import annotations

import sys


def run() -> None:
    """The command line; an interruption while it is still being loaded is one line, too."""
    try:
        from traj_ood.cli import main
    except KeyboardInterrupt:
        print("traj-ood: interrupted", file=sys.stderr)
        sys.exit(130)
    main()


if __name__ == "__main__":
    run()
