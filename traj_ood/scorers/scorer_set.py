"""One pass over images for any number of scorers: encode once, iterate once, and let every scorer read the evidence."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce, wraps
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from traj_ood.attractors import AttractorDictionary, NearestAttractor, NearestOther
from traj_ood.autoencoders import Autoencoder, Encoding, FeatureView, View
from traj_ood.data.batches import Images, batches
from traj_ood.data.preprocessing import Normalised, prepare
from traj_ood.dynamics.chunks import filled
from traj_ood.dynamics.compiled import CompiledMap
from traj_ood.dynamics.device import bfloat16_map
from traj_ood.dynamics.fixed_function import KnownWeights
from traj_ood.dynamics.host import where
from traj_ood.dynamics.iterate import Norm, Observer, iterate
from traj_ood.dynamics.jacobian import divergence_at
from traj_ood.dynamics.maps import LowPrecision, SelfMap
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError, check_word
from traj_ood.index import Approximate, Backend, NeighborIndex
from traj_ood.scorers import WHOLE_PATH, Evidence, Needs, Scorer, create_scorers
from traj_ood.scorers.registry import lacking

OnStep = Callable[[int, int], None]
Precision = Literal["fp32", "bf16"]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _of_fixed_model(method: _Method) -> _Method:
    """A method of :class:`ScorerSet` under ``autoencoder.fixed()``, after a look at the model's weights."""

    @wraps(method)
    def guarded(self: ScorerSet, *args: Any, **options: Any) -> Any:
        with self.autoencoder.fixed():
            self.check_weights()
            return method(self, *args, **options)

    return cast("_Method", guarded)


@dataclass(frozen=True)
class Scored:
    """Scores of B images: label → (B,) float64, higher = more OOD, and the evidence they were read from."""

    scores: dict[str, Tensor]
    evidence: Evidence


