"""Quantiles of residuals and norms over steps (Fig. 12), for each split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from traj_ood.data import Split
from traj_ood.dynamics.trajectory import Status, join_tables
from traj_ood.io.parts import Part

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_COLUMNS = tuple(f"q{round(100 * q):02d}" for q in QUANTILES)


def curve_quantiles(split: Split, parts: Sequence[Part], tol: float) -> pd.DataFrame:
    """Long table with columns split, role, step, quantity, q05 … q95; quantity is residual_sq, norm or running.

    All samples count at every step. After convergence a residual is only known to be below the tolerance, so quantiles
    among such samples are NaN (censored); after a trajectory has become NaN or infinite its residual is infinite. The
    norm remains that of the end point. ``running`` is the share of samples that had not stopped before the step.
    """
    columns = ["split", "role", "step", "quantity", *_COLUMNS]
    pieces = [p.tensors for p in parts if "residuals" in p.tensors and len(p.tensors["steps"])]
    if not any(p["residuals"].numel() for p in pieces):  # without trajectories, or if none took a step
        return pd.DataFrame(columns=columns)
    residuals, norms = (join_tables([p[name] for p in pieces]).numpy() for name in ("residuals", "norm"))
    held = pd.DataFrame(norms).ffill(axis=1).to_numpy()
    stopped = np.isnan(residuals)
    diverged = torch.cat([p["status"] for p in pieces]).numpy() == Status.NON_FINITE
    rest = np.where(diverged, np.inf, -np.inf)[:, None]
    squared = np.quantile(np.where(stopped, rest, residuals), QUANTILES, axis=0, method="lower")
    quantities = {  # each (quantiles, steps)
        "residual_sq": np.where(squared < tol, np.nan, squared),
        "norm": np.nanquantile(held[:, : residuals.shape[1]], QUANTILES, axis=0),
        "running": np.broadcast_to((~stopped).mean(axis=0), squared.shape),
    }
    tables = [pd.DataFrame(v.T, columns=_COLUMNS).assign(quantity=name) for name, v in quantities.items()]
    table = pd.concat(tables).rename_axis("step").reset_index().sort_values("step", kind="stable", ignore_index=True)
    return table.assign(split=split.name, role=split.role)[columns]
