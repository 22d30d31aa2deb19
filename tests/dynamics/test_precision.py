"""Cheap first steps and the fp32 polish: what they may change, within bounds; and TF32, which is off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from traj_ood.attractors import AttractorDictionary, NearestAttractor
from traj_ood.autoencoders import Autoencoder, load_autoencoder
from traj_ood.dynamics.device import bfloat16_map, resolve_device, set_tf32
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.maps import LowPrecision, SelfMap
from traj_ood.dynamics.observers import Norm
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError

DISTANCE = "distance/tokens"
TRAIN, TEST = 8, 24


def close(one: Tensor, other: Tensor) -> None:
    """Up to the rounding of float32 points."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


def contraction(z: Tensor) -> Tensor:
    """Rate 0.8 towards the fixed point 3 in every coordinate."""
    return 3 + 0.8 * (z - 3)


def rounded(z: Tensor) -> Tensor:
    return contraction(z).bfloat16().to(z.dtype)


class Spy:
    """Counts how often f sees each row; the first coordinate of a latent is the sample's own number."""

    def __init__(self, rest: SelfMap) -> None:
        self.rest, self.rows, self.labels = rest, [], []  # type: ignore[var-annotated]

    def __call__(self, z: Tensor) -> Tensor:
        self.rows.append(len(z))
        self.labels.append({int(v) for v in z[:, 0]})
        return torch.cat([z[:, :1], self.rest(z[:, 1:])], dim=1)

    def calls_of(self, label: int) -> int:
        return sum(label in labels for labels in self.labels)


def smooth_images(count: int, seed: int = 0) -> Tensor:
    """(count, 1, 28, 28): four soft-edged blocks each, in the bundled model's normalised units."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:28, 0:28] / 27 * 2 - 1
    pixels = np.zeros((count, 28, 28))
    for image in pixels:
        for _ in range(4):
            (left, top), (width, height) = draw.uniform(-0.5, 0.5, 2), draw.uniform(0.15, 0.6, 2)
            block = 1 / (1 + ((x - left) / width) ** 8 + ((y - top) / height) ** 8)
            np.maximum(image, draw.uniform(0.4, 1) * block, out=image)
    return (torch.tensor(pixels, dtype=torch.float32)[:, None] - 0.3135) / 0.3601


@dataclass
class Paths:
    exact: Trajectory
    polished: Trajectory

    def gap(self) -> Tensor:
        """(TEST,) distance between the two end points in units of their length."""
        difference = (self.exact.final - self.polished.final).flatten(1).norm(dim=1)
        return difference / self.exact.final.flatten(1).norm(dim=1)

    def deviation(self, horizon: int | None) -> Tensor:
        """(TEST,) relative deviation of the mean distance to the nearest attractor."""
        exact, polished = (p.mean_over_path(DISTANCE, horizon) for p in (self.exact, self.polished))
        return (polished / exact - 1).abs()


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    model = load_autoencoder("fashion-mae")
    model.chunk = 6
    return model


@pytest.fixture(scope="module")
def paths(model: Autoencoder) -> Paths:
    """The bundled model's trajectories in fp32, and in bfloat16 with polish."""
    low = bfloat16_map(model.self_map, "cpu")
    latents = model.encode(smooth_images(TRAIN + TEST))
    train, start = latents[:TRAIN], latents[TRAIN:]
    ends = iterate(model.self_map, train, chunk=model.chunk)
    dictionary = AttractorDictionary.from_trajectory(train, ends, tuple(map(str, range(TRAIN))))
    index = dictionary.index(model, "tokens", "torch")

    def run(low_precision: LowPrecision | None) -> Trajectory:
        observers = [Norm(), NearestAttractor(model, index, "tokens")]
        return iterate(model.self_map, start, chunk=model.chunk, observers=observers, low_precision=low_precision)

    return Paths(run(None), run(LowPrecision(low)))


# ---------------------------------------------------------------------------------------------- the bundled model
# Measured on 128 synthetic and 192 Fashion-MNIST images (64 attractors, two CPU cores): equal shares converge; 2 of
# 127 and 2 of 190 end elsewhere, the others at most 0.5 % of their length apart, half of them 0.003 %. Mean distance
# over horizon 16: median 0.2 %, at most 2.3 %. Over the own length: median 0.5 %, 95 % below 5 %, and single samples
# up to 68 %, because a path that lingers between two attractors leaves at another step. f in fp32 from a start moved by
# 1e-6 deviates by at most 0.6 % there. The bounds below are these with a factor of about two or more. A dictionary that
# is itself made with cheap steps adds to that (horizon 16: at most 31 %, where an attractor is gained or lost).


