"""Mixtures against torch's own densities and brute-force integrals; fields whose angle to the score is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from shorthand import raises
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from traj_ood.analysis import Workspace, find_question, options_from
from traj_ood.analysis.field import plane
from traj_ood.analysis.mixtures import MIXTURES, Mixture, named_mixture
from traj_ood.analysis.score_field import (
    ScoreField,
    angles,
    carried_score,
    data_space,
    distances_to_modes,
    latent_space,
    sentence_of,
    train_denoiser,
)
from traj_ood.errors import TrajOODError

TINY = ["mixtures=triangle", "noise=0.5,1", "width=8", "steps=3", "batch=16", "samples=20", "grid=5"]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mixture(dim: int, count: int = 3, seed: int = 0) -> Mixture:
    g = draws(seed)
    roots = torch.randn(count, dim, dim, dtype=torch.float64, generator=g)
    weights = torch.rand(count, dtype=torch.float64, generator=g) + 0.2
    spread = roots @ roots.transpose(1, 2) + 0.1 * torch.eye(dim, dtype=torch.float64)
    return Mixture(weights / weights.sum(), torch.randn(count, dim, dtype=torch.float64, generator=g), spread)


def gaussian(*variances: float) -> Mixture:
    size = len(variances)
    covariance = torch.diag(torch.tensor(variances, dtype=torch.float64))[None]
    return Mixture(torch.ones(1).double(), torch.zeros(1, size).double(), covariance)


# ---------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_density_and_score_are_torchs_own(dim: int) -> None:
    mixture = random_mixture(dim)
    theirs = MixtureSameFamily(
        Categorical(mixture.weights), MultivariateNormal(mixture.means, mixture.covariances)
    ).log_prob
    points = torch.cat([mixture.sample(20, draws()), 30 * torch.ones(1, dim).double()]).requires_grad_()
    torch.testing.assert_close(mixture.log_density(points), theirs(points), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(theirs(points).sum(), points)
    torch.testing.assert_close(mixture.score(points), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("mixture", [*(make() for make in MIXTURES.values()), random_mixture(4)])
def test_the_best_denoiser_follows_the_score_exactly(mixture: Mixture, sigma: float) -> None:
    points = torch.cat([mixture.sample(50, draws()), 10 * mixture.sample(5, draws(1))])
    residual = mixture.denoise(points, sigma) - points
    expected = sigma**2 * mixture.smoothed(sigma).score(points)
    assert float((residual - expected).norm(dim=1).max()) < 1e-13 * float(points.norm(dim=1).max())
    assert float(angles(residual, expected).median()) < 1e-8


def test_the_best_denoiser_is_the_posterior_mean_by_quadrature() -> None:
    """E[x | z] = ∫ x p(x) N(z; x, σ²I) dx / ∫ p(x) N(z; x, σ²I) dx, summed over a fine grid."""
    mixture, sigma = named_mixture("triangle"), 0.6
    grid = plane(torch.full((2,), -7.0), torch.full((2,), 7.0), 281)
    prior = mixture.log_density(grid).exp()
    noisy = mixture.sample(6, draws())
    likelihood = (-torch.cdist(noisy, grid).square() / (2 * sigma**2)).exp()
    weights = likelihood * prior
    expected = weights @ grid / weights.sum(dim=1, keepdim=True)
    torch.testing.assert_close(mixture.denoise(noisy, sigma), expected, rtol=0, atol=1e-6)


def test_smoothing_a_gaussian_shrinks_linearly() -> None:
    points = torch.randn(5, 2, dtype=torch.float64, generator=draws())
    shrink = torch.tensor([4 / (4 + 0.25), 1 / (1 + 0.25)], dtype=torch.float64)
    torch.testing.assert_close(gaussian(4.0, 1.0).denoise(points, 0.5), points * shrink)


def test_samples_have_the_moments_of_the_mixture() -> None:
    mixture = random_mixture(2, seed=3)
    points = mixture.sample(40_000, draws())
    mean = mixture.weights @ mixture.means
    second = torch.einsum("k,kij->ij", mixture.weights, mixture.covariances)
    second += torch.einsum("k,ki,kj->ij", mixture.weights, mixture.means, mixture.means) - mean[:, None] * mean
    torch.testing.assert_close(points.mean(dim=0), mean, rtol=0, atol=0.06)
    torch.testing.assert_close(points.T.cov(), second, rtol=0.06, atol=0.06)


def test_unknown_mixtures_are_refused() -> None:
    with raises("unknown mixture 'rings': did you mean 'ring' or 'triangle'? Known: ring, triangle"):
        named_mixture("rings")


# ---------------------------------------------------------------------------------------------- angles and spaces


def test_angles_are_exact_near_zero_and_at_the_ends() -> None:
    turns = torch.tensor([0.0, 1e-9, 0.5, np.pi / 2, np.pi], dtype=torch.float64)
    a = torch.tensor([[3.0, 0.0]], dtype=torch.float64).expand(5, 2)
    b = 0.1 * torch.stack([turns.cos(), turns.sin()], dim=1)
    torch.testing.assert_close(angles(a, b), torch.rad2deg(turns), rtol=1e-7, atol=1e-13)
    assert angles(torch.zeros(1, 2), b[:1]).isnan().all()


def test_the_score_of_a_change_of_variables() -> None:
    """x ~ N(0, I), z = (exp x₁, x₂ + x₁²): log-normal in z₁, and z₂ given z₁ is N((log z₁)², 1)."""
    points = torch.randn(20, 2, dtype=torch.float64, generator=draws())

    def encode(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0].exp(), x[:, 1] + x[:, 0] ** 2], dim=1)

    z = encode(points).requires_grad_()
    logs = z[:, 0].log()
    log_q = -0.5 * logs**2 - logs - 0.5 * (z[:, 1] - logs**2) ** 2
    (expected,) = torch.autograd.grad(log_q.sum(), z)
    found, jacobians = carried_score(encode, -points, points)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jacobians[:, 0, 0], z[:, 0].detach())


class Linear:
    """E is linear, D undoes it and removes noise perfectly: everything in Theorem 1 can be computed."""

    def __init__(self, mixture: Mixture, sigma: float, matrix: Tensor) -> None:
        self.mixture, self.sigma, self.matrix = mixture, sigma, matrix

    def encode(self, points: Tensor) -> Tensor:
        return points @ self.matrix.T

    def decode(self, latents: Tensor) -> Tensor:
        return self.mixture.denoise(latents @ self.matrix.inverse().T, self.sigma)

    def self_map(self, latents: Tensor) -> Tensor:
        return self.encode(self.decode(latents))


def test_latent_and_data_space_agree_where_the_encoder_is_a_similarity() -> None:
    mixture, sigma = named_mixture("triangle"), 0.4
    model = Linear(mixture, sigma, 3 * torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64))
    points = mixture.sample(60, draws())
    data = data_space(lambda x: mixture.denoise(x, sigma), mixture, sigma, points)
    assert data["angle"] < 1e-8
    assert data["length_ratio"] == pytest.approx(1, abs=1e-9)
    assert data["oracle_error"] < 1e-12
    assert data["oracle_clean"] == pytest.approx(data["angle_clean"])
    latent, _ = latent_space(model, mixture, sigma, points)
    assert latent["latent_angle"] == pytest.approx(data["oracle_clean"], abs=1e-6)
    assert latent["latent_carried"] < 1e-6
    assert latent["one_sheet"] == 1


def test_an_encoder_that_is_no_similarity_turns_the_latent_field_away_from_the_score() -> None:
    mixture, sigma = gaussian(1.0, 1.0), 0.1
    model = Linear(mixture, sigma, torch.tensor([[5.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    points = mixture.sample(200, draws())
    latent, at_codes = latent_space(model, mixture, sigma, points)
    # f(z) − z ∝ −z, the score is −C⁻¹z with C = diag(25, 1).
    expected = angles(at_codes["codes"], at_codes["codes"] / torch.tensor([25.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(at_codes["code_angle"], expected, rtol=1e-6, atol=1e-6)
    assert latent["latent_ascent"] == 1
    assert latent["contractive"] == 1


def test_the_best_denoiser_leads_to_the_modes() -> None:
    mixture, sigma = named_mixture("ring"), 0.2
    model = Linear(mixture, sigma, torch.eye(2, dtype=torch.float64))
    found = distances_to_modes(model, mixture, sigma, mixture.sample(20, draws()))
    assert found["converged"] == 1
    assert found["end_to_mode"] < 1e-3 < found["start_to_mode"]


def test_training_learns_the_score_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    mixture = gaussian(1.0, 0.25)
    points = mixture.smoothed(0.5).sample(100, draws())
    model = train_denoiser(mixture, 0.5, width=16, steps=250, batch=64, rate=1e-2, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert data_space(model, mixture, 0.5, points)["angle"] < 20
    raw = train_denoiser(mixture, 0.5, width=16, steps=1, batch=64, rate=1e-9, seed=0)
    assert data_space(raw, mixture, 0.5, points)["length_ratio"] > 1.5


# ---------------------------------------------------------------------------------------------- the question


def test_the_question_is_answered_drawn_and_resumed(tmp_path: Path) -> None:
    question = options_from(find_question("score-field"), TINY)
    finding = question.run(Workspace(tmp_path / "work"), tmp_path / "out")
    assert [(row["mixture"], row["noise"]) for row in finding.figures["rows"]] == [("triangle", 0.5), ("triangle", 1.0)]
    assert finding.pictures == ("score-field.png", "score-field-triangle.png")
    for file in finding.pictures:
        assert (tmp_path / "out" / file).read_bytes().startswith(b"\x89PNG")
    assert "2 denoising autoencoders" in finding.sentence
    work = Workspace(tmp_path / "work")
    again = question.run(work, tmp_path / "again")
    assert again.figures == finding.figures
    assert work.resumed > 0


def test_a_training_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    for rate in ("1e9", "1e30"):
        question = options_from(find_question("score-field"), [*TINY, f"rate={rate}", "steps=40"])
        with pytest.raises(TrajOODError, match=r"score-field.*(lower the learning rate|choose a smaller rate)"):
            question.run(Workspace(tmp_path / "work"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_without_an_inverse_has_no_score() -> None:
    points = torch.randn(4, 2, dtype=torch.float64, generator=draws())
    for encode in (lambda x: 0 * x, lambda x: x * torch.inf):
        with raises("a Jacobian that is singular or not finite at 4 of 4 points"):
            carried_score(encode, points, points)


def test_what_has_no_median_is_none_and_told() -> None:
    mixture = gaussian(1.0, 1.0)
    found = data_space(lambda x: x, mixture, 0.5, mixture.sample(10, draws()))  # F = id: no direction
    assert (found["angle"], found["angle_q90"], found["length_ratio"]) == (None, None, 0)
    latent = {"latent_angle": None, "latent_ascent": 0.0}
    assert "an unknown number of°" in sentence_of([{**found, **latent}])


def test_differences_claim_nothing_of_the_paper() -> None:
    told = ScoreField(steps=40_000).differences()
    assert told == ("steps: 40000 here, 8000 with --paper (the paper does not state it)",)
    assert {"seed", *ScoreField.unstated} == set(ScoreField().options())


def test_options_are_checked() -> None:
    with raises("score-field: noise: expected standard deviations above 0, got inf"):
        ScoreField(noise=(float("inf"),))
    with raises("score-field: noise: expected standard deviations above 0, got 0.1, 0.0"):
        ScoreField(noise=(0.1, 0.0))
    with raises("score-field: samples: expected at least 10, got 3"):
        ScoreField(samples=3)
    with raises("unknown mixture 'square'"):
        ScoreField(mixtures=("square",))