class ScorerSet:
    """An autoencoder and scorers that share one pass over its images.

    >>> scorers = ScorerSet(autoencoder, ["trajectory", "knn"])         # doctest: +SKIP
    >>> scorers.fit(train_images).score(test_images).scores["knn"]      # doctest: +SKIP

    Args:
        autoencoder: the model.
        scorers: names with options (see :func:`traj_ood.create_scorer`), or ``all``.
        tol, max_steps: of :func:`traj_ood.iterate`; defaults are the paper's 1e-5 and 500.
        backend, approximate: of :class:`traj_ood.NeighborIndex`.
        precision: ``bf16`` takes the first steps of scored images in bfloat16 (see :class:`traj_ood.LowPrecision` for
            what that changes). Default ``fp32``. Training trajectories are always fp32: attractors that are off move
            every score.
        compile: f through ``torch.compile``, see :class:`traj_ood.dynamics.compiled.CompiledMap`: every path, those of
            training images, too, within 1e-5 of the plain scores. Default false: docs/performance.md says what it
            brings. Calls of fewer rows than the model's ``chunk``, and the first steps of ``bf16``, stay as they are.
            Where the compiler fails a warning says so, f itself computes, and :attr:`compile` becomes false.
    Raises:
        TrajOODError: unknown scorers or options, or a scorer that reads what this model does not have.
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
        check_word("precision", precision, Precision)
        self.autoencoder = autoencoder
        self.scorers: list[Scorer] = create_scorers(scorers, autoencoder)
        for scorer in self.scorers:
            lack = lacking(autoencoder, scorer.needs())
            if lack is not None:
                raise TrajOODError(f"scorer {scorer.label}: {lack}")
        self.tol, self.max_steps = tol, max_steps
        self.backend, self.approximate, self.precision = backend, approximate, precision
        self.compile = compile
        self._compiled: CompiledMap | None = None
        self.needs: Needs = reduce(lambda a, b: a | b, (s.needs() for s in self.scorers))
        self.dictionary: AttractorDictionary | None = None
        self._indices: dict[View, NeighborIndex] = {}
        self._weights: KnownWeights | None = None

    @property
    def labels(self) -> list[str]:
        return [s.label for s in self.scorers]

    @property
    def needs_dictionary(self) -> bool:
        return bool(self.needs.distances or self.needs.attractors or self.needs.train_path)

    def check_training_size(self, count: int) -> None:
        """Refuse too few training images before anything is computed.

        Raises:
            TrajOODError: fewer than 2, or fewer than a scorer needs.
        """
        if count < 2:
            raise TrajOODError(f"fewer than 2 ID samples: expected at least 2 ID training images, got {count}")
        for scorer in self.scorers:
            scorer.check_training_size(count)

    def try_compile(self) -> None:
        """Compile f now, where that was asked for and has not been done. Afterwards :attr:`compile` says whether paths
        are walked with a compiled f, before any was: whatever keeps results says by it whose they are."""
        self.compile = self.compile and bool(self.needs.steps or self.needs.points or self.needs_dictionary)
        if not self.compile or self._compiled is not None:
            return
        model = self.autoencoder
        self._compiled = CompiledMap(model.self_map, rows=model.chunk)
        start = model.encode(torch.zeros(1, *model.input_shape, device="cpu"))
        with model.fixed(), torch.inference_mode():
            self._compiled(filled(start, model.chunk))
        self.compile = not self._compiled.fell_back

    def _self_map(self) -> SelfMap:
        """f, as paths are walked with it."""
        self.try_compile()
        return self._compiled if self.compile and self._compiled is not None else self.autoencoder.self_map

    def check_weights(self) -> None:
        """Refuse a model whose weights or buffers are others than when the scorers learnt from it. Equal weights that
        were loaded again, or moved to another device, are the same. The first call learns them.

        Raises:
            TrajOODError: names the model: fit again.
        """
        if self._weights is None:
            self._weights = KnownWeights(self.autoencoder)
        else:
            self._weights.check()

    def fit(
        self,
        images: Images,
        ids: Sequence[str] | None = None,
        labels: Tensor | Sequence[Any] | None = None,
        on_step: OnStep | None = None,
    ) -> ScorerSet:
        """Learn from ID training images.

        Args:
            images: N images of any kind that a detector takes: (N, C, H, W) uint8 pixels or floats in [0, 1], a list
                of Pillow images or paths, a Dataset or DataLoader, an ImageSource; or :class:`traj_ood.Normalised`, in
                the model's own units. All of them are in memory at once; for more, use a Detector or an Evaluator.
            ids: N names for the attractors. Default: their numbers.
            labels: N classes, (N,) int64 from 0 on, or whole numbers or texts in a list or array; only
                class-conditional scorers read them. Default: those that a Dataset or DataLoader gives with its images.
            on_step: see :func:`traj_ood.iterate`.
        Raises:
            TrajOODError: fewer than 2 images, what is no image, or what a scorer refuses.
        """
        self._weights = None
        encoding, own = self._examined(images)
        labels = own if labels is None and self.needs.labels else labels
        if ids is not None and len(ids) != len(encoding):
            raise TrajOODError(f"ids: expected a name for each of {len(encoding)} images, got {len(ids)}")
        self.check_training_size(len(encoding))
        dictionary, evidence = self.explore(encoding, tuple(ids or map(str, range(len(encoding)))), on_step)
        return self.learn(dictionary, replace(evidence, labels=_numbered(labels, len(encoding))))

    def explore(
        self, encoding: Encoding, ids: tuple[str, ...], on_step: OnStep | None = None
    ) -> tuple[AttractorDictionary | None, Evidence]:
        """The training pass over one batch: its end points (None when no scorer needs them) and its evidence."""
        return next(self.explore_all([(encoding, ids)], on_step))

    def explore_all(
        self, batches: Iterable[tuple[Encoding, tuple[str, ...]]], on_step: OnStep | None = None
    ) -> Iterator[tuple[AttractorDictionary | None, Evidence]]:
        """:meth:`explore` of each batch of a stream, in its order, several of them under way at once."""
        kept = max((t for _, t in self.needs.points), default=0)
        steps = WHOLE_PATH if self.needs_dictionary else kept
        taken: deque[tuple[Tensor, tuple[str, ...]]] = deque()

        def encodings() -> Iterator[Encoding]:
            for encoding, ids in batches:
                taken.append((encoding.latents, ids))
                yield encoding

        self.try_compile()
        provenance = {"model": self.autoencoder.fingerprint(), "tol": self.tol, "max_steps": self.max_steps}
        provenance |= {"compile": True} if self.compile else {}
        for evidence in self._passes(encodings(), [], steps, on_step):
            start, ids = taken.popleft()
            if not self.needs_dictionary:
                yield None, evidence
            else:
                yield AttractorDictionary.from_trajectory(start, evidence.path(), ids, provenance), evidence

    @_of_fixed_model
    def learn(self, dictionary: AttractorDictionary | None, train: Evidence) -> ScorerSet:
        """Fit every scorer on what :meth:`explore` returned; ``train.labels`` are the caller's to add.

        Raises:
            TrajOODError: fewer than 2 training images, no labels where a scorer needs them, training images that the
                model does not tell apart or whose features are not finite, weights that changed since :meth:`explore`,
                or what a scorer refuses.
        """
        _check_training(self.autoencoder.name, train)
        if self.needs.labels and train.labels is None:
            asking = next(s.label for s in self.scorers if s.needs().labels)
            raise TrajOODError(f"scorer {asking}: expected class labels of the training images, got none")
        if self.needs.head:
            train = replace(train, head=self.autoencoder.head())
        counts = [len(f) for f in train.features.values()] + ([len(dictionary)] if dictionary is not None else [])
        if counts:
            self.check_training_size(min(counts))
        self.attach(dictionary)
        if dictionary is not None:
            own = _own_attractors(dictionary)
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
        """Measure distances to these attractors: those that :meth:`learn` was given, or that were kept of it."""
        self.dictionary = dictionary
        self._indices = {}
        if dictionary is not None:
            self._indices = {
                view: dictionary.index(self.autoencoder, view, self.backend, self.approximate)
                for view in sorted(self.needs.distances)
            }

    def score(self, images: Images | Encoding, on_step: OnStep | None = None) -> Scored:
        """Score images, as in :meth:`fit`, or what the model made of them; each image's scores depend on it alone.

        Raises:
            TrajOODError: not fitted, what is no image, or a model whose weights have changed since.
        """
        self._check_fitted()
        encoding = images if isinstance(images, Encoding) else self._examined(images)[0]
        return next(self.score_all([encoding], on_step))

    def score_all(self, encodings: Iterable[Encoding], on_step: OnStep | None = None) -> Iterator[Scored]:
        """:meth:`score` of each batch of a stream, in its order, several of them under way at once: rows of f that one
        batch no longer needs are the next one's (see :func:`traj_ood.iterate`).

        Args:
            encodings: read no further than needed.
            on_step: see :func:`traj_ood.iterate`.
        Raises:
            TrajOODError: as :meth:`score`.
        """
        self._check_fitted()
        watchers = [NearestAttractor(self.autoencoder, index, view) for view, index in self._indices.items()]
        for evidence in self._passes(encodings, watchers, self.needs.steps, on_step, self._low_precision()):
            with self.autoencoder.fixed():
                scores = {s.label: s.score(evidence) for s in self.scorers}
            yield Scored(scores, evidence)

    def _check_fitted(self) -> None:
        if self.needs_dictionary and self.dictionary is None:
            raise TrajOODError("these scorers are not fitted: call fit with ID training images first")

    def _examined(self, images: Images) -> tuple[Encoding, list[Any] | None]:
        """What the model makes of images, and their labels where they come with some."""
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
        """The evidence of each batch of a stream."""
        if isinstance(encodings, Encoding):
            raise TrajOODError("encodings: expected several, such as a list or generator, got one: put it into a list")
        if not (steps or watchers):
            for encoding in encodings:
                _check_encoding(encoding)
                yield self._evidence(encoding, None, {})
            return
        model, first = self.autoencoder, 0
        keepers = [_Points(model, view, self.needs.points) for view in _views(self.needs.points)]
        taken: deque[Encoding] = deque()

        def starts() -> Iterator[Tensor]:
            for encoding in encodings:
                _check_encoding(encoding)
                # The target may be a buffer that its owner fills again while the samples are under way.
                target = encoding.target.clone() if self.needs.reconstruction else encoding.target
                taken.append(replace(encoding, target=target))
                yield encoding.latents

        for path in iterate(
            self._self_map(),
            starts(),
            tol=self.tol,
            max_steps=min(self.max_steps, max(1, steps)),  # one step still measures z0
            observers=[Norm(), *watchers, *keepers],
            chunk=model.rows,
            on_step=on_step,
            low_precision=low_precision,
        ):
            points: dict[tuple[FeatureView, int], Tensor] = {}
            for keeper in keepers:
                points |= keeper.points(path, first)
            first += len(path)
            yield self._evidence(taken.popleft(), path, points)

    @_of_fixed_model
    def _evidence(
        self, encoding: Encoding, path: Trajectory | None, points: Mapping[tuple[FeatureView, int], Tensor]
    ) -> Evidence:
        model = self.autoencoder
        reconstruction = {}
        if "plain" in self.needs.reconstruction:
            difference = (model.decode(encoding.latents) - encoding.target.to(model.device)).flatten(1)
            # Not a mean: torch splits that of one long row among its threads, and then rounds it otherwise.
            reconstruction["plain"] = difference.norm(dim=1).cpu().double().square() / difference.shape[1]
        if "masked" in self.needs.reconstruction:
            reconstruction["masked"] = model.reconstruct_masked(encoding.target)
        features = {view: model.feature_view(encoding, view) for view in sorted(self.needs.features)}
        logits = encoding.logits if self.needs.logits else None
        divergence = divergence_at(model.self_map, encoding.latents, model.chunk) if self.needs.divergence else None
        return Evidence(features, reconstruction, path, points, logits=logits, divergence=divergence)  # type: ignore[arg-type]

    def _low_precision(self) -> LowPrecision | None:
        """Half of the run's own step limit at most: that of one call follows the other scorers of the set."""
        if self.precision == "fp32" or self.max_steps < 2:
            return None
        cheap = bfloat16_map(self.autoencoder.self_map, self.autoencoder.device)
        return LowPrecision(cheap, max_steps=self.max_steps // 2)

    def _walk_again(self, dictionary: AttractorDictionary, own: Tensor, train: Evidence) -> Trajectory:
        """The training trajectories once more, now that there are attractors to measure their distance to."""
        model = self.autoencoder
        start = train.features["tokens"].reshape(-1, *dictionary.points.shape[1:])
        start = start.to(model.device, dictionary.points.dtype)  # features are float32, a model may be float64
        steps = max(s.needs().steps for s in self.scorers if s.needs().train_path)
        return iterate(
            self._self_map(),
            start,
            tol=self.tol,
            max_steps=min(self.max_steps, steps),
            observers=[Norm(), *(NearestOther(model, index, view, own) for view, index in self._indices.items())],
            chunk=model.chunk,
        )


def _own_attractors(dictionary: AttractorDictionary) -> Tensor:
    """(N,) int64 place of each training image's end point among those that are finite, −1 of one that is not."""
    kept = dictionary.statuses != Status.NON_FINITE
    return torch.where(kept, kept.cumsum(dim=0) - 1, -1)


class _Points:
    """Observer that keeps one latent view of the points z_t for a few t."""

    def __init__(self, model: Autoencoder, view: FeatureView, wanted: frozenset[tuple[FeatureView, int]]) -> None:
        self.name = f"points/{view}"
        self._model, self._view = model, view
        self._seen: dict[int, list[tuple[Tensor, Tensor]]] = {t: [] for v, t in sorted(wanted) if v == view}

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> None:
        for t, pieces in self._seen.items():
            there = steps == t
            if bool(there.any()):
                points = latents[where(there, latents.device)]
                pieces.append((rows[there], self._model.latent_view(points, self._view).cpu()))

    def points(self, path: Trajectory, first: int) -> dict[tuple[FeatureView, int], Tensor]:
        """What was kept of the samples of ``path``, whose numbers begin at ``first``; those before are forgotten.

        A sample that ended before t is at its end then, one that left the finite numbers nowhere.
        """
        end = self._model.latent_view(path.final, self._view).cpu().clone()  # a view may be the points themselves
        end[path.status == Status.NON_FINITE] = torch.nan
        found = {}
        for t, pieces in self._seen.items():
            found[self._view, t] = points = end.clone()
            for rows, values in pieces:
                mine = (rows >= first) & (rows < first + len(path))
                points[rows[mine] - first] = values[mine]
            self._seen[t] = [(rows, values) for rows, values in pieces if int(rows.max()) >= first + len(path)]
        return found


def class_numbers(labels: Any, count: int) -> Tensor:
    """(N,) int64 classes 0 … C − 1 of N whole numbers or texts: a list, tensor, NumPy array or pandas column.

    Raises:
        TrajOODError: not ``count`` of them, or of another kind.
    """
    values = labels.tolist() if hasattr(labels, "tolist") else labels
    values = list(values) if isinstance(values, Iterable) else [values]
    if len(values) != count or any(not isinstance(v, int | str) or isinstance(v, bool) for v in values):
        raise TrajOODError(
            f"labels: expected {count} whole numbers or texts, one per image, got {len(values)} of "
            f"{', '.join(sorted({type(v).__name__ for v in values})) or 'nothing'}"
        )
    # Sorted as numbers where they are: the same classes have the same numbers however they are written.
    order = sorted({str(v) for v in values}, key=lambda text: (len(text), text))
    number = {text: i for i, text in enumerate(order)}
    return torch.tensor([number[str(v)] for v in values])


def _check_encoding(encoding: object) -> None:
    if not isinstance(encoding, Encoding):
        raise TrajOODError(
            f"encodings: expected what autoencoder.examine(images) returns, got {type(encoding).__name__}: for images "
            "use score, or examine them first"
        )


def _numbered(labels: Any, count: int) -> Tensor | None:
    return labels if labels is None or isinstance(labels, Tensor) else class_numbers(labels, count)


def _check_training(model: str, train: Evidence) -> None:
    """Refuse training images that no scorer can learn from.

    Raises:
        TrajOODError: features or points of the path that are not finite, or features that are all the same.
    """
    read = {f"features ({view})": f for view, f in train.features.items()}
    read |= {f"point z{t} ({view})": points for (view, t), points in train.points.items()}
    for name, values in read.items():
        odd = (~values.flatten(1).isfinite().all(dim=1)).nonzero()[:, 0]
        if len(odd):
            raise TrajOODError(
                f"{model}: {name} of {len(odd)} of {len(values)} training images not finite, first of image "
                f"{int(odd[0])} (from 0): check the model's weights and the images' normalisation"
            )
    for view, features in train.features.items():
        if len(features) > 1 and bool((features == features[:1]).all()):
            raise TrajOODError(
                f"{model}: the features ({view}) of all {len(features)} training images are the same: expected images "
                "that differ, and a model that tells them apart"
            )


def _views(points: frozenset[tuple[FeatureView, int]]) -> list[FeatureView]:
    return sorted({view for view, _ in points})
