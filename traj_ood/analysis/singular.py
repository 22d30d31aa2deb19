"""Spectral norms of Jacobians (the largest stretch of a small step), by Jacobian products or from explicit matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.dynamics.fixed_function import fixed_around
from traj_ood.dynamics.jacobian import product_at, random_directions, row_lengths
from traj_ood.errors import TrajOODError, is_out_of_memory
from traj_ood.text import brief

Map = Callable[[Tensor], Tensor]
"""A row-wise, differentiable function (n, *A) → (n, *B)."""
_STEPS = 100  # which in the tests give 1 % accuracy, including random matrices
_TOLERANCE = 1e-4


def spectral_norms(function: Map, points: Tensor, *, seed: int = 0, chunk: int = 32) -> Tensor:
    """Spectral norm ‖J‖_σ, the largest singular value of ∂function/∂z, at each of ``points``, (P,) float64.

    Power iteration on JᵀJ: v ← JᵀJv / ‖JᵀJv‖, with one forward- and one reverse-mode product per step, until ‖Jv‖
    changes by less than a share of 1e-4 at every point, or 100 steps are done. The Jacobian itself is never
    formed. Values are lower bounds, since power iteration never overshoots; infinite where the products, or their
    lengths, became NaN or infinite.

    Args:
        function: called on min(chunk, P) rows; its output may have another shape than its input, as for a decoder.
        points: (P, *A), float32 or float64.
        seed: seed of v.
        chunk: maximum number of rows per call.
    Raises:
        TrajOODError: a function without derivatives.
    """
    points = points.detach().clone()  # derivatives cannot use tensors created in inference mode
    directions = random_directions(points, seed)
    product = product_at(partial(_normal, function), points, min(chunk, len(points)))
    values = torch.full((len(points),), -1.0, dtype=torch.float64)
    escaped = torch.zeros(len(points), dtype=torch.bool)
    for _ in range(_STEPS):
        # vᵀJᵀJv = ‖Jv‖² of the direction before the step.
        with fixed_around(function):
            images = product(directions)
        squares = (images * directions).flatten(1).sum(dim=1).cpu().double()
        found = squares.clamp(min=0).sqrt()
        length = row_lengths(images)
        # Recorded, because a direction divided by an infinite length becomes 0, and the norm would later appear as 0.
        escaped |= ~(squares.isfinite() & length.flatten().isfinite().cpu())
        settled = ((found - values).abs() <= _TOLERANCE * found) & ~escaped
        values = found
        if bool((settled | escaped).all()):
            break
        # If JᵀJ v = 0 the direction stays zero, and so does the norm.
        directions = torch.where(length > 0, images / length, torch.zeros_like(images))
    return torch.where(escaped, torch.inf, values)


def explicit_norms(matrices: Tensor) -> Tensor:
    """Spectral norms (P,) of explicit Jacobians (P, m, n); infinite where a matrix is not finite."""
    return _where_finite(matrices, lambda known: torch.linalg.matrix_norm(known, ord=2))


def explicit_radii(matrices: Tensor) -> Tensor:
    """Spectral radii (P,) of explicit Jacobians (P, n, n); infinite where a matrix is not finite."""
    return _where_finite(matrices, lambda known: torch.linalg.eigvals(known).abs().amax(dim=1))


def _where_finite(matrices: Tensor, measure: Map) -> Tensor:
    """``measure`` of the finite matrices, infinity for the others, on which LAPACK fails."""
    finite = matrices.isfinite().all(dim=(1, 2))
    return torch.where(finite, measure(torch.where(finite[:, None, None], matrices, 0.0)), torch.inf)


def jacobians(function: Map, points: Tensor, chunk: int) -> Tensor:
    """Explicit Jacobians of ``function`` at ``points`` (P, k), (P, m, k) float64, by one forward-mode product per
    column, in calls of ``chunk`` rows."""
    points = points.detach().clone()  # derivatives cannot use tensors created in inference mode

    def column(direction: Tensor) -> Tensor:
        def push(rows: Tensor) -> Tensor:
            along = direction.expand_as(rows).contiguous()
            pushed: Tensor = torch.func.jvp(function, (rows,), (along,))[1]
            return pushed.detach()

        return apply_in_chunks(push, points, chunk)

    basis = torch.eye(points.shape[1]).to(points)
    with fixed_around(function):
        return torch.stack([column(direction) for direction in basis], dim=2).double().cpu()


def _normal(function: Map, points: Tensor, directions: Tensor) -> Tensor:
    """JᵀJv at each of ``points`` (n, *A), for ``directions`` v (n, *A)."""
    try:
        # Fused attention has no forward derivative; the equivalent plain products do.
        with sdpa_kernel(SDPBackend.MATH):
            pushed: Tensor = torch.func.jvp(function, (points,), (directions,))[1]
            (pulled,) = torch.func.vjp(function, points)[1](pushed.detach())
    except (NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise TrajOODError(
            f"spectral norm: expected a map with forward and reverse derivatives, got: {brief(error)}: use "
            "spectral_radii, which needs no derivatives"
        ) from error
    return pulled.detach()
