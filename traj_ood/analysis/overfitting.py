"""Memorisation by overfitting: attractors over the number of training images, at a fixed bottleneck."""

from __future__ import annotations

import math
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
class Overfitting(TrainingQuestion):
    """How close decoded attractors come to training images, over the number of training images.

    Attributes:
        bottleneck: k. Default 128, the paper's.
        sizes: numbers of training images, ascending; a larger set contains the smaller ones.
        steps: gradient steps for every size; 0 trains each size for ``epochs``, as the paper does. Default 1,600,
            because with few epochs a small set would be trained for only a few steps.
    """

    name: ClassVar[str] = "overfitting"
    figure: ClassVar[str] = "Fig. 14, App. B.6"
    summary: ClassVar[str] = "how close decoded attractors come to training images, over the number of these"
    choices: ClassVar[tuple[str, ...]] = (
        *MEMORY_CHOICES,
        "The sizes are not stated.",
        "Among fewer images the closest is farther away, memorised or not: each row holds the coefficient of unseen "
        "images in the same training set beside that of the attractors (reference).",
    )
    unstated: ClassVar[tuple[str, ...]] = ("batch", "width", "starts", "sizes")
    at_least: ClassVar = {**TrainingQuestion.at_least, "bottleneck": 1, "steps": 0}
    meanings: ClassVar = {**TrainingQuestion.meanings, "steps": {0: "set by epochs"}}

    bottleneck: int = 128
    sizes: tuple[int, ...] = (4, 16, 64, 256, 1024, 4096)
    steps: int = 1600

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = list(self.sizes) == sorted(set(self.sizes))
        self.expect(bool(self.sizes) and rising and self.sizes[0] >= 2, "sizes", "ascending, at least 2")

    @classmethod
    def paper(cls) -> Overfitting:
        return cls(**PAPER, steps=0)

    def differences(self) -> tuple[str, ...]:
        found = super().differences()
        return tuple(d for d in found if not (self.steps and d.startswith("epochs: ")))  # the steps decide

    def answer(self, work: Workspace) -> Answer:
        rows: list[dict[str, Any]] = []
        pictures: dict[str, Mapping[str, Tensor]] = {}
        for size in work.track(self.sizes, "overfitting", "model"):
            data = self.load(work, size)
            epochs = math.ceil(self.steps / max(1, size // self.batch)) if self.steps else self.epochs
            trained = self.train(work, data, self.bottleneck, epochs)
            unit = self.memory(work, trained.final, data)
            row = {"size": size, "epochs": epochs, "train_loss": trained.losses[-1]}
            rows.append({**row, "reference": reference(data.pixels), **unit.notes})
            pictures[f"{size:,} images"] = unit.tensors
        figures = {"rows": rows, "trends": {"memorization": correlation(self.sizes, [r["memorization"] for r in rows])}}
        return Answer(figures, _sentence(rows), gallery(pictures))

    def drawn(self, figures: Mapping[str, Any]) -> Mapping[str, Callable[[], Figure]]:
        return {"overfitting.png": partial(_curves, figures["rows"], self)}


def _sentence(rows: list[dict[str, Any]]) -> str:
    known = [row for row in rows if row["memorization"] is not None]
    if not known:
        return "No trajectory stayed finite at any size: these models have no attractors to compare."
    first, last = known[0], known[-1]
    ends = ", ".join(f"{row['converged']:.0%}" for row in rows)
    return (
        f"From {first['size']:,} to {last['size']:,} training images the memorisation coefficient goes from "
        f"{change(first, last, 'memorization', '.3f')}, while unseen images go from "
        f"{first['reference']:.3f} to {last['reference']:.3f}; {first['own']:.0%} and {last['own']:.0%} of attractors "
        f"are closest to the image they started from; trajectories converge for {ends} of the starts."
    )


def _curves(rows: list[dict[str, Any]], asked: Overfitting) -> Figure:
    from traj_ood.drawing.charts import Panel, curves

    line, axis = lines_over([row["size"] for row in rows], rows), "training images"
    panels = [
        Panel("Memorisation (Fig. 14)", axis, "cosine to closest training image",
              [line("attractors (± std)", "memorization", "memorization_std"), line("unseen test images", "reference")],
              "2"),
        Panel("Generalisation", axis, "squared error per pixel",
              [line("test", "test_error"), line("training", "train_error")], "2"),
        Panel("Do trajectories end, and where?", axis, "share of starts",
              [line("converged", "converged"), line("closest to their start", "own")], "2", limits=(-0.03, 1.03)),
    ]  # fmt: skip
    return curves(panels, f"Memorisation over training-set size, {asked.data}, k = {asked.bottleneck}")
