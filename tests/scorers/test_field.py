"""``field`` against the same definition written with NumPy and scikit-learn, and against what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor

from traj_ood.data.preprocessing import Normalised
from traj_ood.errors import TrajOODError
from traj_ood.scorers import Evidence, create_scorer
from traj_ood.scorers.field import Field
from traj_ood.scorers.folds import folds
from traj_ood.scorers.gaussians import learn_gaussians
from traj_ood.scorers.scorer_set import ScorerSet

CELLS, D = 4, 6


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def evidence(count: int, seed: int, cells: int = CELLS, spread: float = 1.0, scale: float = 1.0) -> Evidence:
    """Latents far from the origin, whose field pulls each towards the mean, with cells that differ."""
    level = torch.linspace(1, 2, cells)[:, None]
    start = 3 + level * spread * draw(count, cells, D, seed=seed) * torch.arange(1, D + 1) ** -0.5
    end = start - 0.3 * (start - 3) + 0.2 * spread * draw(count, cells, D, seed=seed + 100)
    return of(scale * start, scale * end)


def of(start: Tensor, end: Tensor) -> Evidence:
    """As the pass leaves it: ``mean`` is the mean over cells."""
    points = {("grid", 1): end, ("mean", 1): end.mean(dim=1)}
    return Evidence(features={"grid": start, "mean": start.mean(dim=1)}, points=points)  # type: ignore[arg-type]


def rows(whole: Evidence, part: slice) -> Evidence:
    return Evidence(
        features={k: v[part] for k, v in whole.features.items()}, points={k: v[part] for k, v in whole.points.items()}
    )


# ---------------------------------------------------------------------------------------------- the definition


def measured(train: dict[str, np.ndarray], queries: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Distance of (z0, v) and logarithms of all lengths, by Gaussians of ``train``: scikit-learn's, cell by cell."""

    def distance(name: str) -> np.ndarray:
        per_cell = [
            np.sqrt(LedoitWolf().fit(train[name][:, c]).mahalanobis(queries[name][:, c]))
            for c in range(train[name].shape[1])
        ]
        return np.mean(per_cell, axis=0)

    names = [n for n in train if n not in ("joint", "length")]
    return distance("joint"), np.log(np.stack([*(distance(n) for n in names), queries["length"]], axis=1))


def arrays(x: Evidence) -> dict[str, np.ndarray]:
    """z0 and v in each view, both of a cell together, and ‖v‖; the difference is float32's, all else float64."""
    grid = x.features["grid"]
    found: dict[str, np.ndarray] = {}
    for view in ("grid", "mean") if grid.shape[1] > 1 else ("grid",):
        start, end = x.features[view], x.points[view, 1]  # type: ignore[index]
        cells = (lambda t: t.double().numpy()) if view == "grid" else (lambda t: t.double().numpy()[:, None])
        found |= {f"{view} z0": cells(start), f"{view} v": cells(end - start)}
    found["joint"] = np.concatenate([found["grid z0"], found["grid v"]], axis=2)
    found["length"] = np.sqrt((found["grid v"] ** 2).sum(axis=(1, 2)))
    return found


def by_hand(train: Evidence, queries: Evidence) -> np.ndarray:
    """score = a / E[a] + b / E[b], each half of the training images measured by the other, averaged over both."""
    known, asked = arrays(train), arrays(queries)
    total = np.zeros(len(asked["length"]))
    half = folds(train.features["grid"], 2).numpy()
    for k in range(2):
        mine, other = ({n: v[half == h] for n, v in known.items()} for h in (k, 1 - k))
        far, lengths = measured(mine, other)
        usual = LedoitWolf().fit(lengths)
        a, own = measured(mine, asked)
        b = np.sqrt(usual.mahalanobis(own))
        total += a / far.mean() + b / np.sqrt(usual.mahalanobis(lengths)).mean()
    return total / 2


@pytest.mark.parametrize("cells", [CELLS, 1])
@pytest.mark.parametrize("count", [200, 201, 24])
def test_it_is_the_definition(cells: int, count: int) -> None:
    train, queries = evidence(count, 0, cells), evidence(40, 1, cells, spread=1.5)
    found = Field().fit(train).score(queries)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), by_hand(train, queries), rtol=1e-8)


