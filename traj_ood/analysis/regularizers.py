"""The autoencoder variants of Table 3 on equal budgets: contraction, health, memorisation and OOD detection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from torch import Tensor

from traj_ood.analysis.base import Answer, Question, register
from traj_ood.analysis.experiment import Sampled
from traj_ood.analysis.images import spread, stack
from traj_ood.analysis.measures import correlation, finite, separation
from traj_ood.analysis.memory import MeasuredImages, gallery, memory, normalised, reference
from traj_ood.analysis.models import PAPER_EPOCHS, PAPER_RATE, paper_recipe, train_conv
from traj_ood.analysis.singular import explicit_norms, explicit_radii, jacobians
from traj_ood.analysis.variants import Variant, variants
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.autoencoders import ConvAutoencoder
from traj_ood.data import Benchmark, load_benchmark
from traj_ood.data.preprocessing import Normalised
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.scorers import create_scorer
from traj_ood.scorers.scorer_set import ScorerSet

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

SCORERS = ("trajectory", "trajectory:horizon=16", "field", "mahalanobis", "reconstruction")
"""The paper's score, its first 16 steps, the field alone, and two scorers without dynamics."""
_NAMES = tuple(v.name for v in variants())
_MAX_JACOBIANS = 16  # at latents of test images, and at attractors


