"""f, or its cheap copy: which of the two takes a sample's next step, and several steps of many samples at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from traj_ood.dynamics.chunks import apply_in_chunks, kind
from traj_ood.dynamics.fixed_function import name_around
from traj_ood.dynamics.host import where
from traj_ood.errors import TrajOODError

SelfMap = Callable[[Tensor], Tensor]
"""f: latents (n, *L) → latents (n, *L), each row on its own."""


@dataclass(frozen=True)
class LowPrecision:
    """Cheap first steps: f in low precision far from the end, f itself ("polish") from there on, sample by sample.

    A sample starts with ``self_map`` and changes to f for good as soon as one of these holds: its squared residual is
    below (``switch`` · ‖z‖)², has not reached a new minimum for ``patience`` steps, or ``max_steps`` steps are done.
    No trajectory converges or becomes non-finite on a cheap image: f itself decides. Cheap points are points of the
    trajectory like all others (residuals, observers, ``steps``), so scores and numbers of steps change. On the bundled
    model, with one dictionary from fp32, tests/test_precision.py holds that as many converge and that the mean distance
    over horizon 16 stays within 6 % (median below 0.5 %). Over the own length single scores have no such bound: a path
    that lingers between attractors may leave at another step.

    Attributes:
        self_map: f, cheaper, such as :func:`traj_ood.dynamics.device.bfloat16_map` makes; same shapes and type as f.
        max_steps: most cheap steps. Default 250, half of the paper's 500, so that f has as many left. It does not
            follow the limit of one call of :func:`iterate`: z_t must be the same whatever comes after t. Choose it
            below that limit where the end points matter; else those that meet the limit may be cheap images.
        switch: relative length of a step. Default 2⁻⁸, bfloat16's rounding unit: the bundled model stalls at 2⁻⁹, one
            with ‖z‖ ≈ 400 at 2⁻¹⁰, so shorter steps say little about f.
        patience: Default 8: at the noise floor of a deeper model, above ``switch``, new minima soon become rare, while
            the residuals of a trajectory on its way seldom stay up that long. Where they do, f goes on: only slower.
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
    """f for every sample, or its cheap copy for those that are still far from their end."""

    def __init__(self, self_map: SelfMap, low: LowPrecision | None, chunk: int) -> None:
        self._map, self._low, self._chunk, self._name = self_map, low, chunk, name_around(self_map)
        self.has_cheap = low is not None

    def fly(self, latents: Tensor, cheap: Tensor, length: int) -> tuple[list[Tensor], Tensor]:
        """``length`` steps of every sample, those of ``cheap`` (n,) bool, on the CPU, by the cheap map; nothing of them
        is read, so that a device has always work.

        Returns:
            The points, latents (n, *L) first; and ‖f(z) − z‖ and ‖f(z)‖, (2, length, n) on the device.
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
                    images[some] = self._images(f, latents[some])
            else:
                images = self._images(parts[0][0] if parts else self._map, latents)
            lengths.append(torch.stack([(images - latents).flatten(1).norm(dim=1), images.flatten(1).norm(dim=1)]))
            latents = images
            points.append(images)
        return points, torch.stack(lengths, dim=1)

    def stays(self, squared: Tensor, norms: Tensor, steps: Tensor, best: Tensor, best_step: Tensor) -> Tensor:
        """(n,) bool: the next step of a sample that had a cheap one may be cheap, too. ``best`` and ``best_step``, the
        smallest squared residual and its step, are brought up to date in place."""
        low = self._low
        assert low is not None
        fell = squared < best
        best[fell], best_step[fell] = squared[fell], steps[fell]
        resolved = squared >= (low.switch * norms).square()
        return resolved & (steps - best_step < low.patience) & (steps < low.max_steps)

    def _images(self, function: SelfMap, latents: Tensor) -> Tensor:
        images = apply_in_chunks(function, latents, self._chunk, self._name)
        if images.shape != latents.shape:
            raise TrajOODError(
                f"{self._name} must keep the latent's shape {tuple(latents.shape[1:])}, got {tuple(images.shape[1:])}: "
                "encode(decode(z)) has to end where it started"
            )
        if function is not self._map:
            return images.to(latents.dtype)
        if kind(images) != kind(latents):
            raise TrajOODError(
                f"{self._name}: expected latents like those it was given, {kind(latents)}, got {kind(images)}: "
                "convert the model with .float(), and give both in its type"
            )
        return images
