"""Does the latent vector field point along the score? A test of Theorem 1 on Gaussian mixtures, whose score is known.

An autoencoder with two latent units learns to remove Gaussian noise from points in the plane. The density p, its
smoothed form p_σ and the optimal denoiser are known (:mod:`traj_ood.analysis.mixtures`). Two statements are tested
separately:

* in data space, F(x) − x against ∇ log p_σ(x) (Alain and Bengio 2014: exact for the optimal denoiser) and ∇ log p(x);
* in latent space, f(z) − z against ∇ log q(z), with q the density of z = E(x) (Theorem 1), known through the change of
  variables q(E(x)) = p(x) / |det J_E(x)|.

The second follows from the first if E is close to a similarity: f(z) − z ≈ J_E (F(x) − x) transforms as a vector, while
a score transforms by J_E⁻ᵀ and gains a volume term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from traj_ood.analysis.base import Answer, Question, register
from traj_ood.analysis.field import plane
from traj_ood.analysis.measures import finite, median, share
from traj_ood.analysis.mixtures import Mixture, named_mixture
from traj_ood.analysis.singular import explicit_norms, jacobians
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.dynamics.iterate import iterate
from traj_ood.errors import TrajOODError
from traj_ood.training.config import Recipe
from traj_ood.training.loop import Trainer

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

_MAX_TRAJECTORIES = 300  # trajectories iterated to their end
_MARGIN = 1.5  # margin of the box around the samples, in the data's units


@register
@dataclass(frozen=True)
class ScoreField(Question):
    """The angle between the vector field and the score, in data space and in latent space.

    Attributes:
        mixtures: names of :data:`traj_ood.analysis.mixtures.MIXTURES`.
        noise: standard deviations σ of the training noise, in the data's units (components are 0.25 to 0.8 wide).
        width: hidden units per layer.
        steps: training steps.
        samples: number of points at which angles are measured.
        grid: points per side of the map.
    """

    name: ClassVar[str] = "score-field"
    figure: ClassVar[str] = "§3.1, Theorem 1"
    summary: ClassVar[str] = "angle between f(z) − z and the score, where the density is known"
    choices: ClassVar[tuple[str, ...]] = (
        "The paper proves Theorem 1 and measures nothing for it: densities, networks and noise levels are ours.",
        "Latent dimension = data dimension = 2, so that q(z) follows from p(x) by a change of variables.",
        "The theorem's penalty on the Jacobian is the noise of a denoising autoencoder (their Table 3).",
    )
    unstated: ClassVar[tuple[str, ...]] = (
        "mixtures", "noise", "width", "steps", "batch", "rate", "samples", "grid"
    )  # fmt: skip

    at_least: ClassVar = {"width": 1, "steps": 1, "batch": 1, "samples": 10, "grid": 2}
    above_0: ClassVar = ("rate",)

    mixtures: tuple[str, ...] = ("triangle", "ring")
    noise: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    width: int = 64
    steps: int = 8000
    batch: int = 512
    rate: float = 3e-3
    samples: int = 2000
    grid: int = 41

    def __post_init__(self) -> None:
        self.expect(bool(self.mixtures), "mixtures", "at least one name")
        for name in self.mixtures:
            named_mixture(name)
        finite = bool(self.noise) and all(0 < sigma < math.inf for sigma in self.noise)
        self.expect(finite, "noise", "standard deviations above 0")
        super().__post_init__()

    @classmethod
    def paper(cls) -> ScoreField:
        return cls()

    def answer(self, work: Workspace) -> Answer:
        rows, maps = [], {}
        settings = self.settings("width", "steps", "batch", "rate", "samples", "grid", "seed")
        for name, sigma in work.track(list(product(self.mixtures, self.noise)), "score-field", "model"):
            key = {"mixture": name, "noise": sigma, **settings}
            unit = work.unit("score-field", key, partial(self._measure, name, sigma))
            rows.append({"mixture": name, "noise": sigma, **unit.notes})
            maps[name, sigma] = unit.tensors
        pictures = {
            f"score-field-{name}.png": partial(_draw_maps, name, {s: maps[name, s] for s in self.noise})
            for name in self.mixtures
        }
        return Answer({"rows": rows}, sentence_of(rows), pictures)

    def drawn(self, figures: Mapping[str, Any]) -> Mapping[str, Callable[[], Figure]]:
        return {"score-field.png": partial(_draw_angles, figures["rows"])}

    def _measure(self, name: str, sigma: float) -> Unit:
        """Train one model, and compare its fields in data and latent space with the true scores."""
        mixture = named_mixture(name)
        model = train_denoiser(mixture, sigma, self.width, self.steps, self.batch, self.rate, self.seed)
        draws = torch.Generator().manual_seed(self.seed + 1)
        clean = mixture.sample(self.samples, draws)
        noisy = clean + sigma * torch.randn(clean.shape, generator=draws, dtype=torch.float64)
        notes = data_space(model, mixture, sigma, noisy)
        latent, at_codes = latent_space(model, mixture, sigma, clean)
        notes |= latent | distances_to_modes(model, mixture, sigma, clean[:_MAX_TRAJECTORIES])
        points = plane(clean.amin(dim=0) - _MARGIN, clean.amax(dim=0) + _MARGIN, self.grid)
        field, smooth = model(points) - points, mixture.smoothed(sigma)
        found = angles(field, smooth.score(points))
        notes["box_angle"] = median(found)
        tensors = {
            "plane": points,
            "field": field,
            "plane_angle": found,
            "plane_density": smooth.log_density(points),
            **at_codes,
        }
        return Unit(tensors, notes)


class PlaneAutoencoder(nn.Module):
    """E and D are perceptrons dim → width → width → dim with SiLU, smooth so that J_E is differentiable."""

    def __init__(self, dim: int = 2, width: int = 64) -> None:
        super().__init__()

        def perceptron() -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)
            )

        self.encode, self.decode = perceptron(), perceptron()

    def forward(self, points: Tensor) -> Tensor:
        """F = D∘E on points (B, dim)."""
        return self.decode(self.encode(points))

    def self_map(self, latents: Tensor) -> Tensor:
        """f = E∘D on latents (B, dim)."""
        return self.encode(self.decode(latents))


def train_denoiser(
    mixture: Mixture, sigma: float, width: int, steps: int, batch: int, rate: float, seed: int
) -> PlaneAutoencoder:
    """Train a denoising autoencoder: minimise E‖F(x + σε) − x‖² over new samples of ``mixture`` in every step, by Adam
    with a rate that falls to 0 along a cosine. Returns the model in float64.

    Raises:
        TrajOODError: a loss or weights that are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PlaneAutoencoder(mixture.dim, width)
    recipe = Recipe(batch_size=batch, learning_rate=rate, weight_decay=0.0, clip=math.inf, optimizer="adam")
    _Denoising(model, mixture, sigma, recipe, steps, seed).run()
    return model.double()


