"""Encoders with RAE decoders: against diffusers' AutoencoderRAE and transformers, in every layout that is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from traj_ood.autoencoders import PairAutoencoder, load_autoencoder
from traj_ood.autoencoders.identity import model_identity
from traj_ood.autoencoders.rae_decoder import ViTDecoder
from traj_ood.autoencoders.vision_encoder import VisionTokens, load_vision_model
from traj_ood.dynamics.iterate import iterate
from traj_ood.errors import TrajOODError

GEOMETRY: dict[str, Any] = {
    "encoder_hidden_size": 64,
    "encoder_num_hidden_layers": 1,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 48,
    "patch_size": 4,
}


def stir(module: nn.Module, seed: int = 0) -> None:
    """Random biases and larger matrices, so that nothing cancels by being zero or tiny."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draws))


def dinov2(**changes: Any) -> Any:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**{**sizes, **changes})).eval()
    stir(model)
    return model


def write_encoder(model: Any, folder: Path, mean: float = 0.4, std: float = 0.2) -> Path:
    model.save_pretrained(folder)
    stored = {"image_processor_type": "BitImageProcessor", "image_mean": [mean] * 3, "image_std": [std] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    return folder


def decoder(tokens: int = 16, latent_width: int = 16) -> ViTDecoder:
    made = ViTDecoder(latent_width, tokens, width=32, layers=2, heads=4, hidden=48, patch=4).eval()
    stir(made, 1)
    return made


def pair(folder: Path) -> PairAutoencoder:
    torch.save(decoder().state_dict(), folder / "model.pt")
    draws = torch.Generator().manual_seed(2)
    stats = {
        "mean": torch.randn(16, 4, 4, generator=draws),
        "var": 0.5 + torch.rand(16, 4, 4, generator=draws),
    }
    torch.save(stats, folder / "stat.pt")
    encoder = write_encoder(dinov2(), folder / "encoder")
    return PairAutoencoder.from_parts(encoder, folder / "model.pt", folder / "stat.pt", encoder_size=56, heads=4)


def rae(tmp_path: Path, **changes: Any) -> tuple[Any, Path]:
    """diffusers' own model with random weights and statistics, and the folder it writes."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    sizes = {"encoder_type": "dinov2", "encoder_patch_size": 14, "encoder_input_size": 224, **changes}
    if not hasattr(diffusers, "AutoencoderRAE"):
        pytest.skip(f"diffusers {diffusers.__version__} has no AutoencoderRAE")
    latents = {"latents_mean": torch.randn(64, 16, 16), "latents_std": 0.5 + torch.rand(64, 16, 16)}
    model = diffusers.AutoencoderRAE(**GEOMETRY, **sizes, **latents).eval()
    stir(model)
    model.save_pretrained(tmp_path / "rae")
    return model, tmp_path / "rae"


def test_a_diffusers_folder_is_diffusers_own_model(tmp_path: Path) -> None:
    theirs, folder = rae(tmp_path, scaling_factor=0.5)
    ours = load_autoencoder(f"diffusers:{folder}")
    assert isinstance(ours, PairAutoencoder)
    assert (ours.input_shape, ours.encoder_size, ours.name) == ((3, 64, 64), 224, "rae")
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (ours.mean, ours.std))
    with torch.inference_mode():
        latents = theirs.encode(pixels).latent
        decoded = theirs.decode(latents).sample
    tokens = latents.flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours.encode((pixels - mean) / std), tokens, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.decode(tokens) * std + mean, decoded, atol=2e-5, rtol=1e-4)
    assert load_autoencoder(folder).fingerprint() == ours.fingerprint()


def test_the_encoders_names_of_transformers_4_load(tmp_path: Path) -> None:
    """The published files were written with transformers 4."""
    _, folder = rae(tmp_path)
    before = load_autoencoder(folder).fingerprint()
    path = folder / "diffusion_pytorch_model.safetensors"
    names = {f"attention.{new}_proj.": f"attention.attention.{old}." for new, old in (("q", "query"), ("k", "key"))}
    names |= {"attention.v_proj.": "attention.attention.value.", "attention.o_proj.": "attention.output.dense."}
    renamed = {}
    for key, value in load_file(path).items():
        if key.startswith("encoder."):
            for new, old in names.items():
                key = key.replace(new, old)
        renamed[key] = value
    assert any("attention.attention.query" in key for key in renamed)
    save_file(renamed, path, metadata={"format": "pt"})
    assert load_autoencoder(folder).fingerprint() == before


def test_parts_as_rae_publishes_them(tmp_path: Path) -> None:
    """E is the encoder's patch tokens with a plain last LayerNorm, standardised with RAE's statistics."""
    model = pair(tmp_path)
    assert (model.input_shape, model.mean, model.std) == ((3, 16, 16), (0.4,) * 3, (0.2,) * 3)
    assert model.name == f"encoder+{tmp_path.name}"
    images = torch.randn(2, 3, 16, 16)
    encoder = dinov2()
    encoder.layernorm = nn.LayerNorm(16, eps=encoder.config.layer_norm_eps, elementwise_affine=False)
    stats = torch.load(tmp_path / "stat.pt", weights_only=True)
    with torch.inference_mode():
        larger = nn.functional.interpolate(images, (56, 56), mode="bicubic", align_corners=False)
        grid = encoder(larger).last_hidden_state[:, 5:].transpose(1, 2).unflatten(2, (4, 4))
    expected = (grid - stats["mean"]) / (stats["var"] + 1e-5).sqrt()
    torch.testing.assert_close(model.encode(images), expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_the_decoder_is_transformers_own_layers(tmp_path: Path) -> None:
    """ViT-MAE's decoder layers of transformers, given our weights by the names that version knows."""
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAELayer

    ours = decoder()
    config = ViTMAEConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48, layer_norm_eps=1e-12)
    config._attn_implementation = "eager"
    theirs = ViTMAELayer(config).eval()
    if "attention.q_proj.weight" not in theirs.state_dict():
        pytest.skip("this transformers names the layer's weights in another way")
    names = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    names |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    names |= {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    weights = {}
    for key, value in ours.decoder_layers[0].state_dict().items():
        name, kind = key.rsplit(".", 1)
        weights[f"{names.get(name, name)}.{kind}"] = value
    theirs.load_state_dict(weights)
    tokens = torch.randn(2, 17, 32)
    with torch.inference_mode():
        found = theirs(tokens)
        expected = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(ours.decoder_layers[0](tokens), expected, atol=1e-5, rtol=1e-4)


def test_siglip_with_and_without_texts(tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    text = {**sizes, "vocab_size": 20, "max_position_embeddings": 8, "projection_size": 16}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    model.save_pretrained(tmp_path / "siglip")
    loaded = load_vision_model(str(tmp_path / "siglip"))
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images).last_hidden_state, model.vision_model(images).last_hidden_state)
        assert VisionTokens(loaded, 16)(images).shape == (2, 16, 16)
        assert VisionTokens(loaded, 32)(torch.randn(2, 3, 32, 32)).shape == (2, 64, 16)  # interpolated positions


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_siglip_folder_of_either_transformers(tmp_path: Path, prefix: str) -> None:
    """diffusers 0.42 cannot build its SigLIP2 encoder with transformers 5, which took ``vision_model.`` away."""
    from transformers import SiglipVisionConfig, SiglipVisionModel, __version__

    if __version__ < "5":
        pytest.skip("names of SigLIP's weights are translated by transformers 5")

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 1}
    encoder = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=256, patch_size=16)).eval()
    stir(encoder)
    own = "vision_model." if any(k.startswith("vision_model.") for k in encoder.state_dict()) else ""
    weights = {
        f"encoder.{prefix}{k.removeprefix(own)}": v
        for k, v in encoder.state_dict().items()
        if "post_layernorm" not in k
    }
    weights |= {f"decoder.{k}": v for k, v in decoder(256, 64).state_dict().items()}
    weights |= {"_latents_mean": torch.zeros(1), "_latents_std": torch.ones(1)}
    weights |= {"encoder_mean": torch.full((1, 3, 1, 1), 0.5), "encoder_std": torch.full((1, 3, 1, 1), 0.5)}
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {
        "encoder_type": "siglip2",
        "encoder_patch_size": 16,
        "encoder_input_size": 256,
        "_class_name": "AutoencoderRAE",
    }
    (tmp_path / "config.json").write_text(json.dumps({**GEOMETRY, **config}))
    model = load_autoencoder(tmp_path)
    assert model.input_shape == (3, 64, 64)
    images = torch.randn(2, 3, 256, 256)
    norm = next(module for name, module in encoder.named_modules() if name.endswith("post_layernorm"))
    with torch.inference_mode():
        norm.weight.fill_(1)
        norm.bias.zero_()
        torch.testing.assert_close(model.module.encoder(images), encoder(images).last_hidden_state)


