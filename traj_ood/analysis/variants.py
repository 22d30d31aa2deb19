"""The autoencoders of Table 3 as losses on the same network: (‖x − F(x)‖² + λ R) / m with m pixels, as in Eq. (1).

Division by m keeps the paper's λ and makes losses comparable with mean squared errors. Squared norms of Jacobians are
estimated from one random direction per image (:mod:`traj_ood.training.penalties`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from traj_ood.analysis.models import Build, Loss, mse
from traj_ood.autoencoders import ConvNetwork
from traj_ood.training.penalties import squared_jacobian

Penalty = Callable[[ConvNetwork, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""A penalty: network, images, generator → reconstruction (B, C, H, W), and R as a scalar, the mean over images."""


class SparseNetwork(ConvNetwork):
    """A :class:`ConvNetwork` with an activation, sigmoid or ReLU, on its latents."""

    def __init__(self, channels: int, size: int, width: int, bottleneck: int, activation: type[nn.Module]) -> None:
        super().__init__(channels, size, width, bottleneck)
        self.activation = activation()

    def encode(self, images: Tensor) -> Tensor:
        return self.activation(super().encode(images))


class VariationalNetwork(ConvNetwork):
    """A :class:`ConvNetwork` with a second head for log σ². E is the mean μ(x), so that f is deterministic."""

    def __init__(self, channels: int, size: int, width: int, bottleneck: int) -> None:
        super().__init__(channels, size, width, bottleneck)
        self.to_log_variance = nn.Linear(self.to_latent.in_features, bottleneck)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """μ and log σ², each (B, k)."""
        hidden = self.down(images)
        return self.to_latent(hidden), self.to_log_variance(hidden)


@dataclass(frozen=True)
class Variant:
    """A row of Table 3.

    Attributes:
        regularizer: R with its λ, in words.
        options: plain data that identify loss and network, for the key of the unit of work.
        decay: weight decay.
        narrow: whether it has the narrow bottleneck.
    """

    name: str
    regularizer: str
    loss: Loss = mse
    build: Build = ConvNetwork
    options: Mapping[str, Any] = field(default_factory=dict)
    decay: float = 0.0
    narrow: bool = False


def penalised(penalty: Penalty, weight: float) -> Loss:
    """The loss (‖x − F(x)‖² + λ R) / m, as a mean over images, with λ = ``weight``."""

    def loss(network: ConvNetwork, images: Tensor, draws: torch.Generator) -> Tensor:
        output, regularizer = penalty(network, images, draws)
        return (output - images).square().mean() + weight * regularizer / images[0].numel()

    return loss


