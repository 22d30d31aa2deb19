"""Split-conformal calibration: from scores of held-out ID images to p-values and a threshold (Vovk et al. 2005).

Let n ID images that nothing was fitted on have the scores c_1 … c_n, and a new image the score s. When the new image is
ID, too, the n + 1 scores are exchangeable, so that whatever the scorer and the data are

    p(s) = (1 + #{i : c_i >= s}) / (n + 1)    satisfies    P(p <= α) <= α  for every α,

over the draw of calibration and new images together (not for each set of calibration images, see
:meth:`Calibration.acceptance`). Ties count as at least as strange and hence make p larger: conservative. The threshold
that accepts at least ``tpr`` of new ID images is c_(k), the k-th smallest, with k = ⌈(n + 1) tpr⌉.

With classes (Mondrian calibration, Vovk et al. 2005, 4.5) every class c has its own scores, p_c and threshold, and the
guarantee holds in each of them. Where the class of a new image is not known, p = max_c p_c: at least the p-value of its
own class, so still P(p <= α) <= α whatever that class is; the image is OOD when it is for every class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.text import one_line


def exact_share(tpr: float) -> Fraction:
    """``tpr`` as the decimal fraction it is written as: 0.95 is 19/20, not the float's 0.9499999999999999556.

    Otherwise (n + 1) · tpr would round to the wrong side of a whole number, and 19 images would not do for 0.95.

    Raises:
        TrajOODError: not a number strictly between 0 and 1.
    """
    if isinstance(tpr, bool) or not isinstance(tpr, int | float) or not 0 < tpr < 1:
        raise TrajOODError(f"tpr: expected a share of ID images between 0 and 1, such as 0.95, got {tpr!r}")
    return Fraction(repr(float(tpr)))


def images_needed(tpr: float) -> int:
    """Fewest calibration images for ``tpr``: the n with ⌈(n + 1) tpr⌉ <= n, so n >= tpr / (1 − tpr); 19 for 0.95.

    >>> images_needed(0.95), images_needed(0.99), images_needed(0.5)
    (19, 99, 1)
    """
    share = exact_share(tpr)
    return math.ceil(share / (1 - share))


def check_count(count: int, tpr: float, of: str = "") -> None:
    """Refuse too few calibration images, before anything is computed.

    Raises:
        TrajOODError: fewer than :func:`images_needed`, which the message tells.
    """
    needed = images_needed(tpr)
    if count < needed:
        raise TrajOODError(
            f"calibration: accepting {tpr:.6g} of new ID images needs at least {needed} ID images{of} that were not "
            f"trained on, got {count}: give more images or a smaller tpr"
        )


def entry(known: Calibration, note: str = "") -> dict[str, Any]:
    """JSON-able facts of a calibration made now, for a detector's history."""
    return {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "images": len(known),
        "tpr": float(known.tpr),
        "threshold": known.threshold,
        "classes": len(known.names) or None,
        "note": one_line(note),
    }


