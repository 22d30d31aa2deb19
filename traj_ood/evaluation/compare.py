"""Tests whether one scorer is better than another on the same images: a paired bootstrap over sets.

The test is paired, because an image that is hard for one scorer is often hard for the other. Scores are float64 and
HIGHER = MORE OOD; only their ranks matter. A difference is always a − b.

It does not cover the randomness of training. With several models or attractor samples, it tests whether a difference of
the *mean over these runs* could be explained by the choice of test images. The variation between runs is measured by
their standard deviation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from traj_ood.data import OOD_ROLES
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.evaluation.metrics import CHUNK_COUNTS, RECALL, Counts, Floats, check_scores, resample

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 1000
"""Default number of resamples: the smallest possible p is 2 / 1,001, well below 0.01, and 25 draws are beyond either
end of a 95 % interval."""

# Ids of crops (traj_ood.data.fashion.crops): those with the same prefix are cut from one picture. The ids of faces look
# alike, but each face is a separate picture.
_CROP = re.compile(r"(skimage/(?!lfw/)[^/]+)/\d+")
_TAILS = ((1 - 0.95) / 2, (1 + 0.95) / 2)  # of the 95 % intervals


# ---------------------------------------------------------------------------------------------- paired scores


@dataclass(frozen=True)
class PairedScores:
    """Scores of two scorers a and b on the images of one benchmark, in R runs (models or attractor samples).

    Attributes:
        id: (2, R, n) float64 scores of the n ID test images.
        ood: (2, R, m) float64 scores of each OOD set.
        diagnostics: names of the OOD sets that means over sets leave out. Default: none.
        pictures: for each OOD set made of crops, the number 0, 1, … of the picture from which each image was cut, (m,).
            Images of other sets, and ID images, are independent of each other.
    """

    id: Floats
    ood: Mapping[str, Floats]
    pictures: Mapping[str, Counts] = field(default_factory=dict)
    diagnostics: frozenset[str] = frozenset()

    @property
    def runs(self) -> int:
        return self.id.shape[1]

    @classmethod
    def from_tables(cls, tables: Sequence[pd.DataFrame], a: str, b: str) -> PairedScores:
        """The scores in columns ``a`` and ``b`` of the ``scores.parquet`` tables of runs on the same images, whose
        rows may be in any order.

        Raises:
            TrajOODError: there are no tables, a table lacks a scorer (similar names are suggested), the ID test images
                or an OOD set other than diagnostics, images differ between runs, or scores are not finite.
        """
        if not tables:
            raise TrajOODError("paired scores: expected the scores of at least 1 run, got none")
        blocks: dict[str, list[Floats]] = {}
        roles: dict[str, str] = {}
        first: dict[str, list[str]] = {}
        for number, table in enumerate(tables):
            for label in (a, b):
                if label not in table.columns:
                    own = ("split", "role", "id", "trajectory_steps", "trajectory_status")
                    raise unknown_name(f"scorer of run {number}", label, [c for c in table.columns if c not in own])
            for (split, role), rows in table.groupby(["split", "role"], sort=False):
                part = rows.sort_values("id")
                ids = part["id"].tolist()
                if number and ids != first.get(str(split)):
                    raise TrajOODError(
                        f"paired scores: the images of {split} in run {number} are not those of run 0: compare runs on "
                        "the same images only"
                    )
                if roles.setdefault(str(split), str(role)) != role:
                    raise TrajOODError(
                        f"paired scores: {split} is {role} in run {number} and {roles[str(split)]} in run 0: means "
                        "would hold it or not; run the older one again"
                    )
                first[str(split)] = ids
                blocks.setdefault(str(split), []).append(part[[a, b]].to_numpy(dtype=np.float64).T)
        short = next((s for s, found in blocks.items() if len(found) != len(tables)), None)
        if short is not None:
            raise TrajOODError(f"paired scores: expected the split {short} in all {len(tables)} runs, got it in fewer")
        stacked = {split: np.stack(found, axis=1) for split, found in blocks.items()}
        tests = [split for split, role in roles.items() if role == "test"]
        if len(tests) != 1:
            raise TrajOODError(f"paired scores: expected one split of role test, got {', '.join(tests) or 'none'}")
        ood = {s: v for s, v in stacked.items() if roles[s] in OOD_ROLES}
        diagnostics = frozenset(s for s in ood if roles[s] == "diagnostic")
        if not ood.keys() - diagnostics:
            but = f" but diagnostics ({', '.join(sorted(diagnostics))})" if diagnostics else ""
            raise TrajOODError(f"paired scores: expected at least 1 OOD set, got none{but}; name one")
        for name, scores in (("ID", stacked[tests[0]]), *ood.items()):
            check_scores(scores.reshape(-1), name)
        numbered = {s: _numbered_pictures(first[s]) for s in ood}
        pictures = {s: n for s, n in numbered.items() if n.max() + 1 < len(n)}
        return cls(stacked[tests[0]], ood, pictures, diagnostics)


def _numbered_pictures(ids: Sequence[str]) -> Counts:
    """(m,): number of the picture from which each image was cut, by first appearance; other images are their own."""
    import pandas as pd

    matches = ((i, _CROP.fullmatch(i)) for i in ids)
    return pd.factorize(np.array([m[1] if m else i for i, m in matches], dtype=object))[0]


# ---------------------------------------------------------------------------------------------- paired bootstrap


@dataclass(frozen=True)
class Difference:
    """A metric of both scorers, the difference a − b with its interval, and its two-sided p-value.

    All but p are fractions in [−1, 1], and means over runs (and sets) or medians over sets.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """The differences of two scorers in AUROC (higher is better) and the paper's FPR@95 (lower is better)."""

    auroc: Difference
    fpr95: Difference


