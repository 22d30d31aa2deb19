"""The evaluator: a benchmark, a model and scorers in; one Result with per-image scores out; resumable."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from traj_ood.attractors import AttractorDictionary
from traj_ood.attractors.health import (
    Facts,
    drawn_attractors,
    explained,
    explained_hidden,
    judge,
    reconstruction_errors,
    share_stable,
    still_falling,
)
from traj_ood.autoencoders import Autoencoder, Encoding, SurrogateAutoencoder
from traj_ood.backbones.feature_cache import FeatureCache
from traj_ood.data import Benchmark, Split, preflight
from traj_ood.data.batches import OnError, read_rows
from traj_ood.data.benchmark import Copies
from traj_ood.data.contents import distrust
from traj_ood.dynamics.behaviour import agree, answers, transform_digest
from traj_ood.dynamics.jacobian import spectral_radii
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError, unknown_name, warn
from traj_ood.evaluation.curves import curve_quantiles
from traj_ood.evaluation.gallery import FILE_NAME as GALLERY_NAME
from traj_ood.evaluation.gallery import keep_pictures
from traj_ood.evaluation.metrics import bootstrap, check_scores, compute_metrics
from traj_ood.evaluation.parallel import Team
from traj_ood.evaluation.results import FILE_NAME, Result, ScorerResult, SetScore
from traj_ood.evaluation.snapshot import Snapshot
from traj_ood.index import Approximate, Backend
from traj_ood.io.files import alone_in, empty_folder, write_atomic
from traj_ood.io.parts import Part, PartStore
from traj_ood.io.provenance import code_digest, environment, git_commit
from traj_ood.scorers import Evidence
from traj_ood.scorers.scorer_set import Precision, Scored, ScorerSet
from traj_ood.text import printable

OnDuplicates = Literal["error", "warn"]
_Pieces: TypeAlias = dict[str, list[Part]]
_Compute: TypeAlias = "Callable[[list[_Job], _Bar], Iterator[tuple[_Job, Part]]]"
_LATENT_BYTES = 2**26
_MAX_BATCH = 512  # images: what an interruption loses are the two or three batches under way
_SEEN = 200  # ID images whose reconstruction is looked at: a share of their variance is known to a few percent
_FEW_COPIES = 0.01  # share of a split; CIFAR and ImageNet hold a few images twice, and stay usable
_MOST_RESAMPLES = 1_000_000  # beyond them intervals gain nothing, and a run seems to hang


@dataclass(frozen=True)
class RunConfig:
    """What decides a run's numbers; part of the result. Where and how fast it is computed is not (see Evaluator).

    Attributes:
        scorers: specs, see :func:`traj_ood.create_scorer`; ``all`` is the default suite.
        attractors: ID training images that every scorer learns from. Default: the benchmark's own protocol
            (2,000 as in the paper), else all.
        per_set: most images per test and OOD set. Default: the benchmark's own protocol, else all.
        seed: of the training sample.
        tol, max_steps: of :func:`traj_ood.iterate`; the paper's.
        resamples: bootstrap resamples for the 95 % intervals; 0 for none.
        precision, approximate: see :class:`traj_ood.ScorerSet`; exact float32 by default.
        on_error: ``raise`` (default) or ``skip`` images that cannot be read or have no finite score, which are
            then counted in the result.
    """

    scorers: tuple[str, ...] = ("all",)
    attractors: int | None = None
    per_set: int | None = None
    seed: int = 0
    tol: float = 1e-5
    max_steps: int = 500
    resamples: int = 500
    precision: Precision = "fp32"
    approximate: Approximate = "none"
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        """Raises ``TrajOODError`` for values no run can have, before anything is computed or written."""
        _at_least("tol", self.tol, 0)
        _at_least("max_steps", self.max_steps, 1)
        _at_least("resamples", self.resamples, 0)
        _at_most("tol", self.tol, sys.float_info.max)
        _at_most("resamples", self.resamples, _MOST_RESAMPLES)
        if self.on_error not in get_args(OnError):
            raise unknown_name("value of on_error", str(self.on_error), get_args(OnError))


@dataclass
class Evaluator:
    """Runs a benchmark.

    Attributes:
        autoencoder, benchmark, config: what to run.
        out: folder under which the run's own folder is made.
        batch_size: most images at a time; default: as many as keep their latents under 256 MiB, at most 2,048. It
            changes memory and how much an interruption can lose, not results. A split is cut into batches of equal
            size, as many for each process.
        workers: threads that read images.
        backend: of the neighbour index.
        quiet: no progress bars.
        command: recorded in the result.
        cache: where a surrogate's backbone keeps its features; default: nowhere. It changes time, not results.
        team: the processes that share the work, see :meth:`traj_ood.evaluation.parallel.Team.join`; default: this one
            alone. Each builds its own evaluator of the same settings, and ``out`` is a folder that all of them see.
        on_duplicates: ``error`` or ``warn`` of images that two splits share by content (see
            :meth:`traj_ood.data.Benchmark.copies`). The default warns of up to 1 % of a split and refuses more: real
            data sets hold a few images twice; a test set that was trained on says nothing. The result counts them.
        pictures: keep what a report shows (:mod:`traj_ood.evaluation.gallery`: some images of the benchmark, made
            small). It takes seconds and changes no result; a finished run without them gets them when it is run again.
    """

    autoencoder: Autoencoder
    benchmark: Benchmark
    config: RunConfig
    out: str | Path
    batch_size: int | None = None
    workers: int = 2
    backend: Backend = "auto"
    quiet: bool = False
    command: str = ""
    cache: FeatureCache | None = None
    team: Team = field(default_factory=Team)
    pictures: bool = True
    on_duplicates: OnDuplicates | None = None
    _seconds: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        bench, config = self.benchmark, self.config
        _at_least("workers", self.workers, 1)
        if self.batch_size is not None:
            _at_least("batch size", self.batch_size, 1)
        if self.on_duplicates not in (None, *get_args(OnDuplicates)):
            raise unknown_name("value of on_duplicates", str(self.on_duplicates), get_args(OnDuplicates))
        self.sample = bench.subsample(
            train=config.attractors if config.attractors is not None else _protocol(bench),
            per_set=config.per_set if config.per_set is not None else bench.test_size,
            seed=config.seed,
        )
        self.scorers = ScorerSet(
            self.autoencoder,
            config.scorers,
            tol=config.tol,
            max_steps=config.max_steps,
            backend=self.backend,
            approximate=config.approximate,
            precision=config.precision,
        )
        self.scorers.check_training_size(len(self.sample.train.images))
        self.out = Path(self.out)
        self.name = f"{bench.name}--{re.sub('[/:]', '-', self.autoencoder.name)}--seed{config.seed}"
        self.folder = self.out / self.name
        rerun = "discard the unfinished run with --fresh"
        self.parts = PartStore(self.folder / "parts", "batch of a run", "compute its batch again", "run.json", rerun)
        self.failures: list[dict[str, str]] = []
        self._still_falling: float | None = None

    def run(self, fresh: bool = False) -> Result:
        """Compute what is missing, write everything, and return the result; a finished run is returned as it is.

        A finished run is known by its images' contents, its model and its settings. One that other code of this package
        has made is returned, too, with a warning that says so; an unfinished one is refused.

        Args:
            fresh: discard what an earlier run left in the folder, and believe no cache: images are hashed and features
                extracted anew.
        Raises:
            TrajOODError: bad data, images that two splits share (see ``on_duplicates``) or that change during the run,
                a folder that cannot be written, one that holds a run of other images, settings or code or where another
                run is at work, more processes than images, or a process that failed (see
                :meth:`traj_ood.evaluation.parallel.Team.together`).
        Warns:
            UserWarning: images that two splits share, or a finished run that other code has made.
        """
        # The main process speaks for its team: a second team would mix its batches with ours, or discard them.
        alone = alone_in(self.folder) if self.team.is_main else nullcontext()
        with self.team.together(), alone:
            self._refuse_idle_processes()
            identity, batch_sizes = self.team.main_first(lambda: self._open(fresh))
            result = None if batch_sizes is None else self._compute(identity, batch_sizes)
            result = result or Result.load(self.folder / FILE_NAME)
            self._add_pictures(result)
            return result

    def _compute(self, identity: dict[str, Any], batch_sizes: dict[str, int]) -> Result | None:
        """Every pass, by all processes; then the main one measures what they scored, and has the result."""
        result = None
        train_curves = self._fit(batch_sizes)
        scored = self._score(batch_sizes)
        if self.team.is_main:
            result = self._finish(identity, scored, train_curves)
            self.parts.remove()
        self.team.wait()
        return result

    def _refuse_idle_processes(self) -> None:
        smallest = min(self._used_splits(), key=lambda s: len(s.images))
        if self.team.size > len(smallest.images):
            raise TrajOODError(
                f"{self.team.size} processes for {len(smallest.images)} images of split {smallest.name!r}: expected at "
                f"most {len(smallest.images)}; start fewer processes"
            )

    def _open(self, fresh: bool) -> tuple[dict[str, Any], dict[str, int] | None]:
        """Identity, and the batch size of each split, those of the unfinished run if there is one; None for a finished
        run."""
        if fresh:
            if self.team.is_main:
                empty_folder(self.folder, first=FILE_NAME)  # the result says that the rest is there
                distrust()
            if self.cache is not None:
                self.cache.distrust()
        self._snapshot = Snapshot(self.sample.splits())
        copies = self.sample.copies(self._snapshot.contents)
        identity = self._identity(copies)
        finished = self.folder / FILE_NAME
        if finished.is_file():
            self._check_finished(identity, Result.load(finished))
            if self.team.is_main:
                self.parts.remove()  # left there by a process that died as it removed them
            return identity, None
        if self.team.is_main:
            self._check_images()
            self._check_copies(copies)
        elif not self.parts.index().is_file():
            raise TrajOODError(
                f"{self.folder}: process {self.team.rank} does not see what the main process wrote there: expected "
                "--out to be one folder that all processes share"
            )
        mine = {**identity, "code": code_digest()}
        stored = self.parts.open({**mine, "batch_sizes": self._batch_sizes()})
        batch_sizes = stored.pop("batch_sizes")
        if self.team.is_main and self._are_repaired(mine, stored, batch_sizes):
            stored = mine
            self.parts.claim({**mine, "batch_sizes": batch_sizes})
        self._refuse_other(mine, stored)
        if self.team.is_main:
            self._snapshot.save(self.folder)
        return identity, batch_sizes

    def _are_repaired(self, mine: dict[str, Any], stored: dict[str, Any], batch_sizes: dict[str, int]) -> bool:
        """Whether all that differs are images that no part was made of, such as the damaged one that ended the run."""
        changed = self._snapshot.changed(self.folder)
        lists = [{name: split["sha256"] for name, split in some["data"].items()} for some in (mine, stored)]
        other = [key for key in mine if key != "data" and _comparable(mine[key], stored[key]) != stored[key]]
        if not changed or not any(changed.values()) or lists[0] != lists[1] or other:
            return False
        places = ((name, i // size * size) for name, size in batch_sizes.items() for i in changed[name])
        return not any(self.parts.has(_key(name, start)) for name, start in places)

    def _check_finished(self, identity: dict[str, Any], result: Result) -> None:
        """Refuse a run of something else; say when it is one of other code, whose numbers these are then."""
        self._refuse_other(identity, _identity_of(result))
        if result.versions.get("code") != code_digest() and self.team.is_main:
            version = f"traj_ood {result.versions.get('traj_ood')}, commit {(result.commit or 'unknown')[:12]}"
            warn(
                f"{self.folder}: a finished run that other code has made ({version}): these are its numbers; --fresh "
                "computes them with the code that is installed",
                stacklevel=4,
            )

    def _check_copies(self, found: list[Copies]) -> None:
        bad = [c for c in found if self.on_duplicates == "error" or c.count > _FEW_COPIES * c.total]
        if bad and self.on_duplicates != "warn":
            raise TrajOODError(
                f"benchmark {self.benchmark.name!r}: {'; '.join(map(str, bad))}: take them out of one of the two, or "
                "run it all the same with --on-duplicates warn (in Python: on_duplicates='warn')"
            )
        for copies in found:
            warn(f"benchmark {self.benchmark.name!r}: {copies}", stacklevel=4)

    def _identity(self, found: list[Copies]) -> dict[str, Any]:
        """What two runs must share to be one run."""
        config = {k: v for k, v in asdict(self.config).items() if k != "seed"}
        config |= {
            "scorers": self.scorers.labels,
            "attractors": len(self.sample.train.images),
            "per_set": self.config.per_set if self.config.per_set is not None else self.benchmark.test_size,
            "model_options": self.autoencoder.options(),
        }
        data = self.sample.digests(self._snapshot.contents)
        for copies in found:
            data[copies.second].setdefault("copies", {})[copies.first] = copies.count
        model = {
            "name": self.autoencoder.name,
            "family": self.autoencoder.family,
            "fingerprint": self.autoencoder.fingerprint(),
            "parameters": self.autoencoder.parameter_count(),
            "transform": transform_digest(self.autoencoder.transform),
        }
        if _is_own_code(self.autoencoder):
            model["answers"] = answers(self._answer, self.autoencoder.input_shape)
        identity = {"benchmark": self.benchmark.name, "model": model, "config": config, "seed": self.config.seed}
        return json.loads(json.dumps({**identity, "data": data}))

    def _answer(self, images: Tensor) -> Tensor:
        """What the model makes of images: E, and D of that."""
        start = self.autoencoder.examine(images).latents
        return torch.cat([start.flatten(1), self.autoencoder.decode(start).flatten(1)], dim=1)

    def _refuse_other(self, mine: dict[str, Any], other: dict[str, Any]) -> None:
        mine = {key: _comparable(value, other.get(key)) for key, value in mine.items()}
        different = [key for key in mine if mine[key] != other.get(key)]
        if different:
            changed = self._snapshot.changed(self.folder) if "data" in different else None
            words = f" ({self._snapshot.words(changed)})" if changed and any(changed.values()) else ""
            raise TrajOODError(
                f"{self.folder}: holds a run with another {', '.join(different)}{words}: choose another --out, or "
                "discard it with --fresh"
            )

    def _check_images(self) -> None:
        """Preflight, unless unreadable images are to be skipped and counted."""
        if self.config.on_error == "raise":
            preflight(self.sample)

    def _used_splits(self) -> list[Split]:
        return [self.sample.train, self.sample.test, *self.sample.ood]

    def _batch_sizes(self) -> dict[str, int]:
        most = self._most_images() if self.batch_size is None else self.batch_size
        return {s.name: _even_size(len(s.images), most, self.team.size) for s in self._used_splits()}

    def _most_images(self) -> int:
        """The default batch size."""
        model = self.autoencoder
        latent = model.encode(torch.zeros(1, *model.input_shape))
        bytes_per_image = 4 * max(latent.numel(), int(np.prod(model.input_shape)))
        return max(model.chunk, min(_MAX_BATCH, _LATENT_BYTES // bytes_per_image))

    # ------------------------------------------------------------------ passes over images

    def _fit(self, batch_sizes: dict[str, int]) -> pd.DataFrame:
        """The training pass: attractors and everything the scorers learn, in every process. Returns its curves."""
        split = self.sample.train
        pieces = self._pass([split], batch_sizes, self._explored, everywhere=True)[split.name]
        self.failures = [f for p in pieces for f in p.failures]
        self.scorers.check_training_size(sum(len(p.ids) for p in pieces))  # fewer, when unreadable ones are skipped
        evidence = Evidence.join([Evidence.from_tensors(p.tensors) for p in pieces if p.ids])
        dictionary = None
        if self.scorers.needs_dictionary:
            dictionary = AttractorDictionary.concatenate([_dictionary_of(p) for p in pieces if p.ids])
            self._still_falling = still_falling(_residuals_of(pieces), dictionary.statuses)
            if self.team.is_main:
                dictionary.save(self.folder / "attractors.safetensors")
        self.scorers.learn(dictionary, replace(evidence, labels=_labels_of(split, pieces)))
        return curve_quantiles(split, pieces, self.config.tol)

    def _pass(
        self, splits: Sequence[Split], batch_sizes: dict[str, int], compute: _Compute, everywhere: bool
    ) -> _Pieces:
        """Every batch of some splits: from disk where it was computed before; all others in one stream, each saved at
        once when it is finished.

        Each process computes its share; the main one, and with ``everywhere`` every other, returns all of them.
        """
        batches = {split.name: _batches(len(split.images), batch_sizes[split.name]) for split in splits}
        share = [_Job(split, indices) for split in splits for indices in self.team.share(batches[split.name])]
        pieces: dict[str, Part] = {}
        for job in share:
            part = self.parts.load(job.key)
            if part is not None:
                pieces[job.key] = part
        with _Bar(sum(len(job.indices) for job in share), self.quiet or not self.team.is_main) as bar:
            bar.skip(sum(len(job.indices) for job in share if job.key in pieces))
            began = time.perf_counter()
            for job, part in compute([job for job in share if job.key not in pieces], bar):
                self._snapshot.check(job.split, job.indices)
                self.parts.save(job.key, part)
                pieces[job.key] = part
                kind = "fit" if job.split is self.sample.train else f"score/{job.split.name}"
                began, before = time.perf_counter(), began
                self._seconds[kind] = self._seconds.get(kind, 0.0) + began - before
        self.team.wait()
        if not (everywhere or self.team.is_main):
            return {split.name: [] for split in splits}
        return {
            name: [pieces.get(key) or self.parts.get(key) for key in (_key(name, b.start) for b in ranges)]
            for name, ranges in batches.items()
        }

    def _read(self, jobs: list[_Job], bar: _Bar, taken: deque[_Job]) -> Iterator[tuple[Encoding, tuple[str, ...]]]:
        """What the model makes of each batch that holds an image that could be read; all of them are put into
        ``taken``."""
        for job in jobs:
            bar.begin(job)
            taken.append(job)
            try:
                self.team.check()
                job.ids, encoding, job.failures = self._examine(job.split, job.indices)
            except TrajOODError as error:  # raised when the batches before it are finished and saved
                job.error = error
                return
            if encoding is not None:
                yield encoding, job.ids

    def _explored(self, jobs: list[_Job], bar: _Bar) -> Iterator[tuple[_Job, Part]]:
        """The training pass."""
        taken: deque[_Job] = deque()
        for dictionary, evidence in self.scorers.explore_all(self._read(jobs, bar, taken), bar.on_step):
            yield from _unreadable(taken)
            job = taken.popleft()
            tensors = {**evidence.tensors(), **_curves_of(evidence)}
            if dictionary is not None:
                tensors |= {f"dictionary/{k}": v for k, v in dictionary.tensors().items()}
            notes = {"provenance": dict(dictionary.provenance)} if dictionary is not None else {}
            yield job, Part(job.ids, job.failures, tensors, notes)
        yield from _unreadable(taken)

    def _score(self, batch_sizes: dict[str, int]) -> _Pieces:
        """Score all splits but the training one. Without parts but in the main process."""
        splits = [self.sample.test, *self.sample.ood]
        scored = self._pass(splits, batch_sizes, self._scored, everywhere=False)
        self.failures += [f for split in splits for p in scored[split.name] for f in p.failures]
        for split in splits if self.team.is_main else ():
            if not any(p.ids for p in scored[split.name]):
                raise TrajOODError(f"split {split.name!r}: none of its {len(split.images)} images could be read")
        return scored

    def _scored(self, jobs: list[_Job], bar: _Bar) -> Iterator[tuple[_Job, Part]]:
        taken: deque[_Job] = deque()
        encodings = (encoding for encoding, _ in self._read(jobs, bar, taken))
        for scored in self.scorers.score_all(encodings, bar.on_step):
            yield from _unreadable(taken)
            job = taken.popleft()
            yield job, self._part(job, scored)
        yield from _unreadable(taken)

    def _part(self, job: _Job, scored: Scored) -> Part:
        """The scores of one batch, without images that some scorer has no finite score of."""
        good, failures = torch.ones(len(job.ids), dtype=torch.bool), list(job.failures)
        for label, values in scored.scores.items():
            bad = (~values.isfinite()).nonzero()[:, 0]
            if len(bad) and self.config.on_error == "raise":
                raise TrajOODError(
                    f"scorer {label}: {len(bad)} score(s) of split {job.split.name!r} are not finite, first for image "
                    f"{job.ids[int(bad[0])]!r}: its trajectory leaves the finite numbers at once; check the model, or "
                    "leave such images out with --on-error skip"
                )
            # The first scorer that fails names the reason; no scorer is measured on an image that another cannot score.
            new = [i for i in bad.tolist() if good[i]]
            failures += [{"id": job.ids[i], "error": f"scorer {label}: the score is not finite"} for i in new]
            good[new] = False
        tensors = {f"score/{label}": values for label, values in scored.scores.items()} | _curves_of(scored.evidence)
        path = scored.evidence.trajectory
        measured = Evidence(trajectory=None if path is None or not good.any() else path.select(good))
        cost = {s.label: s.f_evaluations(measured) if good.any() else 0.0 for s in self.scorers.scorers}
        kept = tuple(name for name, fine in zip(job.ids, good.tolist(), strict=True) if fine)
        return Part(kept, failures, {k: v[good] for k, v in tensors.items()}, {"f_evaluations": cost})

    def _examine(self, split: Split, indices: range) -> tuple[tuple[str, ...], Encoding | None, list[dict[str, str]]]:
        """Ids, what the model makes of them (None where no image could be read) and failures of one batch."""
        if self.cache is not None and isinstance(self.autoencoder, SurrogateAutoencoder):
            ids, features, failures = self.cache.extract(
                self.autoencoder.backbone, split.images, indices, lambda some: self._load(split, some)
            )
            return ids, self.autoencoder.examine_features(features) if features is not None else None, failures
        ids, images, failures = self._load(split, indices)
        return ids, self.autoencoder.examine(images) if ids else None, failures

    def _load(self, split: Split, indices: range) -> tuple[tuple[str, ...], Tensor, list[dict[str, str]]]:
        """Ids, images (B, C, H, W) and failures of one batch; raises on the first failure unless they are skipped."""
        batch = read_rows(self.autoencoder, split.images, indices, self.workers, self.config.on_error)
        return batch.ids, batch.images, batch.failures

    # ------------------------------------------------------------------ metrics and files

    def _finish(self, identity: dict[str, Any], scored: dict[str, list[Part]], curves: pd.DataFrame) -> Result:
        began = time.perf_counter()
        table = self._table(scored)
        dictionary = self.scorers.dictionary
        health: dict[str, Any] = {"used": False, "healthy": True, "warnings": []}
        if dictionary is not None:
            health = {"used": True, **self._judged(dictionary)}
        scorers = self._measure(table, scored)
        splits = {s.name: s for s in self.sample.splits()}
        frames = [curves, *(curve_quantiles(splits[n], pieces, self.config.tol) for n, pieces in scored.items())]
        write_atomic(self.folder / "curves.parquet", lambda f: pd.concat(frames).to_parquet(f, index=False))
        write_atomic(self.folder / "scores.parquet", lambda f: table.to_parquet(f, index=False, compression="zstd"))
        self._seconds["metrics"] = time.perf_counter() - began
        if self.pictures:
            self._keep_pictures(table, scorers, dictionary)
        result = Result(
            name=self.name,
            **identity,
            command=self.command or " ".join(sys.argv),
            commit=git_commit(),
            versions=environment() | self._machine(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds={k: round(v, 2) for k, v in self._seconds.items()},
            dictionary=health,
            failures=self.failures,
            scorers=scorers,
        )
        result.save(self.folder / FILE_NAME)  # last: its presence says that everything else is there
        return result

    def _judged(self, dictionary: AttractorDictionary) -> dict[str, Any]:
        """The dictionary's health with the verdict of ``traj-ood diagnose``, which can find fault where it finds none.

        ID test images take the place of the held-out ones. A radius is looked for only where it may decide.
        """
        health, model = dictionary.health(), self.autoencoder
        count = len(self.sample.test.images)
        # All over the list, which may be sorted by class. Cached features of all images cost less than reading a few.
        step = 1 if self.cache is not None else -(-count // _SEEN)
        encoding = self._examine(self.sample.test, range(0, count, step))[1]
        share, hidden = math.nan, None
        if encoding is not None:
            mean = encoding.target.cpu().double().mean(dim=0)
            share = explained(reconstruction_errors(model, encoding), encoding.target, mean)
            hidden = explained_hidden(model, encoding.target, mean)
        radii: tuple[float, ...] = ()
        if health.verdict.meaningful:
            ends = dictionary.points[dictionary.statuses == Status.CONVERGED]
            drawn = torch.tensor([leader for leader, _ in drawn_attractors(ends, self.config.seed)])
            points = ends[drawn].to(model.device)
            radii = tuple(spectral_radii(model.self_map, points, chunk=model.chunk).values.tolist())
        verdict = judge(health, Facts(self._still_falling, radii, share_stable(radii), share, hidden))
        found = health.as_dict() | {"verdict": asdict(verdict), "healthy": verdict.meaningful}
        if not verdict.meaningful and not found["warnings"]:
            found["warnings"] = [verdict.reason]
        return found

    def _add_pictures(self, result: Result) -> None:
        """What a finished run lacks because it is older than pictures, or was run without them."""
        scores, attractors = self.folder / "scores.parquet", self.folder / "attractors.safetensors"
        if not (self.pictures and self.team.is_main and scores.is_file()) or self._gallery.is_file():
            return
        if result.versions.get("code") != code_digest():  # what this code draws need not be what that one measured
            return
        dictionary = AttractorDictionary.load(attractors) if attractors.is_file() else None
        self._keep_pictures(pd.read_parquet(scores), result.scorers, dictionary)

    def _keep_pictures(
        self, table: pd.DataFrame, scorers: dict[str, ScorerResult], dictionary: AttractorDictionary | None
    ) -> None:
        began = time.perf_counter()
        tol, max_steps = self.config.tol, self.config.max_steps
        kept = keep_pictures(self.autoencoder, self.sample, table, scorers, dictionary, tol=tol, max_steps=max_steps)
        kept.save(self._gallery)
        self._seconds["pictures"] = time.perf_counter() - began

    @property
    def _gallery(self) -> Path:
        return self.folder / GALLERY_NAME

    def _machine(self) -> dict[str, str]:
        threads = str(torch.get_num_threads())
        return {"device": str(self.autoencoder.device), "threads": threads, "processes": str(self.team.size)}

    def _table(self, scored: dict[str, list[Part]]) -> pd.DataFrame:
        """One row per image: split, role, id, trajectory_steps, trajectory_status and one column per scorer."""
        splits = {s.name: s for s in self.sample.splits()}
        rows = []
        for name, pieces in scored.items():
            for part in (p for p in pieces if p.ids):
                columns: dict[str, Any] = {"split": name, "role": splits[name].role, "id": list(part.ids)}
                columns |= {
                    f"trajectory_{k}": part.tensors[k].numpy() for k in ("steps", "status") if k in part.tensors
                }
                columns |= {label: part.tensors[f"score/{label}"].numpy() for label in self.scorers.labels}
                rows.append(pd.DataFrame(columns))
        return pd.concat(rows, ignore_index=True)

    def _measure(self, table: pd.DataFrame, scored: dict[str, list[Part]]) -> dict[str, ScorerResult]:
        by_split = dict(list(table.groupby("split", sort=False)))
        results = {}
        bar = tqdm(self.scorers.scorers, desc="metrics", unit="scorer", delay=2, disable=self.quiet, dynamic_ncols=True)
        for scorer in bar:
            label = scorer.label
            id_scores = check_scores(by_split[self.sample.test.name][label], "ID test")
            sets = {}
            for split in self.sample.ood:
                scores = by_split[split.name][label].to_numpy()
                intervals = (
                    bootstrap(id_scores, scores, resamples=self.config.resamples) if self.config.resamples else {}
                )
                role: Any = split.role  # near or far, as of all that is scored and not ID
                sets[split.name] = SetScore(role, len(scores), compute_metrics(id_scores, scores), intervals)
            results[label] = ScorerResult(
                label=label,
                options=scorer.options(),
                note=scorer.summary,
                f_evaluations=_mean_cost(label, [p for pieces in scored.values() for p in pieces if p.ids]),
                sets=sets,
            )
        return results


@dataclass
class _Job:
    """One batch of a split, and what was read of it."""

    split: Split
    indices: range
    ids: tuple[str, ...] = ()
    failures: list[dict[str, str]] = field(default_factory=list)
    error: TrajOODError | None = None

    @property
    def key(self) -> str:
        return _key(self.split.name, self.indices.start)


def _key(split: str, start: int) -> str:
    """Of a batch's part."""
    return f"{split}-{start:08d}"


