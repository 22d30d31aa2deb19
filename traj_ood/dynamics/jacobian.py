"""Spectral radius of f's Jacobian (below 1 at a fixed point, the point is attracting), and divergence of f(z) − z."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.dynamics.device import standard_settings
from traj_ood.dynamics.fixed_function import fixed_around
from traj_ood.dynamics.maps import SelfMap
from traj_ood.errors import TrajOODError

Derivative = Literal["forward", "differences"]
_DIFFERENCE_STEP = 1e-3
"""Step of a central difference, relative to ‖z‖, at which in float32 rounding (1e-7 / 1e-3) and truncation error are of
similar size."""
_AGREEMENT = 0.2
"""Allowed relative difference between forward mode and central differences. It only has to detect lost tangents (a
``detach`` or ``no_grad`` inside a user's f), which would look like stability."""

_PROBE_STEP = 1e-2
"""Step of the divergence's central difference, relative to ‖z‖. Larger than ``_DIFFERENCE_STEP``, because the rounding
of a single difference in float32 is the noise of the trace."""

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Radii:
    """Spectral radii of the Jacobian.

    Attributes:
        values: (P,) float64; infinite where the products became NaN or infinite.
        derivative: ``forward`` mode, or central ``differences`` if f does not support it.
    """

    values: Tensor
    derivative: Derivative

    @property
    def stable(self) -> Tensor:
        """(P,) bool: the radius is below 1."""
        return self.values < 1


@standard_settings()
def spectral_radii(
    self_map: SelfMap, points: Tensor, *, burn: int = 40, window: int = 60, seed: int = 0, chunk: int = 32
) -> Radii:
    """Spectral radius ρ(∂f/∂z) at each of ``points``, by power iteration on Jacobian-vector products.

    ‖Jᵏv‖ grows like ρᵏ for almost every v. log ρ is the slope of a line fitted to log ‖Jᵏv‖ over the last ``window``
    steps, with v rescaled to length 1 at every step. A single ratio would not suffice, because a complex pair of
    eigenvalues makes the growth oscillate. The Jacobian itself (n × n) is never formed.

    Args:
        self_map: row-wise f on (n, *L); called on min(chunk, P) rows.
        points: (P, *L), float32 or float64.
        burn: steps before the window, in which smaller eigenvalues die out. Default 40.
        window: steps of the fit. Default 60. In the tests both defaults give 3 % accuracy for linear maps, including
            complex pairs and random matrices.
        seed: seed of v.
        chunk: maximum number of rows per call of f.
    Raises:
        TrajOODError: no points, a negative ``burn``, or a window of fewer than 2 steps.
    """
    if not len(points):
        raise TrajOODError("spectral radius: expected at least 1 point, got 0")
    if burn < 0 or window < 2:
        raise TrajOODError(f"spectral radius: expected burn >= 0 and window >= 2, got {burn} and {window}")
    points = points.detach().clone()  # forward mode cannot use tensors created in inference mode
    directions = random_directions(points, seed)
    logs = torch.zeros(burn + window, len(points), dtype=torch.float64)
    with fixed_around(self_map):
        product, derivative = _product(self_map, points, directions, min(chunk, len(points)))
        for k in range(burn + window):
            images = product(directions)
            length = row_lengths(images)
            logs[k] = length.flatten().cpu().double().log()
            # If J v = 0 the direction stays zero, and the radius is set to 0 below.
            directions = torch.where(length > 0, images / length, torch.zeros_like(images))
    values = _slopes(logs.cumsum(dim=0)[burn:]).exp()
    # After a product that is too long for its type the direction is zero, too.
    vanished = (logs == -torch.inf).any(dim=0) & (logs < torch.inf).all(dim=0)
    values = torch.where(vanished, 0.0, values)
    return Radii(torch.where(values.isnan(), torch.inf, values), derivative)


def _product(self_map: SelfMap, points: Tensor, directions: Tensor, chunk: int) -> tuple[Product, Derivative]:
    """The product v → J v at every point, by forward mode if it works and agrees with differences, else by these."""
    forward = product_at(lambda z, v: _forward(self_map, z, v), points, chunk)
    differences = product_at(lambda z, v: _difference(self_map, z, v), points, chunk)
    expected = differences(directions)
    try:
        got = forward(directions)
    except (NotImplementedError, RuntimeError):  # an operation without a forward derivative
        return differences, "differences"
    scale = row_lengths(expected).clamp(min=10 * _DIFFERENCE_STEP)  # shorter products are rounding
    if bool((row_lengths(got - expected) > _AGREEMENT * scale).any()):
        return differences, "differences"
    return forward, "forward"


def product_at(product: Callable[[Tensor, Tensor], Tensor], points: Tensor, chunk: int) -> Product:
    """A function of directions (P, *L) that applies ``product`` to each of ``points`` (P, *L) with its direction, in
    calls of ``chunk`` rows."""

    def apply(directions: Tensor) -> Tensor:
        pairs = torch.stack([points, directions], dim=1)
        return apply_in_chunks(lambda rows: product(rows[:, 0], rows[:, 1]), pairs, chunk)

    return apply


def _forward(self_map: SelfMap, points: Tensor, directions: Tensor) -> Tensor:
    # Fused attention has no forward derivative; the equivalent plain products do.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"`torch\.jit\.script` is deprecated"
        )  # torch's own derivatives use it
        product: Tensor = torch.func.jvp(self_map, (points,), (directions,))[1]
    return product.detach()


