"""ModelQuestion, the base class of questions about one model, which is loaded by name or trained first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from traj_ood.analysis.base import Question
from traj_ood.analysis.images import IMAGE_SETS, ImageData, load_images, sample, stack
from traj_ood.analysis.models import paper_recipe, train_conv
from traj_ood.analysis.sources import folder_of
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.autoencoders import Autoencoder, load_autoencoder
from traj_ood.data import ImageSource, list_benchmarks, load_benchmark, read_folder
from traj_ood.data.batches import parts_of
from traj_ood.errors import TrajOODError

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
        is_benchmark = data in [info.name for info in list_benchmarks()]
        folder = None if is_benchmark else folder_of(data, work.data_root)
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
    ) -> list[dict[str, Tensor]]:
        """Apply ``measure`` to the latents of all images, in units of work ``name``, on whose size no trajectory
        depends; ``key`` holds the settings that decide the result."""
        key = {"model": model.fingerprint(), "images": images.digest(), **key}

        def compute(rows: range) -> Unit:
            return Unit(measure(model.encode(stack(model, images.select(list(rows))))))

        return work.pieces(name, key, parts_of(len(images), max(_UNIT_IMAGES, model.chunk)), compute, title=name)

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
