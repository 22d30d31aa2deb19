"""Train an autoencoder on a benchmark's ID training split: resumable, logged, and described by a model card."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from traj_ood.autoencoders import Autoencoder, ConvAutoencoder, ConvNetwork, ViTMAE
from traj_ood.autoencoders.base import image_to_tensor
from traj_ood.autoencoders.vit_mae import assert_position_embeddings, build_model, geometry_keys
from traj_ood.data import Benchmark, ImageSource, Split, load_benchmark, preflight
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.files import write_atomic
from traj_ood.model_card import model_card
from traj_ood.results import environment, git_commit
from traj_ood.scoring import ScorerSet

CONFIGS = Path(__file__).parent / "configs"
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
        name: of the model. benchmark: whose ID training split. family: ``vit_mae`` or ``conv``.
        model: the family's geometry: keys of transformers' ViTMAEConfig, or ``width`` and ``bottleneck``.
        recipe: see :class:`Recipe`. seed: of weights and batches.
        health_images: training images whose trajectories the model card reports at the end.
    """

    name: str
    benchmark: str
    family: Literal["vit_mae", "conv"]
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
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise TrajOODError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
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
        if settings["family"] not in ("vit_mae", "conv"):
            raise unknown_name(f"{path}: family", settings["family"], ("vit_mae", "conv"))
        for key in ("image_size", "channels"):
            if settings[key] < 1:
                raise TrajOODError(f"{path}: {key}: expected at least 1, got {settings[key]}")
        return cls(recipe=Recipe(**_typed(path, recipe, Recipe)), model=model, **settings)


