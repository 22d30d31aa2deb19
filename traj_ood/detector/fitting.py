"""The passes over the images that a detector is fitted on and calibrated with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from traj_ood.data.batches import Batch
from traj_ood.detector.batch_parts import BatchParts
from traj_ood.dynamics.progress import StepBar
from traj_ood.dynamics.streams import accompanied
from traj_ood.errors import TrajOODError
from traj_ood.io.parts import Part
from traj_ood.scorers import Evidence
from traj_ood.scorers.explored import explored_part
from traj_ood.scorers.scorer_set import OnStep, ScorerSet

SCORES = "scores"
"""Name of the scores among the tensors of a part of the calibration, (B,) float64."""
_Compute: TypeAlias = Callable[[ScorerSet, OnStep, Iterable[Batch]], Iterator[Part]]


@dataclass
class Covered:
    """The results for the images of a pass that could be read.

    Attributes:
        parts: one per batch with such images.
        ids, rows: names of these images, and their positions in the input.
        labels: their class labels, if the input yields them with the images, else empty.
        skipped: number of images that could not be read.
    """

    parts: list[Part] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    skipped: int = 0

    def column(self, name: str) -> Tensor:
        """The tensor ``name`` of all parts, one row per image; empty, of float64, if no image could be read."""
        if not self.parts:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        return torch.cat([part.tensors[name] for part in self.parts])


def cover(
    batches: Iterable[Batch], scorers: ScorerSet, compute: _Compute, store: BatchParts, progress: StepBar
) -> Covered:
    """Make a pass over the images with :func:`explored_parts` or :func:`scored_parts`; batches that are stored are not
    computed again."""
    found = Covered()
    with progress as bar:

        def counted() -> Iterator[Batch]:
            for batch in batches:
                bar.skip(len(batch.failures))
                bar.begin(len(batch.ids))
                yield batch

        for batch, part in store.each(counted(), partial(compute, scorers, bar.on_step)):
            bar.finish(len(batch.ids))
            found.parts += [part] if batch.ids else []
            found.ids += batch.ids
            found.rows += batch.rows
            found.labels += batch.labels
            found.skipped += len(batch.failures)
    return found


def explored_parts(scorers: ScorerSet, on_step: OnStep, batches: Iterable[Batch]) -> Iterator[Part]:
    """The training pass: the part of each batch, with the evidence that the scorer is fitted on and the end points.

    Raises:
        TrajOODError: the model's values on an image become NaN or infinite.
    """
    examine = scorers.autoencoder.examine
    encoded = (((examine(batch.images), batch.ids), batch.ids) for batch in batches)
    for ids, (ends, evidence) in accompanied(partial(scorers.explore_all, on_step=on_step), encoded):
        _check_finite(evidence, ids)
        yield explored_part(ids, ends, evidence)


def scored_parts(scorers: ScorerSet, on_step: OnStep, batches: Iterable[Batch]) -> Iterator[Part]:
    """The scores of each batch by the set's one scorer."""
    encoded = ((scorers.autoencoder.examine(batch.images), batch.ids) for batch in batches)
    for ids, found in accompanied(partial(scorers.score_all, on_step=on_step), encoded):
        yield Part(ids, tensors={SCORES: found.scores[scorers.labels[0]]})


def _check_finite(evidence: Evidence, ids: tuple[str, ...]) -> None:
    for values in evidence.tensors().values():
        bad = (~values.reshape(len(values), -1).isfinite().all(dim=1)).nonzero()[:, 0]
        if len(bad):
            raise TrajOODError(
                f"training image {ids[int(bad[0])]!r}: the model's values become NaN or infinite ({len(bad)} such "
                f"images in a batch of {len(ids)}): check the model"
            )
