"""Every figure of docs/performance.md again, beside the recorded one: python benchmarks/speed.py, or make benchmarks

Each piece is a benchmark of its own, run on one thread where it can be, whose record is read for ratios: costs of this
package over those of something that was measured in the same run, so that they can be compared between machines. All
of them are costs, of which less is better. A ratio of more than 1.15 times the recorded one is a loss: it is named, and
the exit code is 1. A piece that fails is named, too, and the others run on.

``--record`` writes today's ratios as those that later runs are compared with, in place of those that were made again,
and keeps the records of the pieces, from which docs/performance.md is made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit

HERE = Path(__file__).parent
RECORD = HERE.parent / "results" / "benchmarks" / "speed.json"
LOSS = 1.15
"""Ratios vary by some percent from run to run; a change of the code that anybody notices is larger."""

Ratios = dict[str, float]


def flat(record: Mapping[str, Any]) -> Ratios:
    """Those of a record that lists its own, under ``ratios``."""
    return {name: float(value) for name, value in record["ratios"].items()}


def of_engine(record: Mapping[str, Any]) -> Ratios:
    naive = record["naive_over_engine"]
    base = record["base_geometry"]
    return {
        "engine over the bare loop of f": record["overhead"]["engine_over_fastest_bare_loop"],
        "engine over the naive way, time": 1 / naive["seconds"],
        "engine over the naive way, memory": 1 / naive["peak_memory"],
        "f compiled over f": record["compiled"]["compiled_over_plain"],
        "f in chunks side by side over one after the other": record["side_by_side"]["alone"],
        "ViT-MAE base: distances' share of a step, 32 images": base["32_images"]["distances_share_of_step"],
        "ViT-MAE base: peak memory, GB": base["peak_memory_gb"],
    }


def of_static_scorers(record: Mapping[str, Any]) -> Ratios:
    return {
        f"{scorer} over {package}": 1 / measured["times_of_ours"]
        for scorer, packages in record.items()
        if isinstance(packages, dict) and "traj_ood" in packages and isinstance(packages["traj_ood"], dict)
        for package, measured in packages.items()
        if package != "traj_ood" and isinstance(measured, dict)
    }


def of_batches(record: Mapping[str, Any]) -> Ratios:
    return {f"{name}, in batches of 200": ratio for name, ratio in of_static_scorers(record).items()}


def of_all_scorers(record: Mapping[str, Any]) -> Ratios:
    return {"all scorers over the dearest alone": record["all_over_dearest"]}


@dataclass(frozen=True)
class Piece:
    """A script of this folder, what it is called with, and in a rehearsal; how its record becomes ratios, and the
    record's name where that is not the script's."""

    script: str
    words: tuple[str, ...]
    tiny: tuple[str, ...]
    ratios: Callable[[Mapping[str, Any]], Ratios]
    name: str = ""

    @property
    def record(self) -> str:
        return self.name or Path(self.script).stem


_SMALL = ("--threads", "1", "--train", "300", "--queries", "40", "--dimension", "16", "--k", "3", "--rounds", "1")
PIECES = {
    "streaming": Piece("streaming.py", (), ("--tiny",), flat),
    "static": Piece(
        "static_scorers.py", ("--threads", "1", "--batch", "10000"), (*_SMALL, "--batch", "40"), of_static_scorers
    ),
    "static, batches": Piece(
        "static_scorers.py",
        ("--threads", "1", "--batch", "200", "--rounds", "2", "--only", "knn"),
        (*_SMALL, "--batch", "20", "--only", "knn"),
        of_batches,
        "static_scorers_batch200",
    ),
    "engine": Piece("engine.py", (), ("--tiny",), of_engine),
    "all scorers": Piece(
        "all_scorers.py",
        ("--alone", "trajectory"),
        ("--alone", "trajectory", "--attractors", "12", "--per-set", "3"),
        of_all_scorers,
    ),
    "surrogate": Piece("surrogate_training.py", (), ("--count", "400", "--width", "32", "--steps", "4"), flat),
    "latency": Piece("latency.py", (), ("--tiny",), flat),
}


def compare(today: Mapping[str, float], recorded: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """A line for each ratio of today, and the names of those that are a loss against what was recorded."""
    width = max(map(len, today), default=0)
    lines, losses = [], []
    for name, value in today.items():
        before = recorded.get(name)
        if before is None:
            lines.append(f"{name:{width}}  {value:8.3f}  not recorded")
            continue
        is_loss = not value <= LOSS * before  # NaN is one
        lines.append(f"{name:{width}}  {value:8.3f}  recorded {before:8.3f}{'  LOSS' if is_loss else ''}")
        losses += [name] if is_loss else []
    return lines, losses


def measure(piece: Piece, *, tiny: bool) -> dict[str, Any]:
    """The record of a piece. Raises ``RuntimeError`` with the script's last words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        command = [sys.executable, str(HERE / piece.script), *(piece.tiny if tiny else piece.words), "--out", str(out)]
        environ = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
        if done.returncode:
            words = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"exit code {done.returncode}: {words[0]}")
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES), help="some pieces alone")
    parser.add_argument("--against", type=Path, default=RECORD, help="the recorded ratios")
    parser.add_argument("--out", type=Path, help="also write today's ratios here")
    parser.add_argument("--record", action="store_true", help="later runs are compared with today's")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal, whose figures mean nothing: compares nothing")
    arguments = parser.parse_args()
    if arguments.tiny and arguments.record:
        parser.error("--tiny: expected a measurement to record, got a rehearsal: leave one of the two out")
    recorded = json.loads(arguments.against.read_text()) if arguments.against.is_file() else {"ratios": {}}
    today: Ratios = {}
    failures = []
    for name in arguments.only:
        if not (HERE / PIECES[name].script).is_file():
            failures.append(f"{name}: {PIECES[name].script} is not there")
            continue
        began = time.monotonic()
        try:
            measured = measure(PIECES[name], tiny=arguments.tiny)
            today |= PIECES[name].ratios(measured)
            if arguments.record:
                write_atomic(arguments.against.with_name(f"{PIECES[name].record}.json"), _text(measured))
        except (RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    lines, losses = compare(today, {} if arguments.tiny else recorded["ratios"])
    print("\n".join(["", *lines]))
    record = {"ratios": today, "versions": environment(), "commit": git_commit(HERE)}
    if arguments.out:
        write_atomic(arguments.out, _text(record))
    if arguments.record:
        write_atomic(arguments.against, _text(record | {"ratios": recorded["ratios"] | today}))
    if losses:
        print(f"\nMore than {LOSS - 1:.0%} dearer than recorded: {'; '.join(losses)}", file=sys.stderr)
    if failures:
        print("\nNot measured: " + "; ".join(failures), file=sys.stderr)
    sys.exit(1 if losses or failures else 0)


def _text(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()


if __name__ == "__main__":
    main()
