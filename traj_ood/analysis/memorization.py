"""Memorisation over the bottleneck: how close decoded attractors come to training images, for k = 2 … 512."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from traj_ood.analysis.base import Answer, register
from traj_ood.analysis.experiment import MEMORY_CHOICES, Budget, change, spearman
from traj_ood.analysis.memory import gallery, memory, reference, settle_images
from traj_ood.analysis.workspace import Unit, Workspace

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure


@register
@dataclass(frozen=True)
class Memorization(Budget):
    """How close decoded attractors come to training images, over the bottleneck k.

    Further options are those of :class:`traj_ood.analysis.experiment.Budget`.

    Attributes:
        images: number of training images, drawn by the seed; 0 is all. Default 4,000, which takes half a minute per
            model on a slow core.
        bottlenecks: values of k, ascending. Default: powers of two from 2 to 512, the paper's range.
    """

    name: ClassVar[str] = "memorization"
    figure: ClassVar[str] = "Figs 2 and 13 (left), §3.2.1"
    summary: ClassVar[str] = "how close decoded attractors come to training images, over the bottleneck's width"
    choices: ClassVar[tuple[str, ...]] = (*MEMORY_CHOICES, "The range of k is stated, 2 to 512, but not its values.")
    unstated: ClassVar[tuple[str, ...]] = (*Budget.unstated, "bottlenecks")
    at_least: ClassVar = {**Budget.at_least, "images": 0}

    images: int = 4000
    bottlenecks: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256, 512)

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = list(self.bottlenecks) == sorted(set(self.bottlenecks))
        self.expect(bool(self.bottlenecks) and rising and self.bottlenecks[0] >= 1, "bottlenecks", "ascending, >= 1")

    @classmethod
    def paper(cls) -> Memorization:
        return cls(**cls.paper_budget(), images=0)

    def answer(self, work: Workspace) -> Answer:
        data = self.load(work, self.images)
        rows: list[dict[str, Any]] = []
        pictures: dict[str, dict[str, Tensor]] = {}
        with work.bar(len(self.bottlenecks), "memorization", "model") as bar:
            for k in self.bottlenecks:
                trained = self.train(work, data.train, data.shape, bottleneck=k)

                def measure(model: Any = trained.final) -> Unit:
                    ends = settle_images(model, data.probe.training[data.probe.starts], self.tol, self.max_steps)
                    found, shown = memory(model, data.probe, ends)
                    return Unit(shown, found)

                unit = work.unit("memory", self.measure_key(trained.final, data), measure)
                rows.append({"bottleneck": k, "train_loss": trained.losses[-1], **unit.notes})
                pictures[f"k = {k}"] = dict(unit.tensors)
                bar.update()
        closest = reference(data.probe)
        figures = {"rows": rows, "reference": closest, "trends": _trends(rows)}
        return Answer(figures, _sentence(rows, closest), {**self.drawn(figures), **gallery(pictures)})

    def drawn(self, figures: Mapping[str, Any]) -> Mapping[str, Callable[[], Figure]]:
        return {"memorization.png": partial(_curves, figures["rows"], figures["reference"], self.data)}


def _trends(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Spearman correlation of each figure with k; the paper's claims are −, − and +."""
    k = [row["bottleneck"] for row in rows]
    return {
        name: spearman(k, [row[name] for row in rows])
        for name in ("memorization", "test_error", "rank90", "rank90_unit")
    }


def _sentence(rows: list[dict[str, Any]], closest: float) -> str:
    known = [row for row in rows if row["memorization"] is not None]
    if not known:
        return "No trajectory stayed finite at any bottleneck: these models have no attractors to compare."
    first, last = known[0], known[-1]
    ends = ", ".join(f"{row['converged']:.0%}" for row in rows)
    return (
        f"From k = {first['bottleneck']} to {last['bottleneck']} the memorisation coefficient goes from "
        f"{change(first, last, 'memorization', '.3f')} (an unseen test image: {closest:.3f}), the test error from "
        f"{change(first, last, 'test_error', '.4f')}, and the rank that explains 90 % of decoded end points from "
        f"{change(first, last, 'rank90', 'd')}; of the trajectories {ends} converge."
    )


def _curves(rows: list[dict[str, Any]], closest: float, data: str) -> Figure:
    from traj_ood.drawing.charts import Curve, Panel, curves

    k = [row["bottleneck"] for row in rows]

    def column(name: str) -> list[float | None]:
        return [row[name] for row in rows]

    memory_curves = [
        Curve("attractors (± std)", k, column("memorization"), column("memorization_std")),
        Curve("distinct attractors", k, column("memorization_distinct")),
        Curve("unseen test images", k, [closest] * len(k)),
    ]
    panels = [
        Panel("Memorisation (Fig. 2 left)", "bottleneck k", "cosine to closest training image", memory_curves, "2"),
        Panel("Generalisation (Fig. 2 centre)", "bottleneck k", "squared error per pixel",
              [Curve("test", k, column("test_error")), Curve("training", k, column("train_error"))], "2"),
        Panel("Rank of decoded attractors (Fig. 13)", "bottleneck k", "directions for 90 % of variance",
              [Curve("as they are", k, column("rank90")), Curve("scaled to length 1", k, column("rank90_unit"))], "2"),
        Panel("Do trajectories end?", "bottleneck k", "share of starts",
              [Curve("converged", k, column("converged")),
               Curve("distinct end points", k, [None if r["distinct"] is None else r["distinct"] / r["starts"]
                                                for r in rows])], "2", limits=(-0.03, 1.03)),
    ]  # fmt: skip
    return curves(panels, f"Memorisation over the bottleneck, {data}")
