"""Train a model on a benchmark's ID training split: resumable, logged, and described by a model card."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood.autoencoders import Autoencoder, ConvAutoencoder, ConvNetwork, ViTMAE
from traj_ood.autoencoders.vit_mae import assert_position_embeddings, build_model, geometry_keys
from traj_ood.backbones import Backbone
from traj_ood.data import Benchmark, Split, load_benchmark, preflight
from traj_ood.data.contents import distrust
from traj_ood.data.decoding import AS_STORED, Reading
from traj_ood.dynamics.device import training_settings
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.scorers.scorer_set import ScorerSet
from traj_ood.training.card import model_card
from traj_ood.training.classifier import train_classifier
from traj_ood.training.loop import CONFIGS, Recipe, Run, TrainConfig, TrainingImages, plain
from traj_ood.training.loop import learning_rate as _learning_rate

__all__ = ["CONFIGS", "Recipe", "TrainConfig", "_learning_rate", "build_autoencoder", "train_model"]


@training_settings()
def train_model(
    config: TrainConfig,
    out: Path,
    *,
    data_root: Path | None = None,
    follow_links: bool = False,
    reading: Reading = AS_STORED,
    device: torch.device | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Autoencoder | Backbone:
    """Train an autoencoder, or a classifier (see :func:`traj_ood.training.classifier.train_classifier`).

    ``out`` gets the model, its log, ``training.json`` (config, log, versions) and README.md, its card.

    After each epoch a checkpoint is written; the same call continues from it and ends with the same weights as an
    uninterrupted run, because every epoch draws from its own seed.

    Raises:
        TrajOODError: bad data or settings, an unwritable folder, or a checkpoint of other settings.
    """
    if config.family == "classifier":
        return train_classifier(
            config,
            out,
            data_root=data_root,
            follow_links=follow_links,
            reading=reading,
            device=device,
            fresh=fresh,
            quiet=quiet,
        )
    if fresh:
        distrust()
    benchmark = load_benchmark(config.benchmark, data_root, follow_links=follow_links, reading=reading)
    preflight(benchmark)
    began = time.perf_counter()
    images = TrainingImages(benchmark.train.images, (config.channels, config.image_size, config.image_size))
    torch.manual_seed(config.seed)
    model = build_autoencoder(config, *images.statistics())
    model.to(device or torch.device("cpu"))
    run = _Run(config, model, images, out, quiet)
    run.finish_epochs(fresh)
    _finish(config, run, benchmark, time.perf_counter() - began)
    return model


def build_autoencoder(config: TrainConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> Autoencoder:
    """A new, untrained autoencoder of the configured family and geometry.

    Raises:
        TrajOODError: impossible geometry.
    """
    if config.family == "classifier":
        raise TrajOODError(f"{config.name}: a classifier is no autoencoder: train it with train_model")
    known = ("width", "bottleneck") if config.family == "conv" else geometry_keys()
    for key in config.model:
        if key not in known:
            raise unknown_name(f"{config.name}: model key", str(key), known)
    try:
        if config.family == "conv":
            network = ConvNetwork(config.channels, config.image_size, **config.model)
            return ConvAutoencoder(network, name=config.name, mean=mean, std=std)
        vit = build_model({**config.model, "image_size": config.image_size, "num_channels": config.channels})
    except TrajOODError:
        raise
    except Exception as error:  # transformers has error classes of its own, and arithmetic does the rest
        raise TrajOODError(f"{config.name}: impossible geometry ({' '.join(str(error).split())})") from error
    assert_position_embeddings(vit, config.name)
    return ViTMAE(vit, name=config.name, mean=mean, std=std)


class _Run(Run):
    """The loss of an autoencoder: its reconstruction of corrupted images."""

    def __init__(self, config: TrainConfig, model: Autoencoder, images: TrainingImages, out: Path, quiet: bool) -> None:
        self.model = model
        super().__init__(config, model.module, model.trainable_parameters(), images, out, quiet)

    def loss(self, rows: Tensor, draws: torch.Generator) -> Tensor:
        recipe, batch = self.config.recipe, self.batch(rows, draws)
        ratio = recipe.mask_ratios[int(torch.randint(len(recipe.mask_ratios), (), generator=draws))]
        output, hidden = self.model.reconstruct_corrupted(batch, recipe.input_noise, ratio, draws)
        error = (output - batch).square()
        if recipe.loss == "masked" and hidden is not None:
            return (error * hidden).sum() / hidden.sum()
        return error.mean()


def _finish(config: TrainConfig, run: _Run, benchmark: Benchmark, seconds: float) -> None:
    """Write the model, its training record and its card, then drop the checkpoint."""
    model: Any = run.model
    model.save_pretrained(run.out)
    health = _health(model, benchmark, config)
    record = {
        "config": plain(config),
        "log": run.log,
        "parameters": model.parameter_count(),
        "fingerprint": model.fingerprint(),
        "data": {benchmark.train.name: benchmark.train.digests()},
        "health": health,
        "validation_loss": _validation_loss(model, benchmark.val),
        "commit": git_commit(),
        "versions": environment(),
        "seconds": round(seconds, 1),
    }
    write_atomic(run.out / "training.json", (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    write_atomic(run.out / "README.md", model_card(config.name, record).encode())
    run.checkpoint.unlink(missing_ok=True)


def _health(model: Autoencoder, benchmark: Benchmark, config: TrainConfig) -> dict[str, Any]:
    """Convergence figures of the trained f on a sample of training images, at the paper's tolerance."""
    count = min(config.health_images, len(benchmark.train.images))
    if count < 2:
        return {}
    sample = benchmark.subsample(train=count, per_set=1, seed=config.seed).train.images
    images = torch.stack([model.transform(sample.load(i)) for i in range(count)])
    dictionary, _ = ScorerSet(model, ["trajectory"]).explore(model.examine(images), tuple(sample.ids))
    return dictionary.health().as_dict() if dictionary is not None else {}


def _validation_loss(model: Autoencoder, val: Split | None) -> float | None:
    """Mean squared error of the clean, unmasked reconstruction on held-out ID images."""
    if val is None:
        return None
    count = min(len(val.images), 2000)
    images = torch.stack([model.transform(val.images.load(i)) for i in range(count)])
    return float((model.decode(model.encode(images)).cpu() - images).square().mean())
