"""Trains an autoencoder on a benchmark's ID training split, with checkpoints, a log and a model card."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood.autoencoders import Autoencoder, ConvAutoencoder, ConvNetwork, ViTMAE
from traj_ood.autoencoders.vit_mae import assert_position_embeddings, build_model, geometry_keys
from traj_ood.backbones import Backbone
from traj_ood.data import Benchmark, Split, load_benchmark, preflight
from traj_ood.data.batches import read_rows
from traj_ood.data.contents import distrust
from traj_ood.data.decoding import AS_STORED, Reading
from traj_ood.data.records import DEFAULT_OPENING, Opening
from traj_ood.dynamics.device import training_settings
from traj_ood.errors import TrajOODError, foreign_errors, unknown_name
from traj_ood.scorers.scorer_set import ScorerSet
from traj_ood.training.card import autoencoder_card
from traj_ood.training.classifier import check_classifier, train_classifier
from traj_ood.training.config import Recipe, TrainConfig
from traj_ood.training.images import ImageLoss, ImageTrainer, TrainingImages
from traj_ood.training.loop import Trainer, check_folder, seeded

_VALIDATION_IMAGES = 2000


@training_settings()
def train_model(
    config: TrainConfig,
    out: str | Path,
    *,
    data_root: str | Path | None = None,
    follow_links: bool = False,
    reading: Reading = AS_STORED,
    opening: Opening = DEFAULT_OPENING,
    device: torch.device | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Autoencoder | Backbone:
    """Train an autoencoder, or a classifier (see :func:`traj_ood.training.classifier.train_classifier`).

    Between epochs, at most every ten seconds, a checkpoint is written. The same call resumes from it and ends with the
    same weights as an uninterrupted run, because every epoch has its own seed.

    Args:
        config: model, data and recipe.
        out: folder, new, empty or of an unfinished training, for the model, its log, ``training.json`` (config, log,
            versions) and README.md, the model card.
        data_root: folder of the benchmark's data, see :func:`traj_ood.data.load_benchmark`.
        follow_links: whether to follow symbolic links in image folders.
        reading: how image files are read.
        opening: how the sources of records in a benchmark's YAML file are opened.
        device: where to train. Default: the CPU.
        fresh: ignore a checkpoint, replace a finished training, and hash the images again.
        quiet: print one JSON line per epoch instead of a progress bar.
    Raises:
        TrajOODError: bad data or settings, an unwritable folder, one with files of other origin or a finished training,
            or a checkpoint of other settings.
    """
    if config.family == "classifier":
        check_classifier(config)
    out = Path(out)
    check_folder(out, fresh)
    if fresh:
        distrust()
    benchmark = load_benchmark(  # only its ID splits are read
        config.benchmark,
        data_root,
        follow_links=follow_links,
        reading=reading,
        allow_missing=True,
        opening=opening,
    )
    preflight(benchmark)
    train = train_classifier if config.family == "classifier" else _train_autoencoder
    progress = {"quiet": quiet, "on_round": _print_line if quiet else None}
    return train(config, benchmark, out, device or torch.device("cpu"), fresh, **progress)


def _print_line(trainer: Trainer) -> None:
    """Print the last epoch's log line as JSON, for log files."""
    print(json.dumps(trainer.log[-1]), file=sys.stderr, flush=True)


def _train_autoencoder(
    config: TrainConfig, benchmark: Benchmark, out: Path, device: torch.device, fresh: bool, **progress: Any
) -> Autoencoder:
    images = TrainingImages(benchmark.train.images, (config.channels, config.image_size, config.image_size))
    with seeded(config.seed):
        model: Any = build_autoencoder(config, *images.statistics()).to(device)
    loss, changed = reconstruction_loss(model, config.recipe), model.trainable_parameters().values()
    trainer = ImageTrainer(config, model.module, images, loss, out, parameters=changed, **progress)
    trainer.run(fresh)
    model.save_pretrained(out)
    record = {
        "config": config.plain(),
        "parameters": model.parameter_count(),
        "fingerprint": model.fingerprint(),
        "data": {benchmark.train.name: benchmark.train.digests()},
        "health": _health(model, benchmark, config),
        "validation_loss": _validation_loss(model, benchmark.val),
        **trainer.record(),
    }
    trainer.write_record(record, autoencoder_card(config.name, record))
    return model


def build_autoencoder(config: TrainConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> Autoencoder:
    """Build an untrained autoencoder of the configured family and geometry, with the ``mean`` and ``std`` per channel
    of the pixels in [0, 1].

    Raises:
        TrajOODError: the family is ``classifier``, an unknown key, or impossible geometry.
    """
    if config.family == "classifier":
        raise TrajOODError(
            f"{config.name}: expected an autoencoder family, got 'classifier': train it with train_model"
        )
    known = ("width", "bottleneck") if config.family == "conv" else geometry_keys()
    for key in config.model:
        if key not in known:
            raise unknown_name(f"{config.name}: model key", str(key), known)
    with foreign_errors(f"{config.name}: impossible geometry"):
        if config.family == "conv":
            network = ConvNetwork(config.channels, config.image_size, **config.model)
            return ConvAutoencoder(network, name=config.name, mean=mean, std=std)
        vit = build_model({**config.model, "image_size": config.image_size, "num_channels": config.channels})
    assert_position_embeddings(vit, config.name)
    return ViTMAE(vit, name=config.name, mean=mean, std=std)


def reconstruction_loss(model: Autoencoder, recipe: Recipe) -> ImageLoss:
    """The loss function of an autoencoder: mean squared error of the reconstruction from a noisy, masked input, by the
    recipe's input noise, mask ratios, and pixels that count."""

    def loss(images: Tensor, rows: Tensor, draws: torch.Generator) -> Tensor:
        ratio = recipe.mask_ratios[int(torch.randint(len(recipe.mask_ratios), (), generator=draws))]
        output, hidden = model.reconstruct_corrupted(images, recipe.input_noise, ratio, draws)
        error = (output - images).square()
        if recipe.loss == "masked" and hidden is not None:
            return (error * hidden).sum() / hidden.sum()
        return error.mean()

    return loss


def _health(model: Autoencoder, benchmark: Benchmark, config: TrainConfig) -> dict[str, Any]:
    """Health of the trained model's attractors, from a sample of training images at the paper's tolerance."""
    count = min(config.health_images, len(benchmark.train.images))
    if count < 2:
        return {}
    sample = benchmark.subsample(train=count, per_set=1, seed=config.seed).train.images
    images = read_rows(model, sample, range(count)).images
    dictionary, _ = ScorerSet(model, ["trajectory"]).explore(model.examine(images), tuple(sample.ids))
    return dictionary.health().as_dict() if dictionary is not None else {}


def _validation_loss(model: Autoencoder, val: Split | None) -> float | None:
    """Mean squared error of the clean, unmasked reconstruction on held-out ID images."""
    if val is None:
        return None
    images = read_rows(model, val.images, range(min(len(val.images), _VALIDATION_IMAGES))).images
    return float((model.decode(model.encode(images)).cpu() - images).square().mean())
