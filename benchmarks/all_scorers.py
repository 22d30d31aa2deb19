"""What does a benchmark of every scorer cost over one of the dearest scorer alone?
python benchmarks/all_scorers.py [--out results/benchmarks/all_scorers.json]

Runs ``traj-ood bench fashion --quick`` (1,000 training images, 300 a set, all defaults) with all scorers and with each
of the dear ones alone, every run in a process of its own on one thread, and compares CPU time (user and system) of the
whole command: start, loading of libraries and images, fitting, scoring, bootstrap intervals and files. CPU time of one
thread hardly depends on what else the machine does, wall time does; both are recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from traj_ood.evaluation.results import FILE_NAME, Result
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit

# Those that iterate to the end, those that walk the training images' path again, and the dear static ones.
ALONE = (
    "trajectory",
    "trajectory:view=cls",
    "end-distance",
    "signature",
    "path-energy:two_sided=true",
    "early-trajectory",
    "field",
    "gmm",
    "kernel-pca",
    "isolation-forest",
)


def measure(scorers: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU and wall seconds of one command, and the seconds of its stages as the run itself records them."""
    words = ["bench", "fashion", "--attractors", str(arguments.attractors), "--per-set", str(arguments.per_set)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "traj_ood", *words, "--scorers", scorers, "--quiet", "--no-plots"]
        before, began = _cpu(), time.perf_counter()
        environ = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        subprocess.run([*command, "--threads", "1", "--out", folder], check=True, env=environ, capture_output=True)
        wall, cpu = time.perf_counter() - began, _cpu() - before
        result = Result.load(next(Path(folder).glob(f"*/{FILE_NAME}")))
    stages = {name: round(seconds, 2) for name, seconds in result.seconds.items()}
    return {"cpu_seconds": round(cpu, 2), "wall_seconds": round(wall, 2), "stages": stages}


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attractors", type=int, default=1000, help="training images; default: 1000, as --quick")
    parser.add_argument("--per-set", type=int, default=300, help="images a set; default: 300, as --quick")
    parser.add_argument("--alone", nargs="+", default=list(ALONE), help="scorers to measure alone")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/all_scorers.json"))
    arguments = parser.parse_args()
    measured = {}
    for scorers in ["all", *arguments.alone]:
        measured[scorers] = measure(scorers, arguments)
        print(f"{scorers:30} {measured[scorers]}", flush=True)
    dearest = max(arguments.alone, key=lambda s: measured[s]["cpu_seconds"])
    ratio = measured["all"]["cpu_seconds"] / measured[dearest]["cpu_seconds"]
    record = {
        "measured": measured,
        "dearest": dearest,
        "all_over_dearest": ratio,
        "attractors": arguments.attractors,
        "per_set": arguments.per_set,
        "commit": git_commit(Path(__file__).parent),
        "versions": environment(),
    }
    write_atomic(arguments.out, (json.dumps(record, indent=1) + "\n").encode())
    print(f"all scorers cost {ratio:.2f} times {dearest} alone; written to {arguments.out}")


if __name__ == "__main__":
    main()
