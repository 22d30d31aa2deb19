"""ScorerSet: any number of scorers on one pass over the images, which encodes and iterates every image once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from traj_ood.attractors import AttractorDictionary, NearestAttractor, NearestOther
from traj_ood.autoencoders import Autoencoder, Encoding, FeatureView, View, check_autoencoder
from traj_ood.data.batches import Images, batches
from traj_ood.data.preprocessing import Normalised, prepare
from traj_ood.dynamics.chunks import filled
from traj_ood.dynamics.compiled import CompiledMap
from traj_ood.dynamics.device import bfloat16_map
from traj_ood.dynamics.fixed_function import KnownWeights
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.jacobian import divergence_at
from traj_ood.dynamics.maps import LowPrecision, SelfMap
from traj_ood.dynamics.observers import Norm, Observer
from traj_ood.dynamics.streams import accompanied
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError, check_word, warn
from traj_ood.index import Approximate, Backend, NeighborIndex
from traj_ood.scorers import WHOLE_PATH, Evidence, Needs, Scorer, create_scorers
from traj_ood.scorers.kept_points import KeptPoints
from traj_ood.scorers.labels import check_one_labelling, class_numbers, no_labels
from traj_ood.scorers.registry import lacking
from traj_ood.scorers.trial import tried_scores

OnStep = Callable[[int, int], None]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Scored:
    """Scores of B images.

    Attributes:
        scores: label of the scorer → (B,) float64, higher = more OOD.
        evidence: the evidence that the scores were computed from.
    """

    scores: dict[str, Tensor]
    evidence: Evidence


class ScorerSet:
    """An autoencoder with scorers that share one pass over the images: each image is encoded and iterated once,
    whatever the number of scorers.

    >>> scorers = ScorerSet(autoencoder, ["trajectory", "knn"])         # doctest: +SKIP
    >>> scorers.fit(train_images).score(test_images).scores["knn"]      # doctest: +SKIP

    :meth:`fit` and :meth:`score` hold all images in memory. For streams, :meth:`explore_all` makes the training pass
    and :meth:`learn` fits the scorers to its results, and :meth:`score_all` scores.

    Args:
        autoencoder: the model.
        scorers: names with options (see :func:`traj_ood.create_scorer`), or ``all``.
        tol: tolerance on the squared residual, see :func:`traj_ood.iterate`. Default 1e-5, the paper's.
        max_steps: step limit, see :func:`traj_ood.iterate`. Default 500, the paper's.
        backend: see :class:`traj_ood.NeighborIndex`.
        approximate: see :class:`traj_ood.NeighborIndex`.
        precision: ``bf16`` computes the first steps of scored images in bfloat16; :class:`traj_ood.LowPrecision`
            describes the effect. Default ``fp32``. Training trajectories are always fp32, because inaccurate attractors
            would change every score.
        compile: whether to run f through ``torch.compile`` (:class:`traj_ood.dynamics.compiled.CompiledMap`) for all
            trajectories, which changes scores by at most 1e-5. Default false; docs/performance.md has the speed-ups.
            Calls of fewer rows than the model's ``chunk``, and the first steps of ``bf16``, are not compiled. If the
            compiler fails, a warning is issued, f is used as it is, and :attr:`compile` becomes false.
    Raises:
        TrajOODError: unknown scorers or options, or a scorer that reads an input which this model does not provide.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        scorers: Sequence[str],
        *,
        tol: float = 1e-5,
        max_steps: int = 500,
        backend: Backend = "auto",
        approximate: Approximate = "none",
        precision: Precision = "fp32",
        compile: bool = False,
    ) -> None:
        check_autoencoder(autoencoder)
        check_word("precision", precision, Precision)
        self.autoencoder = autoencoder
        self.scorers: list[Scorer] = create_scorers(scorers, autoencoder)
        for scorer in self.scorers:
            lack = lacking(autoencoder, scorer.needs())
            if lack is not None:
                raise TrajOODError(f"scorer {scorer.label}: {lack}")
        self.tol, self.max_steps = tol, max_steps
        self.backend: Backend = backend
        self.approximate: Approximate = approximate
        self.precision: Precision = precision
        self.compile = compile
        self._compiled: CompiledMap | None = None
        self.needs: Needs = reduce(lambda a, b: a | b, (s.needs() for s in self.scorers))
        self.dictionary: AttractorDictionary | None = None
        self._indices: dict[View, NeighborIndex] = {}
        self._weights: KnownWeights | None = None

    @property
    def labels(self) -> list[str]:
        """The label of each scorer, from which it can be created again (:attr:`Scorer.label`)."""
        return [s.label for s in self.scorers]

    def check_training_size(self, count: int) -> None:
        """Refuse too few training images, before anything is computed.

        Raises:
            TrajOODError: fewer than 2 images, or fewer than a scorer needs.
        """
        if count < 2:
            raise TrajOODError(f"fewer than 2 ID samples: expected at least 2 ID training images, got {count}")
        for scorer in self.scorers:
            scorer.check_training_size(count)

    def try_compile(self) -> None:
        """Compile f if it was requested and has not been done. Afterwards :attr:`compile` is whether trajectories will
        use a compiled f, so that stored results can be labelled before they are computed."""
        self.compile = self.compile and bool(self.needs.steps or self.needs.points or self.needs.dictionary)
        if not self.compile or self._compiled is not None:
            return
        model = self.autoencoder
        start = model.encode(torch.zeros(1, *model.input_shape, device="cpu"))
        self._compiled = CompiledMap(model.self_map, rows=model.chunk)  # after the first encode, which may reduce it
        with model.fixed(), torch.inference_mode():
            self._compiled(filled(start, model.chunk))
        self.compile = not self._compiled.fell_back

    def _self_map(self) -> SelfMap:
        """f as used for trajectories: compiled or not."""
        self.try_compile()
        return self._compiled if self.compile and self._compiled is not None else self.autoencoder.self_map

    def check_weights(self) -> None:
        """Check that the model's weights and buffers are those that the scorers were fitted with.

        The first call records them. Reloading equal weights, or moving them to another device, is not a change.

        Raises:
            TrajOODError: weights or buffers have changed.
        """
        if self._weights is None:
            self._weights = KnownWeights(self.autoencoder)
        else:
            self._weights.check()

    @contextmanager
    def _fixed(self) -> Iterator[None]:
        """Context in which the model is a fixed function, after a check of its weights."""
        with self.autoencoder.fixed():
            self.check_weights()
            yield

    def fit(
        self,
        images: Images,
        ids: Sequence[str] | None = None,
        labels: Tensor | Sequence[Any] | None = None,
        on_step: OnStep | None = None,
    ) -> ScorerSet:
        """Fit all scorers to ID training images; returns self.

        Args:
            images: N images of any kind that a detector takes: (N, C, H, W) uint8 pixels or floats in [0, 1], a list
                of Pillow images or paths, a Dataset or DataLoader, an ImageSource; or :class:`traj_ood.Normalised`, in
                the model's own units. All are held in memory; for more images use a Detector or an Evaluator.
            ids: N names of the attractors. Default: their numbers.
            labels: N class labels, as int64 (N,) from 0, or as whole numbers or texts in a list or array; only
                class-conditional scorers read them. Default: the labels of the Dataset or DataLoader.
            on_step: see :func:`traj_ood.iterate`.
        Raises:
            TrajOODError: fewer than 2 images, invalid images, or what a scorer refuses.
        """
        self._weights = None
        encoding, own = self._examined(images)
        if labels is not None:
            check_one_labelling(labels, own or (), images)
        labels = own if labels is None and self.needs.labels else labels
        if ids is not None and len(ids) != len(encoding):
            raise TrajOODError(f"ids: expected a name for each of {len(encoding)} images, got {len(ids)}")
        self.check_training_size(len(encoding))
        dictionary, evidence = self.explore(
            encoding, tuple(map(str, range(len(encoding)) if ids is None else ids)), on_step
        )
        if labels is not None and not isinstance(labels, Tensor):
            labels = class_numbers(labels, len(encoding), self.autoencoder.classes)
        return self.learn(dictionary, replace(evidence, labels=labels))

    def explore(
        self, encoding: Encoding, ids: tuple[str, ...], on_step: OnStep | None = None
    ) -> tuple[AttractorDictionary | None, Evidence]:
        """The training pass over one batch.

        Args:
            encoding: N training images, as ``autoencoder.examine`` returns them.
            ids: their N names.
            on_step: see :func:`traj_ood.iterate`.
        Returns:
            The end points of their trajectories, None if no scorer needs them; and their evidence.
        """
        return next(self.explore_all([(encoding, ids)], on_step))

    def explore_all(
        self, batches: Iterable[tuple[Encoding, tuple[str, ...]]], on_step: OnStep | None = None
    ) -> Iterator[tuple[AttractorDictionary | None, Evidence]]:
        """:meth:`explore` for each batch of a stream, in order, with several batches in progress at a time."""
        kept = max((t for _, t in self.needs.points), default=0)
        steps = WHOLE_PATH if self.needs.dictionary else kept
        self.try_compile()
        provenance = {"model": self.autoencoder.fingerprint(), "tol": self.tol, "max_steps": self.max_steps}
        provenance |= {"compile": True} if self.compile else {}
        pairs = ((encoding, (encoding.latents, ids)) for encoding, ids in batches)
        explore = partial(self._passes, watchers=[], steps=steps, on_step=on_step)
        for (start, ids), evidence in accompanied(explore, pairs):
            if not self.needs.dictionary:
                yield None, evidence
            else:
                yield AttractorDictionary.from_trajectory(start, evidence.path(), ids, provenance), evidence

    def _warn_of_short_paths(self) -> None:
        reads = {s.label: s.needs().steps for s in self.scorers}
        cut = [label for label, steps in reads.items() if self.max_steps < steps < WHOLE_PATH]
        if cut:
            more = f" and {len(cut) - 1} more scorers" if len(cut) > 1 else ""
            warn(
                f"scorer {cut[0]}{more}: expected max_steps of at least {max(reads[label] for label in cut)}, got "
                f"{self.max_steps}: a path that has not converged by then is read as if it had: raise max_steps",
                stacklevel=3,
            )

    def learn(self, dictionary: AttractorDictionary | None, train: Evidence) -> ScorerSet:
        """Fit every scorer to the results of :meth:`explore`; returns self.

        Args:
            dictionary: end points of all training images, None if no scorer needs them.
            train: their evidence, to which the caller adds ``labels`` if a scorer needs them.
        Raises:
            TrajOODError: fewer than 2 training images, missing labels, features that are equal for all images or not
                finite, weights that changed since :meth:`explore`, or what a scorer refuses.
        Warns:
            UserWarning: a scorer reads more steps than a trajectory may have.
        """
        self._warn_of_short_paths()
        with self._fixed():
            _check_training(self.autoencoder.name, train)
            if self.needs.labels and train.labels is None:
                asking = next(s.label for s in self.scorers if s.needs().labels)
                raise no_labels(asking)
            if self.needs.head:
                train = replace(train, head=self.autoencoder.head())
            counts = [len(f) for f in train.features.values()] + ([len(dictionary)] if dictionary is not None else [])
            if counts:
                self.check_training_size(min(counts))
            self.attach(dictionary)
            if dictionary is not None:
                finite = dictionary.statuses != Status.NON_FINITE
                own = torch.where(finite, finite.cumsum(dim=0) - 1, -1)
                if self.needs.attractors:
                    ends = dictionary.usable().to(self.autoencoder.device)
                    views = sorted(self.needs.attractors)
                    train = replace(
                        train, attractors={v: self.autoencoder.latent_view(ends, v).cpu() for v in views}, own=own
                    )
                if self.needs.train_path:
                    train = replace(train, trajectory=self._walk_again(dictionary, own, train))
            for scorer in self.scorers:
                scorer.fit(train)
        return self

    def attach(self, dictionary: AttractorDictionary | None) -> None:
        """Set the attractors that distances are measured to, those of :meth:`learn` or of a file, and build their
        indices; None removes them."""
        self.dictionary = dictionary
        self._indices = {}
        if dictionary is not None:
            self._indices = {
                view: dictionary.index(self.autoencoder, view, self.backend, self.approximate)
                for view in sorted(self.needs.distances)
            }

    def score(self, images: Images | Encoding, on_step: OnStep | None = None) -> Scored:
        """Score images; each image's scores depend on that image alone.

        Args:
            images: as in :meth:`fit`, or an :class:`Encoding` of the model.
            on_step: see :func:`traj_ood.iterate`.
        Raises:
            TrajOODError: the scorers are not fitted, an image is invalid, or the model's weights have changed.
        """
        self._check_fitted()
        encoding = images if isinstance(images, Encoding) else self._examined(images)[0]
        return next(self.score_all([encoding], on_step))

    def score_all(self, encodings: Iterable[Encoding], on_step: OnStep | None = None) -> Iterator[Scored]:
        """:meth:`score` for each batch of a stream, in order, with several batches in progress at a time, so that the
        next batch uses the rows of f that the last one no longer needs (see :func:`traj_ood.iterate`).

        Args:
            encodings: the batches; read only as far as needed.
            on_step: see :func:`traj_ood.iterate`.
        Raises:
            TrajOODError: as :meth:`score`.
        """
        self._check_fitted()
        watchers = [NearestAttractor(self.autoencoder, index, view) for view, index in self._indices.items()]
        for evidence in self._passes(encodings, watchers, self.needs.steps, on_step, self._low_precision()):
            with self.autoencoder.fixed():
                scores = {s.label: tried_scores(s, evidence) for s in self.scorers}
            yield Scored(scores, evidence)

    def _check_fitted(self) -> None:
        if self.needs.dictionary and self.dictionary is None:
            raise TrajOODError("these scorers are not fitted: call fit with ID training images first")

    def _examined(self, images: Images) -> tuple[Encoding, list[Any] | None]:
        """The encoding of images of any kind, and their labels if they have any."""
        if isinstance(images, Tensor | np.ndarray | Normalised):
            return self.autoencoder.examine(prepare(self.autoencoder, images)), None
        read = list(batches(self.autoencoder, images))
        labels = [label for batch in read for label in batch.labels]
        pixels = [batch.images for batch in read] or [torch.empty(0, *self.autoencoder.input_shape)]
        return self.autoencoder.examine(torch.cat(pixels)), labels or None

    def _passes(
        self,
        encodings: Iterable[Encoding],
        watchers: Sequence[Observer],
        steps: int,
        on_step: OnStep | None,
        low_precision: LowPrecision | None = None,
    ) -> Iterator[Evidence]:
        """Yield the evidence of each batch of a stream, in order.

        Args:
            encodings: the batches.
            watchers: observers of the points, such as those that measure distances to attractors.
            steps: number of steps to make; f is not iterated if there are neither steps nor watchers.
            on_step, low_precision: see :func:`traj_ood.iterate`.
        """
        if isinstance(encodings, Encoding):
            raise TrajOODError("encodings: expected several, such as a list or generator, got one: put it into a list")
        if not (steps or watchers):
            for encoding in encodings:
                _check_encoding(encoding)
                yield self._evidence(encoding, None, {})
            return
        model, first = self.autoencoder, 0
        encodings = iter(encodings)
        # The first one is made before the chunk is read below, because a model's first encode may reduce its chunk.
        encodings = chain(list(islice(encodings, 1)), encodings)
        views: list[FeatureView] = sorted({view for view, _ in self.needs.points})
        keepers = [KeptPoints(model, view, self.needs.points) for view in views]

        def starts() -> Iterator[tuple[Tensor, Encoding]]:
            for encoding in encodings:
                _check_encoding(encoding)
                # A copy, because the caller may reuse the target's buffer while the samples are in progress.
                is_read = self.needs.reconstruction or "entry" in self.needs.features
                target = encoding.target.clone() if is_read else encoding.target
                yield encoding.latents, replace(encoding, target=target)

        def walk(latents: Iterator[Tensor]) -> Iterator[Trajectory]:
            return iterate(
                self._self_map(),
                latents,
                tol=self.tol,
                max_steps=min(self.max_steps, max(1, steps)),  # at least one, so that z0 is measured
                observers=[Norm(), *watchers, *keepers],
                chunk=model.rows,
                on_step=on_step,
                low_precision=low_precision,
            )

        for encoding, path in accompanied(walk, starts()):
            points: dict[tuple[FeatureView, int], Tensor] = {}
            for keeper in keepers:
                points |= keeper.points(path, first)
            first += len(path)
            yield self._evidence(encoding, path, points)

    def _evidence(
        self, encoding: Encoding, path: Trajectory | None, points: Mapping[tuple[FeatureView, int], Tensor]
    ) -> Evidence:
        model = self.autoencoder
        with self._fixed():
            reconstruction = {}
            if "plain" in self.needs.reconstruction:
                difference = (model.decode(encoding.latents) - encoding.target.to(model.device)).flatten(1)
                # Not a mean: torch splits the mean of one long row among threads, which changes its rounding.
                reconstruction["plain"] = difference.norm(dim=1).cpu().double().square() / difference.shape[1]
            if "masked" in self.needs.reconstruction:
                reconstruction["masked"] = model.reconstruct_masked(encoding.target)
            features = {view: model.feature_view(encoding, view) for view in sorted(self.needs.features)}
            logits = encoding.logits if self.needs.logits else None
            divergence = divergence_at(model.self_map, encoding.latents, model.chunk) if self.needs.divergence else None
            return Evidence(features, reconstruction, path, points, logits=logits, divergence=divergence)  # type: ignore[arg-type]

    def _low_precision(self) -> LowPrecision | None:
        """The low-precision map, for at most half of the set's step limit, which does not depend on the scorers."""
        if self.precision == "fp32" or self.max_steps < 2:
            return None
        cheap = bfloat16_map(self.autoencoder.self_map, self.autoencoder.device)
        return LowPrecision(cheap, max_steps=self.max_steps // 2)

    def _walk_again(self, dictionary: AttractorDictionary, own: Tensor, train: Evidence) -> Trajectory:
        """Compute the training trajectories a second time, to measure their distances to the attractors."""
        model = self.autoencoder
        start = train.features["tokens"].reshape(-1, *dictionary.points.shape[1:]).to(model.device)
        steps = max(s.needs().steps for s in self.scorers if s.needs().train_path)
        return iterate(
            self._self_map(),
            start,
            tol=self.tol,
            max_steps=min(self.max_steps, steps),
            observers=[Norm(), *(NearestOther(model, index, view, own) for view, index in self._indices.items())],
            chunk=model.chunk,
        )


def _check_encoding(encoding: object) -> None:
    if not isinstance(encoding, Encoding):
        raise TrajOODError(
            f"encodings: expected results of autoencoder.examine(images), got {type(encoding).__name__}: for images "
            "use score, or examine them first"
        )


def _check_training(model: str, train: Evidence) -> None:
    """Refuse features or points of the path that are not finite, and features that are all equal."""
    read = {f"features ({view})": f for view, f in train.features.items()}
    read |= {f"point z{t} ({view})": points for (view, t), points in train.points.items()}
    for name, values in read.items():
        odd = (~values.flatten(1).isfinite().all(dim=1)).nonzero()[:, 0]
        if len(odd):
            raise TrajOODError(
                f"{model}: {name} of {len(odd)} of {len(values)} training images are not finite, first for image "
                f"{int(odd[0])} (from 0): check the model's weights and the images' normalisation"
            )
    for view, features in train.features.items():
        if len(features) > 1 and bool((features == features[:1]).all()):
            raise TrajOODError(
                f"{model}: the features ({view}) of all {len(features)} training images are equal: expected different "
                "images, and a model that distinguishes them"
            )