class _Bar:
    """A progress bar over the images of a pass, named after the split that is being read."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._bar = tqdm(total=total, unit="img", delay=2, disable=quiet, dynamic_ncols=True, leave=False)
        self._read = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def skip(self, count: int) -> None:
        """Images whose batches are finished already."""
        self._read += count
        self._bar.update(count)

    def begin(self, job: _Job) -> None:
        split = job.split
        name = f"{split.role} {split.name}" if split.role != split.name else split.name
        self._bar.set_description(printable(name), refresh=False)
        self._read += len(job.indices)

    def on_step(self, step: int, running: int) -> None:
        self._bar.set_postfix(step=step, running=running, refresh=False)
        self._bar.update(self._read - running - self._bar.n)


def _unreadable(taken: deque[_Job]) -> Iterator[tuple[_Job, Part]]:
    """The oldest batches, as far as no image of them could be read.

    Raises:
        TrajOODError: of the batch that ended the reading.
    """
    while taken and not taken[0].ids:
        job = taken.popleft()
        if job.error is not None:
            raise job.error
        yield job, Part((), job.failures, {}, {})


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:  # NaN is refused, too
        raise TrajOODError(f"{name}: expected at least {least}, got {value}")


def _at_most(name: str, value: float, most: float) -> None:
    if not value <= most:
        raise TrajOODError(f"{name}: expected at most {most:g}, got {value}")


def _batches(count: int, size: int) -> list[range]:
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def _even_size(count: int, most: int, processes: int) -> int:
    """Images per batch so that all processes have equally many batches, as few as ``most`` images each allow."""
    rounds = math.ceil(count / (most * processes))
    return math.ceil(count / (rounds * processes))


def _protocol(benchmark: Benchmark) -> int | None:
    """The protocol's number of training images, or all where there are fewer."""
    return None if benchmark.train_size is None else min(benchmark.train_size, len(benchmark.train.images))


