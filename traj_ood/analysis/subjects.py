"""The subject of a question: a model, loaded by name or trained first, with its training and test images."""

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
"""The model name of an autoencoder of Table 4 that is trained first."""


@dataclass(frozen=True)
class Training:
    """Settings of the training of an autoencoder of Table 4, if the model is :data:`TRAINED`.

    Attributes:
        images: number of training images, drawn by the seed; 0 is all.
        epochs: number of epochs.
        bottleneck: k of Table 4.
        width: d of Table 4.
        at_least: minima of these options in questions that have them, see :class:`traj_ood.analysis.base.Question`.
        meanings: of their special values, likewise.
    """

    at_least: ClassVar[Mapping[str, int]] = {"train_images": 0, "epochs": 1, "bottleneck": 1, "width": 1}
    meanings: ClassVar[Mapping[str, Mapping[Any, str]]] = {"train_images": {0: "all"}}

    images: int
    epochs: int
    bottleneck: int
    width: int


@dataclass(frozen=True)
class Subject:
    """A model with in-distribution images: ``train``, for its attractors, and ``test``.

    For a folder of images both are the same; questions that need separate test images refuse it.
    """

    model: Autoencoder
    train: ImageSource
    test: ImageSource


def subject(work: Workspace, model: str, data: str, seed: int, training: Training) -> Subject:
    """Load or train the model of a question, and load its images.

    Args:
        work: see :class:`Workspace`.
        model: as for :func:`traj_ood.load_autoencoder`, or ``conv``.
        data: an image set (:data:`traj_ood.analysis.images.IMAGE_SETS`, all classes), the name or YAML file of a
            benchmark (its ID splits), or a folder of images (a path, or a folder in the root of the data).
        seed: seed of the training and of the training sample.
        training: settings of the training, for ``conv``.
    Raises:
        TrajOODError: unknown model or data, missing data, or ``conv`` on a benchmark, whose images have no common size.
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
    """The folder that ``data`` names, unless it is the name of a benchmark."""
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
