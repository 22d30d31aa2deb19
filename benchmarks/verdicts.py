"""Whether a claim about scorers holds over sets, models and seeds: the statistics of benchmarks/natural.py.

Figures are a table with one row for each suite, set, model, seed and scorer. A block is a set of a suite; its figure is
the mean over models and seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from traj_ood.errors import TrajOODError
from traj_ood.evaluation.versus import holm

BETTER = {"auroc": 1.0, "fpr95": -1.0}
"""Sign of a difference that is to the candidate's advantage."""
LEVEL = 0.95
_EQUAL = 1e-12  # what is smaller is rounding


@dataclass(frozen=True)
class Difference:
    """The candidate less a rival in one figure.

    Attributes:
        rival: spec.
        mean: over blocks; positive is to the candidate's advantage, whatever the figure.
        low, high: 95 % interval of it, sets, models and seeds drawn anew.
        p: Conover's after Friedman's, both two-sided, Holm-corrected; NaN where neither can be had.
        effect: matched-pairs rank-biserial correlation over blocks, −1 … 1.
        ahead, blocks: on how many blocks the candidate is ahead, of how many.
    """

    rival: str
    mean: float
    low: float
    high: float
    p: float
    effect: float
    ahead: int
    blocks: int


def block_table(figures: pd.DataFrame, figure: str, scorers: Sequence[str]) -> pd.DataFrame:
    """Blocks × scorers: means over models and seeds. Blocks that lack a scorer are left out."""
    own = figures[figures["scorer"].isin(scorers)]
    table = own.pivot_table(index=["suite", "set"], columns="scorer", values=figure, aggfunc="mean")
    return table.reindex(columns=list(scorers)).dropna()


def friedman(table: pd.DataFrame) -> float:
    """p of Friedman's test that all scorers (columns) have the same rank on average; NaN below 3 of either."""
    from scipy.stats import friedmanchisquare

    if table.shape[0] < 3 or table.shape[1] < 3:
        return float("nan")
    return float(friedmanchisquare(*(table[c] for c in table.columns)).pvalue)


def conover(table: pd.DataFrame) -> pd.DataFrame:
    """Scorers × scorers: p of Conover's test after Friedman's, not corrected.

    Raises ``TrajOODError`` without scikit-posthocs.
    """
    try:
        from scikit_posthocs import posthoc_conover_friedman
    except ImportError as error:
        raise TrajOODError("scikit-posthocs is not installed: pip install 'traj_ood[dev]'") from error
    found = posthoc_conover_friedman(table.to_numpy())
    found.index = found.columns = table.columns
    return found