def _curves_of(evidence: Evidence) -> dict[str, Tensor]:
    path = evidence.trajectory
    if path is None:
        return {}
    curves = {"residuals": path.residuals.float(), "norm": path.measure("norm").float()}
    return {"steps": path.steps, "status": path.status, **curves}


def _residuals_of(pieces: list[Part]) -> Tensor:
    """(N, T) squared residuals of all batches, NaN beyond the end of the shorter ones."""
    found = [p.tensors["residuals"] for p in pieces if p.ids]
    width = max(r.shape[1] for r in found)
    return torch.cat([torch.nn.functional.pad(r, (0, width - r.shape[1]), value=torch.nan) for r in found])


def _labels_of(split: Split, pieces: list[Part]) -> Tensor | None:
    """(N,) int64 classes of the images that were read, or None where the split has no labels."""
    if not split.images.labels:
        return None
    label_of = dict(zip(split.images.ids, split.images.labels, strict=True))
    labels = [label_of[i] for p in pieces for i in p.ids]
    numbers = {label: number for number, label in enumerate(sorted(set(labels), key=lambda x: (len(x), x)))}
    return torch.tensor([numbers[label] for label in labels])


def _dictionary_of(part: Part) -> AttractorDictionary:
    tensors = {k.split("/")[1]: v for k, v in part.tensors.items() if k.startswith("dictionary/")}
    return AttractorDictionary(ids=part.ids, provenance=part.notes["provenance"], **tensors)


