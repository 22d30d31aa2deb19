"""FeatureCache: features of a frozen backbone, extracted once and stored in blocks of 512 images."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood.backbones import Backbone, Features
from traj_ood.data import ImageSource
from traj_ood.data.batches import OnError, read_parts
from traj_ood.data.images import check_unchanged
from traj_ood.dynamics.behaviour import agree, answers, transform_digest
from traj_ood.dynamics.device import standard_settings
from traj_ood.dynamics.fixed_function import KnownWeights
from traj_ood.dynamics.own_functions import OwnFunctions, written_code
from traj_ood.errors import TrajOODError
from traj_ood.io.extensions import origin_of
from traj_ood.io.parts import Part, PartStore
from traj_ood.io.provenance import code_digest, package_digest
from traj_ood.io.trees import as_json

Failures = list[dict[str, str]]
BLOCK = 512  # images per file
_READ_IMAGES = 128  # images in memory at a time: a whole block of 224 x 224 would take 300 MB
IDENTITY = "cache.json"


class FeatureCache:
    """A folder of features, created with the first block, that has a subfolder for each pair of a backbone and a list
    of images.

    A subfolder holds cache.json, which identifies the features, and one file per block. The identity is the backbone's
    fingerprint (weights, options), the behaviour of its transform, the way it is called (rows, memory order), the
    widths of features and logits, and the digest of the images' contents. A block written by another version of this
    package's code counts as absent. Blocks do not depend on the caller's batches, nor rows on their batch, so two
    processes that fill the same cache write the same bytes; each block is complete or absent.
    """

    def __init__(self, folder: str | Path) -> None:
        redo, discard = "extract its features again", "delete its folder to extract its features again"
        self._parts = PartStore(Path(folder), "block of features", redo, IDENTITY, discard, self._code)
        self._recent: _Blocks | None = None

    def distrust(self) -> None:
        """Ignore all blocks that this object has not written itself after this call."""
        self._parts.distrust()
        self._recent = None

    @standard_settings()
    def extract(
        self, backbone: Backbone, images: ImageSource, indices: range, *, workers: int = 2, on_error: OnError = "raise"
    ) -> tuple[tuple[str, ...], Features | None, Failures]:
        """Ids, features (on the CPU; None if no image could be read) and failures of the images at consecutive
        ``indices``.

        Missing blocks are read and extracted as a whole, and may include images outside ``indices``. A block with an
        image that cannot be read is not stored, so that it is tried again in the next pass.
        """
        if indices.step != 1 or (len(indices) and not 0 <= indices.start <= indices.stop <= len(images)):
            raise TrajOODError(f"features: expected consecutive indices within {len(images)} images, got {indices}")
        blocks = self._blocks(backbone, images)
        wanted = {images.ids[i] for i in indices}
        pieces = [
            _select(blocks.block(number, workers, on_error), wanted)
            for number in (range(indices.start // BLOCK, -(-indices.stop // BLOCK)) if len(indices) else ())
        ]
        ids = tuple(i for piece in pieces for i in piece.ids)
        failures = [f for piece in pieces for f in piece.failures]
        if not ids:
            return (), None, failures
        features, logits = (torch.cat([p.tensors[name] for p in pieces]) for name in ("features", "logits"))
        return ids, Features(features, logits if backbone.classes else None), failures

    def _code(self) -> str:
        """The digest of the code that makes the features. Of code that the user imported only that of the backbone
        counts, so that a change in a scorer of your own does not repeat the extraction."""
        backbone = None if self._recent is None else self._recent.backbone
        if isinstance(backbone, OwnFunctions):
            return f"{package_digest()}-{written_code(*backbone.functions(), backbone.module)[:16]}"
        return code_digest() if backbone is None or origin_of(type(backbone)) is not None else package_digest()

    def _blocks(self, backbone: Backbone, images: ImageSource) -> _Blocks:
        """The blocks of this backbone and these images, reused from the last call, because hashing takes a while."""
        with backbone.fixed(), torch.inference_mode():
            backbone.try_once()  # it may reduce chunk
        recent = self._recent
        same = recent is not None and recent.backbone is backbone and recent.weights.are_unchanged()
        weights = recent.weights if recent is not None and same else KnownWeights(backbone)
        if recent is None or not same or recent.images is not images or recent.way != _way_of(backbone):
            recent = self._recent = _Blocks(self._parts, backbone, weights, images)
        return recent


def _way_of(backbone: Backbone) -> tuple[int, bool]:
    """How the backbone is called, which decides rounding."""
    return backbone.chunk, backbone.channels_last


def _select(block: Part, wanted: Collection[str]) -> Part:
    """The rows and failures of the ids ``wanted``."""
    keep = [row for row, image_id in enumerate(block.ids) if image_id in wanted]
    failures = [f for f in block.failures if f["id"] in wanted]
    tensors = block.tensors if len(keep) == len(block.ids) else {k: v[keep] for k, v in block.tensors.items()}
    return Part(tuple(block.ids[row] for row in keep), failures, tensors)


class _Blocks:
    """The blocks of one backbone over one list of images; their ``logits`` are (n, 0) without a classifier."""

    def __init__(self, parts: PartStore, backbone: Backbone, weights: KnownWeights, images: ImageSource) -> None:
        self.backbone, self.weights, self.images, self.way = backbone, weights, images, _way_of(backbone)
        self._parts = parts
        self._contents = images.contents()
        self._recent: tuple[int, Part] | None = None
        identity: dict[str, Any] = {
            "backbone": backbone.name,
            "fingerprint": backbone.fingerprint(),
            "options": backbone.options(),
            "transform": transform_digest(backbone.transform, backbone.input_shape),
            "feature_dim": backbone.feature_dim,
            "classes": backbone.classes,
            "images": images.digest(),
            "count": len(images),
            "block": BLOCK,
            "calls": f"{backbone.chunk}{' channels-last' * backbone.channels_last}",  # they decide the rounding
        }
        names = [identity[name][:16] for name in ("fingerprint", "images", "transform")]
        widths = f"{backbone.feature_dim}x{backbone.classes}"
        self._group = "-".join([*names, identity["calls"].replace(" ", "-"), widths])
        self._claim(as_json(identity), backbone_answers(backbone))

    def _claim(self, mine: dict[str, Any], outputs: list[list[float]] | None) -> None:
        """Write cache.json, or check that an existing one has the same contents."""
        path = self._parts.index(self._group)
        stored = self._parts.open({**mine, "answers": outputs}, self._group)
        different = [key for key in mine if key != "backbone" and mine[key] != stored[key]]
        if different:
            raise TrajOODError(
                f"{path}: holds features of backbone {_short(stored)}, expected those of {_short(mine)} (other "
                f"{', '.join(different)}): choose another cache folder, or delete {path.parent}"
            )
        if outputs is not None and not agree(stored["answers"], outputs):
            raise TrajOODError(
                f"{path}: holds features of a backbone with the same name {mine['backbone']!r} and weights, but other "
                f"outputs, or of an earlier version of traj_ood: give this one another name, or delete {path.parent}"
            )

    def block(self, number: int, workers: int, on_error: OnError) -> Part:
        if self._recent is not None and self._recent[0] == number:
            return self._recent[1]
        key = f"{self._group}/{number * BLOCK:08d}"
        block = self._parts.load(key)
        if block is None:
            indices = range(len(self.images))[number * BLOCK : (number + 1) * BLOCK]
            block = self._extract(indices, workers, on_error)
            check_unchanged(self.images, indices, self._contents)
            if not block.failures:
                self._parts.save(key, block)
        if not block.failures:
            self._recent = (number, block)
        return block

    def _extract(self, indices: range, workers: int, on_error: OnError) -> Part:
        ids: list[str] = []
        failures: Failures = []
        columns: tuple[list[Tensor], list[Tensor]] = ([], [])
        parts = [indices[start : start + _READ_IMAGES] for start in range(0, len(indices), _READ_IMAGES)]
        for batch in read_parts(self.backbone, self.images, parts, workers, on_error):
            ids += batch.ids
            failures += batch.failures
            if batch.ids:
                answer = self.backbone.extract(batch.images)
                columns[0].append(answer.features.cpu())
                columns[1].append(torch.empty(len(batch.ids), 0) if answer.logits is None else answer.logits.cpu())
        widths = (self.backbone.feature_dim, self.backbone.classes)
        features, logits = (torch.cat([torch.empty(0, w), *c]) for w, c in zip(widths, columns, strict=True))
        return Part(tuple(ids), failures, {"features": features, "logits": logits})


def backbone_answers(backbone: Backbone) -> list[list[float]] | None:
    """Sample outputs that identify the code of a user's own backbone; None for the backbones of libraries."""
    if backbone.library != "custom":
        return None

    def outputs(images: Tensor) -> list[Tensor]:
        found = backbone.extract(images)
        return [part for part in (found.features, found.logits) if part is not None]

    return answers(outputs, backbone.input_shape)


def _short(identity: dict[str, Any]) -> str:
    fingerprint, images = (str(identity.get(key))[:12] for key in ("fingerprint", "images"))
    return f"{identity.get('backbone')} ({fingerprint}) over the images {images}"
