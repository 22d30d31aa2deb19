"""Trains a timm classifier on a benchmark's labelled ID training split, as a backbone for offline examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from traj_ood.backbones import Backbone, load_backbone
from traj_ood.backbones.timm_models import new_network, save_folder
from traj_ood.data import Benchmark, Split
from traj_ood.data.batches import ranges_of, read_rows
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.scorers.labels import class_order
from traj_ood.training.card import classifier_card
from traj_ood.training.config import Recipe, TrainConfig
from traj_ood.training.images import ImageLoss, ImageTrainer, TrainingImages
from traj_ood.training.loop import seeded

_READ_IMAGES = 512


def train_classifier(
    config: TrainConfig, benchmark: Benchmark, out: Path, device: torch.device, fresh: bool, **progress: Any
) -> Backbone:
    """Train a classifier and write it in timm's local-directory format, with ``training.json`` and a card, README.md.

    Called by :func:`traj_ood.training.autoencoder.train_model`, which describes checkpoints and resuming; ``progress``
    holds ``quiet`` and ``on_round`` of :class:`traj_ood.training.loop.Trainer`. Images are resized directly to
    ``image_size`` (bilinear), in training and in the transform that the folder declares.

    Returns:
        The trained backbone, loaded back from ``out``.
    Raises:
        TrajOODError: bad data or settings, a split without labels, an unwritable folder, or a checkpoint of other
            settings.
    """
    classes = class_names(benchmark)
    held_out = [split for split in (benchmark.val, benchmark.test) if split is not None]
    for split in held_out:  # refuse unknown labels before hours of training
        _targets(split, classes)
    shape = (config.channels, config.image_size, config.image_size)
    arguments = {k: v for k, v in config.model.items() if k != "architecture"}
    arguments |= {"num_classes": len(classes), "in_chans": config.channels}
    with seeded(config.seed):
        network = new_network(config.model["architecture"], **arguments).to(device)
    images = TrainingImages(benchmark.train.images, shape)
    mean, std = images.statistics()
    loss = cross_entropy(network, _targets(benchmark.train, classes), config.recipe)
    trainer = ImageTrainer(config, network, images, loss, out, **progress)
    trainer.run(fresh)
    data = {"input_size": list(shape), "mean": list(mean), "std": list(std), "interpolation": "bilinear"}
    data |= {"crop_pct": 1.0, "crop_mode": "squash"}
    save_folder(network, out, config.model["architecture"], arguments, data)
    backbone = load_backbone(f"timm:{out}", name=f"timm:{config.name}").to(device)
    record = {
        "config": config.plain(),
        "classes": list(classes),
        "parameters": backbone.parameter_count(),
        "feature_dim": backbone.feature_dim,
        "input": backbone.options(),
        "fingerprint": backbone.fingerprint(),
        "data": {benchmark.train.name: benchmark.train.digests()},
        "accuracy": {split.role: accuracy(backbone, split, classes) for split in held_out if split.images.labels},
        **trainer.record(),
    }
    trainer.write_record(record, classifier_card(config.name, record))
    return backbone


def class_names(benchmark: Benchmark) -> tuple[str, ...]:
    """The names of the classes: the distinct labels of the ID training split, by :func:`class_order`.

    Raises:
        TrajOODError: no labels, or fewer than 2 classes.
    """
    names = class_order(benchmark.train.images.labels)
    if len(names) < 2:
        found = "no labels" if not names else f"only class {names[0]!r}"
        raise TrajOODError(
            f"benchmark {benchmark.name!r}: expected labelled training images of at least 2 classes for a classifier, "
            f"got {found}: give image lists with labels"
        )
    return tuple(names)


def accuracy(backbone: Backbone, split: Split, classes: Sequence[str]) -> dict[str, float]:
    """Top-1 ``accuracy`` on a labelled split, and the ``count`` of its images.

    Raises:
        TrajOODError: a label that is not among the classes, or an image that cannot be read.
    """
    targets, right = _targets(split, classes), 0
    for rows in ranges_of(len(targets), _READ_IMAGES):
        logits = backbone.extract(read_rows(backbone, split.images, rows).images).logits
        assert logits is not None
        right += int((logits.argmax(dim=1).cpu() == targets[rows.start : rows.stop]).sum())
    return {"accuracy": right / len(targets), "count": len(targets)}


def cross_entropy(network: nn.Module, targets: Tensor, recipe: Recipe) -> ImageLoss:
    """The loss function of a classifier: cross-entropy with the ``targets`` (N,) of all training images, and the
    recipe's input noise."""

    def loss(images: Tensor, rows: Tensor, draws: torch.Generator) -> Tensor:
        if recipe.input_noise:
            images = images + recipe.input_noise * torch.randn(images.shape, generator=draws).to(images.device)
        return functional.cross_entropy(network(images), targets[rows].to(images.device))

    return loss


def check_classifier(config: TrainConfig) -> None:
    """Refuse settings that do not apply to a classifier, instead of ignoring them, and a missing architecture."""
    if not isinstance(config.model.get("architecture"), str):
        raise TrajOODError(
            f"{config.name}: expected architecture in a classifier's model, a timm name such as resnet18, got "
            f"{config.model.get('architecture')!r}"
        )
    reasons = {
        "num_classes": "follows from the training labels",
        "in_chans": "follows from channels",
        "pretrained": "does not apply to training from scratch",
    }
    for key, reason in reasons.items():
        if key in config.model:
            raise TrajOODError(f"{config.name}: model key {key!r} {reason}: leave it out")
    if config.recipe.loss != "all" or any(config.recipe.mask_ratios):
        raise TrajOODError(f"{config.name}: a classifier has no masking: leave out mask_ratios and loss")


def _targets(split: Split, classes: Sequence[str]) -> Tensor:
    """Class indices (N,) int64 of a split's labels."""
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = next((label for label in split.images.labels if label not in numbers), None)
    if unknown is not None:
        raise unknown_name(f"class in split {split.name!r}", unknown, classes)
    return torch.tensor([numbers[label] for label in split.images.labels])