class _Denoising(Trainer):
    """Trains on new samples of a mixture, in a single round."""

    def __init__(
        self, model: PlaneAutoencoder, mixture: Mixture, sigma: float, recipe: Recipe, steps: int, seed: int
    ) -> None:
        self._mixture, self._sigma = mixture, sigma
        title = f"score-field, noise {sigma:g}"
        super().__init__(title, model, recipe, steps=steps, round_steps=steps, seed=seed)

    def losses(self, steps: int, draws: torch.Generator) -> Iterator[Tensor]:
        for _ in range(steps):
            clean = self._mixture.sample(self.recipe.batch_size, draws).float()
            noisy = clean + self._sigma * torch.randn(clean.shape, generator=draws)
            yield (self.module(noisy) - clean).square().sum(dim=1).mean()

    def rate(self, step: int) -> float:
        """The recursive form of torch's CosineAnnealingLR; the closed form differs in the last digits."""
        last = self.optimizer.param_groups[0]["lr"]
        now, before = (1 + math.cos(math.pi * s / self.steps) for s in (step, step - 1))
        return now / before * last if step else last


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles in degrees between the rows of a and b (B, d), (B,) float64; NaN where a row is 0.

    Computed from the half angle, whose tangent is ‖â − b̂‖ / ‖â + b̂‖, because the arc cosine loses half of the digits
    near 0.
    """
    a, b = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (a, b))
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)))


def data_space(model: Callable[[Tensor], Tensor], mixture: Mixture, sigma: float, points: Tensor) -> dict[str, Any]:
    """Compare F(x) − x at noisy ``points`` (B, d) with the true scores.

    Returns:
        Median angles in degrees: ``angle`` to ∇ log p_σ, ``angle_clean`` to ∇ log p, and ``oracle_clean``, the angle of
        the optimal denoiser to ∇ log p; ``angle_q90``, the 90 % quantile of ``angle``; ``length_ratio``, the median of
        ‖F(x) − x‖ / σ²‖∇ log p_σ‖, which is 1 for the optimal denoiser; and ``oracle_error``, the largest
        ‖f*(x) − x − σ²∇ log p_σ(x)‖ relative to the median length of σ²∇ log p_σ, which is rounding only.
    """
    field, best = model(points) - points, mixture.denoise(points, sigma) - points
    clean, smooth = mixture.score(points), mixture.smoothed(sigma).score(points)
    lengths = sigma**2 * smooth.norm(dim=1)
    found = angles(field, smooth)
    return {
        "angle": median(found),
        "angle_q90": finite(found.nanquantile(0.9)),
        "angle_clean": median(angles(field, clean)),
        "oracle_clean": median(angles(best, clean)),
        "length_ratio": median(field.norm(dim=1) / lengths),
        "oracle_error": finite((best - sigma**2 * smooth).norm(dim=1).max() / lengths.median()),
    }


def latent_space(
    model: PlaneAutoencoder, mixture: Mixture, sigma: float, points: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Compare f(z) − z at z = E(x) with the score of q (Theorem 1), for ``points`` x (B, d) from p.

    Returns:
        ``latent_angle``, the median angle in degrees to ∇ log q; ``latent_ascent``, the share of codes with
        ⟨∇ log q, f(z) − z⟩ > 0 (Lemma A.5); ``latent_carried``, the median angle to J_E ∇ log p_σ, the data-space score
        transformed as a vector; ``contractive``, the share of codes with ‖J_f(z)‖_σ < 1, which the theorem assumes;
        ``one_sheet``, the share of codes at which det J_E has its more frequent sign. If it is below 1, E folds the
        plane, and q has further terms. And the tensors ``codes`` (B, d) and ``code_angle`` (B,), to ∇ log q.
    """
    codes = model.encode(points)
    field = model.self_map(codes) - codes
    truth, matrices = carried_score(model.encode, mixture.score(points), points)
    found = angles(field, truth)
    carried = (matrices @ mixture.smoothed(sigma).score(points)[..., None])[..., 0]
    positive = share(torch.linalg.det(matrices) > 0)
    figures = {
        "latent_angle": median(found),
        "latent_ascent": share((field * truth).sum(dim=1) > 0),
        "latent_carried": median(angles(field, carried)),
        "contractive": share(explicit_norms(jacobians(model.self_map, codes, len(codes))) < 1),
        "one_sheet": max(positive, 1 - positive),
    }
    return figures, {"codes": codes, "code_angle": found}


