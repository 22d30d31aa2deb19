"""Observers of trajectories: what is measured of every point while it is in memory."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Observer(Protocol):
    """Measures each point of each trajectory once, while the point is in memory.

    ``name`` is the key in :attr:`Trajectory.measures`; an observer that returns None leaves no measure. An observer
    with a true attribute ``beside`` may be called later, with the points of several steps at once and by another thread
    while f computes further points; it must not call the model.
    """

    name: str

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor | None:
        """Measure n points z_t.

        A sample may occur several times in a call, with a different t each time.

        Args:
            steps: (n,) int64, t of each point.
            rows: (n,) int64, the number of each point's sample, counted over all starts.
            latents: (n, *L), the points, from which f goes on: not to be changed in place.
        Returns:
            (n,) numbers, on the CPU or on the device of the latents, or None.
        """
        ...


class Norm:
    """Observer that records ‖z_t‖ at every point (Fig. 12b), which stays bounded unless the trajectory diverges."""

    name, beside = "norm", True

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
        return latents.flatten(1).norm(dim=1)
