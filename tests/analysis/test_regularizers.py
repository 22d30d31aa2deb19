"""Table 3's penalties against explicit Jacobians and torch's own divergences; all variants on tiny images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from known import Known
from torch.distributions import Bernoulli, Normal, kl_divergence

from traj_ood.analysis import Workspace, options_from
from traj_ood.analysis.regularizers import SCORERS, Regularizers
from traj_ood.analysis.singular import jacobians
from traj_ood.analysis.variants import (
    SparseNetwork,
    VariationalNetwork,
    bernoulli_kl,
    contractive,
    gaussian_kl,
    masked,
    penalised,
    r_contractive,
    sparse_l1,
    variants,
)
from traj_ood.autoencoders import ConvNetwork
from traj_ood.errors import TrajOODError
from traj_ood.training.penalties import squared_jacobian


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(build: type[ConvNetwork] = ConvNetwork) -> ConvNetwork:
    torch.manual_seed(0)
    return build(1, 4, 2, 3).double()


def explicit(function: object, images: torch.Tensor) -> float:
    """Mean over images of the squared Frobenius norm of the Jacobian."""
    jacobian = torch.autograd.functional.jacobian
    return sum(float(jacobian(function, x[None]).square().sum()) for x in images) / len(images)  # type: ignore[arg-type]


def test_squared_jacobian_of_a_linear_map_is_exact_in_the_mean() -> None:
    matrix = torch.randn(3, 5, generator=generator()).double()
    inputs = torch.randn(20000, 5, generator=generator(1)).double().requires_grad_(True)
    found = squared_jacobian(inputs @ matrix.T, inputs, generator(2))
    assert found.item() == pytest.approx(float(matrix.square().sum()), rel=0.03)


def test_jacobian_penalties_are_those_of_the_network() -> None:
    net, images = network(), torch.randn(3, 1, 4, 4, generator=generator()).double()
    many = images.repeat(4000, 1, 1, 1)
    output, found = contractive(net, many, generator(1))
    assert float(found) == pytest.approx(explicit(net.encode, images), rel=0.05)
    assert torch.allclose(output[:3], net.decode(net.encode(images)))
    _, found = r_contractive(net, many, generator(1))
    assert float(found) == pytest.approx(explicit(lambda x: net.decode(net.encode(x)), images), rel=0.05)


def test_divergences_are_torchs() -> None:
    rates = torch.tensor([0.02, 0.05, 0.4, 0.9], dtype=torch.float64)
    expected = kl_divergence(Bernoulli(torch.full_like(rates, 0.05)), Bernoulli(rates)).sum()
    assert float(bernoulli_kl(0.05, rates)) == pytest.approx(float(expected))
    assert bool(bernoulli_kl(0.05, torch.tensor([0.0, 1.0])).isfinite())
    mean, log_variance = torch.randn(2, 6, 3, generator=generator()).double()
    unit = Normal(torch.zeros(6, 3).double(), torch.ones(6, 3).double())
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), unit).sum(dim=1).mean()
    assert float(gaussian_kl(mean, log_variance)) == pytest.approx(float(expected))


def test_penalties_are_weighted_as_in_equation_one() -> None:
    net, images = network(), torch.randn(3, 1, 4, 4, generator=generator()).double()
    squared = (net.decode(net.encode(images)) - images).square().sum(dim=(1, 2, 3))
    expected = (squared + 7 * net.encode(images).abs().sum(dim=1)).mean() / 16
    assert float(penalised(sparse_l1, 7.0)(net, images, generator())) == pytest.approx(float(expected))


def test_masks_hide_whole_patches_of_the_input_only() -> None:
    seen = []

    class Spy(ConvNetwork):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return super().encode(images)

    torch.manual_seed(0)
    net = Spy(1, 10, 1, 2)
    images = torch.ones(400, 1, 10, 10)
    loss = masked(0.5, 4)(net, images, generator())
    (hidden,) = [1 - x for x in seen]
    patches = hidden[..., :8, :8].reshape(400, 2, 4, 2, 4)
    assert set(patches.mean(dim=(2, 4)).flatten().tolist()) == {0.0, 1.0}
    assert float(hidden.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(loss) == pytest.approx(float((net.decode(net.encode(1 - hidden)) - images).square().mean()))


@pytest.mark.parametrize("variant", variants(), ids=lambda v: v.name)
def test_every_variant_has_a_loss_with_gradients(variant: object) -> None:
    torch.manual_seed(0)
    net = variant.build(1, 8, 2, 3)  # type: ignore[attr-defined]
    loss = variant.loss(net, torch.randn(6, 1, 8, 8, generator=generator()), generator())  # type: ignore[attr-defined]
    loss.backward()
    assert bool(loss.isfinite())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_latents_of_sparse_and_variational_networks() -> None:
    images = torch.randn(5, 1, 8, 8, generator=generator())
    assert bool((SparseNetwork(1, 8, 2, 3, torch.nn.ReLU).encode(images) >= 0).all())
    assert bool((SparseNetwork(1, 8, 2, 3, torch.nn.Sigmoid).encode(images) < 1).all())
    net = VariationalNetwork(1, 8, 2, 3)
    assert torch.equal(net.encode(images), net.posterior(images)[0])  # the mean: f is deterministic


def test_jacobians_of_known_dynamics() -> None:
    """f acts on each coordinate as z + 0.3 (z − z³): its derivative there is 1.3 − 0.9 z², 0.4 at ±1 and 1.3 at 0."""
    points = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 1.0, 0.5, 0.0]])
    expected = torch.diag_embed(1.3 - 0.9 * points.double().square())
    assert torch.allclose(jacobians(Known().self_map, points, 2), expected, atol=1e-6)


@pytest.mark.slow
def test_all_variants_are_trained_measured_and_drawn(tmp_path: Path) -> None:
    benchmark = tiny.write_benchmark(tmp_path, train=24)
    pairs = ["epochs=1", "batch=6", "width=1", "bottleneck=3", "narrow=2", "starts=12", "per_set=5", "max_steps=3"]
    asked = options_from(Regularizers, [f"benchmark={benchmark}", "images=24", *pairs])
    finding = asked.run(Workspace(tmp_path / "units"), tmp_path / "out")
    rows = finding.figures["rows"]
    assert [row["variant"] for row in rows] == [v.name for v in variants()]
    assert [row["bottleneck"] for row in rows] == [3, 2] + [3] * 8
    for row in rows:
        assert set(row["auroc"]) == set(SCORERS)
        assert set(row["auroc_per_set"]) == {"dim", "bright"}
        assert row["norm_at_data"] >= 0
    assert finding.sentence.startswith("Of 10 variants")
    assert (tmp_path / "out" / "regularizers.png").is_file()


def test_impossible_options_are_refused() -> None:
    with pytest.raises(
        TrajOODError, match=re.escape("unknown regularizers: variant 'denoise': did you mean 'denoising'")
    ):
        Regularizers(variants=("denoise",))
    with pytest.raises(TrajOODError, match="regularizers: variants: expected at least one, none twice"):
        Regularizers(variants=("masked", "masked"))
    with pytest.raises(TrajOODError, match=re.escape("regularizers: starts: expected 2 to 4000 (images), got 5000")):
        Regularizers(starts=5000)
    with pytest.raises(TrajOODError, match=r"scorer field: expected at least \d+ training images, got 4"):
        Regularizers(starts=4)