def carried_score(encode: Callable[[Tensor], Tensor], score: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Transform the score of p to that of q at z = E(x): ∇_z log q = J⁻ᵀ (∇_x log p − ∇_x log|det J|), J = J_E(x).

    ``encode`` is E, (B, d) → (B, d), twice differentiable and locally invertible; ``score`` (B, d) is ∇ log p at
    ``points`` x (B, d). Returns the scores (B, d) and the Jacobians (B, d, d).

    Raises:
        TrajOODError: a Jacobian is not finite or singular, so that q has no density there.
    """

    def log_volume(x: Tensor) -> Tensor:
        return torch.linalg.slogdet(torch.func.jacrev(lambda y: encode(y[None])[0])(x)).logabsdet

    matrices = jacobians(encode, points, len(points))
    bad = ~(matrices.isfinite().all(dim=(1, 2)) & torch.linalg.det(matrices.nan_to_num()).ne(0))
    if bool(bad.any()):
        raise TrajOODError(
            f"score-field: expected a locally invertible encoder, got a Jacobian that is singular or not finite at "
            f"{int(bad.sum())} of {len(points)} points: its training failed; choose a smaller rate"
        )
    volumes = torch.func.vmap(torch.func.grad(log_volume))(points)
    return torch.linalg.solve(matrices.transpose(1, 2), (score - volumes)[..., None])[..., 0], matrices


def distances_to_modes(model: PlaneAutoencoder, mixture: Mixture, sigma: float, points: Tensor) -> dict[str, Any]:
    """Median distances to the nearest mode of p_σ at the start and at the end of trajectories from E(``points``).

    Distances are in data space. By Theorem A.6 every trajectory ends at a mode. Modes are computed as the fixed points
    of the optimal denoiser, which ascends p_σ.
    """
    modes = iterate(lambda z: mixture.denoise(z, sigma), mixture.means, tol=1e-16, max_steps=5000, chunk=8).final
    path = iterate(model.self_map, model.encode(points), tol=1e-12, max_steps=2000, chunk=len(points))
    starts, ends = (torch.cdist(x, modes).amin(dim=1) for x in (points, model.decode(path.final)))
    return {"converged": share(path.converged), "start_to_mode": median(starts), "end_to_mode": median(ends)}


def sentence_of(rows: list[dict[str, Any]]) -> str:
    """A sentence about the angles to the smoothed, the clean and the latent score, over all models."""

    def span(key: str, scale: float = 1.0) -> str:
        known = [row[key] for row in rows if row[key] is not None]
        if not known:
            return "an unknown number of"
        low, high = (scale * extreme(known) for extreme in (min, max))
        return f"{low:.0f}" if math.isclose(low, high, abs_tol=0.5) else f"{low:.0f} to {high:.0f}"

    return (
        f"Over {len(rows)} denoising autoencoders the residual in data space stands {span('angle')}° (medians) from "
        f"the score of the noised density, {span('angle_clean')}° from that of the data (the best possible denoiser: "
        f"{span('oracle_clean')}°); in latent space f(z) − z stands {span('latent_angle')}° from ∇ log q, and "
        f"{span('latent_ascent', 100)} % of the codes ascend q."
    )


def _draw_angles(rows: list[dict[str, Any]]) -> Figure:
    from traj_ood.drawing.charts import Curve, Panel, curves

    lines = {
        "angle": r"data space, to $\nabla\,\log\,p_\sigma$",
        "angle_clean": r"data space, to $\nabla\,\log\,p$",
        "oracle_clean": r"best denoiser, to $\nabla\,\log\,p$",
        "latent_angle": r"latent space, to $\nabla\,\log\,q$",
        "latent_carried": r"latent space, to $J_E \nabla\,\log\,p_\sigma$",
    }
    panels = []
    for name in dict.fromkeys(row["mixture"] for row in rows):
        some = [row for row in rows if row["mixture"] == name]
        noise = [row["noise"] for row in some]
        drawn = [Curve(label, noise, [row[key] for row in some]) for key, label in lines.items()]
        panels.append(Panel(name, "noise σ", "median angle (degrees)", drawn, limits=(0, None)))
    return curves(panels, "Angle between the vector field and the score (90° is chance)")


def _draw_maps(name: str, maps: dict[float, Mapping[str, Tensor]]) -> Figure:
    from traj_ood.analysis.drawings import score_maps

    return score_maps(name, {sigma: {k: v.numpy() for k, v in tensors.items()} for sigma, tensors in maps.items()})
