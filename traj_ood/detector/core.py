"""The Detector: a model, one fitted scorer, and a threshold calibrated on ID images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from traj_ood.autoencoders import Autoencoder
from traj_ood.data.batches import Batch, Images, OnError, batches, count_of, shuffles
from traj_ood.data.benchmark import reading_of
from traj_ood.data.decoding import AS_STORED, Reading
from traj_ood.detector.batch_parts import CONTENTS, BatchParts
from traj_ood.detector.conformal import Calibration, check_count, entry, images_needed
from traj_ood.detector.decision import Decision, Judgement, decide_each
from traj_ood.detector.fitting import SCORES, cover, explored_parts, scored_parts
from traj_ood.detector.folder import read_detector, write_detector
from traj_ood.detector.hub import OnTheHub
from traj_ood.detector.scorer import classes_given, forget_fit, label_list, numbered, one_scorer
from traj_ood.dynamics.device import standard_settings
from traj_ood.dynamics.fixed_function import few_images
from traj_ood.dynamics.progress import StepBar
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError, check_word, warn
from traj_ood.graph import as_module
from traj_ood.index import Approximate, Backend
from traj_ood.io.trees import as_json
from traj_ood.scorers import WHOLE_PATH, Scorer, recommended
from traj_ood.scorers.explored import joined_parts
from traj_ood.scorers.labels import check_one_labelling
from traj_ood.scorers.scorer_set import ScorerSet

OnKnown = Literal["raise", "skip"]
_TIES = 0.02
"""Share of the calibration images that may be accepted without a warning only because their scores are equal."""
_MAX_SEEN_SHARE = 0.01


class Detector(OnTheHub):
    """Decides whether images are out of distribution (OOD), by a fitted scorer and a threshold calibrated on ID images.

    >>> detector = Detector.fit(autoencoder, train_images, "field")     # doctest: +SKIP
    >>> detector.calibrate(held_out_id_images, tpr=0.95)                # doctest: +SKIP
    >>> detector.predict(new_images)                                    # doctest: +SKIP
    >>> detector.save("my-detector")                                    # doctest: +SKIP
    >>> Detector.load("my-detector").judge(new_images)                  # doctest: +SKIP

    Images can be pixels in memory (uint8, or floats in [0, 1]; tensor or array, (B, C, H, W) or one (C, H, W)), an
    ImageSource, a list of PIL images or paths, a Dataset or a DataLoader. Pixels with the model's input shape are only
    normalised; all others are resized like a file. Tensors in the model's own units are passed as
    :class:`traj_ood.Normalised`. Images are read in batches, so that memory does not grow with their number.

    An image's score is independent of its batch and position to 1e-9, relative, and to 1e-5 if there are fewer images
    than the network takes in one call (see :meth:`score`). The same batches on the same machine give identical bits.
    What another processor or number of threads changes is in docs/reliability.md.

    Attributes:
        scorers: the :class:`traj_ood.ScorerSet` of the model and its one scorer.
        calibration: the calibration; None before :meth:`calibrate`.
        training: facts about the fit as JSON data, for the model card: numbers of images and classes, health of the
            attractors.
        history: facts about every calibration as JSON data, oldest first, for the model card.
        batch_size, workers: see :func:`traj_ood.data.batches`; they affect time and memory, not results.
        reading: how image files are decoded, a :class:`traj_ood.data.Reading`; the same as for the training images.
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
        """Not called directly: use :meth:`fit` or :meth:`load`. ``seen``, (N,) int64, are digests of the training
        images' pixels, by which :meth:`calibrate` recognises them."""
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
        parts: str | Path | None = None,
        quiet: bool = True,
    ) -> Detector:
        """Fit one scorer on ID training images, in one pass over them. Memory holds what the scorer keeps of each image
        and a few batches.

        The detector then has scores but no threshold: call :meth:`calibrate` with other ID images.

        Args:
            autoencoder: the model, on the device to use.
            images: ID training images.
            scorer: name with options, see :func:`traj_ood.create_scorer`. Default: the scorer recommended for the kind
                of model, see :func:`traj_ood.recommended`.
            labels: N class labels (integers or texts) for class-conditional scorers. Default: those of the source,
                Dataset or DataLoader.
            tol, max_steps: see :func:`traj_ood.iterate`; the defaults are the paper's.
            backend, approximate: see :class:`traj_ood.NeighborIndex`.
            compile: see :class:`traj_ood.ScorerSet`; applies to the fit and to the scores of this object, and is
                recorded in ``training``, but not kept by :meth:`load`. Default false.
            batch_size, workers: see the class.
            on_error: ``raise`` (default), or ``skip`` images that cannot be read; their number is in ``training``.
            parts: a folder that keeps what each finished batch has given, so that the same call continues an
                interrupted one; it may be deleted afterwards. Parts of other images, models, settings or code are not
                used. Default None: nothing is kept.
            quiet: no progress bar. Default true.
        Raises:
            TrajOODError: there are too few images, labels are missing, the scorer is unknown or does not work with this
                model, images cannot be read, or the model's values on them become NaN or infinite.
        """
        spec = recommended(autoencoder).scorer if scorer is None else scorer
        scorers = one_scorer(autoencoder, spec, tol, max_steps, backend, approximate, compile)
        count = count_of(images)
        scorers.check_training_size(count)
        classes = classes_given(scorers, images, labels, count)
        files = reading_of(images) or AS_STORED
        store = BatchParts(parts, "a fit", scorers, batch_size)
        reading = batches(autoencoder, images, store.batch_size, workers, on_error, files)
        found = cover(reading, scorers, explored_parts, store, StepBar(count, f"fit {scorers.labels[0]}", quiet=quiet))
        scorers.check_training_size(len(found.rows))
        dictionary, evidence = joined_parts(found.parts)
        if classes is None and scorers.needs.labels:
            classes = numbered(found.labels, len(found.rows), scorers)
        elif classes is not None:
            classes = classes[found.rows]
            check_one_labelling(classes, found.labels, images)
        scorers.learn(dictionary, replace(evidence, labels=classes))
        forget_fit(scorers)
        health = None if dictionary is None else as_json(dictionary.health().as_dict())
        training = {
            "images": len(found.rows),
            "skipped": found.skipped,
            "classes": None if classes is None else len(classes.unique()),
            "list": digest() if (digest := getattr(images, "digest", None)) else None,
            "attractors": health,
            **({"reading": files.options()} if files != AS_STORED else {}),
            **({"compile": True} if scorers.compile else {}),
        }
        _warn_of_attractors(scorers, health)
        return cls(scorers, training=training, seen=found.column(CONTENTS), batch_size=batch_size, workers=workers)

    def calibrate(
        self,
        images: Images,
        tpr: float = 0.95,
        *,
        labels: Tensor | Sequence[Any] | None = None,
        on_error: OnError = "raise",
        on_known: OnKnown = "raise",
        note: str = "",
        parts: str | Path | None = None,
        quiet: bool = True,
    ) -> Detector:
        """Set the threshold and enable p-values, from held-out ID images.

        The guarantee (see :mod:`traj_ood.detector.conformal`) holds for new images drawn like these, on which neither
        the scorer nor the model may have been trained: training images score too low, and a threshold from them
        rejects too many new ID images. The scorer's training images are recognised by their pixels, the model's cannot
        be. More than 1 % of them are an error; fewer are a warning, because data sets do contain duplicates.

        Args:
            images: held-out ID images.
            tpr: smallest share of new ID images to accept. Default 0.95, as in FPR95.
            labels: the class (integer or text) of each image; ``tpr`` then holds within every class. Default None: over
                all images.
            on_error: see :meth:`fit`.
            on_known: ``raise`` (default), or ``skip`` the scorer's training images, however many, with a warning. For
                images held out of a data set with duplicates.
            note: a line for :attr:`history`, such as the source of the images. Default: none.
            parts, quiet: see :meth:`fit`.
        Returns:
            This detector.
        Raises:
            TrajOODError: there are too few different images for ``tpr`` (the message gives the number), training images
                are among them, or scores are not finite.
        """
        check_word("value of on_known", on_known, OnKnown)
        check_count(count := count_of(images), tpr)
        classes = None if labels is None else label_list(labels, count)
        ends = self.scorers.dictionary
        fitted = {**self.scorer.state, **({} if ends is None else ends.tensors())}
        store = BatchParts(parts, "a calibration", self.scorers, self.batch_size, fitted)
        reading = batches(self.autoencoder, images, store.batch_size, self.workers, on_error, self.reading)
        found = cover(reading, self.scorers, scored_parts, store, StepBar(count, "calibrate", quiet=quiet))
        if classes is not None:
            classes = [classes[row] for row in found.rows]
            check_one_labelling(classes, found.labels, images)
        contents = found.column(CONTENTS)
        kept = self._unknown(torch.isin(contents, self._seen), found.ids, tpr, on_known)
        _check_repeats(contents[kept], tpr)
        values = found.column(SCORES)[kept]
        if classes is None:
            self.calibration = Calibration(values, tpr)
        else:
            self.calibration = Calibration.of_classes(values, list(compress(classes, kept)), tpr)
        _warn_of_ties(self.calibration, self.scorer.label)
        self.history.append(entry(self.calibration, note))
        return self

    def _unknown(self, known: Tensor, ids: Sequence[str], tpr: float, on_known: OnKnown) -> Tensor:
        """(n,) bool: the images to calibrate on; with ``skip``, those that are no training images, else all."""
        count = int(known.sum())
        if not count:
            return ~known
        what = (
            f"calibration: {count} of {len(ids)} images are pixel by pixel training images of this detector (first: "
            f"{ids[int(known.nonzero()[0])]!r})"
        )
        if on_known == "raise" and count > _MAX_SEEN_SHARE * len(ids):
            raise TrajOODError(f"{what}, which score too low: calibrate with ID images that were not trained on")
        if on_known == "skip" and len(ids) - count < images_needed(tpr):
            raise TrajOODError(
                f"{what} and cannot be used, and the {len(ids) - count} others are fewer than the {images_needed(tpr)} "
                f"that accepting {tpr:.6g} of new ID images needs: remove duplicate images, or give separate "
                "calibration images"
            )
        warn(what + (", and are left out" if on_known == "skip" else ""), stacklevel=3)
        return ~known if on_known == "skip" else torch.ones_like(known)

    # ------------------------------------------------------------------ scores and decisions

    def score(self, images: Images, *, whole_chunks: bool = False) -> Tensor:
        """Scores of images, as (B,) float64; higher = more OOD, +inf if the model's values become NaN or infinite.

        Args:
            images: the images, see the class.
            whole_chunks: pad few images to the model's full chunk. Default false: a single image then takes down to the
                time of one row (small ViT-MAEs gain nothing, where short calls give equal bits anyway), and its score
                equals that in a long stream to 1e-5 instead of 1e-9, relative. True in streams (``traj-ood score``)
                and in :meth:`calibrate`.
        Raises:
            TrajOODError: images cannot be read or have the wrong shape.
        """
        return self._judged(images, whole_chunks)[0]

    def predict(self, images: Images) -> Tensor:
        """Decisions on images, as (B,) bool: True = OOD, the score is above the threshold.

        Equivalent to ``p_value(images) <= calibration.level``, exactly.

        Raises:
            TrajOODError: the detector is not calibrated, or as :meth:`score`.
        """
        return self._calibrated().decide(self.score(images))

    def p_value(self, images: Images) -> Tensor:
        """P-values of images, as (B,) float64; small = unlike the calibration images.

        p = (1 + #{calibration scores >= score}) / (n + 1), see :mod:`traj_ood.detector.conformal`.

        Raises:
            TrajOODError: the detector is not calibrated, or as :meth:`score`.
        """
        return self._calibrated().p_values(self.score(images))

    def judge(
        self, images: Images, labels: Tensor | Sequence[Any] | None = None, *, whole_chunks: bool = False
    ) -> Judgement:
        """Scores, p-values and decisions in one pass; p-values and decisions are None without calibration.

        Args:
            images: the images, see the class.
            labels: the class of each image, if known, for class-wise calibration; see
                :meth:`traj_ood.detector.conformal.Calibration.p_values`. Default: unknown.
            whole_chunks: see :meth:`score`.
        Raises:
            TrajOODError: as :meth:`score`.
        """
        scores, steps, status = self._judged(images, whole_chunks)
        known = self.calibration
        if known is None:
            return Judgement(scores, None, None, steps, status)
        classes = None if labels is None else label_list(labels, len(scores))
        return Judgement(scores, known.p_values(scores, classes), known.decide(scores, classes), steps, status)

    def decide(self, images: Images) -> list[Decision]:
        """One :class:`traj_ood.Decision` per image, in order.

        An image that cannot be read has the reason ``invalid: …`` instead of raising an error. Results are those of
        ``traj-ood score`` (for few images to 1e-5) and ``traj-ood serve``.

        Raises:
            TrajOODError: ``images`` is no accepted input, such as a single path, or is a DataLoader that cannot be
                read, as its images cannot be read one by one.
        """
        return decide_each(self.judge, images, count_of(images), self.batch_size)

    def as_module(self, steps: int | None = None) -> nn.Module:
        """This detector as an nn.Module from image batches to scores; see :func:`traj_ood.graph.as_module`.

        Raises:
            TrajOODError: the scorer cannot be exported.
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
        if shuffles(images):
            warn("images: this DataLoader shuffles, so scores are not in its data set's order: set shuffle=False")
        return batches(self.autoencoder, images, self.batch_size, self.workers, on_error, self.reading)

    def _judged(self, images: Images, whole_chunks: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores (B,) with +inf for those that are not finite; steps and status (B,) or None without iteration."""
        if whole_chunks or not self.scorer.bears_rounding or count_of(images) >= self.autoencoder.chunk:
            return self._gathered(self._read(images))
        read = list(self._read(images))  # may run the caller's code, so outside of the model's fixed settings
        with few_images(sum(len(batch.ids) for batch in read)), self.autoencoder.fixed():
            return self._gathered(read)

    def _gathered(self, read: Iterable[Batch]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        fixed = self.scorer.needs().steps < WHOLE_PATH
        scores, steps, status = [_nothing(torch.float64)], [_nothing(torch.int64)], [_nothing(torch.int64)]
        encodings = (self.autoencoder.examine(batch.images) for batch in read if batch.ids)
        for scored in self.scorers.score_all(encodings):
            values, path = scored.scores[self.scorer.label], scored.evidence.trajectory
            finite = values.isfinite()
            scores.append(torch.where(finite, values, torch.inf))
            if path is not None:
                steps.append(path.steps)
                ended = path.status == Status.NON_FINITE
                word = torch.where(ended, path.status, int(Status.OK)) if fixed else path.status
                status.append(torch.where(finite, word, int(Status.NON_FINITE)))
        if not self.scorers.needs.steps:  # one step may have been taken to measure z0 against attractors
            return torch.cat(scores), None, None
        return torch.cat(scores), torch.cat(steps), torch.cat(status)

    # ------------------------------------------------------------------ files

    def save(self, folder: str | Path, *, overwrite: bool = True) -> None:
        """Save the detector to a folder, atomically: safetensors, JSON and a model card.

        Args:
            folder: a new or empty folder, or that of a detector, which is replaced.
            overwrite: whether to replace a detector; default true.
        Raises:
            TrajOODError: the folder contains other files or is inside a detector, cannot be written, or the backbone
                cannot be rebuilt from its library.
        """
        facts = {key: value for key, value in self.training.items() if key != "reading"}
        reading = self.reading.options()  # may have been changed since the fit
        write_detector(
            Path(folder),
            overwrite,
            scorers=self.scorers,
            training={**facts, "reading": reading} if reading else facts,
            seen=self._seen,
            calibration=self.calibration,
            history=self.history,
        )

    @classmethod
    @standard_settings()
    def load(
        cls,
        folder: str | Path,
        device: str = "auto",
        autoencoder: Autoencoder | None = None,
        *,
        compile: bool = False,
    ) -> Detector:
        """Load a detector from a folder and verify it; nothing is downloaded and no code in the folder is run.

        Verified are the schema, the size and hash of every file, the type of every entry, the name, dtype, shape and
        finiteness of every tensor, the model's fingerprint, and the results of model and scorer on two fixed images.
        Differing versions of libraries are only a warning, as these results show whether they matter.

        Args:
            folder: as written by :meth:`save`.
            device: see :func:`traj_ood.dynamics.device.resolve_device`; scores on another device agree to rounding,
                about 1e-4.
            autoencoder: the model that the detector was fitted with; required if it is defined by user code. With
                ``device`` ``auto`` it stays on its device.
            compile: see :class:`traj_ood.ScorerSet`. Scores of full chunks, as in streams, differ from uncompiled ones
                by at most 1e-5. Default false.
        Raises:
            TrajOODError: a file is damaged (the message names it), the schema is newer, the model is another, or its
                results on this machine differ.
        """
        return cls(**read_detector(Path(folder).expanduser(), device, autoencoder, compile))


def _check_repeats(digests: Tensor, tpr: float) -> None:
    """Refuse calibration images of which too few differ, and warn of repeats, which count as images of their own."""
    check_count(len(digests), tpr)  # without those that could not be read
    count, distinct = len(digests), len(digests.unique())
    what = f"calibration: {count - distinct} of {count} images are pixel by pixel copies of others among them"
    if distinct < images_needed(tpr):
        raise TrajOODError(
            f"{what}, and the {distinct} that differ are fewer than the {images_needed(tpr)} that accepting {tpr:.6g} "
            "of new ID images needs: give more images"
        )
    if count - distinct > _MAX_SEEN_SHARE * count:
        warn(f"{what}, and count each: the promise about new images assumes independent ones", stacklevel=3)


def _warn_of_ties(calibration: Calibration, scorer: str) -> None:
    """Warn of a threshold that many calibration images have exactly: it accepts more than was asked for, or all."""
    for group in calibration.groups:
        accepted = int((group.scores <= group.threshold).sum())
        share = accepted / len(group)
        if accepted - group.rank > max(4, _TIES * len(group)):  # a few equal scores are no matter
            warn(
                f"calibration: {share:.1%} of the images have a score of at most the threshold {group.threshold:.6g}, "
                f"{group.tpr:.1%} were asked for, because many scores of {scorer} are equal",
                stacklevel=3,
            )


def _nothing(kind: torch.dtype) -> Tensor:
    """An empty tensor on the CPU, whatever the caller's default device."""
    return torch.empty(0, dtype=kind, device="cpu")


def _warn_of_attractors(scorers: ScorerSet, health: Mapping[str, Any] | None) -> None:
    if health is not None and not health["healthy"] and scorers.scorers[0].needs().attractors_read:
        warn(f"detector with {scorers.labels[0]}: unhealthy attractors: {'; '.join(health['warnings'])}", stacklevel=3)
