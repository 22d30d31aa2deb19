"""SCOPED: norm and divergence of the score in one statistic (Barkley et al. 2026), adapted to the field of f."""

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
    """−log density of S = log(‖v‖² / |∇·v|), v = f(z_0) − z_0, under a Gaussian kernel density of ID training images.

    Score-curvature out-of-distribution proximity evaluator (Barkley, Culbertson and Fridovich-Keil, ICLR 2026,
    arXiv:2510.01456): the ratio of the squared norm of a diffusion model's score s(x, t) to the trace of its Jacobian,
    estimated by one Hutchinson probe, under a kernel density of ID images. For a score the two are equal on average, up
    to sign; for v, which is not a score (J_f is not symmetric), they need not be.

    Only the abstract and the public reviews of the paper were available (OpenReview TMLiG9Rk2J). They give
    T = ‖s‖² / tr ∇s, −log density of T as the score, and one or two noise levels (steps 1 and 300 of the diffusion in
    its experiments on images). No code of the authors was found. Differences, and what is unknown:

    * f − id takes the place of the score and has no noise level, so there is one T;
    * the density is that of log |T|, because T spans decades, and its sign has no meaning for v;
    * the trace is a central difference along the probe, not a Jacobian-vector product;
    * the kernel's bandwidth is Scott's, N^(−1/5) standard deviations. The authors' bandwidth, and how they combine two
      levels, are unknown.
    """

    name: ClassVar[str] = "scoped"
    summary: ClassVar[str] = "density of the field's length over its divergence (SCOPED, Barkley et al. 2026, for f)"
    suite: ClassVar[dict[str, int]] = {"": 182}
    bears_rounding: ClassVar[bool] = False  # the divergence is a finite difference over a short distance

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
        return 3.0  # f(z_0), and two for the divergence


def _ratios(evidence: Evidence) -> Tensor:
    """The statistic S, (B,) float64."""
    assert evidence.divergence is not None  # declared in needs
    field = evidence.points["tokens", 1].cpu().double() - evidence.features["tokens"].cpu().double()
    length, divergence = field.square().sum(dim=1), evidence.divergence.abs()
    return length.clamp(min=_TINY).log() - divergence.clamp(min=_TINY).log()