@dataclass(frozen=True)
class BootstrapComparison:
    """Result of :func:`paired_bootstrap`.

    Attributes:
        mean: mean over the near and far sets of all suites, each set with equal weight.
        suites: mean within each suite, in the given order.
        sets: the single sets of each suite, diagnostics included.
        held: (S,) bool, whether a set is in the means; false for diagnostics.
        points: (S, 2, 2) sets × metrics × scorers.
        draws: (S, 2, 2, B) the same in each of B resamples; other summaries can be computed from them.
    """

    mean: Comparison
    suites: tuple[Comparison, ...]
    sets: tuple[dict[str, Comparison], ...]
    points: Floats = field(repr=False, compare=False)
    draws: Floats = field(repr=False, compare=False)
    held: NDArray[np.bool_] = field(repr=False, compare=False)

    def without(self, *left_out: tuple[int, str]) -> Comparison:
        """The mean over all sets except diagnostics and these, each given by the number of its suite and its name.

        Raises:
            TrajOODError: a set is unknown, or none is left.
        """
        names = [(number, name) for number, suite in enumerate(self.sets) for name in suite]
        absent = [pair for pair in left_out if pair not in names]
        if absent:
            raise TrajOODError(f"sets left out: expected some of {names}, got {absent}")
        kept = [i for i, pair in enumerate(names) if self.held[i] and pair not in left_out]
        if not kept:
            raise TrajOODError(f"sets left out: expected to keep at least 1 of {len(names)} sets, got all left out")
        return _compare(self.points[kept], self.draws[kept])

    def median(self) -> Comparison:
        """The median over sets of the difference. ``a`` and ``b`` are each scorer's median, whose difference is another
        number."""
        held, drawn = self.points[self.held], self.draws[self.held]
        own, points = np.median(held, axis=0), np.median(held[:, :, 0] - held[:, :, 1], axis=0)
        draws = np.median(drawn[:, :, 0] - drawn[:, :, 1], axis=0)
        found = (_difference(own[k, 0], own[k, 1], draws[k]) for k in range(2))
        return Comparison(*(replace(d, difference=float(points[k])) for k, d in enumerate(found)))


