"""AttractorDictionary: the end points of in-distribution training trajectories, and whether they can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood.attractors.health import Health, health_of
from traj_ood.autoencoders.base import Autoencoder, View
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError
from traj_ood.index import Approximate, Backend, NeighborIndex, greedy_leaders
from traj_ood.io.tensor_file import open_tensors, write_tensors

_SCHEMA = "traj_ood.attractors/1"


@dataclass(frozen=True)
class AttractorDictionary:
    """End points Z*_train of the trajectories of ID training samples.

    Attributes:
        points: (N, *L) float32 end points, converged or not: the paper keeps those that met the step limit too.
        residuals: (N,) float64 last squared residual.
        steps, statuses: (N,) int64.
        displacements: (N,) float64 ‖z* − z0‖ / ‖z0‖.
        ids: N source ids.
        provenance: what made it (model fingerprint, tolerance, …); stored with it.
    """

    points: Tensor
    residuals: Tensor
    steps: Tensor
    statuses: Tensor
    displacements: Tensor
    ids: tuple[str, ...]
    provenance: Mapping[str, Any]

    @classmethod
    def from_trajectory(
        cls, start: Tensor, trajectory: Trajectory, ids: tuple[str, ...], provenance: Mapping[str, Any] | None = None
    ) -> AttractorDictionary:
        """Collect the end points of ``trajectory``, which started at ``start`` (N, *L).

        Raises:
            TrajOODError: the numbers of trajectories, starts and ids differ.
        """
        if not len(trajectory) == len(start) == len(ids):
            raise TrajOODError(f"attractors: {len(trajectory)} trajectories, {len(start)} starts and {len(ids)} ids")
        moved = (trajectory.final - start).flatten(1).norm(dim=1).double().cpu()
        length = start.flatten(1).norm(dim=1).double().cpu()
        last = (trajectory.steps - 1).clamp(min=0)
        residuals = trajectory.residuals.gather(1, last[:, None])[:, 0]
        return cls(
            points=trajectory.final.cpu(),
            residuals=residuals,
            steps=trajectory.steps,
            statuses=trajectory.status,
            displacements=moved / length.clamp(min=torch.finfo(torch.float64).tiny),
            ids=ids,
            provenance=dict(provenance or {}),
        )

    @classmethod
    def concatenate(cls, parts: list[AttractorDictionary]) -> AttractorDictionary:
        """One dictionary of several batches, in their order."""
        return cls(
            points=torch.cat([p.points for p in parts]),
            residuals=torch.cat([p.residuals for p in parts]),
            steps=torch.cat([p.steps for p in parts]),
            statuses=torch.cat([p.statuses for p in parts]),
            displacements=torch.cat([p.displacements for p in parts]),
            ids=tuple(i for p in parts for i in p.ids),
            provenance=parts[0].provenance,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def usable(self) -> Tensor:
        """(M, *L) the end points that are finite: those a distance can be measured to.

        Raises:
            TrajOODError: there is none.
        """
        points = self.points[self.statuses != Status.NON_FINITE]
        if not len(points):
            raise TrajOODError(
                "attractors: every training trajectory left the finite numbers; this model has no attractors"
            )
        return points

    def distinct(self, cosine: float = 0.99) -> Tensor:
        """Indices into :meth:`usable` of one end point per attractor.

        Args:
            cosine: end points at least this similar to an earlier kept one count as the same. Default 0.99 (§3.2).
        """
        directions = torch.nn.functional.normalize(self.usable().flatten(1), dim=1)
        # On the unit sphere ‖a − b‖² = 2 − 2 cos.
        return greedy_leaders(directions, max(0.0, 2 - 2 * cosine) ** 0.5)[0]

    def index(
        self,
        autoencoder: Autoencoder,
        view: View = "tokens",
        backend: Backend = "auto",
        approximate: Approximate = "none",
    ) -> NeighborIndex:
        """A :class:`NeighborIndex` over one latent view; always built from the points, never read from disk."""
        points = autoencoder.view(self.usable().to(autoencoder.device), view)
        return NeighborIndex(points, backend=backend, approximate=approximate)

    def health(self) -> Health:
        """See :class:`traj_ood.attractors.health.Health`."""
        non_finite = float((self.statuses == Status.NON_FINITE).double().mean())
        return health_of(
            count=len(self),
            converged=float((self.statuses == Status.CONVERGED).double().mean()),
            non_finite=non_finite,
            distinct=len(self.distinct()) if non_finite < 1 else 0,
            residuals=self.residuals,
            steps=self.steps.double(),
            displacements=self.displacements,
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        header = {"schema": _SCHEMA, "ids": self.ids, "provenance": dict(self.provenance)}
        write_tensors(path, self.tensors(), header)

    def tensors(self) -> dict[str, Tensor]:
        names = ("points", "residuals", "steps", "statuses", "displacements")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def load(cls, path: Path) -> AttractorDictionary:
        """Read what :meth:`save` wrote.

        Raises:
            TrajOODError: unreadable, another schema, inconsistent lengths, or non-finite points marked as finite.
        """
        with open_tensors(path, "attractor dictionary", "copy it again, or start the run's command again") as file:
            header = file.header
            if header.get("schema") != _SCHEMA:
                raise TrajOODError(f"{path}: expected schema {_SCHEMA}, got {header.get('schema')}")
            loaded = cls(ids=tuple(header["ids"]), provenance=header["provenance"], **file.tensors)
        lengths = {len(t) for t in loaded.tensors().values()} | {len(loaded.ids)}
        if len(lengths) != 1:
            raise TrajOODError(f"{path}: damaged attractor dictionary: its parts have lengths {sorted(lengths)}")
        if not bool(loaded.usable().isfinite().all()):
            raise TrajOODError(f"{path}: damaged attractor dictionary: non-finite points that are marked finite")
        return loaded


class NearestAttractor:
    """Observer: d(z_t, Z*_train) at every point of every trajectory, in one latent view."""

    def __init__(self, autoencoder: Autoencoder, index: NeighborIndex, view: View) -> None:
        self.name = f"distance/{view}"
        self._autoencoder, self._index, self._view = autoencoder, index, view

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
        return self._index.nearest(self._autoencoder.view(latents, self._view)).distances[:, 0]


class NearestOther(NearestAttractor):
    """Observer of training trajectories: the distance to the nearest attractor of another training sample.

    A sample's own attractor says nothing about where a new sample would end; leaving it out makes the distances those
    of a held-out one.

    Args:
        own: (B,) int64, the place of each sample's own end point among the index's points; −1 where it is not there.
    """

    def __init__(self, autoencoder: Autoencoder, index: NeighborIndex, view: View, own: Tensor) -> None:
        super().__init__(autoencoder, index, view)
        self._own = own

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
        return self._index.nearest(self._autoencoder.view(latents, self._view), self._own[rows]).distances[:, 0]
