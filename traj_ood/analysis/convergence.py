"""How fast do trajectories reach their attractor? Prop. A.9: in log(ε / ‖e₀‖) / log ‖J_f(z*)‖_σ steps.

e_t = z_t − z*. The Jacobian's spectral norm bounds every single step near z*; its spectral radius is the rate at which
the last steps of almost every trajectory shrink, and the norm exceeds it wherever J is not normal. Both predictions are
compared with the steps that trajectories really take: from their start, as Fig. 11, and over the last factor of ten,
where the linear approximation should hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from traj_ood.analysis.base import Answer, Question, register
from traj_ood.analysis.images import sample, stack
from traj_ood.analysis.models import PAPER_EPOCHS
from traj_ood.analysis.singular import spectral_norms
from traj_ood.analysis.subjects import TRAINED, Subject, Training, subject
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.autoencoders import Autoencoder
from traj_ood.curves import curve_quantiles
from traj_ood.data import Split
from traj_ood.engine import Norm, iterate
from traj_ood.errors import TrajOODError
from traj_ood.index import greedy_leaders
from traj_ood.jacobian import spectral_radii
from traj_ood.parts import Part
from traj_ood.trajectory import Trajectory

_CLOSE = 0.1  # an end point is an attractor when its own remaining error is at most this share of ε
_STRETCH = 10.0  # the last stretch: from the first error of at most 10 ε to ε
_BATCH = 256
_JACOBIANS = 32  # points per unit of work


@register
@dataclass(frozen=True)
class Convergence(Question):
    """Options of ``convergence``.

    Attributes:
        model: as for :func:`traj_ood.load_autoencoder`, or ``conv``, trained here.
        data: an image set or a benchmark, see :func:`traj_ood.analysis.subjects.subject`.
        images: training images whose trajectories are measured.
        epsilon: ε as a share of the median ‖e₀‖.
        tol, max_steps: of the iteration that finds the attractors; tol is on the squared residual.
        curve_tol, curve_steps: tolerance and number of steps of the residual and norm curves.
        train_images, epochs, bottleneck, width: of ``conv``; 0 training images takes all.
    """

    name: ClassVar[str] = "convergence"
    figure: ClassVar[str] = "Prop. A.9, Figs 11, 12"
    summary: ClassVar[str] = "steps predicted from the Jacobian at the attractor against steps measured"
    choices: ClassVar[tuple[str, ...]] = (
        "ε is not stated: a thousandth of the median initial error.",
        "The number of points in Fig. 11 is not stated.",
        "Prop. A.9 has no answer where the norm is 1 or more; such points are counted and left out.",
    )

    model: str = "fashion-mae"
    data: str = "fashion"
    images: int = 128
    epsilon: float = 1e-3
    tol: float = 1e-10
    max_steps: int = 2000
    curve_tol: float = 1e-5
    curve_steps: int = 300
    train_images: int = 10_000
    epochs: int = 10
    bottleneck: int = 2
    width: int = 16

    def __post_init__(self) -> None:
        self.expect(self.images >= 3, "images", "at least 3")
        self.expect(0 < self.epsilon < 1, "epsilon", "a share between 0 and 1")
        for option in ("tol", "curve_tol"):
            self.expect(getattr(self, option) > 0, option, "a tolerance above 0")
        for option in ("max_steps", "curve_steps"):
            self.expect(getattr(self, option) >= 2, option, "at least 2 steps")
        self.expect(self.train_images >= 0, "train_images", "0 (all) or more")
        for option in ("epochs", "bottleneck", "width"):
            self.expect(getattr(self, option) >= 1, option, "at least 1")

    @classmethod
    def paper(cls) -> Convergence:
        return cls(model=TRAINED, data="mnist", train_images=0, epochs=PAPER_EPOCHS)

    def answer(self, work: Workspace) -> Answer:
        training = Training(self.train_images, self.epochs, self.bottleneck, self.width)
        about = subject(work, self.model, self.data, self.seed, training)
        settings = ("images", "epsilon", "tol", "max_steps", "curve_tol", "curve_steps", "seed")
        key = {k: getattr(self, k) for k in settings} | {
            "model": about.model.fingerprint(),
            "data": about.train.digest(),
        }
        paths = work.unit("paths", key, partial(self._paths, work, about))
        jacobians = self._jacobians(work, key, about, paths)
        table, figures = self._compare(paths, jacobians)
        figures = {"model": about.model.name, "images": self.images, **paths.notes, **figures}
        return Answer(
            figures=figures,
            sentence=_sentence(figures),
            pictures={
                "convergence.png": partial(_draw_steps, table, about.model.name),
                "curves.png": partial(_draw_curves, about, paths, self.curve_tol),
            },
        )

    def _paths(self, work: Workspace, about: Subject) -> Unit:
        """End points of the trajectories of a sample, and the errors ‖z_t − z*‖ on the way there."""
        model = about.model
        start = model.encode(stack(model, sample(about.train, self.images, self.seed, "convergence")))
        found = []
        with work.bar(2 * len(start), "trajectories", "image") as bar:
            for batch in start.split(_BATCH):
                found.append(errors_on_the_way(model, batch, tol=self.tol, max_steps=self.max_steps))
                bar.update(len(batch))
            tensors = self._curves(model, start)
            bar.update(len(start))
        width = max(errors.shape[1] for _, errors in found)
        errors = torch.cat([_padded(errors, width) for _, errors in found])
        converged = torch.cat([path.converged for path, _ in found])
        median = float(errors[converged, 0].median()) if bool(converged.any()) else 0.0
        if not median > 0:
            raise TrajOODError(
                f"convergence: expected trajectories that move and settle, got {int(converged.sum())} of "
                f"{len(converged)} settled with a median initial error of {median:g}: allow more max_steps or a larger "
                f"tol, or see traj-ood diagnose {model.name}"
            )
        tensors |= {
            "ends": torch.cat([path.final for path, _ in found]),
            "last": torch.cat([_last_residual(path) for path, _ in found]),
            "errors": errors,
            "converged": converged,
        }
        return Unit(tensors, {"converged": float(converged.double().mean()), "epsilon": self.epsilon * median})

    def _curves(self, model: Autoencoder, start: Tensor) -> dict[str, Tensor]:
        """What the curves of Fig. 12 are made of."""
        path = iterate(
            model.self_map,
            start,
            tol=self.curve_tol,
            max_steps=self.curve_steps,
            observers=[Norm()],
            chunk=model.chunk,
        )
        return {"steps": path.steps, "residuals": path.residuals, "norm": path.measure("norm")}

    def _jacobians(self, work: Workspace, key: dict[str, Any], about: Subject, paths: Unit) -> dict[str, Tensor]:
        """Spectral norm and radius of each image's attractor; ends within ε of each other share one Jacobian."""
        settled = paths.tensors["converged"].nonzero()[:, 0]
        ends = paths.tensors["ends"][settled]
        leaders, group = greedy_leaders(ends.flatten(1).double(), paths.notes["epsilon"])
        points = ends[leaders]
        made: dict[str, list[Tensor]] = {"norms": [], "radii": []}
        with work.bar(len(points), "Jacobians", "attractor") as bar:
            for first, batch in zip(range(0, len(points), _JACOBIANS), points.split(_JACOBIANS), strict=True):
                unit = work.unit("jacobians", {**key, "first": first}, partial(_spectra, about.model, batch, self.seed))
                for name, values in made.items():
                    values.append(unit.tensors[name])
                bar.update(len(batch))
        spectra = {name: torch.cat(values) for name, values in made.items()}
        return {"settled": settled, "attractor": group, **spectra}

    def _compare(self, paths: Unit, found: dict[str, Tensor]) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Predicted against measured steps, one row per settled image, and their summary."""
        epsilon = paths.notes["epsilon"]
        errors = paths.tensors["errors"][found["settled"]]
        norms, radii = (found[name][found["attractor"]] for name in ("norms", "radii"))
        remaining = paths.tensors["last"][found["settled"]] / (1 - radii).clamp(min=1e-12)
        close = (radii < 1) & (remaining <= _CLOSE * epsilon)
        near = first_below(errors, _STRETCH * epsilon)
        hit = first_below(errors, epsilon)
        onset = errors.gather(1, near.clamp(min=0)[:, None])[:, 0]
        stretch = {"measured": (hit - near).double(), "error": onset}
        table = pd.DataFrame(
            {
                "error": errors[:, 0],
                "measured": hit.double(),
                "by norm": predicted_steps(errors[:, 0], norms, epsilon),
                "by radius": predicted_steps(errors[:, 0], radii, epsilon),
                "last measured": stretch["measured"],
                "last by norm": predicted_steps(stretch["error"], norms, epsilon),
                "last by radius": predicted_steps(stretch["error"], radii, epsilon),
            }
        )[(close & (hit >= 0)).numpy()]
        rows = []
        for where, prefix in (("start", ""), ("last factor of ten", "last ")):
            for rate in ("norm", "radius"):
                rows.append({"from": where, "rate": rate, **_agreement(table, prefix, rate)})
        figures = {
            "attractors": len(found["norms"]),
            "compared": len(table),
            "norm_quantiles": _quantiles(norms),
            "radius_quantiles": _quantiles(radii),
            "norm_below_1": float((norms < 1).double().mean()),
            "radius_below_1": float((radii < 1).double().mean()),
            "predictions": rows,
        }
        return table, figures


def errors_on_the_way(model: Autoencoder, start: Tensor, *, tol: float, max_steps: int) -> tuple[Trajectory, Tensor]:
    """Trajectories of ``start`` (B, *L), and ‖z_t − z_N‖ (B, T+1) float64 along them, NaN where none was measured.

    Two passes, since a trajectory's points are never stored: the first finds the end points, the second measures.
    """
    path = iterate(model.self_map, start, tol=tol, max_steps=max_steps, chunk=model.chunk)
    again = iterate(
        model.self_map,
        start,
        tol=tol,
        max_steps=max_steps,
        observers=[_DistanceTo(path.final)],
        chunk=model.chunk,
    )
    return path, again.measure("error")


class _DistanceTo:
    """Observer: the distance of each sample's point to its own target (B, *L)."""

    name = "error"

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets

    def observe(self, step: int, rows: Tensor, latents: Tensor) -> Tensor:
        return (latents - self._targets[rows.to(latents.device)]).flatten(1).norm(dim=1).cpu().double()


