"""Training on images: an image cache and a trainer that runs epochs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from traj_ood.data import ImageSource
from traj_ood.data.images import check_unchanged
from traj_ood.data.preprocessing import Preprocessing
from traj_ood.training.config import TrainConfig
from traj_ood.training.loop import SEED_STRIDE, Trainer, shuffled

ImageLoss = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""A loss function: images (B, C, H, W), their indices (B,) int64, and a generator for all randomness → scalar."""
_STATISTICS_IMAGES = 10_000
_CACHE_BYTES = 2**30
_WORKERS = 4  # threads that read images


class ImageTrainer(Trainer):
    """A trainer that runs epochs over images; an incomplete last batch is dropped. Name, recipe and seed are those of
    ``config``, which is part of the run's identity; ``further`` are other arguments of :class:`Trainer`."""

    def __init__(
        self, config: TrainConfig, module: nn.Module, images: TrainingImages, loss: ImageLoss, out: Path, **further: Any
    ) -> None:
        self.images, self._loss = images, loss
        self._batch_size = min(config.recipe.batch_size, len(images))
        epoch = len(images) // self._batch_size
        labels = hashlib.sha256(json.dumps(list(images.labels)).encode()).hexdigest()
        super().__init__(
            config.name,
            module,
            config.recipe,
            steps=config.recipe.epochs * epoch,
            round_steps=epoch,
            seed=config.seed * SEED_STRIDE,
            out=out,
            identity={"config": config.plain(), "images": images.digest, "labels": labels},
            **further,
        )

    def losses(self, steps: int, draws: torch.Generator) -> Iterator[Tensor]:
        for rows in shuffled(torch.arange(len(self.images)), self._batch_size, steps, draws):
            batch = self.images.batch(rows).to(self.device)
            if self.recipe.flip:
                flipped = torch.rand(len(batch), generator=draws).to(batch.device) < 0.5
                batch = torch.where(flipped[:, None, None, None], batch.flip(-1), batch)
            yield self._loss(batch, rows, draws)

    def check(self) -> dict[str, float]:
        return {"epoch": len(self.log) + 1}

    def save(self) -> None:
        """As :meth:`Trainer.save`; also raises ``TrajOODError`` if images have changed during training."""
        self.images.check()
        super().save()


class TrainingImages:
    """Resized training images by index, kept in memory as uint8 if they fit into 1 GiB, else read when needed.

    Args:
        source: the images.
        shape: (C, H, W) after resizing.
    Attributes:
        digest: digest of the source's contents at construction.
        labels: labels of the source.
    """

    def __init__(self, source: ImageSource, shape: tuple[int, int, int]) -> None:
        self._source, self._shape = source, shape
        self._contents, self.digest, self.labels = source.contents(), source.digest(), tuple(source.labels)
        self._mean, self._std = (0.0,) * shape[0], (1.0,) * shape[0]
        self._cache: Tensor | None = None
        if len(source) * math.prod(shape) <= _CACHE_BYTES:
            self._cache = self._read(range(len(source)))
            self.check()

    def __len__(self) -> int:
        return len(self._source)

    def check(self) -> None:
        """Raise ``TrajOODError``, which names the first of them, if images have changed since construction."""
        check_unchanged(self._source, range(len(self)), self._contents)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel of the pixels in [0, 1], over evenly spaced images (all, or of 20,000
        and more between 10,000 and 15,000); :meth:`batch` then normalises by them."""
        stride = max(1, len(self) // _STATISTICS_IMAGES)
        pixels = self._pixels(torch.arange(0, len(self), stride)).float() / 255
        self._mean = tuple(round(float(m), 4) for m in pixels.mean(dim=(0, 2, 3)))
        self._std = tuple(round(max(float(s), 1e-3), 4) for s in pixels.std(dim=(0, 2, 3)))
        return self._mean, self._std

    def batch(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` (B,), (B, C, H, W) float32 in normalised units."""
        mean, std = torch.tensor(self._mean).view(-1, 1, 1), torch.tensor(self._std).view(-1, 1, 1)
        return (self._pixels(indices).float() / 255 - mean) / std

    def _pixels(self, indices: Tensor) -> Tensor:
        return self._cache[indices] if self._cache is not None else self._read(indices.tolist())

    def _read(self, indices: range | list[int]) -> Tensor:
        preprocessing = Preprocessing(self._shape)

        def read(index: int) -> Tensor:
            return preprocessing.pixels(self._source.load(index))

        with ThreadPoolExecutor(_WORKERS) as pool:
            return torch.stack(list(pool.map(read, indices)))
