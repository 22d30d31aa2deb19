"""ModelQuestion, the base class of questions about one model, loaded by name or trained first; and images by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from traj_ood.analysis.base import Question
from traj_ood.analysis.images import IMAGE_SETS, ImageData, load_images, sample, stack
from traj_ood.analysis.models import paper_recipe, train_conv
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.autoencoders import Autoencoder, load_autoencoder
from traj_ood.autoencoders.identity import model_identity
from traj_ood.data import Benchmark, ImageSource, list_benchmarks, load_benchmark, read_folder
from traj_ood.data.batches import ranges_of
from traj_ood.data.benchmark import TEST_SEED, at_most
from traj_ood.errors import TrajOODError, unknown_name

TRAINED = "conv"
"""The model name of an autoencoder of Table 4 that is trained first."""
_UNIT_IMAGES = 64  # images per unit of work, or the model's chunk if larger


@dataclass(frozen=True)
class Subject:
    """A model with in-distribution images: ``train``, for its attractors, and ``test``.

    For a folder of images both are the same; questions that need separate test images refuse it.
    """

    model: Autoencoder
    train: ImageSource
    test: ImageSource


@dataclass(frozen=True)
class ModelQuestion(Question):
    """A question about one model.

    Attributes:
        model: as for :func:`traj_ood.load_autoencoder`; default the bundled model. ``conv`` is an autoencoder of Table
            4 that is trained first.
        train_images: training images of ``conv``; 0 is all.
        epochs: epochs of ``conv``.
        bottleneck: k of ``conv``.
        width: d of ``conv``.
    """

    at_least: ClassVar[Mapping[str, int]] = {"train_images": 0, "epochs": 1, "bottleneck": 1, "width": 1}
    meanings: ClassVar[Mapping[str, Mapping[Any, str]]] = {"train_images": {0: "all"}}

    model: str = "fashion-mae"
    train_images: int = 10_000
    epochs: int = 10
    bottleneck: int = 128
    width: int = 16

    def subject(self, work: Workspace, data: str) -> Subject:
        """Load or train the model, and load its images: ``data`` is an image set
        (:data:`traj_ood.analysis.images.IMAGE_SETS`, all classes), the name or YAML file of a benchmark (its ID
        splits), or a folder of images (a path, or a folder in the root of the data).

        Raises:
            TrajOODError: unknown model or data, missing data, or ``conv`` on a benchmark, whose images have no common
                size.
        """
        images = load_images(data, work.data_root) if data in IMAGE_SETS else None
        if self.model == TRAINED:
            if images is None:
                raise TrajOODError(
                    f"model conv: expected data of {', '.join(IMAGE_SETS)} to train on, got {data!r}: train it with "
                    "traj-ood train and give its folder as the model"
                )
            return self._trained(work, images)
        loaded = load_autoencoder(self.model).to(work.device)
        if images is not None:
            return Subject(loaded, images.train, images.test)
        folder = folder_of(data, work.data_root)
        if folder is not None:
            every = read_folder(folder, prefix=folder.name)
            return Subject(loaded, every, every)
        benchmark = load_benchmark(data, work.data_root)
        return Subject(loaded, benchmark.train.images, benchmark.test.images)

    def over_latents(
        self,
        work: Workspace,
        name: str,
        model: Autoencoder,
        images: ImageSource,
        key: Mapping[str, Any],
        measure: Callable[[Tensor], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Apply ``measure`` to the latents of all images, in units of work ``name``, on whose size no trajectory
        depends; ``key`` holds the settings that decide the result."""
        key = {"model": model_identity(model), "images": images.digest(), **key}

        def compute(rows: range) -> Unit:
            return Unit(measure(model.encode(stack(model.transform, images.select(list(rows))))))

        return work.pieces(name, key, ranges_of(len(images), max(_UNIT_IMAGES, model.chunk)), compute, title=name)

    def _trained(self, work: Workspace, images: ImageData) -> Subject:
        train = sample(images.train, self.train_images, self.seed, "train")
        trained = train_conv(
            work,
            f"conv-{images.name}-k{self.bottleneck}",
            train,
            images.shape,
            paper_recipe(self.epochs),
            width=self.width,
            bottleneck=self.bottleneck,
            seed=self.seed,
        )
        return Subject(trained.final, train, images.test)


@dataclass(frozen=True)
class NamedImages:
    """Images with their name in results."""

    name: str
    source: ImageSource


def named_images(names: Sequence[str], root: Path | None, most: int) -> list[NamedImages]:
    """Load sets of images by name, each sampled to at most ``most`` images, the same ones on every machine.

    Args:
        names: each a folder of images (a path, or a folder in ``root``); an image set of
            :data:`traj_ood.analysis.images.IMAGE_SETS`, which stands for its test images (``cifar10`` is the image set,
            not OpenOOD's benchmark); or the name or YAML file of a benchmark, which stands for its test split and all
            its OOD sets.
        root: folder of the data, as for :func:`traj_ood.load_benchmark`.
        most: maximum number of images per set, drawn by a fixed seed.
    Raises:
        TrajOODError: an unknown name, two sets with the same name, or data that are missing or malformed.
    """
    found = [images for name in names for images in _sources(name, root)[1]]
    counts = Counter(images.name for images in found)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise TrajOODError(
            f"data: expected sets of images with different names, got {twice!r} twice: leave one out or rename its "
            "folder"
        )
    return [NamedImages(i.name, at_most(i.source, most, TEST_SEED, i.name)) for i in found]


def training_images(name: str, root: Path | None, size: int, seed: int) -> ImageSource:
    """Draw ``size`` images by ``seed`` from a folder, or from the training images of an image set or a benchmark.

    Raises:
        TrajOODError: as :func:`named_images`, or fewer than ``size`` images.
    """
    return sample(_sources(name, root)[0], size, seed, name)


def _sources(name: str, root: Path | None) -> tuple[ImageSource, list[NamedImages]]:
    """The training images and the sets of test images that ``name`` stands for; a folder stands for both."""
    folder = folder_of(name, root)
    if folder is not None:
        every = read_folder(folder, prefix=folder.name)
        return every, [NamedImages(folder.name, every)]
    if name in IMAGE_SETS:
        data = load_images(name, root)
        return data.train, [NamedImages(name, data.test)]
    benchmark = _benchmark(name, root)
    own = NamedImages(f"{benchmark.name} test", benchmark.test.images)
    return benchmark.train.images, [own, *(NamedImages(split.name, split.images) for split in benchmark.ood)]


def folder_of(name: str, root: Path | None) -> Path | None:
    """The folder that ``name`` means, as a path or in ``root``; None if there is none. The name of an image set or a
    benchmark means no folder: such a one is given as ``./name``."""
    if name in IMAGE_SETS or name in _benchmarks():
        return None
    places = (Path(name).expanduser(), *([root / name] if root is not None else []))
    return next((folder for folder in places if folder.is_dir()), None)


def _benchmarks() -> list[str]:
    return [info.name for info in list_benchmarks()]


def _benchmark(name: str, root: Path | None) -> Benchmark:
    known = _benchmarks()
    if name in known or name.lower().endswith((".yaml", ".yml")):
        return load_benchmark(name, root)
    raise unknown_name("set of images", name, [*known, *IMAGE_SETS, "a folder of images", "a benchmark's .yaml file"])
