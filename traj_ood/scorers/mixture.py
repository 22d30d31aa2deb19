"""A Gaussian mixture of few numbers an image: scikit-learn's, with full covariances and components by BIC."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

CANDIDATES = (1, 2, 4, 8, 16)
_LEAST = 10  # training images per component


def learn_mixture(values: Tensor, seed: int, floor: float) -> dict[str, Tensor]:
    """``weights`` (k,), ``means`` (k, q) and ``factors`` (k, q, q) float64, the Cholesky factors of the precisions.

    k is the one of 1, 2, 4, 8, 16 with the lowest BIC (Schwarz 1978) among those that leave each component 10 images.

    Args:
        values: (N, q) float64.
        seed: of the fit's k-means start.
        floor: added to the covariances' diagonals, in units of the values.
    """
    from sklearn.mixture import GaussianMixture

    array = values.numpy()
    mixtures = [
        GaussianMixture(k, covariance_type="full", reg_covar=floor, random_state=seed).fit(array)
        for k in CANDIDATES
        if k == 1 or k * _LEAST <= len(array)
    ]
    best = min(mixtures, key=lambda m: m.bic(array))
    learnt = {"weights": best.weights_, "means": best.means_, "factors": best.precisions_cholesky_}
    return {key: torch.from_numpy(value).double() for key, value in learnt.items()}


def mixture_energies(state: Mapping[str, Tensor], values: Tensor) -> Tensor:
    """(chunk,) float64 −log density of values (chunk, q)."""
    factors = state["factors"]
    white = (values - state["means"][:, None]) @ factors  # (k, chunk, q)
    scale = factors.diagonal(dim1=1, dim2=2).log().sum(dim=1) - values.shape[1] / 2 * math.log(2 * math.pi)
    logs = (state["weights"].log() + scale)[:, None] - white.square().sum(dim=2) / 2
    return -logs.logsumexp(dim=0)
