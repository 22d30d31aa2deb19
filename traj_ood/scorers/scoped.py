"""SCOPED: length and divergence of the score in one number (Barkley et al. 2025), carried over to the field of f."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows

_TINY = 1e-12


@register
@dataclass
class SCOPED(Scorer):
    """−log density of S = log(‖v‖² / |∇·v|) under a Gaussian kernel estimate from ID training images; v = f(z_0) − z_0.

    Score-curvature out-of-distribution proximity evaluator (Barkley, Culbertson and Fridovich-Keil, ICLR 2026,
    arXiv:2510.01456): the squared length of a diffusion model's score s(x, t) over the trace of its Jacobian, by one
    Hutchinson probe, judged by a kernel density of ID images. For a score the two are equal on average, up to sign;
    for v, which is none (J_f is not symmetric), they need not be.

    The paper was read as far as its abstract and its public reviews (OpenReview TMLiG9Rk2J), which give
    T = ‖s‖² / tr ∇s, −log density of T as the score, and one or two noise levels (steps 1 and 300 of the diffusion in
    its experiments on images); no code of the authors was found. What differs here, or was not to be learnt:

    * f − id stands in the score's place and has no noise level, so there is one T;
    * log |T| is what the density is of: T spans decades, and for v its sign means nothing;
    * the trace is a central difference along the probe, not a Jacobian-vector product;
    * the kernel's width is Scott's, N^(−1/5) deviations. Theirs, and how two levels are joined, are not
      known.
    """

    name: ClassVar[str] = "scoped"
    summary: ClassVar[str] = "density of the field's length over its divergence (SCOPED, Barkley et al. 2025, for f)"
    suite: ClassVar[dict[str, int]] = {"": 182}
    bears_rounding: ClassVar[bool] = False  # a difference of f over a short way

    def needs(self) -> Needs:
        return Needs(features=frozenset({"tokens"}), points=frozenset({("tokens", 1)}), steps=1, divergence=True)

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        values = _ratios(train)
        width = values.std(correction=0).clamp(min=_TINY) * len(values) ** -0.2
        return {"values": values, "width": width[None]}

    def score(self, evidence: Evidence) -> Tensor:
        known, width = self.state["values"], self.state["width"]
        constant = math.log(len(known)) + math.log(2 * math.pi) / 2 + width.log()

        def energies(part: Tensor) -> Tensor:
            return constant - (-((part[:, None] - known) / width).square() / 2).logsumexp(dim=1)

        return in_rows(energies, _ratios(evidence))

    def f_evaluations(self, evidence: Evidence) -> float:
        return 3.0  # f(z0), and two beside it


def _ratios(evidence: Evidence) -> Tensor:
    """(B,) float64 S."""
    assert evidence.divergence is not None  # declared in needs
    field = evidence.points["tokens", 1].cpu().double() - evidence.features["tokens"].cpu().double()
    length, divergence = field.square().sum(dim=1), evidence.divergence.abs()
    return length.clamp(min=_TINY).log() - divergence.clamp(min=_TINY).log()