def _difference(self_map: SelfMap, points: Tensor, directions: Tensor) -> Tensor:
    step = _DIFFERENCE_STEP * row_lengths(points).clamp(min=1.0)
    with torch.no_grad():
        return (self_map(points + step * directions) - self_map(points - step * directions)) / (2 * step)


@standard_settings()
def random_directions(points: Tensor, seed: int) -> Tensor:
    """A direction of length 1 for each of ``points`` (P, *L), the same for all."""
    start = torch.randn(points.shape[1:], generator=torch.Generator().manual_seed(seed)).to(points).expand_as(points)
    return start / row_lengths(start)


def row_lengths(rows: Tensor) -> Tensor:
    """Euclidean lengths of rows (P, *L), shaped (P, 1, …) for division."""
    return rows.flatten(1).norm(dim=1).reshape(-1, *[1] * (rows.ndim - 1))


def _slopes(table: Tensor) -> Tensor:
    """Slopes (P,) of the least-squares lines through the columns of (K, P)."""
    steps = torch.arange(len(table), dtype=table.dtype)
    centred = steps - steps.mean()
    return centred @ table / centred.square().sum()


@standard_settings()
def divergence_at(self_map: SelfMap, points: Tensor, chunk: int, seed: int = 0) -> Tensor:
    """Estimate of the divergence tr(∂f/∂z) − dim of the field f(z) − z, (B,) float64.

    Hutchinson's estimator εᵀ J ε, whose mean over random signs ε is the trace, with one probe ε that is the same for
    all points and a central difference along it. No estimate depends on other points.

    Args:
        self_map: f on chunks of rows.
        points: (B, *L).
        chunk: rows per call of f.
        seed: seed of ε.
    """
    draws = torch.Generator().manual_seed(seed)
    probe = (2.0 * torch.randint(0, 2, points.shape[1:], generator=draws) - 1).to(points)
    size = probe.numel()
    step = _PROBE_STEP * row_lengths(points) / size**0.5
    step = torch.where(step > 0, step, _PROBE_STEP)
    with fixed_around(self_map), torch.inference_mode():
        ahead, behind = (apply_in_chunks(self_map, points + sign * step * probe, chunk, "f") for sign in (1, -1))
    along = ((ahead - behind).cpu().double() * probe.cpu().double()).flatten(1).sum(dim=1)
    return along / (2 * step.cpu().double().flatten()) - size
