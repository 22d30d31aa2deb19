"""Conformal test martingales: a bet against "these images are exchangeable with the calibration's", at fair odds.

As long as the bet is fair its capital exceeds c at any time in an endless stream with probability at most 1 / c
(Ville), so it may be looked at after every image. What is bet on are p-values of each score among the calibration's AND
all that came before it (Vovk, Gammerman and Shafer 2005, 7.1; Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman
2021, "Retrain or not retrain"):

    p_t = (#{i : s_i > s_t} + θ_t #{i : s_i = s_t}) / (n + t),   θ_t uniform,

which are independent and uniform for exchangeable scores. Those of a fixed calibration set are not: they share its
chance deviations, and a bet against uniformity would win in time on any stream.

The gambler is the simple jumper: capital is spread over densities on [0, 1], multiplied by each one's value at p_t, and
before every image a share J of it is spread anew, so that the densities may change. New capital w_t = 1 / (t (t + 1))
is put in at every image t, out of 1 in all: what the bets before a change have lost is not lost to those that begin at
the change, and a change after t images costs a factor of t² at most, where the plain jumper's loss is exponential in t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from traj_ood.errors import TrajOODError

Floats = NDArray[np.float64]
JUMP = 0.01
"""Share of the capital that is spread anew before each image; as in Vovk et al. 2021."""
ENOUGH = 1e100
"""Capital above which no more is won: the question is settled, and floats end at 1e308."""
_BLOCK = 512


def _tail(share: float, pays: float) -> Callable[[Floats], Floats]:
    """The density that puts the probability ``pays`` on p <= ``share``."""
    return lambda p: np.where(p <= share, pays / share, (1 - pays) / (1 - share))


BETS: Mapping[str, Callable[[Floats], Floats]] = {
    "nothing": np.ones_like,
    "higher": lambda p: 1.5 - p,  # the jumper's own three, ε = −1, 0, 1
    "lower": lambda p: 0.5 + p,
    "ood-10%": _tail(0.05, 0.10),  # 10 % of the images in the 5 % that look most strange, …
    "ood-25%": _tail(0.05, 0.25),
    "ood-75%": _tail(0.05, 0.75),
    "extreme": _tail(0.005, 0.05),
    "narrower": lambda p: _tail(0.05, 0.20)(1 - p),  # scores too low: the same image again and again
}
"""Densities on [0, 1] that are bet on by default."""


def online_p_values(calibration: Floats, scores: Floats, seed: int = 0) -> Floats:
    """(T,) p-values of scores (T,), each among the calibration scores (n,) and the scores before it; small = strange.

    Args:
        seed: of θ. The same seed gives a longer stream the same p-values at its beginning. Default 0.
    Raises:
        TrajOODError: NaN among the scores, or no calibration scores.
    """
    if not len(calibration) or np.isnan(scores).any() or np.isnan(calibration).any():
        raise TrajOODError(
            f"scores: expected numbers and at least one of the calibration, got {len(calibration)} of the calibration "
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
        past = np.sort(np.concatenate([past, block]), kind="stable")  # two sorted runs are merged
    return found


def capitals(
    p_values: Floats,
    bets: Mapping[str, Callable[[Floats], Floats]] = BETS,
    jump: float = JUMP,
    restarts: bool = True,
) -> Floats:
    """(T, …) capital after each of the p-values (T, …), beginning with 1.

    Args:
        bets: densities on [0, 1] by name. jump: share that is spread anew before each image.
        restarts: put new capital in at every image, see the module. Default true; false is the plain simple jumper.
    """
    odds = np.stack([bet(p_values) for bet in bets.values()], axis=-1)
    held = np.zeros(odds.shape[1:]) if restarts else np.full(odds.shape[1:], 1 / len(bets))
    found = np.empty(p_values.shape)
    for t in range(len(p_values)):
        new = 1 / ((t + 1) * (t + 2)) if restarts else 0.0
        total = held.sum(axis=-1, keepdims=True)
        held = ((1 - jump) * held + (jump * total + new) / len(bets)) * odds[t]
        held *= np.minimum(1, ENOUGH / np.maximum(held.sum(axis=-1, keepdims=True), 1e-300))
        found[t] = held.sum(axis=-1) + (1 / (t + 2) if restarts else 0.0)
    return found
