"""Train a small timm classifier on a benchmark's labelled ID training split: the backbone of offline examples."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from traj_ood.backbones import Backbone, load_backbone
from traj_ood.backbones.timm_models import new_network, save_folder
from traj_ood.data import Benchmark, Split, load_benchmark, preflight
from traj_ood.data.contents import distrust
from traj_ood.data.decoding import AS_STORED, Reading
from traj_ood.dynamics.device import training_settings
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.training.loop import Run, TrainConfig, TrainingImages, plain

_READ = 512


@training_settings()
def train_classifier(
    config: TrainConfig,
    out: Path,
    *,
    data_root: Path | None = None,
    follow_links: bool = False,
    reading: Reading = AS_STORED,
    device: torch.device | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Backbone:
    """Train a classifier, writing to ``out`` timm's local-directory format, ``training.json`` and README.md, its card.

    Checkpoints and resuming are those of :func:`traj_ood.training.autoencoder.train_model`. Images are resized directly
    to ``image_size`` (bilinear), in training and in the transform that the folder declares.

    Args:
        config: of family ``classifier``; ``model`` holds ``architecture`` (a timm name) and timm's arguments for it.
        out: folder for everything. data_root, follow_links, reading: of :func:`traj_ood.load_benchmark`.
        device: default the CPU.
        fresh: disregard a checkpoint. quiet: no progress bars.
    Returns:
        The trained backbone, loaded back from ``out``.
    Raises:
        TrajOODError: bad data or settings, a split without labels, an unwritable folder, or a checkpoint of other
            settings.
    """
    _check_config(config)
    if fresh:
        distrust()
    benchmark = load_benchmark(config.benchmark, data_root, follow_links=follow_links, reading=reading)
    preflight(benchmark)
    classes = class_names(benchmark)
    for split in _measured(benchmark):  # before hours of training: are these labels the same classes?
        _targets(split, classes)
    began = time.perf_counter()
    shape = (config.channels, config.image_size, config.image_size)
    arguments = {k: v for k, v in config.model.items() if k != "architecture"}
    arguments |= {"num_classes": len(classes), "in_chans": config.channels}
    torch.manual_seed(config.seed)
    network = new_network(config.model["architecture"], **arguments)
    images = TrainingImages(benchmark.train.images, shape)
    mean, std = images.statistics()
    run = _Run(
        config, network.to(device or torch.device("cpu")), images, _targets(benchmark.train, classes), out, quiet
    )
    run.finish_epochs(fresh)
    data = {"input_size": list(shape), "mean": list(mean), "std": list(std), "interpolation": "bilinear"}
    data |= {"crop_pct": 1.0, "crop_mode": "squash"}
    save_folder(network, out, config.model["architecture"], arguments, data)
    backbone = load_backbone(f"timm:{out}", name=f"timm:{config.name}").to(device or torch.device("cpu"))
    _record(config, run, backbone, benchmark, classes, began)
    run.checkpoint.unlink(missing_ok=True)
    return backbone


def class_names(benchmark: Benchmark) -> tuple[str, ...]:
    """The labels of the ID training split, sorted (by number where all are numbers): class k is the k-th of them.

    Raises:
        TrajOODError: no labels, or fewer than 2 classes.
    """
    names = set(benchmark.train.images.labels)
    if len(names) < 2:
        found = "it has no labels" if not names else f"all of its images are of class {names.pop()!r}"
        raise TrajOODError(
            f"benchmark {benchmark.name!r}: a classifier needs training images of at least 2 classes, but {found}: "
            "give image lists with labels"
        )
    return tuple(sorted(names, key=lambda n: (0, int(n), n) if n.lstrip("-").isdecimal() else (1, 0, n)))


@dataclass(frozen=True)
class Accuracy:
    """Share of ``count`` images whose largest logit is that of their label."""

    value: float
    count: int


def accuracy(backbone: Backbone, split: Split, classes: Sequence[str]) -> Accuracy | None:
    """Top-1 accuracy on a labelled split; None for one without labels.

    Raises:
        TrajOODError: a label the classifier does not know, or an image that cannot be read.
    """
    if not split.images.labels:
        return None
    targets, right = _targets(split, classes), 0
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(split.images), _READ):
            rows = range(start, min(start + _READ, len(split.images)))
            batch = torch.stack(list(pool.map(lambda i: backbone.transform(split.images.load(i)), rows)))
            logits = backbone.extract(batch).logits
            assert logits is not None
            right += int((logits.argmax(dim=1).cpu() == targets[rows.start : rows.stop]).sum())
    return Accuracy(right / len(targets), len(targets))


class _Run(Run):
    """Cross-entropy of the labels."""

    def __init__(
        self, config: TrainConfig, network: nn.Module, images: TrainingImages, targets: Tensor, out: Path, quiet: bool
    ) -> None:
        self._targets = targets
        super().__init__(config, network, dict(network.named_parameters()), images, out, quiet)

    def loss(self, rows: Tensor, draws: torch.Generator) -> Tensor:
        batch = self.batch(rows, draws)
        if self.config.recipe.input_noise:
            noise = torch.randn(batch.shape, generator=draws).to(batch.device)
            batch = batch + self.config.recipe.input_noise * noise
        return functional.cross_entropy(self.module(batch), self._targets[rows].to(batch.device))


def _check_config(config: TrainConfig) -> None:
    """Refuse settings that say nothing to a classifier, rather than ignore them."""
    if not isinstance(config.model.get("architecture"), str):
        raise TrajOODError(f"{config.name}: a classifier's model needs architecture, a timm name such as resnet18")
    for key, instead in (("num_classes", "the training labels"), ("in_chans", "channels"), ("pretrained", "nothing")):
        if key in config.model:
            raise TrajOODError(f"{config.name}: model key {key!r} is decided by {instead}: leave it out")
    if config.recipe.loss != "all" or any(config.recipe.mask_ratios):
        raise TrajOODError(f"{config.name}: a classifier has no masking: leave out mask_ratios and loss")


def _targets(split: Split, classes: Sequence[str]) -> Tensor:
    """(N,) int64 class numbers of a split's labels."""
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = next((label for label in split.images.labels if label not in numbers), None)
    if unknown is not None:
        raise unknown_name(f"class in split {split.name!r}", unknown, classes)
    return torch.tensor([numbers[label] for label in split.images.labels])


