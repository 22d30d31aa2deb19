"""``python -m traj_ood.openood SCRIPT …``: run a script of an OpenOOD clone with traj_ood's scorers registered."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from traj_ood.errors import TrajOODError
from traj_ood.openood import register


def run_script(arguments: Sequence[str]) -> None:
    """Run a script of an OpenOOD clone, the first of ``arguments``, with the others, after
    :func:`traj_ood.openood.register`. Missing yml files are written to the clone's ``configs/postprocessors``."""
    if not arguments or not Path(arguments[0]).is_file():
        raise TrajOODError("usage: python -m traj_ood.openood SCRIPT [ARGUMENTS], with a script of an OpenOOD clone")
    script = Path(arguments[0]).resolve()
    clone = next((p for p in script.parents if (p / "openood").is_dir()), script.parent)
    sys.path[:0] = [str(script.parent), str(clone)]
    register(clone / "configs")
    sys.argv = [str(script), *arguments[1:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    try:
        run_script(sys.argv[1:])
    except TrajOODError as wrong:
        sys.exit(f"traj_ood.openood: error: {wrong}")
