"""CompiledMap: f through torch.compile, for one shape, with f itself as fallback."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from traj_ood.text import brief


class CompiledMap:
    """``self_map`` (n, *L) → (n, *L), compiled at its first call for that call's shape.

    Scores change by rounding (1e-5 relative), because kernels are fused and sums taken in another order. The engine
    calls f on one number of rows, so one shape is compiled; for other shapes ``self_map`` itself is called.

    Args:
        self_map: f.
        rows: number of rows of the calls to compile for; other calls go to ``self_map``. Default: that of the first
            call.
        graphs: whether to record CUDA graphs, too (``mode="reduce-overhead"``), for networks whose kernels take less
            time than their launch. Results share one buffer, so each is copied.
    Attributes:
        fell_back: why the compiler failed and ``self_map`` is called instead; empty if it did not.
    """

    def __init__(self, self_map: Callable[[Tensor], Tensor], *, rows: int | None = None, graphs: bool = False) -> None:
        self._map, self._rows, self._graphs = self_map, rows, graphs
        # As of a bound method: the engine puts this model into evaluation mode, and names it in messages.
        self.__self__ = getattr(self_map, "__self__", None)
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._shape: tuple[int, ...] | None = None
        self.fell_back = ""

    def __call__(self, latents: Tensor) -> Tensor:
        if self.fell_back or not self._is_compiled_for(latents):
            return self._map(latents)
        try:
            if self._compiled is None:
                mode = "reduce-overhead" if self._graphs else "default"
                self._compiled = torch.compile(self._map, dynamic=False, mode=mode)
                self._shape = tuple(latents.shape)
            if self._graphs:
                torch.compiler.cudagraph_mark_step_begin()
                return self._compiled(latents).clone()
            return self._compiled(latents)
        except Exception as error:  # any error of the compiler; an error of f is raised again by the next line
            answer = self._map(latents)
            self.fell_back = f"{type(error).__name__}: {brief(error)}"
            warnings.warn(f"torch.compile failed, f runs uncompiled ({self.fell_back})", stacklevel=2)
            return answer

    def _is_compiled_for(self, latents: Tensor) -> bool:
        """Whether f is compiled for latents of this shape, or will be at this call."""
        if self._shape is not None:
            return tuple(latents.shape) == self._shape
        return self._rows in (None, len(latents))
