"""The latent vector field in the plane: f(z) − z of autoencoders with two latent units (Figs 1, 3a)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from traj_ood.analysis.base import Answer, Question, register
from traj_ood.analysis.grid import box, plane
from traj_ood.analysis.images import load_images, sample, stack
from traj_ood.analysis.models import PAPER_EPOCHS, PAPER_STEPS, PAPER_TOL, paper_recipe, settle, train_conv
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.autoencoders import Autoencoder
from traj_ood.data import ImageSource
from traj_ood.engine import SelfMap, apply_in_chunks
from traj_ood.index import greedy_leaders

_STARTS = 15  # grid points per side that trajectories start from; the codes of images are further starts
_SAME = 0.01  # of the box's diagonal: end points closer than that are one attractor
_CHUNK = 32  # rows per call of f: the few slow trajectories of the plane would run in chunks of 128 otherwise


@register
@dataclass(frozen=True)
class Field(Question):
    """Options of ``field``.

    Attributes:
        data: ``fashion-mnist``, ``mnist`` or ``cifar10``. train_images: drawn by the seed; 0 takes all.
        at: epochs at which the field of the first run is drawn; the last one is where training ends, for all runs.
        runs: models of different initialisation. width: d of Table 4.
        reach: the box is [−reach, reach]²; 0 fits it to the encoder's support.
        grid: points per side at which f is evaluated. codes: training images whose codes show the support.
        tol, max_steps: of the iteration that finds attractors.
    """

    name: ClassVar[str] = "field"
    figure: ClassVar[str] = "Figs 1, 3a"
    summary: ClassVar[str] = "two-dimensional vector fields across training and initialisations"
    choices: ClassVar[tuple[str, ...]] = (
        "The width d of Table 4, the epochs of Fig. 3a, the number of models and the batch size (128) are not stated.",
        "Fig. 1 draws [−8, 8]²; the box fits the codes here, since their scale depends on the training.",
        "Two end points are one attractor within 1 % of the box's diagonal; the paper's cosine of 0.99 would merge all "
        "points of one direction, which in the plane are many. Its count is given beside.",
    )

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
        self.expect(self.train_images >= 0, "train_images", "0 (all) or more")
        self.expect(self.reach >= 0, "reach", "0 (fit) or more")
        self.expect(self.tol > 0, "tol", "a tolerance above 0")
        for option, least in (("runs", 1), ("width", 1), ("grid", 2), ("codes", 10), ("max_steps", 2)):
            self.expect(getattr(self, option) >= least, option, f"at least {least}")

    @classmethod
    def paper(cls) -> Field:
        return cls(
            data="mnist",
            train_images=0,
            at=(0, 2, 10, 40, PAPER_EPOCHS),
            reach=8.0,
            max_steps=PAPER_STEPS,
        )

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
                shown = sample(train, min(self.codes, len(train)), self.seed, "field")
                key = {"model": model.fingerprint(), "images": shown.digest(), **self._measured()}
                unit = work.unit("field", key, partial(self._measure, model, shown))
                rows.append({"run": run, "seed": seed, "epoch": epoch, **unit.notes})
                panels.append((f"run {run + 1}, epoch {epoch}", unit.tensors))
        figures = {"rows": rows}
        pictures: dict[str, Callable[[Path], None]] = {"field.png": partial(_draw, self.data, panels)}
        return Answer(figures=figures, sentence=_sentence(rows), pictures=pictures)

    def _measured(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("reach", "grid", "tol", "max_steps")}

    def _measure(self, model: Autoencoder, images: ImageSource) -> Unit:
        """The field of one model, its attractors and the encoder's support."""
        codes = model.encode(stack(model, images))
        low, high = box(codes, self.reach)
        points = plane(low, high, self.grid).to(codes)
        vectors = vector_field(model.self_map, points, model.chunk)
        starts = torch.cat([plane(low, high, _STARTS).to(codes), codes])
        dictionary, path = settle(
            model, starts, tuple(map(str, range(len(starts)))), tol=self.tol, max_steps=self.max_steps
        )
        diagonal = float((high - low).norm())
        ends = dictionary.points[path.converged]
        leaders, group = greedy_leaders(ends.double(), _SAME * diagonal)
        spots = ends[leaders]
        notes: dict[str, Any] = {
            "converged": float(path.converged.double().mean()),
            "attractors": len(spots),
            "attractors_cosine": len(dictionary.distinct()) if len(ends) else 0,
            "norm_on_codes": float(vector_field(model.self_map, codes, model.chunk).norm(dim=1).median()),
            "norm_in_box": float(vectors.norm(dim=1).median()),
            "contractive_codes": _contractive(model, codes),
            "stable_attractors": None,
            "box": [*low.tolist(), *high.tolist()],
        }
        tensors = {"points": points, "vectors": vectors, "codes": codes, "attractors": spots}
        if len(spots):
            radii = (
                torch.linalg.eigvals(planar_jacobians(model.self_map, spots.to(model.device), model.chunk))
                .abs()
                .amax(dim=1)
            )
            notes["stable_attractors"] = float((radii < 1).double().mean())
            tensors["visits"] = torch.bincount(group, minlength=len(spots))
        return Unit(tensors, notes)


def vector_field(self_map: SelfMap, points: Tensor, chunk: int) -> Tensor:
    """(P, *L) f(z) − z at ``points`` (P, *L), Eq. (4)."""
    with torch.inference_mode():
        return apply_in_chunks(self_map, points, chunk) - points


def planar_jacobians(self_map: SelfMap, points: Tensor, chunk: int) -> Tensor:
    """(P, k, k) float64 explicit Jacobians of f at ``points`` (P, k), a forward-mode product per column."""
    points = points.detach().clone()  # what inference mode made, no derivative can use

    def column(direction: Tensor) -> Tensor:
        def push(rows: Tensor) -> Tensor:
            along = direction.expand_as(rows).contiguous()
            pushed: Tensor = torch.func.jvp(self_map, (rows,), (along,))[1]
            return pushed.detach()

        return apply_in_chunks(push, points, chunk)

    basis = torch.eye(points.shape[1]).to(points)
    return torch.stack([column(direction) for direction in basis], dim=2).double().cpu()


def _contractive(model: Autoencoder, codes: Tensor) -> float:
    """Share of the codes at which ‖J_f‖_σ < 1."""
    norms = torch.linalg.matrix_norm(planar_jacobians(model.self_map, codes, model.chunk), ord=2)
    return float((norms < 1).double().mean())


def _sentence(rows: list[dict[str, Any]]) -> str:
    first = [row for row in rows if row["run"] == 0]
    contractive = [f"{row['contractive_codes']:.0%}" for row in first]
    last = [row for row in rows if row["epoch"] == first[-1]["epoch"]]

    def listed(values: list[Any]) -> str:
        return ", ".join(map(str, values))

    return (
        f"At epochs {listed([row['epoch'] for row in first])} the plane has "
        f"{listed([row['attractors'] for row in first])} attractors, and f contracts at "
        f"{listed(contractive)} of the codes; attractors of each initialisation at the end: "
        f"{listed([row['attractors'] for row in last])}."
    )


def _draw(data: str, panels: list[tuple[str, Mapping[str, Tensor]]], path: Path) -> None:
    from traj_ood.analysis.draw_field import fields

    shown = [(title, {k: v.double().numpy() for k, v in tensors.items()}) for title, tensors in panels]
    fields(shown, f"Latent vector fields, k = 2: {data}", path)
