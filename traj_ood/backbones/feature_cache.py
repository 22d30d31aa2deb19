"""Features of a frozen backbone, extracted once: one file per block of images, whatever batches are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from traj_ood.backbones import Backbone, Features
from traj_ood.data import ImageSource
from traj_ood.data.images import check_unchanged
from traj_ood.dynamics.behaviour import agree, answers, transform_digest
from traj_ood.errors import TrajOODError
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import code_digest

Failures = list[dict[str, str]]
Read = Callable[[range], tuple[tuple[str, ...], Tensor, Failures]]
"""Indices → ids, images (B, C, H, W) and failures ({id, error}) of what could be read; it may raise instead."""

BLOCK = 512  # images per file
_READ = 128  # images in memory at a time: at 224 x 224 a whole block would take 300 MB
IDENTITY = "cache.json"


class FeatureCache:
    """``folder/<backbone>-<images>/``: cache.json, which says whose features these are, and one file per block.

    The key is the backbone's fingerprint (weights, options), what its transform does, and the digest of the images'
    contents, and all of them stand in cache.json in full. A block that other code of this package has written counts as
    absent. Blocks are the same whatever the caller's batches, and a row of features never depends on its batch; so two
    processes that fill one cache write the same bytes, and each block is whole or absent.

    Args:
        folder: made when the first block is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._own: set[Path] | None = None
        self._recent: tuple[Backbone, ImageSource, _Store] | None = None

    def distrust(self) -> None:
        """From now on believe only blocks that this object writes from now on."""
        self._own, self._recent = set(), None

    def extract(
        self, backbone: Backbone, images: ImageSource, indices: range, read: Read
    ) -> tuple[tuple[str, ...], Features | None, Failures]:
        """Ids, features (on the CPU) and failures of the images ``indices``, in their order.

        What no file holds is read and extracted in whole blocks. A block with an image that cannot be read is not
        stored: each pass asks ``read`` again, which raises or skips as its caller wants, and repaired images count.

        Args:
            backbone: the frozen network. images: the whole list. indices: consecutive, within the list.
            read: called only for what is not stored, with consecutive indices that may lie outside ``indices``.
        Returns:
            None in place of features when no image could be read.
        Raises:
            TrajOODError: indices outside the list, a cache of something else, a damaged file, an unwritable folder,
                images that changed since the first call, or what ``read`` raises.
        """
        if indices.step != 1 or (len(indices) and not 0 <= indices.start <= indices.stop <= len(images)):
            raise TrajOODError(f"features: expected consecutive indices within {len(images)} images, got {indices}")
        store = self._store(backbone, images)
        pieces = [
            store.block(number, read).select(images, indices)
            for number in (range(indices.start // BLOCK, -(-indices.stop // BLOCK)) if len(indices) else ())
        ]
        ids = tuple(i for piece in pieces for i in piece.ids)
        failures = [f for piece in pieces for f in piece.failures]
        if not ids:
            return (), None, failures
        logits = torch.cat([p.logits for p in pieces]) if backbone.classes else None
        return ids, Features(torch.cat([p.features for p in pieces]), logits), failures

    def _store(self, backbone: Backbone, images: ImageSource) -> _Store:
        """The store of the last call when it is asked for again: hashing weights and pixels takes a while."""
        if self._recent is None or self._recent[0] is not backbone or self._recent[1] is not images:
            self._recent = (backbone, images, _Store(self._folder, backbone, images, self._own))
        return self._recent[2]


@dataclass(frozen=True)
class _Block:
    """Rows of the images that could be read; ``logits`` is (n, 0) without a classifier."""

    ids: tuple[str, ...]
    features: Tensor
    logits: Tensor
    failures: Failures

    def select(self, images: ImageSource, indices: range) -> _Block:
        """The rows and failures of ``indices``."""
        wanted = {images.ids[i] for i in indices}
        keep = [row for row, image_id in enumerate(self.ids) if image_id in wanted]
        failures = [f for f in self.failures if f["id"] in wanted]
        if len(keep) == len(self.ids):
            return _Block(self.ids, self.features, self.logits, failures)
        return _Block(tuple(self.ids[row] for row in keep), self.features[keep], self.logits[keep], failures)


class _Store:
    """The blocks of one backbone over one list of images.

    Args:
        own: blocks that alone are believed, to which those written here are added; None believes all.
    """

    def __init__(self, folder: Path, backbone: Backbone, images: ImageSource, own: set[Path] | None) -> None:
        self._backbone, self._images, self._own = backbone, images, own
        self._contents = images.contents()
        self._identity: dict[str, Any] = {
            "backbone": backbone.name,
            "fingerprint": backbone.fingerprint(),
            "options": backbone.options(),
            "transform": transform_digest(backbone.transform),
            "feature_dim": backbone.feature_dim,
            "classes": backbone.classes,
            "images": images.digest(),
            "count": len(images),
            "block": BLOCK,
        }
        key = (self._identity[name] for name in ("fingerprint", "images", "transform"))
        self._folder = folder / "-".join(part[:16] for part in key)
        self._recent: tuple[int, _Block] | None = None
        self._claim()

    def _claim(self) -> None:
        """Write cache.json, or check that the one that is there says the same."""
        path = self._folder / IDENTITY
        mine = json.loads(json.dumps(self._identity, default=str))
        said = backbone_answers(self._backbone)
        if not path.is_file():
            strangers = sorted(self._folder.glob("*.safetensors"))
            if strangers and not path.is_file():  # another process may have written it meanwhile
                raise TrajOODError(f"{strangers[0]}: features without {IDENTITY} beside them: delete {self._folder}")
            write_atomic(path, (json.dumps({**mine, "answers": said}, indent=2, sort_keys=True) + "\n").encode())
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            stored = None
        if not isinstance(stored, dict):
            raise TrajOODError(f"{path}: damaged: delete {self._folder} to extract its features again")
        different = [key for key in mine if key != "backbone" and mine[key] != stored.get(key)]
        if different:
            raise TrajOODError(
                f"{path}: holds features of backbone {_short(stored)}, expected those of {_short(mine)} (other "
                f"{', '.join(different)}): choose another cache folder, or delete {self._folder}"
            )
        if said is not None and not agree(stored.get("answers"), said):
            raise TrajOODError(
                f"{path}: holds features of a backbone with the name {mine['backbone']!r} and the weights of this one "
                f"that computes something else of them: give this one another name, or delete {self._folder}"
            )

    def block(self, number: int, read: Read) -> _Block:
        if self._recent is not None and self._recent[0] == number:
            return self._recent[1]
        path = self._folder / f"{number * BLOCK:08d}.safetensors"
        indices = range(number * BLOCK, min((number + 1) * BLOCK, len(self._images)))
        block = self._load(path, indices) if self._is_believed(path) else None
        if block is None:
            block = self._extract(path, indices, read)
        if not block.failures:
            self._recent = (number, block)
        return block

    def _is_believed(self, path: Path) -> bool:
        return path.is_file() and (self._own is None or path in self._own)

    def _extract(self, path: Path, indices: range, read: Read) -> _Block:
        ids: list[str] = []
        failures: Failures = []
        columns: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start in range(indices.start, indices.stop, _READ):
            got, images, failed = read(range(start, min(start + _READ, indices.stop)))
            ids += got
            failures += failed
            answer = self._backbone.extract(images) if got else None
            if answer is not None:
                columns[0].append(answer.features.cpu())
                columns[1].append(answer.logits.cpu() if answer.logits is not None else torch.empty(len(got), 0))
        widths = (self._backbone.feature_dim, self._backbone.classes)
        features, logits = (torch.cat([torch.empty(0, w), *c]) for w, c in zip(widths, columns, strict=True))
        block = _Block(tuple(ids), features, logits, failures)
        check_unchanged(self._images, indices, self._contents)
        if not failures:
            tensors = {"features": features, "logits": logits}
            header = {"ids": json.dumps(ids), "sha256": _checksum(features, logits), "code": code_digest()}
            write_atomic(path, save(tensors, metadata=header))
            if self._own is not None:
                self._own.add(path)
        return block

    def _load(self, path: Path, indices: range) -> _Block | None:
        """The block, or None where other code has written it."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                if header.get("code") != code_digest():
                    return None
                features, logits = file.get_tensor("features"), file.get_tensor("logits")
            ids = tuple(json.loads(header["ids"]))
            whole = header["sha256"] == _checksum(features, logits)
        except Exception as error:  # safetensors has an error class of its own
            raise TrajOODError(f"{path}: damaged ({error}): delete this file to extract its features again") from error
        shapes = (tuple(features.shape), tuple(logits.shape))
        expected = ((len(indices), self._backbone.feature_dim), (len(indices), self._backbone.classes))
        if not whole or shapes != expected or ids != tuple(self._images.ids[i] for i in indices):
            raise TrajOODError(
                f"{path}: damaged, or of other images (expected {expected[0]} features, got {shapes[0]}): delete this "
                "file to extract its features again"
            )
        return _Block(ids, features, logits, [])


def backbone_answers(backbone: Backbone) -> list[float | None] | None:
    """What a backbone of the user's own answers, which nothing else tells of its code; None for the libraries'."""
    if backbone.library != "custom":
        return None

    def joint(images: Tensor) -> Tensor:
        found = backbone.extract(images)
        return found.features if found.logits is None else torch.cat([found.features, found.logits], dim=1)

    return answers(joint, backbone.input_shape)


def _short(identity: dict[str, Any]) -> str:
    fingerprint, images = (str(identity.get(key))[:12] for key in ("fingerprint", "images"))
    return f"{identity.get('backbone')} ({fingerprint}) over the images {images}"


def _checksum(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