def _check_classes(classes: Tensor, names: int, count: int) -> None:
    whole = classes.dtype == torch.int64 and classes.shape == (count,)
    if not whole or bool(((classes < 0) | (classes >= names)).any()):
        raise TrajOODError(
            f"calibration: expected int64 classes 0 … {names - 1} of {count} images, got {classes.dtype} "
            f"{tuple(classes.shape)}"
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of held-out ID images, and the share of new ID images to accept.

    Attributes:
        scores: (n,) float64, finite, ascending; sorted here.
        tpr: share of new ID images that must be accepted, at least; of every class where there are classes.
        classes: (n,) int64 places in ``names``, in the order of ``scores``; None (default) for one set of all images.
        names: of the classes.
    Raises:
        TrajOODError: other scores, or too few for ``tpr``; the message says how many are needed, and of which class.
    """

    scores: Tensor
    tpr: float = 0.95
    classes: Tensor | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        scores = self.scores
        if scores.ndim != 1 or scores.dtype != torch.float64:
            raise TrajOODError(f"calibration: expected float64 scores (n,), got {scores.dtype} {tuple(scores.shape)}")
        check_count(len(scores), self.tpr)
        bad = int((~scores.isfinite()).sum())
        if bad:
            raise TrajOODError(
                f"calibration: {bad} of {len(scores)} ID images have scores that are not finite: the model leaves the "
                "finite numbers on in-distribution images; check the model and the images"
            )
        ordered = scores.detach().cpu().sort(stable=True)
        object.__setattr__(self, "scores", ordered.values)
        if self.classes is not None:
            object.__setattr__(self, "classes", self.classes.cpu()[ordered.indices])
            _check_classes(self.classes, len(self.names), len(scores))
            for name, count in zip(self.names, self.classes.bincount(minlength=len(self.names)).tolist(), strict=True):
                check_count(count, self.tpr, f" of class {name!r}")

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def of_classes(cls, scores: Tensor, labels: Sequence[Any], tpr: float = 0.95) -> Calibration:
        """Class-wise, from a label (whole number or text) for each of n scores.

        Raises:
            TrajOODError: as the class.
        """
        names = tuple(sorted({str(label) for label in labels}, key=lambda text: (len(text), text)))
        place = {name: number for number, name in enumerate(names)}
        classes = torch.tensor([place[str(label)] for label in labels], dtype=torch.int64)
        return cls(scores, tpr, classes, names)

    @cached_property
    def groups(self) -> tuple[Calibration, ...]:
        """One calibration per class, in the order of ``names``; without classes this one alone."""
        if self.classes is None:
            return (self,)
        return tuple(Calibration(self.scores[self.classes == c], self.tpr) for c in range(len(self.names)))

    @cached_property
    def rank(self) -> int:
        """k = ⌈(n + 1) tpr⌉, at most n, of all images in one set."""
        return math.ceil((len(self) + 1) * exact_share(self.tpr))

    @property
    def threshold(self) -> float:
        """c_(k), of the class where it is highest: a score above it is OOD."""
        if self.classes is not None:
            return max(group.threshold for group in self.groups)
        return float(self.scores[self.rank - 1])

    @property
    def level(self) -> float:
        """α = (n + 1 − k) / (n + 1) <= 1 − tpr: a score is above the threshold exactly when its p-value is <= α.

        With classes the largest of theirs: no multiple of 1 / (n_c + 1) lies between a class's own α and 1 − tpr.
        """
        if self.classes is not None:
            return max(group.level for group in self.groups)
        return (len(self) + 1 - self.rank) / (len(self) + 1)

    def p_values(self, scores: Tensor, labels: Sequence[Any] | None = None) -> Tensor:
        """(B,) float64 p-values of scores (B,); that of +inf is the smallest one, 1 / (n + 1).

        Args:
            labels: B classes, where they are known, such as a classifier's predictions: the p-value is then that of the
                class. Default: unknown; with class-wise calibration the largest over classes.
        Raises:
            TrajOODError: a score is NaN, or a label of no class of the calibration.
        """
        values = self._checked(scores)
        if self.classes is None:
            return self._share(values)
        each = torch.stack([group._share(values) for group in self.groups])
        return each.max(dim=0).values if labels is None else each[self._places(labels, len(values)), range(len(values))]

    def decide(self, scores: Tensor, labels: Sequence[Any] | None = None) -> Tensor:
        """(B,) bool, True = OOD: the score is above :attr:`threshold`, which is p <= :attr:`level`, exactly.

        Args:
            labels: as of :meth:`p_values`; the threshold is then that of the class.
        Raises:
            TrajOODError: as :meth:`p_values`.
        """
        values = self._checked(scores)
        if self.classes is None or labels is None:
            return values > self.threshold
        thresholds = torch.tensor([group.threshold for group in self.groups], dtype=torch.float64)
        return values > thresholds[self._places(labels, len(values))]

    def _share(self, values: Tensor) -> Tensor:
        as_strange = len(self) - torch.searchsorted(self.scores, values)
        return (1 + as_strange).double() / (len(self) + 1)

    def _places(self, labels: Sequence[Any], count: int) -> Tensor:
        known = {name: number for number, name in enumerate(self.names)}
        texts = [str(label) for label in (labels.tolist() if isinstance(labels, Tensor) else labels)]
        strange = [text for text in texts if text not in known]
        if strange or len(texts) != count:
            raise TrajOODError(
                f"labels: expected {count} of the {len(known)} classes that were calibrated, got {len(texts)}, "
                f"{f'first unknown {strange[0]!r}' if strange else 'all known'}: leave labels out where the class is "
                "not known"
            )
        return torch.tensor([known[text] for text in texts], dtype=torch.int64)

    def acceptance(self, confidence: float = 0.9) -> tuple[float, float]:
        """The share of new ID images that THIS threshold accepts: an interval it lies in with the given confidence.

        ``tpr`` holds on average over calibration sets. For one set the share is a draw of Beta(k, n + 1 − k) when
        scores have no ties, wide for few images; ties only raise it (Vovk 2012, "Conditional validity"). With classes
        of the smallest one, for which it is widest.
        """
        if self.classes is not None:
            return min(self.groups, key=len).acceptance(confidence)
        from scipy.stats import beta

        tail = (1 - confidence) / 2
        low, high = beta.ppf([tail, 1 - tail], self.rank, len(self) + 1 - self.rank)
        return float(low), float(high)

    @staticmethod
    def _checked(scores: Tensor) -> Tensor:
        values = scores.detach().cpu().double().contiguous()
        if values.ndim != 1 or bool(values.isnan().any()):
            raise TrajOODError(
                f"scores: expected numbers (B,), got shape {tuple(values.shape)} with {int(values.isnan().sum())} NaN"
            )
        return values
