"""Paired tests of two scorers: against brute force over all pairs, the metrics room, and the normal distribution."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from delong import delong

from traj_ood.errors import TrajOODError
from traj_ood.evaluation.compare import BootstrapComparison, PairedScores, paired_bootstrap
from traj_ood.evaluation.metrics import compute_metrics

Vectors = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def draw(n: int = 60, m: int = 40, gap: float = 0.5, ties: bool = False, seed: int = 0) -> Vectors:
    """ID and OOD scores of two correlated scorers, the second one better by ``gap``."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n), 1 + rng.normal(size=m)
    found = []
    for shift in (0.0, gap):
        found += [shared[0] + 0.7 * rng.normal(size=n), shared[1] + shift + 0.7 * rng.normal(size=m)]
    return tuple(np.round(v, 0) if ties else v for v in found)  # type: ignore[return-value]


def paired(vectors: Vectors, runs: int = 1) -> PairedScores:
    id_a, ood_a, id_b, ood_b = (np.repeat(v[None], runs, axis=0) for v in vectors)
    return PairedScores(np.stack([id_a, id_b]), {"set": np.stack([ood_a, ood_b])})


def brute_force(vectors: Vectors) -> tuple[float, float, float]:
    """Both AUROCs and the variance of their difference, from all n × m pairs (DeLong et al. 1988, eqs 4–6)."""
    kernels = []
    for id_scores, ood_scores in (vectors[:2], vectors[2:]):
        wins = [[1.0 if x > y else 0.5 if x == y else 0.0 for y in id_scores] for x in ood_scores]
        kernels.append(np.array(wins))  # (m, n)
    thetas = [k.mean() for k in kernels]
    by_ood = np.array([k.mean(axis=1) for k in kernels])
    by_id = np.array([k.mean(axis=0) for k in kernels])
    m, n = kernels[0].shape
    covariance = np.cov(by_ood) / m + np.cov(by_id) / n
    contrast = np.array([1.0, -1.0])
    return thetas[0], thetas[1], float(contrast @ covariance @ contrast)


# ---------------------------------------------------------------------------------------------- DeLong


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "m"), [(60, 40), (2, 2), (7, 90)])
def test_delong_is_the_brute_force_over_all_pairs(n: int, m: int, ties: bool) -> None:
    from scipy.stats import norm

    vectors = draw(n, m, ties=ties, seed=3)
    a, b, variance = brute_force(vectors)
    found = delong(*vectors)
    assert found.auroc_a == pytest.approx(a, abs=1e-12)
    assert found.auroc_b == pytest.approx(b, abs=1e-12)
    if variance > 1e-12:
        assert found.z == pytest.approx((a - b) / math.sqrt(variance), rel=1e-9)
        assert found.p == pytest.approx(2 * norm.sf(abs(found.z)), rel=1e-9)


def test_delong_aurocs_are_those_of_the_metrics() -> None:
    vectors = draw(ties=True)
    found = delong(*vectors)
    assert found.auroc_a == pytest.approx(compute_metrics(*vectors[:2]).auroc, abs=1e-12)
    assert found.auroc_b == pytest.approx(compute_metrics(*vectors[2:]).auroc, abs=1e-12)


def test_delong_is_antisymmetric_and_sees_only_ranks() -> None:
    id_a, ood_a, id_b, ood_b = draw()
    one, other = delong(id_a, ood_a, id_b, ood_b), delong(id_b, ood_b, id_a, ood_a)
    assert (one.auroc_a, one.z, one.p) == (other.auroc_b, -other.z, other.p)
    assert delong(np.exp(id_a), np.exp(ood_a), 40 + id_b, 40 + ood_b) == one