def test_the_control_is_the_definition_without_the_field() -> None:
    train, queries = evidence(201, 0), evidence(40, 1, spread=1.5)

    def without(x: Evidence) -> Evidence:
        return Evidence(features=x.features)

    found = Field(start_only=True).fit(without(train)).score(without(queries))
    known, asked = arrays(train), arrays(queries)
    total = np.zeros(40)
    for k in range(2):
        half = folds(train.features["grid"], 2).numpy()
        mine, other = ({n: v[half == h] for n, v in known.items()} for h in (k, 1 - k))
        held, new = (
            np.stack(
                [
                    np.mean(
                        [
                            np.sqrt(LedoitWolf().fit(mine[n][:, c]).mahalanobis(q[n][:, c]))
                            for c in range(mine[n].shape[1])
                        ],
                        axis=0,
                    )
                    for n in ("grid z0", "mean z0")
                ]
            )
            for q in (other, asked)
        )
        usual = LedoitWolf().fit(np.log(held).T)
        total += new[0] / held[0].mean()
        total += np.sqrt(usual.mahalanobis(np.log(new).T)) / np.sqrt(usual.mahalanobis(np.log(held).T)).mean()
    np.testing.assert_allclose(found.numpy(), total / 2, rtol=1e-8)
    assert Field(start_only=True).needs().steps == 0
    assert Field(start_only=True).f_evaluations(without(queries)) == 0


