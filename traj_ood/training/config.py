"""The settings of a training run: model, data and recipe, read from a YAML file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from traj_ood.errors import TrajOODError, check_word, unknown_name
from traj_ood.io.options import option_kinds, read_options
from traj_ood.io.provenance import PACKAGE
from traj_ood.io.trees import as_json, read_yaml

Family = Literal["vit_mae", "conv", "classifier"]
CONFIGS = PACKAGE / "configs"
"""Folder of the bundled training configs."""
_BOUNDS: Mapping[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "above 0": lambda value: value > 0,
    "above 0 and finite": lambda value: 0 < value < math.inf,
    "0 or more and finite": lambda value: 0 <= value < math.inf,
    "between 0 and 1": lambda value: 0 < value < 1,
    "a share from 0 to 1": lambda value: 0 <= value <= 1,
}


def check_bounds(recipe: object, owner: str, bounds: Mapping[str, Sequence[str]]) -> None:
    """Check numbers of a recipe: ``bounds`` are the names of attributes by what they must be, in the words of
    ``_BOUNDS``. None is allowed."""
    for expected, keys in bounds.items():
        for key in keys:
            value = getattr(recipe, key)
            if value is not None and not _BOUNDS[expected](value):
                raise TrajOODError(f"{owner}: {key} must be {expected}, got {value}")


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step.
        learning_rate: the highest rate, reached after the warm-up.
        weight_decay: not applied to biases, norms and tokens.
        clip: maximum norm of the gradient.
        optimizer: ``adamw`` (default; betas 0.9, 0.95 as in MAE) or ``adam`` (the paper's conv autoencoders).
        schedule: of the learning rate after the warm-up: ``cosine`` (default), ``linear`` (the paper's conv
            autoencoders) or ``constant``.
        warmup: share of all steps in which the learning rate rises linearly.
        input_noise: standard deviation of Gaussian noise added to the input, in normalised units.
        mask_ratios: shares of hidden patches, of which one is drawn per batch.
        loss: pixels that count: ``all`` (default) or only the ``masked`` ones. The latter is MAE's own loss; it leaves
            D's output on visible patches untrained, so that E∘D without masking does not converge.
        flip: whether to flip images horizontally at random.
        precision: of the forward pass: ``float32`` (default) or ``bfloat16``, by autocast: 1.4 times as fast on a CPU
            with bfloat16 products, more on a GPU. Weights, optimizer and the finished model are float32 either way.
    Raises:
        TrajOODError: an impossible value.
    """

    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    optimizer: Literal["adamw", "adam"] = "adamw"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    input_noise: float = 0.0
    mask_ratios: tuple[float, ...] = (0.0,)
    loss: Literal["all", "masked"] = "all"
    flip: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        bounds = {
            "at least 1": ("epochs", "batch_size"),
            "above 0 and finite": ("learning_rate",),
            "above 0": ("clip",),
            "0 or more and finite": ("weight_decay", "input_noise"),
            "a share from 0 to 1": ("warmup",),
        }
        check_bounds(self, "train", bounds)
        for key in ("optimizer", "schedule", "loss", "precision"):
            check_word(f"train {key}", getattr(self, key), option_kinds(Recipe)[key])
        if not self.mask_ratios:
            raise TrajOODError("train: mask_ratios: expected at least one, got none")
        if not all(0 <= ratio <= 1 for ratio in self.mask_ratios):
            raise TrajOODError(f"train: mask_ratios must be shares from 0 to 1, got {self.mask_ratios}")
        if self.loss == "masked" and min(self.mask_ratios) == 0:
            raise TrajOODError(
                "train: loss 'masked': expected mask ratios above 0, got 0, which leaves nothing to predict: remove it"
            )


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run.

    Attributes:
        name: name of the model.
        benchmark: the benchmark whose ID training split is used.
        family: ``vit_mae``, ``conv`` or ``classifier``.
        image_size: side of the images.
        channels: number of image channels.
        model: geometry of the network: for ``vit_mae`` keys of transformers' ViTMAEConfig; for ``conv`` ``width`` and
            ``bottleneck``; for a classifier ``architecture``, a timm name, and timm's arguments for it.
        recipe: see :class:`Recipe`.
        seed: seed of weights and batches.
        health_images: number of training images whose trajectories are reported in the model card. Default 2,000.
    """

    name: str
    benchmark: str
    family: Family
    image_size: int
    channels: int
    model: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    health_images: int = 2000

    @classmethod
    def load(cls, source: str) -> TrainConfig:
        """Read a YAML file, or a bundled config by its name.

        Raises:
            TrajOODError: no such file or name, not YAML, unknown or missing keys, bad values.
        """
        path = Path(source) if source.endswith((".yaml", ".yml")) else CONFIGS / f"{source}.yaml"
        if not path.is_file():
            if path.parent == CONFIGS:
                raise unknown_name("training config", source, [p.stem for p in CONFIGS.glob("*.yaml")])
            raise TrajOODError(f"{path}: no such training config: give the path of a YAML file or a bundled name")
        tree = read_yaml(path, "the training config")
        if not isinstance(tree, dict):
            raise TrajOODError(f"{path}: expected a mapping with {', '.join(f.name for f in fields(cls))}")
        config = cls(**read_options(cls, tree, str(path), noun="key"))
        for key in ("image_size", "channels"):
            if getattr(config, key) < 1:
                raise TrajOODError(f"{path}: {key}: expected at least 1, got {getattr(config, key)}")
        return config

    def plain(self) -> dict[str, Any]:
        """The config as plain JSON data."""
        return as_json(asdict(self))
