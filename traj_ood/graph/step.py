"""One step of f with its measures, and the loop over steps, which an exported graph contains only once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from traj_ood.autoencoders import Autoencoder, FeatureView
from traj_ood.graph.dense_index import DenseIndex

EXAMPLE_ROWS = 3
"""Rows of the example batch while recording: torch.export would treat 0 and 1 as constants."""


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


class Step(nn.Module):
    """One round of :func:`traj_ood.iterate` for a whole batch, which returns points in ``views`` and measures distances
    in those of ``attractors``.

    Samples that have converged stay where they are; those that became NaN or infinite are NaN from then on. Measures of
    both are NaN, as always after the end of a path.
    """

    def __init__(self, autoencoder: Autoencoder, attractors: Tensors, views: Sequence[FeatureView], tol: float) -> None:
        super().__init__()
        self.network, self.attractors = autoencoder.module, attractors
        self._autoencoder, self._tol, self._views = autoencoder, tol, tuple(views)

    @property
    def names(self) -> list[str]:
        """Names of the values that :meth:`measure` returns."""
        return ["norm", *(f"distance/{view}" for view in self.attractors.all())]

    def prepare(self) -> list[Tensor]:
        """Constants that every step uses: float64 copies of the attractors, and their squared lengths."""
        return [t for points in self.attractors.all().values() for t in DenseIndex(points).prepared]

    def forward(self, latents: Tensor, running: Tensor, first: Tensor, *prepared: Tensor) -> tuple[Tensor, ...]:
        """Take one step from latents (B, *L), of which those that are ``running`` (B,) move; ``prepared`` is that of
        :meth:`prepare`.

        Returns the next latents and ``running``, squared residuals (B,), each measure (B,), and the points (B, …) in
        each view.
        """
        images = self._autoencoder.self_map(latents.clone())  # a clone, as f may begin with an in-place operation
        squared = lengths(images - latents).double().square()
        goes_on = running & squared.isfinite() & lengths(images).isfinite()
        moved = where_rows(running, where_rows(goes_on, images, torch.nan), latents)
        running = goes_on
        residuals = torch.where(running, squared, torch.nan)
        measures = self.measure(moved, running, *prepared)
        points = [self._autoencoder.latent_view(moved, view).clone() for view in self._views]  # scan forbids aliases
        # The first residual does not count for convergence: z0 is not a value of f.
        return moved, running & ((squared >= self._tol) | first), residuals, *measures, *points

    def measure(self, latents: Tensor, running: Tensor, *prepared: Tensor) -> list[Tensor]:
        """The measures, each (B,) float64: ‖z‖, and the distance to the nearest attractor in each view."""
        found = [lengths(latents).double()]
        pairs = zip(prepared[::2], prepared[1::2], strict=True)
        for (view, points), pair in zip(self.attractors.all().items(), pairs, strict=True):
            seen = self._autoencoder.view(latents, view)  # type: ignore[arg-type]
            found.append(DenseIndex(points, pair).nearest(seen).distances[:, 0])
        return [torch.where(running, values, torch.nan) for values in found]


Loop = Callable[[Tensor, Tensor, int, list[Tensor]], list[Tensor]]
"""(latents, running, steps, prepared) → the last latents and ``running``, and the other results of :class:`Step`
stacked to (steps, B, …)."""


@dataclass(frozen=True)
class PlainLoop:
    """A Python loop that calls ``step``: a :data:`Loop` that can be pickled."""

    step: Step

    def __call__(self, latents: Tensor, running: Tensor, steps: int, prepared: list[Tensor]) -> list[Tensor]:
        columns: list[tuple[Tensor, ...]] = []
        for number in range(steps):
            first = torch.tensor(number == 0, device=latents.device)
            latents, running, *rest = self.step(latents, running, first, *prepared)
            columns.append(tuple(rest))
        return [latents, running, *(torch.stack(column) for column in zip(*columns, strict=True))]


@dataclass(frozen=True)
class RecordedStep:
    """``step`` recorded as a graph whose inputs are all tensors it uses, as torch's ``scan`` requires of its body."""

    step: Step
    graph: Any  # takes tensors, then latents, running, first and prepared; returns as Step
    names: tuple[str | None, ...]  # of these tensors among the parameters and buffers of step; None for a constant
    constants: Tensors  # those that are neither, such as a fixed order of patches, in order

    @classmethod
    def of(cls, step: Step, latents: Tensor) -> RecordedStep:
        """Record ``step`` at latents (B, *L) for any B."""
        batch = {0: torch.export.Dim("batch")}
        start = latents[:1].expand(EXAMPLE_ROWS, *latents.shape[1:]).contiguous()
        running, first, prepared = torch.ones(EXAMPLE_ROWS, dtype=torch.bool), torch.tensor(True), step.prepare()
        shapes: tuple[Any, ...] = (batch, batch, None, *([tuple(None for _ in prepared)] if prepared else []))
        program = torch.export.export(step, (start, running, first, *prepared), dynamic_shapes=shapes, strict=False)
        specs = [s for s in program.graph_signature.input_specs if s.kind != InputKind.USER_INPUT]
        own = _own(step)
        constants: dict[str, Any] = program.constants
        loose = {str(s.target): constants[str(s.target)] for s in specs if str(s.target) not in own}
        names = tuple(str(s.target) if str(s.target) in own else None for s in specs)
        return cls(step, program.graph_module, names, Tensors(loose))

    def loop(self) -> Loop:
        """The loop as a ``scan`` over the graph."""
        from torch._higher_order_ops.scan import scan_op

        def run(latents: Tensor, running: Tensor, steps: int, prepared: list[Tensor]) -> list[Tensor]:
            own, loose = _own(self.step), iter(self.constants.all().values())
            tensors = [next(loose) if name is None else own[name] for name in self.names]
            count = len(tensors)

            def body(latents: Tensor, running: Tensor, first: Tensor, *rest: Tensor) -> list[Tensor]:
                return list(self.graph(*rest[:count], latents, running, first, *rest[count:]))

            first = torch.arange(steps, device=latents.device) == 0
            return list(scan_op(body, [latents, running], [first], (*tensors, *prepared)))

        return run


def can_scan() -> bool:
    """Whether this version of torch has a ``scan``, a prototype, that both export formats support."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= (2, 9)


def where_rows(rows: Tensor, chosen: Tensor, other: Tensor | float) -> Tensor:
    """``chosen`` (B, *L) in the ``rows`` (B,) bool, ``other`` elsewhere."""
    return torch.where(rows.view(-1, *[1] * (chosen.ndim - 1)), chosen, other)


def lengths(latents: Tensor) -> Tensor:
    """(B,) norms ‖z‖ of latents (B, *L)."""
    return torch.linalg.vector_norm(latents.flatten(1), dim=1)


def _own(step: Step) -> dict[str, Tensor]:
    return {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers(remove_duplicate=False))}
