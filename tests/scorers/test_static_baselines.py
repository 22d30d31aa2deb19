"""Static scorers against scikit-learn, pytorch-ood and their definitions in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers import Evidence, Scorer, create_scorer
from traj_ood.scorers.feature_norm import FeatureNorm
from traj_ood.scorers.gaussians import distances_to_gaussians, learn_gaussians
from traj_ood.scorers.gmm import GMM
from traj_ood.scorers.isolation_forest import IsolationForest
from traj_ood.scorers.knn_auto import KNNAuto
from traj_ood.scorers.lid import LID
from traj_ood.scorers.pca import KernelPCA, PCAResidual
from traj_ood.scorers.principal import principal_axes

SPECS = [
    "pca-residual",
    "pca-residual:share=0.5:normalize=true",
    "kernel-pca:components=64",
    "gmm",
    "isolation-forest:trees=12",
    "lid:k=5",
    "feature-norm",
    "feature-norm:two_sided=true",
    "knn-auto",
]


def draw(count: int, dimension: int = 12, seed: int = 0) -> Tensor:
    """Features far from the origin, of decaying spectrum."""
    spectrum = torch.arange(1, dimension + 1) ** -1.0
    return 3 + torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) * spectrum


def evidence(features: Tensor) -> Evidence:
    return Evidence(features={"mean": features})


def scores(scorer: Scorer, train: Tensor, queries: Tensor) -> np.ndarray:
    return scorer.fit(evidence(train)).score(evidence(queries)).numpy()


# ---------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("count", "dimension"), [(150, 12), (30, 40), (40, 1)])
def test_save_load_and_batch_invariance(spec: str, count: int, dimension: int, tmp_path: Path) -> None:
    if dimension == 1 and spec.startswith(("gmm", "kernel", "knn", "pca-residual:")):
        return  # a single number has one direction
    scorer = create_scorer(spec).fit(evidence(draw(count, dimension)))
    queries = draw(140, dimension, seed=1)
    together = scorer.score(evidence(queries))
    assert together.dtype == torch.float64
    assert together.shape == (140,)
    assert together.isfinite().all()
    alone = torch.cat([scorer.score(evidence(q)) for q in (queries[:1], queries[1:77], queries[77:])])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=0)
    scorer.save(tmp_path / "s.safetensors")
    loaded = create_scorer(spec).load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.score(evidence(queries)), together)
    again = create_scorer(spec).fit(evidence(draw(count, dimension)))
    torch.testing.assert_close(again.score(evidence(queries)), together, rtol=1e-9, atol=0)


@pytest.mark.parametrize("spec", [s for s in SPECS if s != "feature-norm"])
def test_far_features_score_higher(spec: str) -> None:
    scorer = create_scorer(spec).fit(evidence(draw(150)))
    away = draw(50, seed=1) * torch.linspace(-4, 4, 12)
    assert scorer.score(evidence(draw(50, seed=2))).median() < scorer.score(evidence(away)).median()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("pca-residual:share=1", "scorer pca-residual: share must be above 0 and below 1, got 1.0"),
        ("gmm:share=0", "scorer gmm: share must be above 0 and below 1, got 0.0"),
        ("kernel-pca:gamma=0", "scorer kernel-pca: gamma must be above 0, got 0.0"),
        ("kernel-pca:components=0", "scorer kernel-pca: components must be at least 1, got 0"),
        ("isolation-forest:trees=0", "scorer isolation-forest: trees must be at least 1, got 0"),
        ("lid:k=1", "scorer lid: k must be at least 2, got 1"),
    ],
)
def test_options_that_cannot_be(spec: str, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        create_scorer(spec)


@pytest.mark.parametrize("spec", ["pca-residual", "gmm", "kernel-pca"])
def test_features_that_do_not_differ(spec: str) -> None:
    with pytest.raises(TrajOODError, match=f"scorer {spec}: expected training features "):
        create_scorer(spec).fit(evidence(torch.ones(20, 5)))


# ---------------------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("dimension", [12, 300])
def test_principal_axes_are_scikit_learns(dimension: int) -> None:
    from sklearn.decomposition import PCA

    train = draw(100, dimension)
    theirs = PCA(0.9, svd_solver="full").fit(train.double().numpy())
    ours = principal_axes("test", train, 0.9)
    assert ours.axes.shape[1] == theirs.n_components_
    np.testing.assert_allclose(abs(ours.axes.T.numpy() @ theirs.components_.T), np.eye(theirs.n_components_), atol=1e-8)
    np.testing.assert_allclose(ours.variances.numpy() * 100 / 99, theirs.explained_variance_, rtol=1e-9)


@pytest.mark.parametrize("dimension", [12, 300])
def test_pca_residual_is_scikit_learns_reconstruction_error(dimension: int) -> None:
    from sklearn.decomposition import PCA

    train, queries = draw(100, dimension), draw(20, dimension, seed=1)
    pca = PCA(0.9, svd_solver="full").fit(train.double().numpy())
    x = queries.double().numpy()
    expected = np.linalg.norm(x - pca.inverse_transform(pca.transform(x)), axis=1)
    np.testing.assert_allclose(scores(PCAResidual(), train, queries), expected, rtol=1e-9)


def test_one_direction_is_always_left_over() -> None:
    train = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.9])
    assert (scores(PCAResidual(share=0.99), train, 5 * train) > 0).all()


def test_kernel_pca_is_pca_of_scikit_learns_fourier_features() -> None:
    from sklearn.decomposition import PCA
    from sklearn.kernel_approximation import RBFSampler
    from sklearn.preprocessing import normalize

    train, queries = (normalize(draw(n, seed=s).double().numpy()) for n, s in ((90, 0), (20, 1)))
    sampler = RBFSampler(gamma=2.0, n_components=128, random_state=3).fit(train)
    pca = PCA(0.8, svd_solver="full").fit(sampler.transform(train))
    mapped = sampler.transform(queries)
    expected = np.linalg.norm(mapped - pca.inverse_transform(pca.transform(mapped)), axis=1)
    ours = scores(KernelPCA(gamma=2.0, components=128, seed=3), draw(90), draw(20, seed=1))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)  # we normalise in float32


def test_kernel_pca_approaches_the_exact_kernel() -> None:
    from sklearn.decomposition import KernelPCA as Exact
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.preprocessing import normalize

    train, queries = (normalize(draw(n, seed=s).double().numpy()) for n, s in ((60, 0), (40, 1)))
    gamma = 1 / np.median(((train[:, None] - train[None]) ** 2).sum(axis=2)[np.triu_indices(60, 1)])
    scorer = KernelPCA(components=20000).fit(evidence(draw(60)))
    kept = scorer.state["axes"].shape[1]
    exact = Exact(kept, kernel="rbf", gamma=gamma).fit(train)
    kernel, across = rbf_kernel(train, gamma=gamma), rbf_kernel(queries, train, gamma=gamma)
    centred = 1 - 2 * across.mean(axis=1) + kernel.mean()  # ‖φ(z) − μ‖²
    expected = np.sqrt(centred - (exact.transform(queries) ** 2).sum(axis=1))
    ours = scorer.score(evidence(draw(40, seed=1))).numpy()
    assert np.corrcoef(ours, expected)[0, 1] > 0.99


def test_one_component_is_the_mahalanobis_distance() -> None:
    train, queries = draw(4000), draw(20, seed=1)
    scorer = GMM().fit(evidence(train))
    assert len(scorer.state["weights"]) == 1, "a Gaussian needs one component"
    ours = scorer.score(evidence(queries))
    squared = create_scorer("mahalanobis").fit(evidence(train)).score(evidence(queries)).square() / 2
    # Up to the normalisation, and the shrinkage of the variances inside the axes.
    torch.testing.assert_close(ours - ours.mean(), squared - squared.mean(), rtol=0, atol=0.02)


def test_mixture_is_scikit_learns_and_finds_clusters() -> None:
    from sklearn.covariance import LedoitWolf
    from sklearn.mixture import GaussianMixture

    centres = torch.tensor([[8.0, 0.0, 0.0], [0.0, 8.0, 0.0]])
    train = torch.cat([c + draw(60, 3, seed=i) for i, c in enumerate(centres)])
    scorer = GMM(share=0.95).fit(evidence(train))
    assert len(scorer.state["weights"]) == 2
    axes = scorer.state["axes"].numpy()
    x, queries = (t.double().numpy() - train.double().mean(dim=0).numpy() for t in (train, train + 0.1))
    inside = x @ axes
    theirs = GaussianMixture(2, reg_covar=1e-6 * inside.var(axis=0).mean(), random_state=0).fit(inside)
    rest = np.linalg.svd(axes)[0][:, axes.shape[1] :]
    precision = np.linalg.inv(rest.T @ LedoitWolf().fit(x).covariance_ @ rest)
    outside = np.einsum("bi,ij,bj->b", queries @ rest, precision, queries @ rest)
    expected = -theirs.score_samples(queries @ axes) + outside / 2
    np.testing.assert_allclose(scorer.score(evidence(train + 0.1)).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 100, 400])
def test_isolation_forest_is_scikit_learns(count: int) -> None:
    from sklearn.ensemble import IsolationForest as Forest

    train, queries = draw(count), 2 * draw(50, seed=1)
    theirs = -Forest(n_estimators=20, random_state=5).fit(train.numpy()).score_samples(queries.numpy())
    np.testing.assert_allclose(scores(IsolationForest(trees=20, seed=5), train, queries), theirs, rtol=1e-12)


def test_isolation_forest_makes_no_number_of_nan() -> None:
    queries = draw(3)
    queries[1, 4] = torch.nan
    assert np.isnan(scores(IsolationForest(trees=3), draw(20), queries)).tolist() == [False, True, False]


def test_lid_by_definition() -> None:
    train, queries = draw(60), draw(10, seed=1)
    radii = np.sort(np.linalg.norm(queries.double().numpy()[:, None] - train.double().numpy(), axis=2), axis=1)[:, :7]
    expected = 1 / (np.log(radii[:, 6:] / radii[:, :6]).sum(axis=1) / 6)
    np.testing.assert_allclose(scores(LID(k=7), train, queries), expected, rtol=1e-4)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_lid_finds_the_dimension_of_a_ball(dimension: int) -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.nn.functional.pad(torch.rand(4000, dimension, generator=generator), (0, 6 - dimension))
    found = scores(LID(k=100), train, train[:50] * 0.2 + 0.4 * (train[:50] != 0)).mean()
    assert found == pytest.approx(dimension, rel=0.15)


def test_lid_where_neighbours_coincide() -> None:
    train = torch.cat([torch.zeros(5, 3), torch.ones(5, 3)])
    assert scores(LID(k=5), train, torch.zeros(1, 3)) == [0.0]
    assert np.isfinite(scores(LID(k=5), train, torch.tensor([[0.1, 0.0, 0.0]]))).all()
    with pytest.raises(TrajOODError, match="scorer lid:k=11: k = 11 neighbours, but only 10 training images: use more"):
        LID(k=11).fit(evidence(train))
    assert LID().fit(evidence(train)).score(evidence(train)).isfinite().all()


def test_feature_norm() -> None:
    train, queries = draw(20), draw(5, seed=1) * torch.tensor([[0.1], [0.5], [1.0], [2.0], [9.0]])
    logs = queries.double().norm(dim=1).log()
    np.testing.assert_allclose(scores(FeatureNorm(), train, queries), -logs, rtol=1e-12)
    centre = train.double().norm(dim=1).log().mean()
    np.testing.assert_allclose(scores(FeatureNorm(two_sided=True), train, queries), (logs - centre).abs(), rtol=1e-12)
    assert np.isfinite(scores(FeatureNorm(), train, torch.zeros(1, 12))).all()


def test_knn_auto_is_knn_with_the_k_it_chose() -> None:
    train, queries = draw(60), draw(10, seed=1)
    auto = KNNAuto().fit(evidence(train))
    k = int(auto.state["k"])
    assert k in (1, 5, 10, 20, 50)
    knn = create_scorer(f"knn:k={k}").fit(evidence(train))
    torch.testing.assert_close(auto.score(evidence(queries)), knn.score(evidence(queries)), rtol=1e-9, atol=0)


def test_knn_auto_takes_few_neighbours_where_the_density_is_fine_grained() -> None:
    # 150 pairs of close images: only the first neighbour knows that ID images come in pairs.
    pairs = torch.randn(150, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=0)
    train = pairs + 0.01 * torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    assert int(KNNAuto().fit(evidence(train)).state["k"]) == 1


def test_knn_auto_on_as_few_images_as_can_be() -> None:
    assert int(KNNAuto().fit(evidence(draw(2))).state["k"]) == 1


def test_gaussians_are_scikit_learns_cell_by_cell() -> None:
    from sklearn.covariance import LedoitWolf

    train, queries = (draw(n * 3, 6, seed=s).reshape(n, 3, 6) for n, s in ((50, 0), (200, 1)))
    ours = distances_to_gaussians(learn_gaussians(train), queries)
    for cell in range(3):
        fit = LedoitWolf().fit(train[:, cell].double().numpy())
        expected = np.sqrt(fit.mahalanobis(queries[:, cell].double().numpy()))
        np.testing.assert_allclose(ours[:, cell].numpy(), expected, rtol=1e-9)
    flat = learn_gaussians(train[:, 0])
    one, other = (distances_to_gaussians(flat, q) for q in (queries[:, 0], queries[:, :1]))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


def test_a_constant_cell_does_not_count() -> None:
    train = draw(60, 6).reshape(20, 3, 6)
    train[:, 1] = 2.0
    distances = distances_to_gaussians(learn_gaussians(train), train + 1)
    assert (distances[:, 1] == 0).all()
    assert (distances[:, [0, 2]] > 0).all()


def test_mahalanobis_plus_plus_is_scikit_learns_on_normalised_features() -> None:
    from sklearn.covariance import LedoitWolf
    from sklearn.preprocessing import normalize

    train, queries = draw(90), draw(20, seed=1)
    fit = LedoitWolf().fit(normalize(train.double().numpy()))
    expected = np.sqrt(fit.mahalanobis(normalize(queries.double().numpy())))
    ours = scores(create_scorer("mahalanobis:normalize=true"), train, queries)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)  # we normalise in float32


def test_mahalanobis_of_cells_is_their_mean() -> None:
    train, queries = (draw(n * 3, 6, seed=s).reshape(n, 3, 6) for n, s in ((50, 0), (20, 1)))
    scorer = create_scorer("mahalanobis:view=grid")
    grid = scorer.fit(Evidence(features={"grid": train})).score(Evidence(features={"grid": queries}))
    cells = [scores(create_scorer("mahalanobis"), train[:, c], queries[:, c]) for c in range(3)]
    np.testing.assert_allclose(grid.numpy(), np.mean(cells, axis=0), rtol=1e-9)
    with pytest.raises(
        TrajOODError, match="scorer mahalanobis: view=grid does not support classes=true: use view=mean"
    ):
        create_scorer("mahalanobis:view=grid:classes=true")
