"""Gaussian mixtures with full covariances (scikit-learn's), with the number of components chosen by BIC."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

CANDIDATES = (1, 2, 4, 8, 16)
_IMAGES_PER_COMPONENT = 10  # the minimum


def learn_mixture(values: Tensor, seed: int, floor: float) -> dict[str, Tensor]:
    """Fit a Gaussian mixture of k components, k the candidate of lowest BIC that leaves enough images per component.

    Args:
        values: (N, q) float64.
        seed: seed of the k-means initialisation.
        floor: added to the diagonals of the covariances, in squared units of the values.
    Returns:
        ``weights`` (k,), ``means`` (k, q) and ``factors`` (k, q, q), the Cholesky factors of the precisions; float64.
    """
    from sklearn.mixture import GaussianMixture

    array = values.numpy()
    mixtures = [
        GaussianMixture(k, covariance_type="full", reg_covar=floor, random_state=seed).fit(array)
        for k in CANDIDATES
        if k == 1 or k * _IMAGES_PER_COMPONENT <= len(array)
    ]
    best = min(mixtures, key=lambda m: m.bic(array))
    learnt = {"weights": best.weights_, "means": best.means_, "factors": best.precisions_cholesky_}
    return {key: torch.from_numpy(value).double() for key, value in learnt.items()}


def mixture_energies(state: Mapping[str, Tensor], values: Tensor) -> Tensor:
    """−log density, (chunk,) float64, of values (chunk, q) under the mixture ``state``."""
    factors = state["factors"]
    white = (values - state["means"][:, None]) @ factors  # (k, chunk, q)
    scale = factors.diagonal(dim1=1, dim2=2).log().sum(dim=1) - values.shape[1] / 2 * math.log(2 * math.pi)
    logs = (state["weights"].log() + scale)[:, None] - white.square().sum(dim=2) / 2
    return -logs.logsumexp(dim=0)
