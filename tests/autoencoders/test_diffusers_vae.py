"""diffusers' autoencoders: against diffusers itself on small random weights, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from traj_ood.autoencoders import DiffusersVAE, load_autoencoder
from traj_ood.dynamics.iterate import iterate
from traj_ood.errors import TrajOODError
from traj_ood.io import pretrained

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (optional extra traj_ood[diffusers])")

GEOMETRY: dict[str, Any] = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 2,
    "sample_size": 16,
    "latent_channels": 4,
    "layers_per_block": 1,
}


def kl(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return diffusers.AutoencoderKL(**{**GEOMETRY, **changes}).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    kl().save_pretrained(path)
    return path


def test_loaded_from_a_folder_it_is_the_mean_of_diffusers_own_posterior(folder: Path) -> None:
    model = load_autoencoder(f"diffusers:{folder}")
    assert isinstance(model, DiffusersVAE)
    assert (model.input_shape, model.name, model.device.type) == ((3, 16, 16), folder.name, "cpu")
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    theirs = diffusers.AutoencoderKL.from_pretrained(folder, trust_remote_code=False)
    with torch.inference_mode():
        latents = theirs.encode(images).latent_dist.mean
        decoded = theirs.decode(latents).sample
    assert model.encode(images).shape == (3, 4, 8, 8)
    torch.testing.assert_close(model.encode(images), latents)
    torch.testing.assert_close(model.decode(latents), decoded)
    torch.testing.assert_close(model.self_map(latents), model.encode(decoded))


def test_the_prefix_may_be_left_out_and_a_pipeline_folder_has_a_vae(folder: Path, tmp_path: Path) -> None:
    assert load_autoencoder(folder).fingerprint() == load_autoencoder(f"diffusers:{folder}").fingerprint()
    kl().save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert load_autoencoder(f"diffusers:{tmp_path}/pipeline").fingerprint() == load_autoencoder(folder).fingerprint()


def test_an_interrupted_save_leaves_no_model_without_its_options(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    model = load_autoencoder(folder, image_size=32)
    monkeypatch.setattr("traj_ood.autoencoders.diffusers_vae.write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(TrajOODError):
        load_autoencoder(tmp_path / "again")


def test_names_of_weights_from_before_diffusers_0_18_load(folder: Path, tmp_path: Path) -> None:
    """The published Stable Diffusion files have them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    renamed = {}
    for key, value in weights.items():
        for new, name in old.items():
            key = key.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{name}.")
        renamed[key] = value
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert load_autoencoder(tmp_path).fingerprint() == load_autoencoder(folder).fingerprint()


def test_scaled_latents_are_the_same_dynamics_in_other_units() -> None:
    network = kl(scaling_factor=0.25, shift_factor=0.5)
    plain, scaled = DiffusersVAE(network), DiffusersVAE(network, scaled=True)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(scaled.encode(images), (plain.encode(images) - 0.5) * 0.25)
    torch.testing.assert_close(scaled.decode(scaled.encode(images)), plain.decode(plain.encode(images)))
    assert plain.fingerprint() != scaled.fingerprint()


def test_the_fingerprint_covers_what_no_weight_tells() -> None:
    def differ(one: dict[str, Any], other: dict[str, Any], scaled: bool = False) -> bool:
        a, b = (DiffusersVAE(kl(**changes), scaled=scaled).fingerprint() for changes in (one, other))
        return a != b

    for one, other in (({"scaling_factor": 0.25}, {"scaling_factor": 0.5}), ({"shift_factor": 0.25}, {})):
        assert differ(one, other, scaled=True)
        assert not differ(one, other)  # f knows nothing of them
    assert differ({"norm_num_groups": 2}, {"norm_num_groups": 4})
    assert differ({"act_fn": "silu"}, {"act_fn": "relu"})


