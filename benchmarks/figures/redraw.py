"""Draw recorded pictures again with today's code, those that finding.json suffices for; nothing is computed.

python benchmarks/figures/redraw.py                                # every record below results/figures
python benchmarks/figures/redraw.py results/figures/memorization

Pictures of images and of planes need tensors that no record holds: the question's own script draws them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from traj_ood.analysis import redraw
from traj_ood.errors import TrajOODError


def main(folders: list[str]) -> None:
    found = [Path(folder) for folder in folders]
    try:
        for folder in found or sorted(path.parent for path in Path("results/figures").rglob("finding.json")):
            for picture in redraw(folder):
                print(picture)
    except TrajOODError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