def paired_bootstrap(
    suites: Sequence[PairedScores], *, resamples: int = RESAMPLES, seed: int = 0
) -> BootstrapComparison:
    """Bootstrap over images of the difference in mean AUROC and mean FPR@95 between two scorers.

    In each resample the ID images of every suite and the images of every OOD set are drawn with replacement, the same
    for both scorers and all runs: an image is a cluster, however many runs scored it. All sets of a suite use the same
    draw of ID images. Metrics are averaged over runs, then over sets.

    If images are crops of ``pictures``, pictures are drawn, each with all of its crops: 1,000 crops of three pictures
    are three observations. With so few clusters the interval is rough, and rather too narrow than too wide. Sets are
    drawn independently, even if they were cut from the same pictures.

    p is two-sided, 2 · min(#{d ≤ 0} + 1, #{d ≥ 0} + 1) / (resamples + 1), at most 1 and never 0. Intervals are
    percentile intervals of 95 %. P-values of single sets are not corrected for their number.

    Args:
        suites: one or several benchmarks, with the same two scorers in each.
        resamples, seed: number and seed of the resamples.
    Raises:
        TrajOODError: there is no suite, or ``resamples`` < 1.
    """
    if not suites:
        raise TrajOODError("paired bootstrap: expected at least 1 suite, got none")
    if resamples < 1:
        raise TrajOODError(f"resamples: expected at least 1, got {resamples}; {RESAMPLES} is the default")
    # scipy.stats.bootstrap pairs samples, not clusters of crops, and would sort every resample again.
    streams = np.random.SeedSequence(seed).spawn(len(suites))
    measured = [_figures(suite, resamples, stream) for suite, stream in zip(suites, streams, strict=True)]

    held = [np.array([name not in suite.diagnostics for name in suite.ood]) for suite in suites]
    all_held = np.concatenate(held)
    all_points, all_draws = (np.concatenate([m[k] for m in measured]) for k in range(2))
    return BootstrapComparison(
        mean=_compare(all_points[all_held], all_draws[all_held]),
        suites=tuple(_compare(m[0][own], m[1][own]) for m, own in zip(measured, held, strict=True)),
        sets=tuple(
            {name: _compare(points[i : i + 1], draws[i : i + 1]) for i, name in enumerate(suite.ood)}
            for suite, (points, draws) in zip(suites, measured, strict=True)
        ),
        points=all_points,
        draws=all_draws,
        held=all_held,
    )


def _compare(points: Floats, draws: Floats) -> Comparison:
    """The means over sets, from points (S, 2, 2) and draws (S, 2, 2, B), sets × metrics × scorers (× resamples)."""
    figures = zip(points.mean(axis=0), draws.mean(axis=0), strict=True)
    return Comparison(*(_difference(p[0], p[1], d[0] - d[1]) for p, d in figures))


def _difference(a: float, b: float, draws: Floats) -> Difference:
    low, high = np.quantile(draws, _TAILS)
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum())) + 1
    p = min(1.0, 2.0 * beyond / (len(draws) + 1))
    return Difference(float(a), float(b), float(a - b), float(low), float(high), p)


