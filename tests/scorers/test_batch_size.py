"""The default number of images per batch."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor, nn

from traj_ood.autoencoders import CallableAutoencoder
from traj_ood.scorers.batch_size import default_batch_size
from traj_ood.scorers.scorer_set import ScorerSet


def a_model(decode: Callable[[Tensor], Tensor], chunk: int = 6, size: int = 2) -> CallableAutoencoder:
    return CallableAutoencoder(torch.clone, decode, input_shape=(1, size, size), name="slow", chunk=chunk)


@pytest.mark.parametrize(
    ("scorer", "max_steps", "expected"),
    [
        ("trajectory", 500, 6),  # at least a chunk, though f alone may take 500 s
        ("trajectory", 10, 72),  # of 120 s
        ("reconstruction", 500, 510),  # f is not iterated
    ],
)
def test_a_batch_takes_f_two_minutes_at_most(
    scorer: str, max_steps: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def decode(z: Tensor) -> Tensor:
        clock[0] += len(z) / 6
        return z * 0.5

    scorers = ScorerSet(a_model(decode), [scorer], max_steps=max_steps)
    assert default_batch_size(scorers) == expected


def test_a_model_in_training_mode_stays_as_it_is() -> None:
    """Its batch statistics would move with a call, and gradients must not be recorded."""
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).train()
    before = {name: values.clone() for name, values in network.state_dict().items()}
    model = CallableAutoencoder.from_module(_Pair(network), input_shape=(1, 2, 2))
    assert default_batch_size(ScorerSet(model, ["trajectory"])) >= 24
    assert network.training
    for name, values in network.state_dict().items():
        assert torch.equal(values, before[name]), name


class _Pair(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def encode(self, images: Tensor) -> Tensor:
        return self.network(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.network(latents) * 0.5


def test_a_batch_is_limited_in_images_and_in_memory() -> None:
    assert default_batch_size(ScorerSet(tiny.conv(), ["reconstruction"])) == 510  # 85 chunks of 6: at most 512
    large = a_model(torch.clone, chunk=1, size=1024)  # 4 MiB of pixels
    assert default_batch_size(ScorerSet(large, ["reconstruction"])) == 16
