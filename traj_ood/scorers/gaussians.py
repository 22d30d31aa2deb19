"""One Gaussian per cell of an image with Ledoit–Wolf shrinkage: per-position statistics as in PaDiM."""

from __future__ import annotations

import torch
from torch import Tensor

from traj_ood.scorers.covariance import ledoit_wolf, single_class, whitening
from traj_ood.scorers.rows import in_rows


def learn_gaussians(vectors: Tensor, shrink: bool = True) -> dict[str, Tensor]:
    """Fit a Gaussian to each cell.

    Args:
        vectors: (N, cells, d), or (N, d) for a single cell.
        shrink: whether to shrink the covariance as Ledoit and Wolf. Default true; false takes the sample covariance.
    Returns:
        ``means`` (cells, d) and ``factors`` (cells, d, d) float64 with F Fᵀ = Σ⁻¹, Σ the cell's covariance. Directions
        without variance (all of a constant cell) are zero columns, so they add nothing to a distance.
    """
    cells = _cells(vectors).cpu()
    means, factors = [], []
    for cell in cells.unbind(dim=1):
        mean, sample = single_class(cell)
        factor = whitening(ledoit_wolf(sample) if shrink else sample.covariance)
        means.append(mean)
        factors.append(torch.nn.functional.pad(factor, (0, len(factor) - factor.shape[1])))
    return {"means": torch.stack(means), "factors": torch.stack(factors)}


def distances_to_gaussians(state: dict[str, Tensor], vectors: Tensor) -> Tensor:
    """Mahalanobis distances, (B, cells) float64, of vectors (B, cells, d) or (B, d) to the learnt Gaussians."""

    def distances(part: Tensor) -> Tensor:
        offsets = (part.double() - state["means"]).transpose(0, 1)  # (cells, chunk, d)
        return torch.linalg.vector_norm(offsets @ state["factors"], dim=2).T

    return in_rows(distances, _cells(vectors).cpu())


def _cells(vectors: Tensor) -> Tensor:
    return vectors[:, None] if vectors.ndim == 2 else vectors
