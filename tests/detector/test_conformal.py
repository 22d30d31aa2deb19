"""Split-conformal thresholds and p-values: exact arithmetic, the promised distribution, and hostile scores."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from traj_ood.detector.conformal import Calibration, check_count, images_needed
from traj_ood.errors import TrajOODError

quick = settings(deadline=None, max_examples=80)  # the first example compiles, and a busy machine is slow
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 2 / 3, 0.1)


def scores_of(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("tpr", "needed"), [(0.95, 19), (0.99, 99), (0.999, 999), (0.9, 9), (0.8, 4), (0.5, 1), (0.1, 1), (0.975, 39)]
)
def test_how_many_images_a_level_needs(tpr: float, needed: int) -> None:
    assert images_needed(tpr) == needed
    Calibration(torch.zeros(needed, dtype=torch.float64), tpr)
    with pytest.raises(TrajOODError, match=f"accepting {tpr:g} of new ID images needs at least {needed} ID images"):
        Calibration(torch.zeros(needed - 1, dtype=torch.float64), tpr)
    with pytest.raises(TrajOODError, match=f"got {needed - 1}: give more images or a smaller tpr"):
        check_count(needed - 1, tpr)


@pytest.mark.parametrize("tpr", [0, 1, 0.0, 1.0, -0.5, 95, math.nan, math.inf, "0.95", None, True])
def test_levels_that_are_none(tpr: object) -> None:
    with pytest.raises(TrajOODError, match=r"tpr: expected a share of ID images between 0 and 1, such as 0\.95, got"):
        images_needed(tpr)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        (torch.zeros(30), r"expected float64 scores \(n,\), got torch.float32 \(30,\)"),
        (torch.zeros(30, 1).double(), r"expected float64 scores \(n,\), got torch.float64 \(30, 1\)"),
        (torch.full((30,), torch.nan).double(), "30 of 30 ID images have scores that are not finite"),
        (torch.cat([torch.zeros(29), torch.full((1,), torch.inf)]).double(), "1 of 30 ID images have scores that are"),
    ],
)
def test_scores_that_no_threshold_is_made_of(scores: Tensor, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        Calibration(scores)


def test_by_hand() -> None:
    known = Calibration(scores_of(list(range(19, 0, -1))), 0.95)
    assert (len(known), known.rank, known.threshold, known.level) == (19, 19, 19.0, 1 / 20)
    assert known.p_values(scores_of([0, 1, 1.5, 19, 19.5])).tolist() == [1.0, 1.0, 19 / 20, 2 / 20, 1 / 20]
    assert known.decide(scores_of([0, 18, 19, 19.5])).tolist() == [False, False, False, True]
    assert known.p_values(scores_of([math.inf, -math.inf])).tolist() == [1 / 20, 1.0]
    assert known.decide(scores_of([math.inf, -math.inf])).tolist() == [True, False]


def test_nan_gets_no_decision() -> None:
    known = Calibration(torch.zeros(19, dtype=torch.float64))
    for ask in (known.p_values, known.decide):
        with pytest.raises(TrajOODError, match=r"expected numbers \(B,\), got shape \(2,\) with 1 NaN"):
            ask(scores_of([1.0, math.nan]))


def test_nothing_in_nothing_out() -> None:
    known = Calibration(torch.zeros(19, dtype=torch.float64))
    empty = torch.empty(0, dtype=torch.float64)
    assert known.p_values(empty).shape == known.decide(empty).shape == (0,)
    assert known.decide(empty).dtype == torch.bool


# ---------------------------------------------------------------------------------------------- any scores at all

numbers = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, 1e308, -1e308, 5e-324, 1.0, 1.0 + 2**-52]
)
calibrations = st.lists(numbers, min_size=1, max_size=60)
asked = st.lists(numbers | st.sampled_from([math.inf, -math.inf]), max_size=30)


@quick
@given(calibrations, asked, st.sampled_from(LEVELS))
def test_against_the_definition(calibration: list[float], new: list[float], tpr: float) -> None:
    share, n = Fraction(repr(tpr)), len(calibration)
    k = math.ceil((n + 1) * share)
    if k > n:
        assert n < images_needed(tpr)
        with pytest.raises(TrajOODError, match="needs at least"):
            Calibration(scores_of(calibration), tpr)
        return
    assert n >= images_needed(tpr)
    known = Calibration(scores_of(calibration), tpr)
    threshold = sorted(calibration)[k - 1]
    assert known.threshold == threshold
    p = [Fraction(1 + sum(c >= s for c in calibration), n + 1) for s in new]
    assert known.p_values(scores_of(new)).tolist() == [float(v) for v in p]
    assert known.decide(scores_of(new)).tolist() == [s > threshold for s in new] == [v <= 1 - share for v in p]
    # The promise, in floating point too: the decision is p <= level, and at least tpr of calibration is accepted.
    assert torch.equal(known.decide(scores_of(new)), known.p_values(scores_of(new)) <= known.level)
    assert sum(c <= threshold for c in calibration) >= share * n


@quick
@given(st.lists(numbers, min_size=19, max_size=60), asked, st.randoms())
def test_no_order_and_no_split_matters(calibration: list[float], new: list[float], random: object) -> None:
    known = Calibration(scores_of(calibration))
    shuffled = calibration[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    cut = len(new) // 3
    parts = [known.p_values(scores_of(part)) for part in (new[:cut], new[cut:])]
    assert torch.equal(torch.cat(parts), Calibration(scores_of(shuffled)).p_values(scores_of(new)))


@quick
@given(numbers, st.integers(19, 40))
def test_equal_scores_accept_themselves(value: float, count: int) -> None:
    known = Calibration(torch.full((count,), value, dtype=torch.float64))
    own = scores_of([value])
    assert known.p_values(own).item() == 1.0
    assert not known.decide(own).item()


# ---------------------------------------------------------------------------------------------- what is promised


def drawn(draw: np.random.Generator, count: int, ties: bool) -> Tensor:
    values = draw.standard_gamma(2.0, count)
    return torch.from_numpy(np.round(values) if ties else values)


@pytest.mark.parametrize("n", [19, 40])
def test_p_values_of_new_id_images_are_uniform(n: int) -> None:
    """Without ties P(p = j/(n+1)) is 1/(n+1) for each j: a chi-squared test over independent calibration sets."""
    draw = np.random.default_rng(0)
    counts = np.zeros(n + 1)
    for _ in range(6000):
        p = Calibration(drawn(draw, n, False), 0.5).p_values(drawn(draw, 1, False))
        counts[round(p.item() * (n + 1)) - 1] += 1
    assert stats.chisquare(counts).pvalue > 0.001
    assert counts.sum() == 6000


@pytest.mark.slow
@pytest.mark.parametrize("tpr", [0.8, 0.9, 0.95])
def test_ties_are_conservative_and_the_level_is_kept(tpr: float) -> None:
    draw = np.random.default_rng(1)
    accepted = {False: 0, True: 0}
    small = {False: 0, True: 0}
    trials = 4000
    for _ in range(trials):
        for ties in accepted:
            known = Calibration(drawn(draw, 25, ties), tpr)
            new = drawn(draw, 1, ties)
            accepted[ties] += not known.decide(new).item()
            small[ties] += known.p_values(new).item() <= 0.25
    error = 4 * math.sqrt(tpr * (1 - tpr) / trials)
    exact = math.ceil(26 * Fraction(repr(tpr))) / 26  # without ties the share is k / (n + 1)
    assert abs(accepted[False] / trials - exact) < error
    assert accepted[True] / trials > tpr - error
    assert small[True] < small[False] <= trials * (0.25 + 4 * math.sqrt(0.25 * 0.75 / trials))


def test_the_share_that_one_threshold_accepts_lies_in_its_interval() -> None:
    draw = np.random.default_rng(2)
    inside = 0
    for _ in range(1500):
        known = Calibration(drawn(draw, 60, False), 0.9)
        low, high = known.acceptance(0.8)
        inside += low <= stats.gamma.cdf(known.threshold, 2.0) <= high
    assert abs(inside / 1500 - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 1500)
    low, high = known.acceptance()
    assert 0 < low < 0.9 < high < 1
