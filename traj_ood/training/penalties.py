"""Penalties on Jacobians, estimated from one random direction v ~ N(0, I) for each row.

E ‖Jᵀv‖² = ‖J‖_F² and E ‖(J − Jᵀ)v‖² = ‖J − Jᵀ‖_F² (Hutchinson): a second backward pass instead of one for each unit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def squared_jacobian(outputs: Tensor, inputs: Tensor, draws: torch.Generator) -> Tensor:
    """Unbiased estimate of the mean over rows of ‖∂ outputs / ∂ inputs‖_F², rows depending on their own row alone.

    Args:
        outputs: (B, …), computed of ``inputs`` (B, …), which require a gradient.
        draws: of the direction.
    """
    v = torch.randn(outputs.shape, generator=draws).to(outputs.device)
    (gradient,) = torch.autograd.grad((outputs * v).sum(), inputs, create_graph=True)
    return gradient.flatten(1).square().sum(dim=1).mean()


def squared_asymmetry(function: Callable[[Tensor], Tensor], points: Tensor, draws: torch.Generator) -> Tensor:
    """Unbiased estimate of the mean over rows of ‖J − Jᵀ‖_F², J the Jacobian of a map of (B, k) into itself.

    J is symmetric where f(z) − z is the gradient of something, as it is of a log density in the ideal denoiser.

    Args:
        function: each of its rows depends on the same row alone. points: (B, k), where J is taken.
        draws: of the direction.
    """
    v = torch.randn(points.shape, generator=draws).to(points)
    start = points.detach().requires_grad_(True)
    (back,) = torch.autograd.grad((function(start) * v).sum(), start, create_graph=True)
    along = torch.func.jvp(function, (points.detach(),), (v,))[1]
    return (along - back).square().sum(dim=1).mean()
