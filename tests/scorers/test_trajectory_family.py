"""Trajectory scorers against loops over single points, and through a whole pass over a tiny ViT-MAE."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from traj_ood.data.preprocessing import Normalised
from traj_ood.dynamics.trajectory import Trajectory
from traj_ood.errors import TrajOODError
from traj_ood.scorers import Evidence, create_scorer
from traj_ood.scorers.alignment import Alignment
from traj_ood.scorers.contraction_rate import ContractionRate
from traj_ood.scorers.early_path import EarlyPath
from traj_ood.scorers.early_trajectory import EarlyTrajectory
from traj_ood.scorers.path import log_distances, log_lengths, pad_with_last
from traj_ood.scorers.path_energy import PathEnergy
from traj_ood.scorers.scorer_set import ScorerSet
from traj_ood.scorers.signature import Signature

SPECS = [
    "early-path",
    "early-path:steps=1+4",
    "early-path:view=mean",
    "early-path:view=cls:steps=2",
    "early-path:shuffled=true",
    "early-trajectory",
    "early-trajectory:whiten=true",
    "early-trajectory:reference=features",
    "early-trajectory:reference=centroids",
    "early-trajectory:reference=features:steps=0",
    "signature",
    "signature:view=mean:horizon=3",
    "contraction-rate",
    "contraction-rate:two_sided=true",
    "contraction-rate:horizon=none",
    "path-energy",
    "path-energy:horizon=4:two_sided=true",
    "alignment",
    "alignment:target=mean",
]
GRIDLESS = [s for s in SPECS if "cls" not in s]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def path(lengths: list[list[float]], norm: float = 10.0, distances: list[list[float]] | None = None) -> Trajectory:
    """Trajectories of given step lengths; NaN past their ends."""
    count, width = len(lengths), max(map(len, lengths))
    residuals = torch.full((count, width), torch.nan, dtype=torch.float64)
    measured = torch.full((count, width + 1), torch.nan, dtype=torch.float64)
    norms = measured.clone()
    for b, own in enumerate(lengths):
        residuals[b, : len(own)] = torch.tensor(own).double().square()
        norms[b, : len(own) + 1] = norm
        measured[b, : len(own) + 1] = torch.tensor(distances[b] if distances else [1.0] * (len(own) + 1)).double()
    steps = torch.tensor([len(own) for own in lengths])
    measures = {"norm": norms, "distance/tokens": measured}
    return Trajectory(steps, torch.zeros(count), residuals, torch.zeros(count, 2), measures)


# ---------------------------------------------------------------------------------------------- one whole pass


@pytest.mark.parametrize("make", [tiny.vit, tiny.conv])
def test_together_and_alone_whole_and_in_parts(make: type, tmp_path: Path) -> None:
    model = make()
    specs = SPECS if model.has_cls else GRIDLESS
    scorers = ScorerSet(model, [*specs, "trajectory"], max_steps=30).fit(Normalised(tiny.images(14, seed=1)))
    probes = 1.5 * tiny.images(9, seed=2)
    whole = scorers.score(Normalised(probes))
    parts = [scorers.score(Normalised(p)).scores for p in (probes[:1], probes[1:5], probes[5:])]
    steps = whole.evidence.path().steps
    for scorer, spec in zip(scorers.scorers, specs, strict=False):
        values = whole.scores[scorer.label]
        assert scorer.label == spec
        assert values.shape == (9,)
        assert values.dtype == torch.float64
        assert values.isfinite().all(), spec
        torch.testing.assert_close(torch.cat([p[spec] for p in parts]), values, rtol=1e-5, atol=1e-7, msg=spec)
        cost, read = scorer.f_evaluations(whole.evidence), scorer.needs().steps
        assert cost == pytest.approx(float(steps.clamp(max=read).double().mean())), spec
        scorer.save(tmp_path / "s.safetensors")
        loaded = create_scorer(spec).load(tmp_path / "s.safetensors")
        assert torch.equal(loaded.score(whole.evidence), values), spec
    for spec in specs:
        alone = (
            ScorerSet(model, [spec], max_steps=30).fit(Normalised(tiny.images(14, seed=1))).score(Normalised(probes))
        )
        torch.testing.assert_close(alone.scores[spec], whole.scores[spec], rtol=1e-5, atol=1e-7, msg=spec)


SIGNED = [s for s in GRIDLESS if not s.startswith(("alignment", "contraction-rate"))]


@pytest.mark.parametrize("spec", SIGNED)
def test_images_in_another_basin_score_higher(spec: str) -> None:
    def around(centre: float, seed: int) -> Tensor:
        return centre + 0.05 * tiny.images(10, (1, 2, 2), seed)

    scorers = ScorerSet(tiny.toy(), [spec]).fit(Normalised(torch.cat([around(1.0, 1), around(1.0, 4)])))
    (near,), (far,) = (scorers.score(Normalised(around(c, s))).scores.values() for c, s in ((1.0, 2), (-9.0, 3)))
    assert near.max() < far.min()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("early-path:steps=0", "steps must be increasing whole numbers >= 1 joined by .*, such as 1.4, got '0'"),
        ("early-path:steps=4+1", "scorer early-path: steps must be increasing .* got '4.1'"),
        ("early-path:steps=1+one", "scorer early-path: steps must be increasing .* got '1.one'"),
        ("early-trajectory:steps=", "scorer early-trajectory: steps must be increasing whole numbers >= 0 .* got ''"),
        ("early-path:view=tokens", "view of scorer early-path"),
        ("early-trajectory:reference=feature", "reference of scorer early-trajectory.*features"),
        ("alignment:target=men", "target of scorer alignment.*mean"),
        ("signature:horizon=0", "scorer signature: horizon must be at least 1, got 0"),
        ("contraction-rate:horizon=1", "scorer contraction-rate: horizon must be at least 2, got 1"),
    ],
)
def test_options_that_cannot_be(spec: str, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        create_scorer(spec)


# ---------------------------------------------------------------------------------------------- curves


def test_a_sample_that_settles_keeps_its_last_value() -> None:
    nan = math.nan
    table = torch.tensor([[1, 2, 3, 4], [5, 6, nan, nan], [nan] * 4])
    expected = torch.tensor([[1, 2, 3, 4, 4, 4], [5, 6, 6, 6, 6, 6], [nan] * 6])
    torch.testing.assert_close(pad_with_last(table, 6), expected, equal_nan=True)
    torch.testing.assert_close(pad_with_last(table, 2), expected[:, :2], equal_nan=True)


def test_steps_and_distances_below_rounding_count_as_rounding() -> None:
    one = path([[1.0, 0.0]], norm=2.0**10, distances=[[2.0, 1.0, 0.0]])
    torch.testing.assert_close(log_lengths(one).exp(), torch.tensor([[1.0, 2.0**-14]]).double())
    torch.testing.assert_close(log_distances(one, "tokens").exp(), torch.tensor([[2.0, 1.0, 2.0**-14]]).double())
    zero = path([[0.0]], norm=0.0)
    assert log_lengths(zero).isfinite().all()


def test_signature_is_scikit_learns_gaussian_of_the_curves() -> None:
    from sklearn.covariance import LedoitWolf

    def evidence(count: int, seed: int) -> Evidence:
        lengths, distances = draw(count, 5, seed=seed).exp(), draw(count, 6, seed=seed + 9).exp()
        return Evidence(trajectory=path(lengths.tolist(), distances=distances.tolist()))

    train, test = evidence(40, 0), evidence(8, 1)
    curves = [
        np.concatenate(
            [
                np.log(e.path().residuals[:, :3].sqrt().numpy()),
                np.log(e.path().measure("distance/tokens")[:, :3].numpy()),
            ],
            axis=1,
        )
        for e in (train, test)
    ]
    expected = np.sqrt(LedoitWolf().fit(curves[0]).mahalanobis(curves[1]))
    np.testing.assert_allclose(Signature(horizon=3).fit(train).score(test).numpy(), expected, rtol=1e-9)


def test_signature_is_two_sided() -> None:
    usual = [[2.0 ** (-t + 0.1 * i) for t in range(4)] for i in range(-10, 11)]
    scorer = Signature(horizon=4).fit(Evidence(trajectory=path(usual)))
    test = path([usual[10], [8 * x for x in usual[10]], [x / 8 for x in usual[10]]])
    middle, longer, shorter = scorer.score(Evidence(trajectory=test)).tolist()
    assert middle < min(longer, shorter)


def test_a_training_image_without_a_finite_path_is_left_out() -> None:
    usual = [[2.0 ** (-t + 0.1 * i) for t in range(4)] for i in range(5)]
    scorer = Signature(horizon=4)
    with_one = scorer.fit(Evidence(trajectory=path([*usual, []]))).state["means"]
    torch.testing.assert_close(with_one, scorer.fit(Evidence(trajectory=path(usual))).state["means"])
    assert scorer.score(Evidence(trajectory=path([[], usual[0]]))).isnan().tolist() == [True, False]
    text = "scorer signature:horizon=4: expected finite trajectories of at least 2 training images, got 1 of 2"
    with pytest.raises(TrajOODError, match=text):
        scorer.fit(Evidence(trajectory=path([usual[0], []])))


def test_contraction_rate_of_geometric_steps() -> None:
    test = Evidence(trajectory=path([[0.5**t for t in range(20)], [0.9**t for t in range(5)], [3.0]]))
    for horizon in (16, None):
        values = ContractionRate(horizon=horizon).fit(test).score(test)
        np.testing.assert_allclose(values, [math.log(0.5), math.log(0.9), 0.0], rtol=1e-6)
    two_sided = ContractionRate(two_sided=True).fit(test).score(test)
    np.testing.assert_allclose(two_sided, (values - values.mean()).abs(), rtol=1e-9)


def test_path_energy() -> None:
    test = Evidence(trajectory=path([[3.0, 2.0, 1.0], [4.0], []]))
    np.testing.assert_allclose(PathEnergy(horizon=2).fit(test).score(test), [math.log(13), math.log(16), math.nan])
    np.testing.assert_allclose(PathEnergy(horizon=None).fit(test).score(test), [math.log(14), math.log(16), math.nan])
    two_sided = PathEnergy(horizon=2, two_sided=True).fit(test).score(test)
    np.testing.assert_allclose(two_sided, [math.log(16 / 13) / 2, math.log(16 / 13) / 2, math.nan])


# ---------------------------------------------------------------------------------------------- points


def grid_evidence(start: Tensor, *points: Tensor, view: str = "grid") -> Evidence:
    kept = {(view, t): p for t, p in enumerate(points, start=1)}
    trajectory = path([[1.0] * 3] * len(start))
    return Evidence(features={view: start}, points=kept, trajectory=trajectory)  # type: ignore[dict-item,arg-type]


@pytest.mark.parametrize("steps", ["1", "1+2"])
def test_early_path_is_scikit_learns_gaussian_of_start_and_displacements(steps: str) -> None:
    from sklearn.covariance import LedoitWolf

    runs = [[draw(n, 3, 4, seed=s + t) for t in range(3)] for n, s in ((50, 0), (9, 10))]
    scorer = EarlyPath(steps=steps).fit(grid_evidence(*runs[0]))
    vectors = []
    for start, first, second in runs:
        parts = [start, first - start, *([second - first] if "2" in steps else [])]
        vectors.append(torch.cat(parts, dim=2).double().numpy())
    cells = [np.sqrt(LedoitWolf().fit(vectors[0][:, c]).mahalanobis(vectors[1][:, c])) for c in range(3)]
    np.testing.assert_allclose(scorer.score(grid_evidence(*runs[1])).numpy(), np.mean(cells, axis=0), rtol=1e-6)


def test_shuffled_path_does_not_know_what_belongs_together() -> None:
    start = draw(400, 1, 3)
    train = grid_evidence(start, 0.5 * start + 0.01 * draw(400, 1, 3, seed=1))  # the field points home
    away = draw(50, 1, 3, seed=2)
    honest, wrong = grid_evidence(away, 0.5 * away), grid_evidence(away, 1.5 * away)
    joint, shuffled = EarlyPath().fit(train), EarlyPath(shuffled=True).fit(train)
    assert (joint.score(wrong) > 5 * joint.score(honest)).all()
    torch.testing.assert_close(shuffled.score(wrong), shuffled.score(honest), rtol=0.2, atol=0.2)
    torch.testing.assert_close(joint.state["means"], shuffled.state["means"])
    other = EarlyPath(shuffled=True, seed=1).fit(train)
    assert not torch.equal(other.state["factors"], shuffled.state["factors"])


def mean_evidence(count: int, seed: int, attractors: Tensor | None = None) -> Evidence:
    points = {("mean", t): draw(count, 5, seed=seed + t) for t in (1, 2, 4, 8, 16)}
    return Evidence(
        features={"mean": draw(count, 5, seed=seed)},
        points=points,  # type: ignore[arg-type]
        attractors={} if attractors is None else {"mean": attractors},
    )


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("reference", ["attractors", "features"])
def test_early_trajectory_by_brute_force(reference: str, whiten: bool) -> None:
    from sklearn.covariance import LedoitWolf

    train, test = mean_evidence(30, 0, draw(12, 5, seed=99)), mean_evidence(7, 50)
    scorer = EarlyTrajectory(reference=reference, whiten=whiten).fit(train)  # type: ignore[arg-type]
    targets = (train.attractors if reference == "attractors" else train.features)["mean"].double().numpy()
    precision = LedoitWolf().fit(train.features["mean"].double().numpy()).precision_ if whiten else np.eye(5)
    points = [test.features["mean"], *(test.points["mean", t] for t in (1, 2, 4, 8, 16))]
    distances = []
    for p in points:
        offsets = p.double().numpy()[:, None] - targets
        distances.append(np.sqrt(np.einsum("bri,ij,brj->br", offsets, precision, offsets)).min(axis=1))
    np.testing.assert_allclose(scorer.score(test).numpy(), np.mean(distances, axis=0), rtol=1e-5)


def test_as_many_centroids_as_different_attractors() -> None:
    clusters = torch.cat([5 * centre + 0.01 * draw(20, 5, seed=i) for i, centre in enumerate(torch.eye(5)[:3])])
    ends = torch.eye(5)[:3].repeat_interleave(20, dim=0)  # 60 end points on 3 attractors
    scorer = EarlyTrajectory(reference="centroids", steps="0")
    scorer.fit(Evidence(features={"mean": clusters}, attractors={"mean": ends}))
    found = scorer.state["reference"]
    assert len(found) == 3
    expected = torch.stack([c.mean(dim=0) for c in clusters.split(20)])
    assert torch.cdist(found, expected).min(dim=1).values.max() < 1e-5


def test_alignment() -> None:
    attractors = torch.tensor([[1.0, 0.0], [50.0, 50.0]])
    train = Evidence(features={"mean": torch.zeros(3, 2)}, attractors={"mean": attractors})
    start = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [50.0, 49.0]])
    step = torch.tensor([[0.3, 0.0], [-2.0, 0.0], [0.1, 0.1], [1.0, 1.0], [0.0, 0.5]])
    test = Evidence(features={"mean": start}, points={("mean", 1): start + step})
    np.testing.assert_allclose(
        Alignment().fit(train).score(test), [-1, 1, -math.sqrt(0.5), 0, -1], rtol=1e-6, atol=1e-12
    )
    towards_mean = Alignment(target="mean").fit(train).score(test)
    np.testing.assert_allclose(towards_mean[3:], [math.sqrt(0.5), 49 / math.hypot(50, 49)], rtol=1e-6)


def test_a_horizon_beyond_the_step_limit_is_told() -> None:
    model = tiny.conv()
    pictures = Normalised(torch.rand(12, *model.input_shape, generator=torch.Generator().manual_seed(0)))
    specs = ["trajectory", "trajectory:horizon=16", "knn:k=2", "signature:horizon=20"]
    told = r"scorer trajectory:horizon=16 and 1 more scorers: expected max_steps of at least 20, got 5: a path that"
    with pytest.warns(UserWarning, match=told):
        ScorerSet(model, specs, max_steps=5).fit(pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ScorerSet(model, specs, max_steps=20).fit(pictures)
