"""Memorisation over the bottleneck: how close decoded attractors come to training images, for k = 2 … 512."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from traj_ood.analysis.base import Answer, register
from traj_ood.analysis.experiment import MEMORY_CHOICES, PAPER, TrainingQuestion, change, lines_over
from traj_ood.analysis.measures import correlation
from traj_ood.analysis.memory import gallery, reference
from traj_ood.analysis.workspace import Workspace

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure


@register
@dataclass(frozen=True)
class Memorization(TrainingQuestion):
    """How close decoded attractors come to training images, over the bottleneck k.

    Attributes:
        images: number of training images, drawn by the seed; 0 is all. Default 4,000, which takes half a minute per
            model on a slow core.
        bottlenecks: values of k, ascending. Default: powers of two from 2 to 512, the paper's range.
    """

    name: ClassVar[str] = "memorization"
    figure: ClassVar[str] = "Figs 2 and 13 (left), §3.2.1"
    summary: ClassVar[str] = "how close decoded attractors come to training images, over the bottleneck's width"
    choices: ClassVar[tuple[str, ...]] = (*MEMORY_CHOICES, "The range of k is stated, 2 to 512, but not its values.")
    unstated: ClassVar[tuple[str, ...]] = (*TrainingQuestion.unstated, "bottlenecks")
    at_least: ClassVar = {**TrainingQuestion.at_least, "images": 0}

    images: int = 4000
    bottlenecks: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256, 512)

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = list(self.bottlenecks) == sorted(set(self.bottlenecks))
        self.expect(bool(self.bottlenecks) and rising and self.bottlenecks[0] >= 1, "bottlenecks", "ascending, >= 1")

    @classmethod
    def paper(cls) -> Memorization:
        return cls(**PAPER, images=0)

    def answer(self, work: Workspace) -> Answer:
        data = self.load(work, self.images)
        rows: list[dict[str, Any]] = []
        pictures: dict[str, Mapping[str, Tensor]] = {}
        for k in work.track(self.bottlenecks, "memorization", "model"):
            trained = self.train(work, data, k)
            unit = self.memory(work, trained.final, data)
            rows.append({"bottleneck": k, "train_loss": trained.losses[-1], **unit.notes})
            pictures[f"k = {k}"] = unit.tensors
        closest = reference(data.pixels)
        figures = {"rows": rows, "reference": closest, "trends": _trends(rows)}
        return Answer(figures, _sentence(rows, closest), gallery(pictures))

    def drawn(self, figures: Mapping[str, Any]) -> Mapping[str, Callable[[], Figure]]:
        return {"memorization.png": partial(_curves, figures["rows"], figures["reference"], self.data)}


def _trends(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Spearman correlation of each figure with k; the paper's claims are −, − and +."""
    k = [row["bottleneck"] for row in rows]
    return {
        name: correlation(k, [row[name] for row in rows])
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

    k, axis = [row["bottleneck"] for row in rows], "bottleneck k"
    line = lines_over(k, rows)
    distinct = [None if row["distinct"] is None else row["distinct"] / row["starts"] for row in rows]
    panels = [
        Panel("Memorisation (Fig. 2 left)", axis, "cosine to closest training image",
              [line("attractors (± std)", "memorization", "memorization_std"),
               line("distinct attractors", "memorization_distinct"),
               Curve("unseen test images", k, [closest] * len(k))], "2"),
        Panel("Generalisation (Fig. 2 centre)", axis, "squared error per pixel",
              [line("test", "test_error"), line("training", "train_error")], "2"),
        Panel("Rank of decoded attractors (Fig. 13)", axis, "directions for 90 % of variance",
              [line("as they are", "rank90"), line("scaled to length 1", "rank90_unit")], "2"),
        Panel("Do trajectories end?", axis, "share of starts",
              [line("converged", "converged"), Curve("distinct end points", k, distinct)], "2", limits=(-0.03, 1.03)),
    ]  # fmt: skip
    return curves(panels, f"Memorisation over the bottleneck, {data}")
