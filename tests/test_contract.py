"""One contract for every registered scorer, on a tiny ViT-MAE, a tiny conv autoencoder and one with a classifier beside
it; then exact values."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from traj_ood import Detector
from traj_ood.autoencoders import Autoencoder, CallableAutoencoder, Encoding, load_autoencoder
from traj_ood.data.preprocessing import Normalised
from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.dynamics.fixed_function import few_images
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError
from traj_ood.scorers import (
    KNN,
    SCORERS,
    WHOLE_PATH,
    Evidence,
    Needs,
    Scorer,
    create_scorer,
    create_scorers,
    default_suite,
    register,
)
from traj_ood.scorers.scorer_set import Scored, ScorerSet

VARIANTS = [
    "trajectory:view=mean",
    "trajectory:view=cls",
    "trajectory:horizon=3",
    "trajectory:horizon=0:view=cls",
    "knn:k=1",
    "knn:k=none:reduce=mean",
    "knn:view=tokens:normalize=false",
    "knn-paper:k=3",
    "mahalanobis:view=cls",
    "mahalanobis:classes=true",
    "mahalanobis:covariance=empirical:classes=true",
    "energy:temperature=2.5",
    "vim:dim=3",
    "rmds:covariance=ledoit-wolf:normalize=true",
    "ssd:clusters=2",
    "ssd:classes=true:covariance=ledoit-wolf",
    "ash:variant=b",
    "fdbd:regularizer=norm",
    "she:patterns=predicted:metric=euclidean",
    "patchcore:view=mean:share=0.5",
    "entry-path:parts=step+residual+static:read=density",
    "entry-path:parts=energy+attractors:horizon=3:read=two-sided:sphere=false",
    "reconstruction:masked=true",
    "start-distance:view=mean",
    "end-distance:view=mean",
]
SPECS = [*SCORERS, *VARIANTS]
TRAIN, TEST = 14, 9
SAME = 1e-9
"""Relative: what no batch, order, place in it or batch-mate may move a score by."""
FEW = 1e-5
"""Relative: what calls of few rows may move a score by, see :func:`traj_ood.dynamics.fixed_function.few_images`."""


class Classifier(Autoencoder):
    """f(z) = tanh(2z) in 6 dimensions; the classifier has 3 classes and 12 features of its own.

    Args:
        linear: whether the classifier is a linear layer over the features.
    """

    family = "classifier"
    name, input_shape, chunk, feature_dim, classes = "tiny-classifier", (1, 8, 8), 6, 12, 3

    def __init__(self, linear: bool = True) -> None:
        self.module = torch.nn.Module()
        draw = torch.Generator().manual_seed(0)
        self.directions = torch.linalg.qr(torch.randn(64, 18, generator=draw))[0]
        self.weight, self.bias = torch.randn(3, 12, generator=draw), torch.tensor([0.5, 0.0, -0.5])
        self.linear = linear

    def encode_batch(self, images: Tensor) -> Tensor:
        return (images.flatten(1) @ self.directions[:, :6]).tanh()

    def decode_batch(self, latents: Tensor) -> Tensor:
        return (2 * latents @ self.directions[:, :6].T).reshape(-1, 1, 8, 8)

    def transform(self, image: Any) -> Tensor:
        raise NotImplementedError

    def examine(self, images: Tensor) -> Encoding:
        latents = self.encode(images)
        features = apply_in_chunks(lambda x: (x.flatten(1) @ self.directions[:, 6:]).relu(), images, self.chunk)
        logits = apply_in_chunks(lambda x: x @ self.weight.T + self.bias, features, self.chunk)
        return Encoding(latents, images, features, logits)

    def head(self) -> tuple[Tensor, Tensor] | None:
        return (self.weight, self.bias) if self.linear else None


MODELS: dict[str, Callable[[], Autoencoder]] = {"vit": tiny.vit, "conv": tiny.conv, "classifier": Classifier}
FAMILIES = tuple(MODELS)


@cache
def model(family: str) -> Autoencoder:
    return MODELS[family]()


def train_images() -> Normalised:
    return Normalised(tiny.images(TRAIN, seed=1))


def probe_images() -> Normalised:
    return Normalised(1.5 * tiny.images(TEST, seed=2))


def train_labels() -> Tensor:
    """Two images of each class at least, and the classifier right on most."""
    found = model("classifier").examine(train_images().images).logits.argmax(dim=1)  # type: ignore[union-attr]
    found[:6] = torch.arange(6) % 3
    return found


def reads_classifier(spec: str) -> bool:
    return create_scorer(spec).needs().logits


def specs_of(family: str) -> list[str]:
    return [
        s
        for s in SPECS
        if not (family != "vit" and "masked" in s) and not (family != "classifier" and reads_classifier(s))
    ]


def create(family: str, spec: str) -> Scorer:
    """The scorer as a run of this model makes it: on the features of the backbone where there is one."""
    return create_scorers([spec], model(family))[0]


@cache
def fitted(family: str) -> ScorerSet:
    return ScorerSet(model(family), specs_of(family), max_steps=30).fit(train_images(), labels=train_labels())


@cache
def scored(family: str) -> Scored:
    return fitted(family).score(probe_images())


CASES = [(family, spec) for family in FAMILIES for spec in specs_of(family)]
each = pytest.mark.parametrize(("family", "spec"), CASES)


def scorer_of(family: str, spec: str) -> Scorer:
    return next(s for s in fitted(family).scorers if s.label == create(family, spec).label)


# ---------------------------------------------------------------------------------------------- the contract


@each
def test_scores_are_finite_float64_one_per_image(family: str, spec: str) -> None:
    scores = scored(family).scores[create(family, spec).label]
    assert scores.shape == (TEST,)
    assert scores.dtype == torch.float64
    assert scores.isfinite().all()
    assert scores.device.type == "cpu"


def odd() -> Autoencoder:
    """Widths that no vector unit divides."""
    torch.manual_seed(3)
    net = torch.nn.Module()
    net.encoder = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 37), torch.nn.Tanh(), torch.nn.Linear(37, 7)
    )
    net.decoder = torch.nn.Sequential(torch.nn.Linear(7, 37), torch.nn.Tanh(), torch.nn.Linear(37, 64))
    net.decoder.append(torch.nn.Unflatten(1, (1, 8, 8)))
    return CallableAutoencoder.from_module(net, (1, 8, 8))


def float64() -> Autoencoder:
    network = tiny.conv().module.double()
    return CallableAutoencoder.from_module(network, (1, 8, 8))


LARGE: dict[str, Callable[[], Autoencoder]] = {**MODELS, "odd": odd, "float64": float64}
IMAGES = 257
BATCHES = {1: 3, 2: 4, 3: 6, 7: 14, 128: 128}
"""Size → how many images are scored in batches of it, and compared with all of them in one."""


def largest_differences(family: str) -> tuple[dict[str, float], dict[str, float]]:
    """Label → largest relative difference of its scores, over batch sizes, a reversed order and rotated places; and of
    those from calls of few rows."""
    scorers, images = large(family)
    whole = scorers.score(Normalised(images)).scores
    worst, few = dict.fromkeys(whole, 0.0), dict.fromkeys(whole, 0.0)

    def score(part: Tensor, count: int | None) -> dict[str, Tensor]:
        with few_images(count) if count is not None else nullcontext():
            return scorers.score(Normalised(images[part])).scores

    def compare(rows: Tensor, parts: list[Tensor], worst: dict[str, float], count: int | None = None) -> None:
        scored = [score(part, count) for part in parts]
        for label, expected in whole.items():
            found = torch.cat([s[label] for s in scored])
            sizes = expected[rows].abs().clamp(min=1e-12)
            if count is not None:  # float32's last bits are all that is left of a difference that happens to be near 0
                sizes = sizes.clamp(min=float(expected.abs().median()))
            differences = (found - expected[rows]).abs() / sizes
            worst[label] = max(worst[label], float(differences.nan_to_num(nan=torch.inf).max()))

    for size, count in BATCHES.items():
        rows = torch.arange(len(images))[-count:]
        compare(rows, list(rows.split(size)), worst)
    for moved in (rows.flip(0), rows.roll(5)):
        compare(moved, [moved], worst)
    for size in (1, 5, 20):
        compare(rows[: 2 * size], list(rows[: 2 * size].split(size)), few, size)
    return worst, {s.label: few[s.label] for s in scorers.scorers if s.bears_rounding}


def large(family: str) -> tuple[ScorerSet, Tensor]:
    """Fitted scorers and more images than any fixed number of rows. The bundled model has real widths."""
    if family != "bundled":
        autoencoder = LARGE[family]()
        autoencoder.chunk = 48
        scorers = ScorerSet(autoencoder, specs_of(family), max_steps=6)
        return scorers.fit(train_images(), labels=train_labels()), 1.5 * tiny.images(IMAGES, seed=2)
    autoencoder = load_autoencoder("fashion-mae")
    specs = [*default_suite(autoencoder), "knn:view=tokens:normalize=false"]
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(60 + IMAGES, 1, 7, 7, generator=draw)
    images = torch.nn.functional.interpolate(coarse, size=autoencoder.input_shape[1:], mode="bilinear") * 2 - 0.5
    return ScorerSet(autoencoder, specs, max_steps=3).fit(Normalised(images[:60])), images[60:]


def assert_one_score(families: Sequence[str]) -> None:
    for family in families:
        for worst, bound in zip(largest_differences(family), (SAME, FEW), strict=True):
            moved = {label: found for label, found in worst.items() if found > bound}
            assert not moved, f"{family}: {moved}, allowed {bound}"


@pytest.mark.parametrize(
    "family",
    [
        "vit",
        "odd",
        "classifier",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("conv", "float64", "bundled")),
    ],
)
def test_any_batch_and_order_give_the_same_score(family: str) -> None:
    assert_one_score([family])


NO_VECTORS = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
OLDER = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize(
    ("processor", "families"),
    [
        pytest.param(NO_VECTORS | OLDER, ["odd"], id="both"),
        pytest.param(
            {"MKL_CBWR": "OFF", "OMP_NUM_THREADS": "1"},
            ["odd"],
            id="MKL used before the import",
            marks=pytest.mark.slow,
        ),
        pytest.param(NO_VECTORS, [*LARGE, "bundled"], id="no vector instructions", marks=pytest.mark.slow),
        pytest.param(OLDER, [*LARGE, "bundled"], id="AVX2", marks=pytest.mark.slow),
    ],
)
def test_any_batch_and_order_give_the_same_score_on_other_processors(
    processor: dict[str, str], families: list[str]
) -> None:
    program = f"import test_contract; test_contract.assert_one_score({families})"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **processor, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_call_gives_the_same_bytes(family: str) -> None:
    torch.manual_seed(123)
    again = fitted(family).score(probe_images()).scores
    for label, values in scored(family).scores.items():
        assert torch.equal(again[label], values), label


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_every_scorer_gives_what_it_gives_in_company(family: str) -> None:
    for spec in specs_of(family):
        label = create(family, spec).label
        alone = ScorerSet(model(family), [spec], max_steps=30).fit(train_images(), labels=train_labels())
        own = alone.score(Normalised(probe_images().images[:3])).scores
        torch.testing.assert_close(own[label], scored(family).scores[label][:3], rtol=SAME, atol=0, msg=label)


@each
def test_label_makes_the_same_scorer(family: str, spec: str) -> None:
    scorer = create_scorer(spec)
    same = create_scorer(scorer.label)
    assert type(same) is type(scorer)
    assert same.options() == scorer.options()
    assert same.label == scorer.label
    assert scorer.label.split(":")[0] == scorer.name


@each
def test_save_and_load(family: str, spec: str, tmp_path: Path) -> None:
    path = tmp_path / "scorer.safetensors"
    scorer_of(family, spec).save(path)
    loaded = create(family, spec).load(path)
    evidence = scored(family).evidence
    torch.testing.assert_close(loaded.score(evidence), scorer_of(family, spec).score(evidence), rtol=0, atol=0)
    other = create_scorer("steps" if loaded.name != "steps" else "first-residual")
    with pytest.raises(TrajOODError, match=r"scorer\.safetensors: expected a scorer file of .*'scorer': '"):
        other.load(path)


@each
def test_unfitted(family: str, spec: str, tmp_path: Path) -> None:
    scorer = create(family, spec)
    text = f"scorer {scorer.name} is not fitted: call fit with ID training images first"
    with pytest.raises(TrajOODError, match=text):
        scorer.save(tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())
    if scorer_of(family, spec).state:
        with pytest.raises(TrajOODError, match=text):
            scorer.score(scored(family).evidence)


@pytest.mark.parametrize(
    ("reader", "steps"), [("trajectory:horizon=2", 2), ("first-residual", 1), ("start-distance", 1)]
)
def test_no_more_of_the_path_is_walked_than_is_read(reader: str, steps: int) -> None:
    alone = ScorerSet(tiny.vit(), [reader]).fit(train_images()).score(probe_images())
    assert int(alone.evidence.path().steps.max()) == steps
    company = ScorerSet(tiny.vit(), [reader, "steps"]).fit(train_images()).score(probe_images())
    assert int(company.evidence.path().steps.max()) > steps
    torch.testing.assert_close(alone.scores[reader], company.scores[reader], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_unfitted_set(family: str) -> None:
    for spec in specs_of(family):
        needs = create_scorer(spec).needs()
        if scorer_of(family, spec).state or needs.distances:
            with pytest.raises(TrajOODError, match="not fitted: call fit with ID training images first"):
                ScorerSet(model(family), [spec]).score(probe_images())


@each
def test_cost_is_a_number_of_evaluations(family: str, spec: str) -> None:
    steps = scored(family).evidence.path().steps.double()
    cost = scorer_of(family, spec).f_evaluations(scored(family).evidence)
    needs = create_scorer(spec).needs()
    assert 0 <= cost <= float(steps.max()) + 2 * needs.divergence
    assert (cost > 0) is (needs.steps > 0)


@pytest.mark.parametrize("spec", SPECS)
def test_fewer_than_two_images_are_refused(spec: str) -> None:
    family = "classifier" if reads_classifier(spec) else "vit"
    with pytest.raises(TrajOODError, match="expected at least 2 ID training images, got 1"):
        ScorerSet(model(family), [spec], max_steps=2).fit(
            Normalised(train_images().images[:1]), labels=train_labels()[:1]
        )


def test_every_scorer_says_what_it_is() -> None:
    for name, cls in SCORERS.items():
        assert cls.name == name
        assert cls.summary
        assert "\n" not in cls.summary
        assert isinstance(cls().needs(), Needs)
        assert cls.__doc__


SUITE = """
    field, field:start_only=true, early-path, early-path:shuffled=true, trajectory, trajectory:horizon=16,
    early-trajectory, early-trajectory:whiten=true, early-trajectory:reference=features,
    early-trajectory:reference=centroids, signature, entry-path, entry-path:parts=step,
    entry-path:parts=step+attractors+static:read=density, alignment, contraction-rate, contraction-rate:two_sided=true,
    path-energy, path-energy:two_sided=true, msma, diffpath, scoped, start-distance, end-distance, first-residual,
    steps, mahalanobis, mahalanobis:normalize=true, ssd, knn, knn-auto, knn-paper, gmm, pca-residual,
    pca-residual:normalize=true, kernel-pca, isolation-forest, lid, feature-norm,
    feature-norm:two_sided=true, reconstruction
