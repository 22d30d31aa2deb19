"""MSMA, DiffPath and SCOPED for f: statistics by hand, densities by scikit-learn, the divergence of known maps."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from traj_ood.data.preprocessing import Normalised
from traj_ood.dynamics.jacobian import divergence_at
from traj_ood.errors import TrajOODError
from traj_ood.scorers import DiffPath, create_scorer
from traj_ood.scorers.mixture import learn_mixture, mixture_energies
from traj_ood.scorers.msma import MSMA
from traj_ood.scorers.scorer_set import ScorerSet


def field(count: int, seed: int) -> Tensor:
    return torch.randn(count, 5, 7, generator=torch.Generator().manual_seed(seed)).double()


def test_statistics_by_hand() -> None:
    v = field(4, 0)
    x = v.numpy()
    np.testing.assert_allclose(MSMA(steps=5).statistics(v).numpy(), np.sqrt((x**2).sum(axis=2)))
    change = 5 * np.diff(x, axis=1)
    expected = [(part**p).sum(axis=(1, 2)) for part in (x, change) for p in (1, 2, 3)]
    np.testing.assert_allclose(DiffPath(steps=5).statistics(v).numpy(), np.stack(expected, axis=1))


def test_the_path_of_the_toy_is_what_they_read() -> None:
    train, test = 0.3 + tiny.images(60, (1, 2, 2), 1), tiny.images(20, (1, 2, 2), 2)
    scorers = ScorerSet(tiny.toy(), ["msma:steps=4"], tol=0.0).fit(Normalised(train))

    def lengths(z: np.ndarray) -> np.ndarray:
        found = []
        for _ in range(4):
            bounded = z.clip(-1.5, 1.5)
            new = bounded + 0.3 * (bounded - bounded**3)
            found.append(np.linalg.norm(new - z, axis=1))
            z = new
        return np.stack(found, axis=1)

    x, z = (lengths(t.flatten(1).double().numpy()) for t in (train, test))
    mean, std = x.mean(axis=0), x.std(axis=0).clip(0.01 * x.std(axis=0).max())
    state = learn_mixture(torch.from_numpy((x - mean) / std), 0, 1e-6)
    expected = mixture_energies(state, torch.from_numpy((z - mean) / std))
    (found,) = scorers.score(Normalised(test)).scores.values()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_mixture_is_scikit_learns_of_the_lowest_bic() -> None:
    from sklearn.mixture import GaussianMixture

    draws = np.random.default_rng(0)
    values = np.concatenate([draws.normal(0, 1, (150, 3)), draws.normal(8, 1, (150, 3))])
    state = learn_mixture(torch.from_numpy(values), 0, 1e-6)
    assert state["weights"].shape == (2,)
    theirs = GaussianMixture(2, reg_covar=1e-6, random_state=0).fit(values)
    new = draws.normal(4, 4, (20, 3))
    np.testing.assert_allclose(
        mixture_energies(state, torch.from_numpy(new)).numpy(), -theirs.score_samples(new), rtol=1e-6
    )


# ---------------------------------------------------------------------------------------------- the divergence


def test_the_divergence_of_a_linear_map_is_its_quadratic_form_at_the_probe() -> None:
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    points = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)).double()
    probe = 2.0 * torch.randint(0, 2, (6,), generator=torch.Generator().manual_seed(0)).double() - 1
    found = divergence_at(lambda z: z @ matrix.T, points, chunk=6)
    torch.testing.assert_close(found, (probe @ matrix @ probe - 6).expand(9), rtol=1e-9, atol=1e-9)


def test_the_mean_over_probes_is_the_trace() -> None:
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).double()
    point = torch.ones(1, 4).double()
    found = torch.cat([divergence_at(lambda z: z @ matrix.T, point, chunk=1, seed=s) for s in range(400)])
    assert float(found.mean()) == pytest.approx(float(matrix.trace()) - 4, abs=0.35)


def test_a_diagonal_jacobian_needs_one_probe() -> None:
    """Of ``tiny.toy``: ∂f/∂z = 1.3 − 0.9 z² within the clamp."""
    model, start = tiny.toy(), torch.tensor([[0.2, -0.4, 0.8, 1.1], [0.5, 0.5, 0.5, 0.5]])
    found = divergence_at(model.self_map, start, chunk=6)
    expected = (0.3 - 0.9 * start.double().square()).sum(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_scoped_is_a_kernel_density_of_the_ratio() -> None:
    from sklearn.neighbors import KernelDensity

    train, test = 0.5 + 0.2 * tiny.images(50, (1, 2, 2), 1), 0.2 * tiny.images(10, (1, 2, 2), 2)
    scorers = ScorerSet(tiny.toy(), ["scoped"]).fit(Normalised(train))

    def ratios(images: Tensor) -> np.ndarray:
        z = images.flatten(1).double().numpy()
        moved = 0.3 * (z - z**3)
        return np.log((moved**2).sum(axis=1) / abs((0.3 - 0.9 * z**2).sum(axis=1)))

    x, z = ratios(train), ratios(test)
    kernel = KernelDensity(bandwidth=x.std() * len(x) ** -0.2).fit(x[:, None])
    (found,) = scorers.score(Normalised(test)).scores.values()
    np.testing.assert_allclose(found.numpy(), -kernel.score_samples(z[:, None]), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["msma", "diffpath"])
def test_one_step_has_no_change(name: str) -> None:
    with pytest.raises(TrajOODError, match=f"scorer {name}: steps must be at least 2, got 1"):
        create_scorer(f"{name}:steps=1")
