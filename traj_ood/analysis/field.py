"""The latent vector field f(z) − z of autoencoders with two latent units (Figs 1, 3a)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from traj_ood.analysis.base import Answer, Question, register
from traj_ood.analysis.images import load_images, sample, stack
from traj_ood.analysis.measures import finite, share
from traj_ood.analysis.models import PAPER_EPOCHS, PAPER_STEPS, PAPER_TOL, paper_recipe, train_conv
from traj_ood.analysis.singular import explicit_norms, explicit_radii, jacobians
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.attractors.health import group_directions
from traj_ood.autoencoders import Autoencoder
from traj_ood.data import ImageSource
from traj_ood.data.benchmark import at_most
from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.dynamics.fixed_function import fixed_around
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.maps import SelfMap
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError
from traj_ood.index import greedy_leaders

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

_START_SIDE = 15  # side of the grid of starts; the codes of images are further starts
SAME_DISTANCE = 0.01  # relative to the box's diagonal: end points closer than this are one attractor
# Largest distance of an end point to its attractor, so that two end points of one attractor are never counted as two.
_CLOSENESS = SAME_DISTANCE / 2
# Step length, relative to the diagonal, below which iteration may stop. With it, end points with a spectral radius of
# up to 1 − _REST_STEP / _CLOSENESS are within _CLOSENESS of their attractor.
_REST_STEP = 1e-5
_MARGIN = 0.5  # margin of the fitted box on each side, relative to the support's extent
_TAIL = 0.005  # share of the codes cut off at each end of each axis to fit it
_CHUNK = 24  # rows per call of f, fewer than the model's 96, because few trajectories run long


@register
@dataclass(frozen=True)
class VectorField(Question):
    """Two-dimensional vector fields across training and initialisations.

    Attributes:
        data: ``fashion-mnist``, ``mnist`` or ``cifar10``.
        train_images: number of training images, drawn by the seed; 0 is all.
        at: epochs at which the field of the first run is drawn; training ends with the last, for all runs.
        runs: number of models with different initialisations.
        width: d of Table 4.
        reach: the box is [−reach, reach]²; 0 fits it to the codes.
        grid: points per side at which f is evaluated.
        codes: number of training images whose codes are shown.
        tol: tolerance on the squared residual for attractors; lowered if the box is so small that trajectories would
            stop before they arrive.
        max_steps: step limit.
    """

    name: ClassVar[str] = "field"
    figure: ClassVar[str] = "Figs 1, 3a"
    summary: ClassVar[str] = "two-dimensional vector fields across training and initialisations"
    choices: ClassVar[tuple[str, ...]] = (
        "The width d of Table 4, the epochs of Fig. 3a, the number of models and the batch size (128) are not stated.",
        "An end point is an attractor if the Jacobian's spectral radius ρ is below 1 and the remaining distance, the "
        "last step / (1 − ρ), is at most 0.5 % of the box's diagonal; other trajectories have not settled.",
        "Fig. 1 draws [−8, 8]²; the box fits the codes here, since their scale depends on the training.",
        "Two end points are one attractor within 1 % of the box's diagonal; the paper's cosine of 0.99 would merge all "
        "points of one direction, which in the plane are many. The count by cosine is recorded, too.",
    )
    unstated: ClassVar[tuple[str, ...]] = ("at", "runs", "width", "grid", "codes")

    at_least: ClassVar = {"train_images": 0, "runs": 1, "width": 1, "grid": 2, "codes": 10, "max_steps": 2}
    above_0: ClassVar = ("tol",)
    meanings: ClassVar = {"train_images": {0: "all"}, "reach": {0: "fitted to the codes"}}

    data: str = "fashion-mnist"
    train_images: int = 5_000
    at: tuple[int, ...] = (0, 2, 10, 40)
    runs: int = 3
    width: int = 16
    reach: float = 0.0
    grid: int = 41
    codes: int = 500
    tol: float = PAPER_TOL
    max_steps: int = 1000

    def __post_init__(self) -> None:
        self.expect(bool(self.at) and min(self.at, default=0) >= 0 and max(self.at, default=0) >= 1, "at",
                    "epochs of at least 0, the last at least 1")  # fmt: skip
        self.expect(0 <= self.reach < math.inf, "reach", "0 (fit) or more")
        super().__post_init__()

    @classmethod
    def paper(cls) -> VectorField:
        return cls(
            data="mnist",
            train_images=0,
            at=(0, 2, 10, 40, PAPER_EPOCHS),
            width=32,
            reach=8.0,
            max_steps=PAPER_STEPS,
        )

    def differences(self) -> tuple[str, ...]:
        """As :meth:`Question.differences`, and for ``at`` only the last epoch, the only one that the paper states."""
        last = max(self.at)
        ends = () if last == PAPER_EPOCHS else (f"training ends after epoch {last} here, {PAPER_EPOCHS} in the paper",)
        return (*super().differences(), *ends)

    def answer(self, work: Workspace) -> Answer:
        images = load_images(self.data, work.data_root)
        train = sample(images.train, self.train_images, self.seed, "train")
        recipe = paper_recipe(max(self.at))
        rows, panels = [], []
        for run in range(self.runs):
            epochs = sorted(set(self.at)) if run == 0 else [max(self.at)]
            seed = self.seed + run
            trained = train_conv(
                work, f"field-{run}", train, images.shape, recipe, width=self.width, bottleneck=2, seed=seed, at=epochs
            )
            for epoch in epochs:
                model = trained.models[epoch]
                model.chunk = _CHUNK
                shown = at_most(train, self.codes, self.seed, "field")
                key = self.settings("reach", "grid", "tol", "max_steps")
                key |= {"model": model.fingerprint(), "images": shown.digest()}
                unit = work.unit("plane", key, partial(self._measure, model, shown))
                rows.append({"run": run, "seed": seed, "epoch": epoch, **unit.notes})
                panels.append((f"run {run + 1}, epoch {epoch}", unit.tensors))
        return Answer({"rows": rows}, _sentence(rows), {"field.png": partial(_draw, self.data, panels)})

    def _measure(self, model: Autoencoder, images: ImageSource) -> Unit:
        """The field of one model, its attractors, and the codes of images."""
        codes = model.encode(stack(model.transform, images))
        if not bool(codes.isfinite().all()):
            raise TrajOODError(
                f"field: expected finite codes, got {int((~codes.isfinite()).any(dim=1).sum())} of {len(codes)} from "
                f"{model.name} that are not: its training diverged; try another seed or fewer epochs"
            )
        low, high = box(codes, self.reach)
        points = plane(low, high, self.grid).to(codes)
        vectors = vector_field(model.self_map, points, model.chunk)
        starts = torch.cat([plane(low, high, _START_SIDE).to(codes), codes])
        diagonal = float((high - low).norm())
        ends = settled_ends(model.self_map, starts, diagonal, self.tol, self.max_steps, model.chunk)
        leaders, group = greedy_leaders(ends.double(), SAME_DISTANCE * diagonal)
        spots = ends[leaders]
        notes = {
            "settled": len(ends) / len(starts),
            "attractors": len(spots),
            "attractors_cosine": len(group_directions(ends.double())[0]),
            "norm_on_codes": _median_norm(vector_field(model.self_map, codes, model.chunk)),
            "norm_in_box": _median_norm(vectors),
            "contractive_codes": share(explicit_norms(jacobians(model.self_map, codes, model.chunk)) < 1),
            "box": [*low.tolist(), *high.tolist()],
        }
        visits = torch.bincount(group, minlength=len(spots))
        tensors = {"points": points, "vectors": vectors, "codes": codes, "attractors": spots, "visits": visits}
        return Unit(tensors, notes)


def _median_norm(vectors: Tensor) -> float | None:
    """Median norm; None if f is NaN or infinite at half of the points or more."""
    return finite(vectors.norm(dim=1).nan_to_num(nan=torch.inf).median())


def settled_ends(self_map: SelfMap, starts: Tensor, diagonal: float, tol: float, max_steps: int, chunk: int) -> Tensor:
    """End points that are close to an attractor, (E, 2) on the CPU, of the trajectories from ``starts`` (P, 2).

    A short step alone is not enough: if each step is ρ times the previous one, a last step of length r leaves a
    distance of up to r / (1 − ρ). With ρ the Jacobian's spectral radius at the end point, that distance must be short
    relative to the box, whose diagonal has the length ``diagonal``.
    """
    path = iterate(self_map, starts, tol=min(tol, (_REST_STEP * diagonal) ** 2), max_steps=max_steps, chunk=chunk)
    last = path.last_residuals.sqrt()
    radii = explicit_radii(jacobians(self_map, path.final, chunk))
    left = last / (1 - radii)
    settled = (path.status != Status.NON_FINITE) & (radii < 1) & (left <= _CLOSENESS * diagonal)
    return path.final.cpu()[settled]


def plane(low: Tensor, high: Tensor, side: int) -> Tensor:
    """The points of a square grid between two corners (2,), (side², 2) float64; the first coordinate varies fastest."""
    xs, ys = (torch.linspace(float(a), float(b), side, dtype=torch.float64) for a, b in zip(low, high, strict=True))
    return torch.stack([xs.repeat(side), ys.repeat_interleave(side)], dim=1)


def box(codes: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Two opposite corners (2,) of a square box: [−reach, reach]², or if ``reach`` is 0 one fitted to ``codes`` (B, 2).

    The fitted box spans the central 99 % of the codes plus half of that extent on each side, and is never empty.
    """
    if reach > 0:
        return torch.full((2,), -reach), torch.full((2,), reach)
    codes = codes.double().cpu()
    low, high = (torch.quantile(codes, share, dim=0) for share in (_TAIL, 1 - _TAIL))
    half = max(float((high - low).max()) / 2 * (1 + 2 * _MARGIN), 1e-6 * float(codes.abs().max()), 1e-12)
    centre = (low + high) / 2
    return centre - half, centre + half


