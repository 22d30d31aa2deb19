"""A nightly job in Python: every image of a folder judged, a table at the end, and a code that a scheduler understands.

    python benchmarks/consumers/batch_job.py DETECTOR photos/ scores.parquet

The table (.parquet or .csv) has path, score, p_value, ood, steps, status and error, sorted by path, and is whole or
absent. Exit codes: 0 all well, 3 some image could not be read, 4 more than --alarm of the readable images are out of
distribution, which is how a drift of the input shows. For streams of any length use `traj-ood score`, which holds no
table in memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from traj_ood import Detector, Normalised, Status, TrajOODError
from traj_ood.data import read_folder
from traj_ood.data.decoding import open_image
from traj_ood.io.files import write_atomic
from traj_ood.text import quote_formula

BATCH = 256
COLUMNS = ["path", "score", "p_value", "ood", "steps", "status", "error"]


def judge_folder(detector: Detector, folder: Path) -> pd.DataFrame:
    """One row per image file below ``folder``; one that cannot be read has an error and no score.

    Raises:
        TrajOODError: no such folder, or no image in it.
    """
    paths = list(read_folder(folder).ids)
    parts = [_judge(detector, folder, paths[i : i + BATCH]) for i in range(0, len(paths), BATCH)]
    return pd.concat(parts, ignore_index=True)


def _judge(detector: Detector, folder: Path, paths: list[str]) -> pd.DataFrame:
    images, errors = {}, {}
    for path in paths:
        try:
            # Prepared at once: 256 photographs as they are would take gigabytes.
            images[path] = detector.autoencoder.transform(open_image(folder / path, detector.reading))
        except TrajOODError as error:
            errors[path] = str(error)
    table = pd.DataFrame({"path": paths, "error": [errors.get(p) for p in paths]}).set_index("path")
    if images:
        said = detector.judge(Normalised(torch.stack(list(images.values()))), whole_chunks=True)
        known: dict[str, list[Any]] = {"score": said.scores.tolist()}
        if said.steps is not None and said.status is not None:  # a scorer of trajectories
            known["steps"] = said.steps.tolist()
            known["status"] = [Status(s).name.lower() for s in said.status.tolist()]
        if said.p_values is not None and said.decisions is not None:
            known |= {"p_value": said.p_values.tolist(), "ood": said.decisions.tolist()}
        table = table.join(pd.DataFrame(known, index=pd.Index(list(images), name="path")))
    table = table.reset_index().reindex(columns=COLUMNS)
    return table.astype({"score": float, "p_value": float, "ood": "boolean", "steps": "Int64", "status": "string"})


def write_table(table: pd.DataFrame, path: Path) -> None:
    """As the suffix says.

    In CSV, a path or error that a spreadsheet would run has a ``'`` before it; names that are not UTF-8 keep their
    bytes there, and have their odd bytes as ``\\udcXX`` in Parquet.

    Raises:
        TrajOODError: another suffix, or a folder that cannot be written.
    """
    if path.suffix == ".csv":
        safe = {name: table[name].map(quote_formula, na_action="ignore") for name in ("path", "error")}
        write_atomic(path, table.assign(**safe).to_csv(index=False).encode("utf-8", "surrogateescape"))
    elif path.suffix == ".parquet":
        names = table["path"].map(lambda name: name.encode("utf-8", "backslashreplace").decode())
        table = table.assign(path=names)
        write_atomic(path, lambda file: table.to_parquet(file, index=False))
    else:
        raise TrajOODError(f"{path}: expected a name that ends in .parquet or .csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", type=Path, help="a detector's folder")
    parser.add_argument("folder", type=Path, help="of images, searched recursively")
    parser.add_argument("out", type=Path, help="table to write")
    parser.add_argument("--alarm", type=float, default=0.5, help="share of OOD images that is an alarm (default 0.5)")
    options = parser.parse_args()
    try:
        table = judge_folder(Detector.load(options.detector), options.folder)
        write_table(table, options.out)
    except TrajOODError as error:
        sys.exit(f"batch_job: error: {error}")
    broken, ood = int(table["error"].notna().sum()), table["ood"].dropna()
    share = float(ood.mean()) if len(ood) else 0.0
    print(f"{len(table)} images, {broken} unreadable, {share:.1%} out of distribution: {options.out}")
    sys.exit(3 if broken else 4 if share > options.alarm else 0)


if __name__ == "__main__":
    main()