def test_without_polish_nothing_meets_the_tolerance(model: Autoencoder) -> None:
    low, start = bfloat16_map(model.self_map, "cpu"), model.encode(smooth_images(6))
    cheap = iterate(low, start, chunk=model.chunk, observers=[Norm()], max_steps=100)
    assert not cheap.converged.any()
    floor = cheap.residuals.amin(dim=1).sqrt() / cheap.measure("norm")[:, -1]
    assert 2**-11 < floor.median() < 2**-7  # measured 2^-9.2 … 2^-8.3
    assert cheap.residuals.nan_to_num(nan=1).min() > 100 * 1e-5


@pytest.mark.slow
def test_with_polish_as_many_converge(paths: Paths) -> None:
    assert paths.exact.converged.sum() >= 0.9 * TEST
    assert abs(int(paths.polished.converged.sum()) - int(paths.exact.converged.sum())) <= 1
    last = paths.polished.residuals.gather(1, paths.polished.steps[:, None] - 1)[:, 0]
    assert (last < 1e-5)[paths.polished.converged].all()


@pytest.mark.slow
def test_end_points_agree(paths: Paths) -> None:
    both = paths.exact.converged & paths.polished.converged
    elsewhere = both & (paths.gap() > 0.01)
    assert int(elsewhere.sum()) <= 0.1 * TEST
    assert paths.gap()[both].median() < 2e-4


@pytest.mark.slow
def test_scores_agree(paths: Paths) -> None:
    assert paths.deviation(16).max() < 0.06
    assert paths.deviation(16).median() < 0.005
    assert paths.deviation(None).median() < 0.02
    assert (paths.deviation(None) < 0.1).double().mean() >= 0.85


def test_a_trajectory_is_the_same_alone_in_any_batch_and_for_any_limit(model: Autoencoder) -> None:
    low, starts = LowPrecision(bfloat16_map(model.self_map, "cpu"), max_steps=12), model.encode(smooth_images(TEST))

    def run(rows: list[int], max_steps: int = 20) -> Trajectory:
        return iterate(
            model.self_map, starts[rows], chunk=6, observers=[Norm()], max_steps=max_steps, low_precision=low
        )

    together = run(list(range(TEST)))
    for rows, max_steps in [([3], 20), ([17, 3, 9, 0], 20), (list(range(TEST))[::-1], 20), ([2, 4], 10), ([5], 13)]:
        path = run(rows, max_steps)
        close(path.residuals, together.residuals[rows, :max_steps])
        close(path.measure("norm"), together.measure("norm")[rows, : max_steps + 1])
        if max_steps == 20:
            close(path.final, together.final[rows])


# ---------------------------------------------------------------------------------------------- known dynamics


def test_contraction_ends_where_fp32_ends() -> None:
    start = torch.empty(20, 6).uniform_(-50, 50, generator=torch.Generator().manual_seed(0))
    exact = iterate(contraction, start, observers=[Norm()])
    polished = iterate(contraction, start, observers=[Norm()], low_precision=LowPrecision(rounded))
    alone = iterate(rounded, torch.full((4, 6), 1000.0) * torch.arange(1, 5)[:, None])
    assert exact.converged.all()
    assert polished.converged.all()
    # ‖z_{t+1} − z*‖ ≤ c / (1 − c) · ‖z_{t+1} − z_t‖
    bound = 0.8 / 0.2 * 1e-5**0.5 * 1.01
    for path in (exact, polished):
        assert (path.final - 3).norm(dim=1).max() <= bound
    means = [path.mean_over_path("norm", None) for path in (exact, polished)]
    assert (means[1] / means[0] - 1).abs().max() < 0.05  # what scores read; bfloat16 rounds to 0.4 %
    assert (alone.final - 3).norm(dim=1).min() > bound  # rounding holds it: an exact zero residual, far from z*


def test_nothing_converges_in_low_precision_and_f_keeps_the_last_word() -> None:
    low, exact = Spy(lambda z: z), Spy(contraction)  # the cheap copy claims that every point is a fixed point
    start = torch.cat([torch.arange(5.0)[:, None], torch.full((5, 2), 40.0)], dim=1)
    path = iterate(exact, start, chunk=2, low_precision=LowPrecision(low))
    assert [low.calls_of(b) for b in range(5)] == [1] * 5
    assert path.converged.all()
    torch.testing.assert_close(path.final[:, 1:], torch.full((5, 2), 3.0), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("f", "options", "expected"),
    [
        (lambda z: -z, {}, 9),  # its first residual is the minimum for patience = 8 more steps
        (lambda z: -z, {"patience": 3}, 4),
        (lambda z: -z, {"patience": 3, "max_steps": 2}, 2),
        (lambda z: 0.999 * z, {"switch": 0.0}, 250),
        (lambda z: 0.5 * z, {"switch": 2.0}, 1),
    ],
)
def test_when_f_takes_over(f: SelfMap, options: dict[str, float], expected: int) -> None:
    low, exact = Spy(f), Spy(f)
    start = torch.tensor([[0.0, 100.0]])
    path = iterate(exact, start, chunk=1, low_precision=LowPrecision(low, **options))  # type: ignore[arg-type]
    assert low.calls_of(0) == expected
    assert exact.calls_of(0) == int(path.steps[0]) - expected


