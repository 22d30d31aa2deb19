"""The ViT-MAE in plain torch against transformers' own, of the same config and weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
import torch

from traj_ood.autoencoders import ViTMAE
from traj_ood.autoencoders.mae_network import DEFAULTS, MAENetwork, is_plain
from traj_ood.autoencoders.vit_mae import own_name

# Bits differ where a kernel is chosen by the layout of its factors, so a bound and not equality.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def both(**changes: Any) -> tuple[MAENetwork, Any]:
    theirs = tiny.vit_model(**changes).eval()
    config = {key: value for key, value in theirs.config.to_dict().items() if key in DEFAULTS}
    own = MAENetwork(config).eval()
    own.load_state_dict({own_name(k): v for k, v in theirs.state_dict().items()})  # strict: the names of version 5
    return own, theirs


@pytest.mark.parametrize("changes", [{}, {"num_channels": 3, "image_size": 24}, {"qkv_bias": False}])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_numbers_of_transformers(changes: dict[str, Any], ratio: float) -> None:
    own, theirs = (ViTMAE(network, mask_ratio=ratio, mask_seed=3) for network in both(**changes))
    x = tiny.images(5, own.input_shape)
    latents = theirs.encode(x)
    torch.testing.assert_close(own.encode(x), latents, **CLOSE)
    torch.testing.assert_close(own.decode(latents), theirs.decode(latents), **CLOSE)
    torch.testing.assert_close(own.reconstruct_masked(x), theirs.reconstruct_masked(x), rtol=1e-5, atol=1e-6)
    assert own.fingerprint() == theirs.fingerprint()
    assert own.options() == theirs.options()
    drawn = [m.reconstruct_corrupted(x, 0.1, 0.5, torch.Generator().manual_seed(1)) for m in (own, theirs)]
    for mine, other in zip(*drawn, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


def test_patches_are_transformers_own() -> None:
    own, theirs = both(num_channels=3)
    x = tiny.images(2, (3, 8, 8))
    assert torch.equal(own.patchify(x), theirs.patchify(x))
    assert torch.equal(own.unpatchify(own.patchify(x)), x)


def test_defaults_are_transformers_own() -> None:
    from transformers import ViTMAEConfig

    theirs = ViTMAEConfig()
    assert {key: theirs.to_dict()[key] for key in DEFAULTS} == DEFAULTS
    assert is_plain(json.loads(theirs.to_json_string()))  # as it writes config.json


@pytest.mark.parametrize(
    "odd",
    [
        {"hidden_act": "relu"},
        {"attn_implementation": "eager"},
        {"head_dim": 7},
        {"image_size": [16, 16]},
        {"image_size": 17},
        {"num_attention_heads": 3},
        {"hidden_size": "16"},
        {"patch_size": 0},
        {"qkv_bias": 1},
    ],
)
def test_what_is_not_known_here_is_left_to_transformers(odd: dict[str, Any]) -> None:
    assert is_plain(tiny.VIT)
    assert not is_plain({**tiny.VIT, **odd})
