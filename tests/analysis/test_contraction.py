"""Variance ratios of networks that are known, and of torchvision's without a download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shorthand import raises
from torch import Tensor, nn

from traj_ood.analysis import Workspace, find_question, options_from
from traj_ood.analysis.contraction import (
    BACKBONES,
    KEYS,
    Contraction,
    check_names,
    respond,
    untrained,
    variance_ratios,
)

pytest.importorskip("torchvision", reason="the backbones are torchvision's")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_two_variances_of_a_scaled_and_of_a_constant_map() -> None:
    inputs = noise(50, 3, 4, 4)
    assert variance_ratios(inputs, 0.5 * inputs) == pytest.approx({"all": 0.25, "between": 0.25})
    constant = variance_ratios(inputs, noise(1, 200).expand(50, 200))
    assert constant["between"] == pytest.approx(0, abs=1e-12)
    assert constant["all"] == pytest.approx(1, rel=0.2)  # its outputs differ, from unit to unit
    assert variance_ratios(inputs, inputs / 0) == {"all": None, "between": None}


def test_ratios_are_numpys() -> None:
    x, y = noise(20, 7), noise(20, 5, seed=1) * 3
    found = variance_ratios(x, y)
    assert found["all"] == pytest.approx(y.numpy().var(ddof=1) / x.numpy().var(ddof=1), rel=1e-5)
    between = y.numpy().var(axis=0, ddof=1).mean() / x.numpy().var(axis=0, ddof=1).mean()
    assert found["between"] == pytest.approx(between, rel=1e-5)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop, self.head = (
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.Dropout(),
            nn.Linear(4, 6),
        )
        nn.init.constant_(self.head.weight, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).mean(dim=(2, 3))))


def test_both_outputs_in_both_modes() -> None:
    network, inputs = Small().requires_grad_(False), noise(12, 3, 8, 8)
    before = {k: v.clone() for k, v in network.state_dict().items() if k.startswith("norm.running")}
    logits, features = respond(network, inputs, 12, "running")
    torch.testing.assert_close(logits, network.head.bias.expand(12, 6))  # a head of zeros, as torchvision's ViT
    torch.testing.assert_close(features, network.conv(inputs).mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    maps = network.conv(inputs)
    normalised = (maps - maps.mean((0, 2, 3), True)) / (maps.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
    _, features = respond(network, inputs, 12, "batch")
    torch.testing.assert_close(features, normalised.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    for key, value in before.items():  # the statistics of the inputs do not stay behind
        torch.testing.assert_close(network.state_dict()[key], value)
    assert all(module.training for module in network.modules())  # nor does a mode


def test_batches_are_as_equal_as_can_be_and_never_above_the_option() -> None:
    sizes: list[int] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    network.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    logits, features = respond(network, noise(9, 3, 1, 1), 4, "batch")
    assert sizes == [3, 3, 3]
    assert (len(logits), len(features)) == (9, 9)


def test_no_allowed_batch_leaves_an_image_alone() -> None:
    sizes: list[int] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 1))
    network.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    for images in range(2, 30):
        for batch in range(2, 12):
            if batch == 2 and images % 2:
                continue
            Contraction(images=images, batch=batch)
            sizes.clear()
            respond(network, noise(images, 1, 1, 1), batch, "batch")
            assert sum(sizes) == images
            assert all(2 <= size <= batch for size in sizes)


def test_networks_are_seeded_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (untrained("squeezenet1_1", 64, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    key = "features.0.weight"
    assert torch.equal(one[key], same[key])
    assert not torch.equal(one[key], other[key])


def test_torchvision_has_all_twelve_and_the_vit_takes_any_size() -> None:
    check_names(BACKBONES)
    assert len(set(BACKBONES)) == 12
    with raises("vit_b_16: cannot be built for 70 × 70 images"):
        untrained("vit_b_16", 70, 0)


def test_names_and_options_are_checked(tmp_path: Path) -> None:
    with raises("unknown torchvision classifier 'resnet19': did you mean 'resnet1"):
        Contraction(models=("resnet19",)).run(Workspace(tmp_path / "work"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with raises("contraction: size: expected at least 64 pixels, got 32"):
        Contraction(size=32)
    with raises("contraction: models: expected at least one name, and none twice, got vgg11, vgg11"):
        Contraction(models=("vgg11", "vgg11"))
    with raises("contraction: batch: expected at least 3 with an odd number of images, or one would be alone"):
        Contraction(images=5, batch=2)
    with raises("contraction: images: expected at least 2: a variance needs two, got 1"):
        Contraction(images=1)


def test_the_question_is_answered_drawn_and_resumed(tmp_path: Path) -> None:
    pairs = ["models=squeezenet1_1", "runs=2", "images=2", "batch=2"]
    question = options_from(find_question("contraction"), pairs)
    finding = question.run(Workspace(tmp_path / "work"), tmp_path / "out")
    assert [row["seed"] for row in finding.figures["runs"]] == [0, 1]
    (summary,) = finding.figures["models"]
    values = [row["running_logits_all"] for row in finding.figures["runs"]]
    assert summary["running_logits_all"]["mean"] == pytest.approx(sum(values) / 2)
    assert set(KEYS) < set(summary)
    assert (tmp_path / "out" / "contraction.png").read_bytes().startswith(b"\x89PNG")
    assert "images: 2 here, 1000 in the paper" in finding.differences
    for option, told in {"models": "squeezenet1_1 here, alexnet, ", "size": "64 here, 224 ", "batch": "2 here"}.items():
        (difference,) = (text for text in finding.differences if text.startswith(f"{option}: {told}"))
        assert difference.endswith("with --paper (the paper does not state it)")  # none of these is its own
    work = Workspace(tmp_path / "work")
    assert question.run(work, tmp_path / "again").figures == finding.figures
    assert work.resumed > 0