def test_delong_p_is_uniform_without_a_difference() -> None:
    p = np.array([delong(*draw(80, 80, gap=0.0, seed=seed)).p for seed in range(400)])
    # 400 draws: standard deviation 1.1 % at 5 %, 2.5 % at 50 %.
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.04)
    assert (p < 0.5).mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("a", "b", "z", "p"),
    [
        (((0, 1, 2), (5, 6)), ((0, 1, 2), (5, 6)), 0.0, 1.0),
        (((0, 1, 2), (5, 6)), ((0, 1, 2), (8, 7)), 0.0, 1.0),  # both perfect
        (((0, 1, 2), (5, 6)), ((5, 5, 5), (5, 5)), math.inf, 0.0),  # perfect against a constant
        (((5, 5, 5), (5, 5)), ((0, 1, 2), (5, 6)), -math.inf, 0.0),
    ],
)
def test_delong_without_variance(a: Any, b: Any, z: float, p: float) -> None:
    assert delong(*a, *b)[2:] == (z, p)


@pytest.mark.parametrize(
    ("vectors", "text"),
    [
        (([1, 2], [3, 4], [1, 2, 3], [3, 4]), "expected both scorers on the same ID images, got 2 and 3 scores"),
        (([1, 2], [3, 4], [1, 2], [3]), "expected both scorers on the same OOD images, got 2 and 1 scores"),
        (([1], [3, 4], [1], [3, 4]), "expected at least 2 ID images, got 1"),
        (([1, np.nan], [3, 4], [1, 2], [3, 4]), r"ID (a) scores: expected finite numbers, got 1 of 2"),
        (([1, 2], [3, 4], [1, 2], []), r"OOD (b) scores: expected at least 1 score, got 0"),
    ],
)
def test_delong_refuses(vectors: Any, text: str) -> None:
    with pytest.raises(TrajOODError, match=re.escape(text)):
        delong(*vectors)


# ---------------------------------------------------------------------------------------------- bootstrap


def picked_images(suite: PairedScores, name: str, draws: np.random.Generator) -> list[int]:
    """Images of a set one by one; where they are crops, pictures one by one and all the crops of each."""
    numbers = suite.pictures.get(name, np.arange(suite.ood[name].shape[2]))
    drawn = draws.integers(max(numbers) + 1, size=max(numbers) + 1)
    return [i for picture in drawn for i in range(len(numbers)) if numbers[i] == picture]


def resampled_by_hand(suites: list[PairedScores], resamples: int, seed: int) -> np.ndarray:
    """(B, suites × sets, 2 figures, 2 scorers): compute_metrics on images picked one by one, the same streams."""
    streams = np.random.SeedSequence(seed).spawn(len(suites))
    rows = []
    generators = [[np.random.default_rng(s) for s in stream.spawn(1 + len(suite.ood))]
                  for suite, stream in zip(suites, streams, strict=True)]  # fmt: skip
    for _ in range(resamples):
        figures = []
        for suite, (own, *others) in zip(suites, generators, strict=True):
            picked = own.integers(suite.id.shape[2], size=suite.id.shape[2])
            for (name, scores), draws in zip(suite.ood.items(), others, strict=True):
                chosen = picked_images(suite, name, draws)
                each = [[compute_metrics(suite.id[s, r, picked], scores[s, r, chosen]) for r in range(suite.runs)]
                        for s in range(2)]  # fmt: skip
                figures.append([[np.mean([getattr(m, k) for m in runs]) for runs in each] for k in ("auroc", "fpr95")])
        rows.append(figures)
    return np.array(rows)


