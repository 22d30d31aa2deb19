"""Compare a stream of scores with the calibration."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from traj_ood.detector.conformal import Calibration
from traj_ood.errors import TrajOODError
from traj_ood.monitor.martingale import Floats, capitals, online_p_values

MARTINGALE, WINDOWS = "martingale", "windows"


@dataclass(frozen=True)
class Alarm:
    """The first time that a test rejected the hypothesis that the stream resembles the calibration."""

    test: str  # martingale or windows
    at: int  # number of scored images up to then; the first is 1
    evidence: float  # the capital of the martingale, or the p-value of the window


@dataclass(frozen=True)
class StreamState:
    """The state of a stream; fields for which there are too few images are None.

    ``uniformity`` is the two-sample Kolmogorov–Smirnov test of all scores against the calibration scores: it tests for
    uniform p-values, taking the number of calibration images into account. It is valid at one fixed time only, whereas
    the alarms are valid at any time.
    """

    images: int  # judged
    invalid: int  # of them without a score
    ood: int  # above the threshold
    rate: float | None  # their share of the images with a score
    interval: tuple[float, float] | None  # exact (Clopper–Pearson) interval of the rate at ``confidence``
    expected: float  # largest expected rate for ID images (Calibration.level)
    recent: dict[str, Any] | None  # images, ood, rate and interval of the last ``window`` scored images
    uniformity: tuple[float, float] | None  # statistic and p-value
    capital: float  # of the martingale
    highest: float  # the highest so far
    alarms: tuple[Alarm, ...]  # so far; empty while the stream resembles the calibration
    confidence: float  # this and the others: the settings, see watch()
    false_alarms: float
    window: int

    @property
    def is_alarm(self) -> bool:
        return bool(self.alarms)

    def as_dict(self) -> dict[str, Any]:
        """The state as JSON data."""
        return {**asdict(self), "alarm": self.is_alarm}


def watch(
    calibration: Calibration,
    scores: Floats,
    invalid: int = 0,
    *,
    false_alarms: float = 0.01,
    window: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> StreamState:
    """Compare a stream of scores with the calibration.

    Args:
        calibration: the calibration of the detector that computed the scores.
        scores: (T,) all scores of the stream from its start, in order; infinite ones count as the highest.
        invalid: number of images without a score.
        false_alarms: probability of any false alarm in an endless stream of images like the calibration images. Default
            0.01; half of it for the martingale, half for the windows.
        window: number of scored images in one Kolmogorov–Smirnov window, and in ``recent``. Default 200: smaller
            windows detect only large changes, larger ones detect them later.
        confidence: confidence level of the intervals. Default 0.95.
        seed: seed of the martingale's random tie-breaking.
    Raises:
        TrajOODError: a setting is invalid, or a score is NaN.
    """
    for name, value in (("false_alarms", false_alarms), ("confidence", confidence)):
        if not 0 < value < 1:
            raise TrajOODError(f"{name}: expected a probability between 0 and 1, got {value!r}")
    if window < 20:
        raise TrajOODError(f"window: expected at least 20 images, got {window}: fewer cannot show a difference")
    known = calibration.scores.numpy()
    capital = capitals(online_p_values(known, scores, seed))
    is_ood = calibration.decide(torch.from_numpy(np.ascontiguousarray(scores, dtype=np.float64))).numpy()
    last = is_ood[-window:]
    return StreamState(
        images=len(scores) + invalid,
        invalid=invalid,
        ood=int(is_ood.sum()),
        rate=float(is_ood.mean()) if len(scores) else None,
        interval=exact_interval(int(is_ood.sum()), len(scores), confidence),
        expected=calibration.level,
        recent=_share(last, confidence) if len(last) == window else None,
        uniformity=_two_samples(known, scores) if len(scores) else None,
        capital=float(capital[-1]) if len(scores) else 1.0,
        highest=float(capital.max(initial=1.0)),
        alarms=tuple(
            alarm
            for alarm in (
                martingale_alarm(capital, false_alarms / 2),
                windows_alarm(known, scores, window, false_alarms / 2),
            )
            if alarm is not None
        ),
        confidence=confidence,
        false_alarms=false_alarms,
        window=window,
    )


def exact_interval(count: int, of: int, confidence: float) -> tuple[float, float] | None:
    """The Clopper–Pearson interval of a share ``count / of``; None if ``of`` is 0."""
    from scipy.stats import binomtest

    if not of:
        return None
    found = binomtest(count, of).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


def martingale_alarm(capital: Floats, level: float) -> Alarm | None:
    """The alarm when the capital (T,) first reaches 1 / ``level``, or None."""
    above = np.flatnonzero(capital >= 1 / level)
    return Alarm(MARTINGALE, int(above[0]) + 1, float(capital[above[0]])) if len(above) else None


def windows_alarm(calibration: Floats, scores: Floats, window: int, level: float) -> Alarm | None:
    """The alarm for the first of consecutive windows that differs from the calibration at its share of ``level``.

    The k-th window has the share 6 / (π k)². These sum to 1, so that the probability of any false alarm is at most
    ``level``, for a stream of any length and although all windows are compared with the same calibration images.
    """
    for k in range(1, len(scores) // window + 1):
        p = _two_samples(calibration, scores[(k - 1) * window : k * window])[1]
        if p <= level * 6 / (math.pi * k) ** 2:
            return Alarm(WINDOWS, k * window, p)
    return None


def _two_samples(calibration: Floats, scores: Floats) -> tuple[float, float]:
    """Statistic and p-value of the Kolmogorov–Smirnov test; infinite scores rank highest."""
    from scipy.stats import ks_2samp

    found: Any = ks_2samp(calibration, scores, method="asymp")
    return float(found.statistic), float(found.pvalue)


def _share(is_ood: np.ndarray, confidence: float) -> dict[str, Any]:
    count = int(is_ood.sum())
    return {
        "images": len(is_ood),
        "ood": count,
        "rate": count / len(is_ood),
        "interval": exact_interval(count, len(is_ood), confidence),
    }
