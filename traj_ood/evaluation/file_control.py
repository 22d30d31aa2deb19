"""A control beside the scorers: what the image files alone give away, whatever they show.

The Mahalanobis distance of :func:`traj_ood.data.spectrum.image_statistics` to those of the training images. Where it
has a high AUROC, so may a scorer that has seen nothing but resolution or compression. It reads every image once more.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from traj_ood.data import Benchmark, Split
from traj_ood.data.batches import OnError
from traj_ood.data.spectrum import NAMES, image_statistics
from traj_ood.errors import TrajOODError

NOTE = "no scorer: distance of spectrum, roughness, blockiness and size of the image files to those of training images"
_FLOOR = 1e-6
"""Added to the variances of the statistics, which are logarithms or slopes. A statistic that is the same for all
training images, such as their size, then still sets apart images in which it differs by more than rounding."""


def control_scores(
    sample: Benchmark, table: pd.DataFrame, workers: int = 2, on_error: OnError = "raise"
) -> NDArray[np.float64]:
    """(rows,) scores of the images of a run's table (columns ``split`` and ``id``), higher = more OOD, of the benchmark
    that was run, read by ``workers`` threads; ``skip`` leaves out training images that cannot be read.

    Raises:
        TrajOODError: an image that cannot be read.
    """
    with ThreadPoolExecutor(workers) as pool:

        def statistics(split: Split, indices: Iterable[int]) -> NDArray[np.float64]:
            found = pool.map(lambda i: _statistics(split, i, on_error), indices)
            return np.array([values for values in found if values is not None]).reshape(-1, len(NAMES))

        train = statistics(sample.train, range(len(sample.train.images)))
        centre = train.mean(axis=0)
        covariance = np.cov(train.T, bias=True) + _FLOOR * np.eye(len(NAMES))
        scores = np.empty(len(table))
        splits = {split.name: split for split in sample.splits()}
        for name, rows in table.reset_index(drop=True).groupby("split", sort=False):
            split = splits[str(name)]
            place = {image: i for i, image in enumerate(split.images.ids)}
            offsets = statistics(split, [place[image] for image in rows["id"]]) - centre
            squares = (offsets * np.linalg.solve(covariance, offsets.T).T).sum(axis=1)
            scores[rows.index.to_numpy()] = np.sqrt(squares)
    return scores


def _statistics(split: Split, index: int, on_error: OnError) -> NDArray[np.float64] | None:
    try:
        return image_statistics(split.images.load(index))
    except TrajOODError:
        if on_error == "skip" and split.role == "train":
            return None
        raise