def test_each_sample_changes_on_its_own_and_maps_see_whole_chunks() -> None:
    scales = [1e0, 1e1, 1e2, 1e3, 1e4]
    start = torch.cat([torch.arange(5.0)[:, None], torch.tensor(scales)[:, None]], dim=1)

    def run(rows: list[int]) -> tuple[Spy, Spy, Trajectory]:
        low, exact = Spy(rounded), Spy(contraction)
        return low, exact, iterate(exact, start[rows], chunk=3, low_precision=LowPrecision(low), observers=[Norm()])

    low, exact, together = run([0, 1, 2, 3, 4])
    assert set(low.rows) == set(exact.rows) == {3}
    assert len({low.calls_of(b) for b in range(5)}) > 2
    for b in range(5):
        assert low.calls_of(b) + exact.calls_of(b) == int(together.steps[b])
        alone = run([b])[2]
        n = int(together.steps[b])
        close(alone.final[0], together.final[b])
        close(alone.residuals[0], together.residuals[b, :n])
        close(alone.measure("norm")[0], together.measure("norm")[b, : n + 1])


def test_an_overflow_in_low_precision_is_not_the_end() -> None:
    # float16 ends at 65504; f decides whether the trajectory leaves the finite numbers.
    start = torch.tensor([[1e6], [1.0], [torch.nan]])
    path = iterate(contraction, start, low_precision=LowPrecision(lambda z: contraction(z).half()))
    assert path.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NON_FINITE]
    assert path.final.dtype == torch.float32
    path = iterate(lambda z: z * torch.inf, start, low_precision=LowPrecision(lambda z: z * torch.nan))
    assert path.status.tolist() == [Status.NON_FINITE] * 3
    assert path.steps.tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------------- the cheap map


def test_bfloat16_map_keeps_the_type_and_leaves_autocast_behind() -> None:
    model = tiny.vit()
    latents = model.encode(tiny.images(8))
    with torch.inference_mode():
        exact, low = model.self_map(latents), bfloat16_map(model.self_map, "cpu")(latents)
    assert low.dtype == latents.dtype
    assert not torch.is_autocast_enabled("cpu")
    assert 1e-4 < float((low - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_steps": 0}, "low precision: expected max_steps of at least 1, got 0"),
        ({"patience": 0}, "low precision: expected patience of at least 1, got 0"),
        ({"switch": float("nan")}, "low precision: expected a switch >= 0, got nan"),
    ],
)
def test_impossible_options(options: dict[str, float], text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        LowPrecision(contraction, **options)  # type: ignore[arg-type]


def test_low_precision_that_changes_the_shape_or_has_no_bfloat16() -> None:
    with pytest.raises(TrajOODError, match=r"f must keep the latent's shape \(2,\), got \(1,\)"):
        iterate(contraction, torch.ones(2, 2), low_precision=LowPrecision(lambda z: z[:, :1]))
    with pytest.raises(TrajOODError, match="bfloat16 steps: expected the CPU or a CUDA device with bfloat16, got mps"):
        bfloat16_map(contraction, "mps")


# ---------------------------------------------------------------------------------------------- TF32


@pytest.fixture
def flags() -> Iterator[None]:
    yield
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
    set_tf32(False)


def tf32_flags() -> list[bool]:
    """Both ways of asking; torch raises here when they disagree."""
    found = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    found.append(torch.get_float32_matmul_precision() != "highest")
    for operation in (getattr(torch.backends.cudnn, name, None) for name in ("conv", "rnn")):
        if operation is not None:
            found.append(operation.fp32_precision == "tf32")
    return found


@pytest.mark.parametrize("before", ["nothing", "older way", "newer way"])
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.usefixtures("flags")
def test_tf32_is_set_whatever_was_set_before(before: str, allowed: bool) -> None:
    if before == "older way":
        torch.backends.cuda.matmul.allow_tf32 = not allowed
        torch.backends.cudnn.allow_tf32 = not allowed
    elif before == "newer way":
        if not hasattr(torch.backends, "fp32_precision"):
            pytest.skip("before torch 2.9 there is one way only")
        torch.backends.fp32_precision = "ieee" if allowed else "tf32"
        torch.backends.cudnn.conv.fp32_precision = "ieee" if allowed else "tf32"
    set_tf32(allowed)
    assert set(tf32_flags()) == {allowed}


@pytest.mark.usefixtures("flags")
def test_a_cuda_device_comes_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    assert resolve_device("auto").type == "cuda"
    assert set(tf32_flags()) == {False}
    assert resolve_device("auto", tf32=True).type == "cuda"
    assert set(tf32_flags()) == {True}
    resolve_device("cpu")
    assert set(tf32_flags()) == {True}  # none of the CPU's business
