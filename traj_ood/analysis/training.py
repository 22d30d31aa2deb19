"""Memorisation and generalisation during training: attractors of training, test and noise starts by epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from traj_ood.analysis.base import Answer, register
from traj_ood.analysis.experiment import MEMORY_CHOICES, PAPER, Sampled, TrainingQuestion, change, lines_over
from traj_ood.analysis.images import spread
from traj_ood.analysis.measures import chamfer_similarity, separation
from traj_ood.analysis.memory import gallery, memory, normalised, reference
from traj_ood.analysis.models import settle
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.attractors import AttractorDictionary, NearestAttractor
from traj_ood.autoencoders import ConvAutoencoder
from traj_ood.dynamics.trajectory import Status

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

_GROUPS = ("train", "test", "noise")


@register
@dataclass(frozen=True)
class Training(TrainingQuestion):
    """Memorisation, distinct attractors and their separation from noise, by epoch of the training.

    Attributes:
        starts: maximum number of training images, of test images and of samples of N(0, I).
        images: number of training images, drawn by the seed; 0 is all. Default 4,000, which takes half a minute per
            model on a slow core.
        bottleneck: k. Default 128, the paper's.
        at: epochs at which the model is measured, ascending; 0 is the initialisation. Default: powers of two, because
            most changes happen early. The last epoch is always measured, and later epochs are ignored.
    """

    name: ClassVar[str] = "training"
    figure: ClassVar[str] = "Figs 3b-d and 13 (right), §3.2.2"
    summary: ClassVar[str] = "attractors of training, test and noise starts, and their trajectories, epoch by epoch"
    choices: ClassVar[tuple[str, ...]] = (
        *MEMORY_CHOICES,
        "Chamfer symmetric similarity is named without a formula: mean cosine to the nearest attractor of the other "
        "set, both ways, averaged.",
        "FPR95: the threshold keeps 95 % of training trajectories; their own attractors stay in the dictionary, as the "
        "paper's formula has it. fpr95_test does the same for unseen images, which no dictionary favours.",
        "Epochs of measurement are not stated.",
    )
    unstated: ClassVar[tuple[str, ...]] = ("batch", "width", "at", "test")
    paper_data: ClassVar[tuple[str, ...]] = ("mnist",)
    at_least: ClassVar = {**TrainingQuestion.at_least, "images": 0, "bottleneck": 1}

    epochs: int = 32
    max_steps: int = 500
    images: int = 4000
    bottleneck: int = 128
    at: tuple[int, ...] = (0, 1, 2, 4, 8, 16)

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = list(self.at) == sorted(set(self.at))
        self.expect(rising and all(epoch >= 0 for epoch in self.at), "at", "ascending epochs from 0")

    @classmethod
    def paper(cls) -> Training:
        return cls(**PAPER, data="mnist", images=0, at=(0, 1, 2, 5, 10, 20, 50, 100, 200, 300, 400))

    def answer(self, work: Workspace) -> Answer:
        data = self.load(work, self.images)
        at = [epoch for epoch in self.at if epoch <= self.epochs]
        trained = self.train(work, data, self.bottleneck, at=at)
        rows: list[dict[str, Any]] = []
        pictures: dict[str, Mapping[str, Tensor]] = {}
        for epoch, model in work.track(trained.models.items(), "training: measuring", "epoch"):
            key = self.measure_key(model, data, seed=self.seed)
            unit = work.unit("epoch", key, partial(self.measure, model, data))
            loss = trained.losses[epoch - 1] if epoch else None
            rows.append({"epoch": epoch, "train_loss": loss, **unit.notes})
            pictures[f"epoch {epoch}"] = unit.tensors
        figures = {"rows": rows, "reference": reference(data.pixels)}
        return Answer(figures, _sentence(rows), gallery(pictures))

    def drawn(self, figures: Mapping[str, Any]) -> Mapping[str, Callable[[], Figure]]:
        return {"training.png": partial(_curves, figures["rows"], figures["reference"], self)}

    def measure(self, model: ConvAutoencoder, data: Sampled) -> Unit:
        """Measures of the model after one epoch: those of :func:`traj_ood.analysis.memory.memory` and of noise."""
        starts = self._starts(model, data)
        walk = partial(settle, model, tol=self.tol, max_steps=self.max_steps)
        known = walk(starts["train"])[0]
        found, shown = memory(model, data.pixels, known)
        found |= {"distinct_train": found["distinct"], "starts_test": len(starts["test"])}
        nothing = ("distinct_test", "distinct_noise", "chamfer", "fpr95", "auroc", "fpr95_test")
        if not _has_ends(known):
            return Unit(shown, found | dict.fromkeys(nothing))
        nearest = NearestAttractor(model, known.index(model), "tokens")
        ends, scores = {}, {}
        for group in _GROUPS:
            ends[group], walked = walk(starts[group], observers=[nearest])
            scores[group] = walked.mean_over_path(nearest.name)
            if group != "train":
                found[f"distinct_{group}"] = len(ends[group].distinct()) if _has_ends(ends[group]) else None
        ended = _has_ends(ends["noise"])
        found["chamfer"] = chamfer_similarity(known.usable(), ends["noise"].usable()) if ended else None
        return Unit(shown, found | separation_from_noise(scores))

    def _starts(self, model: ConvAutoencoder, data: Sampled) -> dict[str, Tensor]:
        """Starts (n, k): latents of training and test images, and samples of N(0, I), of equal number if data allow."""
        images = data.pixels
        unseen = list(spread(len(images.test), len(images.starts)))
        draws = torch.Generator().manual_seed(self.seed)
        return {
            "train": model.encode(normalised(model, images.training[images.starts])),
            "test": model.encode(normalised(model, images.test[unseen])),
            "noise": torch.randn(len(images.starts), self.bottleneck, generator=draws).to(model.device),
        }


def _has_ends(dictionary: AttractorDictionary) -> bool:
    """Whether a trajectory stayed finite."""
    return bool((dictionary.statuses != Status.NON_FINITE).any())


def separation_from_noise(scores: dict[str, Tensor]) -> dict[str, float | None]:
    """How well the trajectory score separates noise from training and test trajectories; None if not finite."""
    train, test = (separation(scores[group], scores["noise"]) for group in ("train", "test"))
    return {
        "fpr95": None if train is None else train.fpr95,
        "auroc": None if train is None else train.auroc,
        "fpr95_test": None if test is None else test.fpr95,
    }


def _sentence(rows: list[dict[str, Any]]) -> str:
    first, last = rows[0], rows[-1]

    def went(name: str, form: str) -> str:
        return change(first, last, name, form)

    return (
        f"From epoch {first['epoch']} to {last['epoch']} the memorisation coefficient goes from "
        f"{went('memorization', '.3f')}, the test error from {went('test_error', '.4f')}; distinct end points of "
        f"{last['starts']} training, {last['starts_test']} test and {last['starts']} noise starts go from "
        f"{went('distinct_train', 'd')}, {went('distinct_test', 'd')} and {went('distinct_noise', 'd')}; train and "
        f"noise end points go from a Chamfer similarity of {went('chamfer', '.3f')}, the FPR95 of noise against "
        f"training trajectories from {went('fpr95', '.0%')}; {last['converged']:.0%} of training trajectories converge "
        "at the end."
    )


def _curves(rows: list[dict[str, Any]], closest: float, asked: Training) -> Figure:
    from traj_ood.drawing.charts import Curve, Panel, curves

    # A logarithmic axis, since a linear one would hide the first epochs; epoch 0 is drawn at 1/2.
    x = [row["epoch"] or 0.5 for row in rows]
    line = lines_over(x, rows)

    def share(group: str) -> list[float | None]:
        count = "starts_test" if group == "test" else "starts"
        return [None if r[f"distinct_{group}"] is None else r[f"distinct_{group}"] / r[count] for r in rows]

    shares = [Curve(f"{group} starts", x, share(group)) for group in _GROUPS]
    axis = "epoch (0 drawn at 1/2)"
    panels = [
        Panel("Memorisation (Fig. 3b)", axis, "cosine to closest training image",
              [line("attractors (± std)", "memorization", "memorization_std"),
               Curve("unseen test images", x, [closest] * len(x))], "2"),
        Panel("Generalisation (Fig. 3b)", axis, "squared error per pixel",
              [line("test", "test_error"), line("training", "train_error")], "2"),
        Panel("Distinct attractors (Fig. 3c)", axis, "share of starts", shares, "2", limits=(0, None)),
        Panel("Train and noise attractors (Fig. 3d)", axis, "Chamfer similarity", [line("similarity", "chamfer")],
              "2"),
        Panel("Noise against known trajectories (Fig. 3d)", axis, "FPR95 (lower is better)",
              [line("training", "fpr95"), line("test", "fpr95_test")], "2", limits=(-0.03, 1.03)),
        Panel("Rank of decoded attractors (Fig. 13)", axis, "directions for 90 % of variance",
              [line("as they are", "rank90"), line("scaled to length 1", "rank90_unit")], "2"),
    ]  # fmt: skip
    return curves(panels, f"Across training, {asked.data}, k = {asked.bottleneck}")