def vector_field(self_map: SelfMap, points: Tensor, chunk: int) -> Tensor:
    """The field f(z) − z at ``points`` (P, *L), Eq. (4)."""
    with fixed_around(self_map), torch.inference_mode():
        return apply_in_chunks(self_map, points, chunk) - points


def _sentence(rows: list[dict[str, Any]]) -> str:
    first = [row for row in rows if row["run"] == 0]
    contractive, settled = ([f"{row[key]:.0%}" for row in first] for key in ("contractive_codes", "settled"))
    last = [row for row in rows if row["epoch"] == first[-1]["epoch"]]

    def listed(values: list[Any]) -> str:
        return ", ".join(map(str, values))

    return (
        f"At epochs {listed([row['epoch'] for row in first])}, {listed(settled)} of the trajectories in the plane "
        f"settled; attractors found: {listed([row['attractors'] for row in first])}; f contracts at "
        f"{listed(contractive)} of the codes; attractors found for each initialisation at the end: "
        f"{listed([row['attractors'] for row in last])}."
    )


def _draw(data: str, panels: list[tuple[str, Mapping[str, Tensor]]]) -> Figure:
    from traj_ood.analysis.drawings import fields

    shown = [(title, {k: v.double().numpy() for k, v in tensors.items()}) for title, tensors in panels]
    return fields(shown, f"Latent vector fields, k = 2: {data}")