def predicted_steps(errors: Tensor, rates: Tensor, epsilon: float) -> Tensor:
    """(B,) Prop. A.9: log(ε / ‖e₀‖) / log(rate), the steps until an error that shrinks by ``rate`` is at most ε.

    0 where it already is; NaN where the rate is 1 or more, for which the proposition makes no statement.
    """
    errors, rates = errors.double(), rates.double()
    steps = (epsilon / errors).log() / rates.log()
    steps = torch.where(errors <= epsilon, 0.0, steps)
    return torch.where(rates < 1, steps, torch.nan)


def first_below(errors: Tensor, epsilon: float) -> Tensor:
    """(B,) int64: the first column of (B, T) that is at most ε; −1 where none is."""
    below = errors <= epsilon
    return torch.where(below.any(dim=1), below.int().argmax(dim=1), -1)


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's correlation of two rows of numbers; None for fewer than 3 or where one does not vary."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _agreement(table: pd.DataFrame, prefix: str, rate: str) -> dict[str, Any]:
    """Correlation and medians of predicted against measured steps, where there is a prediction of at least a step."""
    measured, predicted = table[f"{prefix}measured"], table[f"{prefix}by {rate}"]
    counted = predicted.notna() & (predicted > 0) & (measured > 0)
    measured, predicted, errors = measured[counted], predicted[counted], table["error"][counted]
    far = errors > errors.median()
    return {
        "points": len(measured),
        "pearson": pearson(predicted.tolist(), measured.tolist()),
        "pearson_near_half": pearson(predicted[~far].tolist(), measured[~far].tolist()),
        "pearson_far_half": pearson(predicted[far].tolist(), measured[far].tolist()),
        "median_measured": float(measured.median()) if len(measured) else None,
        "median_predicted": float(predicted.median()) if len(measured) else None,
        "within_prediction": float((measured <= predicted.apply(math.ceil)).mean()) if len(measured) else None,
    }


