"""Detector: a model, one fitted scorer and a threshold from ID data, as one object and one folder."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from traj_ood.attractors import AttractorDictionary
from traj_ood.autoencoders import Autoencoder, Encoding
from traj_ood.data.batches import Batch, Images, OnError, batches, count_of
from traj_ood.data.decoding import AS_STORED, Reading
from traj_ood.data.encoded import EncodedImages
from traj_ood.data.images import FileImages
from traj_ood.detector.conformal import Calibration, check_count, entry, images_needed
from traj_ood.detector.decision import Decision, Judgement, decide_each
from traj_ood.detector.folder import Parts, read_detector, write_detector
from traj_ood.detector.hub import OnTheHub
from traj_ood.detector.labels import classes_given, labels_of, numbered
from traj_ood.detector.module import as_module
from traj_ood.detector.scorer import forget_fit, one_scorer
from traj_ood.detector.tensors import digests_of
from traj_ood.dynamics.fixed_function import few_images
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError, check_word, warn
from traj_ood.index import Approximate, Backend
from traj_ood.io.trees import as_json
from traj_ood.scorers import WHOLE_PATH, Evidence, Scorer, recommended
from traj_ood.scorers.scorer_set import Scored, ScorerSet
from traj_ood.text import printable

OnKnown = Literal["raise", "skip"]
_MAX_SEEN_SHARE = 0.01


class Detector(OnTheHub):
    """Is this image out of distribution? A model, a scorer fitted on ID images, and a threshold.

    >>> detector = Detector.fit(autoencoder, train_images, "field")     # doctest: +SKIP
    >>> detector.calibrate(held_out_id_images, tpr=0.95)                # doctest: +SKIP
    >>> detector.predict(new_images)                                    # doctest: +SKIP
    >>> detector.save("my-detector")                                    # doctest: +SKIP
    >>> Detector.load("my-detector").judge(new_images)                  # doctest: +SKIP

    Images are given as pixels in memory (uint8, or floats in [0, 1]; tensors or arrays of shape (B, C, H, W), or one
    (C, H, W)), as an ImageSource, a list of PIL images or of paths, a Dataset or a DataLoader. Pixels of the model's
    own size count as resized and cropped; all others go the way of a file. Tensors in the model's own units are given
    as :class:`traj_ood.Normalised`. Images are read in batches, so memory does not grow with their number.

    An image has the same score in any batch, order and place, within 1e-9 relative, and within 1e-5 alone or among
    fewer images than the network takes in one call (see :meth:`score`); the same batches on the same machine give the
    same bytes. Another processor rounds a float32 network otherwise, and so may another number of
    threads, which moves scores: on the bundled model most by less than 3e-6, single ones by up to 1e-3, by 0.5 % where
    a path stops a step earlier, and `end-distance`, the gap between two nearly equal points, by several times its own
    size.

    Attributes:
        scorers: the :class:`traj_ood.ScorerSet` of the model and its one scorer.
        calibration: None until :meth:`calibrate`.
        training: JSON-able facts of the fit, for the model card.
        history: JSON-able facts of every calibration, oldest first, for the model card.
        batch_size, workers: of reading, see :func:`traj_ood.data.batches`. They change time and memory, no result.
        reading: how image files become pixels, a :class:`traj_ood.data.Reading`: as those of the training images did.
    """

    def __init__(
        self,
        scorers: ScorerSet,
        *,
        training: Mapping[str, Any],
        seen: Tensor,
        calibration: Calibration | None = None,
        history: Sequence[Mapping[str, Any]] = (),
        batch_size: int | None = None,
        workers: int = 2,
    ) -> None:
        """Use :meth:`fit` or :meth:`load`. ``seen`` are the (N,) int64 digests of the training images."""
        self.scorers, self.calibration = scorers, calibration
        self.training, self.batch_size, self.workers = dict(training), batch_size, workers
        self._seen, self.history = seen, [dict(entry) for entry in history]
        self.reading = Reading(**self.training.get("reading", {}))

    @property
    def autoencoder(self) -> Autoencoder:
        """The model."""
        return self.scorers.autoencoder

    @property
    def scorer(self) -> Scorer:
        """The fitted scorer."""
        return self.scorers.scorers[0]

    def __repr__(self) -> str:
        state = "not calibrated" if self.calibration is None else f"threshold {self.calibration.threshold:.6g}"
        return f"Detector({self.autoencoder.name}, {self.scorer.label}, {state})"

    # ------------------------------------------------------------------ learning

    @classmethod
    def fit(
        cls,
        autoencoder: Autoencoder,
        images: Images,
        scorer: str | None = None,
        *,
        labels: Tensor | Sequence[Any] | None = None,
        tol: float = 1e-5,
        max_steps: int = 500,
        backend: Backend = "auto",
        approximate: Approximate = "none",
        compile: bool = False,
        batch_size: int | None = None,
        workers: int = 2,
        on_error: OnError = "raise",
        quiet: bool = True,
    ) -> Detector:
        """Fit one scorer on ID training images; memory holds what the scorer learns from, and a few batches.

        Args:
            autoencoder: the model, on the device to compute on.
            images: ID training images.
            scorer: name with options, see :func:`traj_ood.create_scorer`. Default: the one that is recommended for the
                kind of model, see :func:`traj_ood.recommended`.
            labels: N classes (whole numbers or texts) for class-conditional scorers. Default: those that the source,
                Dataset or DataLoader gives.
            tol, max_steps: of :func:`traj_ood.iterate`; the paper's.
            backend, approximate: of :class:`traj_ood.NeighborIndex`.
            compile: of :class:`traj_ood.ScorerSet`, for the fit and for this object's scores. ``training`` says so; a
                detector that is loaded asks for it anew. Default false.
            batch_size, workers: see the class.
            on_error: ``raise`` (default) or ``skip`` images that cannot be read; their number is in ``training``.
            quiet: no progress bar. Default true, since this is a library call.
        Raises:
            TrajOODError: too few images, an unknown scorer or one that the model cannot serve, missing labels, images
                that cannot be read, or a model that leaves the finite numbers on them.
        """
        spec = recommended(autoencoder).scorer if scorer is None else scorer
        scorers = one_scorer(autoencoder, spec, tol, max_steps, backend, approximate, compile)
        count = count_of(images)
        scorers.check_training_size(count)
        classes = classes_given(scorers, images, labels, count)
        files = Reading(images.exif, images.bit_depth) if isinstance(images, FileImages | EncodedImages) else AS_STORED
        reading = batches(autoencoder, images, batch_size, workers, on_error, files)
        with tqdm(total=count, desc=printable(f"fit {scorers.labels[0]}"), unit="img", delay=2, disable=quiet) as bar:
            found = _explore(scorers, reading, bar)
        dictionary = AttractorDictionary.concatenate(found.dictionaries) if found.dictionaries else None
        if classes is None and scorers.needs.labels:
            classes = numbered(found.labels, len(found.rows), scorers)
        elif classes is not None:
            classes = classes[found.rows]
        train = replace(Evidence.join(found.evidence), labels=classes)
        scorers.learn(dictionary, train)
        forget_fit(scorers)
        health = None if dictionary is None else as_json(dictionary.health().as_dict())
        training = {
            "images": len(found.rows),
            "skipped": found.skipped,
            "classes": None if classes is None else len(classes.unique()),
            "list": images.digest() if hasattr(images, "digest") else None,
            "attractors": health,
            **({"reading": files.options()} if files != AS_STORED else {}),
            **({"compile": True} if scorers.compile else {}),
        }
        _warn_of_attractors(scorers, health)
        return cls(scorers, training=training, seen=torch.cat(found.seen), batch_size=batch_size, workers=workers)

    def calibrate(
        self,
        images: Images,
        tpr: float = 0.95,
        *,
        labels: Tensor | Sequence[Any] | None = None,
        on_error: OnError = "raise",
        on_known: OnKnown = "raise",
        note: str = "",
    ) -> Detector:
        """Set the threshold and make p-values possible, from ID images alone.

        Args:
            images: ID images that neither the scorer nor the model was trained on, drawn as new ID images will be: the
                guarantee is about images like these. The scorer's own training images are recognised by their pixels:
                they score too low, so that a threshold from them rejects too many new ID images. More than 1 % of
                them is an error; a few are a warning, because data sets do hold the same image twice. What the model
                was trained on cannot be recognised.
            tpr: share of new ID images to accept, at least. Default 0.95, as in FPR95.
            labels: a class (whole number or text) of each image: ``tpr`` then holds in every class (see
                :mod:`traj_ood.detector.conformal`). Default None: over all images.
            on_error: see :meth:`fit`.
            on_known: ``raise`` (default), or ``skip`` the scorer's training images, however many, with a warning: for
                images that were held out of a set which holds images twice.
            note: a line for :attr:`history`, such as where the images are from. Default: none.
        Returns:
            This detector.
        Raises:
            TrajOODError: too few images for ``tpr`` (the message says how many are needed), training images among
                them, or scores that are not finite.
        """
        check_word("value of on_known", on_known, OnKnown)
        check_count(count := count_of(images), tpr)
        classes = None if labels is None else labels_of(labels, count)
        scores, known = [_nothing(torch.float64)], [_nothing(torch.bool)]
        ids: list[str] = []
        rows: list[int] = []
        for batch, scored in self._scored(self._read(images, on_error)):
            scores.append(scored.scores[self.scorer.label])
            known.append(torch.isin(digests_of(batch.images), self._seen))
            ids += batch.ids
            rows += batch.rows
        kept = self._unknown(torch.cat(known), ids, tpr, on_known)
        values = torch.cat(scores)[kept]
        if classes is None:
            self.calibration = Calibration(values, tpr)
        else:
            self.calibration = Calibration.of_classes(values, [classes[rows[i]] for i in kept.nonzero()[:, 0]], tpr)
        self.history.append(entry(self.calibration, note))
        return self

    def _unknown(self, known: Tensor, ids: Sequence[str], tpr: float, on_known: OnKnown) -> Tensor:
        """(n,) bool: the images to calibrate on are all, or with ``skip`` those that the scorer has not learnt from."""
        count = int(known.sum())
        if not count:
            return ~known
        what = (
            f"calibration: {count} of {len(ids)} images are pixel by pixel training images of this detector (first: "
            f"{ids[int(known.nonzero()[0])]!r})"
        )
        if on_known == "raise" and count > _MAX_SEEN_SHARE * len(ids):
            raise TrajOODError(f"{what}, which score too low: calibrate with ID images that nothing was trained on")
        if on_known == "skip" and len(ids) - count < images_needed(tpr):
            raise TrajOODError(
                f"{what} and cannot be used, and the {len(ids) - count} others are fewer than the {images_needed(tpr)} "
                f"that accepting {tpr:.6g} of new ID images needs: remove images that are there twice, or give "
                "calibration images of their own"
            )
        warn(what + (", and are left out" if on_known == "skip" else ""), stacklevel=3)
        return ~known if on_known == "skip" else torch.ones_like(known)

    # ------------------------------------------------------------------ judging

    def score(self, images: Images, *, whole_chunks: bool = False) -> Tensor:
        """(B,) float64, higher = more OOD; +inf where the model leaves the finite numbers (see :class:`Judgement`).

        Args:
            whole_chunks: fill the network's calls up also when there are few images. Default false: one image takes a
                fifth of the time, and its score is that in a long stream to 1e-5 in place of 1e-9, relative. Streams
                (``traj-ood score``) and :meth:`calibrate` have it true.
        Raises:
            TrajOODError: images that cannot be read, or of the wrong shape.
        """
        return self._judged(images, whole_chunks)[0]

    def predict(self, images: Images) -> Tensor:
        """(B,) bool, True = OOD: the score is above the threshold.

        The same as ``p_value(images) <= calibration.level``, image by image, exactly.

        Raises:
            TrajOODError: not calibrated, or as :meth:`score`.
        """
        return self._calibrated().decide(self.score(images))

    def p_value(self, images: Images) -> Tensor:
        """(B,) float64 (1 + #{calibration scores >= score}) / (n + 1): small = unlike the calibration images.

        Raises:
            TrajOODError: not calibrated, or as :meth:`score`.
        """
        return self._calibrated().p_values(self.score(images))

    def judge(
        self, images: Images, labels: Tensor | Sequence[Any] | None = None, *, whole_chunks: bool = False
    ) -> Judgement:
        """Scores, p-values and decisions in one pass; p-values and decisions are None without calibration.

        Args:
            labels: B classes where they are known; of use with class-wise calibration, see
                :meth:`traj_ood.detector.conformal.Calibration.p_values`. Default: unknown.
            whole_chunks: see :meth:`score`.
        Raises:
            TrajOODError: as :meth:`score`.
        """
        scores, steps, status = self._judged(images, whole_chunks)
        known = self.calibration
        if known is None:
            return Judgement(scores, None, None, steps, status)
        classes = None if labels is None else labels_of(labels, len(scores))
        return Judgement(scores, known.p_values(scores, classes), known.decide(scores, classes), steps, status)

    def decide(self, images: Images) -> list[Decision]:
        """One :class:`traj_ood.Decision` per image, in order; what cannot be read or judged is ``invalid: …``, not an
        error. The same as the rows of ``traj-ood score`` (few images to 1e-5) and the answers of ``traj-ood serve``.

        Raises:
            TrajOODError: what no images can be taken from, such as a single path; a DataLoader that cannot be read, as
                none of its images can be read alone.
        """
        return decide_each(self.judge, images, count_of(images), self.batch_size)

    def as_module(self, steps: int | None = None) -> nn.Module:
        """This detector as an nn.Module on image batches; see :func:`traj_ood.detector.module.as_module`.

        Raises:
            TrajOODError: a scorer that cannot be exported.
        """
        return as_module(self, steps)

    def _calibrated(self) -> Calibration:
        if self.calibration is None:
            raise TrajOODError(
                f"detector of {self.autoencoder.name}: has no threshold: call calibrate with ID images that were not "
                "trained on"
            )
        return self.calibration

    def _read(self, images: Images, on_error: OnError = "raise") -> Iterator[Batch]:
        return batches(self.autoencoder, images, self.batch_size, self.workers, on_error, self.reading)

    def _scored(self, read: Iterable[Batch]) -> Iterator[tuple[Batch, Scored]]:
        taken: deque[Batch] = deque()

        def encodings() -> Iterator[Encoding]:
            for batch in read:
                if batch.ids:
                    taken.append(batch)
                    yield self.autoencoder.examine(batch.images)

        for scored in self.scorers.score_all(encodings()):
            yield taken.popleft(), scored

    def _judged(self, images: Images, whole_chunks: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores (B,) with +inf for what is not finite, and steps and status (B,) where the scorer reads steps."""
        if whole_chunks or not self.scorer.bears_rounding or count_of(images) >= self.autoencoder.chunk:
            return self._gathered(self._scored(self._read(images)))
        read = list(self._read(images))  # by code that may be the caller's: not within the model's settings
        with few_images(sum(len(batch.ids) for batch in read)), self.autoencoder.fixed():
            return self._gathered(self._scored(read))

    def _gathered(self, found: Iterable[tuple[Batch, Scored]]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        fixed = self.scorer.needs().steps < WHOLE_PATH
        scores = [_nothing(torch.float64)]
        steps, status = (
            [_nothing(torch.int64)],
            [_nothing(torch.int64)],
        )
        for _, scored in found:
            values, path = scored.scores[self.scorer.label], scored.evidence.trajectory
            finite = values.isfinite()
            scores.append(torch.where(finite, values, torch.inf))
            if path is not None:
                steps.append(path.steps)
                ended = path.status == Status.NON_FINITE
                word = torch.where(ended, path.status, int(Status.OK)) if fixed else path.status
                status.append(torch.where(finite, word, int(Status.NON_FINITE)))
        if not self.scorers.needs.steps:  # where attractors are read one step is taken all the same, to measure z0
            return torch.cat(scores), None, None
        return torch.cat(scores), torch.cat(steps), torch.cat(status)

    # ------------------------------------------------------------------ files

    def save(self, folder: str | Path, *, overwrite: bool = True) -> None:
        """Write the detector: safetensors, JSON and a model card, whole or not at all.

        Args:
            folder: new, empty, or holding a detector, which is replaced.
            overwrite: whether it is replaced; default true.
        Raises:
            TrajOODError: another kind of folder, one inside a detector, no permission or space, or a backbone that
                cannot be rebuilt.
        """
        parts = Parts(self.scorers, self.training, self._seen, self.calibration, self.history)
        write_detector(parts, Path(folder), overwrite)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "auto",
        autoencoder: Autoencoder | None = None,
        *,
        compile: bool = False,
    ) -> Detector:
        """Read what :meth:`save` wrote, after checking all of it; nothing is downloaded and no code in it is run.

        Before use: the schema, the list of files with sizes and hashes, the type of every entry, names, dtypes, shapes
        and finiteness of every tensor, the model's fingerprint, and the numbers that it and the scorer give for two
        fixed images. Versions of libraries that differ are a warning only: those numbers say whether they matter.

        Args:
            device: see :func:`traj_ood.dynamics.device.resolve_device`; scores on another device agree to rounding,
                about 1e-4.
            autoencoder: the model the detector was fitted with. Needed when its code is your own; it stays on its
                device when ``device`` is ``auto``.
            compile: of :class:`traj_ood.ScorerSet`: whole chunks of images, as streams have them, to 1e-5 of the plain
                scores. Default false.
        Raises:
            TrajOODError: damage anywhere (the message names the file), a newer schema, another model, or a model that
                gives other numbers here.
        """
        parts = read_detector(Path(folder).expanduser(), device, autoencoder, compile)
        return cls(
            parts.scorers,
            training=parts.training,
            seen=parts.seen,
            calibration=parts.calibration,
            history=parts.history,
        )


def _nothing(kind: torch.dtype) -> Tensor:
    """On the CPU, whatever the caller's default device."""
    return torch.empty(0, dtype=kind, device="cpu")


@dataclass
class _Explored:
    """What one pass over the training images leaves, a part for each batch; ``rows`` and ``skipped`` count images."""

    evidence: list[Evidence] = field(default_factory=list)
    dictionaries: list[AttractorDictionary] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    skipped: int = 0


def _explore(scorers: ScorerSet, reading: Iterator[Batch], bar: tqdm[Any]) -> _Explored:
    """The training pass.

    Raises:
        TrajOODError: too few images are left when the unreadable ones are skipped, or numbers that are not finite.
    """
    found, taken = _Explored(), deque[Batch]()

    def encodings() -> Iterator[tuple[Encoding, tuple[str, ...]]]:
        for batch in reading:
            found.skipped += len(batch.failures)
            bar.update(len(batch.failures))
            if batch.ids:
                taken.append(batch)
                found.seen.append(digests_of(batch.images))
                found.rows += batch.rows
                found.labels += batch.labels
                yield scorers.autoencoder.examine(batch.images), batch.ids

    for ends, evidence in scorers.explore_all(encodings()):
        batch = taken.popleft()
        found.evidence.append(_kept(evidence, batch))
        found.dictionaries += [ends] if ends is not None else []
        bar.update(len(batch.ids))
    scorers.check_training_size(len(found.rows))
    return found


def _kept(evidence: Evidence, batch: Batch) -> Evidence:
    """What the scorer learns from, on the CPU, without the trajectory.

    Raises:
        TrajOODError: numbers that are not finite: statistics of them would spoil every score.
    """
    kept = evidence.kept()
    for values in kept.tensors().values():
        bad = (~values.reshape(len(values), -1).isfinite().all(dim=1)).nonzero()[:, 0]
        if len(bad):
            raise TrajOODError(
                f"training image {batch.ids[int(bad[0])]!r}: the model leaves the finite numbers on it ({len(bad)} "
                f"such in a batch of {len(batch.ids)}): check the model"
            )
    return kept


def _warn_of_attractors(scorers: ScorerSet, health: Mapping[str, Any] | None) -> None:
    if health is not None and not health["healthy"]:
        warn(f"detector with {scorers.labels[0]}: unhealthy attractors: {'; '.join(health['warnings'])}", stacklevel=3)
