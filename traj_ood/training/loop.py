"""What every training run shares: its config, its images, and a loop that resumes to the same weights."""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from traj_ood.data import ImageSource
from traj_ood.data.images import check_unchanged
from traj_ood.data.preprocessing import Preprocessing
from traj_ood.dynamics.device import training_settings
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import PACKAGE, code_digest
from traj_ood.io.trees import read_yaml

Family = Literal["vit_mae", "conv", "classifier"]
CONFIGS = PACKAGE / "configs"
_STATISTICS_IMAGES = 10_000
_CACHE_BYTES = 2**30


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
        for key, known in (
            ("optimizer", ("adamw", "adam")),
            ("schedule", ("cosine", "linear", "constant")),
            ("loss", ("all", "masked")),
        ):
            if getattr(self, key) not in known:
                raise unknown_name(f"train {key}", str(getattr(self, key)), known)
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
        recipe, model = tree.pop("recipe", None) or {}, tree.pop("model", None) or {}
        for key, value in (("recipe", recipe), ("model", model)):
            if not isinstance(value, dict):
                raise TrajOODError(f"{path}: {key}: expected a mapping, got {value!r}")
        settings = _typed(path, tree, cls)
        required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [key for key in required if key not in settings]
        if missing:
            raise TrajOODError(f"{path}: missing {', '.join(missing)}")
        if settings["family"] not in get_args(Family):
            raise unknown_name(f"{path}: family", settings["family"], get_args(Family))
        for key in ("image_size", "channels"):
            if settings[key] < 1:
                raise TrajOODError(f"{path}: {key}: expected at least 1, got {settings[key]}")
        return cls(recipe=Recipe(**_typed(path, recipe, Recipe)), model=model, **settings)


