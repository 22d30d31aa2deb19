"""The path that begins at x against a float64 loop over D(E(x)), and the space it is read in."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor

from traj_ood.data.preprocessing import Normalised
from traj_ood.errors import TrajOODError
from traj_ood.scorers import create_scorer
from traj_ood.scorers.entry_path import EntryPath
from traj_ood.scorers.folds import folds
from traj_ood.scorers.scorer_set import ScorerSet

STEPS = 25


def drawn(count: int, seed: int, shift: float = 0.3) -> Tensor:
    return shift + 0.8 * tiny.images(count, (1, 2, 2), seed)


def mapped(x: np.ndarray) -> np.ndarray:
    """F = D∘E of ``tiny.toy``."""
    bounded = x.clip(-1.5, 1.5)
    return bounded + 0.3 * (bounded - bounded**3)


def white(train: np.ndarray, sphere: bool):  # type: ignore[no-untyped-def]
    """W of cells of one pixel: a deviation each."""

    def onto(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1)[:, None] if sphere else x

    mean, std = onto(train).mean(axis=0), onto(train).std(axis=0)
    return lambda x: (onto(x) - mean) / std


def values(train: np.ndarray, test: np.ndarray, horizon: int, sphere: bool) -> dict[str, np.ndarray]:
    """The parts of test images by the statistics and attractors of these training images."""
    w, points, ends = white(train, sphere), [test], train
    for _ in range(horizon):
        points.append(mapped(points[-1]))
    for _ in range(STEPS + 1):
        ends = mapped(ends)
    y, attractors = [w(p) for p in points], w(ends)
    moved = [np.linalg.norm(b - a, axis=1) for a, b in pairwise(y)]
    near = [np.linalg.norm(p[:, None] - attractors, axis=2).min(axis=1) for p in y]
    return {
        "static": np.linalg.norm(y[0], axis=1),
        "step": moved[0],
        "energy": np.sqrt(np.sum(np.square(moved), axis=0)),
        "attractors": np.mean(near, axis=0),
    }


@pytest.mark.parametrize("sphere", [True, False])
@pytest.mark.parametrize(("parts", "horizon"), [("step+attractors", 1), ("static+energy+attractors", 4), ("step", 1)])
@pytest.mark.parametrize("read", ["sum", "two-sided", "density"])
def test_a_float64_loop(parts: str, horizon: int, read: str, sphere: bool) -> None:
    train, test = drawn(40, 1), drawn(12, 2, shift=-0.2)
    spec = f"entry-path:parts={parts}:horizon={horizon}:read={read}:sphere={str(sphere).lower()}"
    # A tolerance of 0: every sample takes all steps, as the loop does.
    scorers = ScorerSet(tiny.toy(), [spec], tol=0.0, max_steps=STEPS).fit(Normalised(train))
    (found,) = scorers.score(Normalised(test)).scores.values()

    x, z, names = train.flatten(1).double().numpy(), test.flatten(1).double().numpy(), parts.split("+")
    fold = folds(scorers.scorers[0]._on_sphere(train.reshape(40, 4, 1)), 5).numpy()  # type: ignore[attr-defined]
    held_out = np.zeros((len(x), len(names)))
    for k in range(5):
        own = values(x[fold != k], x[fold == k], horizon, sphere)
        held_out[fold == k] = np.stack([own[n] for n in names], axis=1)
    each = values(x, z, horizon, sphere)
    table = np.stack([each[n] for n in names], axis=1)
    if read == "density":
        expected = np.sqrt(LedoitWolf().fit(np.log(held_out)).mahalanobis(np.log(table)))
    else:
        offsets = (table - held_out.mean(axis=0)) / held_out.std(axis=0)
        expected = (abs(offsets) if read == "two-sided" else offsets).sum(axis=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=2e-4)


def test_the_residual_is_what_a_linear_map_of_the_start_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, 1, 5, generator=generator)
    matrix = torch.randn(5, 5, generator=generator)
    from traj_ood.scorers.entry_path import linear_prediction

    predicted, rest = linear_prediction(start.double(), (start @ matrix).double())
    np.testing.assert_allclose(predicted[0].numpy(), matrix.numpy(), atol=0.15)  # shrunk towards 0
    assert float(rest.square().mean()) < 0.01 * float((start @ matrix).square().mean())


def test_a_step_that_the_point_does_not_tell_is_what_the_residual_scores() -> None:
    model = tiny.conv()
    train = tiny.images(120, seed=1)
    scorers = ScorerSet(model, ["entry-path:parts=residual", "entry-path:parts=static"]).fit(Normalised(train))
    found = scorers.score(Normalised(torch.cat([tiny.images(20, seed=2), 3 * tiny.images(20, seed=3)]))).scores
    for scores in found.values():
        assert scores.isfinite().all()


# ---------------------------------------------------------------------------------------------- the space


def test_the_space_of_an_image_is_its_cells() -> None:
    model = tiny.conv()
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    cells = model.entry(image)
    assert cells.shape == (1, 16, 4)
    assert cells[0, 1].tolist() == [2, 3, 10, 11]
    assert cells[0, 4].tolist() == [16, 17, 24, 25]
    colour = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pooled = torch.nn.functional.avg_pool2d(colour, 2)
    entry = model.entry(colour)
    assert entry.shape == (2, 16, 192)
    torch.testing.assert_close(entry[1, 5].reshape(3, 8, 8), pooled[1, :, 8:16, 8:16])
    assert model.entry(torch.rand(2, 1, 30, 45)).shape == (2, 16, 7 * 8)
    assert model.entry(torch.rand(2, 7)).shape == (2, 1, 7)


def test_a_decoded_attractor_is_a_fixed_point_of_the_path_from_x() -> None:
    model = tiny.toy()
    latents = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    torch.testing.assert_close(model.latent_view(latents, "decoded")[:, :, 0], latents)


# ---------------------------------------------------------------------------------------------- what it asks for


def test_what_is_not_read_is_not_computed() -> None:
    assert create_scorer("entry-path:parts=static").needs().features == {"entry"}
    assert not create_scorer("entry-path:parts=step:horizon=9").needs().steps
    assert create_scorer("entry-path:parts=energy:horizon=9").needs().steps == 8
    assert not create_scorer("entry-path:parts=energy").needs().attractors


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("entry-path:parts=stepp", "unknown part of scorer entry-path 'stepp': did you mean 'step'"),
        ("entry-path:parts=step+step", "scorer entry-path: expected each part once, got 'step.step'"),
        ("entry-path:horizon=0", "horizon must be at least 1, got 0"),
        ("entry-path:read=both", "unknown read of scorer entry-path 'both'"),
    ],
)
def test_options_that_cannot_be(spec: str, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        create_scorer(spec)


def test_few_images_are_refused() -> None:
    with pytest.raises(TrajOODError, match="scorer entry-path: expected at least 10 training images, got 9"):
        EntryPath().check_training_size(9)


# ---------------------------------------------------------------------------------------------- classes


def of_own_class(train: np.ndarray, test: np.ndarray, labels: np.ndarray, horizon: int) -> np.ndarray:
    """``values(...)["attractors"]``, to the attractors of the class whose mean in whitened space is nearest to x."""
    w, ends = white(train, True), train
    for _ in range(STEPS + 1):
        ends = mapped(ends)
    starts, ends = w(train), w(ends)
    found = []
    for x in test:
        path = [x]
        for _ in range(horizon):
            path.append(mapped(path[-1]))
        y = [w(p[None])[0] for p in path]
        off = {c: np.linalg.norm(y[0] - starts[labels == c].mean(axis=0)) for c in set(labels.tolist())}
        own = ends[labels == min(off, key=off.__getitem__)]
        found.append(np.mean([np.linalg.norm(own - p, axis=1).min() for p in y]))
    return np.array(found)


@pytest.mark.parametrize("horizon", [1, 4])
def test_attractors_of_the_predicted_class_in_a_float64_loop(horizon: int) -> None:
    train, test = drawn(60, 1), drawn(15, 2, shift=-0.2)
    labels = (train.flatten(1)[:, 0] > 0.3).long() + 2 * (train.flatten(1)[:, 1] > 0.3).long()
    spec = f"entry-path:parts=attractors:horizon={horizon}:classes=true"
    scorers = ScorerSet(tiny.toy(), [spec], tol=0.0, max_steps=STEPS).fit(Normalised(train), labels=labels)
    (found,) = scorers.score(Normalised(test)).scores.values()

    x, z, own = train.flatten(1).double().numpy(), test.flatten(1).double().numpy(), labels.numpy()
    fold = folds(scorers.scorers[0]._on_sphere(train.reshape(60, 4, 1)), 5).numpy()  # type: ignore[attr-defined]
    held_out = np.zeros(len(x))
    for k in range(5):
        held_out[fold == k] = of_own_class(x[fold != k], x[fold == k], own[fold != k], horizon)
    expected = (of_own_class(x, z, own, horizon) - held_out.mean()) / held_out.std()
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=2e-4)
    anywhere = ScorerSet(tiny.toy(), [spec.replace(":classes=true", "")], tol=0.0, max_steps=STEPS)
    (others,) = anywhere.fit(Normalised(train)).score(Normalised(test)).scores.values()
    assert not torch.allclose(found, others, rtol=1e-3)


def test_a_class_without_attractors_is_not_predicted() -> None:
    from traj_ood.scorers.entry_path import classes_of_attractors, distances_to_own_class

    start = torch.tensor([[0.0, 0.0], [0.5, 0.0], [9.0, 9.0]]).double()
    state = classes_of_attractors(start, torch.tensor([4, 4, 7]), torch.tensor([4]))
    assert state["classes/means"].tolist() == [[0.25, 0.0]]
    state["attractors"] = torch.tensor([[1.0, 0.0]])
    assert distances_to_own_class(state, torch.tensor([[[9.0, 9.0], [1.0, 2.0]]]).double()).tolist() == pytest.approx(
        [(np.hypot(8, 9) + 2) / 2]
    )


def test_classes_ask_for_labels_and_for_the_part_that_reads_them() -> None:
    assert create_scorer("entry-path:classes=true").needs().labels
    assert not create_scorer("entry-path").needs().labels
    with pytest.raises(TrajOODError, match=r"classes=true chooses attractors, which 'step' does not read: add the"):
        create_scorer("entry-path:parts=step:classes=true")
    with pytest.raises(TrajOODError, match="expected class labels of the training images, got none"):
        ScorerSet(tiny.toy(), ["entry-path:classes=true"]).fit(Normalised(drawn(20, 1)))