@pytest.mark.parametrize("make", [tiny.vit, tiny.conv])
def test_a_whole_pass_leaves_it_what_it_reads(make: type) -> None:
    model = make()
    images, probes = tiny.images(30, seed=1), 1.5 * tiny.images(9, seed=2)
    found = ScorerSet(model, ["field"]).fit(Normalised(images)).score(Normalised(probes))

    def after_one_step(x: Tensor) -> Evidence:
        start = model.encode(x)
        end = model.encode(model.decode(start))
        views = {view: (model.grid if view == "grid" else lambda z: model.view(z, "mean")) for view in ("grid", "mean")}
        return Evidence(
            features={v: look(start) for v, look in views.items()},  # type: ignore[misc]
            points={(v, 1): look(end) for v, look in views.items()},  # type: ignore[misc]
        )

    expected = by_hand(after_one_step(images), after_one_step(probes))
    np.testing.assert_allclose(found.scores["field"].numpy(), expected, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- what it promises


def test_both_sides_are_unusual() -> None:
    train, usual = evidence(600, 0), evidence(400, 1)
    scorer = Field().fit(train)
    limit = torch.quantile(scorer.score(usual), 0.95)
    assert (scorer.score(evidence(100, 2, spread=2.5)) > limit).all(), "far out"
    still = evidence(100, 3, spread=0.2)  # nearer to the mean, and calmer, than any training image
    assert (scorer.score(still) > limit).all(), "too close"
    joint = create_scorer("early-path").fit(train)
    assert joint.score(still).max() < joint.score(usual).min(), "a distance alone calls these the most usual of all"


def test_an_unusual_field_at_a_usual_place() -> None:
    train, usual = evidence(600, 0), evidence(400, 1)
    scorer = Field().fit(train)
    limit = torch.quantile(scorer.score(usual), 0.95)
    start, end = usual.features["grid"], usual.points["grid", 1]
    assert (scorer.score(of(start, start - (end - start))) > limit).float().mean() > 0.5, "the other way: most"
    assert (scorer.score(of(start, start + 3 * (end - start))) > limit).all(), "too strong"
    assert (scorer.score(of(start, start + 0.05 * (end - start))) > limit).all(), "too weak"


def test_the_unit_of_latents_does_not_matter() -> None:
    plain, scaled = (Field().fit(evidence(100, 0, scale=s)).score(evidence(30, 1, scale=s)) for s in (1.0, 8.0))
    torch.testing.assert_close(plain, scaled, rtol=1e-9, atol=0)


def test_halves_may_change_places() -> None:
    train, queries = evidence(100, 0), evidence(30, 1)
    rolled = Evidence(
        features={k: v.roll(1, dims=0) for k, v in train.features.items()},
        points={k: v.roll(1, dims=0) for k, v in train.points.items()},
    )
    first, second = (Field().fit(t).score(queries) for t in (train, rolled))
    torch.testing.assert_close(first, second, rtol=1e-9, atol=0)


def test_a_latent_of_one_token_has_one_view() -> None:
    train, queries = evidence(50, 0, cells=1), evidence(20, 1, cells=1)
    expected = Field().fit(train).score(queries)
    for x in (train, queries):
        x.features["mean"].fill_(torch.nan)  # what would be said twice is not read
    torch.testing.assert_close(Field().fit(train).score(queries), expected, rtol=1e-9, atol=0)


def test_it_costs_one_evaluation_and_no_attractors() -> None:
    scorers = ScorerSet(tiny.vit(), ["field"]).fit(Normalised(tiny.images(10, seed=1)))
    assert not scorers.needs.dictionary
    scored = scorers.score(Normalised(tiny.images(4, seed=2)))
    assert scored.evidence.path().residuals.shape[1] == 1
    assert scorers.scorers[0].f_evaluations(scored.evidence) == 1.0


def test_too_few_training_images() -> None:
    text = "scorer field: expected at least 8 training images, got 7: add images, since the fit splits them into"
    with pytest.raises(TrajOODError, match=text):
        Field().fit(evidence(7, 0))
    with pytest.raises(TrajOODError, match=text):
        ScorerSet(tiny.vit(), ["field"]).fit(Normalised(tiny.images(7)))
    assert Field().fit(evidence(8, 0)).score(evidence(3, 1)).isfinite().all()


def test_halves_are_equal_random_and_the_same_in_any_order() -> None:
    vectors = evidence(201, 0).features["grid"]
    fold, order = folds(vectors, 2), torch.randperm(201, generator=torch.Generator().manual_seed(5))
    assert fold.bincount().tolist() == [101, 100]
    assert torch.equal(folds(vectors[order], 2), fold[order])
    assert 60 < int((fold[1:] != fold[:-1]).sum()) < 140  # neither in blocks nor in turns


def test_the_order_of_the_training_images_does_not_matter() -> None:
    """Two kinds of images in turns (left and right, before and after): each half must learn both."""
    one, other, queries = evidence(100, 0), evidence(100, 1), evidence(50, 2)
    other = of(other.features["grid"] + 40, other.points["grid", 1] + 40)
    start, end = (
        torch.stack([of_one, of_other], dim=1).flatten(0, 1)
        for of_one, of_other in (
            (one.features["grid"], other.features["grid"]),
            (one.points["grid", 1], other.points["grid", 1]),
        )
    )
    order = torch.arange(200).reshape(100, 2).T.flatten()  # one kind after the other
    in_turns, in_blocks = Field().fit(of(start, end)), Field().fit(of(start[order], end[order]))
    torch.testing.assert_close(in_turns.score(queries), in_blocks.score(queries), rtol=1e-9, atol=0)
    outside = of(queries.features["grid"] + 20, queries.points["grid", 1] + 20)  # between the two kinds, as neither
    assert in_turns.score(queries).max() < 10
    assert in_turns.score(outside).isfinite().all()


@pytest.mark.parametrize("still", ["field", "cell", "everything"])
def test_what_does_not_move_or_differ_makes_no_nan(still: str) -> None:
    train, queries = evidence(40, 0), evidence(10, 1)
    start, end = train.features["grid"].clone(), train.points["grid", 1].clone()
    if still == "field":
        end = start.clone()
    elif still == "cell":
        start[:, 1] = end[:, 1] = 2.0
    else:
        start[:], end[:] = 2.0, 2.0
    scorer = Field().fit(of(start, end))
    assert scorer.score(queries).isfinite().all()
    assert scorer.score(of(start, end)).isfinite().all()


def test_a_field_below_the_rounding_of_its_place_has_that_length() -> None:
    scorer = create_scorer("field").fit(evidence(60, 1))
    start = evidence(5, 2).features["grid"]
    still = scorer.score(of(start, start))
    hardly = start.clone()
    hardly[:, 0, 0] = torch.nextafter(start[:, 0, 0], start[:, 0, 0] + 1)
    torch.testing.assert_close(scorer.score(of(start, hardly)), still, rtol=1e-3, atol=0)


def test_fitting_leaves_its_input_alone() -> None:
    """E[b] is read from the very lengths that a Gaussian was fitted to: float64, which need no copy to be centred."""
    vectors = 5 + draw(50, 3, seed=0).double()
    before = vectors.clone()
    learn_gaussians(vectors)
    assert torch.equal(vectors, before)