class Run(ABC):
    """State of a training run: weights, optimizer and log, checkpointed after every epoch.

    Args:
        config: see :class:`TrainConfig`. module: on the device where it trains.
        parameters: those that training may change.
        images: see :class:`TrainingImages`. out: folder of the checkpoint and the log. quiet: no progress bars.
    """

    def __init__(
        self,
        config: TrainConfig,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        images: TrainingImages,
        out: Path,
        quiet: bool,
    ) -> None:
        self.config, self.module, self.images, self.out, self.quiet = config, module, images, out, quiet
        self._parameters = list(parameters.values())
        self.log: list[dict[str, float]] = []
        self.steps = max(1, len(images) // config.recipe.batch_size)
        decayed = [p for p in self._parameters if p.squeeze().ndim > 1]  # not biases, norms, class and mask token
        others = [p for p in self._parameters if p.squeeze().ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._identity = {
            "config": plain(config),
            "images": images.digest,
            "labels": hashlib.sha256(json.dumps(list(images.labels)).encode()).hexdigest(),
            "code": code_digest(),
        }
        rate = config.recipe.learning_rate
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
            if config.recipe.optimizer == "adamw"
            else torch.optim.Adam(groups, lr=rate)
        )

    @property
    def device(self) -> torch.device:
        return self._parameters[0].device

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    @training_settings()
    def finish_epochs(self, fresh: bool) -> None:
        """All epochs that are not in the checkpoint yet; ``fresh`` disregards it.

        Raises:
            TrajOODError: an unwritable folder, a damaged checkpoint or one of another config, other images or other
                code, images that change meanwhile, or a loss that is not finite.
        """
        self.resume(fresh)
        self.write_log()  # before hours of work: is the folder writable at all?
        for epoch in range(len(self.log), self.config.recipe.epochs):
            self.epoch(epoch)

    def resume(self, fresh: bool) -> None:
        if fresh or not self.checkpoint.is_file():
            return
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except Exception as error:
            raise TrajOODError(f"{self.checkpoint}: damaged checkpoint ({error}): start over with --fresh") from error
        stored = state.get("identity", {"config": state.get("config")})  # older ones tell of the config alone
        different = [key for key, value in self._identity.items() if stored.get(key) != value]
        if different:
            raise TrajOODError(
                f"{self.checkpoint}: made with another {', '.join(different)}: choose another --out or use --fresh"
            )
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log = state["log"]

    def epoch(self, epoch: int) -> None:
        recipe, module, parameters = self.config.recipe, self.module, self._parameters
        draws = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        torch.manual_seed(self.config.seed * 1_000_003 + epoch)  # dropout, where a geometry asks for it
        began, total = time.perf_counter(), 0.0
        for p in parameters:
            p.requires_grad_(True)
        module.train()
        order = torch.randperm(len(self.images), generator=draws)
        bar = tqdm(range(self.steps), desc=f"epoch {epoch + 1}/{recipe.epochs}", delay=2, disable=self.quiet)
        for step in bar:
            rate = learning_rate(recipe, epoch * self.steps + step, self.steps * recipe.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self.loss(order[step * recipe.batch_size : (step + 1) * recipe.batch_size], draws)
            if not bool(loss.isfinite()):
                raise TrajOODError(
                    f"train: the loss is {loss.item()} in epoch {epoch + 1}, step {step}: lower the learning rate"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            self.optimizer.step()
            total += loss.item()
            bar.set_postfix(loss=f"{total / (step + 1):.4f}", refresh=False)
        module.eval().requires_grad_(False)
        seconds = round(time.perf_counter() - began, 1)
        self.log.append({"epoch": epoch + 1, "loss": total / self.steps, "learning_rate": rate, "seconds": seconds})
        self._save()
        self.announce(self.log[-1])

    def announce(self, line: dict[str, float]) -> None:
        """For logs: a finished epoch as one line of JSON, where bars are off."""
        if self.quiet:
            print(json.dumps(line), file=sys.stderr, flush=True)

    @abstractmethod
    def loss(self, rows: Tensor, draws: torch.Generator) -> Tensor:
        """Scalar loss of the training images ``rows`` (B,) int64; whatever is random comes from ``draws``."""

    def batch(self, rows: Tensor, draws: torch.Generator) -> Tensor:
        """The images ``rows`` (B, C, H, W) on :attr:`device`, flipped at random where the recipe says so."""
        batch = self.images.batch(rows).to(self.device)
        if self.config.recipe.flip:
            flipped = torch.rand(len(batch), generator=draws).to(batch.device) < 0.5
            batch = torch.where(flipped[:, None, None, None], batch.flip(-1), batch)
        return batch

    def write_log(self) -> None:
        """``log.jsonl``: one line per finished epoch."""
        write_atomic(self.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log).encode())

    def _save(self) -> None:
        self.images.check()
        state = {
            "identity": self._identity,
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.checkpoint, buffer.getvalue())
        self.write_log()


class TrainingImages:
    """Resized training images by index: kept as uint8 where they fit into 1 GiB, else read when needed.

    Attributes:
        digest: of the source, when it was first looked at. labels: the source's.
    """

    def __init__(self, source: ImageSource, shape: tuple[int, int, int], workers: int = 4) -> None:
        self._source, self._shape, self._workers = source, shape, workers
        self._contents, self.digest, self.labels = source.contents(), source.digest(), tuple(source.labels)
        self._mean, self._std = (0.0,) * shape[0], (1.0,) * shape[0]
        self._cache: Tensor | None = None
        if len(source) * math.prod(shape) <= _CACHE_BYTES:
            self._cache = self._read(range(len(source)))
            self.check()

    def __len__(self) -> int:
        return len(self._source)

    def check(self) -> None:
        """Refuse images that have changed since they were first looked at, unless all of them are kept here.

        Raises:
            TrajOODError: says how many, and names the first.
        """
        check_unchanged(self._source, range(len(self)), self._contents)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel of the pixels in [0, 1], over at most 10,000 images, evenly taken."""
        stride = max(1, len(self) // _STATISTICS_IMAGES)
        pixels = self._pixels(torch.arange(0, len(self), stride)).float() / 255
        self._mean = tuple(round(float(m), 4) for m in pixels.mean(dim=(0, 2, 3)))
        self._std = tuple(round(max(float(s), 1e-3), 4) for s in pixels.std(dim=(0, 2, 3)))
        return self._mean, self._std

    def batch(self, indices: Tensor) -> Tensor:
        """(B, C, H, W) float32 in normalised units."""
        mean, std = torch.tensor(self._mean).view(-1, 1, 1), torch.tensor(self._std).view(-1, 1, 1)
        return (self._pixels(indices).float() / 255 - mean) / std

    def _pixels(self, indices: Tensor) -> Tensor:
        return self._cache[indices] if self._cache is not None else self._read(indices.tolist())

    def _read(self, indices: range | list[int]) -> Tensor:
        preprocessing = Preprocessing(self._shape)

        def read(index: int) -> Tensor:
            return preprocessing.pixels(self._source.load(index))

        with ThreadPoolExecutor(self._workers) as pool:
            return torch.stack(list(pool.map(read, indices)))


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of one step: linear warm-up, then the recipe's schedule down to 0 (or constant)."""
    warmup = max(1, round(recipe.warmup * steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return recipe.learning_rate * factor[recipe.schedule]


def _typed(path: Path, tree: dict[str, Any], cls: Any) -> dict[str, Any]:
    """The values of a YAML mapping as the dataclass's field types; ``5e-3`` is text to YAML and a number here.

    Raises:
        TrajOODError: a key that is no field (with near names), or a value of another kind.
    """
    kinds = {f.name: str(f.type) for f in fields(cls)}
    typed: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in kinds:
            raise unknown_name(f"key in {path.name}", str(key), kinds)
        kind = kinds[key]
        try:
            if kind.startswith("tuple"):
                typed[key] = tuple(float(v) for v in value)
                if not typed[key] or isinstance(value, str):
                    raise ValueError("empty")
            elif kind == "bool":
                typed[key] = {True: True, False: False}[value]
            elif kind == "int":
                if isinstance(value, bool) or int(value) != float(value):
                    raise ValueError("not whole")
                typed[key] = int(value)
            else:
                typed[key] = float(value) if kind == "float" else str(value)
        except (TypeError, ValueError, KeyError) as error:
            raise TrajOODError(f"{path}: {key}: expected {kind}, got {value!r}") from error
    return typed


def plain(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON holds it."""
    return json.loads(json.dumps(asdict(config)))
