"""Split-conformal calibration: p-values and a threshold from scores of held-out ID images (Vovk et al. 2005).

Let c_1 … c_n be the scores of n ID images on which nothing was fitted, and s the score of a new image. If the new image
is ID as well, the n + 1 scores are exchangeable, so that for any scorer and data

    p(s) = (1 + #{i : c_i >= s}) / (n + 1)    satisfies    P(p <= α) <= α  for every α,

over the joint draw of calibration images and new image (not for a given set of calibration images, see
:meth:`Calibration.acceptance`). Ties count as c_i >= s and make p larger, which is conservative. The threshold that
accepts at least a share ``tpr`` of new ID images is c_(k), the k-th smallest score, with k = ⌈(n + 1) tpr⌉.

Class-wise (Mondrian) calibration (Vovk et al. 2005, 4.5) gives every class c its own scores, p_c and threshold, and the
guarantee holds within each class. If the class of a new image is unknown, p = max_c p_c. This is at least the p-value
of its true class, so that P(p <= α) <= α still holds; the image is OOD if it is OOD for every class.
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
    """``tpr`` as an exact decimal fraction: 0.95 is 19/20, not the float 0.9499999999999999556. With the float, (n + 1)
    · tpr can fall on the wrong side of an integer: 19 images would not suffice for 0.95."""
    if isinstance(tpr, bool) or not isinstance(tpr, int | float) or not 0 < tpr < 1:
        raise TrajOODError(f"tpr: expected a share of ID images between 0 and 1, such as 0.95, got {tpr!r}")
    return Fraction(repr(float(tpr)))


def images_needed(tpr: float) -> int:
    """Smallest number n of calibration images for ``tpr``: ⌈(n + 1) tpr⌉ <= n, so n >= tpr / (1 − tpr).

    >>> images_needed(0.95), images_needed(0.99), images_needed(0.5)
    (19, 99, 1)
    """
    share = exact_share(tpr)
    return math.ceil(share / (1 - share))


def check_count(count: int, tpr: float, of: str = "") -> None:
    """Check the number of calibration images before anything is computed; ``of`` completes "ID images" in the error
    message, which gives the number needed."""
    needed = images_needed(tpr)
    if count < needed:
        raise TrajOODError(
            f"calibration: accepting {tpr:.6g} of new ID images needs at least {needed} ID images{of} that were not "
            f"trained on, got {count}: give more images or a smaller tpr"
        )


def entry(known: Calibration, note: str = "") -> dict[str, Any]:
    """A calibration made now as JSON data, for a detector's history."""
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
    """Conformal calibration on the scores of held-out ID images.

    Attributes:
        scores: (n,) float64, finite; sorted in ascending order on construction.
        tpr: smallest share of new ID images to accept, within every class if there are classes.
        classes: (n,) int64 indices into ``names``, in the order of ``scores``; None (default): no classes.
        names: names of the classes.
    Raises:
        TrajOODError: the scores have another shape or dtype or are not finite, or are too few for ``tpr``; the message
            gives the number needed, and the class.
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
                f"calibration: {bad} of {len(scores)} ID images have scores that are not finite: the model's values "
                "become NaN or infinite on in-distribution images; check the model and the images"
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
        """Class-wise calibration from n scores and the label of each, an integer or text."""
        names = tuple(sorted({str(label) for label in labels}, key=lambda text: (len(text), text)))
        place = {name: number for number, name in enumerate(names)}
        classes = torch.tensor([place[str(label)] for label in labels], dtype=torch.int64, device="cpu")
        return cls(scores, tpr, classes, names)

    @cached_property
    def groups(self) -> tuple[Calibration, ...]:
        """One calibration per class, in the order of ``names``; without classes, only this one."""
        if self.classes is None:
            return (self,)
        return tuple(Calibration(self.scores[self.classes == c], self.tpr) for c in range(len(self.names)))

    @cached_property
    def rank(self) -> int:
        """k = ⌈(n + 1) tpr⌉ <= n, over all images regardless of class."""
        return math.ceil((len(self) + 1) * exact_share(self.tpr))

    @property
    def threshold(self) -> float:
        """c_(k), with classes the largest of theirs. A score above it is OOD."""
        if self.classes is not None:
            return max(group.threshold for group in self.groups)
        return float(self.scores[self.rank - 1])

    @property
    def level(self) -> float:
        """α = (n + 1 − k) / (n + 1) <= 1 − tpr. A score is above the threshold if and only if its p-value is <= α.

        With classes, α is the largest of theirs: no multiple of 1 / (n_c + 1) is between a class's α and 1 − tpr.
        """
        if self.classes is not None:
            return max(group.level for group in self.groups)
        return (len(self) + 1 - self.rank) / (len(self) + 1)

    def p_values(self, scores: Tensor, labels: Sequence[Any] | None = None) -> Tensor:
        """P-values of scores (B,), as (B,) float64. +inf has the smallest p-value, 1 / (n + 1).

        ``labels`` are the classes, if known, such as a classifier's predictions; p-values are then those of the class.
        By default, with class-wise calibration, they are the largest over classes. NaN and classes that were not
        calibrated are errors.
        """
        values = self._checked(scores)
        if self.classes is None:
            return self._share(values)
        each = torch.stack([group._share(values) for group in self.groups])
        return each.max(dim=0).values if labels is None else each[self._places(labels, len(values)), range(len(values))]

    def decide(self, scores: Tensor, labels: Sequence[Any] | None = None) -> Tensor:
        """Decisions on scores (B,), as (B,) bool: True = OOD, the score is above :attr:`threshold`, or with ``labels``,
        as in :meth:`p_values`, above that of the class. Equivalent to p <= :attr:`level`, exactly."""
        values = self._checked(scores)
        if self.classes is None or labels is None:
            return values > self.threshold
        thresholds = torch.tensor([group.threshold for group in self.groups], dtype=torch.float64, device="cpu")
        return values > thresholds[self._places(labels, len(values))]

    def _share(self, values: Tensor) -> Tensor:
        at_least = len(self) - torch.searchsorted(self.scores, values)
        return (1 + at_least).double() / (len(self) + 1)

    def _places(self, labels: Sequence[Any], count: int) -> Tensor:
        known = {name: number for number, name in enumerate(self.names)}
        texts = [str(label) for label in (labels.tolist() if isinstance(labels, Tensor) else labels)]
        unknown = [text for text in texts if text not in known]
        if unknown or len(texts) != count:
            raise TrajOODError(
                f"labels: expected {count} of the {len(known)} classes that were calibrated, got {len(texts)}, "
                f"{f'first unknown {unknown[0]!r}' if unknown else 'all known'}: omit labels if classes are unknown"
            )
        return torch.tensor([known[text] for text in texts], dtype=torch.int64, device="cpu")

    def acceptance(self, confidence: float = 0.9) -> tuple[float, float]:
        """Confidence interval of the share of new ID images that this particular threshold accepts.

        ``tpr`` holds on average over calibration sets. For a given set the share is distributed as Beta(k, n + 1 − k)
        if scores have no ties, which is wide for few images; ties only increase it (Vovk 2012, "Conditional validity").
        With classes, the interval is that of the smallest class, which is the widest.
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