def _measured(benchmark: Benchmark) -> list[Split]:
    """The held-out ID splits."""
    return [split for split in (benchmark.val, benchmark.test) if split is not None]


def _record(
    config: TrainConfig, run: Run, backbone: Backbone, benchmark: Benchmark, classes: Sequence[str], began: float
) -> None:
    """``training.json`` and the card."""
    measured: dict[str, Any] = {}
    for split in _measured(benchmark):
        reached = accuracy(backbone, split, classes)
        if reached is not None:
            measured[split.role] = {"accuracy": reached.value, "count": reached.count}
    record = {
        "config": plain(config),
        "classes": list(classes),
        "log": run.log,
        "parameters": backbone.parameter_count(),
        "feature_dim": backbone.feature_dim,
        "input": backbone.options(),
        "fingerprint": backbone.fingerprint(),
        "data": {benchmark.train.name: benchmark.train.digests()},
        "accuracy": measured,
        "commit": git_commit(),
        "versions": {**environment(), "timm": version("timm")},
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_atomic(run.out / "training.json", (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    write_atomic(run.out / "README.md", classifier_card(config.name, record).encode())


def classifier_card(name: str, record: Mapping[str, Any]) -> str:
    """Markdown: what the classifier is, its data, accuracy, recipe and versions, all from ``record``."""
    config = record["config"]
    (split, data), *_ = record["data"].items()
    rows = {**config["model"], **config["recipe"], "seed": config["seed"]}
    reached = [
        f"- {role}: {found['accuracy']:.2%} of {found['count']:,} images" for role, found in record["accuracy"].items()
    ]
    versions = ", ".join(f"{k} {v}" for k, v in sorted(record["versions"].items()))
    lines = [
        f"# {name}",
        "",
        f"A classifier ({config['model']['architecture']} of timm, {record['parameters']:,} parameters) of "
        f"{len(record['classes'])} classes, trained",
        f"from scratch by `traj-ood train` on the ID training split of the benchmark `{config['benchmark']}` "
        f"({data['count']:,}",
        f"images, `{split}`, list sha256 `{data['sha256'][:16]}…`). Classes: {', '.join(record['classes'])}.",
        "",
        "Load it with `traj-ood bench <benchmark> --model timm:<this folder>`, or in timm with",
        "`create_model('local-dir:<this folder>', pretrained=True)`.",
        "",
        "## Accuracy",
        "",
        *(reached or ["Not measured: the benchmark's other ID splits have no labels."]),
        "",
        f"Training loss (cross-entropy): {record['log'][0]['loss']:.4f} in the first epoch, "
        f"{record['log'][-1]['loss']:.4f} in the last of {len(record['log'])}.",
        "",
        "## Recipe",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
        "",
        "## Provenance",
        "",
        f"Fingerprint `{record['fingerprint'][:16]}…`, commit `{record['commit']}`, {record['seconds']:.0f} s of "
        f"training and checks; {versions}.",
        "",
    ]
    return "\n".join(lines)
