"""What a dictionary's health and a few measurements of f come to: one word on a model's attractors, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from traj_ood.attractors import Health, Verdict
from traj_ood.autoencoders import Autoencoder, Encoding
from traj_ood.index import greedy_leaders
from traj_ood.trajectory import Status

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

_SHOWN = 16  # attractors whose radius is measured


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
    drawn = list(dict.fromkeys(group[order].tolist()))[:_SHOWN]
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
    """The same of hidden patches, where the model has masks."""
    variance = _variance(targets, mean)
    if not model.reconstruction_masks() or not variance > 0:
        return None
    return 1 - float(model.reconstruct_masked(targets).sum()) * (targets[0].numel() / variance)


def reconstruction_errors(model: Autoencoder, encoding: Encoding) -> Tensor:
    """(B,) float64 squared error of D(E(x)), summed over pixels."""
    difference = model.decode(encoding.latents) - encoding.target.to(model.device)
    return difference.flatten(1).square().sum(dim=1).cpu().double()


def directions(points: Tensor) -> Tensor:
    """(N, d) points of length 1."""
    return torch.nn.functional.normalize(points.flatten(1), dim=1)


def _variance(targets: Tensor, mean: Tensor) -> float:
    return float((targets.cpu().double() - mean).square().sum())
