"""Application of f, or of a cheaper copy in the first steps, to many samples for several steps at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from traj_ood.dynamics.chunks import apply_in_chunks, kind
from traj_ood.dynamics.fixed_function import name_around, sizes_side_by_side
from traj_ood.dynamics.host import where
from traj_ood.errors import TrajOODError

SelfMap = Callable[[Tensor], Tensor]
"""A row-wise self-map f: latents (n, *L) → latents (n, *L)."""


@dataclass(frozen=True)
class LowPrecision:
    """Low-precision first steps: each sample is iterated with a cheaper copy of f until its steps become short, then
    with f.

    A sample starts with ``self_map`` and switches to f permanently as soon as its squared residual is below
    (``switch`` · ‖z‖)², its residual has not reached a new minimum for ``patience`` steps, or ``max_steps`` steps are
    done. Convergence and non-finite points are decided by f alone. Cheap points belong to the trajectory like all
    others (residuals, observers, ``steps``), so scores and numbers of steps change: the mean distance over horizon 16
    by a few percent (tests/dynamics/test_precision.py), scores over the whole path without bound, because a path that
    lingers between attractors may leave at another step.

    Attributes:
        self_map: cheaper f with the same shapes and type, such as :func:`traj_ood.dynamics.device.bfloat16_map`
            returns.
        max_steps: maximum number of cheap steps. Default 250, half of the paper's 500. It is independent of the limit
            of a call of :func:`iterate`, because z_t must not depend on later steps. Choose it below that limit if the
            end points matter; otherwise end points at the limit may be cheap ones.
        switch: step length relative to ‖z‖ at which to switch. Default 2⁻⁸, bfloat16's rounding unit: shorter
            steps say little about f.
        patience: steps without a new minimum. Default 8: at the noise floor of a deeper model, above ``switch``, new
            minima become rare, while residuals of a converging trajectory seldom stay up that long. If they do, the
            only cost is that f takes over earlier.
    Raises:
        TrajOODError: impossible values.
    """

    self_map: SelfMap
    max_steps: int = 250
    switch: float = 2.0**-8
    patience: int = 8

    def __post_init__(self) -> None:
        for name in ("max_steps", "patience"):
            if getattr(self, name) < 1:
                raise TrajOODError(f"low precision: expected {name} of at least 1, got {getattr(self, name)}")
        if not self.switch >= 0:
            raise TrajOODError(f"low precision: expected a switch >= 0, got {self.switch}")


class Maps:
    """Applies f, or its cheap copy to samples that still use it."""

    def __init__(self, self_map: SelfMap, low: LowPrecision | None, chunk: int) -> None:
        if not callable(self_map):
            raise TrajOODError(f"f: expected a function of latents, got {type(self_map).__name__}")
        self._map, self._low, self._chunk, self._name = self_map, low, chunk, name_around(self_map)
        self.has_cheap = low is not None
        # The cheap copy is no method of a model, so that all threads compute each of its calls.
        self.is_side_by_side = low is None and bool(sizes_side_by_side(self_map, chunk))

    def advance(
        self, latents: Tensor, cheap: Tensor, length: int, beside: Callable[[], None] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Make ``length`` steps of every sample, without reading results, so that a device never waits for the host.

        Args:
            latents: (n, *L) current points.
            cheap: (n,) bool on the CPU, which samples use the cheap map.
            length: number of steps.
            beside: another task, done once, see :func:`traj_ood.dynamics.chunks.apply_in_chunks`.
        Returns:
            The points, length + 1 tensors (n, *L) with ``latents`` first; and the lengths ‖f(z) − z‖ and ‖f(z)‖ of each
            step, (2, length, n) on the device.
        """
        parts = []
        if self._low is not None and bool(cheap.any()):
            parts = [(self._low.self_map, cheap), (self._map, ~cheap)]
            parts = [(f, mask) for f, mask in parts if bool(mask.any())]
        places = [(f, where(mask, latents.device)) for f, mask in parts] if len(parts) == 2 else []
        points, lengths = [latents], []
        for _ in range(length):
            if places:
                images = torch.empty_like(latents)
                for f, some in places:
                    images[some] = self._images(f, latents[some], beside)
                    beside = None
            else:
                images = self._images(parts[0][0] if parts else self._map, latents, beside)
                beside = None
            lengths.append(torch.stack([(images - latents).flatten(1).norm(dim=1), images.flatten(1).norm(dim=1)]))
            latents = images
            points.append(images)
        return points, torch.stack(lengths, dim=1)

    def stays(self, squared: Tensor, norms: Tensor, steps: Tensor, best: Tensor, best_step: Tensor) -> Tensor:
        """Whether the next step of a sample that made a cheap step may be cheap, too, (n,) bool. ``best`` and
        ``best_step``, the smallest squared residual and its step, are updated in place."""
        low = self._low
        assert low is not None
        fell = squared < best
        best[fell], best_step[fell] = squared[fell], steps[fell]
        resolved = squared >= (low.switch * norms).square()
        return resolved & (steps - best_step < low.patience) & (steps < low.max_steps)

    def _images(self, function: SelfMap, latents: Tensor, beside: Callable[[], None] | None) -> Tensor:
        images = apply_in_chunks(function, latents, self._chunk, self._name, beside)
        if images.shape != latents.shape:
            raise TrajOODError(
                f"{self._name} must keep the latent's shape {tuple(latents.shape[1:])}, got {tuple(images.shape[1:])}: "
                "encode must return latents of the shape that decode takes"
            )
        if function is not self._map:
            return images.to(latents.dtype)
        if kind(images) != kind(latents):
            raise TrajOODError(
                f"{self._name}: expected latents of its input's kind, {kind(latents)}, got {kind(images)}: convert the "
                "model with .float(), or pass latents of its type"
            )
        return images
