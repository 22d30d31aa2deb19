"""The evaluator, which runs scorers on a benchmark and writes a Result and the score of every image; resumable."""

from __future__ import annotations

import re
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from traj_ood.attractors import AttractorDictionary, Verdict
from traj_ood.autoencoders import Autoencoder, SurrogateAutoencoder, check_autoencoder
from traj_ood.autoencoders.identity import model_identity
from traj_ood.backbones.feature_cache import FeatureCache
from traj_ood.data import Benchmark, Split, preflight
from traj_ood.data.batches import OnError
from traj_ood.data.benchmark import Copies
from traj_ood.data.contents import distrust
from traj_ood.dynamics.trajectory import check_stopping
from traj_ood.errors import TrajOODError, check_whole, check_word, warn
from traj_ood.evaluation.curves import curve_quantiles
from traj_ood.evaluation.file_control import NOTE, control_scores
from traj_ood.evaluation.gallery import FILE_NAME as GALLERY_NAME
from traj_ood.evaluation.gallery import keep_pictures
from traj_ood.evaluation.identity import (
    changed_imports,
    comparable,
    differences,
    identity_of,
    other_code,
    own_file,
)
from traj_ood.evaluation.outcome import judged, measure, measure_sets, score_table
from traj_ood.evaluation.parallel import Team
from traj_ood.evaluation.passes import PartsBySplit, Passes, even_size, key_of
from traj_ood.evaluation.results import CONTROL, FILE_NAME, Result, ScorerResult
from traj_ood.evaluation.runs import read_scores
from traj_ood.evaluation.snapshot import LEARNT, Snapshot
from traj_ood.index import Approximate, Backend
from traj_ood.io.files import alone_in, empty_folder, write_atomic
from traj_ood.io.options import MAX_INT
from traj_ood.io.parts import PartStore
from traj_ood.io.provenance import code_digest, environment, git_commit
from traj_ood.io.trees import as_json
from traj_ood.scorers.batch_size import default_batch_size
from traj_ood.scorers.scorer_set import Precision, ScorerSet

OnDuplicates = Literal["error", "warn"]
_MAX_COPIED_SHARE = 0.01  # of a split; CIFAR and ImageNet have a few duplicates, and must remain usable
_MAX_RESAMPLES = 1_000_000  # more would not improve intervals, and take very long


@dataclass(frozen=True)
class RunConfig:
    """Settings that affect a run's results, and are recorded in them. All others are attributes of :class:`Evaluator`.

    Attributes:
        scorers: specs, see :func:`traj_ood.create_scorer`; ``all`` is the default suite.
        attractors: number of ID training images to fit on. Default: the benchmark's protocol (2,000 as in the paper),
            else all.
        per_set: most images per test and OOD set. Default: the benchmark's protocol, else all.
        seed: seed of the training sample.
        tol, max_steps: see :func:`traj_ood.iterate`; the defaults are the paper's.
        resamples: bootstrap resamples for 95 % intervals; 0 for none.
        precision, approximate, compile: see :class:`traj_ood.ScorerSet`; by default exact float32, not compiled. If f
            cannot be compiled, the run is recorded as uncompiled.
        on_error: ``raise`` (default), or ``skip`` images that cannot be read or have no finite score, and count them in
            the result.
        control: add the control on image files (:mod:`traj_ood.evaluation.file_control`) to the table. Default None:
            as the benchmark declares.
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
    control: bool | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Raise ``TrajOODError`` for invalid values, before anything is computed or written."""
        check_stopping(self.tol, self.max_steps)
        check_whole("seed", self.seed, 0, MAX_INT)
        check_whole("resamples", self.resamples, 0, _MAX_RESAMPLES)
        if self.attractors is not None:
            check_whole("attractors", self.attractors, 0)  # the benchmark knows the bounds
        if self.per_set is not None:
            check_whole("per_set", self.per_set, unit="image per set")
        check_word("value of on_error", self.on_error, OnError)


