"""AttractorDictionary: the end points of in-distribution training trajectories, and whether they can be trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from traj_ood.autoencoders.base import Autoencoder, View
from traj_ood.errors import TrajOODError
from traj_ood.files import write_atomic
from traj_ood.index import Approximate, Backend, NeighborIndex, greedy_leaders
from traj_ood.trajectory import Status, Trajectory

HEALTHY_CONVERGED = 0.90
HEALTHY_DISTINCT = 10
HEALTHY_DISPLACEMENT = 0.02
"""Median ‖z* − z0‖ / ‖z0‖. Below that the end point is z0 again (cosine above 0.9998), the path says nothing that z0
does not, and a score against attractors is a distance to training latents."""
Word = Literal[
    "healthy", "slow", "not converging", "diverging", "near-identity", "collapsed", "unstable", "random-like"
]
_NO_ATTRACTORS = "such as field, early-path, knn or mahalanobis"
_SCHEMA = "traj_ood.attractors/1"
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Verdict:
    """One word on a model's attractors, why, and what to do about it.

    Attributes:
        word: ``healthy``, or what is wrong.
        reason, remedy: a sentence each, without full stop; the remedy of a healthy model is empty.
    """

    word: Word
    reason: str
    remedy: str = ""

    @property
    def meaningful(self) -> bool:
        """Whether a score against these attractors says something about the image."""
        return self.word == "healthy"

    @property
    def text(self) -> str:
        """The whole verdict in one line; a bad one also names what is still of use."""
        if self.meaningful:
            return f"{self.word}: {self.reason}."
        line = f"{self.word}: {self.reason}. Scores against these attractors mean nothing; {self.remedy}."
        if self.word == "random-like":
            return line
        return f"{line} Scorers that need no attractors ({_NO_ATTRACTORS}) do not depend on this."


@dataclass(frozen=True)
class Health:
    """Whether a dictionary describes attractors at all. A score against an unhealthy one is not to be trusted.

    Attributes:
        count: number of end points.
        converged: share that reached the tolerance; non_finite: share that left the finite numbers.
        residual_quantiles, steps_quantiles, displacement_quantiles: at 5, 25, 50, 75, 95 %. The residual is the last
            squared one, the displacement is ‖z* − z0‖ / ‖z0‖.
        distinct: number of end points left when those with cosine >= 0.99 to an earlier one are merged.
        healthy: at least 90 % converged, at least 10 distinct, and a median displacement of at least 2 %.
        warnings: one sentence per reason why it is not.
        verdict: the same in words, with the remedy; of several reasons it names the one that explains the others.
    """

    count: int
    converged: float
    non_finite: float
    residual_quantiles: tuple[float, ...]
    steps_quantiles: tuple[float, ...]
    displacement_quantiles: tuple[float, ...]
    distinct: int
    healthy: bool
    warnings: tuple[str, ...]
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


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
        """See :class:`Health`."""
        converged = float((self.statuses == Status.CONVERGED).double().mean())
        non_finite = float((self.statuses == Status.NON_FINITE).double().mean())
        distinct = len(self.distinct()) if non_finite < 1 else 0
        moved = _quantiles(self.displacements)
        verdicts = _objections(len(self), converged, non_finite, distinct, moved)
        return Health(
            count=len(self),
            converged=converged,
            non_finite=non_finite,
            residual_quantiles=_quantiles(self.residuals),
            steps_quantiles=_quantiles(self.steps.double()),
            displacement_quantiles=moved,
            distinct=distinct,
            healthy=not verdicts,
            warnings=tuple(v.reason for v in verdicts),
            verdict=verdicts[0]
            if verdicts
            else Verdict(
                "healthy", f"{converged:.1%} of {len(self)} training trajectories end at {distinct} distinct attractors"
            ),
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        header = {"schema": _SCHEMA, "ids": json.dumps(self.ids), "provenance": json.dumps(dict(self.provenance))}
        write_atomic(path, save(self.tensors(), metadata=header))

    def tensors(self) -> dict[str, Tensor]:
        names = ("points", "residuals", "steps", "statuses", "displacements")
        return {name: getattr(self, name).contiguous() for name in names}

    @classmethod
    def load(cls, path: Path) -> AttractorDictionary:
        """Read what :meth:`save` wrote.

        Raises:
            TrajOODError: unreadable, another schema, inconsistent lengths, or non-finite points marked as finite.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            if header.get("schema") != _SCHEMA:
                raise TrajOODError(f"{path}: expected schema {_SCHEMA}, got {header.get('schema')}")
            loaded = cls(ids=tuple(json.loads(header["ids"])), provenance=json.loads(header["provenance"]), **tensors)
        except TrajOODError:
            raise
        except Exception as error:
            raise TrajOODError(f"{path}: not a readable attractor dictionary ({error})") from error
        lengths = {len(t) for t in tensors.values()} | {len(loaded.ids)}
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

    def observe(self, step: int, rows: Tensor, latents: Tensor) -> Tensor:
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

    def observe(self, step: int, rows: Tensor, latents: Tensor) -> Tensor:
        found = self._index.search(self._autoencoder.view(latents, self._view), 2)
        mine = found.indices[:, 0].cpu() == self._own[rows]
        distances = found.distances.cpu()
        return torch.where(mine, distances[:, 1], distances[:, 0])


def _objections(
    count: int, converged: float, non_finite: float, distinct: int, displacements: tuple[float, ...]
) -> list[Verdict]:
    """What speaks against a dictionary, causes before their consequences."""
    found = []
    if converged < HEALTHY_CONVERGED:
        reason = f"only {converged:.1%} of {count} training trajectories converged (healthy: at least 90 %)"
        if non_finite > (1 - converged) / 2:
            remedy = (
                "bound the latents (end the encoder in a LayerNorm) and train with input noise, so that f contracts"
            )
            found.append(Verdict("diverging", f"{reason}, {non_finite:.1%} left the finite numbers", remedy))
        else:
            remedy = "train with the loss on all pixels and input noise (loss: all, input_noise: 0.3 to 1.0), or "
            found.append(Verdict("not converging", reason, remedy + "allow more steps"))
    if displacements and displacements[2] < HEALTHY_DISPLACEMENT:
        reason = f"f hardly moves a sample: median displacement {displacements[2]:.1%} of ‖z0‖ (healthy: at least 2 %)"
        found.append(Verdict("near-identity", reason, "train with input noise or masks, or narrow the bottleneck"))
    if distinct < HEALTHY_DISTINCT:
        noun = "attractor" if distinct == 1 else "attractors"
        reason = f"only {distinct} distinct {noun} (healthy: at least {HEALTHY_DISTINCT})"
        remedy = "widen the bottleneck, train longer, or with less input noise"
        found.append(Verdict("collapsed", reason, remedy))
    return found


def _quantiles(values: Tensor) -> tuple[float, ...]:
    finite = values[values.isfinite()]
    if not len(finite):
        return ()
    return tuple(torch.quantile(finite, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist())
