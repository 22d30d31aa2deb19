"""What is known of a stream of scores, and whether it still looks like the calibration."""

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
    """The first time that a test found the stream unlike the calibration.

    Attributes:
        test: ``martingale`` or ``windows``.
        at: number of scored images by then; the first is 1.
        evidence: capital of the martingale, or the window's p-value.
    """

    test: str
    at: int
    evidence: float


@dataclass(frozen=True)
class Finding:
    """What is said of a stream; None is what there are too few images for.

    Attributes:
        images, invalid: judged, and those among them without a score.
        ood: images above the threshold. rate: their share of the scored. expected: what ID images give, at most
            (``Calibration.level``). interval: of the rate, exact (Clopper–Pearson), at ``confidence``.
        recent: the same of the last ``window`` scored images: ood, rate and interval.
        uniformity: statistic and p-value of the two-sample Kolmogorov–Smirnov test of all scores against those of the
            calibration, which is the test of uniform p-values that knows how many calibration images there are. For a
            look at one time; the alarms hold at every time.
        capital, highest: of the martingale, now and ever.
        alarms: none while the stream looks like the calibration.
    """

    images: int
    invalid: int
    ood: int
    rate: float | None
    interval: tuple[float, float] | None
    expected: float
    recent: dict[str, Any] | None
    uniformity: tuple[float, float] | None
    capital: float
    highest: float
    alarms: tuple[Alarm, ...]
    confidence: float
    false_alarms: float
    window: int

    @property
    def is_alarm(self) -> bool:
        return bool(self.alarms)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
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
) -> Finding:
    """Compare a stream of scores with the calibration.

    Args:
        calibration: of the detector that gave the scores.
        scores: (T,) of all images of the stream from its start, in order; infinite ones count as the highest.
        invalid: images beside them that have no score.
        false_alarms: probability of any alarm, ever, in an endless stream of images like the calibration's. Default
            0.01; half of it is the martingale's, half the windows'.
        window: scored images of one Kolmogorov–Smirnov window, and of ``recent``. Default 200: fewer see large changes
            only, more see them later.
        confidence: of the intervals. Default 0.95.
        seed: of the martingale's draws.
    Raises:
        TrajOODError: impossible settings, or NaN.
    """
    for name, value in (("false_alarms", false_alarms), ("confidence", confidence)):
        if not 0 < value < 1:
            raise TrajOODError(f"{name}: expected a probability between 0 and 1, got {value!r}")
    if window < 20:
        raise TrajOODError(f"window: expected at least 20 images, got {window}: fewer tell nothing apart")
    known = calibration.scores.numpy()
    capital = capitals(online_p_values(known, scores, seed))
    is_ood = calibration.decide(torch.from_numpy(np.ascontiguousarray(scores, dtype=np.float64))).numpy()
    last = is_ood[-window:]
    return Finding(
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
    """The Clopper–Pearson interval of a share ``count / of``, by scipy; None of nothing."""
    from scipy.stats import binomtest

    if not of:
        return None
    found = binomtest(count, of).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


def martingale_alarm(capital: Floats, level: float) -> Alarm | None:
    """Where the capital (T,) first reaches 1 / ``level``."""
    above = np.flatnonzero(capital >= 1 / level)
    return Alarm(MARTINGALE, int(above[0]) + 1, float(capital[above[0]])) if len(above) else None


def windows_alarm(calibration: Floats, scores: Floats, window: int, level: float) -> Alarm | None:
    """The first of the windows, one behind the other, that differs from the calibration at its part of ``level``.

    The k-th of them has the part 6 / (π k)²; these sum to 1, so the probability of any false alarm is at most ``level``
    however long the stream is, and although all windows are compared with the same calibration images.
    """
    for k in range(1, len(scores) // window + 1):
        p = _two_samples(calibration, scores[(k - 1) * window : k * window])[1]
        if p <= level * 6 / (math.pi * k) ** 2:
            return Alarm(WINDOWS, k * window, p)
    return None


def _two_samples(calibration: Floats, scores: Floats) -> tuple[float, float]:
    """Statistic and p-value; infinite scores become the highest finite rank."""
    from scipy.stats import ks_2samp

    found = ks_2samp(calibration, scores, method="asymp")
    return float(found.statistic), float(found.pvalue)


def _share(is_ood: np.ndarray, confidence: float) -> dict[str, Any]:
    count = int(is_ood.sum())
    return {
        "images": len(is_ood),
        "ood": count,
        "rate": count / len(is_ood),
        "interval": exact_interval(count, len(is_ood), confidence),
    }
