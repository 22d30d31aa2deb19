"""The two passes of a run over its images, in batches: the fit on training images, and scoring."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from traj_ood.attractors import AttractorDictionary
from traj_ood.attractors.health import still_falling
from traj_ood.autoencoders import Encoding, SurrogateAutoencoder
from traj_ood.backbones.feature_cache import FeatureCache
from traj_ood.data import Benchmark, Split
from traj_ood.data.batches import OnError, ranges_of, read_rows
from traj_ood.dynamics.progress import StepBar
from traj_ood.dynamics.trajectory import join_tables
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.parallel import Team
from traj_ood.evaluation.snapshot import Snapshot
from traj_ood.io.parts import Part, PartStore
from traj_ood.scorers import Evidence
from traj_ood.scorers.explored import explored_part, joined_parts
from traj_ood.scorers.labels import class_numbers
from traj_ood.scorers.scorer_set import Scored, ScorerSet

PartsBySplit: TypeAlias = dict[str, list[Part]]
"""The parts of all batches in order, by split."""


@dataclass
class Passes:
    """Reads, encodes, iterates and scores the images of a run, and stores every batch as soon as it is finished, so
    that an interrupted run continues with the next one.

    Attributes:
        scorers: the scorers.
        sample: the benchmark, reduced to the images of the run.
        snapshot: the contents of the images at the beginning of the run.
        parts: the store of finished batches.
        batch_sizes: images per batch of each split.
        team, cache, workers, on_error, quiet: see :class:`traj_ood.Evaluator` and :class:`traj_ood.RunConfig`.
        failures: ``{id, error}`` of every skipped image, in order.
        seconds: wall-clock seconds of this process by stage, ``fit`` and ``score/<split>`` for each split, of which an
            interrupted run counts what it has kept.
        still_falling: see :func:`traj_ood.attractors.health.still_falling`; None before :meth:`fit`.
    """

    scorers: ScorerSet
    sample: Benchmark
    snapshot: Snapshot
    parts: PartStore
    batch_sizes: dict[str, int]
    team: Team
    cache: FeatureCache | None
    workers: int
    on_error: OnError
    quiet: bool
    failures: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    still_falling: float | None = None

    def fit(self) -> PartsBySplit:
        """The training pass: compute the attractors and fit the scorers, in every process.

        Raises:
            TrajOODError: images cannot be read, have changed or are too few, or another process failed.
        """
        split = self.sample.train
        parts = self._pass([split], fitting=True)
        pieces = parts[split.name]
        self.failures = [f for p in pieces for f in p.failures]
        self.scorers.check_training_size(sum(len(p.ids) for p in pieces))  # again, without skipped images
        dictionary, evidence = joined_parts([p for p in pieces if p.ids])
        if dictionary is not None:
            residuals = join_tables([p.tensors["residuals"] for p in pieces if p.ids])
            self.still_falling = still_falling(residuals, dictionary.statuses)
        self.scorers.learn(dictionary, replace(evidence, labels=_labels_of(split, pieces, self.scorers)))
        return parts

    def score(self) -> PartsBySplit:
        """The scoring pass over all splits except the training split. Only the main process gets the parts.

        Raises:
            TrajOODError: as :meth:`fit`; also if scores are not finite, or no image of a split can be read.
        """
        splits = [self.sample.test, *self.sample.ood]
        scored = self._pass(splits, fitting=False)
        self.failures += [f for split in splits for p in scored[split.name] for f in p.failures]
        for split in splits if self.team.is_main else ():
            if not any(p.ids for p in scored[split.name]):
                raise TrajOODError(f"split {split.name!r}: none of its {len(split.images)} images could be read")
        return scored

    def examine(self, split: Split, indices: range) -> tuple[tuple[str, ...], Encoding | None, list[dict[str, str]]]:
        """Read and encode one batch: the ids of the images read, their encoding (None if there are none), and failures.

        Raises:
            TrajOODError: an image cannot be read, unless ``on_error`` is ``skip``.
        """
        model = self.scorers.autoencoder
        if self.cache is not None and isinstance(model, SurrogateAutoencoder):
            ids, features, failures = self.cache.extract(
                model.backbone, split.images, indices, workers=self.workers, on_error=self.on_error
            )
            return ids, model.examine_features(features) if features is not None else None, failures
        batch = read_rows(model, split.images, indices, self.workers, self.on_error)
        return batch.ids, model.examine(batch.images) if batch.ids else None, batch.failures

    def _pass(self, splits: Sequence[Split], *, fitting: bool) -> PartsBySplit:
        """Compute all batches of some splits that are not stored yet, as one stream, and save each when it is finished.

        Each process computes its share. The main process, or of the training pass every process, returns all batches.
        """
        batches = {split.name: ranges_of(len(split.images), self.batch_sizes[split.name]) for split in splits}
        share = [_Job(split, indices) for split in splits for indices in self.team.share(batches[split.name])]
        pieces: dict[str, Part] = {}
        for job in share:
            part = self.parts.load(job.key)
            if part is not None:
                pieces[job.key] = part
        with StepBar(sum(len(job.indices) for job in share), quiet=self.quiet or not self.team.is_main) as bar:
            bar.skip(sum(len(job.indices) for job in share if job.key in pieces))
            began = time.perf_counter()
            for job, part in self._computed([job for job in share if job.key not in pieces], bar, fitting):
                self.snapshot.check(job.split, job.indices)
                began, before = time.perf_counter(), began
                pieces[job.key] = replace(part, notes={**part.notes, "seconds": began - before})
                self.parts.save(job.key, pieces[job.key])
                bar.finish(len(job.indices))
        for job in share:
            kind = "fit" if fitting else f"score/{job.split.name}"
            self.seconds[kind] = self.seconds.get(kind, 0.0) + pieces[job.key].notes["seconds"]
        self.team.wait()
        if not (fitting or self.team.is_main):
            return {split.name: [] for split in splits}
        return {
            name: [pieces.get(key) or self.parts.get(key) for key in (key_of(name, b.start) for b in ranges)]
            for name, ranges in batches.items()
        }

    def _read(self, jobs: list[_Job], bar: StepBar, taken: deque[_Job]) -> Iterator[tuple[Encoding, tuple[str, ...]]]:
        """The encoding and ids of each batch with at least one readable image; all batches are appended to
        ``taken``."""
        for job in jobs:
            split = job.split
            title = f"{split.role} {split.name}" if split.role != split.name else split.name
            bar.begin(len(job.indices), title)
            taken.append(job)
            try:
                self.team.check()
                job.ids, encoding, job.failures = self.examine(job.split, job.indices)
            except TrajOODError as error:  # raised later, once the batches before it are saved
                job.error = error
                return
            if encoding is not None:
                yield encoding, job.ids

    def _computed(self, jobs: list[_Job], bar: StepBar, fitting: bool) -> Iterator[tuple[_Job, Part]]:
        """Each batch with its part, in order."""
        taken: deque[_Job] = deque()
        read = self._read(jobs, bar, taken)
        found: Iterator[Any] = (
            self.scorers.explore_all(read, bar.on_step)
            if fitting
            else self.scorers.score_all((encoding for encoding, _ in read), bar.on_step)
        )
        for result in found:
            yield from _unreadable(taken)
            job = taken.popleft()
            yield job, _explored(job, *result) if fitting else self._scored(job, result)
        yield from _unreadable(taken)

    def _scored(self, job: _Job, scored: Scored) -> Part:
        """Scores, costs and curves of one batch, without images for which a scorer has no finite score."""
        good, failures = torch.ones(len(job.ids), dtype=torch.bool), list(job.failures)
        for label, values in scored.scores.items():
            bad = (~values.isfinite()).nonzero()[:, 0]
            if len(bad) and self.on_error == "raise":
                raise TrajOODError(
                    f"scorer {label}: {len(bad)} score(s) of split {job.split.name!r} are not finite, first for image "
                    f"{job.ids[int(bad[0])]!r}: its trajectory becomes NaN or infinite; check the model, or leave such "
                    "images out with --on-error skip"
                )
            # An image that one scorer cannot score is left out for all; the error names the first such scorer.
            new = [i for i in bad.tolist() if good[i]]
            failures += [{"id": job.ids[i], "error": f"scorer {label}: the score is not finite"} for i in new]
            good[new] = False
        tensors = {f"score/{label}": values for label, values in scored.scores.items()} | _curves_of(scored.evidence)
        path = scored.evidence.trajectory
        measured = Evidence(trajectory=None if path is None or not good.any() else path.select(good))
        cost = {s.label: s.f_evaluations(measured) if good.any() else 0.0 for s in self.scorers.scorers}
        kept = tuple(name for name, fine in zip(job.ids, good.tolist(), strict=True) if fine)
        return Part(kept, failures, {k: v[good] for k, v in tensors.items()}, {"f_evaluations": cost})


@dataclass
class _Job:
    """One batch of a split, with the ids of the images read, the failures, and the error that ended reading."""

    split: Split
    indices: range
    ids: tuple[str, ...] = ()
    failures: list[dict[str, str]] = field(default_factory=list)
    error: TrajOODError | None = None

    @property
    def key(self) -> str:
        return key_of(self.split.name, self.indices.start)


def key_of(split: str, start: int) -> str:
    """The key in the store of parts of the batch that begins at image ``start`` of a split."""
    return f"{split}-{start:08d}"


def _unreadable(taken: deque[_Job]) -> Iterator[tuple[_Job, Part]]:
    """Remove from the front of ``taken`` the batches without a readable image, and yield their empty parts.

    Raises:
        TrajOODError: the error that ended reading.
    """
    while taken and not taken[0].ids:
        job = taken.popleft()
        if job.error is not None:
            raise job.error
        yield job, Part((), job.failures, {}, {})


def _explored(job: _Job, dictionary: AttractorDictionary | None, evidence: Evidence) -> Part:
    """Evidence, end points and curves of one batch of the training pass."""
    part = explored_part(job.ids, dictionary, evidence, job.failures)
    return replace(part, tensors={**part.tensors, **_curves_of(evidence)})


def _curves_of(evidence: Evidence) -> dict[str, Tensor]:
    """Steps, status, residuals and norms of the trajectories, by name; empty if f was not iterated."""
    path = evidence.trajectory
    if path is None:
        return {}
    curves = {"residuals": path.residuals.float(), "norm": path.measure("norm").float()}
    return {"steps": path.steps, "status": path.status, **curves}


def _labels_of(split: Split, pieces: list[Part], scorers: ScorerSet) -> Tensor | None:
    """(N,) int64 classes of the images that were read, or None if the split has no labels."""
    if not split.images.labels:
        return None
    label_of = dict(zip(split.images.ids, split.images.labels, strict=True))
    labels = [label_of[i] for p in pieces for i in p.ids]
    return class_numbers(labels, len(labels), scorers.autoencoder.classes)


def even_size(count: int, most: int, processes: int) -> int:
    """Images per batch, at most ``most``, so that all processes have the same, smallest possible number of batches."""
    rounds = math.ceil(count / (most * processes))
    return math.ceil(count / (rounds * processes))