def train_model(
    config: TrainConfig,
    out: Path,
    *,
    data_root: Path | None = None,
    device: torch.device | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Autoencoder:
    """Train, writing to ``out``: the model, its log, ``training.json`` (config, log, versions) and README.md, its card.

    After each epoch a checkpoint is written; the same call continues from it and ends with the same weights as an
    uninterrupted run, because every epoch draws from its own seed.

    Raises:
        TrajOODError: bad data or settings, an unwritable folder, or a checkpoint of other settings.
    """
    benchmark = load_benchmark(config.benchmark, data_root)
    preflight(benchmark)
    began = time.perf_counter()
    images = _TrainingImages(benchmark.train.images, (config.channels, config.image_size, config.image_size))
    torch.manual_seed(config.seed)
    model = build_autoencoder(config, *images.statistics())
    model.to(device or torch.device("cpu"))
    run = _Run(config, model, images, out, quiet)
    run.resume(fresh)
    run.write_log()  # before hours of work: is the folder writable at all?
    for epoch in range(len(run.log), config.recipe.epochs):
        run.epoch(epoch)
    _finish(config, run, benchmark, time.perf_counter() - began)
    return model


def build_autoencoder(config: TrainConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> Autoencoder:
    """A new, untrained autoencoder of the configured family and geometry.

    Raises:
        TrajOODError: impossible geometry.
    """
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


class _Run:
    """State of a training run: weights, optimizer and log, checkpointed after every epoch."""

    def __init__(
        self, config: TrainConfig, model: Autoencoder, images: _TrainingImages, out: Path, quiet: bool
    ) -> None:
        self.config, self.model, self.images, self.out, self.quiet = config, model, images, out, quiet
        self.log: list[dict[str, float]] = []
        self.steps = max(1, len(images) // config.recipe.batch_size)
        parameters = model.trainable_parameters()
        decayed = [p for p in parameters.values() if p.squeeze().ndim > 1]  # not biases, norms, class and mask token
        others = [p for p in parameters.values() if p.squeeze().ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        rate = config.recipe.learning_rate
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
            if config.recipe.optimizer == "adamw"
            else torch.optim.Adam(groups, lr=rate)
        )

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def resume(self, fresh: bool) -> None:
        if fresh or not self.checkpoint.is_file():
            return
        try:
            state = torch.load(self.checkpoint, map_location=self.model.device, weights_only=True)
        except Exception as error:
            raise TrajOODError(f"{self.checkpoint}: damaged checkpoint ({error}): start over with --fresh") from error
        if state["config"] != _plain(self.config):
            raise TrajOODError(f"{self.checkpoint}: made with another config: choose another --out or use --fresh")
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log = state["log"]

    def epoch(self, epoch: int) -> None:
        recipe, module = self.config.recipe, self.model.module
        draws = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        torch.manual_seed(self.config.seed * 1_000_003 + epoch)  # dropout, where a geometry asks for it
        began, total = time.perf_counter(), 0.0
        parameters = list(self.model.trainable_parameters().values())
        for p in parameters:
            p.requires_grad_(True)
        module.train()
        order = torch.randperm(len(self.images), generator=draws)
        bar = tqdm(range(self.steps), desc=f"epoch {epoch + 1}/{recipe.epochs}", delay=2, disable=self.quiet)
        for step in bar:
            rate = _learning_rate(recipe, epoch * self.steps + step, self.steps * recipe.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            batch = self.images.batch(order[step * recipe.batch_size : (step + 1) * recipe.batch_size])
            loss = self._loss(batch.to(self.model.device), draws)
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
        if self.quiet:
            print(json.dumps(self.log[-1]), file=sys.stderr, flush=True)

    def _loss(self, batch: Tensor, draws: torch.Generator) -> Tensor:
        recipe = self.config.recipe
        if recipe.flip:
            flipped = torch.rand(len(batch), generator=draws).to(batch.device) < 0.5
            batch = torch.where(flipped[:, None, None, None], batch.flip(-1), batch)
        ratio = recipe.mask_ratios[int(torch.randint(len(recipe.mask_ratios), (), generator=draws))]
        output, hidden = self.model.reconstruct_corrupted(batch, recipe.input_noise, ratio, draws)
        error = (output - batch).square()
        if recipe.loss == "masked" and hidden is not None:
            return (error * hidden).sum() / hidden.sum()
        return error.mean()

    def write_log(self) -> None:
        """``log.jsonl``: one line per finished epoch."""
        write_atomic(self.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log).encode())

    def _save(self) -> None:
        state = {
            "config": _plain(self.config),
            "model": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.checkpoint, buffer.getvalue())
        self.write_log()


class _TrainingImages:
    """Resized training images by index: kept as uint8 where they fit into 1 GiB, else read when needed."""

    def __init__(self, source: ImageSource, shape: tuple[int, int, int], workers: int = 4) -> None:
        self._source, self._shape, self._workers = source, shape, workers
        self._mean, self._std = (0.0,) * shape[0], (1.0,) * shape[0]
        self._cache: Tensor | None = None
        if len(source) * math.prod(shape) <= _CACHE_BYTES:
            self._cache = self._read(range(len(source)))

    def __len__(self) -> int:
        return len(self._source)

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
        channels = self._shape[0]

        def read(index: int) -> Tensor:
            unit = image_to_tensor(self._source.load(index), self._shape, (0.0,) * channels, (1.0,) * channels)
            return (unit * 255).round().to(torch.uint8)

        with ThreadPoolExecutor(self._workers) as pool:
            return torch.stack(list(pool.map(read, indices)))


def _finish(config: TrainConfig, run: _Run, benchmark: Benchmark, seconds: float) -> None:
    """Write the model, its training record and its card, then drop the checkpoint."""
    model: Any = run.model
    model.save_pretrained(run.out)
    health = _health(model, benchmark, config)
    record = {
        "config": _plain(config),
        "log": run.log,
        "parameters": model.parameter_count(),
        "fingerprint": model.fingerprint(),
        "data": {benchmark.train.name: benchmark.digests()[benchmark.train.name]},
        "health": health,
        "validation_loss": _validation_loss(model, benchmark.val),
        "commit": git_commit(Path(__file__).parent),
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


def _learning_rate(recipe: Recipe, step: int, steps: int) -> float:
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


def _plain(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))
