"""Whether attractors can be trusted: the health of a dictionary, and a verdict on a model's attractors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from traj_ood.autoencoders import Autoencoder, Encoding
from traj_ood.dynamics.trajectory import Status
from traj_ood.index import greedy_leaders

HEALTHY_CONVERGED = 0.90
HEALTHY_DISTINCT = 10
HEALTHY_DISPLACEMENT = 0.02
"""Minimum of the median displacement ‖z* − z0‖ / ‖z0‖. Below it the end point is almost z0 (cosine above 0.9998), so
the path adds nothing to z0, and a distance to attractors is a distance to training latents."""
Word = Literal[
    "healthy", "slow", "not converging", "diverging", "near-identity", "collapsed", "unstable", "random-like"
]
_SCORERS_WITHOUT_ATTRACTORS = "such as field, early-path, knn or mahalanobis"
SAME = 0.99
"""Cosine from which two end points count as one attractor: the paper's (§3.2)."""
RANDOM_EXPLAINED = 0.1
"""Minimum share of the images' variance that D(E(x)) explains. Below it the model reconstructs no better than the mean
image, like random weights; a trained model is far above."""
STILL_FALLING = 0.1
"""A residual below this share of its value half-way along the path is still decreasing, so more steps would reach the
tolerance. Residuals of limit cycles and wandering samples stay within a factor of a few."""
STABLE = 0.5
"""Minimum share of attractors with a spectral radius below 1. Near an unstable point iteration can only slow down, not
converge, so nearly all attractors of a healthy model are stable. If most are unstable, the steps fell below the
tolerance because they were slow, not because the trajectories arrived."""

_MAX_MEASURED = 16  # attractors whose spectral radius is measured
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Verdict:
    """A one-word judgement of a model's attractors, with its reason and a remedy.

    Attributes:
        word: ``healthy``, or the problem.
        reason: one sentence without full stop.
        remedy: one sentence without full stop; empty if healthy.
    """

    word: Word
    reason: str
    remedy: str = ""

    @property
    def meaningful(self) -> bool:
        """Whether distances to these attractors carry information about the image: the word is ``healthy``."""
        return self.word == "healthy"

    @property
    def text(self) -> str:
        """The verdict in one line; if it is bad, with the scorers that do not depend on attractors."""
        if self.meaningful:
            return f"{self.word}: {self.reason}."
        line = f"{self.word}: {self.reason}. Scores against these attractors mean nothing; {self.remedy}."
        if self.word == "random-like":
            return line
        return f"{line} Scorers that need no attractors ({_SCORERS_WITHOUT_ATTRACTORS}) do not depend on this."


