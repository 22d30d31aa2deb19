"""Gaussians of training features: one per cell of an image, as in PaDiM, or one per class with a shared covariance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.covariance import class_means, covariance, gaussian, whitening
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
    means, factors = [], []
    for cell in in_cells(vectors).cpu().unbind(dim=1):
        mean, matrix = gaussian(cell, shrink=shrink)
        factor = whitening(matrix)
        means.append(mean)
        factors.append(torch.nn.functional.pad(factor, (0, len(factor) - factor.shape[1])))
    return {"means": torch.stack(means), "factors": torch.stack(factors)}


def whitened(state: Mapping[str, Tensor], part: Tensor) -> Tensor:
    """Offsets of a chunk of vectors (chunk, cells, d) from the learnt means, whitened: (cells, chunk, d) float64."""
    return (part.double() - state["means"]).transpose(0, 1) @ state["factors"]


def distances_to_gaussians(state: Mapping[str, Tensor], vectors: Tensor) -> Tensor:
    """Mahalanobis distances, (B, cells) float64, of vectors (B, cells, d) or (B, d) to the learnt Gaussians."""

    def distances(part: Tensor) -> Tensor:
        return torch.linalg.vector_norm(whitened(state, part), dim=2).T

    return in_rows(distances, in_cells(vectors).cpu())


def in_cells(vectors: Tensor) -> Tensor:
    """Vectors (B, cells, d); (B, d) become a single cell."""
    return vectors[:, None] if vectors.ndim == 2 else vectors


def learn_classes(scorer: str, features: Tensor, classes: Tensor | None, *, shrink: bool) -> tuple[Tensor, Tensor]:
    """Class means (C, d) of features (N, d), and the whitening factor (d, r) of the covariance that all classes share.

    Raises:
        TrajOODError: the features do not vary within their ``classes`` (N,).
    """
    means = class_means(features, classes)
    matrix = covariance(features, means, classes, shrink=shrink)
    if classes is not None and not float(matrix.trace()) > 0:
        raise TrajOODError(
            f"scorer {scorer}: the training features do not vary within their classes ({len(means)} classes of "
            f"{len(features)} images), so no distance can be measured: use more images of each class"
        )
    return means, whitening(matrix)


def to_nearest(white: Tensor, means: Tensor) -> Tensor:
    """Offsets (B, r) of whitened vectors from the nearest of ``means`` (C, r), found by the expanded square, where its
    cancellation does no harm."""
    return white - means[squares_to(white, means).argmin(dim=1)]


def squares_to(points: Tensor, others: Tensor) -> Tensor:
    """Squared distances (B, M) of points (B, n) to others (M, n), minus the squared norms of the points."""
    return torch.addmm(others.square().sum(dim=1), points, others.T, alpha=-2)


def under(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one of several Gaussians in a state, whose keys begin with ``name/``."""
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}


def named(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`under`."""
    return {f"{name}/{key}": value for key, value in state.items()}
