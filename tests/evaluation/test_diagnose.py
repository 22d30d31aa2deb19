"""diagnose: radii against explicit Jacobians, every verdict on a model that has earned it, and what is written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from traj_ood.attractors import Health, Verdict
from traj_ood.attractors.health import judge
from traj_ood.autoencoders import Autoencoder, CallableAutoencoder, SurrogateAutoencoder, SurrogateNetwork
from traj_ood.backbones import CallableBackbone, Features
from traj_ood.data import ArrayImages, Benchmark, Split
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.jacobian import spectral_radii
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.diagnose import FILE_NAME, Diagnosis, ModelFacts, cautions_about, diagnose, diagnosis_splits
from traj_ood.evaluation.evaluator import Evaluator, RunConfig


def rotation(angle: float) -> Tensor:
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


# ---------------------------------------------------------------------------------------------- spectral radius


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STRETCH = torch.diag(torch.tensor([1.0, 4.0]))
MATRICES = {  # and the relative error that power iteration may leave
    "diagonal": (torch.diag(torch.tensor([0.5, -0.9, 0.1])), 1e-3),
    "complex pair": (0.8 * rotation(0.37), 1e-5),
    "slow complex pair": (1.2 * rotation(0.1), 1e-5),
    "eccentric complex pair": (0.8 * STRETCH @ rotation(1.0) @ STRETCH.inverse(), 0.01),
    "opposite signs": (torch.diag(torch.tensor([0.9, -0.9, 0.2])), 0.01),
    "all of one size": (0.7 * torch.linalg.qr(draw(30, 30))[0], 1e-4),
    "random": (draw(40, 40, seed=1) / 40**0.5, 0.03),
    "defective": (torch.tensor([[0.5, 1.0], [0.0, 0.5]]), 0.02),
    "unstable": (torch.diag(torch.tensor([3.0, 0.5])), 1e-5),
}


@pytest.mark.parametrize("name", MATRICES)
def test_radius_of_a_linear_map(name: str) -> None:
    matrix, within = MATRICES[name]
    expected = float(torch.linalg.eigvals(matrix.double()).abs().max())
    points = draw(3, len(matrix), seed=2)
    got = spectral_radii(lambda z: z @ matrix.T + 1, points, chunk=2)
    assert got.derivative == "forward"
    assert got.values.tolist() == pytest.approx([expected] * 3, rel=within)
    assert got.stable.tolist() == [expected < 1] * 3


def test_radius_zero_and_infinite() -> None:
    points = draw(2, 4)
    shift = torch.diag(torch.ones(3), 1)  # nilpotent: J⁴ = 0
    assert spectral_radii(lambda z: z @ shift.T, points).values.tolist() == [0, 0]
    assert spectral_radii(torch.zeros_like, points).values.tolist() == [0, 0]
    for factor in (torch.nan, 1e25):  # of squares beyond float32
        broken = spectral_radii(lambda z, factor=factor: z * factor, points)
        assert broken.values.tolist() == [torch.inf] * 2
        assert not broken.stable.any()


def test_radius_at_several_points_of_a_nonlinear_map() -> None:
    """f(z) = z + 0.3 (z − z³) has the slopes 1.3 − 0.9 z²: 0.4 at ±1, 1.3 at 0."""
    points = torch.tensor([[1.0, -1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1], [-1, -1, -1, -1]])
    got = spectral_radii(tiny.toy().self_map, points)
    assert got.values.tolist() == pytest.approx([0.4, 1.3, 1.3, 0.4], rel=1e-3)
    assert got.stable.tolist() == [True, False, False, True]


@pytest.mark.parametrize("make", [tiny.vit, tiny.conv])
def test_radius_of_networks_agrees_with_the_explicit_jacobian(make: Any) -> None:
    model: Autoencoder = make()
    path = iterate(model.self_map, model.encode(tiny.images(4)), max_steps=60, chunk=model.chunk)
    got = spectral_radii(model.self_map, path.final, chunk=4)
    assert got.derivative == "forward"
    for point, radius in zip(path.final, got.values.tolist(), strict=True):
        jacobian = torch.autograd.functional.jacobian(  # reverse mode, another way
            lambda z, like=point: model.self_map(z.reshape(1, *like.shape)).flatten(), point.clone().flatten()
        )
        assert isinstance(jacobian, Tensor)
        assert radius == pytest.approx(float(torch.linalg.eigvals(jacobian.double()).abs().max()), rel=0.03)


class _NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 0.6 * z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return 0.6 * gradients[0]


@pytest.mark.parametrize(
    "hidden", [_NoForward.apply, lambda z: 0.6 * z.detach(), lambda z: torch.from_numpy(0.6 * z.numpy())]
)
def test_a_map_without_forward_derivatives_is_differenced(hidden: Any) -> None:
    """A detached tangent would be zero, and f would pass for stable whatever it is."""
    got = spectral_radii(hidden, draw(3, 5))
    assert got.derivative == "differences"
    assert got.values.tolist() == pytest.approx([0.6] * 3, rel=1e-3)


def test_radius_refuses() -> None:
    with pytest.raises(TrajOODError, match="spectral radius: expected at least 1 point, got 0"):
        spectral_radii(lambda z: z, torch.empty(0, 3))
    with pytest.raises(TrajOODError, match="expected burn >= 0 and window >= 2, got 3 and 1"):
        spectral_radii(lambda z: z, torch.ones(1, 3), burn=3, window=1)


# ---------------------------------------------------------------------------------------------- models and images


def source(name: str, count: int, shape: tuple[int, ...], seed: int) -> ArrayImages:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return ArrayImages(tuple(f"{name}/{i}" for i in range(count)), pixels)


def benchmark(train: int = 60, val: int | None = 40, side: int = 2, test: int = 5) -> Benchmark:
    def split(role: Any, count: int, seed: int) -> Split:
        return Split(role, role, source(role, count, (side, side), seed))

    held = None if val is None else split("val", val, 1)
    return Benchmark("tiny", split("train", train, 0), held, split("test", test, 2), (split("near", 5, 3),))


def signed(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).float()[None] / 127.5 - 1


def toy() -> CallableAutoencoder:
    """tiny.toy() on pixels in ±1: 16 attractors, one for each sign pattern."""
    model = tiny.toy()
    model.transform = signed
    return model


def linear(step: Any, size: int = 4) -> CallableAutoencoder:
    """E flattens, D is ``step``: f is any map of R⁴ that a test wants."""
    return CallableAutoencoder(
        lambda x: x.flatten(1), lambda z: step(z).reshape(-1, 1, 2, 2), (1, 2, 2), name="linear", transform=signed
    )


BIAS = torch.tensor([1.0, 0.5, -0.5, 0.2])
WORDS: dict[str, Any] = {
    "healthy": toy(),
    "near-identity": linear(lambda z: z + 1e-4 * (BIAS - z)),
    "collapsed": linear(lambda z: BIAS + 0.5 * (z - BIAS)),
    "slow": linear(lambda z: z + 0.1 * (z.sign() - z)),
    "not converging": linear(lambda z: z @ torch.block_diag(rotation(0.2), rotation(0.3)).T),
    "diverging": linear(lambda z: 1.3 * z),
    "random-like": tiny.vit(gain=1.0),
}


@pytest.mark.parametrize("word", WORDS)
def test_every_verdict(word: str) -> None:
    model = WORDS[word]
    side = model.input_shape[-1]
    limits: dict[str, Any] = {"tol": 1e-9, "max_steps": 60} if word == "slow" else {}
    got = diagnose(model, benchmark(side=side), **limits)
    assert got.verdict.word == word
    assert got.meaningful is (word == "healthy")
    assert bool(got.verdict.remedy) is (word != "healthy")
    assert f"Verdict: {word}: {got.verdict.reason}" in got.report()
    assert ("Scores against these attractors mean nothing" in got.report()) is (word != "healthy")


@pytest.mark.parametrize("word", [w for w in WORDS if w != "diverging"])  # which cannot be scored at all
def test_a_benchmark_run_says_the_same(word: str, tmp_path: Path) -> None:
    model = WORDS[word]
    limits: dict[str, Any] = {"tol": 1e-9, "max_steps": 60} if word == "slow" else {}
    config = RunConfig(scorers=("trajectory",), resamples=0, **limits)
    data = benchmark(side=model.input_shape[-1], test=40)
    run = Evaluator(model, data, config, out=tmp_path, quiet=True, pictures=False)
    found = run.run().dictionary
    assert found["verdict"]["word"] == word
    assert found["healthy"] is (word == "healthy")
    assert bool(found["warnings"]) is (word != "healthy")


def test_a_run_looks_at_the_attractors_where_their_health_is_good(tmp_path: Path) -> None:
    """Trajectories that settle because f is slow near 16 unstable points: only the radii tell."""

    def decode(z: Tensor) -> Tensor:  # away from ±1, by little enough to meet the tolerance at once
        return (z + 1e-4 * (z - z.sign()) + 0.5 * (z.sign() - z) * ((z - z.sign()).abs() > 0.1)).reshape(-1, 1, 2, 2)

    model = CallableAutoencoder(lambda x: x.flatten(1), decode, (1, 2, 2), transform=signed)
    run = Evaluator(
        model, benchmark(), RunConfig(scorers=("trajectory",), resamples=0), out=tmp_path, quiet=True, pictures=False
    )
    found = run.run().dictionary
    assert found["verdict"]["word"] == diagnose(model, benchmark()).verdict.word == "unstable"
    assert found["warnings"] == [found["verdict"]["reason"]]
    assert not found["healthy"]


def test_findings_of_the_toy() -> None:
    got = diagnose(toy(), benchmark(), noise=0.05)
    assert got.settings["images"] == 60
    assert got.settings["held_out"] == 40
    assert got.settings["held_out_split"] == "val"
    assert got.health.healthy
    assert (got.held_out_converged, got.still_falling) == (1.0, None)
    assert (got.stable, got.derivative) == (1.0, "forward")
    assert got.explained_hidden is None
    # D(E(x)) − x = 0.3 (x − x³), independently of the package
    held, train = (
        np.stack([np.asarray(s.load(i), dtype=float) / 127.5 - 1 for i in range(len(s))])
        for s in (source("val", 40, (2, 2), 1), source("train", 60, (2, 2), 0))
    )
    corners = {tuple(row) for row in np.sign(train).reshape(-1, 4)}
    assert got.health.distinct == len(corners)
    assert got.radii == pytest.approx([0.4] * len(corners), rel=0.01)  # they end near a corner, not at it
    assert got.known == np.mean([tuple(row) in corners for row in np.sign(held).reshape(-1, 4)])
    error = np.square(0.3 * (held - held**3)).sum()
    assert got.explained == pytest.approx(1 - error / np.square(held - train.mean(axis=0)).sum(), abs=1e-5)
    # the sign pattern is the attractor: noise changes it where it flips a sign
    draws = torch.Generator().manual_seed(0)
    start = torch.from_numpy(held).float().reshape(40, 1, 2, 2)
    noisy = start + 0.05 * torch.randn(start.shape, generator=draws)
    expected = (noisy.sign() == start.sign()).flatten(1).all(dim=1).double().mean()
    assert 0.5 < float(expected) < 1
    assert got.agreement == pytest.approx(float(expected))


def test_noise_is_tried_where_the_image_without_it_converges() -> None:
    """Half of the images change the signs of their last three coordinates in every step, without end."""

    def step(z: Tensor) -> Tensor:
        settled = z + 0.3 * (z - z**3)
        return torch.where(z[:, :1] > 0, settled, torch.cat([settled[:, :1], -settled[:, 1:]], dim=1))

    got = diagnose(linear(step), benchmark(), noise=0.3, max_steps=40)
    held = torch.from_numpy(np.stack([np.asarray(source("val", 40, (2, 2), 1).load(i)) for i in range(40)]))
    start = held.float().reshape(40, 4) / 127.5 - 1
    noisy = start + 0.3 * torch.randn(40, 1, 2, 2, generator=torch.Generator().manual_seed(0)).reshape(40, 4)
    settles = start[:, 0] > 0
    assert 10 < int(settles.sum()) < 30
    same = (noisy.sign() == start.sign()).all(dim=1)
    assert 0.1 < float(same[settles].double().mean()) < 0.9
    assert got.agreement == pytest.approx(float(same[settles].double().mean()))


def test_known_attractors_and_cautions() -> None:
    """60 training images know few of 2⁹ attractors, and strong noise changes nearly every one."""

    def decode(z: Tensor) -> Tensor:
        bounded = z.clamp(-1.5, 1.5)
        return (bounded + 0.3 * (bounded - bounded**3)).reshape(-1, 1, 3, 3)

    model = CallableAutoencoder(lambda x: x.flatten(1), decode, (1, 3, 3), transform=signed)
    got = diagnose(model, benchmark(side=3), noise=2.0)
    assert got.meaningful
    assert got.known is not None
    assert got.known < 0.3
    assert [c.split(",")[0] for c in got.cautions] == [
        f"only {got.known:.0%} of held-out ID images end at an attractor of the training images",
        f"only {got.agreement:.0%} of images keep their attractor under noise of 2",
    ]
    assert all(f"Caution: {text}." in got.report() for text in got.cautions)


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny.vit(), benchmark(train=20, val=15, side=8)
    whole = diagnose(model, data, images=20, max_steps=10)
    assert diagnose(model, data, images=20, max_steps=10, seed=1).as_dict() != whole.as_dict()
    monkeypatch.setattr("traj_ood.evaluation.diagnose._BATCH", 7)
    assert diagnose(model, data, images=20, max_steps=10).as_dict() == whole.as_dict()


def test_numbers_do_not_depend_on_torchs_default_type() -> None:
    data, weight = benchmark(side=2), torch.eye(4)  # a weight, because plain functions may take any type
    model = CallableAutoencoder(
        lambda x: x.flatten(1) @ weight, lambda z: (z + 0.3 * (z - z**3)).reshape(-1, 1, 2, 2), (1, 2, 2),
        name="of float32", transform=signed,
    )  # fmt: skip
    expected = diagnose(model, data).as_dict()
    torch.set_default_dtype(torch.float64)
    try:
        assert diagnose(model, data).as_dict() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_val_half_of_the_training_images_are_held_out() -> None:
    got = diagnose(toy(), benchmark(train=50, val=None), images=20)
    assert got.settings | {"held_out_split": "train-held-out", "images": 20, "held_out": 20} == got.settings
    train, held = diagnosis_splits(benchmark(train=51, val=None), 500, 0)
    assert len(train.images) == len(held.images) == 25
    assert not set(train.images.ids) & set(held.images.ids)


def test_a_surrogate_is_diagnosed_by_its_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = CallableBackbone(
        lambda x: Features(x.flatten(1), None), (1, 2, 2), 4, module=torch.nn.Identity(), transform=signed
    )
    got = diagnose(SurrogateAutoencoder(backbone, SurrogateNetwork(4, bottleneck=3)), benchmark())
    assert got.gallery is not None
    assert got.gallery.decoded is None  # D ends at features: only training images can be drawn
    got.save(str(tmp_path))
    assert (tmp_path / "attractors.png").is_file()


def test_gallery(tmp_path: Path) -> None:
    gallery = diagnose(toy(), benchmark()).gallery
    assert gallery is not None
    assert sum(gallery.visits) == 60
    assert list(gallery.visits) == sorted(gallery.visits, reverse=True)
    assert gallery.decoded is not None
    train = torch.stack([signed(benchmark().train.images.load(i)) for i in range(60)])
    for decoded, nearest, name in zip(gallery.decoded, gallery.nearest, gallery.ids, strict=True):
        best = (train - decoded).flatten(1).norm(dim=1).argmin()
        assert name == f"train/{int(best)}"
        assert torch.equal(nearest, train[best])
    assert gallery.limits[:, 0].tolist() == [float(train.min()), float(train.max())]


def test_files(tmp_path: Path) -> None:
    got = diagnose(toy(), benchmark())
    got.save(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "attractors.png", "curves.parquet", FILE_NAME, "dynamics.png",
    ]  # fmt: skip
    stored = json.loads((tmp_path / "new" / FILE_NAME).read_text())
    assert stored == got.as_dict()
    assert stored["meaningful"] is True
    assert stored["verdict"]["word"] == stored["health"]["verdict"]["word"] == "healthy"
    assert Verdict(**stored["verdict"]) == got.verdict


def test_a_model_without_attractors_has_no_pictures_of_them(tmp_path: Path) -> None:
    got = diagnose(WORDS["diverging"], benchmark())
    assert (got.known, got.agreement, got.radii, got.stable, got.gallery) == (None, None, (), None, None)
    assert "spectral radius      not measured: no trajectory converged" in got.report()
    got.save(tmp_path)
    assert not (tmp_path / "attractors.png").exists()
    json.loads((tmp_path / FILE_NAME).read_text(), parse_constant=lambda text: pytest.fail(f"not JSON: {text}"))


# ---------------------------------------------------------------------------------------------- judging

GOOD: dict[str, Any] = {
    "held_out_converged": 1.0,
    "still_falling": None,
    "known": 0.9,
    "agreement": 0.9,
    "radii": (0.9,) * 10,
    "derivative": "forward",
    "explained": 0.8,
    "explained_hidden": None,
}


def health(**changes: Any) -> Health:
    return replace(diagnose(toy(), benchmark()).health, **changes)


def facts(**changes: Any) -> Any:
    return ModelFacts(**{**GOOD, **changes})


def test_unstable_attractors() -> None:
    assert judge(health(), facts(radii=(0.9,) * 5 + (1.1,) * 5)).word == "healthy"
    verdict = judge(health(), facts(radii=(0.9,) * 4 + (1.1,) * 6))
    assert verdict.word == "unstable"
    assert verdict.reason.startswith("only 40% of 10 attractors have a spectral radius below 1")


@pytest.mark.parametrize("word", ["not converging", "collapsed"])
def test_a_loss_on_hidden_patches_alone_is_recognised(word: Any) -> None:
    bad = health(verdict=Verdict(word, "why", "what"))
    verdict = judge(bad, facts(explained=-0.5, explained_hidden=0.6))
    assert verdict.word == word
    assert verdict.reason == (
        "why, and D(E(x)) explains -50% of the variance without a mask but 60% of hidden patches, as after training on "
        "hidden patches alone"
    )
    assert verdict.remedy.startswith("train with the loss on all pixels")
    assert judge(bad, facts(explained=0.5, explained_hidden=0.6)) == bad.verdict
    assert judge(bad, facts(explained=-0.5, explained_hidden=0.0)).word == "random-like"


def test_good_attractors_of_a_masked_loss_are_a_caution() -> None:
    blind = facts(explained=0.05, explained_hidden=0.6)
    verdict = judge(health(), blind)
    assert verdict.meaningful
    (caution,) = cautions_about(verdict, blind, 0.1)
    assert caution.startswith("D(E(x)) explains 5% of the variance of held-out images")


def test_the_verdict_in_one_line() -> None:
    assert Verdict("healthy", "fine").text == "healthy: fine."
    assert Verdict("collapsed", "why", "what").text == (
        "collapsed: why. Scores against these attractors mean nothing; what. Scorers that need no attractors (such as "
        "field, early-path, knn or mahalanobis) do not depend on this."
    )
    assert Verdict("random-like", "why", "what").text.endswith("mean nothing; what.")


def test_refusals() -> None:
    with pytest.raises(TrajOODError, match="diagnose: expected at least 20 images, got 19: ask for more"):
        diagnose(toy(), benchmark(), images=19)
    with pytest.raises(TrajOODError, match=r"expected at least 20 training images of benchmark 'tiny', got 8 \(its"):
        diagnose(toy(), benchmark(train=16, val=None))  # half of them is held out
    for noise in (0.0, -1.0, math.nan):
        with pytest.raises(TrajOODError, match="diagnose: expected noise above 0, got"):
            diagnose(toy(), benchmark(), noise=noise)
    same = benchmark()
    same = replace(same, val=Split("val", "val", ArrayImages(("a",), source("train", 60, (2, 2), 0).array[:1])))
    assert isinstance(diagnose(toy(), same), Diagnosis)  # one held-out image is little, but not wrong
