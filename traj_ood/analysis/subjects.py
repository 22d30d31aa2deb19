"""What a question is asked about: a model, loaded by name or trained for it, with training and test images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from traj_ood.analysis.images import IMAGE_SETS, ImageData, load_images, sample
from traj_ood.analysis.models import paper_recipe, train_conv
from traj_ood.analysis.workspace import Workspace
from traj_ood.autoencoders import Autoencoder, load_autoencoder
from traj_ood.data import ImageSource, list_benchmarks, load_benchmark, read_folder
from traj_ood.errors import TrajOODError

TRAINED = "conv"
"""The model name that stands for an autoencoder of Table 4, trained here."""


@dataclass(frozen=True)
class Training:
    """How an autoencoder of Table 4 is trained where the model is :data:`TRAINED`.

    Attributes:
        images: of the training set, drawn by the seed; 0 takes all. epochs, bottleneck, width: k and d of Table 4.
        at_least, meanings: of the options of questions that ask for one, see :class:`traj_ood.analysis.base.Question`.
    """

    at_least: ClassVar[Mapping[str, int]] = {"train_images": 0, "epochs": 1, "bottleneck": 1, "width": 1}
    meanings: ClassVar[Mapping[str, Mapping[Any, str]]] = {"train_images": {0: "all"}}

    images: int
    epochs: int
    bottleneck: int
    width: int


@dataclass(frozen=True)
class Subject:
    """A model with in-distribution images: ``train``, which its attractors come from, and ``test``.

    Of a folder of images both are the same: a question that needs images the attractors do not come from refuses it.
    """

    model: Autoencoder
    train: ImageSource
    test: ImageSource


def subject(work: Workspace, model: str, data: str, seed: int, training: Training) -> Subject:
    """Load, or train, what a question is about.

    Args:
        work: see :class:`Workspace`.
        model: as for :func:`traj_ood.load_autoencoder`, or ``conv``.
        data: an image set (:data:`traj_ood.analysis.images.IMAGE_SETS`, all classes), a benchmark's name or YAML file
            (its ID splits), or a folder of images, as it is or below the root of the data.
        seed: of the training and of the training sample.
        training: how, for ``conv``.
    Raises:
        TrajOODError: unknown model or data, data that cannot be had, ``conv`` on a benchmark (whose images have no
            common size).
    """
    images = load_images(data, work.data_root) if data in IMAGE_SETS else None
    if model == TRAINED:
        if images is None:
            raise TrajOODError(
                f"model conv: expected data of {', '.join(IMAGE_SETS)} to train on, got {data!r}: train it with "
                "traj-ood train and give its folder as the model"
            )
        return _trained(work, images, seed, training)
    loaded = load_autoencoder(model).to(work.device)
    if images is not None:
        return Subject(loaded, images.train, images.test)
    folder = _folder(data, work.data_root)
    if folder is not None:
        every = read_folder(folder, prefix=folder.name)
        return Subject(loaded, every, every)
    benchmark = load_benchmark(data, work.data_root)
    return Subject(loaded, benchmark.train.images, benchmark.test.images)


def _folder(data: str, root: Path | None) -> Path | None:
    """The folder that ``data`` names; a benchmark's name is never one."""
    if data in [info.name for info in list_benchmarks()]:
        return None
    places = (Path(data).expanduser(), *([root / data] if root is not None else []))
    return next((place for place in places if place.is_dir()), None)


def _trained(work: Workspace, images: ImageData, seed: int, training: Training) -> Subject:
    train = sample(images.train, training.images, seed, "train")
    recipe = paper_recipe(training.epochs)
    name = f"conv-{images.name}-k{training.bottleneck}"
    trained = train_conv(
        work, name, train, images.shape, recipe, width=training.width, bottleneck=training.bottleneck, seed=seed
    )
    return Subject(trained.final, train, images.test)
