"""Residual and norm curves over steps (Fig. 12): quantiles per split, honest about samples that have stopped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from traj_ood.data import Split
from traj_ood.io.parts import Part

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_COLUMNS = tuple(f"q{round(100 * q):02d}" for q in QUANTILES)


def curve_quantiles(split: Split, parts: Sequence[Part], tol: float) -> pd.DataFrame:
    """Long table with columns split, role, step, quantity, q05 … q95; quantity is residual_sq, norm or running.

    Every sample counts at every step. A converged one is known to lie below the tolerance, not where: residual
    quantiles that fall among such samples are NaN (censored). Its norm is that of its end point, where it stays.
    ``running`` is the share of samples that had not stopped before the step.
    """
    columns = ["split", "role", "step", "quantity", *_COLUMNS]
    pieces = [p.tensors for p in parts if "residuals" in p.tensors and len(p.tensors["steps"])]
    if not pieces:
        return pd.DataFrame(columns=columns)
    width = max(p["residuals"].shape[1] for p in pieces)
    residuals = np.concatenate([_padded(p["residuals"], width) for p in pieces])
    norms = np.concatenate([_padded(p["norm"], width + 1) for p in pieces])
    held = pd.DataFrame(norms).ffill(axis=1).to_numpy()
    stopped = np.isnan(residuals)
    ranked = np.where(stopped, -np.inf, residuals)
    rows = []
    for step in range(width):
        squared = np.quantile(ranked[:, step], QUANTILES, method="lower")
        squared = np.where(squared < tol, np.nan, squared)
        running = float((~stopped[:, step]).mean())
        for quantity, values in (
            ("residual_sq", squared),
            ("norm", np.nanquantile(held[:, step], QUANTILES)),
            ("running", [running] * len(QUANTILES)),
        ):
            rows.append([split.name, split.role, step, quantity, *values])
    return pd.DataFrame(rows, columns=columns)


def _padded(values: torch.Tensor, width: int) -> np.ndarray:
    array = values.numpy()
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=np.nan)
