"""Surrogates of backbones for benchmarks, trained once and reused from a cache folder with their features."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from traj_ood.autoencoders.surrogate import SurrogateAutoencoder, training_images
from traj_ood.backbones import Backbone, load_backbone
from traj_ood.backbones.feature_cache import BLOCK, FeatureCache, backbone_answers
from traj_ood.backbones.tuning import tuned
from traj_ood.data import Benchmark, ImageSource, preflight
from traj_ood.data.batches import OnError, ranges_of
from traj_ood.data.contents import distrust
from traj_ood.dynamics.behaviour import agree, transform_digest
from traj_ood.dynamics.device import standard_settings
from traj_ood.errors import TrajOODError, check_word
from traj_ood.io.extensions import imported, origin_of
from traj_ood.io.files import cache_folder
from traj_ood.io.provenance import code_digest, package_digest
from traj_ood.text import printable
from traj_ood.training.loop import RECORD
from traj_ood.training.surrogate import (
    MIN_FEATURES,
    SurrogateRecipe,
    check_count,
    fit_surrogate,
    warn_of_health,
)

LIMIT = 50_000
"""Maximum number of training features: 400 MB at 2,048 dimensions."""


@standard_settings()
def surrogate_for(
    backbone: str | Backbone,
    benchmark: Benchmark,
    *,
    out: str | Path | None = None,
    recipe: SurrogateRecipe | None = None,
    seed: int = 0,
    workers: int = 2,
    on_error: OnError = "raise",
    limit: int = LIMIT,
    device: torch.device | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> SurrogateAutoencoder:
    """The surrogate of a backbone for a benchmark's ID training split, loaded from ``out`` if it exists, else trained.

    Args:
        backbone: a spec such as ``timm:resnet18`` (see :func:`traj_ood.backbones.load_backbone`), or a backbone.
        benchmark: only its training split is read.
        out: features are stored in ``out/features``, surrogates in subfolders of ``out/surrogates`` that are named
            after the backbone's fingerprint, width and transform, the images' contents, recipe and seed. A surrogate
            trained by another version of this package's code is trained again. Default: ``$TRAJ_OOD_DATA``, or
            ``~/.cache/traj_ood``.
        recipe: see :func:`fit_surrogate`.
        seed: see :func:`fit_surrogate`.
        workers: threads that read images.
        on_error: ``raise`` (default) or ``skip`` images that cannot be read.
        limit: maximum number of training images; a larger split is sampled, independent of ``seed``. Default 50,000.
        device: where backbone and surrogate run. Default: where the backbone is.
        fresh: ignore a finished surrogate, a checkpoint and stored features, and hash the images again.
        quiet: whether to show no progress bar.
    Raises:
        TrajOODError: see :func:`fit_surrogate`; also images that are missing or cannot be read, damaged files in
            ``out``, and impossible arguments.
    """
    if workers < 1 or limit < MIN_FEATURES:
        raise TrajOODError(
            f"surrogate: expected at least 1 worker and a limit of at least {MIN_FEATURES} images, got {workers} and "
            f"{limit}"
        )
    check_word("value of on_error", on_error, OnError)
    recipe, root = recipe or SurrogateRecipe(), cache_folder() if out is None else Path(out)
    backbone = load_backbone(backbone) if isinstance(backbone, str) else backbone
    if device is not None:
        backbone.to(device)
    backbone = tuned(backbone, root)
    check_count(backbone, len(benchmark.train.images))
    images = training_images(benchmark.train, limit)
    if fresh:
        distrust()
    data = {
        "benchmark": benchmark.name,
        "split": benchmark.train.name,
        "count": len(images),
        "sha256": images.digest(),
    }
    transform = transform_digest(backbone.transform, backbone.input_shape)
    folder = root / "surrogates" / _folder_name(backbone, [data["sha256"], transform, asdict(recipe), seed])
    if not fresh and (folder / RECORD).is_file():
        model = SurrogateAutoencoder.from_pretrained(folder, backbone)
        if _is_wanted(model, on_error):
            warn_of_health(model)
            return model
    if on_error == "raise":
        preflight(benchmark)
    cache = FeatureCache(root / "features")
    if fresh:
        cache.distrust()
    features, skipped = _extract(backbone, images, cache, workers, on_error, quiet)
    data |= {"skipped": skipped}
    return fit_surrogate(backbone, features, recipe, seed=seed, out=folder, data=data, fresh=fresh, quiet=quiet)


def _is_wanted(model: SurrogateAutoencoder, on_error: OnError) -> bool:
    """Whether a finished surrogate is the one that training would give now: trained by this code, on a backbone with
    the same outputs, and without skipped images unless ``on_error`` is ``skip``."""
    record, own = model.record, backbone_answers(model.backbone)
    versions = record.get("versions", {})
    ours = origin_of(type(model.backbone)) is None  # then code that the user imported does not matter
    stored = versions.get("package") if ours and "package" in versions else versions.get("code")
    return (
        stored == (package_digest() if ours and imported() else code_digest())
        and (own is None or agree(record.get("backbone", {}).get("answers"), own))
        and (on_error == "skip" or not record.get("data", {}).get("skipped"))
    )


def _extract(
    backbone: Backbone, images: ImageSource, cache: FeatureCache, workers: int, on_error: OnError, quiet: bool
) -> tuple[Tensor, int]:
    """Features (N, n) of all images that can be read, and the number of those that cannot."""
    parts: list[Tensor] = []
    skipped = 0
    title = printable(f"features of {backbone.name}")
    with tqdm(total=len(images), desc=title, unit="img", delay=2, disable=quiet) as bar:
        for indices in ranges_of(len(images), BLOCK):
            _, answer, failed = cache.extract(backbone, images, indices, workers=workers, on_error=on_error)
            skipped += len(failed)
            if answer is not None:
                parts.append(answer.features.cpu())
            bar.update(len(indices))
    if not parts:
        raise TrajOODError(f"surrogate of {backbone.name}: none of its {len(images)} training images could be read")
    return torch.cat(parts), skipped


def _folder_name(backbone: Backbone, rest: list[Any]) -> str:
    """A name that differs where the features or the training do. The weights of an own backbone do not decide the width
    of its features, so it is named."""
    identity = [backbone.fingerprint(), backbone.feature_dim, *rest]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', backbone.name)}-{key[:16]}"
