"""Modules that store named tensors as buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Tensors(nn.Module):
    """Buffers under any names, also those that a buffer cannot have, such as ``0/grid/means``."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {name: f"tensor_{number}" for number, name in enumerate(tensors)}
        for name, tensor in tensors.items():
            self.register_buffer(self._names[name], tensor.detach().contiguous())

    def all(self) -> dict[str, Tensor]:
        return {name: getattr(self, buffer) for name, buffer in self._names.items()}


class PinnedTensors(Tensors):
    """Buffers that ``.to(device)`` and ``.half()`` leave unchanged."""

    def _apply(self, fn: Any, recurse: bool = True) -> PinnedTensors:
        return self