def intervals(
    figures: pd.DataFrame, figure: str, candidate: str, rivals: Sequence[str], resamples: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Of the mean difference against each rival: sets within suites, models and seeds are drawn with replacement.

    A model that was not run on a suite has no figures there; a draw that leaves a block without any drops that block.
    """
    own = figures[figures["scorer"].isin([candidate, *rivals])]
    cube = own.pivot_table(index=["suite", "set"], columns=["scorer", "model", "seed"], values=figure)
    models, seeds = sorted(own["model"].unique()), sorted(own["seed"].unique())
    order = [(m, s) for m in models for s in seeds]

    def of(scorer: str) -> np.ndarray:
        """(blocks, models, seeds), NaN where it was not run."""
        part = pd.DataFrame(cube.xs(scorer, axis=1, level="scorer"))
        found = part.reindex(columns=pd.MultiIndex.from_tuples(order)).to_numpy(dtype=float)
        return found.reshape(len(cube), len(models), len(seeds))

    mine, draws = of(candidate), np.random.default_rng(seed)
    suites = cube.index.get_level_values("suite")
    groups = [np.flatnonzero(suites == s) for s in sorted(set(suites))]
    gains: dict[str, list[float]] = {rival: [] for rival in rivals}
    differences = {rival: BETTER[figure] * (mine - of(rival)) for rival in rivals}
    for _ in range(resamples):
        blocks = np.concatenate([draws.choice(g, len(g)) for g in groups])
        part = np.ix_(blocks, draws.choice(len(models), len(models)), draws.choice(len(seeds), len(seeds)))
        for rival, whole in differences.items():
            drawn = whole[part].reshape(len(blocks), -1)
            kept = drawn[np.isfinite(drawn).any(axis=1)]
            if len(kept):
                gains[rival].append(float(np.nanmean(kept, axis=1).mean()))
    tail = 50 * (1 - LEVEL)
    nothing = (float("nan"), float("nan"))
    quantiles = {r: np.percentile(g, [tail, 100 - tail]) if g else nothing for r, g in gains.items()}
    return {rival: (float(low), float(high)) for rival, (low, high) in quantiles.items()}


def rank_biserial(gains: np.ndarray) -> float:
    """Matched-pairs rank-biserial correlation of differences (Kerby 2014): the share of ranks in favour less that
    against; differences of 0 are left out."""
    from scipy.stats import rankdata

    kept = gains[np.abs(gains) > _EQUAL]
    if not len(kept):
        return 0.0
    ranks = rankdata(np.abs(kept))
    return float((ranks[kept > 0].sum() - ranks[kept < 0].sum()) / ranks.sum())


def compare(
    figures: pd.DataFrame,
    figure: str,
    candidates: Sequence[str],
    rivals: Sequence[str],
    tests: Mapping[str, Any],
) -> dict[str, list[Difference]]:
    """Every candidate against every rival in one figure, corrected for all of these together."""
    scorers = list(dict.fromkeys([*candidates, *rivals]))
    table = block_table(figures, figure, scorers)
    enough = len(table) >= int(tests["least_blocks"])
    omnibus = friedman(table)
    # With two scorers Conover's test is one of two ranks, and Friedman's has nothing to say before it.
    tested = enough and (len(scorers) == 2 or omnibus < float(tests["alpha"]))
    raw = conover(table) if tested else None
    pairs = [(c, r) for c in candidates for r in rivals if c != r]
    p = [float(raw.at[c, r]) for c, r in pairs] if raw is not None else []  # type: ignore[arg-type]
    corrected = dict(zip(pairs, holm(p), strict=True)) if p else {}
    found: dict[str, list[Difference]] = {}
    for candidate in candidates:
        others = [r for r in rivals if r != candidate]
        bounds = intervals(figures, figure, candidate, others, int(tests["resamples"])) if len(table) else {}
        found[candidate] = [
            _difference(table, figure, candidate, r, bounds.get(r), corrected.get((candidate, r))) for r in others
        ]
    return found


def _difference(
    table: pd.DataFrame,
    figure: str,
    candidate: str,
    rival: str,
    bounds: tuple[float, float] | None,
    p: float | None,
) -> Difference:
    gains = (BETTER[figure] * (table[candidate] - table[rival])).to_numpy()
    low, high = bounds or (float("nan"), float("nan"))
    mean = float(gains.mean()) if len(gains) else float("nan")
    ahead = int((gains > _EQUAL).sum())
    p = float("nan") if p is None else p
    return Difference(rival, mean, low, high, p, rank_biserial(gains), ahead, len(gains))


HOLDS, DOES_NOT, UNTOLD = "holds", "does not hold", "cannot be told"


def verdict(
    found: Mapping[str, Mapping[str, Sequence[Difference]]],
    evaluations: Mapping[str, float],
    tests: Mapping[str, Any],
) -> tuple[str, str, str]:
    """(word, candidate, reason) of a claim: whether one of its candidates is ahead of every rival in every figure.

    * ``holds``: for one candidate, every difference is positive with p < alpha, at no more evaluations of f than asked.
    * ``does not hold``: for each candidate, some rival is ahead of it with the whole interval of the difference, or it
      costs too much.
    * ``cannot be told``: anything else, too few sets included.

    Args:
        found: figure → candidate → differences.
    """
    alpha, reasons, refuted = float(tests["alpha"]), [], 0
    candidates = list(next(iter(found.values()))) if found else []
    for candidate in candidates:
        own = [(figure, d) for figure, each in found.items() for d in each[candidate]]
        if evaluations.get(candidate, 0.0) > float(tests["most_evaluations"]):
            refuted += 1
            reasons.append(f"{candidate} costs {evaluations[candidate]:.1f} evaluations of f")
            continue
        if own and all(d.mean > 0 and d.p < alpha for _, d in own):
            return HOLDS, candidate, f"ahead of {len({d.rival for _, d in own})} rivals in {', '.join(found)}"
        behind = [(f, d) for f, d in own if d.high < 0]
        if behind:
            refuted += 1
            figure, worst = min(behind, key=lambda item: item[1].mean)
            reasons.append(f"{candidate} is behind {worst.rival} in {figure} ({100 * worst.mean:+.1f})")
        elif own:
            figure, weakest = min(own, key=lambda item: item[1].mean)
            if not any(d.p == d.p for _, d in own):
                blocks = max(d.blocks for _, d in own)
                reasons.append(f"{candidate}: {blocks} sets, or no difference among all scorers: no test")
            else:
                reasons.append(
                    f"{candidate} against {weakest.rival} in {figure}: {100 * weakest.mean:+.1f}, p = {weakest.p:.2g}"
                )
    if not candidates or not reasons:
        return UNTOLD, "", "nothing to compare"
    return (DOES_NOT if refuted == len(candidates) else UNTOLD), "", "; ".join(reasons)


def diagram(table: pd.DataFrame, figure: str, path: Any, alpha: float) -> None:
    """Critical-difference diagram (Demšar 2006): mean ranks, bars over what Conover–Holm does not tell apart."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from scikit_posthocs import critical_difference_diagram, posthoc_conover_friedman

    ranks = (-BETTER[figure] * table).rank(axis=1).mean()
    p = posthoc_conover_friedman(table.to_numpy(), p_adjust="holm")
    p.index = p.columns = table.columns
    figure_, axes = pyplot.subplots(figsize=(9, 0.32 * len(ranks) + 1.2))
    critical_difference_diagram(ranks, p, ax=axes, alpha=alpha)
    axes.set_title(f"mean rank in {figure} over {len(table)} sets", fontsize=9)
    figure_.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure_)
