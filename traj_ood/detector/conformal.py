"""Split-conformal calibration: from scores of held-out ID images to p-values and a threshold (Vovk et al. 2005).

Let n ID images that nothing was fitted on have the scores c_1 … c_n, and a new image the score s. When the new image is
ID, too, the n + 1 scores are exchangeable, so that whatever the scorer and the data are

    p(s) = (1 + #{i : c_i >= s}) / (n + 1)    satisfies    P(p <= α) <= α  for every α,

over the draw of calibration and new images together (not for each set of calibration images, see
:meth:`Calibration.acceptance`). Ties count as at least as strange and hence make p larger: conservative. The threshold
that accepts at least ``tpr`` of new ID images is c_(k), the k-th smallest, with k = ⌈(n + 1) tpr⌉.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError


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


def check_count(count: int, tpr: float) -> None:
    """Refuse too few calibration images, before anything is computed.

    Raises:
        TrajOODError: fewer than :func:`images_needed`, which the message tells.
    """
    needed = images_needed(tpr)
    if count < needed:
        raise TrajOODError(
            f"calibration: accepting {tpr:.6g} of new ID images needs at least {needed} ID images that were not "
            f"trained on, got {count}: give more images or a smaller tpr"
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of held-out ID images, and the share of new ID images to accept.

    Attributes:
        scores: (n,) float64, finite, ascending; sorted here.
        tpr: share of new ID images that must be accepted, at least.
    Raises:
        TrajOODError: other scores, or too few for ``tpr``; the message says how many are needed.
    """

    scores: Tensor
    tpr: float = 0.95

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
        object.__setattr__(self, "scores", scores.detach().cpu().sort().values)

    def __len__(self) -> int:
        return len(self.scores)

    @cached_property
    def rank(self) -> int:
        """k = ⌈(n + 1) tpr⌉, at most n."""
        return math.ceil((len(self) + 1) * exact_share(self.tpr))

    @property
    def threshold(self) -> float:
        """c_(k): a score above it is OOD."""
        return float(self.scores[self.rank - 1])

    @property
    def level(self) -> float:
        """α = (n + 1 − k) / (n + 1) <= 1 − tpr: a score is above the threshold exactly when its p-value is <= α."""
        return (len(self) + 1 - self.rank) / (len(self) + 1)

    def p_values(self, scores: Tensor) -> Tensor:
        """(B,) float64 p-values of scores (B,); that of +inf is the smallest one, 1 / (n + 1).

        Raises:
            TrajOODError: a score is NaN.
        """
        as_strange = len(self) - torch.searchsorted(self.scores, self._checked(scores))
        return (1 + as_strange).double() / (len(self) + 1)

    def decide(self, scores: Tensor) -> Tensor:
        """(B,) bool, True = OOD: the score is above :attr:`threshold`, which is p <= :attr:`level`, exactly.

        Raises:
            TrajOODError: a score is NaN.
        """
        return self._checked(scores) > self.threshold

    def acceptance(self, confidence: float = 0.9) -> tuple[float, float]:
        """The share of new ID images that THIS threshold accepts: an interval it lies in with the given confidence.

        ``tpr`` holds on average over calibration sets. For one set the share is a draw of Beta(k, n + 1 − k) when
        scores have no ties, wide for few images; ties only raise it (Vovk 2012, "Conditional validity").
        """
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
