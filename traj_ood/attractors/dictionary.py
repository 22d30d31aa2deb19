"""AttractorDictionary: the end points of ID training trajectories, and observers that measure distances to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood.attractors.health import SAME, Health, group_directions, health_of
from traj_ood.autoencoders.base import Autoencoder, View
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError
from traj_ood.index import Approximate, Backend, NeighborIndex
from traj_ood.io.tensor_file import open_tensors, write_tensors

_SCHEMA = "traj_ood.attractors/1"
_TENSORS = ("points", "residuals", "steps", "statuses", "displacements")


@dataclass(frozen=True)
class AttractorDictionary:
    """End points Z*_train of the trajectories of ID training samples.

    Attributes:
        points: (N, *L) end points, in the model's type, converged or not: the paper also keeps those at the step limit.
        residuals: (N,) float64, the last squared residual of each trajectory.
        steps: (N,) int64 number of steps.
        statuses: (N,) int64, a :class:`traj_ood.dynamics.trajectory.Status` each.
        displacements: (N,) float64 ‖z* − z0‖ / ‖z0‖.
        ids: N ids of the training samples.
        provenance: model fingerprint, tolerance and the like; saved with the dictionary.
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
        """Collect the end points of trajectories.

        Args:
            start: (N, *L) the points z0 at which they started.
            trajectory: the N trajectories.
            ids: N names of the samples.
            provenance: see the class. Default: empty.
        Raises:
            TrajOODError: the numbers of trajectories, starts and ids differ.
        """
        if not len(trajectory) == len(start) == len(ids):
            raise TrajOODError(
                "attractors: expected as many starts and ids as trajectories, got "
                f"{len(trajectory)} trajectories, {len(start)} starts and {len(ids)} ids"
            )
        moved = (trajectory.final - start).flatten(1).norm(dim=1).double().cpu()
        length = start.flatten(1).norm(dim=1).double().cpu()
        return cls(
            points=trajectory.final.cpu(),
            residuals=trajectory.last_residuals,
            steps=trajectory.steps,
            statuses=trajectory.status,
            displacements=moved / length.clamp(min=torch.finfo(torch.float64).tiny),
            ids=ids,
            provenance=dict(provenance or {}),
        )

    @classmethod
    def concatenate(cls, parts: list[AttractorDictionary]) -> AttractorDictionary:
        """Concatenate the dictionaries of several batches, in their order."""
        tensors = {name: torch.cat([getattr(p, name) for p in parts]) for name in _TENSORS}
        return cls(**tensors, ids=tuple(i for p in parts for i in p.ids), provenance=parts[0].provenance)

    def __len__(self) -> int:
        return len(self.ids)

    def usable(self) -> Tensor:
        """The finite end points, (M, *L), to which distances can be measured.

        Raises:
            TrajOODError: no end point is finite.
        """
        points = self.points[self.statuses != Status.NON_FINITE]
        if not len(points):
            raise TrajOODError(
                "attractors: every training trajectory became NaN or infinite, so this model has no attractors: check "
                "its weights, or train it with input noise so that f contracts"
            )
        return points

    def distinct(self, cosine: float = SAME) -> Tensor:
        """Indices into :meth:`usable` of one end point per distinct attractor.

        Args:
            cosine: end points with at least this cosine similarity to an earlier one are merged with it. Default 0.99
                (§3.2).
        """
        return group_directions(self.usable(), cosine)[0]

    def index(
        self,
        autoencoder: Autoencoder,
        view: View = "tokens",
        backend: Backend = "auto",
        approximate: Approximate = "none",
    ) -> NeighborIndex:
        """Build a :class:`NeighborIndex` over the finite end points (:meth:`usable`) in one latent view.

        Args:
            autoencoder: the model, whose :meth:`traj_ood.Autoencoder.view` is taken.
            view: Default ``tokens``, the whole latent.
            backend, approximate: see :class:`traj_ood.NeighborIndex`.
        """
        points = autoencoder.view(self.usable().to(autoencoder.device), view)
        return NeighborIndex(points, backend=backend, approximate=approximate)

    def health(self) -> Health:
        """Statistics that show whether these attractors can be trusted; see
        :class:`traj_ood.attractors.health.Health`."""
        distinct = len(self.distinct()) if bool((self.statuses != Status.NON_FINITE).any()) else 0
        return health_of(self.statuses, self.residuals, self.steps, self.displacements, distinct=distinct)

    def save(self, path: str | Path) -> None:
        """Write the dictionary to one safetensors file, atomically."""
        header = {"schema": _SCHEMA, "ids": self.ids, "provenance": dict(self.provenance)}
        write_tensors(path, self.tensors(), header)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as a file holds them."""
        return {name: getattr(self, name) for name in _TENSORS}

    @classmethod
    def load(cls, path: str | Path) -> AttractorDictionary:
        """Read a file that :meth:`save` wrote.

        Raises:
            TrajOODError: unreadable, another schema, inconsistent lengths, or non-finite points marked as finite.
        """
        with open_tensors(
            path, "attractor dictionary", "copy it again, or start the run's command again with --fresh"
        ) as file:
            header = file.header
            if header.get("schema") != _SCHEMA:
                raise TrajOODError(f"{path}: expected schema {_SCHEMA}, got {header.get('schema')}")
            loaded = cls(ids=tuple(header["ids"]), provenance=header["provenance"], **file.tensors)
        lengths = {len(t) for t in loaded.tensors().values()} | {len(loaded.ids)}
        if len(lengths) != 1:
            raise TrajOODError(f"{path}: damaged attractor dictionary: its parts have lengths {sorted(lengths)}")
        if not bool(loaded.points[loaded.statuses != Status.NON_FINITE].isfinite().all()):
            raise TrajOODError(f"{path}: damaged attractor dictionary: non-finite points that are marked finite")
        return loaded


class NearestAttractor:
    """Observer that measures the distance d(z_t, Z*_train) to the nearest attractor in one latent view, under the name
    ``distance/<view>``.

    Args:
        autoencoder: the model.
        index: the attractors in this view, see :meth:`AttractorDictionary.index`.
        view: the view.
    """

    beside = True

    def __init__(self, autoencoder: Autoencoder, index: NeighborIndex, view: View) -> None:
        self.name = f"distance/{view}"
        self._autoencoder, self._index = autoencoder, index
        self._view: View = view

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
        return self._index.nearest(self._autoencoder.view(latents, self._view)).distances[:, 0]


class NearestOther(NearestAttractor):
    """Observer of training trajectories that measures the distance to the nearest attractor of another training sample.

    Leaving out a sample's own attractor makes its distances comparable to those of a new sample.

    Args:
        own: (B,) int64 index of each sample's own end point among the indexed points; −1 where it is not among them.
    """

    def __init__(self, autoencoder: Autoencoder, index: NeighborIndex, view: View, own: Tensor) -> None:
        super().__init__(autoencoder, index, view)
        self._own = own

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
        return self._index.nearest(self._autoencoder.view(latents, self._view), self._own[rows]).distances[:, 0]