"""
VIEWS_OF_SEVERAL_TOKENS = """
    trajectory:view=mean, trajectory:view=cls, start-distance:view=mean, knn:view=cls, knn:view=tokens,
    mahalanobis:view=cls, mahalanobis:view=grid, gmm:view=cls, kernel-pca:view=cls, lid:view=cls
"""


@pytest.mark.parametrize(
    ("make", "further"),
    [
        (tiny.conv, ""),
        (tiny.vit, f"{VIEWS_OF_SEVERAL_TOKENS}, reconstruction:masked=true"),
        (lambda: Classifier(linear=False), "msp, max-logit, gen, energy, nnguide, she:patterns=predicted"),
        (
            Classifier,
            "msp, max-logit, gen, energy, vim, residual, react, ash, scale, fdbd, nci, nnguide, she:patterns=predicted",
        ),
    ],
    ids=["conv", "vit", "classifier", "linear classifier"],
)
def test_the_default_suite_in_its_order(make: Callable[[], Autoencoder], further: str) -> None:
    assert default_suite(make()) == [spec.strip() for spec in f"{SUITE}, {further}".split(",") if spec.strip()]


@pytest.mark.parametrize("make", [tiny.vit, tiny.conv, tiny.toy, Classifier, lambda: Classifier(linear=False)])
def test_default_suite_runs_and_holds_every_registered_scorer(make: Callable[[], Autoencoder]) -> None:
    suite = default_suite(make())
    known = {n: cls().needs() for n, cls in SCORERS.items() if n != "test-only"}
    possible = {n for n, needs in known.items() if not needs.logits or make().classes}
    possible -= {n for n, cls in SCORERS.items() if not cls.suite or (cls().needs().labels and "" in cls.suite)}
    possible -= {n for n, needs in known.items() if needs.head and make().head() is None}
    assert {s.split(":")[0] for s in suite} == possible
    labels = [s.label for s in create_scorers(["all"], make())]
    assert [label.replace(":view=backbone", "") for label in labels] == suite
    assert any("view=backbone" in label for label in labels) is bool(make().feature_dim)
    scorers = ScorerSet(make(), ["all"], max_steps=4).fit(Normalised(tiny.images(12, make().input_shape)))
    assert all(
        v.isfinite().all() for v in scorers.score(Normalised(tiny.images(3, make().input_shape))).scores.values()
    )


def test_a_view_that_is_given_is_kept_on_a_model_with_a_backbone() -> None:
    for spec in ("knn: k=3 : view = mean", "knn:view=mean:k=3"):
        assert [s.label for s in create_scorers([spec], Classifier())] == ["knn:k=3"]
    assert [s.label for s in create_scorers([" knn: k=3"], Classifier())] == ["knn:view=backbone:k=3"]


# ---------------------------------------------------------------------------------------------- sign


def toy_images(count: int, seed: int, centre: float, spread: float = 0.05) -> Tensor:
    return centre + spread * tiny.images(count, (1, 2, 2), seed)


SIGNED = [
    s
    for s in SPECS
    # What has a direction of its own: slow, short, past the attractor.
    if s not in ("steps", "feature-norm", "contraction-rate", "alignment")
    and "masked" not in s
    and "cls" not in s
    and not reads_classifier(s)
]


@pytest.mark.parametrize("spec", SIGNED)
def test_far_images_score_higher(spec: str) -> None:
    # Training images in the basin of (1, 1, 1, 1); the others start far out in that of (−1, −1, −1, −1).
    scorers = ScorerSet(tiny.toy(), [spec]).fit(Normalised(toy_images(20, 1, 1.0)), labels=torch.arange(20) % 2)
    (near,) = scorers.score(Normalised(toy_images(10, 2, 1.0))).scores.values()
    (far,) = scorers.score(Normalised(toy_images(10, 3, -9.0))).scores.values()
    assert near.max() < far.min()


def path_of(steps: list[int], status: list[int]) -> Evidence:
    width = max(steps)
    distances = torch.full((len(steps), width + 1), torch.nan, dtype=torch.float64)
    for b, n in enumerate(steps):
        distances[b, : n + 1] = torch.linspace(2.0, 1.0, n + 1)
    residuals = distances[:, 1:].square()
    measures = {"distance/tokens": distances}
    return Evidence(
        trajectory=Trajectory(
            torch.tensor(steps), torch.tensor(status), residuals, torch.zeros(len(steps), 2), measures
        )
    )


def test_steps_counts_samples_that_never_settle_as_slowest() -> None:
    evidence = path_of([5, 50, 3], [Status.CONVERGED, Status.STEP_LIMIT, Status.NON_FINITE])
    scores = create_scorer("steps").score(evidence)
    assert scores[0] < scores[1]
    assert scores[0] < scores[2], "a diverging trajectory did not converge: it must not count as a fast one"


# ---------------------------------------------------------------------------------------------- exact values


def toy_run(specs: list[str], tol: float = 1e-5) -> tuple[Tensor, Tensor, Scored]:
    train, test = toy_images(15, 1, 0.3, 0.8), toy_images(12, 2, -0.2, 1.0)
    scorers = ScorerSet(tiny.toy(), specs, tol=tol).fit(Normalised(train))
    return train.flatten(1).double(), test.flatten(1).double(), scorers.score(Normalised(test))


def follow(z: Tensor, tol: float) -> list[Tensor]:
    """The trajectory of one point in float64, by the definition."""
    points = [z]
    while True:
        clamped = points[-1].clamp(-1.5, 1.5)
        points.append(clamped + 0.3 * (clamped - clamped**3))
        if len(points) > 2 and float((points[-1] - points[-2]).square().sum()) < tol:
            return points


def test_trajectory_and_controls_against_a_float64_loop() -> None:
    tol = 1e-5
    specs = ["trajectory", "trajectory:horizon=2", "trajectory:horizon=60", "start-distance", "end-distance"]
    train, test, result = toy_run([*specs, "first-residual", "steps"], tol)
    attractors = torch.stack([follow(z, tol)[-1] for z in train])
    for b, z in enumerate(test):
        points = follow(z, tol)
        distances = [float((attractors - p).norm(dim=1).min()) for p in points]
        padded = distances + [distances[-1]] * 61
        expected = {
            "trajectory": np.mean(distances),
            "trajectory:horizon=2": np.mean(padded[:3]),
            "trajectory:horizon=60": np.mean(padded[:61]),
            "start-distance": distances[0],
            "end-distance": distances[-1],
            "first-residual": float((points[1] - points[0]).norm()),
            "steps": len(points) - 1,
        }
        for label, value in expected.items():
            assert float(result.scores[label][b]) == pytest.approx(value, rel=1e-4, abs=2e-6), label


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 5, 15])
def test_knn_against_scikit_learn(k: int, normalize: bool) -> None:
    from sklearn.neighbors import NearestNeighbors

    spec = f"knn:view=tokens:k={k}:normalize={str(normalize).lower()}"
    train, test, result = toy_run([spec, spec + ":reduce=mean"])
    if normalize:
        train, test = (t / t.norm(dim=1, keepdim=True) for t in (train, test))
    distances = NearestNeighbors(n_neighbors=k).fit(train.numpy()).kneighbors(test.numpy())[0]
    kth, mean = result.scores.values()
    np.testing.assert_allclose(kth.numpy(), distances[:, -1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean.numpy(), distances.mean(axis=1), rtol=1e-5, atol=1e-6)


def test_paper_knn_is_the_mean_distance_to_all() -> None:
    train, test, result = toy_run(["knn-paper"])
    expected = torch.cdist(test, train, compute_mode="donot_use_mm_for_euclid_dist").mean(dim=1)
    torch.testing.assert_close(result.scores["knn-paper"], expected, rtol=1e-5, atol=1e-6)


def test_mahalanobis_against_scikit_learn() -> None:
    from sklearn.covariance import LedoitWolf

    train, test, result = toy_run(["mahalanobis"])
    expected = np.sqrt(LedoitWolf().fit(train.float().double().numpy()).mahalanobis(test.numpy()))
    np.testing.assert_allclose(result.scores["mahalanobis"].numpy(), expected, rtol=1e-5)


def test_mahalanobis_on_pooled_tokens() -> None:
    from sklearn.covariance import LedoitWolf

    autoencoder = model("vit")
    pooled = [
        autoencoder.encode(x.images)[:, 1:].mean(dim=1).double().numpy() for x in (train_images(), probe_images())
    ]
    expected = np.sqrt(LedoitWolf().fit(pooled[0]).mahalanobis(pooled[1]))
    np.testing.assert_allclose(scored("vit").scores["mahalanobis"].numpy(), expected, rtol=1e-5)


def test_reconstruction_by_hand() -> None:
    _, test, result = toy_run(["reconstruction"])
    clamped = test.clamp(-1.5, 1.5)
    expected = (test - clamped - 0.3 * (clamped - clamped**3)).square().mean(dim=1)
    torch.testing.assert_close(result.scores["reconstruction"], expected, rtol=1e-4, atol=1e-7)


def test_masked_reconstruction_is_the_models() -> None:
    expected = model("vit").reconstruct_masked(probe_images().images)
    torch.testing.assert_close(scored("vit").scores["reconstruction:masked=true"], expected, rtol=1e-6, atol=0)


def test_masked_reconstruction_needs_masks() -> None:
    with pytest.raises(TrajOODError, match="has no masked reconstruction: only masked autoencoders do"):
        ScorerSet(model("conv"), ["reconstruction:masked=true"]).fit(train_images()).score(probe_images())


# ---------------------------------------------------------------------------------------------- what a model lacks


@pytest.mark.parametrize("spec", [s for s in SPECS if reads_classifier(s)])
def test_scorers_of_a_classifier_need_one(spec: str) -> None:
    with pytest.raises(
        TrajOODError, match=rf"scorer {spec}: reads the .* of a .*, and vit-mae \(vit_mae\) has none: use"
    ):
        ScorerSet(model("vit"), [spec])


def test_vim_needs_a_linear_classifier() -> None:
    text = "scorer vim: needs a linear classifier over the features, and tiny-classifier declares none: leave"
    with pytest.raises(TrajOODError, match=text):
        ScorerSet(Classifier(linear=False), ["vim"])
    ScorerSet(Classifier(linear=False), ["msp", "max-logit", "energy"])


def test_class_conditional_scorers_need_labels() -> None:
    scorers = ScorerSet(model("vit"), ["knn:k=2", "mahalanobis:classes=true"])
    text = "scorer mahalanobis:classes=true: expected class labels of the training images, got none"
    with pytest.raises(TrajOODError, match=text):
        scorers.fit(train_images())


# ---------------------------------------------------------------------------------------------- life


def test_knn_that_loads_a_file_forgets_its_former_training_set(tmp_path: Path) -> None:
    def features(seed: int) -> Evidence:
        return Evidence(features={"mean": tiny.images(20, (1, 1, 8), seed).flatten(1)})

    KNN().fit(features(1)).save(tmp_path / "one.safetensors")
    scorer = KNN()
    scorer.fit(features(2))
    other = scorer.score(features(3))
    expected = KNN().fit(features(1)).score(features(3))
    assert not torch.allclose(expected, other)
    assert torch.equal(scorer.load(tmp_path / "one.safetensors").score(features(3)), expected)


def test_refit_replaces(tmp_path: Path) -> None:
    scorers = ScorerSet(model("conv"), ["trajectory", "knn:k=2", "mahalanobis"], max_steps=5)
    scorers.fit(train_images())
    scorers.score(probe_images())
    second = scorers.fit(probe_images()).score(train_images()).scores
    fresh = ScorerSet(model("conv"), ["trajectory", "knn:k=2", "mahalanobis"], max_steps=5).fit(probe_images())
    for label, values in fresh.score(train_images()).scores.items():
        torch.testing.assert_close(values, second[label], rtol=SAME, atol=0, msg=label)


def test_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    for write in (lambda: None, lambda: path.write_bytes(b"rubbish")):
        write()
        with pytest.raises(TrajOODError, match=r"s\.safetensors: not a readable scorer file"):
            create_scorer("knn").load(path)


def test_other_options_are_another_file(tmp_path: Path) -> None:
    scorer_of("vit", "knn").save(tmp_path / "s.safetensors")
    with pytest.raises(TrajOODError, match="expected a scorer file of"):
        create_scorer("knn:k=5").load(tmp_path / "s.safetensors")


def test_pass_without_a_trajectory() -> None:
    with pytest.raises(TrajOODError, match="this scorer reads the trajectory, but the pass did not iterate f"):
        create_scorer("steps").score(Evidence())


def test_images_of_the_wrong_shape() -> None:
    with pytest.raises(TrajOODError, match=r"vit-mae: expected float images \(B, 1, 8, 8\)"):
        fitted("vit").score(Normalised(torch.zeros(2, 3, 8, 8)))


def test_model_that_leaves_the_finite_numbers() -> None:
    from traj_ood.autoencoders import CallableAutoencoder

    broken = CallableAutoencoder(lambda x: x.flatten(1), lambda z: z.reshape(-1, 1, 2, 2) * 1e30, (1, 2, 2), chunk=4)
    with pytest.raises(TrajOODError, match="every training trajectory became NaN or infinite"):
        ScorerSet(broken, ["trajectory"]).fit(Normalised(torch.full((3, 1, 2, 2), torch.finfo().max / 1e20)))
    # One step is finite, the second is not: the path up to there still has a score
    scores = ScorerSet(broken, ["first-residual", "steps"]).fit(torch.ones(3, 1, 2, 2)).score(torch.ones(3, 1, 2, 2))
    assert len(scores.scores["steps"]) == 3
    # f(z0) is not finite for the whole batch: scores say so, none is invented, nothing crashes
    scores = (
        ScorerSet(broken, ["first-residual"])
        .fit(torch.ones(3, 1, 2, 2))
        .score(Normalised(torch.full((2, 1, 2, 2), 1e37)))
    )
    assert scores.scores["first-residual"].isnan().all()


def test_one_diverging_image_does_not_stop_the_others() -> None:
    from traj_ood.autoencoders import CallableAutoencoder

    def decode(z: Tensor) -> Tensor:  # small latents shrink, large ones double without end
        return torch.where(z.abs() > 5, 2 * z, 0.5 * z).reshape(-1, 1, 2, 2)

    split = CallableAutoencoder(lambda x: x.flatten(1), decode, (1, 2, 2), chunk=4)
    specs = ["trajectory", "end-distance", "start-distance", "steps"]
    scorers = ScorerSet(split, specs).fit(Normalised(tiny.images(6, (1, 2, 2))))
    good, bad = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), 6.0)
    alone, together = scorers.score(Normalised(good)), scorers.score(Normalised(torch.cat([bad, good])))
    assert together.evidence.path().status.tolist() == [Status.NON_FINITE, Status.CONVERGED]
    for label, values in alone.scores.items():
        torch.testing.assert_close(values[0], together.scores[label][1], rtol=SAME, atol=0, msg=label)


# ---------------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("knnn", "unknown scorer 'knnn': did you mean 'knn"),
        ("trajektory", "unknown scorer 'trajektory': did you mean 'trajectory'"),
        ("", "unknown scorer ''"),
        ("knn:kk=5", r"unknown option of scorer knn 'kk': (did you mean 'k'\? )?Known: k, normalize, reduce, view"),
        ("steps:k=5", "unknown option of scorer steps 'k'"),
        ("knn:k", "scorer 'knn:k': expected options as key=value, got 'k'"),
        ("knn:", "scorer 'knn:': expected options as key=value, got ''"),
        ("knn:k=five", "scorer knn, option k: expected int.*, got 'five'"),
        ("knn:k=1.5", "scorer knn, option k: expected int.*, got '1.5'"),
        ("knn:k=0", "scorer knn: k must be at least 1, got 0"),
        ("knn:k=-3", "scorer knn: k must be at least 1, got -3"),
        ("knn:reduce=men", "unknown reduce of scorer knn 'men': did you mean 'mean'"),
        ("knn:normalize=yes", "scorer knn, option normalize: expected true or false, got 'yes'"),
        ("knn:view=token", "unknown view of scorer knn 'token': did you mean 'tokens'"),
        ("trajectory:view=all", "unknown view of scorer trajectory 'all'"),
        ("trajectory:horizon=long", "scorer trajectory, option horizon: expected int.*, got 'long'"),
        ("trajectory:horizon=-1", "horizon.*-1"),
        ("reconstruction:masked=none", "scorer reconstruction, option masked: expected true or false, got 'none'"),
        ("mahalanobis:covariance=empiric", "unknown covariance of scorer mahalanobis 'empiric': did you mean 'empiri"),
        ("mahalanobis:classes=10", "scorer mahalanobis, option classes: expected true or false, got '10'"),
        ("energy:temperature=0", "scorer energy: temperature must be above 0, got 0.0"),
        ("energy:temperature=nan", "scorer energy, option temperature: expected float, got 'nan'"),
        ("vim:dim=0", "scorer vim: dim must be at least 1, got 0"),
    ],
)
def test_bad_specs(spec: str, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        create_scorer(spec)


def test_an_option_is_given_once() -> None:
    with pytest.raises(TrajOODError, match="scorer 'knn:k=3:k=4': option k is given twice: leave one out"):
        create_scorer("knn:k=3:k=4")


def test_lists_of_scorers() -> None:
    autoencoder = model("vit")
    with pytest.raises(TrajOODError, match="scorers: expected at least one, got none"):
        create_scorers([], autoencoder)
    with pytest.raises(TrajOODError, match=r"scorers: expected a list of names, got the text 'knn': give \['knn'\]"):
        create_scorers("knn", autoencoder)
    for specs in (["knn", "knn"], ["knn", "steps", "knn:k=10"], ["all", "trajectory"], ["knn:k=5:view=cls"] * 2):
        with pytest.raises(TrajOODError, match=r"scorers: (knn|trajectory)\S* is listed twice"):
            create_scorers(specs, autoencoder)
    with pytest.raises(TrajOODError, match="is listed twice"):
        create_scorers(["knn:k=5:view=cls", "knn:view=cls:k=5"], autoencoder)
    assert [s.label for s in create_scorers([" knn ", "knn:k=3"], autoencoder)] == ["knn", "knn:k=3"]


@pytest.mark.parametrize("spec", ["knn:k=15", "knn-paper:k=15", "knn:k=2000:reduce=mean"])
def test_k_larger_than_the_training_set(spec: str) -> None:
    k = create_scorer(spec).options()["k"]
    with pytest.raises(TrajOODError, match=f"k = {k} neighbours, but only 14 training images: use more .* or k <= 14"):
        ScorerSet(model("conv"), [spec], max_steps=2).fit(train_images())
    ScorerSet(model("conv"), ["knn:k=14"]).fit(train_images())


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type[Scorer]]]:
    before = dict(SCORERS)
    yield SCORERS
    SCORERS.clear()
    SCORERS.update(before)


def test_a_registered_scorer_works_by_name(registry: dict[str, type[Scorer]]) -> None:
    @register
    @dataclass
    class Brightness(Scorer):
        """Mean of the latent."""

        name: ClassVar[str] = "test-only"
        summary: ClassVar[str] = "mean of the latent"
        gain: float = 1.0

        def needs(self) -> Needs:
            return Needs(features=frozenset({"tokens"}))

        def score(self, evidence: Evidence) -> Tensor:
            return self.gain * evidence.features["tokens"].double().mean(dim=1)

    images = torch.stack([torch.ones(1, 2, 2), torch.zeros(1, 2, 2)])
    result = ScorerSet(tiny.toy(), ["test-only:gain=2.5"]).fit(images).score(torch.ones(3, 1, 2, 2))
    assert result.scores["test-only:gain=2.5"].tolist() == [2.5] * 3
    with pytest.raises(TrajOODError, match="scorer test-only, option gain: expected float, got 'x'"):
        create_scorer("test-only:gain=x")


def test_duplicate_registration_is_refused(registry: dict[str, type[Scorer]]) -> None:
    other = type("Other", (KNN,), {})
    with pytest.raises(TrajOODError, match=r"scorer name 'knn' is taken by KNN of .*knn: choose another"):
        register(other)
    assert registry["knn"] is KNN


def test_a_class_of_the_same_name_elsewhere_is_another_class(registry: dict[str, type[Scorer]]) -> None:
    other: Any = type("KNN", (KNN,), {"__module__": "somebody.elses", "__qualname__": "KNN"})
    with pytest.raises(TrajOODError, match="scorer name 'knn' is taken by"):
        register(other)
    assert registry["knn"] is KNN


def test_registering_a_class_again_is_harmless(registry: dict[str, type[Scorer]]) -> None:
    assert register(KNN) is KNN


def test_needs_add_up() -> None:
    both = create_scorer("knn").needs() | create_scorer("trajectory:view=cls").needs()
    assert both == Needs(features=frozenset({"mean"}), distances=frozenset({"cls"}), steps=WHOLE_PATH)
    assert replace(both, steps=3) | Needs(steps=WHOLE_PATH) == both


@pytest.mark.parametrize("spec", ["knn", "knn-auto", "knn-paper", "lid", "alignment", "early-trajectory", "trajectory"])
def test_an_image_without_finite_latents_has_no_score_and_the_others_keep_theirs(spec: str) -> None:
    weight = torch.linalg.qr(torch.randn(64, 6, generator=torch.Generator().manual_seed(0))).Q

    def encode(x: Tensor) -> Tensor:
        return torch.where((x.flatten(1).mean(1) > 0.9)[:, None], torch.nan, x.flatten(1) @ weight)

    model = CallableAutoencoder(encode, lambda z: (0.9 * z @ weight.T).reshape(-1, 1, 8, 8), (1, 8, 8), chunk=6)
    train, test = 0.8 * torch.rand(2, 40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    detector = Detector.fit(model, train, spec)
    whole = detector.score(test)
    test[30] = 1
    found = detector.score(test)
    assert found[30] == torch.inf
    rest = torch.arange(40) != 30
    torch.testing.assert_close(found[rest], whole[rest], rtol=SAME, atol=0)


def test_the_trajectory_is_the_same_whatever_else_is_scored() -> None:
    model = CallableAutoencoder(
        lambda x: 2 * x.flatten(1),
        lambda z: torch.where(z.abs() > 1.9, 1e3 * z, 0.45 * z).reshape(-1, 1, 8, 8),
        (1, 8, 8),
        chunk=6,
    )
    images = 0.5 * torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images[3:5, 0, 0, 0] = 0.97  # leaves the finite numbers after some steps
    alone, company = (
        ScorerSet(model, specs, max_steps=40).fit(images) for specs in (["trajectory"], ["trajectory", "early-path"])
    )
    assert alone.dictionary is not None
    assert company.dictionary is not None
    assert alone.dictionary.statuses[3] == Status.NON_FINITE
    torch.testing.assert_close(alone.dictionary.points, company.dictionary.points, rtol=0, atol=0)
    assert alone.dictionary.health() == company.dictionary.health()
    final = company.score(images[3:4]).evidence.path().final
    assert bool(final.isfinite().all())


def test_a_source_of_encodings_may_use_one_buffer() -> None:
    model = tiny.conv()
    images, buffer = tiny.images(60, seed=3), torch.empty(10, 1, 8, 8)

    def encodings() -> Iterator[Encoding]:
        for part in images.split(10):
            buffer.copy_(part)
            yield model.examine(buffer)

    for reader in ("reconstruction", "entry-path"):
        scorers = ScorerSet(model, [reader, "trajectory"], max_steps=9).fit(train_images())
        found = list(scorers.score_all(encodings()))
        for label, expected in scorers.score(Normalised(images)).scores.items():
            torch.testing.assert_close(torch.cat([s.scores[label] for s in found]), expected, rtol=SAME, atol=0)


def test_what_is_no_stream_of_encodings_is_named() -> None:
    scorers = fitted("conv")
    with pytest.raises(TrajOODError, match="encodings: expected several, such as a list or generator, got one"):
        list(scorers.score_all(model("conv").examine(tiny.images(3))))  # type: ignore[arg-type]
    with pytest.raises(TrajOODError, match=r"encodings: expected results of autoencoder\.examine.*, got Tensor"):
        list(scorers.score_all([tiny.images(3)]))  # type: ignore[list-item]
    with pytest.raises(TrajOODError, match="ids: expected a name for each of 14 images, got 1"):
        ScorerSet(model("conv"), ["knn"]).fit(train_images(), ids=["a"])
    names = np.array([f"image {number}" for number in range(14)])  # whose truth value is ambiguous
    dictionary = ScorerSet(model("conv"), ["trajectory"], max_steps=4).fit(train_images(), ids=names).dictionary  # type: ignore[arg-type]
    assert dictionary is not None
    assert dictionary.ids == tuple(names.tolist())
    with pytest.raises(TrajOODError, match="labels: expected 14 whole numbers or texts, one per image, got 1 of int"):
        ScorerSet(model("conv"), ["mahalanobis:classes=true"]).fit(train_images(), labels=3)  # type: ignore[arg-type]