@dataclass(frozen=True)
class Health:
    """Statistics of a dictionary that show whether its end points are attractors. Do not trust scores against an
    unhealthy dictionary.

    Attributes:
        count: number of end points.
        converged: share of trajectories that reached the tolerance.
        non_finite: share of trajectories that became NaN or infinite.
        residual_quantiles: last squared residual at 5, 25, 50, 75 and 95 %.
        steps_quantiles: number of steps at the same quantiles.
        displacement_quantiles: ‖z* − z0‖ / ‖z0‖ at the same quantiles.
        distinct: number of end points after merging those with cosine >= 0.99 to an earlier one.
        healthy: whether at least 90 % converged, at least 10 are distinct, and the median displacement is at least 2 %.
        warnings: one sentence per condition that does not hold.
        verdict: the judgement in words with a remedy; if several conditions fail, for the one that causes the others.
    """

    count: int
    converged: float
    non_finite: float
    residual_quantiles: tuple[float, ...]
    steps_quantiles: tuple[float, ...]
    displacement_quantiles: tuple[float, ...]
    distinct: int
    healthy: bool
    warnings: tuple[str, ...]
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """The attributes as JSON data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Facts:
    """Measurements that a verdict uses in addition to the dictionary's health; None where they could not be taken.

    Attributes:
        still_falling: share of the training trajectories at the step limit whose residual was still decreasing.
        radii: spectral radius of the Jacobian at each sampled attractor.
        explained: share of the variance of ID images (for a surrogate: of their features) that D(E(x)) explains.
        explained_hidden: the same on hidden patches, for masked autoencoders.
    """

    still_falling: float | None
    radii: tuple[float, ...]
    explained: float
    explained_hidden: float | None

    @property
    def stable(self) -> float | None:
        """Share of ``radii`` below 1; None if there are none."""
        return sum(r < 1 for r in self.radii) / len(self.radii) if self.radii else None


def health_of(statuses: Tensor, residuals: Tensor, steps: Tensor, displacements: Tensor, *, distinct: int) -> Health:
    """The health of N end points, from a value (N,) each and the number of ``distinct`` ones; quantiles are over finite
    values."""
    count, moved = len(statuses), _quantiles(displacements)
    converged, non_finite = (
        float((statuses == status).double().mean()) for status in (Status.CONVERGED, Status.NON_FINITE)
    )
    verdicts = _objections(count, converged, non_finite, distinct, moved)
    good = f"{converged:.1%} of {count} training trajectories end at {distinct} distinct attractors"
    return Health(
        count=count,
        converged=converged,
        non_finite=non_finite,
        residual_quantiles=_quantiles(residuals),
        steps_quantiles=_quantiles(steps.double()),
        displacement_quantiles=moved,
        distinct=distinct,
        healthy=not verdicts,
        warnings=tuple(v.reason for v in verdicts),
        verdict=verdicts[0] if verdicts else Verdict("healthy", good),
    )


def judge(health: Health, facts: Facts) -> Verdict:
    """The verdict of ``health``, replaced or extended where ``facts`` explain a bad one or contradict a good one."""
    verdict = health.verdict
    hidden = facts.explained_hidden
    blind = facts.explained < RANDOM_EXPLAINED
    if blind and not (hidden is not None and hidden >= RANDOM_EXPLAINED):
        reason = (
            f"D(E(x)) explains {facts.explained:.0%} of the variance of held-out images (healthy: at least "
            f"{RANDOM_EXPLAINED:.0%}), no more than the mean image would, as with random weights"
        )
        return Verdict("random-like", reason, "train the model, or check that its trained weights were loaded")
    if verdict.word == "not converging" and (facts.still_falling or 0.0) > 0.5:
        reason = f"{verdict.reason}, but {facts.still_falling:.0%} of the others were still approaching"
        return Verdict("slow", reason, "raise max_steps, or train with more input noise for a faster contraction")
    if blind and not verdict.meaningful:
        reason = (
            f"{verdict.reason}, and D(E(x)) explains {facts.explained:.0%} of the variance without a mask but "
            f"{hidden:.0%} of hidden patches, as after training on hidden patches alone"
        )
        return Verdict(verdict.word, reason, "train with the loss on all pixels and input noise (loss: all)")
    if verdict.meaningful and facts.stable is not None and facts.stable < STABLE:
        reason = (
            f"only {facts.stable:.0%} of {len(facts.radii)} attractors have a spectral radius below 1 (healthy: at "
            f"least {STABLE:.0%}): trajectories pass there slowly and do not end"
        )
        return Verdict("unstable", reason, "lower tol and raise max_steps, or train with more input noise")
    return verdict


def still_falling(residuals: Tensor, statuses: Tensor) -> float | None:
    """Share of the trajectories at the step limit whose squared residual was still decreasing; None if there are none.

    The end of the path is compared with its middle (:data:`STILL_FALLING`), each as the median over a tenth of the
    path, so that single outliers do not matter.

    Args:
        residuals: (N, T) squared residuals.
        statuses: (N,) int64.
    """
    limited = residuals[statuses == Status.STEP_LIMIT]
    steps = limited.shape[1]
    if not len(limited) or steps < 2:
        return None
    width = max(1, steps // 10)
    middle = limited[:, steps // 2 - width // 2 :][:, :width].median(dim=1).values
    end = limited[:, -width:].median(dim=1).values
    return float((end < STILL_FALLING * middle).double().mean())


def drawn_attractors(ends: Tensor, seed: int) -> list[tuple[int, int]]:
    """Sample up to 16 distinct attractors among converged end points (M, *L), with probability proportional to their
    number of end points; returns pairs (index of one end point, number of end points), the largest first."""
    leaders, group = group_directions(ends)
    order = torch.randperm(len(ends), generator=torch.Generator().manual_seed(seed))
    drawn = list(dict.fromkeys(group[order].tolist()))[:_MAX_MEASURED]
    visits = torch.bincount(group).tolist()
    return [(int(leaders[g]), visits[g]) for g in sorted(drawn, key=lambda g: -visits[g])]


def explained(errors: Tensor, targets: Tensor, mean: Tensor) -> float:
    """Explained variance 1 − Σ errors / Σ ‖target − mean‖²; NaN if all targets equal the mean.

    Args:
        errors: (N,) squared errors of D(E(x)), summed over pixels.
        targets: (N, *) images as the model reconstructs them.
        mean: (*) mean over training images.
    """
    variance = _variance(targets, mean)
    return 1 - float(errors.sum()) / variance if variance > 0 else math.nan


def explained_hidden(model: Autoencoder, targets: Tensor, mean: Tensor) -> float | None:
    """As :func:`explained`, for hidden patches; None for models without masking."""
    variance = _variance(targets, mean)
    if not model.reconstruction_masks() or not variance > 0:
        return None
    return 1 - float(model.reconstruct_masked(targets).sum()) * (targets[0].numel() / variance)


def reconstruction_errors(model: Autoencoder, encoding: Encoding) -> Tensor:
    """Squared errors of D(E(x)) summed over pixels, (B,) float64."""
    difference = model.decode(encoding.latents) - encoding.target.to(model.device)
    return difference.flatten(1).square().sum(dim=1).cpu().double()


def group_directions(points: Tensor, cosine: float = SAME) -> tuple[Tensor, Tensor]:
    """Group points (N, *L) greedily: a point joins the first earlier leader with at least this cosine similarity.

    Returns:
        See :func:`traj_ood.index.greedy_leaders`.
    """
    # On the unit sphere ‖a − b‖² = 2 − 2 cos, which float32 gives up to 1e-6: equal points may be as far apart.
    return greedy_leaders(directions(points), max(1e-6, 2 - 2 * cosine) ** 0.5)


def directions(points: Tensor) -> Tensor:
    """The points scaled to unit length, (N, d)."""
    return torch.nn.functional.normalize(points.flatten(1), dim=1)


def _variance(targets: Tensor, mean: Tensor) -> float:
    return float((targets.cpu().double() - mean).square().sum())


def _objections(
    count: int, converged: float, non_finite: float, distinct: int, displacements: tuple[float, ...]
) -> list[Verdict]:
    """The conditions of health that do not hold, causes before consequences."""
    found = []
    if converged < HEALTHY_CONVERGED:
        reason = f"only {converged:.1%} of {count} training trajectories converged (healthy: at least 90 %)"
        if non_finite > (1 - converged) / 2:
            remedy = (
                "bound the latents (end the encoder in a LayerNorm) and train with input noise, so that f contracts"
            )
            found.append(Verdict("diverging", f"{reason}, {non_finite:.1%} became NaN or infinite", remedy))
        else:
            remedy = "train with the loss on all pixels and input noise (loss: all, input_noise: 0.3 to 1.0), or "
            found.append(Verdict("not converging", reason, remedy + "allow more steps"))
    if displacements and displacements[2] < HEALTHY_DISPLACEMENT:
        reason = f"f hardly moves a sample: median displacement {displacements[2]:.1%} of ‖z0‖ (healthy: at least 2 %)"
        found.append(Verdict("near-identity", reason, "train with input noise or masks, or narrow the bottleneck"))
    if distinct < HEALTHY_DISTINCT:
        noun = "attractor" if distinct == 1 else "attractors"
        reason = f"only {distinct} distinct {noun} (healthy: at least {HEALTHY_DISTINCT})"
        remedy = "widen the bottleneck, train longer, or with less input noise"
        found.append(Verdict("collapsed", reason, remedy))
    return found


def _quantiles(values: Tensor) -> tuple[float, ...]:
    finite = values[values.isfinite()]
    if not len(finite):
        return ()
    return tuple(torch.quantile(finite, finite.new_tensor(_QUANTILES, dtype=torch.float64)).tolist())