def test_saved_and_loaded_it_is_the_same_pair(tmp_path: Path) -> None:
    model = pair(tmp_path)
    model.save_pretrained(str(tmp_path / "saved"))
    again = load_autoencoder(tmp_path / "saved")
    assert (again.fingerprint(), again.name) == (model.fingerprint(), "saved")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.encode(images), model.encode(images))


def test_heads_change_f_and_therefore_the_fingerprint(tmp_path: Path) -> None:
    """No weight's shape tells them, neither the decoder's nor the encoder's."""
    four = pair(tmp_path)
    files = (tmp_path / "encoder", tmp_path / "model.pt", tmp_path / "stat.pt")
    two = PairAutoencoder.from_parts(*files, encoder_size=56, heads=2)
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    other = PairAutoencoder.from_parts(*files, encoder_size=56, heads=4)
    images = torch.randn(2, 3, 16, 16)
    latents = four.encode(images)
    assert not torch.allclose(four.decode(latents), two.decode(latents))
    assert not torch.allclose(latents, other.encode(images))
    assert len({model.fingerprint() for model in (four, two, other)}) == 3


def test_trajectories_do_not_depend_on_batch_mates(tmp_path: Path) -> None:
    model = pair(tmp_path)
    model.chunk = 4
    start = model.encode(torch.randn(6, 3, 16, 16))
    together = iterate(model.self_map, start, max_steps=5, chunk=model.chunk)
    alone = iterate(model.self_map, start[4:5], max_steps=5, chunk=model.chunk)
    torch.testing.assert_close(together.final[4], alone.final[0], rtol=1e-5, atol=1e-6)


class Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def test_a_pair_of_ones_own() -> None:
    model = PairAutoencoder(
        nn.Flatten(), nn.Sequential(Halve(), nn.Unflatten(1, (1, 4, 4))), (1, 4, 4), spread=torch.tensor(2.0)
    )
    start = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.self_map(start), 0.5 * start)
    trajectory = iterate(model.self_map, start, tol=0, max_steps=10, chunk=model.chunk)
    torch.testing.assert_close(trajectory.final, start * 0.5**10)
    with pytest.raises(
        TrajOODError, match="expected a transformers encoder with a ViTDecoder, got modules of your own"
    ):
        model.save_pretrained(Path("nowhere"))


def test_networks_of_ones_own_are_identified_by_their_code_and_answers(tmp_path: Path) -> None:
    class Negated(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    linear = nn.Linear(16, 4)
    negated = Negated(16, 4)
    negated.load_state_dict(linear.state_dict())
    found = []
    for layers in ([linear], [linear, nn.ReLU()], [linear, nn.GELU()], [negated]):
        decoder = nn.Sequential(nn.Linear(4, 16), nn.Unflatten(1, (1, 4, 4)))
        decoder.requires_grad_(False)[0].weight.fill_(0.5)
        decoder[0].bias.zero_()
        found.append(model_identity(PairAutoencoder(nn.Sequential(nn.Flatten(), *layers), decoder, (1, 4, 4))))
    assert len({identity["own_code"] for identity in found}) == 4
    assert "own_code" not in model_identity(pair(tmp_path))


def test_a_pair_in_float64_and_under_another_default_type() -> None:
    def made(dtype: torch.dtype) -> PairAutoencoder:
        linear = nn.Linear(16, 16, bias=False, dtype=dtype).requires_grad_(False)
        linear.weight.copy_(torch.arange(256).view(16, 16) / 256)
        return PairAutoencoder(nn.Sequential(nn.Flatten(), linear), nn.Unflatten(1, (1, 4, 4)), [1, 4, 4])

    images = torch.rand(2, 1, 4, 4)
    single, double = made(torch.float32), made(torch.float64)
    assert double.encode(images).dtype == torch.float64
    torch.testing.assert_close(double.encode(images).float(), single.encode(images), rtol=1e-5, atol=1e-6)
    torch.set_default_dtype(torch.float64)
    try:
        other = made(torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    other.module.load_state_dict(single.module.state_dict())
    assert other.fingerprint() == single.fingerprint()


def test_pairs_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(TrajOODError, match=r"expected a decoder of images \(1, 4, 4\), got \(1, 2, 8\)"):
        PairAutoencoder(nn.Flatten(), nn.Unflatten(1, (1, 2, 8)), (1, 4, 4))
    with pytest.raises(TrajOODError, match=r"encoder and decoder do not fit images of shape \(1, 4, 4\)"):
        PairAutoencoder(nn.Linear(3, 3), nn.Identity(), (1, 4, 4))
    with pytest.raises(TrajOODError, match="expected a positive spread of every latent, got 0"):
        PairAutoencoder(nn.Flatten(), nn.Unflatten(1, (1, 4, 4)), (1, 4, 4), spread=torch.zeros(16))
    with pytest.raises(TrajOODError, match="expected a square number of tokens, got 15"):
        decoder(15)
    with pytest.raises(TrajOODError, match="expected a width divisible by the 5 heads, got 32"):
        ViTDecoder.from_weights(decoder().state_dict(), 5, "model.pt")


def test_what_is_refused_says_what_is_wrong(tmp_path: Path) -> None:
    pair(tmp_path)
    weights = decoder().state_dict()
    torch.save({k: v for k, v in weights.items() if k != "decoder_norm.bias"}, tmp_path / "less.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    for file, message in (
        ("less.pt", r"less\.pt: weights of another architecture: 1 tensors missing \(first: decoder_norm\.bias\)"),
        ("other.pt", r"other\.pt: expected the weights of an RAE decoder, decoder_embed\.weight is missing"),
        ("none.pt", r"none\.pt: expected a file of weights"),
    ):
        with pytest.raises(TrajOODError, match=message):
            PairAutoencoder.from_parts(tmp_path / "encoder", tmp_path / file, heads=4)
    with pytest.raises(TrajOODError, match=r"other\.pt: expected the tensors mean and var, got weight"):
        PairAutoencoder.from_parts(tmp_path / "encoder", tmp_path / "model.pt", tmp_path / "other.pt", heads=4)
    with pytest.raises(TrajOODError, match="neither a local folder nor loadable from the hub"):
        PairAutoencoder.from_parts(tmp_path / "nowhere", tmp_path / "model.pt")
    (tmp_path / "encoder" / "preprocessor_config.json").unlink()
    with pytest.raises(TrajOODError, match=r"preprocessor_config\.json: expected the encoder's image processor"):
        PairAutoencoder.from_parts(tmp_path / "encoder", tmp_path / "model.pt", heads=4)


def test_damaged_diffusers_folders(tmp_path: Path) -> None:
    _, folder = rae(tmp_path)
    path, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    weights, stored = load_file(path), json.loads(config.read_text())
    config.write_text(json.dumps({**stored, "encoder_type": "mae"}))
    with pytest.raises(TrajOODError, match=r"unknown RAE encoder 'mae': .*Known: dinov2, siglip2"):
        load_autoencoder(folder)
    config.write_text(json.dumps(stored))
    save_file({k: v for k, v in weights.items() if "mlp.fc1" not in k}, path, metadata={"format": "pt"})
    with pytest.raises(
        TrajOODError, match=r"its encoder: .* 2 tensors missing or of another shape \(first: .*fc1\.bias"
    ):
        load_autoencoder(folder)