def contractive(network: ConvNetwork, images: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """R = ‖J_E(x)‖_F² (Rifai et al. 2011)."""
    inputs = images.detach().requires_grad_(True)
    latents = network.encode(inputs)
    return network.decode(latents), squared_jacobian(latents, inputs, draws)


def r_contractive(network: ConvNetwork, images: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """R = ‖J_F(x)‖_F² of the whole map F = D∘E (Alain and Bengio 2014)."""
    inputs = images.detach().requires_grad_(True)
    output = network.decode(network.encode(inputs))
    return output, squared_jacobian(output, inputs, draws)


def sparse_kl(network: ConvNetwork, images: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """R = Σ_i KL(ρ ‖ ρ̂_i), with ρ = 0.05 and ρ̂_i the mean activation of a sigmoid unit over the batch (Ng 2011)."""
    latents = network.encode(images)
    return network.decode(latents), bernoulli_kl(0.05, latents.mean(dim=0))


def bernoulli_kl(rho: float, rates: Tensor) -> Tensor:
    """Σ_i KL(ρ ‖ ρ̂_i) of Bernoulli variables, ``rates`` (k,) in [0, 1].

    >>> round(float(bernoulli_kl(0.5, torch.tensor([0.5, 0.25]))), 4)  # 0 + log(2) - log(3) / 2
    0.1438
    """
    rates = rates.clamp(1e-6, 1 - 1e-6)  # saturated units have an infinite divergence and no gradient
    return (rho * (rho / rates).log() + (1 - rho) * ((1 - rho) / (1 - rates)).log()).sum()


def sparse_l1(network: ConvNetwork, images: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """R = ‖E(x)‖₁ of ReLU latents (Ng 2011)."""
    latents = network.encode(images)
    return network.decode(latents), latents.abs().sum(dim=1).mean()


def variational(network: ConvNetwork, images: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """R = KL(N(μ, σ²) ‖ N(0, I)), with a sample of the posterior decoded (Kingma and Welling 2013)."""
    assert isinstance(network, VariationalNetwork)
    mean, log_variance = network.posterior(images)
    sample = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=draws).to(mean.device)
    return network.decode(sample), gaussian_kl(mean, log_variance)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Mean over rows of KL(N(μ, σ²) ‖ N(0, I)), from ``mean`` and ``log_variance`` (B, k)."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean() / 2


def denoising(noise: float) -> Loss:
    """The loss ‖x − F(x + ε)‖² / m with ε ~ N(0, noise²) in standardised units (Vincent et al. 2008)."""

    def loss(network: ConvNetwork, images: Tensor, draws: torch.Generator) -> Tensor:
        corrupted = images + noise * torch.randn(images.shape, generator=draws).to(images.device)
        return (network.decode(network.encode(corrupted)) - images).square().mean()

    return loss


def masked(ratio: float, patch: int) -> Loss:
    """The loss ‖x − F(Mx)‖² / m, where M sets a share of square patches to 0, the mean grey.

    Table 3 has the error on M ⊙ (…) only; here it is over all pixels, as in Eq. (2). Otherwise D's output on the other
    pixels would stay untrained, although f uses it.
    """

    def loss(network: ConvNetwork, images: Tensor, draws: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        cells = torch.rand(count, 1, -(-height // patch), -(-width // patch), generator=draws) >= ratio
        kept = cells.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[..., :height, :width]
        return (network.decode(network.encode(images * kept.to(images))) - images).square().mean()

    return loss


def variants(strength: float = 1.0) -> tuple[Variant, ...]:
    """All rows of Table 3, with λ (or noise, or hidden share) chosen to affect the reconstruction without dominating
    it; ``strength`` is a factor of every λ, of the noise and of the weight decay, but not of the hidden share."""
    s = strength
    sigmoid, relu = (partial(SparseNetwork, activation=kind) for kind in (nn.Sigmoid, nn.ReLU))
    return (
        Variant("standard", "none, wide bottleneck"),
        Variant("bottleneck", "none, narrow bottleneck", narrow=True),
        Variant("weight-decay", f"‖W‖², as Adam's decay of {1e-3 * s:g}", decay=1e-3 * s),
        _penalty("contractive", contractive, 1.0 * s, "‖J_E‖_F²"),
        _penalty("r-contractive", r_contractive, 1.0 * s, "‖J_F‖_F²"),
        _penalty("sparse-kl", sparse_kl, 10.0 * s, "Σ KL(0.05 ‖ mean activation), sigmoid", sigmoid),
        _penalty("sparse-l1", sparse_l1, 0.5 * s, "‖E(x)‖₁, ReLU", relu),
        Variant("denoising", f"input noise {0.5 * s:g}", denoising(0.5 * s), options={"noise": 0.5 * s}),
        _penalty("variational", variational, 1.0 * s, "KL to N(0, I)", VariationalNetwork),
        Variant("masked", "half of 4 × 4 patches hidden", masked(0.5, 4), options={"ratio": 0.5, "patch": 4}),
    )


def _penalty(name: str, penalty: Penalty, weight: float, formula: str, build: Build = ConvNetwork) -> Variant:
    return Variant(name, f"{weight:g} {formula}", penalised(penalty, weight), build, {"weight": weight})
