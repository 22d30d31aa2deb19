"""Training of small autoencoders for the questions, once per configuration, and their end points."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.attractors import AttractorDictionary
from traj_ood.autoencoders import Autoencoder, ConvAutoencoder, ConvNetwork
from traj_ood.data import ImageSource
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.observers import Observer
from traj_ood.dynamics.trajectory import Trajectory
from traj_ood.io.weights import below
from traj_ood.training.config import Recipe, TrainConfig
from traj_ood.training.images import ImageTrainer, TrainingImages
from traj_ood.training.loop import Trainer

Loss = Callable[[ConvNetwork, Tensor, torch.Generator], Tensor]
"""A loss function: network in training mode, images (B, C, H, W), generator of all randomness → scalar."""
Build = Callable[[int, int, int, int], ConvNetwork]
"""A constructor of networks: channels, size, width, bottleneck → network."""

PAPER_EPOCHS, PAPER_RATE, PAPER_DECAY = 500, 5e-4, 1e-4
PAPER_TOL, PAPER_STEPS = 1e-6, 3000
"""The settings of App. D for Figs 2, 3 and 14."""


def paper_recipe(
    epochs: int, batch_size: int = 128, learning_rate: float = PAPER_RATE, weight_decay: float = PAPER_DECAY
) -> Recipe:
    """The recipe of App. D: Adam, a linearly falling rate, weight decay 1e-4, no clipping, no warm-up."""
    return Recipe(
        epochs, batch_size, learning_rate, weight_decay, clip=1e9, optimizer="adam", schedule="linear", warmup=0.0
    )


def mse(network: ConvNetwork, images: Tensor, draws: torch.Generator) -> Tensor:
    """Mean squared error of D(E(x)), the loss of Eq. (1) without its regulariser."""
    return (network.decode(network.encode(images)) - images).square().mean()


@dataclass(frozen=True)
class Trained:
    """The result of a training run: epoch → autoencoder after that epoch (0 is the initialisation), always with the
    last, and the mean loss of each epoch."""

    models: Mapping[int, ConvAutoencoder]
    losses: tuple[float, ...]

    @property
    def final(self) -> ConvAutoencoder:
        return self.models[max(self.models)]


def train_conv(
    work: Workspace,
    name: str,
    images: ImageSource,
    shape: tuple[int, int, int],
    recipe: Recipe,
    *,
    width: int,
    bottleneck: int,
    seed: int,
    loss: Loss = mse,
    build: Build = ConvNetwork,
    variant: Mapping[str, Any] | None = None,
    at: Iterable[int] = (),
) -> Trained:
    """Train a Table 4 autoencoder as a unit of ``work``; an interrupted training resumes between epochs.

    Args:
        name: name of unit and model.
        images, shape: all of them are used, resized to (C, H, W), H = W.
        recipe: such as :func:`paper_recipe`.
        width, bottleneck: d and k of Table 4.
        loss, build: the loss to minimise, by default the mean squared error, and the constructor of the network.
        variant: plain data that identify ``loss`` and ``build``; part of the unit's key.
        at: further epochs whose weights are kept; 0 is the initialisation.
    Raises:
        TrajOODError: impossible sizes, a loss that is not finite, an unwritable folder.
    """
    epochs = sorted({*at, recipe.epochs})
    key = {
        "images": images.digest(),
        "shape": list(shape),
        "recipe": asdict(recipe),
        "width": width,
        "bottleneck": bottleneck,
        "seed": seed,
        "variant": dict(variant or {}),
        "at": epochs,
    }
    config = TrainConfig(name, "analysis", "conv", shape[1], shape[0], key, recipe, seed)

    def make() -> ConvNetwork:
        return build(shape[0], shape[1], width, bottleneck)

    unit = work.unit(name, key, lambda: _trained(work, config, TrainingImages(images, shape), make, loss, epochs))
    statistics = {key: tuple(unit.notes[key]) for key in ("mean", "std")}
    models = {}
    for epoch in epochs:
        network = make()
        network.load_state_dict(below(f"{epoch}/", unit.tensors))
        models[epoch] = ConvAutoencoder(network.to(work.device), name=name, **statistics)
    return Trained(models, tuple(unit.notes["losses"]))


def _trained(
    work: Workspace,
    config: TrainConfig,
    images: TrainingImages,
    make: Callable[[], ConvNetwork],
    loss: Loss,
    epochs: Sequence[int],
) -> Unit:
    """Train a network; the weights after each of ``epochs`` by ``<epoch>/<name>``, the losses, and the statistics of
    the pixels. ``config.model`` is the key of the unit."""
    mean, std = images.statistics()
    torch.manual_seed(config.seed)
    network = make().to(work.device)
    folder = work.scratch(config.name, config.model)

    def keep_chosen(trainer: Trainer) -> None:
        if len(trainer.log) in epochs:
            trainer.keep(str(len(trainer.log)))

    def loss_of(batch: Tensor, rows: Tensor, draws: torch.Generator) -> Tensor:
        return loss(network, batch, draws)

    trainer = ImageTrainer(config, network, images, loss_of, folder, on_round=keep_chosen, quiet=work.quiet)
    keep_chosen(trainer)
    trainer.run()
    tensors = {f"{epoch}/{k}": v for epoch, weights in trainer.kept.items() for k, v in weights.items()}
    shutil.rmtree(folder, ignore_errors=True)
    return Unit(tensors, {"losses": [line["loss"] for line in trainer.log], "mean": list(mean), "std": list(std)})


def settle(
    autoencoder: Autoencoder,
    start: Tensor,
    *,
    tol: float = PAPER_TOL,
    max_steps: int = PAPER_STEPS,
    observers: Iterable[Observer] = (),
) -> tuple[AttractorDictionary, Trajectory]:
    """Iterate f from ``start`` (N, *L), and return the end points as a dictionary, and the trajectories.

    Options are those of :func:`traj_ood.iterate`, with the paper's defaults for these models (App. D).
    """
    trajectory = iterate(
        autoencoder.self_map,
        start.to(autoencoder.device),
        tol=tol,
        max_steps=max_steps,
        observers=observers,
        chunk=autoencoder.chunk,
    )
    ids = tuple(map(str, range(len(start))))
    return AttractorDictionary.from_trajectory(start.to(trajectory.final.device), trajectory, ids), trajectory