@register
@dataclass(frozen=True)
class Regularizers(Question):
    """Measures of the autoencoder variants of Table 3, trained on equal budgets.

    Attributes:
        variants: names of Table 3's rows, see :mod:`traj_ood.analysis.variants`. Default: all ten.
        strength: factor of every λ.
        benchmark: the benchmark whose ID training images are used, and whose OOD sets are scored.
        images: number of training images.
        width: d of Table 4.
        bottleneck, narrow: k of all variants except ``bottleneck``, and k of that.
        starts: number of training images for the scorers and the attractors.
        per_set: number of test images, and of images per OOD set. Default 50, at which an AUROC has a standard error of
            4 points, and the mean over eight sets one of about 2.
        tol: tolerance on the squared residual. Default: the benchmark's.
    """

    name: ClassVar[str] = "regularizers"
    figure: ClassVar[str] = "Table 3, App. C"
    summary: ClassVar[str] = "Table 3's autoencoders: contraction, health, memorisation and OOD detection of each"
    choices: ClassVar[tuple[str, ...]] = (
        "The paper lists these objectives and measures nothing on them: networks, data and every λ are ours.",
        "Equal budgets: the same images, epochs, batches and learning rate; a penalty on a Jacobian costs about twice "
        "the time for them.",
        "Only the variant weight-decay has any weight decay.",
        "An encoder without tied weights can shrink its latents, and with them J_E or ‖E(x)‖₁, while the decoder "
        "stretches them again: such a penalty need not touch f.",
        "Masked: error on all pixels, as Eq. (2) has it; Table 3 prints the error on M ⊙ (…).",
    )
    unstated: ClassVar[tuple[str, ...]] = (
        "variants", "strength", "benchmark", "images", "epochs", "batch", "rate", "width", "bottleneck", "narrow",
        "starts", "per_set", "tol", "max_steps",
    )  # fmt: skip

    at_least: ClassVar = dict.fromkeys(("epochs", "batch", "width", "bottleneck", "narrow", "per_set", "max_steps"), 1)
    above_0: ClassVar = ("rate", "tol", "strength")

    variants: tuple[str, ...] = _NAMES
    strength: float = 1.0
    benchmark: str = "fashion"
    images: int = 4000
    epochs: int = 16
    batch: int = 64
    rate: float = 2e-3
    width: int = 16
    bottleneck: int = 64
    narrow: int = 8
    starts: int = 200
    per_set: int = 50
    tol: float = 1e-5
    max_steps: int = 300

    def __post_init__(self) -> None:
        for name in self.variants:
            if name not in _NAMES:
                raise unknown_name(f"{self.name}: variant", name, _NAMES)
        self.expect(len(set(self.variants)) == len(self.variants) > 0, "variants", "at least one, none twice")
        super().__post_init__()
        self.expect(2 <= self.starts <= self.images, "starts", f"2 to {self.images} (images)")
        for label in SCORERS:
            create_scorer(label).check_training_size(self.starts)

    @classmethod
    def paper(cls) -> Regularizers:
        """The training of App. D and the iteration of §4.2, as far as they are stated."""
        return cls(epochs=PAPER_EPOCHS, rate=PAPER_RATE, batch=128, width=32, bottleneck=128, images=20_000,
                   starts=2000, per_set=1000, max_steps=500)  # fmt: skip

    def answer(self, work: Workspace) -> Answer:
        data = load_benchmark(self.benchmark, work.data_root)
        data = data.subsample(train=self.images, per_set=self.per_set, seed=self.seed)
        images = Sampled(_shape(data), data.train.images, spread(self.images, self.starts), data.test.images)
        rows: list[dict[str, Any]] = []
        pictures: dict[str, Mapping[str, Tensor]] = {}
        chosen = [variant for variant in variants(self.strength) if variant.name in self.variants]
        for variant in work.track(chosen, "regularizers", "model"):
            row, pictures[variant.name] = self._row(work, variant, data, images)
            rows.append(row)
        figures = {"rows": rows, "reference": reference(images.pixels), "trends": _trends(rows)}
        return Answer(figures, _sentence(rows), gallery(pictures))

    def drawn(self, figures: Mapping[str, Any]) -> Mapping[str, Callable[[], Figure]]:
        return {"regularizers.png": partial(_dots, figures["rows"], self.benchmark)}

    def _row(
        self, work: Workspace, variant: Variant, data: Benchmark, images: Sampled
    ) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """Train one variant and measure it."""
        k = self.narrow if variant.narrow else self.bottleneck
        trained = train_conv(
            work,
            variant.name,
            images.train,
            images.shape,
            paper_recipe(self.epochs, self.batch, self.rate, variant.decay),
            width=self.width,
            bottleneck=k,
            seed=self.seed,
            loss=variant.loss,
            build=variant.build,
            variant={"name": variant.name, **variant.options},
        )
        key = self.settings("starts", "tol", "max_steps", "seed") | {
            "model": trained.final.fingerprint(),
            "data": {name: d["contents"] for name, d in data.digests().items()},
        }
        unit = work.unit("variant", key, lambda: self._measure(trained.final, data, images.pixels))
        about = {"variant": variant.name, "regularizer": variant.regularizer, "bottleneck": k}
        return {**about, "train_loss": trained.losses[-1], **unit.notes}, unit.tensors

    def _measure(self, model: ConvAutoencoder, data: Benchmark, images: MeasuredImages) -> Unit:
        """Contraction, health, memorisation and detection of one model."""
        starts, tested = (normalised(model, part) for part in (images.training[images.starts], images.test))
        scorers = ScorerSet(model, SCORERS, tol=self.tol, max_steps=self.max_steps)
        try:
            scorers.fit(Normalised(starts))
        except TrajOODError as error:  # a model without a finite attractor cannot be fitted, which is a result
            return Unit({}, {"refused": str(error)})
        ends = scorers.dictionary
        assert ends is not None
        health = ends.health()
        found, shown = memory(model, images, ends)

        def scores(images: Tensor) -> Mapping[str, Tensor]:
            return scorers.score(Normalised(images)).scores

        test = scores(tested)
        per_set = {s.name: _aurocs(test, scores(stack(model.transform, s.images))) for s in data.ood}
        frame = pd.DataFrame(per_set).T.astype(float)  # a scorer that lacks one AUROC has no mean
        aurocs = {label: finite(frame[label].mean(skipna=False)) for label in SCORERS}
        return Unit(
            shown,
            {
                **found,
                "verdict": health.verdict.word,
                "healthy": health.healthy,
                "displacement": health.displacement_quantiles[2] if health.displacement_quantiles else None,
                "norm_at_data": _at_some(model, model.encode(tested), explicit_norms),
                "radius_at_attractors": _at_some(model, ends.points[ends.statuses == Status.CONVERGED], explicit_radii),
                "auroc": aurocs,
                "auroc_per_set": per_set,
                "refused": None,
            },
        )


