"""BatchRecord: what the engine has recorded of the trajectories of one batch of starts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from traj_ood.dynamics.trajectory import Status, Trajectory


class BatchRecord:
    """The record of the trajectories of one batch of starts; its first sample has the number ``first``."""

    def __init__(self, first: int, start: Tensor) -> None:
        count = len(start)
        self.first, self.end, self.left = first, first + count, count
        self.ended = 0  # number of the read at which its last sample was found to have ended
        # Decisions are made on the CPU (MPS has no float64); only latents stay on the device.
        self.steps = torch.zeros(count, dtype=torch.int64)
        self.status = torch.full((count,), int(Status.STEP_LIMIT))
        self.final = start.detach().clone()
        self.residuals = _Table(count)
        self.measures: dict[str, _Table] = {}

    def measure(self, name: str) -> _Table:
        return self.measures.setdefault(name, _Table(len(self.steps)))

    def trajectory(self, max_steps: int, names: Iterable[str]) -> Trajectory:
        measures = {name: self.measure(name).values() for name in names}
        return Trajectory(self.steps, self.status, self.residuals.values(), self.final, measures, max_steps)


class _Table:
    """A growing table with one number per sample and step; NaN after a sample's end."""

    def __init__(self, count: int) -> None:
        self._values = torch.full((count, 1), torch.nan, dtype=torch.float64)
        self._width = 1

    def put(self, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        self._width = max(self._width, int(columns.max()) + 1)
        missing = self._width - self._values.shape[1]
        if missing > 0:  # doubled, so that the table is not copied at every step
            more = self._values.new_full((len(self._values), max(missing, self._values.shape[1])), torch.nan)
            self._values = torch.cat([self._values, more], dim=1)
        self._values[rows, columns] = values

    def values(self) -> Tensor:
        return self._values[:, : self._width].clone()