@dataclass
class Evaluator:
    """Runs scorers on a benchmark.

    Attributes:
        autoencoder, benchmark, config: what to run.
        out: folder in which the folder of the run is created.
        batch_size: most images per batch; default: see :func:`traj_ood.scorers.batch_size.default_batch_size`. It
            affects memory and how much an interruption can lose, not results. A split is divided into batches of equal
            size, the same number for each process.
        workers: threads that read images.
        backend: backend of the neighbour index.
        quiet: no progress bars.
        command: the command, recorded in the result.
        cache: cache of a backbone's features, for surrogates; default: none. It affects time, not results.
        team: the processes that share the work, see :meth:`traj_ood.evaluation.parallel.Team.join`; default: only this
            one. Each process builds an evaluator with the same settings, and all must have access to ``out``.
        on_duplicates: ``error`` or ``warn`` if two splits share images by content (see
            :meth:`traj_ood.data.Benchmark.copies`), of the training split also those that a surrogate has learnt from
            without being in the sample. By default, up to 1 % of a split are a warning and more an error: real data
            sets have a few duplicates, but results on a test set that was trained on are meaningless. Their number is
            recorded in the result.
        pictures: keep what a report shows (:mod:`traj_ood.evaluation.gallery`, which includes small versions of some
            images). It takes seconds and does not affect results; running a finished run again adds missing pictures.
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

    def __post_init__(self) -> None:
        bench, config = self.benchmark, self.config
        check_autoencoder(self.autoencoder)
        if not isinstance(bench, Benchmark):
            got = type(bench).__name__
            raise TrajOODError(
                f"benchmark: expected a traj_ood.Benchmark, got {got}: load it, load_benchmark({bench!r})"
            )
        check_whole("workers", self.workers, 1)
        if self.batch_size is not None:
            check_whole("batch size", self.batch_size, 1)
        if self.on_duplicates is not None:
            check_word("value of on_duplicates", self.on_duplicates, OnDuplicates)
        protocol = bench.train_size and min(bench.train_size, len(bench.train.images))
        self.sample = bench.subsample(
            train=config.attractors if config.attractors is not None else protocol,
            per_set=config.per_set if config.per_set is not None else bench.test_size,
            seed=config.seed,
        )
        for split in self.sample.splits():
            _check_names(split)
        self.scorers = ScorerSet(
            self.autoencoder,
            config.scorers,
            tol=config.tol,
            max_steps=config.max_steps,
            backend=self.backend,
            approximate=config.approximate,
            precision=config.precision,
            compile=config.compile,
        )
        self.scorers.check_training_size(len(self.sample.train.images))
        self.control = bench.control if config.control is None else config.control
        self.out = Path(self.out)
        self.name = f"{bench.name}--{re.sub('[/:]', '-', self.autoencoder.name)}--seed{config.seed}"
        self.folder = self.out / self.name
        rerun = "discard the unfinished run with --fresh"
        self.parts = PartStore(self.folder / "parts", "batch of a run", "compute its batch again", "run.json", rerun)

    def run(self, fresh: bool = False) -> Result:
        """Compute what is missing, write everything, and return the result. A finished run is only loaded.

        A run is identified by the contents of its images, its model and its settings. A finished run made by another
        version of the package is returned with a warning, an unfinished one is refused. A run made by an earlier
        version of the user's own model or imported files is always refused. An unfinished run that a damaged image has
        ended continues with ``on_error="skip"``.

        Args:
            fresh: discard an earlier run in the folder and ignore caches: images are hashed and features extracted
                again.
        Raises:
            TrajOODError: the data are invalid, change during the run or are shared by splits (see ``on_duplicates``);
                the folder cannot be written, is in use by another run, or has a run with other images, settings or
                code; there are more processes than images; or a process failed (see
                :meth:`traj_ood.evaluation.parallel.Team.together`).
        Warns:
            UserWarning: splits share images, a finished run was made by another version of the code, or attractors that
                a scorer reads are unhealthy.
        """
        # The main process locks the folder for its team: a second team would mix its batches with ours or discard them.
        alone = alone_in(self.folder) if self.team.is_main else nullcontext()
        with self.team.together(), alone:
            self._refuse_idle_processes()
            identity, batch_sizes = self.team.main_first(lambda: self._open(fresh))
            result = None if batch_sizes is None else self._compute(identity, batch_sizes)
            result = result or Result.load(self.folder / FILE_NAME)
            self._add_pictures(result)
            if self.team.is_main and not result.dictionary["healthy"]:
                stored = result.dictionary.get("verdict")  # older results have only its reasons
                text = Verdict(**stored).text if stored else "; ".join(result.dictionary["warnings"])
                warn(
                    f"unhealthy attractors: {text} More: traj-ood diagnose (in Python: traj_ood.diagnose)", stacklevel=2
                )
            return result

    def _compute(self, identity: dict[str, Any], batch_sizes: dict[str, int]) -> Result | None:
        """Run all passes in all processes; the main process then computes the metrics and returns the result."""
        result = None
        passes = Passes(
            scorers=self.scorers,
            sample=self.sample,
            snapshot=self._snapshot,
            parts=self.parts,
            batch_sizes=batch_sizes,
            team=self.team,
            cache=self.cache,
            workers=self.workers,
            on_error=self.config.on_error,
            quiet=self.quiet,
        )
        learnt = passes.fit()
        if self.scorers.dictionary is not None and self.team.is_main:
            self.scorers.dictionary.save(self.folder / "attractors.safetensors")
        scored = passes.score()
        if self.team.is_main:
            result = self._finish(identity, passes, learnt | scored)
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
        """The identity of the run, and the batch size of each split (as in the unfinished run, if there is one); None
        for a finished run."""
        if fresh:
            if self.team.is_main:
                empty_folder(self.folder, first=FILE_NAME)  # first, as its presence marks a finished run
                distrust()
            if self.cache is not None:
                self.cache.distrust()
        model = self.autoencoder
        learnt = model.learnt_from(self.benchmark.train) if isinstance(model, SurrogateAutoencoder) else None
        self._snapshot = Snapshot(self.sample.splits(), learnt)
        copies = self.sample.copies(self._snapshot.contents, learnt)
        identity = self._identity(copies)
        finished = self.folder / FILE_NAME
        if finished.is_file():
            self._check_finished(identity, Result.load(finished))
            if self.team.is_main:
                self.parts.remove()  # left by a process that died while removing them
            return identity, None
        if self.team.is_main:
            if self.config.on_error == "raise":
                preflight(self.sample)
            self._check_copies(copies)
        elif not self.parts.index().is_file():
            raise TrajOODError(
                f"{self.folder}: process {self.team.rank} does not find the main process's files there: expected "
                "--out to be one folder that all processes share"
            )
        mine = {**identity, "code": code_digest()}
        stored = self.parts.open({**mine, "batch_sizes": self._batch_sizes()})
        batch_sizes = stored.pop("batch_sizes")
        if self.config.on_error == "skip":  # without it a batch is only finished if nothing had to be skipped
            stored["config"] = {**stored["config"], "on_error": "skip"}
        if self.team.is_main and self._are_repaired(mine, stored, batch_sizes):
            stored = mine
        self._refuse_other(mine, stored)
        if self.team.is_main:
            self.parts.claim({**mine, "batch_sizes": batch_sizes})
            self._snapshot.save(self.folder)
        return identity, batch_sizes

    def _are_repaired(self, mine: dict[str, Any], stored: dict[str, Any], batch_sizes: dict[str, int]) -> bool:
        """Whether only images without a finished batch differ, such as the damaged image that ended the run."""
        changed = self._snapshot.changed(self.folder)
        lists = [{name: split["sha256"] for name, split in some["data"].items()} for some in (mine, stored)]
        other = [key for key in mine if key != "data" and comparable(mine[key], stored[key]) != stored[key]]
        if not changed or not any(changed.values()) or lists[0] != lists[1] or other:
            return False
        places = ((name, i // size * size) for name, size in batch_sizes.items() for i in changed[name])
        return not any(self.parts.has(key_of(name, start)) for name, start in places)

    def _check_finished(self, identity: dict[str, Any], result: Result) -> None:
        """Refuse a finished run with another identity or an earlier version of the user's own files; warn if another
        version of the package has made it."""
        changed = changed_imports(result)
        if changed:
            raise TrajOODError(
                f"{self.folder}: has a run with another version of {', '.join(changed)} (--import): choose another "
                "--out, or discard it with --fresh"
            )
        self._refuse_other(identity, identity_of(result))
        code = other_code(result)
        if code and self.team.is_main:
            warn(
                f"{self.folder}: a finished run made {code}, whose results are returned; --fresh computes them again",
                stacklevel=4,
            )

    def _check_copies(self, found: list[Copies]) -> None:
        bad = [c for c in found if self.on_duplicates == "error" or c.count > _MAX_COPIED_SHARE * c.total]
        if bad and self.on_duplicates != "warn":
            raise TrajOODError(
                f"benchmark {self.benchmark.name!r}: {'; '.join(map(str, bad))}: remove them from one of the two, or "
                "accept them with --on-duplicates warn (in Python: on_duplicates='warn')"
            )
        for copies in found:
            warn(f"benchmark {self.benchmark.name!r}: {copies}", stacklevel=4)

    def _identity(self, found: list[Copies]) -> dict[str, Any]:
        """What identifies a run, as JSON data."""
        self.scorers.try_compile()
        config = {k: v for k, v in asdict(self.config).items() if k not in ("seed", "control", "compile")}
        # Older results have none of these keys.
        config |= {"compile": True} if self.scorers.compile else {}
        config |= {"control": True} if self.control else {}
        own = {s.label: file for s in self.scorers.scorers if (file := own_file(type(s))) is not None}
        config |= {"own_scorers": own} if own else {}
        config |= {
            "scorers": self.scorers.labels,
            "attractors": len(self.sample.train.images),
            "per_set": self.config.per_set if self.config.per_set is not None else self.benchmark.test_size,
            "model_options": self.autoencoder.options(),
        }
        data = self.sample.digests(self._snapshot.contents)
        for copies in found:
            data[copies.second].setdefault("copies", {})[copies.first] = copies.count
        model = model_identity(self.autoencoder)
        identity = {"benchmark": self.benchmark.name, "model": model, "config": config, "seed": self.config.seed}
        return as_json({**identity, "data": data})

    def _refuse_other(self, mine: dict[str, Any], other: dict[str, Any]) -> None:
        mine = {key: comparable(value, other.get(key)) for key, value in mine.items()}
        different = [key for key in mine if mine[key] != other.get(key)]
        if not different:
            return
        changed = (self._snapshot.changed(self.folder) if {"data", "model"} & {*different} else None) or {}
        explained = ["data"] if any(changed.values()) else []
        explained += ["model.fingerprint", "model.answers"] if changed.get(LEARNT) else []
        words = differences(mine, {key: other.get(key) for key in mine}, explained), self._snapshot.words(changed)
        raise TrajOODError(
            f"{self.folder}: has a run with another {', '.join(different)} ({'; '.join(filter(None, words))}): choose "
            "another --out, or discard it with --fresh"
        )

    def _used_splits(self) -> list[Split]:
        return [self.sample.train, self.sample.test, *self.sample.ood]

    def _batch_sizes(self) -> dict[str, int]:
        most = self.batch_size if self.batch_size is not None else default_batch_size(self.scorers)
        return {s.name: even_size(len(s.images), most, self.team.size) for s in self._used_splits()}

    # ------------------------------------------------------------------ metrics and files

    def _finish(self, identity: dict[str, Any], passes: Passes, parts: PartsBySplit) -> Result:
        began = time.perf_counter()
        config, sample, dictionary = self.config, self.sample, self.scorers.dictionary
        scored = {name: pieces for name, pieces in parts.items() if name != sample.train.name}
        table = score_table(sample, scored, self.scorers.labels)
        health: dict[str, Any] = {"used": False, "healthy": True, "warnings": []}
        if dictionary is not None and self.scorers.needs.attractors_read:
            health = {"used": True, **judged(passes, dictionary, config.seed)}
        scorers = measure(self.scorers, sample, table, scored, resamples=config.resamples, quiet=self.quiet)
        if self.control:
            table[CONTROL] = control_scores(sample, table, self.workers, config.on_error)
            sets = measure_sets(table[["split", CONTROL]], sample, config.resamples)
            scorers[CONTROL] = ScorerResult(CONTROL, {}, NOTE, 0.0, sets)
        splits = {s.name: s for s in sample.splits()}
        curves = pd.concat([curve_quantiles(splits[n], pieces, config.tol) for n, pieces in parts.items()])
        write_atomic(self.folder / "curves.parquet", lambda f: curves.to_parquet(f, index=False))
        write_atomic(self.folder / "scores.parquet", lambda f: table.to_parquet(f, index=False, compression="zstd"))
        passes.seconds["metrics"] = time.perf_counter() - began
        if self.pictures:
            began = time.perf_counter()
            self._keep_pictures(table, scorers, dictionary)
            passes.seconds["pictures"] = time.perf_counter() - began
        threads, processes = str(torch.get_num_threads()), str(self.team.size)
        machine = {"device": str(self.autoencoder.device), "threads": threads, "processes": processes}
        result = Result(
            name=self.name,
            **identity,
            command=self.command or " ".join(sys.argv),
            commit=git_commit(),
            versions=environment() | machine,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds={k: round(v, 2) for k, v in passes.seconds.items()},
            dictionary=health,
            failures=passes.failures,
            scorers=scorers,
        )
        result.save(self.folder / FILE_NAME)  # last, as its presence marks a finished run
        return result

    def _add_pictures(self, result: Result) -> None:
        """Add pictures to a finished run without them, unless it was made by another version of the code."""
        if not (self.pictures and self.team.is_main) or (self.folder / GALLERY_NAME).is_file():
            return
        if result.versions.get("code") != code_digest():  # this code's pictures may not show that code's results
            return
        scores, attractors = read_scores(self.folder, result), self.folder / "attractors.safetensors"
        if scores is not None:
            dictionary = AttractorDictionary.load(attractors) if attractors.is_file() else None
            self._keep_pictures(scores, result.scorers, dictionary)

    def _keep_pictures(
        self, table: pd.DataFrame, scorers: dict[str, ScorerResult], dictionary: AttractorDictionary | None
    ) -> None:
        tol, max_steps = self.config.tol, self.config.max_steps
        kept = keep_pictures(self.autoencoder, self.sample, table, scorers, dictionary, tol=tol, max_steps=max_steps)
        kept.save(self.folder / GALLERY_NAME)


def _check_names(split: Split) -> None:
    """Raise ``TrajOODError`` for an id that is not UTF-8, which the tables of a run could not hold."""
    for name in split.images.ids:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise TrajOODError(
                f"split {split.name!r}: expected file names in UTF-8, got {name!r}: rename the file, or leave it out"
            ) from error