def _shape(data: Benchmark) -> tuple[int, int, int]:
    """(C, H, W) of the benchmark's images, from the first training image.

    Raises:
        TrajOODError: the image is not square.
    """
    first = data.train.images.load(0)
    if first.width != first.height:
        raise TrajOODError(
            f"regularizers: expected square images, got {first.width} × {first.height} from {data.name}: use another "
            "benchmark"
        )
    return (1 if first.mode == "L" else 3), first.height, first.width


def _aurocs(test: Mapping[str, Tensor], ood: Mapping[str, Tensor]) -> dict[str, float | None]:
    """AUROC by scorer; None if a score is not finite."""
    found = {label: separation(test[label], ood[label]) for label in SCORERS}
    return {label: None if metrics is None else metrics.auroc for label, metrics in found.items()}


def _at_some(model: ConvAutoencoder, points: Tensor, measure: Callable[[Tensor], Tensor]) -> float | None:
    """Median of a measure of f's Jacobians at evenly spaced points (P, k); None where one is not finite, or P = 0."""
    if not len(points):
        return None
    some = points[list(spread(len(points), _MAX_JACOBIANS))].to(model.device)
    values = measure(jacobians(model.self_map, some, len(some)))
    return float(values.median()) if bool(values.isfinite().all()) else None


def _trends(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Spearman correlation of the trajectory score's AUROC with possible explanations, over the variants."""
    known = [row for row in rows if not row["refused"] and row["norm_at_data"] is not None]
    aurocs = [row["auroc"]["trajectory"] for row in known]
    return {
        name: correlation([row[name] for row in known], aurocs)
        for name in ("norm_at_data", "converged", "memorization", "test_error")
    }


def _sentence(rows: list[dict[str, Any]]) -> str:
    known = [row for row in rows if not row["refused"] and row["auroc"]["trajectory"] is not None]
    if not known:
        return "No variant has finite attractors and scores: nothing to compare."
    healthy = [row["variant"] for row in rows if row.get("healthy")]
    contracting = [row["variant"] for row in known if row["norm_at_data"] is not None and row["norm_at_data"] < 1]
    lost = [row["variant"] for row in rows if row not in known]
    without = f"; without finite attractors or scores: {', '.join(lost)}" if lost else ""
    best = max(known, key=lambda row: row["auroc"]["trajectory"])
    worst = min(known, key=lambda row: row["auroc"]["trajectory"])
    lead = sum(row["auroc"]["trajectory"] > (row["auroc"]["mahalanobis"] or 0.0) for row in known)
    return (
        f"Of {len(rows)} variants {len(healthy)} have healthy attractors ({', '.join(healthy) or 'none'}) and "
        f"{len(contracting)} contract at test images ({', '.join(contracting) or 'none'}); the trajectory score's mean "
        f"AUROC runs from {worst['auroc']['trajectory']:.1%} ({worst['variant']}) to {best['auroc']['trajectory']:.1%} "
        f"({best['variant']}) and is above Mahalanobis's on {lead} of {len(known)}{without}."
    )


def _dots(rows: list[dict[str, Any]], benchmark: str) -> Figure:
    from traj_ood.drawing.charts import DotPanel, dots

    def column(name: str) -> list[list[float | None]]:
        return [[row.get(name)] for row in rows]

    def auroc(label: str) -> list[list[float | None]]:
        return [[None if row["refused"] else row["auroc"][label]] for row in rows]

    panels = [
        DotPanel("Contraction: 1 is the border", {r"$\|J_f\|$ at test latents": column("norm_at_data"),
                                                  "radius at attractors": column("radius_at_attractors")}, mark=1),
        DotPanel("Trajectories that converge", {"share": column("converged")}, limits=(-0.03, 1.03)),
        DotPanel("Memorisation", {"cosine to closest training image": column("memorization")}, limits=(-0.03, 1.03)),
        DotPanel("Mean AUROC", {label: auroc(label) for label in SCORERS}, mark=0.5, limits=(-0.03, 1.03)),
    ]  # fmt: skip
    return dots([row["variant"] for row in rows], panels, 4, f"Table 3's autoencoders on {benchmark}")