def test_trajectories_do_not_depend_on_batch_mates() -> None:
    model = DiffusersVAE(kl())
    model.chunk = 4
    start = torch.randn(6, 4, 8, 8)
    together = iterate(model.self_map, start, max_steps=5, chunk=model.chunk)
    alone = iterate(model.self_map, start[4:5], max_steps=5, chunk=model.chunk)
    torch.testing.assert_close(together.final[4], alone.final[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.residuals[4], alone.residuals[0], rtol=1e-5, atol=1e-6)


def test_images_come_in_minus_one_to_one_at_no_more_than_the_papers_size() -> None:
    model = DiffusersVAE(kl(sample_size=1024))
    assert model.input_shape == (3, 256, 256)
    assert model.chunk == 6
    white = model.transform(Image.new("RGB", (20, 30), "white"))
    assert white.shape == (3, 256, 256)
    assert bool((white == 1).all())
    assert bool((model.transform(Image.new("L", (8, 8), 0)) == -1).all())
    assert DiffusersVAE(kl(), image_size=64).input_shape == (3, 64, 64)


def test_saved_and_loaded_it_is_the_same_model(tmp_path: Path) -> None:
    model = DiffusersVAE(kl(3))
    model.save_pretrained(str(tmp_path / "again"))
    assert load_autoencoder(tmp_path / "again").fingerprint() == model.fingerprint()


@pytest.mark.parametrize("options", [{"image_size": 32}, {"image_size": 320}, {"scaled": True, "interpolation": "box"}])
def test_what_diffusers_does_not_store_is_loaded_again(tmp_path: Path, options: dict[str, Any]) -> None:
    model = DiffusersVAE(kl(3), **options)
    model.save_pretrained(tmp_path / "again")
    again = load_autoencoder(tmp_path / "again")
    assert (again.fingerprint(), again.input_shape) == (model.fingerprint(), model.input_shape)
    assert again.preprocessing == model.preprocessing
    assert load_autoencoder(tmp_path / "again", image_size=64).input_shape == (3, 64, 64)
    (tmp_path / "again" / "traj_ood.json").write_text('{"image_size": "64"}')
    with pytest.raises(TrajOODError, match="image_size: expected int, got str"):
        load_autoencoder(tmp_path / "again")


# ---------------------------------------------------------------------- the other kinds


def tiny() -> Any:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def deep() -> Any:
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
    )


def quantised() -> Any:
    blocks = {key: value for key, value in GEOMETRY.items() if key != "latent_channels"}
    return diffusers.VQModel(latent_channels=3, num_vq_embeddings=16, **blocks)


def asymmetric() -> Any:
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(4, 8),
        layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(4, 8),
        layers_per_up_block=1,
        norm_num_groups=2,
        sample_size=16,
    )


