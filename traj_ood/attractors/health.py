"""Whether attractors can be trusted: a dictionary's health, and a verdict on a model's attractors with its remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
"""Median ‖z* − z0‖ / ‖z0‖. Below that the end point is z0 again (cosine above 0.9998), the path says nothing that z0
does not, and a score against attractors is a distance to training latents."""
Word = Literal[
    "healthy", "slow", "not converging", "diverging", "near-identity", "collapsed", "unstable", "random-like"
]
_NO_ATTRACTORS = "such as field, early-path, knn or mahalanobis"
SAME = 0.99
"""Cosine from which two end points count as one attractor: the paper's (§3.2), as in AttractorDictionary.distinct."""
RANDOM_EXPLAINED = 0.1
"""D(E(x)) that explains less of the images' variance than this does no better than the mean image, as random weights
do (measured: −72 %). A trained model is far above: two latent units explain 58 % of Fashion-MNIST's ID classes."""
STILL_FALLING = 0.1
"""A residual below this share of its value at half the path is on its way: the tolerance is a matter of more steps.
Those of limit cycles and wandering samples stay within a factor of a few."""
STABLE = 0.5
"""Least share of attractors with a spectral radius below 1. Iteration cannot settle at an unstable point except by
creeping, so at a healthy model nearly all are stable; most of them unstable means that the tolerance was met by
slowness, not by arrival."""

_MEASURED_ATTRACTORS = 16  # attractors whose radius is measured
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Verdict:
    """One word on a model's attractors, why, and what to do about it.

    Attributes:
        word: ``healthy``, or what is wrong.
        reason, remedy: a sentence each, without full stop; the remedy of a healthy model is empty.
    """

    word: Word
    reason: str
    remedy: str = ""

    @property
    def meaningful(self) -> bool:
        """Whether a score against these attractors says something about the image."""
        return self.word == "healthy"

    @property
    def text(self) -> str:
        """The whole verdict in one line; a bad one also names what is still of use."""
        if self.meaningful:
            return f"{self.word}: {self.reason}."
        line = f"{self.word}: {self.reason}. Scores against these attractors mean nothing; {self.remedy}."
        if self.word == "random-like":
            return line
        return f"{line} Scorers that need no attractors ({_NO_ATTRACTORS}) do not depend on this."