def _figures(suite: PairedScores, resamples: int, stream: np.random.SeedSequence) -> tuple[Floats, Floats]:
    """Metrics of one suite, averaged over its runs: (S, 2, 2) for all images and (S, 2, 2, B) resampled, as sets ×
    (AUROC, FPR@95) × scorers (× resamples)."""
    pairs = [(s, r) for s in range(2) for r in range(suite.runs)]
    columns = [_Column(suite.id[s, r], {name: scores[s, r] for name, scores in suite.ood.items()}) for s, r in pairs]

    def average(counts: dict[str, Counts], id_counts: Counts) -> Floats:
        each = np.stack([c.figures(id_counts, counts) for c in columns])  # (2 R, S, 2, B)
        return each.reshape(2, suite.runs, *each.shape[1:]).mean(axis=1).transpose(1, 2, 0, 3)

    sizes = {name: scores.shape[2] for name, scores in suite.ood.items()}
    once = average({name: _ones(m) for name, m in sizes.items()}, _ones(suite.id.shape[2]))
    # One stream per split, so that the draws do not depend on the size of a chunk.
    own, *others = (np.random.default_rng(s) for s in stream.spawn(1 + len(sizes)))
    pictures = [suite.pictures.get(name) for name in sizes]
    width = max(1, CHUNK_COUNTS // max(suite.id.shape[2], *sizes.values()))
    chunks = []
    for start in range(0, resamples, width):
        count = min(width, resamples - start)
        id_counts = _resample(suite.id.shape[2], count, own)
        each = zip(sizes.items(), others, pictures, strict=True)
        counts = {name: _resample(m, count, draws, numbers) for (name, m), draws, numbers in each}
        chunks.append(average(counts, id_counts))
    return once[..., 0], np.concatenate(chunks, axis=-1)


def _ones(count: int) -> Counts:
    return np.ones((count, 1), dtype=np.int64)


def _resample(images: int, count: int, draws: np.random.Generator, pictures: Counts | None = None) -> Counts:
    """(images, count): how often each image is drawn in each of ``count`` resamples; with ``pictures``, by picture."""
    if pictures is not None:
        return _resample(int(pictures.max()) + 1, count, draws)[pictures]
    return np.ascontiguousarray(resample(np.arange(images), images, count, draws).T)


class _Column:
    """One scorer in one run, with scores sorted once, so that a resample (a count per image) only takes sums."""

    def __init__(self, id_scores: Floats, ood: Mapping[str, Floats]) -> None:
        self._order = np.argsort(id_scores, kind="stable")
        self._id = id_scores[self._order]
        self._sets = {name: _SortedSet(self._id, scores) for name, scores in ood.items()}

    def figures(self, id_counts: Counts, ood_counts: Mapping[str, Counts]) -> Floats:
        """(S, 2, B) AUROC and FPR@95 of each set, from counts (n, B) of the ID images and (m, B) of each set."""
        below = np.zeros((len(self._id) + 1, id_counts.shape[1]), dtype=np.int64)
        np.cumsum(id_counts[self._order], axis=0, out=below[1:])
        images = len(self._id)
        # The threshold keeps at least 95 % of ID, compared as shares, as in metrics.py.
        kept = int(np.argmax(np.arange(images + 1) / images >= RECALL))
        threshold = self._id[(below[1:] < kept).sum(axis=0)]
        return np.stack([s.figures(below, threshold, ood_counts[name]) for name, s in self._sets.items()])


class _SortedSet:
    """The sorted scores of one OOD set, with their positions among the sorted ID scores (n,)."""

    def __init__(self, id_scores: Floats, scores: Floats) -> None:
        self._order = np.argsort(scores, kind="stable")
        self._scores = scores[self._order]
        self._left = np.searchsorted(id_scores, self._scores, side="left")
        self._right = np.searchsorted(id_scores, self._scores, side="right")

    def figures(self, below: Counts, threshold: Floats, counts: Counts) -> Floats:
        """(2, B) AUROC and FPR@95, from cumulative ID counts (n + 1, B), thresholds (B,) and counts (m, B)."""
        own = counts[self._order]
        # Weighted rank sum: pairs with the ID image below the OOD image count fully, ties half.
        wins = np.einsum("mb,mb->b", own, below[self._left] + below[self._right])
        total = own.sum(axis=0)  # differs between resamples if pictures have different numbers of crops
        accepted = np.zeros((len(own) + 1, own.shape[1]), dtype=np.int64)
        np.cumsum(own, axis=0, out=accepted[1:])
        last = np.searchsorted(self._scores, threshold, side="right")
        fpr = np.take_along_axis(accepted, last[None], axis=0)[0] / total
        return np.stack([wins / (2.0 * total * below[-1]), fpr])
