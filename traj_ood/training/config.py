"""What a training run is told: its recipe, and the YAML file that names the model, the data and the recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.options import option_kinds, read_options
from traj_ood.io.provenance import PACKAGE
from traj_ood.io.trees import as_json, read_yaml

Family = Literal["vit_mae", "conv", "classifier"]
CONFIGS = PACKAGE / "configs"
"""Folder of the bundled configs."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs, batch_size, learning_rate, weight_decay, clip: as usual; ``clip`` is the gradient's norm.
        optimizer: ``adamw`` (default; betas 0.9, 0.95 as in MAE) or ``adam`` (the paper's conv autoencoders).
        schedule: ``cosine`` (default), ``linear`` (the paper's conv autoencoders) or ``constant``, after ``warmup``,
            a share of all steps.
        input_noise: standard deviation of Gaussian noise added to the input, in normalised units.
        mask_ratios: one is drawn per batch.
        loss: ``all`` pixels (default) or only ``masked`` ones. Masked-only is MAE's own loss; it leaves D's output on
            visible patches untrained, and E∘D without masking then does not converge.
        flip: random horizontal flips.
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

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size"):
            if getattr(self, key) < 1:
                raise TrajOODError(f"train: {key} must be at least 1, got {getattr(self, key)}")
        for key in ("optimizer", "schedule", "loss"):
            known = get_args(option_kinds(Recipe)[key])
            if getattr(self, key) not in known:
                raise unknown_name(f"train {key}", str(getattr(self, key)), known)
        if not self.mask_ratios:
            raise TrajOODError("train: mask_ratios: expected at least one, got none")
        if self.loss == "masked" and min(self.mask_ratios) == 0:
            raise TrajOODError(
                "train: loss 'masked' needs every mask ratio above 0, got 0: there is nothing to predict"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A training run, as its YAML file says.

    Attributes:
        name: of the model. benchmark: whose ID training split. family: ``vit_mae``, ``conv`` or
            ``classifier``.
        model: the family's geometry: keys of transformers' ViTMAEConfig; ``width`` and ``bottleneck``; for a classifier
            ``architecture``, a timm name, and arguments timm builds it with.
        recipe: see :class:`Recipe`. seed: of weights and batches.
        health_images: training images whose trajectories the model card reports at the end.
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
        """From a YAML file, or by the name of a bundled one.

        Raises:
            TrajOODError: no such file or name, not YAML, unknown or missing keys, bad values.
        """
        path = Path(source) if source.endswith((".yaml", ".yml")) else CONFIGS / f"{source}.yaml"
        if not path.is_file():
            if path.parent == CONFIGS:
                raise unknown_name("training config", source, [p.stem for p in CONFIGS.glob("*.yaml")])
            raise TrajOODError(f"{path}: no such training config")
        tree = read_yaml(path, "the training config")
        if not isinstance(tree, dict):
            raise TrajOODError(f"{path}: expected a mapping with {', '.join(f.name for f in fields(cls))}")
        config = cls(**read_options(cls, tree, str(path), noun="key"))
        for key in ("image_size", "channels"):
            if getattr(config, key) < 1:
                raise TrajOODError(f"{path}: {key}: expected at least 1, got {getattr(config, key)}")
        return config

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return as_json(asdict(self))
