"""safetensors files with a JSON header and a digest of tensors and header.

safetensors has no checksum, so that a flipped bit would go unnoticed. Files without the digest, written by older
versions or other programs, are read unchecked.
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
from safetensors.torch import load_file, save
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.io.checkpoints import why_unreadable
from traj_ood.io.files import write_atomic

DIGEST = "traj_ood_sha256"
"""Key of the digest in a file's metadata."""
_FORMAT = {"format": "pt"}  # required by transformers
# Keys that libraries add to a config on their own, and that have no effect; the digest leaves them out.
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
        # Cloned, because a one-element tensor counts as contiguous with any stride, but cannot be viewed as bytes.
        values = value.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any] | None = None,
    *,
    beside: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write tensors to one file atomically; the same content always gives the same bytes.

    Tensors may be on any device and share memory. ``header`` has JSON values by key. ``beside`` are JSON objects of
    other files, such as a model's config, that the digest covers as well.
    """
    # Cloned, since safetensors refuses tensors that share memory.
    plain = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    texts = {key: json.dumps(value, sort_keys=True) for key, value in (header or {}).items()}
    # The metadata are inserted here, because safetensors writes several of them in random order.
    content = memoryview(save(plain))
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = {**_FORMAT, **texts, DIGEST: _digest(plain, texts, beside)}
    layout = {"__metadata__": metadata, **json.loads(bytes(content[8:end]))}
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the tensors, too
    write_atomic(path, lambda file: file.writelines([len(text).to_bytes(8, "little"), text, content[end:]]))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU, not yet compared with its digest (see
    :func:`check_digest`). Errors of safetensors pass through."""
    return load_file(path)


@contextmanager
def open_tensors(path: str | Path, what: str, fix: str) -> Iterator[TensorFile]:
    """Context manager that yields the content of a file that :func:`write_tensors` wrote, called ``what`` in messages;
    any exception in the ``with`` block is reported as damage, with the advice ``fix``."""
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
    except Exception as error:  # safetensors has its own error classes, and the block may raise any
        raise TrajOODError(f"{path}: not a readable {what} ({why_unreadable(error)}): {fix}") from error


def check_digest(path: Path, weights: Mapping[str, Tensor], *beside: Mapping[str, Any]) -> None:
    """Compare a model's weights, by their names in the file ``path``, and the JSON objects of the files beside it with
    the digest that :func:`write_tensors` recorded."""
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
    """A value of the header; older versions wrote some texts without JSON quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return text