@pytest.mark.parametrize("make", [tiny, deep, quantised, asymmetric])
def test_every_kind_is_diffusers_own_map_saved_and_loaded(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = make().eval()
    network.save_pretrained(tmp_path)
    model = load_autoencoder(f"diffusers:{tmp_path}", image_size=16)
    assert isinstance(model, DiffusersVAE)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        answer = network.encode(images)
        latents = answer.latent_dist.mean if hasattr(answer, "latent_dist") else answer[0]
        decoded = network.decode(latents).sample
    torch.testing.assert_close(model.encode(images), latents)
    torch.testing.assert_close(model.decode(latents), decoded)
    assert latents.shape[2:] == (8, 8)
    model.save_pretrained(tmp_path / "again")
    again = load_autoencoder(tmp_path / "again", image_size=16)
    assert again.fingerprint() == model.fingerprint()
    assert json.loads(json.dumps(model.options())) == json.loads(json.dumps(again.options()))


def test_a_config_without_a_size_means_the_papers() -> None:
    assert DiffusersVAE(tiny()).input_shape == (3, 256, 256)
    with pytest.raises(TrajOODError, match="image_size: expected a multiple of 2, got 15"):
        DiffusersVAE(deep(), image_size=15)


@pytest.mark.parametrize("name", ["taesd", "taesd3"])
def test_the_published_tiny_autoencoders_load(name: str) -> None:
    folder = Path(__file__).parents[2].parent / "shared" / "models" / name
    if not folder.is_dir():
        pytest.skip(f"the weights of {name} are not on this machine")
    model = load_autoencoder(f"diffusers:{folder}", image_size=64)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode(images)
    assert latents.shape == (2, 4 if name == "taesd" else 16, 8, 8)
    assert latents.dtype == torch.float32
    assert model.decode(latents).shape == images.shape


def damaged(folder: Path, to: Path, what: str) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    path, config = to / "diffusion_pytorch_model.safetensors", to / "config.json"
    weights = load_file(path)
    key = "decoder.conv_in.weight"
    if what == "gone":
        path.unlink()
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif what == "missing":
        save_file({k: v for k, v in weights.items() if k != key}, path, metadata={"format": "pt"})
    elif what == "nan":
        save_file({**weights, key: weights[key] * torch.nan}, path, metadata={"format": "pt"})
    elif what == "class":
        config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "AutoencoderOobleck"}))
    elif what == "config":
        config.write_text("[1]")
    return to


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gone", r"safetensors: expected the weights, found nothing; download them, too"),
        ("cut", r"cannot be read as an AutoencoderKL"),
        ("missing", r"another architecture: 1 tensors missing .*\(first: decoder\.conv_in\.weight\)"),
        ("nan", r"decoder\.conv_in\.weight holds NaN"),
        ("class", r"unknown diffusers autoencoder 'AutoencoderOobleck': .*Known: .*AutoencoderKL, "),
        ("config", r"expected a config\.json with a model_type"),
    ],
)
def test_damaged_folders(folder: Path, tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(TrajOODError, match=message):
        load_autoencoder(f"diffusers:{damaged(folder, tmp_path / what, what)}")


def test_a_command_passes_on_no_remark_of_diffusers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config of every published autoencoder has an entry that diffusers remarks on."""
    copy = shutil.copytree(folder, tmp_path / "vae")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "of_the_trainer": 1}))
    logs = diffusers.utils.logging
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", heard.append)
    logs.add_handler(handler)
    before = logs.get_verbosity()
    logs.set_verbosity_warning()
    monkeypatch.setattr(pretrained, "_SILENT", [])  # a command of another test may have run before
    try:
        load_autoencoder(copy)
        assert "of_the_trainer" in heard.pop().getMessage()
        monkeypatch.setattr(pretrained, "_SILENT", [True])  # as by traj_ood.io.pretrained.silence_libraries
        load_autoencoder(copy)
        assert not heard
    finally:
        logs.set_verbosity(before)
        logs.remove_handler(handler)


def test_the_command_line_chooses_the_side_of_the_images(folder: Path) -> None:
    from traj_ood.cli.base import autoencoder_of
    from traj_ood.data import load_benchmark

    data = load_benchmark("fashion")
    assert autoencoder_of(f"diffusers:{folder}", data, torch.device("cpu"), 64).input_shape == (3, 64, 64)


def test_impossible_options(folder: Path) -> None:
    with pytest.raises(TrajOODError, match="image_size: expected a multiple of 2, got 15"):
        load_autoencoder(folder, image_size=15)
    with pytest.raises(TrajOODError, match="image_size: expected a multiple of 2, got 0"):
        load_autoencoder(folder, image_size=0)
    with pytest.raises(TrajOODError, match="unexpected keyword argument 'sise'"):
        load_autoencoder(folder, sise=1)
    with pytest.raises(TrajOODError, match="no such folder; expected a folder, or owner/name"):
        load_autoencoder("diffusers:./nowhere")
    with pytest.raises(TrajOODError, match="expected a model of images, got a language model"):
        load_autoencoder("causal-lm:gpt2")


def test_without_diffusers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(TrajOODError, match=r"diffusers is not installed: pip install 'traj_ood\[diffusers\]'"):
        load_autoencoder(folder)
