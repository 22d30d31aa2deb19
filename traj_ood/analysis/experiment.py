"""TrainingQuestion, the base class of questions that train Table 4 autoencoders, with options for data and training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from traj_ood.analysis.base import Question
from traj_ood.analysis.images import IMAGE_SETS, load_images, sample, spread, stack
from traj_ood.analysis.memory import MeasuredImages, memory, settle_images
from traj_ood.analysis.models import (
    PAPER_DECAY,
    PAPER_EPOCHS,
    PAPER_RATE,
    PAPER_STEPS,
    PAPER_TOL,
    Trained,
    paper_recipe,
    train_conv,
)
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.autoencoders import ConvAutoencoder
from traj_ood.data import ImageSource
from traj_ood.data.preprocessing import Preprocessing
from traj_ood.errors import unknown_name

if TYPE_CHECKING:
    from traj_ood.drawing.charts import Curve

MEMORY_CHOICES = (
    "Memorisation coefficient: cosine to the CLOSEST training image, as the paper's sentence says; its formula prints "
    "min over x, which would be the farthest.",
    "Cosines are of pixels in [0, 1], not centred: the paper does not say.",
    "Table 4's width d, its activation (ReLU), the batch size and how many training images start trajectories are not "
    "stated.",
    "Weight decay is Adam's, on the weights of all layers and not on biases.",
    "'Linear step' schedule: the rate falls linearly to 0 over all steps.",
    "Rank: of decoded attractors centred at their mean, since 90 % is said of the variance.",
)

PAPER: dict[str, Any] = {
    "epochs": PAPER_EPOCHS,
    "batch": 128,
    "rate": PAPER_RATE,
    "width": 32,
    "starts": 5000,
    "test": 0,
    "max_steps": PAPER_STEPS,
}
"""The settings of App. D that are no defaults. For figures with CIFAR, MNIST and FashionMNIST, run each by ``--option
data=…``."""


@dataclass(frozen=True)
class Sampled:
    """The images of an experiment.

    Attributes:
        shape: (C, H, W).
        train: all images that the model is trained on.
        starts: indices of the training images whose trajectories are followed.
        test: held-out images.
    """

    shape: tuple[int, int, int]
    train: ImageSource
    starts: tuple[int, ...]
    test: ImageSource

    @cached_property
    def pixels(self) -> MeasuredImages:
        """The images as pixels in [0, 1]; read when first used."""
        training, test = (stack(Preprocessing(self.shape), images) for images in (self.train, self.test))
        return MeasuredImages(training, torch.tensor(self.starts), test)


@dataclass(frozen=True)
class TrainingQuestion(Question):
    """A question that trains Table 4 autoencoders.

    Attributes:
        data: ``fashion-mnist`` (default, because it needs no network), ``mnist`` or ``cifar10``.
        epochs: default 24, because the paper's 500 epochs of 60,000 images would take days.
        rate: learning rate of Adam, which falls linearly. Default: four times the paper's.
        decay: weight decay. Default: the paper's.
        width: d of Table 4. Default 16, at which f takes a third of the time of 32.
        starts: maximum number of training images whose trajectories give attractors.
        test: number of held-out images; 0 is all.
        tol: tolerance on the squared residual. Default: the paper's.
        max_steps: step limit. Default: a third of the paper's.
    """

    unstated: ClassVar[tuple[str, ...]] = ("batch", "width", "starts")
    paper_data: ClassVar[tuple[str, ...]] = ("cifar10", "mnist", "fashion-mnist")
    """The image sets of the paper's figure; :meth:`paper` uses one of them."""
    at_least: ClassVar = {"epochs": 1, "batch": 1, "width": 1, "starts": 1, "max_steps": 1, "test": 0, "decay": 0}
    above_0: ClassVar = ("rate", "tol")
    meanings: ClassVar[Mapping[str, Mapping[Any, str]]] = {"images": {0: "all"}, "test": {0: "all"}}

    data: str = "fashion-mnist"
    epochs: int = 24
    batch: int = 64
    rate: float = 2e-3
    decay: float = PAPER_DECAY
    width: int = 16
    starts: int = 200
    test: int = 1000
    tol: float = PAPER_TOL
    max_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data not in IMAGE_SETS:
            raise unknown_name(f"{self.name}: data", self.data, IMAGE_SETS)

    def differences(self) -> tuple[str, ...]:
        found = super().differences()
        return tuple(d for d in found if not (d.startswith("data: ") and self.data in self.paper_data))

    def load(self, work: Workspace, size: int) -> Sampled:
        """Load the images, with ``size`` training images (0: all) drawn by the seed."""
        data = load_images(self.data, work.data_root)
        train = sample(data.train, size, self.seed, f"{self.data} training images")
        test = sample(data.test, self.test, 0, f"{self.data} test images")
        return Sampled(data.shape, train, spread(len(train), self.starts), test)

    def memory(self, work: Workspace, model: ConvAutoencoder, data: Sampled) -> Unit:
        """The measures of :func:`traj_ood.analysis.memory.memory` as a unit of work."""

        def measure() -> Unit:
            starts = data.pixels.training[data.pixels.starts]
            found, shown = memory(model, data.pixels, settle_images(model, starts, self.tol, self.max_steps))
            return Unit(shown, found)

        return work.unit("memory", self.measure_key(model, data), measure)

    def train(
        self, work: Workspace, data: Sampled, bottleneck: int, epochs: int | None = None, at: Iterable[int] = ()
    ) -> Trained:
        """Train a model with these options; ``at`` as in :func:`traj_ood.analysis.models.train_conv`."""
        recipe = paper_recipe(epochs or self.epochs, self.batch, self.rate, self.decay)
        return train_conv(
            work,
            f"{self.name}-k{bottleneck}",
            data.train,
            data.shape,
            recipe,
            width=self.width,
            bottleneck=bottleneck,
            seed=self.seed,
            at=at,
        )

    def measure_key(self, model: ConvAutoencoder, data: Sampled, **further: Any) -> dict[str, Any]:
        """The key of measurements on a model: everything that decides their result."""
        images = {"train": data.train.digest(), "test": data.test.digest(), "starts": list(data.starts)}
        return {"model": model.fingerprint(), **images, **self.settings("tol", "max_steps"), **further}


def change(first: Mapping[str, Any], last: Mapping[str, Any], name: str, form: str) -> str:
    """``a to b`` for a sentence, from two rows; ``none`` where a value is None."""
    return " to ".join("none" if row[name] is None else format(row[name], form) for row in (first, last))


def lines_over(x: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> Callable[..., Curve]:
    """A function (label, column, column of the spread) that makes a curve of columns of ``rows`` over ``x``."""
    from traj_ood.drawing.charts import Curve

    def line(label: str, name: str, spread: str | None = None) -> Curve:
        return Curve(label, x, [row[name] for row in rows], None if spread is None else [row[spread] for row in rows])

    return line
