"""How fast do trajectories reach their attractor? Prop. A.9: in log(ε / ‖e₀‖) / log ‖J_f(z*)‖_σ steps, e_t = z_t − z*.

The Jacobian's spectral norm bounds every single step near z*. Its spectral radius is the rate at which the last steps
of almost every trajectory shrink; the norm is larger wherever J is not normal. Both predictions are compared with the
measured steps: from the start, as in Fig. 11, and over the last factor of ten, where the linear approximation should
hold. The curves of residuals and norms are those of Fig. 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from traj_ood.analysis.base import Answer, register
from traj_ood.analysis.images import sample, spread
from traj_ood.analysis.measures import correlation, finite, share
from traj_ood.analysis.models import PAPER_EPOCHS
from traj_ood.analysis.singular import spectral_norms
from traj_ood.analysis.subjects import TRAINED, ModelQuestion, Subject
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.autoencoders import Autoencoder
from traj_ood.autoencoders.identity import model_identity
from traj_ood.data import ImageSource, Split
from traj_ood.data.batches import ranges_of
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.jacobian import spectral_radii
from traj_ood.dynamics.observers import Norm
from traj_ood.dynamics.trajectory import Trajectory
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.curves import QUANTILES, curve_quantiles
from traj_ood.index import greedy_leaders
from traj_ood.io.parts import Part

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

_CLOSENESS = 0.1  # an end point counts as an attractor if its remaining error is at most this share of ε
_STRETCH = 10.0  # the last stretch runs from the first error of at most 10 ε to ε
_CURVE_POINTS = 100  # maximum number of points of a recorded curve
_UNIT_JACOBIANS = 32  # Jacobians per unit of work


@register
@dataclass(frozen=True)
class Convergence(ModelQuestion):
    """Whether Prop. A.9 predicts the number of steps to the attractor, and the curves of residuals and norms.

    Attributes:
        data: see :meth:`traj_ood.analysis.subjects.ModelQuestion.subject`.
        images: number of training images whose trajectories are measured.
        predict: whether to compare steps with Prop. A.9; false computes only the residual and norm curves (Fig. 12),
            which is far less work.
        epsilon: ε as a share of the median ‖e₀‖.
        tol: tolerance on the squared residual for the attractors.
        max_steps: step limit for the attractors.
        curve_tol: tolerance of the residual and norm curves.
        curve_steps: step limit of these curves.
    """

    name: ClassVar[str] = "convergence"
    figure: ClassVar[str] = "Prop. A.9, Figs 11, 12"
    summary: ClassVar[str] = "steps predicted from the Jacobian at the attractor against steps measured"
    choices: ClassVar[tuple[str, ...]] = (
        "ε is not stated: a thousandth of the median initial error.",
        "The number of points in Fig. 11, the tolerance, and how its model was trained are not stated: trained as "
        "App. D states for Figs 2, 3 and 14.",
        "Prop. A.9 has no answer where the norm is 1 or more; such points are counted and left out.",
        "Norm and radius are estimates by power iteration, the radius to some 3 %, which changes the steps that it "
        "predicts by a multiple of that where it is near 1.",
    )
    unstated: ClassVar[tuple[str, ...]] = (
        "images", "predict", "epsilon", "tol", "max_steps", "curve_tol", "curve_steps", "epochs", "width"
    )  # fmt: skip

    at_least: ClassVar = {**ModelQuestion.at_least, "images": 3, "max_steps": 2, "curve_steps": 2}
    above_0: ClassVar = ("tol", "curve_tol")

    data: str = "fashion"
    images: int = 128
    predict: bool = True
    epsilon: float = 1e-3
    tol: float = 1e-10
    max_steps: int = 2000
    curve_tol: float = 1e-5
    curve_steps: int = 300
    bottleneck: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(0 < self.epsilon < 1, "epsilon", "a share between 0 and 1")

    @classmethod
    def paper(cls) -> Convergence:
        return cls(model=TRAINED, data="mnist", train_images=0, epochs=PAPER_EPOCHS, width=32)

    def answer(self, work: Workspace) -> Answer:
        about = self.subject(work, self.data)
        chosen = sample(about.train, self.images, self.seed, "convergence")
        curves = self._curves(work, about.model, chosen)
        table = curve_quantiles(Split("train", "train", about.train), [curves], self.curve_tol)
        common = {"model": about.model.name, "images": len(chosen)}
        recorded = {"curves": curve_figures(table)}
        pictures = {"curves.png": partial(_curves_figure, table, self.curve_tol)}
        if not self.predict:
            return Answer(common | recorded, _told_curves(common, table), pictures)
        key = self.settings("images", "epsilon", "tol", "max_steps", "seed")
        key |= {"model": model_identity(about.model), "data": about.train.digest()}
        paths = self._paths(work, about.model, chosen)
        jacobians = self._jacobians(work, key, about, paths)
        steps, figures = self._compare(paths, jacobians)
        figures = common | dict(paths.notes) | figures | recorded
        drawn = {"convergence.png": partial(steps_figure, steps, about.model.name)}
        return Answer(figures, sentence(figures), drawn | pictures)

    def _paths(self, work: Workspace, model: Autoencoder, images: ImageSource) -> Unit:
        """End points of the trajectories of a sample of images, and the errors ‖z_t − z*‖ along them."""

        def measure(start: Tensor) -> dict[str, Tensor]:
            path, errors = errors_on_the_way(model, start, tol=self.tol, max_steps=self.max_steps)
            last = path.last_residuals.sqrt()
            return {"ends": path.final, "last": last, "errors": errors, "converged": path.converged}

        found = self.over_latents(work, "trajectories", model, images, self.settings("tol", "max_steps"), measure)
        converged = found["converged"]
        median = float(found["errors"][converged, 0].median()) if bool(converged.any()) else 0.0
        if not median > 0:
            raise TrajOODError(
                f"convergence: expected trajectories that move and converge, got {int(converged.sum())} of "
                f"{len(converged)} that converged, with a median initial error of {median:g}: raise max_steps or tol, "
                f"see traj-ood diagnose {model.name}, or draw the curves alone with predict=false"
            )
        return Unit(found, {"converged": share(converged), "epsilon": self.epsilon * median})

    def _curves(self, work: Workspace, model: Autoencoder, images: ImageSource) -> Part:
        """The residuals and norms for the curves of Fig. 12."""

        def measure(start: Tensor) -> dict[str, Tensor]:
            settings: dict[str, Any] = {"tol": self.curve_tol, "max_steps": self.curve_steps, "chunk": model.chunk}
            path = iterate(model.self_map, start, observers=[Norm()], **settings)
            curves = {"residuals": path.residuals, "norm": path.measure("norm")}
            return {"steps": path.steps, "status": path.status, **curves}

        key = self.settings("curve_tol", "curve_steps")
        return Part(tensors=self.over_latents(work, "curves", model, images, key, measure))

    def _jacobians(self, work: Workspace, key: dict[str, Any], about: Subject, paths: Unit) -> dict[str, Tensor]:
        """Spectral norm and radius at each image's attractor; end points within ε of each other share one Jacobian."""
        settled = paths.tensors["converged"].nonzero()[:, 0]
        ends = paths.tensors["ends"][settled]
        leaders, group = greedy_leaders(ends.flatten(1).double(), paths.notes["epsilon"])
        points = ends[leaders]
        model, parts = about.model, ranges_of(len(points), _UNIT_JACOBIANS)

        def measure(rows: range) -> Unit:
            some = points[rows.start : rows.stop].to(model.device)
            norms = spectral_norms(model.self_map, some, chunk=model.chunk, seed=self.seed)
            radii = spectral_radii(model.self_map, some, chunk=model.chunk, seed=self.seed).values
            return Unit({"norms": norms, "radii": radii})

        spectra = work.pieces("jacobians", key, parts, measure, title="Jacobians", unit="attractor")
        return {"settled": settled, "attractor": group, **spectra}

    def _compare(self, paths: Unit, found: dict[str, Tensor]) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Predicted and measured steps, one row per converged image, and their summary."""
        epsilon = paths.notes["epsilon"]
        errors = paths.tensors["errors"][found["settled"]]
        norms, radii = (found[name][found["attractor"]] for name in ("norms", "radii"))
        remaining = paths.tensors["last"][found["settled"]] / (1 - radii).clamp(min=1e-12)
        close = (radii < 1) & (remaining <= _CLOSENESS * epsilon)
        near = first_below(errors, _STRETCH * epsilon)
        hit = first_below(errors, epsilon)
        onset = errors.gather(1, near.clamp(min=0)[:, None])[:, 0]
        table = pd.DataFrame(
            {
                "error": errors[:, 0],
                "measured": hit.double(),
                "by norm": predicted_steps(errors[:, 0], norms, epsilon),
                "by radius": predicted_steps(errors[:, 0], radii, epsilon),
                "last measured": (hit - near).double(),
                "last by norm": predicted_steps(onset, norms, epsilon),
                "last by radius": predicted_steps(onset, radii, epsilon),
            }
        )[(close & (hit >= 0)).numpy()]
        rows = []
        for where, prefix in (("start", ""), ("last factor of ten", "last ")):
            rows += [{"from": where, "rate": rate, **_agreement(table, prefix, rate)} for rate in ("norm", "radius")]
        figures = {
            "attractors": len(found["norms"]),
            "compared": len(table),
            "norm_quantiles": _quantiles(norms),
            "radius_quantiles": _quantiles(radii),
            "norm_below_1": share(norms < 1),
            "radius_below_1": share(radii < 1),
            "predictions": rows,
        }
        return table, figures


def errors_on_the_way(model: Autoencoder, start: Tensor, *, tol: float, max_steps: int) -> tuple[Trajectory, Tensor]:
    """Trajectories from ``start`` (B, *L), and their errors ‖z_t − z_N‖, (B, T+1) float64, NaN past their ends.

    Since points are not stored, there are two passes: the first finds the end points, the second measures the errors.
    """
    walk = partial(iterate, model.self_map, start, tol=tol, max_steps=max_steps, chunk=model.chunk)
    path = walk()
    return path, walk(observers=[_DistanceTo(path.final)]).measure("error")


class _DistanceTo:
    """Observer that measures the distance of each sample's point to its own target, (B, *L)."""

    name = "error"

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
        return (latents - self._targets[rows.to(latents.device)]).flatten(1).norm(dim=1).cpu().double()


