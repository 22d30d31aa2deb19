"""One safetensors file: tensors, a JSON header, and the digest of both that safetensors itself does not keep.

Without it a flipped bit is just another number. Files of older versions, and those of others, have none and are taken
as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.io.checkpoints import reason_of
from traj_ood.io.files import write_atomic

DIGEST = "traj_ood_sha256"
"""Key of the digest among the metadata of a file."""
_FORMAT = {"format": "pt"}  # without it transformers refuses the file
# What libraries write into a config of their own accord, and what decides nothing.
_UNSEALED = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class TensorFile:
    """The content of a file: tensors by name, on the CPU, and the header's JSON values by key."""

    tensors: dict[str, Tensor]
    header: dict[str, Any]


def digest_of(tensors: Mapping[str, Tensor], declared: Any) -> str:
    """sha256 (hex) over the JSON of ``declared`` and every name, shape, dtype and byte of the tensors."""
    digest = hashlib.sha256(json.dumps(declared, sort_keys=True, default=str).encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        # Cloned: one element of any stride counts as contiguous, and yet cannot be viewed as bytes.
        values = value.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any] | None = None,
    *,
    beside: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write one file, atomically; the same content always gives the same bytes.

    Args:
        path: of the file; missing folders are made.
        tensors: on any device; they may share memory.
        header: plain data for JSON, by key.
        beside: JSON objects in other files, such as a model's config, that the digest covers, too.
    Raises:
        TrajOODError: the folder cannot be written.
    """
    # Cloned, since safetensors refuses tensors that share memory.
    plain = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    texts = {key: json.dumps(value, sort_keys=True) for key, value in (header or {}).items()}
    # Of several metadata safetensors makes a header of random order, so they are put into it here.
    content = memoryview(save(plain))
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = {**_FORMAT, **texts, DIGEST: _digest(plain, texts, beside)}
    layout = {"__metadata__": metadata, **json.loads(bytes(content[8:end]))}
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the tensors, too
    write_atomic(path, lambda file: file.writelines([len(text).to_bytes(8, "little"), text, content[end:]]))


@contextmanager
def open_tensors(path: Path, what: str, fix: str) -> Iterator[TensorFile]:
    """The content of a file; whatever fails while it is read, or understood in the ``with`` block, means damage.

    Args:
        path: of a file that :func:`write_tensors` wrote.
        what: it is, for errors: ``attractor dictionary``.
        fix: what to do about a damaged one, for errors.
    Raises:
        TrajOODError: missing, no safetensors file, changed since it was written, or what the block raises.
    """
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        expected = texts.pop(DIGEST, None)
        texts = {key: text for key, text in texts.items() if key not in _FORMAT}
        if expected is not None and expected != _digest(tensors, texts, ()):
            raise ValueError("its content has changed since it was written")
        yield TensorFile(tensors, {key: _value(text) for key, text in texts.items()})
    except TrajOODError:
        raise
    except Exception as error:  # safetensors has error classes of its own, and the block's may be any
        raise TrajOODError(f"{path}: not a readable {what} ({reason_of(error)}): {fix}") from error


def check_digest(path: Path, weights: Mapping[str, Tensor], *beside: Mapping[str, Any]) -> None:
    """Refuse a model's weights that differ from what :func:`write_tensors` wrote, or whose JSON files do.

    Args:
        path: a file of weights. weights: its tensors, by their names in it. beside: the JSON objects read beside it.
    Raises:
        TrajOODError: damaged or edited.
    """
    if path.suffix != ".safetensors":
        return
    with safe_open(path, framework="pt") as file:
        expected = (file.metadata() or {}).get(DIGEST)
    if expected is not None and expected != _digest(weights, {}, beside):
        raise TrajOODError(
            f"{path}: damaged or edited: it or the JSON files beside it have changed since they were saved: copy or "
            "save the model again"
        )


def _digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str], beside: Sequence[Mapping[str, Any]]) -> str:
    declared = [{key: value for key, value in tree.items() if key not in _UNSEALED} for tree in beside]
    return digest_of(tensors, [*declared, *([texts] if texts else [])])


def _value(text: str) -> Any:
    """A header's value; older versions wrote some texts as they were."""
    try:
        return json.loads(text)
    except ValueError:
        return text
