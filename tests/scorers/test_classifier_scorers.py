"""GEN, ReAct, ASH, SCALE, fDBD, NCI, NNGuide, SHE and the residual against pytorch-ood, OpenOOD and their formulas."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy.special import logsumexp, softmax
from torch import Tensor, nn

from traj_ood import Detector
from traj_ood.autoencoders import SurrogateAutoencoder, SurrogateNetwork
from traj_ood.backbones import CallableBackbone, Features
from traj_ood.errors import TrajOODError
from traj_ood.scorers import Evidence, create_scorer
from traj_ood.scorers.labels import class_numbers
from traj_ood.scorers.scorer_set import ScorerSet

WIDTH, CLASSES = 24, 5


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood is not installed")


@pytest.fixture
def openood() -> Any:
    return pytest.importorskip("openood.postprocessors", reason="OpenOOD is not installed")


def linear() -> nn.Linear:
    generator = torch.Generator().manual_seed(5)
    head = nn.Linear(WIDTH, CLASSES).double()
    head.weight.data = torch.randn(CLASSES, WIDTH, generator=generator).double()
    head.bias.data = torch.randn(CLASSES, generator=generator).double()
    return head.requires_grad_(False)


def evidence(count: int, seed: int) -> Evidence:
    """Non-negative features whose logits are exact: float64."""
    generator = torch.Generator().manual_seed(seed)
    features = (torch.randn(count, WIDTH, generator=generator) * torch.arange(1, WIDTH + 1) ** -0.5 + 0.3).relu()
    head = linear()
    logits = head(features.double())
    wrong = torch.rand(count, generator=generator) < 0.2
    labels = torch.where(wrong, (logits.argmax(dim=1) + 1) % CLASSES, logits.argmax(dim=1))
    return Evidence({"backbone": features}, logits=logits, head=(head.weight, head.bias), labels=labels)


TRAIN, TEST = evidence(300, 0), evidence(60, 1)


def ours(spec: str) -> Tensor:
    return create_scorer(spec).fit(TRAIN).score(TEST)


def parts() -> tuple[np.ndarray, ...]:
    """Training features, test features, their logits, weight and bias in float64."""
    head = linear()
    x, z = (e.features["backbone"].double().numpy() for e in (TRAIN, TEST))
    return x, z, TRAIN.logits.numpy(), TEST.logits.numpy(), head.weight.numpy(), head.bias.numpy()  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------- formulas


def by_formula(name: str) -> np.ndarray:
    x, z, known, f, w, b = parts()
    guess = f.argmax(axis=1)

    def shaped(percentile: float, how: str) -> np.ndarray:
        kept = WIDTH - round(WIDTH * percentile / 100)
        rows = []
        for row in z:
            order = np.argsort(-row)[:kept]
            factor = np.exp(row.sum() / row[order].sum())
            new = np.zeros_like(row)
            new[order] = {"s": row[order] * factor, "p": row[order], "b": row.sum() / kept}.get(how, 0)
            rows.append(row * factor if how == "scale" else new)
        return -logsumexp(np.stack(rows) @ w.T + b, axis=1)

    if name == "gen:top=3":
        p = np.sort(softmax(f, axis=1), axis=1)[:, -3:]
        return (p**0.1 * (1 - p) ** 0.1).sum(axis=1)
    if name == "react":
        return -logsumexp(np.minimum(z, np.percentile(x, 90)) @ w.T + b, axis=1)
    if name.startswith("ash"):
        return shaped(90, name[-1])
    if name == "scale":
        return shaped(85, "scale")
    if name.startswith("fdbd"):
        far = [
            np.mean([abs(f[i, g] - f[i, c]) / np.linalg.norm(w[g] - w[c]) for c in range(CLASSES) if c != g])
            for i, g in enumerate(guess)
        ]
        return -np.array(far) / np.linalg.norm(z - (0 if "norm" in name else x.mean(axis=0)), axis=1)
    if name == "nci":
        offsets = z - x.mean(axis=0)
        return -(w[guess] * offsets).sum(axis=1) / np.linalg.norm(offsets, axis=1) - 1e-4 * abs(z).sum(axis=1)
    if name == "nnguide":
        bank = x / np.linalg.norm(x, axis=1)[:, None] * logsumexp(known, axis=1)[:, None]
        similar = np.sort(z / np.linalg.norm(z, axis=1)[:, None] @ bank.T, axis=1)[:, -10:]
        return -similar.mean(axis=1) * logsumexp(f, axis=1)
    if name.startswith("she"):
        labels = known.argmax(axis=1) if "predicted" in name else np.asarray(TRAIN.labels)
        right = known.argmax(axis=1) == labels
        patterns = np.stack([x[right & (labels == c)].mean(axis=0) for c in range(CLASSES)])
        return -(z * patterns[guess]).sum(axis=1)
    origin = -np.linalg.pinv(w) @ b
    _, vectors = np.linalg.eigh((x - origin).T @ (x - origin))
    return np.linalg.norm((z - origin) @ vectors[:, : WIDTH - 6], axis=1)


SPECS = [
    "gen:top=3",
    "react",
    "ash",
    "ash:variant=b",
    "ash:variant=p",
    "scale",
    "fdbd",
    "fdbd:regularizer=norm",
    "nci",
    "nnguide",
    "she",
    "she:patterns=predicted",
    "residual:dim=6",
]


@pytest.mark.parametrize("spec", SPECS)
def test_formula_in_numpy(spec: str) -> None:
    name = "ash:variant=s" if spec == "ash" else spec
    np.testing.assert_allclose(ours(spec).numpy(), by_formula(name), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------- pytorch-ood


def theirs(library: Any, name: str) -> tuple[Tensor, Tensor]:
    """(ours, pytorch-ood's) scores."""
    head, x, z = linear(), TRAIN.features["backbone"].double(), TEST.features["backbone"].double()
    one = lambda t: t[:, :, None, None]  # noqa: E731
    flat = lambda t: head(t.flatten(1))  # noqa: E731
    if name == "gen":
        return ours("gen") / CLASSES, library.GEN(None).predict_logits(TEST.logits)
    if name == "react":
        fitted = library.ReAct(None, flat).fit_feature_maps(one(x), torch.zeros(len(x)))
        return ours("react"), fitted.predict_feature_maps(one(z))
    if name.startswith("ash"):
        detector = library.ASH(None, flat, percentile=0.9, variant=f"ash-{name[-1]}")
        return ours(name), detector.predict_feature_maps(one(z))
    if name == "scale":
        return ours("scale"), library.SCALE(None, flat, percentile=0.85).predict_feature_maps(one(z))
    labels = TRAIN.labels
    made = {
        "fdbd": lambda: library.fDBD(None, head.float()),
        "nci": lambda: library.NCI(None, head.float(), alpha=1e-4),
        "nnguide": lambda: library.NNGuide(None, head.float()),
        "she": lambda: library.SHE(None, head.float()),
    }[name]()
    return ours(name), made.fit_features(x.float(), labels).predict_features(z.float()).double()


@pytest.mark.parametrize("name", ["gen", "react", *(f"ash:variant={v}" for v in "sbp"), "scale"])
def test_pytorch_oods_in_float64(name: str, library: Any) -> None:
    mine, other = theirs(library, name)
    torch.testing.assert_close(mine, other.double(), rtol=1e-6, atol=1e-9)  # GEN clamps p to 1e-7


@pytest.mark.parametrize("name", ["fdbd", "nci", "nnguide", "she"])
def test_pytorch_oods_in_float32(name: str, library: Any) -> None:
    mine, other = theirs(library, name)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- OpenOOD


class Net(nn.Module):
    """As OpenOOD's networks: logits, and features where they are asked for; the input is the features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = linear()

    def forward(self, x: Tensor, return_feature: bool = False) -> Any:
        logits = self.fc(x)
        return (logits, x) if return_feature else logits

    def get_fc_layer(self) -> nn.Module:
        return self.fc


SHAPING = {"ash": "ASHNet", "scale": "ScaleNet", "react": "ReactNet"}


def openood_confidence(library: Any, name: str) -> Tensor:
    x, z, net = TRAIN.features["backbone"].double(), TEST.features["backbone"].double(), Net()
    weight = net.fc.weight

    def made(kind: str, **attributes: Any) -> Any:
        found = object.__new__(getattr(library, kind))
        found.__dict__.update(attributes)
        return found

    if name == "gen":
        return made("GENPostprocessor", gamma=0.1, M=100).postprocess(net, z)[1]
    if name in ("ash", "scale", "react"):
        wrapped = getattr(import_module(f"openood.networks.{name}_net"), SHAPING[name])
        given = {"ash": 90, "scale": 85, "react": float(np.percentile(x.numpy(), 90))}[name]
        return torch.logsumexp(wrapped(net).forward_threshold(z.clone(), given), dim=1)
    if name == "fdbd":
        between = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(1)
        state = {"train_mean": x.mean(dim=0), "denominator_matrix": between, "num_classes": CLASSES}
        return made("fDBDPostprocessor", distance_as_normalizer=True, **state).postprocess(net, z)[1] / (CLASSES - 1)
    if name == "nci":
        return made("NCIPostprocessor", w=weight, train_mean=x.mean(dim=0), alpha=1e-4).postprocess(net, z)[1]
    predicted = net(x).argmax(dim=1)
    right = predicted == TRAIN.labels
    patterns = torch.stack([x[right & (predicted == c)].mean(dim=0) for c in range(CLASSES)])
    args = SimpleNamespace(metric="inner_product")
    return made("SHEPostprocessor", activation_log=patterns, args=args).postprocess(net, z)[1]


@pytest.mark.parametrize("name", ["gen", "ash", "scale", "react", "fdbd", "nci", "she"])
def test_openoods(name: str, openood: Any) -> None:
    spec = "ash:variant=b" if name == "ash" else name
    torch.testing.assert_close(ours(spec), -openood_confidence(openood, name), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------- edges


def test_gen_keeps_the_order_of_confident_images() -> None:
    lead = torch.tensor([40.0, 80.0, 160.0], dtype=torch.float64)  # 1 − p is 0 in float64 from the first on
    sure = torch.stack([lead, torch.zeros(3), torch.zeros(3)], dim=1)
    scores = create_scorer("gen").fit(Evidence()).score(Evidence(logits=sure))
    assert bool((scores.diff() < 0).all())
    assert bool((scores > 0).all())


def test_features_without_activation_or_of_both_signs_have_a_score() -> None:
    dead = torch.zeros(1, WIDTH)
    mixed = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(2))
    for spec in ("ash", "scale", "ash:variant=b", "react"):
        scores = create_scorer(spec).fit(TRAIN).score(Evidence({"backbone": torch.cat([dead, mixed])}))
        assert bool(scores.isfinite().all()), spec
    assert float(scores[0]) == pytest.approx(float(-linear().bias.logsumexp(dim=0)))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("react:percentile=100", "scorer react: percentile must be at least 0 and below 100, got 100.0"),
        ("ash:variant=x", "unknown variant of scorer ash 'x'"),
        ("scale:percentile=-1", "scorer scale: percentile must be at least 0"),
        ("gen:gamma=0", "scorer gen: gamma must be above 0, got 0.0"),
        ("gen:top=0", "scorer gen: top must be at least 1, got 0"),
        ("nci:alpha=-1", "scorer nci: alpha must be at least 0, got -1.0"),
        ("nnguide:k=0", "scorer nnguide: k must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(spec: str, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        create_scorer(spec)


def test_she_refuses_labels_that_do_not_number_the_classifiers_classes() -> None:
    for labels, got in (
        (TRAIN.labels + 7, "labels that are no numbers of these"),  # type: ignore[operator]
        ((TRAIN.labels + 2) % CLASSES, f"[0-9]+ of {len(TRAIN.labels)} right"),  # type: ignore[operator, arg-type]
    ):
        shuffled = Evidence(TRAIN.features, logits=TRAIN.logits, labels=labels)
        words = f"scorer she: expected labels that number the classifier's 5 classes, got {got}: give the labels"
        with pytest.raises(TrajOODError, match=words):
            create_scorer("she").fit(shuffled)


@pytest.mark.parametrize(
    ("classes", "names"),
    [((0, 1, 3), {0: "00", 1: "01", 3: "03"}), ((0, 1, 2, 3), {0: "airplane", 1: "bird", 2: "cat", 3: "dog"})],
)
def test_she_takes_numbers_and_names_in_the_order_of_the_classifiers_classes(
    classes: tuple[int, ...], names: dict[int, str]
) -> None:
    model = SurrogateAutoencoder(quadrants(), SurrogateNetwork(4, hidden=[8], bottleneck=2))
    labels = [classes[i % len(classes)] for i in range(24)]
    images = 0.1 * tiny.images(24, (1, 2, 2)).sigmoid()
    images.flatten(1)[torch.arange(24), torch.tensor(labels)] += 0.9 - 0.01 * torch.arange(24)
    expected = torch.zeros(4, 4, dtype=torch.float64)  # the classifier is right on all images
    for c in classes:
        expected[c] = images.flatten(1)[torch.tensor(labels) == c].double().mean(dim=0)
    for given in (labels, np.array(labels), torch.tensor(labels), [names[c] for c in labels]):
        for fitted in (
            ScorerSet(model, ["she"]).fit(images, labels=given).scorers[0],
            Detector.fit(model, images, "she", labels=given).scorer,
        ):
            torch.testing.assert_close(fitted.state["patterns"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("names", [("airplane", "bird", "dog"), ("1", "2", "4"), ("-1", "0", "1")])
def test_she_refuses_names_of_which_it_is_unknown_which_classes_they_are(names: tuple[str, ...]) -> None:
    model = SurrogateAutoencoder(quadrants(), SurrogateNetwork(4, hidden=[8], bottleneck=2))
    labels = [names[i % 3] for i in range(24)]
    images = 0.1 * tiny.images(24, (1, 2, 2)).sigmoid()
    images.flatten(1)[torch.arange(24), torch.tensor([0, 1, 3] * 8)] += 0.9 - 0.01 * torch.arange(24)
    with pytest.raises(TrajOODError, match="scorer she: expected labels that number the classifier's 4 classes"):
        ScorerSet(model, ["she"]).fit(images, labels=labels)
    ScorerSet(model, ["rmds"]).fit(images, labels=labels)  # which classes they are does not matter to it


def test_numbers_are_numbers_however_they_are_written() -> None:
    assert class_numbers(["003", "000"], 2, 4).tolist() == [3, 0]
    assert class_numbers(["9" * 5000, "2"], 2).tolist() == [1, 0]  # no number


def quadrants() -> CallableBackbone:
    """A classifier of (1, 2, 2) images by their brightest pixel, whose features are the pixels."""
    pixels, module = lambda x: Features(x.flatten(1), x.flatten(1)), nn.Identity()
    return CallableBackbone(pixels, (1, 2, 2), 4, classes=4, module=module)


def test_fdbd_refuses_classes_of_the_same_weights() -> None:
    weight = torch.ones(3, WIDTH)
    twins = Evidence(TRAIN.features, logits=TRAIN.logits, head=(weight, torch.arange(3.0)))
    with pytest.raises(TrajOODError, match="scorer fdbd: expected a different weight vector for each class"):
        create_scorer("fdbd").fit(twins)


def test_nnguide_of_too_few_images() -> None:
    with pytest.raises(TrajOODError, match="scorer nnguide: k = 10 neighbours, but only 4 training images"):
        create_scorer("nnguide").check_training_size(4)