def predicted_steps(errors: Tensor, rates: Tensor, epsilon: float) -> Tensor:
    """Steps predicted by Prop. A.9, (B,): log(ε / ‖e₀‖) / log(rate), until an error that shrinks by ``rate`` is at most
    ε.

    0 where the error is at most ε already; NaN where the rate is 1 or more, for which the proposition makes no
    statement.
    """
    errors, rates = errors.double(), rates.double()
    steps = (epsilon / errors).log() / rates.log()
    steps = torch.where(errors <= epsilon, 0.0, steps)
    return torch.where(rates < 1, steps, torch.nan)


def first_below(errors: Tensor, epsilon: float) -> Tensor:
    """Index of the first column of (B, T) that is at most ε, (B,) int64; −1 where none is."""
    below = errors <= epsilon
    return torch.where(below.any(dim=1), below.int().argmax(dim=1), -1)


def _agreement(table: pd.DataFrame, prefix: str, rate: str) -> dict[str, Any]:
    """Correlation and medians of predicted and measured steps, over rows where both are positive."""
    measured, predicted = table[f"{prefix}measured"], table[f"{prefix}by {rate}"]
    counted = (predicted > 0) & (measured > 0)
    measured, predicted, errors = measured[counted], predicted[counted], table["error"][counted]
    far = errors > errors.median()
    return {
        "points": len(measured),
        "pearson": correlation(predicted, measured, "pearson"),
        "pearson_near_half": correlation(predicted[~far], measured[~far], "pearson"),
        "pearson_far_half": correlation(predicted[far], measured[far], "pearson"),
        "median_measured": finite(measured.median()),
        "median_predicted": finite(predicted.median()),
        "within_prediction": finite((measured <= np.ceil(predicted)).mean()),
    }


