"""The spectral radius of f's Jacobian: below 1 at a fixed point, that point attracts its surroundings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.dynamics.fixed_function import fixed_around
from traj_ood.dynamics.maps import SelfMap
from traj_ood.errors import TrajOODError

Derivative = Literal["forward", "differences"]
_STEP = 1e-3
"""Of a central difference, relative to ‖z‖: in float32 its rounding error (1e-7 / 1e-3) stays near its truncation's."""
_AGREEMENT = 0.2
"""Forward mode and central differences may differ by this share. It only has to find tangents that got lost (a
``detach`` or ``no_grad`` inside a user's f), which would pass for stability."""

_PROBE = 1e-2
"""Step of a divergence's probe, relative to ‖z‖. Larger than that of a product: one difference has no second chance,
and in float32 its rounding is the noise of the trace."""

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Radii:
    """Spectral radii of the Jacobian.

    Attributes:
        values: (P,) float64; infinite where the products left the finite numbers.
        derivative: ``forward`` mode, or central ``differences`` where f does not support it.
    """

    values: Tensor
    derivative: Derivative

    @property
    def stable(self) -> Tensor:
        """(P,) bool: the radius is below 1."""
        return self.values < 1


def spectral_radii(
    self_map: SelfMap, points: Tensor, *, burn: int = 40, window: int = 60, seed: int = 0, chunk: int = 32
) -> Radii:
    """Spectral radius ρ(∂f/∂z) at each of ``points``, by power iteration on Jacobian-vector products.

    ‖Jᵏv‖ grows like ρᵏ for almost every v. Its logarithm is recorded at every step (v is scaled back to length 1), and
    the slope of a line through the last ``window`` steps is log ρ. A single ratio would not do: a complex pair of
    eigenvalues makes the growth swing about its mean. The Jacobian itself (n × n) is never formed.

    Args:
        self_map: f on (n, *L), each row on its own; called on min(chunk, P) rows.
        points: (P, *L), float32 or float64.
        burn: steps before the window, in which smaller eigenvalues die out. Default 40.
        window: Default 60. Tests hold both defaults to 3 % of the eigenvalues of linear maps, complex pairs and random
            matrices included.
        seed: of v.
        chunk: most rows per call of f.
    Raises:
        TrajOODError: no points, or a window that no line fits.
    """
    if not len(points):
        raise TrajOODError("spectral radius: expected at least 1 point, got 0")
    if burn < 0 or window < 2:
        raise TrajOODError(f"spectral radius: expected burn >= 0 and window >= 2, got {burn} and {window}")
    points = points.detach().clone()  # what inference mode made, forward mode cannot use
    draws = torch.Generator().manual_seed(seed)
    start = torch.randn(points.shape[1:], generator=draws).to(points).expand_as(points)
    directions = start / _lengths(start)
    logs = torch.zeros(burn + window, len(points), dtype=torch.float64)
    with fixed_around(self_map):
        product, derivative = _product(self_map, points, directions, min(chunk, len(points)))
        for k in range(burn + window):
            images = product(directions)
            length = _lengths(images)
            logs[k] = length.flatten().cpu().double().log()
            # A length of zero (J v = 0) stays zero: log 0 and the radius 0 below are what that means.
            directions = torch.where(length > 0, images / length, torch.zeros_like(images))
    values = _slopes(logs.cumsum(dim=0)[burn:]).exp()
    vanished = (logs == -torch.inf).any(dim=0)
    values = torch.where(vanished, 0.0, values)
    return Radii(torch.where(values.isnan(), torch.inf, values), derivative)


def _product(self_map: SelfMap, points: Tensor, directions: Tensor, chunk: int) -> tuple[Product, Derivative]:
    """v → J v at every point, by forward mode where it works and agrees with differences, else by differences."""
    forward = _in_chunks(lambda z, v: _forward(self_map, z, v), points, chunk)
    differences = _in_chunks(lambda z, v: _difference(self_map, z, v), points, chunk)
    expected = differences(directions)
    try:
        got = forward(directions)
    except (NotImplementedError, RuntimeError):  # an operation without a forward derivative
        return differences, "differences"
    scale = _lengths(expected).clamp(min=10 * _STEP)  # shorter ones are rounding
    if bool((_lengths(got - expected) > _AGREEMENT * scale).any()):
        return differences, "differences"
    return forward, "forward"


def _in_chunks(product: Callable[[Tensor, Tensor], Tensor], points: Tensor, chunk: int) -> Product:
    """The product at all points; a row of the chunk is a point and its direction."""

    def apply(directions: Tensor) -> Tensor:
        pairs = torch.stack([points, directions], dim=1)
        return apply_in_chunks(lambda rows: product(rows[:, 0], rows[:, 1]), pairs, chunk)

    return apply


def _forward(self_map: SelfMap, points: Tensor, directions: Tensor) -> Tensor:
    # Fused attention has no forward derivative; the plain products it stands for do.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"`torch\.jit\.script` is deprecated"
        )  # torch's own derivatives use it
        product: Tensor = torch.func.jvp(self_map, (points,), (directions,))[1]
    return product.detach()


def _difference(self_map: SelfMap, points: Tensor, directions: Tensor) -> Tensor:
    step = _STEP * _lengths(points).clamp(min=1.0)
    with torch.no_grad():
        return (self_map(points + step * directions) - self_map(points - step * directions)) / (2 * step)


def _lengths(rows: Tensor) -> Tensor:
    """(P, 1, …) Euclidean lengths of (P, *L), shaped to divide them."""
    return rows.flatten(1).norm(dim=1).reshape(-1, *[1] * (rows.ndim - 1))


def _slopes(table: Tensor) -> Tensor:
    """(P,) slopes of the least-squares lines through the columns of (K, P)."""
    steps = torch.arange(len(table), dtype=table.dtype)
    centred = steps - steps.mean()
    return centred @ table / centred.square().sum()


def divergence_at(self_map: SelfMap, points: Tensor, chunk: int, seed: int = 0) -> Tensor:
    """(B,) float64 estimate of tr(∂f/∂z) − dim at points (B, *L): the divergence of the field f(z) − z.

    One Hutchinson probe ε of random signs, the same for every point, and a central difference along it: εᵀ Jε has the
    trace as its mean over ε, and no estimate of one point depends on another.

    Args:
        self_map: f on chunks of rows. chunk: rows per call. seed: of ε.
    """
    draws = torch.Generator().manual_seed(seed)
    probe = (2.0 * torch.randint(0, 2, points.shape[1:], generator=draws) - 1).to(points)
    size = probe.numel()
    step = _PROBE * points.flatten(1).norm(dim=1) / size**0.5
    step = torch.where(step > 0, step, _PROBE).view(-1, *[1] * (points.ndim - 1))
    with fixed_around(self_map), torch.inference_mode():
        ahead, behind = (apply_in_chunks(self_map, points + sign * step * probe, chunk, "f") for sign in (1, -1))
    along = ((ahead - behind).cpu().double() * probe.cpu().double()).flatten(1).sum(dim=1)
    return along / (2 * step.cpu().double().flatten()) - size
