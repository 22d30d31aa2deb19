"""KeptPoints: an observer that keeps views of single points of trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

from traj_ood.autoencoders import Autoencoder, FeatureView
from traj_ood.dynamics.host import where
from traj_ood.dynamics.trajectory import Status, Trajectory


class KeptPoints:
    """Observer that keeps one latent view of the points z_t for some t."""

    def __init__(self, model: Autoencoder, view: FeatureView, wanted: frozenset[tuple[FeatureView, int]]) -> None:
        self.name = f"points/{view}"
        self._model = model
        self._view: FeatureView = view
        self._seen: dict[int, list[tuple[Tensor, Tensor]]] = {t: [] for v, t in sorted(wanted) if v == view}

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> None:
        for t, pieces in self._seen.items():
            there = steps == t
            if bool(there.any()):
                points = latents[where(there, latents.device)]
                pieces.append((rows[there], self._model.latent_view(points, self._view).cpu()))

    def points(self, path: Trajectory, first: int) -> dict[tuple[FeatureView, int], Tensor]:
        """The kept points of the samples of ``path``, whose numbers begin at ``first``; earlier samples are dropped.

        For a sample that ended before t it is the end point, or NaN if the trajectory became NaN or infinite.
        """
        end = self._model.latent_view(path.final, self._view).cpu().clone()  # a view may share memory with the points
        end[path.status == Status.NON_FINITE] = torch.nan
        found = {}
        for t, pieces in self._seen.items():
            found[self._view, t] = points = end.clone()
            for rows, values in pieces:
                mine = (rows >= first) & (rows < first + len(path))
                points[rows[mine] - first] = values[mine]
            self._seen[t] = [(rows, values) for rows, values in pieces if int(rows.max()) >= first + len(path)]
        return found
