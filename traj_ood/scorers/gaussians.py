"""One Gaussian for each cell of an image, shrunk by Ledoit and Wolf: per-position statistics as in PaDiM."""

from __future__ import annotations

import torch
from torch import Tensor

from traj_ood.scorers.covariance import class_means, ledoit_wolf, moments, whitening
from traj_ood.scorers.rows import in_rows


def learn_gaussians(vectors: Tensor, shrink: bool = True) -> dict[str, Tensor]:
    """Mean and whitening of every cell.

    Args:
        vectors: (N, cells, d), or (N, d) of one cell.
        shrink: as Ledoit and Wolf. Default true; false takes the sample's own covariance.
    Returns:
        ``means`` (cells, d) and ``factors`` (cells, d, d) float64, F Fᵀ = Σ⁻¹ with Σ the cell's covariance; directions
        without any variance (those of a constant cell) are zero columns: they do not count.
    """
    cells = _cells(vectors).cpu()
    together = torch.zeros(len(cells), dtype=torch.int64)
    means, factors = [], []
    for cell in cells.unbind(dim=1):
        mean = class_means(cell, together, 1)
        sample = moments(cell, mean, together)
        factor = whitening(ledoit_wolf(sample) if shrink else sample.covariance)
        means.append(mean[0])
        factors.append(torch.nn.functional.pad(factor, (0, len(factor) - factor.shape[1])))
    return {"means": torch.stack(means), "factors": torch.stack(factors)}


def distances_to_gaussians(state: dict[str, Tensor], vectors: Tensor) -> Tensor:
    """(B, cells) float64 Mahalanobis distances of vectors (B, cells, d) or (B, d) to what was learnt."""

    def distances(part: Tensor) -> Tensor:
        offsets = (part.double() - state["means"]).transpose(0, 1)  # (cells, chunk, d)
        return torch.linalg.vector_norm(offsets @ state["factors"], dim=2).T

    return in_rows(distances, _cells(vectors).cpu())


def _cells(vectors: Tensor) -> Tensor:
    return vectors[:, None] if vectors.ndim == 2 else vectors
