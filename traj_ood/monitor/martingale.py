"""Conformal test martingales: bets at fair odds against "these images are exchangeable with the calibration images".

While the null hypothesis holds, the probability that the capital ever exceeds c in an endless stream is at most 1 / c
(Ville's inequality), so the capital may be tested after every image. The bets are on the p-value of each score among
the calibration scores AND all earlier scores (Vovk, Gammerman and Shafer 2005, 7.1; Vovk, Petej, Nouretdinov, Ahlberg,
Carlsson and Gammerman 2021, "Retrain or not retrain"):

    p_t = (#{i : s_i > s_t} + θ_t #{i : s_i = s_t}) / (n + t),   θ_t uniform,

which are independent and uniform for exchangeable scores. P-values among a fixed calibration set are not independent:
they share its random deviations, and a bet against uniformity would eventually win on any stream.

The betting strategy is the simple jumper: capital is distributed over densities on [0, 1], each part is multiplied by
its density at p_t, and before every image a share J of the capital is redistributed, so that the best density may
change over time. New capital w_t = 1 / (t (t + 1)), which sums to 1, is added at every image t, so that losses before a
change do not affect bets that begin at the change: a change after t images costs a factor of at most t², whereas the
plain jumper's loss is exponential in t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from traj_ood.errors import TrajOODError

Floats = NDArray[np.float64]
JUMP = 0.01
"""Share of the capital that is redistributed before each image, as in Vovk et al. 2021."""
MAX_CAPITAL = 1e100
"""Cap on the capital, far above any alarm level, because floats end at 1e308."""
_BLOCK = 512  # scores ranked at a time


def _tail(share: float, pays: float) -> Callable[[Floats], Floats]:
    """The piecewise constant density with probability ``pays`` on p <= ``share``."""
    return lambda p: np.where(p <= share, pays / share, (1 - pays) / (1 - share))


BETS: Mapping[str, Callable[[Floats], Floats]] = {
    "nothing": np.ones_like,
    "higher": lambda p: 1.5 - p,  # with "nothing" and "lower" the three of the simple jumper, ε = −1, 0, 1
    "lower": lambda p: 0.5 + p,
    "ood-10%": _tail(0.05, 0.10),  # 10 % of the images have one of the 5 % smallest p-values
    "ood-25%": _tail(0.05, 0.25),
    "ood-75%": _tail(0.05, 0.75),
    "extreme": _tail(0.005, 0.05),
    "narrower": lambda p: _tail(0.05, 0.20)(1 - p),  # scores too low, such as the same image again and again
}
"""The default bets: densities on [0, 1] by name."""


def online_p_values(calibration: Floats, scores: Floats, seed: int = 0) -> Floats:
    """P-values of scores (T,) in order, each among the calibration scores (n,) and all earlier scores, as (T,). With
    the same ``seed`` of θ, a longer stream begins with the same p-values."""
    if not len(calibration) or np.isnan(scores).any() or np.isnan(calibration).any():
        raise TrajOODError(
            f"scores: expected numbers and at least one calibration score, got {len(calibration)} calibration scores "
            f"and {int(np.isnan(scores).sum())} NaN: leave out images without a score"
        )
    theta = np.random.default_rng(seed).random(len(scores))
    past = np.sort(calibration)
    found = np.empty(len(scores))
    for start in range(0, len(scores), _BLOCK):
        block = scores[start : start + _BLOCK]
        at_most, below = (np.searchsorted(past, block, side=side) for side in ("right", "left"))
        earlier = np.tri(len(block), k=-1, dtype=bool)
        greater = len(past) - at_most + ((block[None, :] > block[:, None]) & earlier).sum(axis=1)
        equal = 1 + at_most - below + ((block[None, :] == block[:, None]) & earlier).sum(axis=1)
        count = len(calibration) + start + 1 + np.arange(len(block))
        found[start : start + len(block)] = (greater + theta[start : start + len(block)] * equal) / count
        past = np.sort(np.concatenate([past, block]), kind="stable")  # merges two sorted runs
    return found


def capitals(
    p_values: Floats,
    bets: Mapping[str, Callable[[Floats], Floats]] = BETS,
    restarts: bool = True,
) -> Floats:
    """The capital after each p-value (T, …) of one or more streams, (T, …); it starts at 1.

    ``bets`` are densities on [0, 1] by name. ``restarts`` adds new capital at every image, see the module; false is the
    plain simple jumper.
    """
    odds = np.stack([bet(p_values) for bet in bets.values()], axis=-1)
    held = np.zeros(odds.shape[1:]) if restarts else np.full(odds.shape[1:], 1 / len(bets))
    found = np.empty(p_values.shape)
    for t in range(len(p_values)):
        new = 1 / ((t + 1) * (t + 2)) if restarts else 0.0
        total = held.sum(axis=-1, keepdims=True)
        held = ((1 - JUMP) * held + (JUMP * total + new) / len(bets)) * odds[t]
        held *= np.minimum(1, MAX_CAPITAL / np.maximum(held.sum(axis=-1, keepdims=True), 1e-300))
        found[t] = held.sum(axis=-1) + (1 / (t + 2) if restarts else 0.0)
    return found
