"""MSP, max-logit, energy and ViM against pytorch-ood, and against their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers import Energy, Evidence, MaxLogit, MaxSoftmax, ViM

detector = pytest.fixture(lambda: pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood is not installed"))


def logits(count: int = 200, classes: int = 7, scale: float = 4.0) -> Tensor:
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(0))


def score(scorer: MaxSoftmax | MaxLogit | Energy, values: Tensor) -> Tensor:
    return scorer.fit(Evidence(logits=values)).score(Evidence(logits=values))


# ---------------------------------------------------------------------------------------------- logits alone


def test_msp_is_pytorch_oods_as_log_odds(detector) -> None:  # type: ignore[no-untyped-def]
    ours = score(MaxSoftmax(), logits())
    theirs = detector.MaxSoftmax(None).predict_logits(logits().double())
    torch.testing.assert_close(-torch.sigmoid(-ours), theirs, rtol=1e-12, atol=0)


def test_max_logit_is_pytorch_oods(detector) -> None:  # type: ignore[no-untyped-def]
    theirs = detector.MaxLogit(None).predict_logits(logits().double())
    torch.testing.assert_close(score(MaxLogit(), logits()), theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 20.0])
def test_energy_is_pytorch_oods(temperature: float, detector) -> None:  # type: ignore[no-untyped-def]
    theirs = detector.EnergyBased(None, t=temperature).predict_logits(logits().double())
    torch.testing.assert_close(score(Energy(temperature), logits()), theirs, rtol=1e-12, atol=1e-12)


def test_formulas_in_numpy() -> None:
    f = logits().double().numpy()
    p = softmax(f, axis=1).max(axis=1)
    np.testing.assert_allclose(score(MaxSoftmax(), logits()).numpy(), np.log((1 - p) / p), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(score(MaxLogit(), logits()).numpy(), -f.max(axis=1))
    np.testing.assert_allclose(score(Energy(3.0), logits()).numpy(), -3 * logsumexp(f / 3, axis=1))


def test_msp_keeps_the_order_of_confident_images() -> None:
    lead = torch.tensor([20.0, 50.0, 300.0, 5000.0, 1e30])  # 1 − p is 0 in float64 from the second on
    confident = torch.stack([lead, torch.zeros(5), torch.zeros(5)], dim=1)
    expected = math.log(2) - lead.double()
    torch.testing.assert_close(score(MaxSoftmax(), confident), expected, rtol=1e-12, atol=0)


def test_msp_of_equal_logits_is_one_over_the_number_of_classes() -> None:
    torch.testing.assert_close(score(MaxSoftmax(), torch.full((2, 5), 3.0)), torch.full((2,), math.log(4)).double())


def test_msp_needs_two_classes() -> None:
    with pytest.raises(TrajOODError, match="scorer msp: expected logits of at least 2 classes, got 1"):
        score(MaxSoftmax(), torch.ones(3, 1))


@pytest.mark.parametrize("scorer", [MaxSoftmax(), MaxLogit(), Energy()])
def test_less_confident_is_more_ood(scorer: MaxSoftmax | MaxLogit | Energy) -> None:
    confident, unsure = torch.tensor([[9.0, 0, 0]]), torch.tensor([[1.0, 0.5, 0]])
    assert score(scorer, confident) < score(scorer, unsure)


@pytest.mark.parametrize("scorer", [MaxSoftmax(), MaxLogit(), Energy()])
def test_a_pass_without_logits(scorer: MaxSoftmax | MaxLogit | Energy) -> None:
    with pytest.raises(TrajOODError, match="this scorer reads logits, but the pass kept none"):
        scorer.fit(Evidence()).score(Evidence())


# ---------------------------------------------------------------------------------------------- ViM


WIDTH, CLASSES = 24, 5


def classifier(shift: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(CLASSES, WIDTH, generator=generator), torch.randn(CLASSES, generator=generator) + shift


def images(count: int, seed: int, shift: float = 0.0) -> Evidence:
    """Features that vary most in their first coordinates, and the logits of :func:`classifier`."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, WIDTH, generator=generator) * torch.arange(1, WIDTH + 1) ** -0.8 + 0.3
    weight, bias = classifier(shift)
    values = (features.double() @ weight.double().T + bias.double()).float()
    return Evidence(features={"backbone": features}, logits=values, head=(weight, bias))


@pytest.mark.parametrize("dim", [1, 8, 23])
def test_vim_is_pytorch_oods(dim: int, detector, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    train, test = images(600, 0), images(80, 1)
    scorer = ViM(dim).fit(train)
    ours = scorer.score(test)
    # Theirs casts to float32, in which the eigenvectors of neighbouring eigenvalues follow the processor.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    weight, bias = (part.double() for part in classifier())
    theirs = detector.ViM(None, dim, weight, bias).fit_features(train.features["backbone"], torch.zeros(600))
    assert float(scorer.state["alpha"]) == pytest.approx(float(theirs.alpha), rel=1e-6)
    expected = theirs.predict_features(test.features["backbone"])
    assert expected.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)  # our logits are those of the pass: float32


@pytest.mark.parametrize("dim", [4, None])
def test_vim_by_the_formula(dim: int | None) -> None:
    train, test = images(600, 0), images(80, 1)
    weight, bias = (t.double().numpy() for t in classifier())
    x, z = (e.features["backbone"].double().numpy() for e in (train, test))
    origin = -np.linalg.pinv(weight) @ bias
    values, vectors = np.linalg.eig((x - origin).T @ (x - origin) / len(x))
    rest = vectors[:, np.argsort(-values)[dim or WIDTH // 2 :]]
    alpha = (x @ weight.T + bias).max(axis=1).mean() / np.linalg.norm((x - origin) @ rest, axis=1).mean()
    expected = alpha * np.linalg.norm((z - origin) @ rest, axis=1) - logsumexp(z @ weight.T + bias, axis=1)
    scores = ViM(dim).fit(train).score(test)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6, atol=1e-6)  # the logits given are float32


@pytest.mark.parametrize(("width", "dim"), [(4096, 1000), (2048, 1000), (2047, 512), (768, 512), (767, 383), (2, 1)])
def test_vims_default_dimension(width: int, dim: int) -> None:
    assert ViM()._principal(width) == dim


def test_vim_scores_what_leaves_the_principal_space() -> None:
    scorer = ViM(4).fit(images(600, 0))
    near = images(50, 1)
    away = scorer.state["residual"][:, 0].float()
    far = Evidence(features={"backbone": near.features["backbone"] + 5 * away}, logits=near.logits)
    assert scorer.score(near).max() < scorer.score(far).min()


def test_vim_of_too_few_training_images() -> None:
    with pytest.raises(TrajOODError, match="scorer vim: the 12 training images lie in their 12 principal directions"):
        ViM().fit(images(12, 0))


def test_vim_with_too_wide_a_principal_space() -> None:
    with pytest.raises(TrajOODError, match="scorer vim:dim=24: dim must be below the 24 features, got 24"):
        ViM(24).fit(images(50, 0))


def test_vim_without_a_head() -> None:
    train = images(50, 0)
    with pytest.raises(TrajOODError, match="scorer vim: expected the classifier's weight and bias, got none"):
        ViM().fit(Evidence(features=train.features, logits=train.logits))


def test_vim_says_when_its_scale_is_negative() -> None:
    with pytest.warns(UserWarning, match=r"scorer vim: the training images' largest logit is negative on average"):
        ViM().fit(images(300, 0, shift=-50.0))