@dataclass(frozen=True)
class Health:
    """Whether a dictionary describes attractors at all. A score against an unhealthy one is not to be trusted.

    Attributes:
        count: number of end points.
        converged: share that reached the tolerance; non_finite: share that left the finite numbers.
        residual_quantiles, steps_quantiles, displacement_quantiles: at 5, 25, 50, 75, 95 %. The residual is the last
            squared one, the displacement is ‖z* − z0‖ / ‖z0‖.
        distinct: number of end points left when those with cosine >= 0.99 to an earlier one are merged.
        healthy: at least 90 % converged, at least 10 distinct, and a median displacement of at least 2 %.
        warnings: one sentence per reason why it is not.
        verdict: the same in words, with the remedy; of several reasons it names the one that explains the others.
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
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Facts:
    """What a verdict needs beyond the dictionary's health; None where there was nothing to measure it on.

    Attributes:
        still_falling: share of the training trajectories at the step limit whose residual was still falling.
        radii: spectral radius of the Jacobian at sampled attractors. stable: share below 1.
        explained: share of ID images' variance that D(E(x)) explains (of the features' for a surrogate).
        explained_hidden: the same on hidden patches, for masked autoencoders.
    """

    still_falling: float | None
    radii: tuple[float, ...]
    stable: float | None
    explained: float
    explained_hidden: float | None


def health_of(
    *,
    count: int,
    converged: float,
    non_finite: float,
    distinct: int,
    residuals: Tensor,
    steps: Tensor,
    displacements: Tensor,
) -> Health:
    """The health of ``count`` end points; the tensors, (count,) float64, become quantiles of their finite values."""
    moved = _quantiles(displacements)
    verdicts = _objections(count, converged, non_finite, distinct, moved)
    good = f"{converged:.1%} of {count} training trajectories end at {distinct} distinct attractors"
    return Health(
        count=count,
        converged=converged,
        non_finite=non_finite,
        residual_quantiles=_quantiles(residuals),
        steps_quantiles=_quantiles(steps),
        displacement_quantiles=moved,
        distinct=distinct,
        healthy=not verdicts,
        warnings=tuple(v.reason for v in verdicts),
        verdict=verdicts[0] if verdicts else Verdict("healthy", good),
    )


def judge(health: Health, facts: Facts) -> Verdict:
    """The dictionary's own verdict, unless the other measurements explain it, or contradict a good one."""
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
    """Share of the trajectories at the step limit whose squared residual (N, T) was still falling; the median over a
    tenth of the path damps a single odd step. None where none met the limit."""
    limited = residuals[statuses == Status.STEP_LIMIT]
    steps = limited.shape[1]
    if not len(limited) or steps < 2:
        return None
    width = max(1, steps // 10)
    middle = limited[:, steps // 2 - width // 2 :][:, :width].median(dim=1).values
    end = limited[:, -width:].median(dim=1).values
    return float((end < STILL_FALLING * middle).double().mean())


def drawn_attractors(ends: Tensor, seed: int) -> list[tuple[int, int]]:
    """Up to 16 attractors among converged end points (M, *L), drawn as often as trajectories end there, the most
    visited first: (index of its leader, number of its end points)."""
    leaders, group = greedy_leaders(directions(ends), (2 - 2 * SAME) ** 0.5)
    order = torch.randperm(len(ends), generator=torch.Generator().manual_seed(seed))
    drawn = list(dict.fromkeys(group[order].tolist()))[:_MEASURED_ATTRACTORS]
    visits = torch.bincount(group).tolist()
    return [(int(leaders[g]), visits[g]) for g in sorted(drawn, key=lambda g: -visits[g])]


def share_stable(radii: Sequence[float]) -> float | None:
    """Share of spectral radii below 1."""
    return sum(r < 1 for r in radii) / len(radii) if radii else None


def explained(errors: Tensor, targets: Tensor, mean: Tensor) -> float:
    """1 − Σ squared errors (N,) of D(E(x)) / Σ ‖target − mean‖²; NaN where all targets (N, *) are the mean."""
    variance = _variance(targets, mean)
    return 1 - float(errors.sum()) / variance if variance > 0 else math.nan


def explained_hidden(model: Autoencoder, targets: Tensor, mean: Tensor) -> float | None:
    """The same share for hidden patches; None for models without masking."""
    variance = _variance(targets, mean)
    if not model.reconstruction_masks() or not variance > 0:
        return None
    return 1 - float(model.reconstruct_masked(targets).sum()) * (targets[0].numel() / variance)


def reconstruction_errors(model: Autoencoder, encoding: Encoding) -> Tensor:
    """(B,) float64 squared error of D(E(x)), summed over pixels."""
    difference = model.decode(encoding.latents) - encoding.target.to(model.device)
    return difference.flatten(1).square().sum(dim=1).cpu().double()


def directions(points: Tensor) -> Tensor:
    """(N, d) the points scaled to unit length."""
    return torch.nn.functional.normalize(points.flatten(1), dim=1)


def _variance(targets: Tensor, mean: Tensor) -> float:
    return float((targets.cpu().double() - mean).square().sum())


def _objections(
    count: int, converged: float, non_finite: float, distinct: int, displacements: tuple[float, ...]
) -> list[Verdict]:
    """What speaks against a dictionary, causes before their consequences."""
    found = []
    if converged < HEALTHY_CONVERGED:
        reason = f"only {converged:.1%} of {count} training trajectories converged (healthy: at least 90 %)"
        if non_finite > (1 - converged) / 2:
            remedy = (
                "bound the latents (end the encoder in a LayerNorm) and train with input noise, so that f contracts"
            )
            found.append(Verdict("diverging", f"{reason}, {non_finite:.1%} left the finite numbers", remedy))
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
    return tuple(torch.quantile(finite, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist())