def _mean_cost(label: str, pieces: list[Part]) -> float:
    weights = np.array([len(p.ids) for p in pieces], dtype=float)
    return float(np.average([p.notes["f_evaluations"][label] for p in pieces], weights=weights))


def _is_own_code(model: Autoencoder) -> bool:
    """Whether the model, or the backbone under it, is a user's callable, which weights and options do not tell of."""
    backbone = model.backbone if isinstance(model, SurrogateAutoencoder) else None
    return model.family == "custom" or (backbone is not None and backbone.library == "custom")


def _comparable(mine: Any, other: Any) -> Any:
    """``mine`` as ``other`` may hold it: without what older results do not record, and with the same answers where they
    are equal but for rounding."""
    if not isinstance(mine, dict) or not isinstance(other, dict):
        return mine
    if "answers" in mine and agree(other.get("answers"), mine["answers"]):
        mine = {**mine, "answers": other["answers"]}
    newer = {"transform", "answers", "contents", "copies"} - other.keys()
    return {key: _comparable(value, other.get(key)) for key, value in mine.items() if key not in newer}


def _identity_of(result: Result) -> dict[str, Any]:
    tree = {k: getattr(result, k) for k in ("benchmark", "model", "config", "seed", "data")}
    tree["config"] = {"precision": "fp32", "approximate": "none", **tree["config"]}  # results older than these options
    return json.loads(json.dumps(tree))