def _quantiles(values: Tensor) -> list[float | None]:
    """Quantiles at 5, 25, 50, 75 and 95 %; None where one is infinite (products that became NaN or infinite)."""
    places = torch.tensor(QUANTILES, dtype=torch.float64)
    return [finite(v) for v in torch.quantile(values, places, interpolation="lower")]


def curve_figures(table: pd.DataFrame) -> dict[str, Any]:
    """The curves of Fig. 12 for the record, at no more than 100 steps, from those of one split
    (:func:`traj_ood.evaluation.curves.curve_quantiles`): ``steps`` t; ``residual``, quantiles of ‖z_{t+1} − z_t‖ over
    the samples, None where one is below the tolerance or infinite; ``norm``, quantiles of ‖z_t‖; ``running``, the share
    of samples that had not stopped before the step."""
    every = table["step"].unique()
    steps = every[list(spread(len(every), _CURVE_POINTS))].tolist()
    thin = table[table["step"].isin(steps)]
    columns = [f"q{round(100 * q):02d}" for q in QUANTILES]

    def quantiles(quantity: str, power: float) -> dict[str, list[float | None]]:
        rows = thin[thin["quantity"] == quantity]
        return {c: [finite(float(f"{v**power:.6g}")) for v in rows[c].tolist()] for c in columns}

    return {
        "steps": steps,
        "residual": quantiles("residual_sq", 0.5),
        "norm": quantiles("norm", 1.0),
        "running": quantiles("running", 1.0)["q50"],
    }


