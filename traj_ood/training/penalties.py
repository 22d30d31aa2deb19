"""Penalties on Jacobians, estimated without bias from one random direction v ~ N(0, I) per row.

E ‖Jᵀv‖² = ‖J‖_F² and E ‖(J − Jᵀ)v‖² = ‖J − Jᵀ‖_F² (Hutchinson), which takes one further backward pass instead of one
per unit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def squared_jacobian(outputs: Tensor, inputs: Tensor, draws: torch.Generator) -> Tensor:
    """Unbiased estimate of the mean over rows of ‖∂ outputs / ∂ inputs‖_F², for ``outputs`` (B, …) of a row-wise
    function of ``inputs`` (B, …), which require a gradient."""
    v = torch.randn(outputs.shape, generator=draws).to(outputs.device)
    (gradient,) = torch.autograd.grad((outputs * v).sum(), inputs, create_graph=True)
    return gradient.flatten(1).square().sum(dim=1).mean()


def squared_asymmetry(function: Callable[[Tensor], Tensor], points: Tensor, draws: torch.Generator) -> Tensor:
    """Unbiased estimate of the mean over rows of ‖J − Jᵀ‖_F², with J the Jacobian of a row-wise map (B, k) → (B, k).

    J is symmetric if f(z) − z is a gradient, as for the optimal denoiser, where it is that of a log density.
    """
    v = torch.randn(points.shape, generator=draws).to(points)
    start = points.detach().requires_grad_(True)
    (back,) = torch.autograd.grad((function(start) * v).sum(), start, create_graph=True)
    along = torch.func.jvp(function, (points.detach(),), (v,))[1]
    return (along - back).square().sum(dim=1).mean()
