"""Gaussian mixtures: densities whose score and optimal denoiser are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from traj_ood.errors import unknown_name


@dataclass(frozen=True)
class Mixture:
    """p(x) = Σ_k w_k N(x; μ_k, C_k) on ℝᵈ.

    Attributes:
        weights: (K,) float64, positive, of sum 1.
        means: (K, d) float64.
        covariances: (K, d, d) float64, symmetric and positive definite.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.means.shape[1]

    def smoothed(self, sigma: float) -> Mixture:
        """p_σ, the density of x + σε with ε ~ N(0, I): the same mixture with C_k + σ²I."""
        return replace(self, covariances=self.covariances + sigma**2 * torch.eye(self.dim, dtype=torch.float64))

    def log_density(self, points: Tensor) -> Tensor:
        """log p at ``points`` (B, d), (B,)."""
        return self._joint(points).logsumexp(dim=1)

    def score(self, points: Tensor) -> Tensor:
        """The score ∇ log p = −Σ_k r_k(x) C_k⁻¹ (x − μ_k) at ``points`` (B, d), (B, d), with responsibilities r_k."""
        pulls = -_times(self.covariances.inverse(), self._deviations(points))
        return (self._responsibilities(points)[..., None] * pulls).sum(dim=1)

    def denoise(self, points: Tensor, sigma: float) -> Tensor:
        """The optimal denoiser E[x | x + σε = point] at ``points`` (B, d), (B, d): the minimum of the denoising loss.

        Computed as the posterior mean Σ_k r_k (μ_k + C_k (C_k + σ²I)⁻¹ (z − μ_k)), not from the score. By Tweedie's
        formula (Miyasawa 1961) f*(z) − z = σ² ∇ log p_σ(z), which is tested.
        """
        noisy = self.smoothed(sigma)
        gains = self.covariances @ noisy.covariances.inverse()
        means = self.means + _times(gains, noisy._deviations(points))
        return (noisy._responsibilities(points)[..., None] * means).sum(dim=1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw samples, (count, d)."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, dtype=torch.float64, generator=generator)
        return self.means[which] + (torch.linalg.cholesky(self.covariances)[which] @ noise[..., None])[..., 0]

    def _deviations(self, points: Tensor) -> Tensor:
        """x − μ_k, (B, K, d)."""
        return points[:, None].double() - self.means

    def _joint(self, points: Tensor) -> Tensor:
        """log w_k N(x; μ_k, C_k), (B, K)."""
        factors = torch.linalg.cholesky(self.covariances)
        white = _times(factors.inverse(), self._deviations(points))
        log_det = 2 * factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        squared = white.square().sum(dim=2)
        return self.weights.log() - 0.5 * (squared + log_det + self.dim * math.log(2 * math.pi))

    def _responsibilities(self, points: Tensor) -> Tensor:
        return self._joint(points).softmax(dim=1)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Product of matrices (K, d, d) with vectors (B, K, d), (B, K, d)."""
    return torch.einsum("kij,bkj->bki", matrices, vectors)


def _triangle() -> Mixture:
    """Three elongated components of unequal weight, without symmetries that could hide a wrong field."""
    turns = torch.tensor([0.3, 1.5, 2.6], dtype=torch.float64)
    axes = torch.stack([torch.stack([turns.cos(), turns.sin()], 1), torch.stack([-turns.sin(), turns.cos()], 1)], 2)
    spread = torch.diag(torch.tensor([0.8, 0.25], dtype=torch.float64) ** 2)
    means = torch.tensor([[-1.6, -0.8], [1.6, -0.6], [0.1, 1.7]], dtype=torch.float64)
    return Mixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, axes @ spread @ axes.transpose(1, 2))


def _ring() -> Mixture:
    """Eight round components on a circle of radius 2: many modes around a valley."""
    turns = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = 2 * torch.stack([turns.cos(), turns.sin()], dim=1)
    return Mixture(torch.full((8,), 1 / 8, dtype=torch.float64), means, 0.3**2 * torch.eye(2).double().expand(8, 2, 2))


MIXTURES: dict[str, Callable[[], Mixture]] = {"triangle": _triangle, "ring": _ring}


def named_mixture(name: str) -> Mixture:
    """The mixture of a name in :data:`MIXTURES`; raises ``TrajOODError`` for another."""
    if name not in MIXTURES:
        raise unknown_name("mixture", name, MIXTURES)
    return MIXTURES[name]()