def several(seed: int, runs: int, sizes: dict[str, int], ties: bool, n: int = 30) -> PairedScores:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=n)

    def noisy(values: np.ndarray) -> np.ndarray:
        scores = values + np.array([0.3, 0.8])[:, None, None] * rng.normal(size=(2, runs, len(values)))
        return np.round(scores * 2) / 2 if ties else scores

    return PairedScores(noisy(base), {name: noisy(1.5 + rng.normal(size=m)) for name, m in sizes.items()})


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_bootstrap_is_the_metrics_on_images_picked_one_by_one(ties: bool, crops: bool) -> None:
    suites = [several(1, 3, {"u": 20, "v": 11}, ties), several(2, 2, {"w": 15}, ties, n=23)]
    if crops:  # pictures with different numbers of crops, in mixed order
        numbers = np.array([0, 1, 0, 2, 2, 0, 0, 1, 0, 3, 0])
        suites = [replace(suites[0], pictures={"v": numbers}), replace(suites[1], pictures={"w": np.arange(15) // 6})]
    found = paired_bootstrap(suites, resamples=12, seed=7)
    expected = resampled_by_hand(suites, 12, seed=7)
    places = [(found.mean, [0, 1, 2]), (found.suites[0], [0, 1]), (found.suites[1], [2])]
    places += [(found.sets[0]["u"], [0]), (found.sets[0]["v"], [1]), (found.sets[1]["w"], [2])]
    for comparison, sets in places:
        for k, figure in enumerate((comparison.auroc, comparison.fpr95)):
            means = expected[:, sets, k].mean(axis=1)
            difference = means[:, 0] - means[:, 1]
            assert [figure.low, figure.high] == pytest.approx(np.quantile(difference, [0.025, 0.975]), abs=1e-12)
            beyond = min((difference <= 1e-15).sum(), (difference >= -1e-15).sum()) + 1
            assert figure.p == pytest.approx(min(1.0, 2 * beyond / 13))
    for k, key in enumerate(("auroc", "fpr95")):
        one_by_one = expected[:, :, k, 0] - expected[:, :, k, 1]  # (B, sets)
        points = [getattr(c, key).difference for sets in found.sets for c in sets.values()]
        for comparison, value, draws in (
            (found.without((0, "v")), np.mean([points[0], points[2]]), one_by_one[:, [0, 2]].mean(axis=1)),
            (found.without((0, "u"), (1, "w")), points[1], one_by_one[:, 1]),
            (found.median(), np.median(points), np.median(one_by_one, axis=1)),
        ):
            figure = getattr(comparison, key)
            assert figure.difference == pytest.approx(value, abs=1e-12)
            assert [figure.low, figure.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1e-12)
    assert found.without() == found.mean


@pytest.mark.parametrize("ties", [False, True])
def test_point_estimates_are_those_of_the_metrics(ties: bool) -> None:
    suite = several(4, 3, {"u": 200, "v": 111}, ties, n=150)
    found = paired_bootstrap([suite], resamples=1)
    for name, comparison in found.sets[0].items():
        for s, side in enumerate("ab"):
            each = [compute_metrics(suite.id[s, r], suite.ood[name][s, r]) for r in range(3)]
            for key in ("auroc", "fpr95"):
                expected = np.mean([getattr(m, key) for m in each])
                assert getattr(getattr(comparison, key), side) == pytest.approx(expected, abs=1e-12)
    assert found.mean == found.suites[0]
    assert found.mean.auroc.difference == pytest.approx(found.mean.auroc.a - found.mean.auroc.b)


def test_bootstrap_agrees_with_delong() -> None:
    """The standard deviation of the resampled difference is DeLong's, up to the noise of 2,000 resamples (2 %)."""
    vectors = draw(300, 250, gap=0.2, seed=5)
    a, b, variance = brute_force(vectors)
    found = paired_bootstrap([paired(vectors)], resamples=2000).mean.auroc
    assert found.difference == pytest.approx(a - b, abs=1e-12)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(math.sqrt(variance), rel=0.08)
    assert found.p == pytest.approx(delong(*vectors).p, abs=0.02)


def test_runs_on_the_same_images_are_no_more_images() -> None:
    """Nine copies of a run say what one says: images are the clusters."""
    vectors = draw()
    one, nine = (paired_bootstrap([paired(vectors, runs)], resamples=200, seed=1).mean for runs in (1, 9))
    for key in ("difference", "low", "high", "p"):
        assert getattr(one.auroc, key) == pytest.approx(getattr(nine.auroc, key), abs=1e-12)
        assert getattr(one.fpr95, key) == pytest.approx(getattr(nine.fpr95, key), abs=1e-12)


def test_draws_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = several(6, 2, {"u": 20, "v": 31}, ties=True)
    whole = paired_bootstrap([suite], resamples=50, seed=2)
    monkeypatch.setattr("traj_ood.evaluation.compare.CHUNK_COUNTS", 100)
    assert paired_bootstrap([suite], resamples=50, seed=2) == whole
    assert paired_bootstrap([suite], resamples=50, seed=3) != whole


def test_copies_of_a_crop_are_no_more_images() -> None:
    """Ten copies of every OOD image, each a crop of one picture, say what the images say alone: no narrower."""
    alone = several(3, 2, {"u": 25}, ties=False)
    copied = replace(alone, ood={"u": np.repeat(alone.ood["u"], 10, axis=2)})
    together = replace(copied, pictures={"u": np.repeat(np.arange(25), 10)})
    one, ten, naive = (paired_bootstrap([s], resamples=300, seed=4).mean.auroc for s in (alone, together, copied))
    assert [ten.difference, ten.low, ten.high] == pytest.approx([one.difference, one.low, one.high], abs=1e-12)
    assert naive.high - naive.low < 0.9 * (one.high - one.low)


def test_a_scorer_against_itself_and_against_a_much_better_one() -> None:
    id_a, ood_a, *_ = draw(400, 300)
    same = paired_bootstrap([paired((id_a, ood_a, id_a, ood_a))], resamples=99).mean
    assert (same.auroc.difference, same.auroc.low, same.auroc.high, same.auroc.p) == (0, 0, 0, 1)
    better = paired_bootstrap([paired((id_a, ood_a + 4, id_a, ood_a))], resamples=99).mean
    assert better.auroc.low > 0
    assert better.fpr95.high < 0
    assert better.auroc.p == better.fpr95.p == pytest.approx(2 / 100), "the smallest that 99 resamples can give"


# ---------------------------------------------------------------------------------------------- tables


def table(seed: int = 0, shuffle: bool = False, **changes: Any) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    parts = []
    for split, role, count in (("test", "test", 12), ("dim", "near", 7), ("bright", "far", 5)):
        values = {k: rng.normal(size=count) for k in ("field", "knn:view=cls")}
        parts.append(pd.DataFrame({"split": split, "role": role, "id": [f"{i:02d}" for i in range(count)], **values}))
    whole = pd.concat(parts, ignore_index=True).assign(**changes)
    return whole.sample(frac=1, random_state=0) if shuffle else whole


def test_tables_are_lined_up_by_image() -> None:
    straight = PairedScores.from_tables([table(0), table(1)], "field", "knn:view=cls")
    mixed = PairedScores.from_tables([table(0, shuffle=True), table(1)], "field", "knn:view=cls")
    assert straight.id.shape == (2, 2, 12)
    assert {k: v.shape for k, v in straight.ood.items()} == {"dim": (2, 2, 7), "bright": (2, 2, 5)}
    np.testing.assert_array_equal(straight.id, mixed.id)
    np.testing.assert_array_equal(straight.ood["dim"], mixed.ood["dim"])
    np.testing.assert_array_equal(straight.ood["dim"][1, 0], table(0).query("split == 'dim'")["knn:view=cls"])


def test_crops_are_told_by_their_ids() -> None:
    names = {"dim": ["skimage/lfw/0000", "skimage/lfw/0001", "noise/uniform/0000", "a/b", "skimage/brick", "x", "y"]}
    names["bright"] = ["skimage/grass/0000", "skimage/brick/0000", "skimage/grass/0001", "skimage/brick/0001", "own"]
    changed = table()
    for split, ids in names.items():
        changed.loc[changed["split"] == split, "id"] = ids
    pair = PairedScores.from_tables([changed], "field", "knn:view=cls")
    assert {k: v.tolist() for k, v in pair.pictures.items()} == {"bright": [0, 1, 1, 2, 2]}  # sorted: own, brick, grass


@pytest.mark.parametrize(
    ("tables", "text"),
    [
        ([], "expected the scores of at least 1 run, got none"),
        ([table().rename(columns={"field": "fields"})], "unknown scorer of run 0 'field': did you mean 'fields'?"),
        ([table(), table().replace({"id": {"03": "99"}})], "the images of test in run 1 are not those of run 0"),
        ([table(), table().query("split != 'dim'")], "expected the split dim in all 2 runs, got it in fewer"),
        ([table().query("role != 'test'")], "expected one split of role test, got none"),
        ([table().query("role == 'test'")], "paired scores: expected at least 1 OOD set, got none"),
        ([table(field=np.nan)], "ID scores: expected finite numbers, got 12 of 24 NaN"),
    ],
)
def test_tables_that_cannot_be_compared(tables: list[pd.DataFrame], text: str) -> None:
    with pytest.raises(TrajOODError, match=re.escape(text)):
        PairedScores.from_tables(tables, "field", "knn:view=cls")


def test_what_the_bootstrap_refuses() -> None:
    suite = several(0, 1, {"u": 5}, ties=False)
    for arguments, text in (
        ({"suites": []}, "expected at least 1 suite, got none"),
        ({"suites": [suite], "resamples": 0}, "resamples: expected at least 1, got 0; 1000 is the default"),
    ):
        with pytest.raises(TrajOODError, match=re.escape(text)):
            paired_bootstrap(**arguments)  # type: ignore[arg-type]
    found = paired_bootstrap([suite], resamples=3)
    with pytest.raises(TrajOODError, match=re.escape("expected to keep at least 1 of 1 sets, got all left out")):
        found.without((0, "u"))
    with pytest.raises(TrajOODError, match=re.escape("sets left out: expected some of [(0, 'u')], got [(1, 'u')]")):
        found.without((1, "u"))


def test_the_order_of_sets_is_kept() -> None:
    found: BootstrapComparison = paired_bootstrap([several(0, 1, {"z": 5, "a": 6}, ties=False)], resamples=3)
    assert list(found.sets[0]) == ["z", "a"]


# ---------------------------------------------------------------------------------------------- diagnostics


def test_means_leave_diagnostics_out_and_sets_keep_them() -> None:
    suites = [several(1, 3, {"u": 20, "v": 11}, False), several(2, 2, {"w": 15, "x": 9}, False, n=23)]
    found = paired_bootstrap([replace(suites[0], diagnostics=frozenset({"v"})), suites[1]], resamples=20)
    every = paired_bootstrap(suites, resamples=20)
    assert found.sets == every.sets
    assert found.mean == every.without((0, "v"))
    assert found.suites == (every.sets[0]["u"], every.suites[1])
    assert found.without((1, "w")) == every.without((0, "v"), (1, "w"))
    gains = [every.sets[0]["u"], *every.sets[1].values()]
    assert found.median().fpr95.difference == pytest.approx(np.median([c.fpr95.difference for c in gains]))
    with pytest.raises(TrajOODError, match="expected to keep at least 1 of 4 sets, got all left out"):
        found.without((0, "u"), (1, "w"), (1, "x"))


def test_diagnostics_of_a_table() -> None:
    def table(role: str) -> pd.DataFrame:
        parts = [("test", "test"), ("near", "near"), ("noise", role)]
        return pd.concat(
            pd.DataFrame({"split": s, "role": r, "id": [f"{s}{i}" for i in range(4)], "a": 1.0, "b": 2.0})
            for s, r in parts
        )

    pairs = PairedScores.from_tables([table("diagnostic")], "a", "b")
    assert (set(pairs.ood), pairs.diagnostics) == ({"near", "noise"}, {"noise"})
    with pytest.raises(TrajOODError, match="noise is far in run 1 and diagnostic in run 0: means would hold it or not"):
        PairedScores.from_tables([table("diagnostic"), table("far")], "a", "b")
    alone = table("diagnostic").query("split != 'near'")
    with pytest.raises(
        TrajOODError, match=r"expected at least 1 OOD set, got none but diagnostics \(noise\); name one"
    ):
        PairedScores.from_tables([alone], "a", "b")