def _spectra(model: Autoencoder, points: Tensor, seed: int) -> Unit:
    points = points.to(model.device)
    norms = spectral_norms(model.self_map, points, chunk=model.chunk, seed=seed).values
    radii = spectral_radii(model.self_map, points, chunk=model.chunk, seed=seed).values
    return Unit({"norms": norms, "radii": radii})


def _last_residual(path: Trajectory) -> Tensor:
    """(B,) ‖z_N − z_{N−1}‖."""
    return path.residuals.gather(1, (path.steps - 1).clamp(min=0)[:, None])[:, 0].sqrt()


def _padded(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=torch.nan)


def _quantiles(values: Tensor) -> list[float | None]:
    """5, 25, 50, 75, 95 %; None where that is infinite (products that left the finite numbers)."""
    found = torch.quantile(
        values, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64), interpolation="lower"
    )
    return [v if math.isfinite(v) else None for v in found.tolist()]


def _sentence(figures: dict[str, Any]) -> str:
    start, last = (
        {row["rate"]: row for row in figures["predictions"] if row["from"] == where}
        for where in ("start", "last factor of ten")
    )

    def told(row: dict[str, Any]) -> str:
        correlation = "no correlation can be measured" if row["pearson"] is None else f"Pearson {row['pearson']:.2f}"
        if not row["points"]:
            return "no point with a prediction"
        return (
            f"{correlation}, median {row['median_predicted']:.0f} predicted for {row['median_measured']:.0f} measured"
        )

    return (
        f"{figures['model']}: the spectral norm is below 1 at the attractors of {figures['norm_below_1']:.0%} of the "
        f"images, the radius at those of {figures['radius_below_1']:.0%}; steps from the start by the norm: "
        f"{told(start['norm'])}; by the radius: {told(start['radius'])}; over the last factor of ten by the radius: "
        f"{told(last['radius'])}."
    )


def _draw_steps(table: pd.DataFrame, model: str, path: Path) -> None:
    from traj_ood.analysis.draw_convergence import predictions

    predictions(table, f"Steps to the attractor (Prop. A.9): {model}", path)


def _draw_curves(about: Subject, paths: Unit, tol: float, path: Path) -> None:
    from traj_ood.plots import dynamics_curves

    tensors = {name: paths.tensors[name] for name in ("steps", "residuals", "norm")}
    split = Split("train", "train", about.train)
    dynamics_curves(curve_quantiles(split, [Part((), [], tensors, {})], tol), tol, path)