def _told_curves(common: dict[str, Any], table: pd.DataFrame) -> str:
    """A sentence about the curves: first and last known medians."""
    medians = {quantity: rows["q50"].dropna() for quantity, rows in table.groupby("quantity")}
    steps = int(table["step"].max()) + 1

    def ends(values: pd.Series) -> str:
        return f"{values.iloc[0]:.3g} to {values.iloc[-1]:.3g}" if len(values) else "not measurable"

    return (
        f"{common['model']}, {common['images']} images, {steps} steps: median residual, as far as it is above the "
        f"tolerance: {ends(medians['residual_sq'] ** 0.5)}; median norm: {ends(medians['norm'])}."
    )


def sentence(figures: dict[str, Any]) -> str:
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
        f"{figures['model']}: {figures['converged']:.0%} of the images settled; of these the spectral norm is below 1 "
        f"at the end points of {figures['norm_below_1']:.0%}, the radius at those of "
        f"{figures['radius_below_1']:.0%}; steps from the start by the norm: "
        f"{told(start['norm'])}; by the radius: {told(start['radius'])}; over the last factor of ten by the radius: "
        f"{told(last['radius'])}."
    )


def steps_figure(table: pd.DataFrame, model: str) -> Figure:
    """Draw steps over the initial error, and predicted over measured steps from the start and in the last stretch (Fig.
    11). ``table`` has one row per image: ``error``, ``measured``, ``by norm``, ``by radius``, and the last three with
    the prefix ``last``; NaN where there is no prediction."""
    from traj_ood.drawing.charts import Curve, Panel, curves

    rates = {"by norm": "by the spectral norm", "by radius": "by the spectral radius"}
    over_error = [
        *(Curve(label, table["error"], table[rate], kind="points") for rate, label in rates.items()),
        Curve("measured", table["error"], table["measured"], kind="points"),
    ]
    panels = [Panel("over the initial error", "initial error ‖e₀‖", "steps to error ε", over_error, log_y=True)]
    for title, prefix in (("from the start", ""), ("from error 10 ε to ε", "last ")):
        measured = table[f"{prefix}measured"]
        against = []
        for rate, label in rates.items():
            predicted = table[f"{prefix}{rate}"]
            shown = (predicted > 0) & (measured > 0)
            label += f" (n = {int(shown.sum())})" if shown.any() else f": none, {_why_none(predicted)}"
            against.append(Curve(label, measured[shown], predicted[shown], kind="points"))
        panels.append(Panel(title, "measured steps", "predicted steps", against, diagonal=True))
    return curves(panels, f"Steps to the attractor (Prop. A.9): {model}")


def _why_none(predicted: pd.Series) -> str:
    """Why there is nothing to draw: no image, no prediction, or none where both sides are positive."""
    if predicted.empty:
        return "no image to compare"
    return "it is 1 or more" if predicted.isna().all() else "no step predicted or measured"


def _curves_figure(table: pd.DataFrame, tol: float) -> Figure:
    from traj_ood.evaluation.dynamics_plots import dynamics_curves

    return dynamics_curves(table, tol)
