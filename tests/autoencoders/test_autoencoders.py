"""The autoencoder families: parity with transformers, determinism, files, and what they refuse."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from traj_ood.autoencoders import (
    MODELS,
    CallableAutoencoder,
    ConvAutoencoder,
    ConvNetwork,
    ViTMAE,
    check_autoencoder,
    load_autoencoder,
)
from traj_ood.autoencoders.vit_mae import build_model, own_name, sine_cosine_table
from traj_ood.backbones import CallableBackbone, load_backbone
from traj_ood.data.preprocessing import Preprocessing
from traj_ood.errors import TrajOODError
from traj_ood.io.pretrained import Checkpoint
from traj_ood.io.trees import write_json

RGB = {"num_channels": 3, "image_size": 16, "patch_size": 4, "num_hidden_layers": 2, "decoder_num_hidden_layers": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny ViT-MAE."""
    tiny.vit().save_pretrained(tmp_path / "mae")
    return tmp_path / "mae"


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------------------------------------- ViT-MAE


def test_parity_with_transformers_modules() -> None:
    model = tiny.vit(changes=RGB)
    reference = tiny.vit_model(**RGB).eval()
    reference.config.mask_ratio = 0.0
    x = tiny.images(5, (3, 16, 16))
    order = torch.arange(16.0).expand(5, -1)
    with torch.no_grad():
        latents = reference.vit(x, noise=order).last_hidden_state
        pixels = reference.unpatchify(reference.decoder(latents, order.long()).logits)
        again = reference.vit(pixels, noise=order).last_hidden_state
    assert latents.shape == (5, 17, 16)
    torch.testing.assert_close(model.encode(x), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.decode(latents), pixels, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model.self_map(latents), again, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(again, latents, atol=1e-2)  # the comparison is not of constants


def test_parity_of_the_masked_encoder() -> None:
    model = tiny.vit(changes=RGB, mask_ratio=0.75, mask_seed=3)
    reference = tiny.vit_model(**RGB).eval()
    x = tiny.images(3, (3, 16, 16))
    with torch.no_grad():
        out = reference.vit(x, noise=model.noise.expand(3, -1))
        pixels = reference.unpatchify(reference.decoder(out.last_hidden_state, out.ids_restore).logits)
    torch.testing.assert_close(model.encode(x), out.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.decode(model.encode(x)), pixels, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_no_call_is_random(ratio: float) -> None:
    model, x = tiny.vit(changes=RGB, mask_ratio=ratio), tiny.images(3, (3, 16, 16))
    first = model.encode(x)
    for seed in range(5):
        torch.manual_seed(seed)
        assert torch.equal(model.encode(x), first)
        assert torch.equal(model.decode(first), model.decode(first))
    torch.testing.assert_close(model.reconstruct_masked(x), model.reconstruct_masked(x), rtol=0, atol=0)
    assert torch.equal(model.encode(x), first)  # the 75 % masks in between leave no trace


@pytest.mark.parametrize(("ratio", "visible"), [(0.0, 16), (0.25, 12), (0.5, 8), (0.75, 4), (0.9, 1)])
def test_fixed_mask_hides_the_same_patches(ratio: float, visible: int) -> None:
    model = tiny.vit(changes=RGB, mask_ratio=ratio)
    x = tiny.images(4, (3, 16, 16))
    latents = model.encode(x)
    assert latents.shape == (4, 1 + visible, 16)
    assert model.decode(latents).shape == x.shape
    with torch.inference_mode():
        assert model.self_map(latents).shape == latents.shape
    hidden = []
    for row in range(4):
        seen = set()
        for patch in range(16):
            changed = x.clone()
            top, left = 4 * (patch // 4), 4 * (patch % 4)
            changed[row, :, top : top + 4, left : left + 4] += 1.0
            if not torch.equal(model.encode(changed)[row], latents[row]):
                seen.add(patch)
        hidden.append(set(range(16)) - seen)
        if row == 1:
            break
    assert hidden[0] == hidden[1]
    assert len(hidden[0]) == 16 - visible
    other = tiny.vit(changes=RGB, mask_ratio=ratio, mask_seed=1)
    assert (other.fingerprint() == model.fingerprint()) is (ratio == 0)
    assert torch.equal(other.noise, model.noise) is (ratio == 0)


def test_reconstruct_masked_is_the_error_on_hidden_patches() -> None:
    model, x = tiny.vit(changes=RGB), tiny.images(6, (3, 16, 16))
    reference = tiny.vit_model(**RGB).eval()
    reference.config.mask_ratio = 0.75
    expected = torch.zeros(6, dtype=torch.float64)
    for seed in range(model.reconstruction_masks()):
        hidden = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[4:]
        noise = torch.arange(16.0)
        noise[hidden] += 16
        with torch.no_grad():
            out = reference.vit(x, noise=noise.expand(6, -1))
            patches = reference.decoder(out.last_hidden_state, out.ids_restore).logits
        error = (patches - reference.patchify(x)).double().square().mean(dim=-1)
        expected += error[:, hidden].mean(dim=1) / model.reconstruction_masks()
    torch.testing.assert_close(model.reconstruct_masked(x), expected, rtol=1e-5, atol=1e-6)


def test_rows_do_not_depend_on_batch_mates() -> None:
    model, x = tiny.vit(changes=RGB), tiny.images(40, (3, 16, 16))
    together = model.encode(x)
    for b in (0, 17, 39):
        torch.testing.assert_close(model.encode(x[b : b + 1])[0], together[b], rtol=1e-5, atol=1e-6)


def test_position_tables() -> None:
    model = build_model({**tiny.VIT, "image_size": 24, "decoder_hidden_size": 12})
    encoder, decoder = model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed
    assert encoder.shape == (1, 37, 16)
    assert decoder.shape == (1, 37, 12)
    for table in (encoder, decoder):
        assert not table[0, 0].any()
        assert table[0, 1:].any(dim=1).all()
        assert len({tuple(row) for row in table[0].tolist()}) == 37
    from transformers.models.vit_mae import modeling_vit_mae

    own = getattr(modeling_vit_mae, "build_2d_sinusoidal_position_embedding", None)
    if own is None:
        pytest.skip("this transformers has no build_2d_sinusoidal_position_embedding to compare with")
    for table in (encoder, decoder):
        canonical = own(height=6, width=6, embed_dim=table.shape[-1], cls_token=True)
        half = table.shape[-1] // 2
        swapped = torch.cat([canonical[:, half:], canonical[:, :half]], dim=1)
        torch.testing.assert_close(table[0], swapped, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_zero_position_tables_are_refused(part: str, folder: Path) -> None:
    model = tiny.vit_model()
    with torch.no_grad():
        (model.vit.embeddings.position_embeddings if part == "encoder" else model.decoder.decoder_pos_embed).zero_()
    with pytest.raises(TrajOODError, match=f"mine: the {part}'s position embeddings are all zero: build new models"):
        ViTMAE(model, name="mine")
    key = "vit.embeddings.position_embeddings" if part == "encoder" else "decoder.decoder_pos_embed"
    rewrite(folder / "model.safetensors", lambda w: w[key].zero_())
    with pytest.raises(TrajOODError, match=f"mae: the {part}'s position embeddings are all zero"):
        load_autoencoder(folder)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_impossible_mask_ratio(ratio: float) -> None:
    with pytest.raises(TrajOODError, match="mask_ratio: expected 0 <= ratio < 1, got"):
        tiny.vit(mask_ratio=ratio)
    with pytest.raises(TrajOODError, match=r"mask_ratio: expected one that leaves .* of 4 patches visible, got 0\.9"):
        tiny.vit(mask_ratio=0.9)
    with pytest.raises(TrajOODError, match="mask_seed: expected a whole number from 0 to"):
        tiny.vit(mask_ratio=0.5, mask_seed=-1)


def test_hidden_size_must_fit_the_table() -> None:
    with pytest.raises(TrajOODError, match="2-D sine-cosine table needs a multiple of 4, got 18"):
        sine_cosine_table(2, 18)


def test_norm_pix_loss_warns() -> None:
    with pytest.warns(UserWarning, match="vit-mae was trained with norm_pix_loss: its decoder predicts per-patch"):
        tiny.vit(changes={"norm_pix_loss": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.vit()


# ---------------------------------------------------------------------------------------------- ViT-MAE files


def test_vit_round_trip_and_transformers_reads_it(tmp_path: Path) -> None:
    model = tiny.vit(changes=RGB, name="mine", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    model.save_pretrained(str(tmp_path / "deep" / "mine"))
    loaded = load_autoencoder(tmp_path / "deep" / "mine")
    assert isinstance(loaded, ViTMAE)
    assert loaded.fingerprint() == model.fingerprint()
    assert (loaded.name, loaded.input_shape, loaded.mean, loaded.std) == ("mine", (3, 16, 16), model.mean, model.std)
    x = tiny.images(3, (3, 16, 16))
    assert torch.equal(loaded.encode(x), model.encode(x))
    from transformers import ViTMAEForPreTraining

    names = set(load_file(tmp_path / "deep" / "mine" / "model.safetensors"))
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names  # the only ones that transformers 4 reads
    loaded.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == names
    theirs, report = ViTMAEForPreTraining.from_pretrained(
        tmp_path / "again", trust_remote_code=False, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, model.module.state_dict()[key]), key
    assert load_autoencoder(tmp_path / "deep" / "mine", mask_ratio=0.5).options()["mask_ratio"] == 0.5
    masked = tiny.vit(changes=RGB, mask_ratio=0.5, mask_seed=3)
    masked.save_pretrained(tmp_path / "again")
    assert load_autoencoder(tmp_path / "again").fingerprint() == masked.fingerprint()
    loaded.save_pretrained(tmp_path / "again")
    assert load_autoencoder(tmp_path / "again").fingerprint() == loaded.fingerprint()


def test_default_normalisation() -> None:
    assert tiny.vit(changes=RGB).mean == (0.485, 0.456, 0.406)
    assert tiny.vit().mean == (0.5,)


def test_fingerprint_covers_weights_and_options() -> None:
    model = tiny.vit()
    assert model.fingerprint() == tiny.vit().fingerprint()
    assert len(model.fingerprint()) == 64
    others = [tiny.vit(seed=1), tiny.vit(mask_ratio=0.5), tiny.vit(mask_ratio=0.5, mask_seed=1), tiny.vit(mean=(0.4,))]
    one_weight = tiny.vit()
    with torch.no_grad():
        next(iter(one_weight.module.parameters())).view(-1)[0] += 1e-6
    prints = {m.fingerprint() for m in [model, *others, one_weight, tiny.conv(), tiny.conv(1), tiny.toy()]}
    assert len(prints) == 9


def test_encoder_without_decoder(folder: Path) -> None:
    path = folder / "model.safetensors"
    rewrite(path, lambda w: [w.pop(k) for k in list(w) if k.startswith("decoder.")])
    with pytest.raises(TrajOODError, match=r"model\.safetensors: holds an encoder without a decoder.*vit-mae-base"):
        load_autoencoder(folder)


def test_nan_weights(folder: Path) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        weights["decoder.decoder_norm.weight"][2] = float("nan")

    rewrite(folder / "model.safetensors", spoil)
    with pytest.raises(TrajOODError, match=r"model\.safetensors: decoder\.decoder_norm\.weight holds NaN or infinite"):
        load_autoencoder(folder)


def test_weights_of_another_architecture(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=2)
    with pytest.raises(TrajOODError, match=r"weights of another architecture: \d+ tensors missing \(first: vit\."):
        load_autoencoder(folder)
    edit_json(folder / "config.json", num_hidden_layers=1, intermediate_size=48)
    with pytest.raises(TrajOODError, match=r"another architecture: vit\..* expected \(48"):
        load_autoencoder(folder)
    tiny.conv().save_pretrained(tmp_path / "conv")
    shutil.copy(tmp_path / "conv" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(TrajOODError, match=r"model\.safetensors"):
        load_autoencoder(folder)


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TrajOODError, match=r"model\.safetensors: cannot be read as plain weights"):
        load_autoencoder(folder)


def test_missing_files_and_wrong_types(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    edit_json(folder / "config.json", model_type="bert")
    with pytest.raises(
        TrajOODError,
        match=r"unknown model family 'bert': Known: .*traj_ood_conv, traj_ood_pair, traj_ood_surrogate, vit_mae"
        rf".* A classifier of transformers is transformers:{folder}$",
    ):
        load_autoencoder(folder)
    with pytest.raises(TrajOODError, match=r"config\.json: expected model_type 'vit_mae', got 'bert'"):
        ViTMAE.from_pretrained(folder)
    (folder / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(TrajOODError, match=rf"a model_type, found none in it: a network of timm, .* is timm:{folder}$"):
        load_autoencoder(folder)
    for text in ("", "[1]", "{", "null"):
        (folder / "config.json").write_text(text)
        with pytest.raises(TrajOODError, match=r"config\.json"):
            load_autoencoder(folder)
        with pytest.raises(TrajOODError, match=r"config\.json"):
            ViTMAE.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(TrajOODError, match=r"mae: expected a config\.json with a model_type"):
        load_autoencoder(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").unlink()
    with pytest.raises(TrajOODError, match=r"mae: expected a folder with config\.json and model\.safetensors"):
        load_autoencoder(folder)


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 3}, {"patch_size": 0}, {"hidden_size": "wide"}, {"patch_size": 16}]
)
def test_impossible_geometry_in_a_config(folder: Path, changes: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(TrajOODError, match="mae"):
        load_autoencoder(folder)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "expected images of 8 x 8, as the network takes, got 224 x 224"),
        ({"size": 8, "image_mean": [0.5] * 3, "image_std": [1.0] * 3}, "for each of 1 channels"),
        ({"size": 8, "image_mean": "grey"}, "expected numbers image_mean and image_std, got 'grey'"),
        ({"size": 8, "do_pad": True}, "do_pad: expected no such setting, got True"),
        ({"size": {"shortest_edge": 8}}, "size: expected do_center_crop with shortest_edge"),
        ({"size": 8, "resample": 77}, "expected one of Pillow's filters, got 77"),
        ({"size": 8, "image_processor_type": "ImageGPTImageProcessor"}, "expected a ViTImageProcessor, got 'ImageGPT"),
    ],
)
def test_preprocessing_that_does_not_fit(folder: Path, settings: dict[str, Any], text: str) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(TrajOODError, match=rf"preprocessor_config\.json: .*{text}"):
        load_autoencoder(folder)


class Hub:
    """Stands for ``ViTMAEForPreTraining.from_pretrained`` with a network."""

    def __init__(self, missing: list[str]) -> None:
        self.missing = missing

    def __call__(self, source: str, **options: Any) -> tuple[Any, dict[str, list[str]]]:
        if source != "owner/good":
            raise OSError(f"{source} is not a repository\nsecond line")
        return tiny.vit_model(), {"missing_keys": self.missing}


@pytest.mark.parametrize(
    "source", ["runs/conw", "runs/conw/vae", "./conw", "~/no-such-folder", "C:\\\\conw", "D:/conw"]
)
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for library in ("huggingface_hub", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)  # importing it fails
    for model in (source, f"diffusers:{source}"):
        with pytest.raises(TrajOODError, match="no such folder; expected a folder"):
            load_autoencoder(model)
    with pytest.raises(TrajOODError, match="no such folder; expected a folder"):
        Checkpoint("transformers", source, "a processor")


def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from transformers import ViTMAEForPreTraining

    stored = tmp_path / "preprocessor_config.json"
    stored.write_text(json.dumps({"size": 8, "image_mean": [0.1], "image_std": [0.2]}))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda source, file: stored)
    monkeypatch.setattr(ViTMAEForPreTraining, "from_pretrained", Hub([]))
    model = load_autoencoder("owner/good")
    assert (model.name, model.options()["mean"], model.options()["std"]) == ("owner/good", [0.1], [0.2])
    stored.unlink()
    with pytest.raises(TrajOODError, match=r"preprocessor_config\.json"):
        load_autoencoder("owner/good")
    with pytest.raises(
        TrajOODError, match=r"model 'owner/bad': neither a local folder nor loadable from the hub \(own"
    ):
        load_autoencoder("owner/bad")
    monkeypatch.setattr(ViTMAEForPreTraining, "from_pretrained", Hub(["decoder.mask_token", "decoder.b"]))
    with pytest.raises(
        TrajOODError, match=r"2 tensors missing or of another shape \(first: decoder\.b\), and would stay"
    ):
        load_autoencoder("owner/good")


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(TrajOODError, match="unknown model 'fashion-mea': did you mean 'fashion-mae'"):
        load_autoencoder("fashion-mea")
    with pytest.raises(TrajOODError, match="did you mean 'vit-mae-"):
        load_autoencoder("vit-mae-bas")
    for name in (str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(TrajOODError, match=r"none|a/b/c"):
            load_autoencoder(name)
    assert set(MODELS) >= {"fashion-mae", "vit-mae-base", "vit-mae-large", "vit-mae-huge"}


def test_unknown_option_of_a_family(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrajOODError, match="mask_ration"):
        load_autoencoder(folder, mask_ration=0.5)
    tiny.conv().save_pretrained(tmp_path / "conv")
    with pytest.raises(TrajOODError, match="mask_ratio"):
        load_autoencoder(tmp_path / "conv", mask_ratio=0.5)


# ---------------------------------------------------------------------------------------------- conv


@pytest.mark.parametrize(
    ("channels", "size", "width", "bottleneck"),
    [(1, 28, 32, 128), (3, 32, 8, 20), (1, 64, 4, 5), (3, 64, 2, 1), (2, 17, 3, 7), (1, 1, 1, 1)],
)
def test_conv_shapes(channels: int, size: int, width: int, bottleneck: int) -> None:
    model = ConvAutoencoder(ConvNetwork(channels, size, width, bottleneck))
    model.chunk = 4
    x = tiny.images(5, (channels, size, size))
    latents = model.encode(x)
    assert latents.shape == (5, bottleneck)
    assert model.decode(latents).shape == x.shape
    with torch.inference_mode():
        assert model.self_map(latents).shape == latents.shape


def test_conv_follows_table_4() -> None:
    net: Any = ConvNetwork(1, 28, 32, 128)
    convolutions = [m for m in net.down if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [(1, 32), (32, 64), (64, 128), (128, 256)]
    assert all(m.stride == (2, 2) and m.kernel_size == (3, 3) for m in convolutions)
    mirrored = [m for m in net.up if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels) for m in mirrored] == [(256, 128), (128, 64), (64, 32), (32, 1)]
    assert (net.to_latent.in_features, net.to_latent.out_features) == (256 * 2 * 2, 128)
    assert (net.from_latent.in_features, net.from_latent.out_features) == (128, 256 * 2 * 2)


def test_conv_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ConvAutoencoder(ConvNetwork(3, 20, 3, 9), name="c", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    model.save_pretrained(str(tmp_path / "c"))
    loaded = load_autoencoder(tmp_path / "c")
    assert isinstance(loaded, ConvAutoencoder)
    assert loaded.fingerprint() == model.fingerprint()
    assert (loaded.name, loaded.input_shape, loaded.options()) == ("c", (3, 20, 20), model.options())
    x = tiny.images(3, (3, 20, 20))
    assert torch.equal(loaded.decode(loaded.encode(x)), model.decode(model.encode(x)))


@pytest.mark.parametrize("key", ["channels", "size", "width", "bottleneck"])
def test_conv_impossible_geometry(key: str) -> None:
    with pytest.raises(TrajOODError, match=f"conv autoencoder: {key} must be at least 1, got 0"):
        ConvNetwork(**{key: 0})


def test_conv_damaged_files(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    tiny.conv().save_pretrained(folder)
    path, config = folder / "model.safetensors", (folder / "config.json").read_text()
    weights = path.read_bytes()
    path.write_bytes(weights[:50])
    with pytest.raises(TrajOODError, match=r"c: expected config\.json and model\.safetensors of a conv model"):
        load_autoencoder(folder)
    path.write_bytes(weights)
    rewrite(path, lambda w: w["to_latent.bias"].fill_(float("inf")))
    with pytest.raises(TrajOODError, match=r"model\.safetensors: to_latent\.bias holds NaN or infinite weights"):
        load_autoencoder(folder)
    path.write_bytes(weights)
    tree = json.loads(config)
    edit_json(folder / "config.json", network={**tree["network"], "bottleneck": 7})
    with pytest.raises(TrajOODError, match=r"weights of another architecture: .* expected \(.*7"):
        load_autoencoder(folder)
    edit_json(folder / "config.json", network={**tree["network"], "channels": 3})
    with pytest.raises(TrajOODError, match="weights of another architecture"):
        load_autoencoder(folder)


@pytest.mark.parametrize(
    "drop", [{"network": None}, {"network": {"hidden": 3}}, {"network": {"channels": "one"}}, {"mean": None}]
)
def test_conv_config_that_says_nothing_usable(tmp_path: Path, drop: dict[str, Any]) -> None:
    folder = tmp_path / "c"
    tiny.conv().save_pretrained(folder)
    edit_json(folder / "config.json", **drop)
    with pytest.raises(TrajOODError, match=r"config\.json|conv"):
        load_autoencoder(folder)


def test_conv_has_no_masks() -> None:
    model = tiny.conv()
    assert model.reconstruction_masks() == 0
    with pytest.raises(TrajOODError, match=r"conv \(conv\) has no masked reconstruction"):
        model.reconstruct_masked(tiny.images(2))
    with pytest.raises(TrajOODError, match=r"conv: a conv autoencoder has no masking, got mask ratio 0\.5"):
        model.reconstruct_corrupted(tiny.images(2), 0.1, 0.5, torch.Generator())


# ---------------------------------------------------------------------------------------------- bring your own


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def encode(self, images: Tensor) -> Tensor:
        return self.scale * images.flatten(1)

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / self.scale).reshape(-1, 1, 2, 3)


def test_callable_autoencoder() -> None:
    model = CallableAutoencoder(lambda x: x.flatten(1), lambda z: z.reshape(-1, 1, 2, 3), (1, 2, 3), chunk=4)
    x = tiny.images(7, (1, 2, 3))
    assert torch.equal(model.encode(x), x.flatten(1))
    assert torch.equal(model.decode(model.encode(x)), x)
    assert (model.name, model.family, model.device.type, model.parameter_count()) == ("custom", "custom", "cpu", 0)
    assert repr(model) == "CallableAutoencoder('custom', input_shape=(1, 2, 3))"
    pixels = model.transform(Image.new("L", (3, 2), 255))
    assert torch.equal(pixels, torch.ones(1, 2, 3))
    with pytest.raises(TrajOODError, match=r"custom \(custom\) cannot be trained by traj_ood"):
        model.reconstruct_corrupted(x, 0.0, 0.0, torch.Generator())


@pytest.mark.parametrize(
    ("decode", "got"),
    [(lambda z: z.view(-1, 1, 8, 6), r"\(48, 1, 8, 6\)"), (lambda z: z, r"\(48, 48\)")],
)
def test_decoded_images_have_the_size_of_encoded_ones(decode: Callable[[Tensor], Tensor], got: str) -> None:
    model = CallableAutoencoder(lambda x: x.flatten(1), decode, (1, 6, 8), module=nn.Module())
    with pytest.raises(TrajOODError, match=rf"decode: expected images \(B, 1, 6, 8\) as encode takes them, got {got}"):
        model.encode(torch.rand(3, 1, 6, 8))


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("fashion-mae", r"got str: load it, traj_ood.load_autoencoder\('fashion-mae'\)"),
        (nn.Flatten(), r"got Flatten: wrap it, traj_ood.CallableAutoencoder.from_module\("),
        (
            CallableBackbone(lambda x: x.flatten(1), (1, 2, 2), 4, module=nn.Module()),
            r"got CallableBackbone: train an autoencoder of its features, traj_ood.surrogate_for\(",
        ),
        (None, r"got NoneType: load one, .* or wrap your own in CallableAutoencoder"),
    ],
)
def test_what_is_no_autoencoder(given: Any, remedy: str) -> None:
    with pytest.raises(TrajOODError, match=f"model: expected a traj_ood.Autoencoder, {remedy}"):
        check_autoencoder(given)


def test_a_network_is_no_name() -> None:
    with pytest.raises(TrajOODError, match=r"load_autoencoder: .*, got Linear: wrap .* in a traj_ood\.CallableAutoenc"):
        load_autoencoder(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TrajOODError, match=r"load_backbone: .*, got Linear: wrap .* in a traj_ood\.CallableBackbone"):
        load_backbone(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_callable_from_module() -> None:
    module = Mine().train()
    model = CallableAutoencoder.from_module(
        module, (1, 2, 3), transform=lambda image: torch.full((1, 2, 3), float(image.width))
    )
    x = tiny.images(2, (1, 2, 3))
    torch.testing.assert_close(model.decode(model.encode(x)), x)
    assert (model.name, model.parameter_count(), module.training) == ("Mine", 1, True)  # the caller's own mode
    assert float(model.transform(Image.new("L", (9, 9)))[0, 0, 0]) == 9
    before = model.fingerprint()
    with torch.no_grad():
        module.scale += 1
    assert model.fingerprint() != before
    assert CallableAutoencoder.from_module(module, (1, 2, 3), name="n").name == "n"


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_module_without_a_method(method: str) -> None:
    other = {"encode": "decode", "decode": "encode"}[method]
    half = type("Half", (nn.Module,), {other: lambda self, x: x})()
    with pytest.raises(TrajOODError, match=f"Half: expected methods encode and decode, .* found {other}: wrap it:"):
        CallableAutoencoder.from_module(half, (1, 2, 3))


# ---------------------------------------------------------------------------------------------- shared


def test_views() -> None:
    model, latents = tiny.vit(), torch.arange(30.0).reshape(2, 3, 5)
    assert torch.equal(model.view(latents, "tokens"), latents.flatten(1))
    assert torch.equal(model.view(latents, "cls"), latents[:, 0])
    assert torch.equal(model.view(latents, "mean"), latents[:, 1:].mean(dim=1))
    plain = tiny.conv()
    assert torch.equal(plain.view(latents, "mean"), latents.mean(dim=1))
    with pytest.raises(TrajOODError, match="conv has no CLS token: use view=mean or view=tokens"):
        plain.view(latents, "cls")
    for view in ("tokens", "cls", "mean"):
        assert torch.equal(plain.view(latents[:, 0], view), latents[:, 0])  # type: ignore[arg-type]
    maps = torch.arange(2 * 3 * 8 * 6.0).reshape(2, 3, 8, 6)
    assert torch.equal(plain.view(maps, "mean"), maps.mean(dim=(2, 3)))
    assert torch.equal(plain.view(maps, "tokens"), maps.flatten(1))
    grid = plain.grid(maps)  # 4 × 4 cells of 2 rows and, of 6 columns, 2 overlapping ones
    assert grid.shape == (2, 16, 3)
    assert torch.equal(grid[1, 5], maps[1, :, 2:4, 1:3].mean(dim=(1, 2)))
    assert torch.equal(plain.grid(maps[:, :, :2, :1]), maps[:, :, :2, 0].transpose(1, 2))
    with pytest.raises(TrajOODError, match="latent view: expected one of tokens, cls, mean, got 'patch'"):
        model.view(latents, "patch")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("side", "ratio", "cells"), [(5, 0.3, 13), (5, 0.36, 12), (3, 0.5, 4), (9, 0.9, 6), (8, 0, 16)]
)
def test_the_grid_under_a_mask_is_where_the_visible_patches_are(side: int, ratio: float, cells: int) -> None:
    model = tiny.vit(changes={"image_size": 4 * side}, mask_ratio=ratio, mask_seed=2)
    numbers = torch.arange(side**2, dtype=torch.float32)[None, :, None].expand(2, -1, 16)  # each patch says which it is
    model.module.vit.embeddings.config.mask_ratio = float(ratio)  # as at every call of the encoder
    visible = model.module.vit.embeddings.random_masking(numbers, noise=model.noise.expand(2, -1))[0]
    found = model.grid(torch.cat([torch.full((2, 1, 16), -1e6), visible], dim=1))
    places: dict[tuple[int, int], list[int]] = {}
    for patch in visible[0, :, 0].int().tolist():
        row, column = patch // side, patch % side
        places.setdefault((4 * row // side, 4 * column // side) if side > 4 else (row, column), []).append(patch)
    assert len(places) == cells
    expected = torch.tensor([sum(own) / len(own) for _, own in sorted(places.items())])
    torch.testing.assert_close(found, expected[None, :, None].expand(2, -1, 16))


def test_weights_of_several_types_take_float32() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
            self.down, self.up = torch.nn.Linear(64, 4), torch.nn.Linear(4, 64)

        def encode(self, images: Tensor) -> Tensor:
            return self.down(images.flatten(1)) * self.temperature.float()

        def decode(self, latents: Tensor) -> Tensor:
            return self.up(latents).reshape(-1, 1, 8, 8)

    model = CallableAutoencoder.from_module(Mixed(), (1, 8, 8))
    images = tiny.images(3)
    assert torch.equal(model.encode(images.double()), model.encode(images))


@pytest.mark.parametrize("make", [tiny.vit, tiny.conv])
def test_wrong_images(make: Callable[[], Any]) -> None:
    model = make()
    for shape in ((2, 3, 8, 8), (2, 1, 8, 9), (1, 8, 8), (2, 1, 28, 28)):
        with pytest.raises(TrajOODError, match=rf"expected float images \(B, 1, 8, 8\), got .*{shape[-1]}\): prepare"):
            model.encode(torch.zeros(shape))
    with pytest.raises(TrajOODError, match=r"expected float images \(B, 1, 8, 8\), got torch.uint8"):
        model.encode(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    x = tiny.images(5)
    x[3, 0, 0, 0] = float("nan")
    x[4, 0, 0, 0] = float("inf")
    with pytest.raises(TrajOODError, match=r"2 image\(s\) have NaN or infinite pixels, first at row 3"):
        model.encode(x)


@pytest.mark.parametrize("make", [tiny.vit, tiny.conv, tiny.toy])
def test_empty_batch(make: Callable[[], Any]) -> None:
    model = make()
    latents = model.encode(torch.empty(0, *model.input_shape))
    assert len(latents) == 0
    assert latents.shape[1:] == model.encode(torch.zeros(1, *model.input_shape)).shape[1:]


@pytest.mark.parametrize("size", [(28, 20), (64, 64), (9, 31), (500, 333)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_direct_resize_is_torchvisions_resize_and_normalize(channels: int, size: tuple[int, int]) -> None:
    from sklearn.datasets import load_sample_images
    from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

    image = Image.fromarray(load_sample_images().images[0]).resize(size)
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    reference = Compose([Resize((24, 24), InterpolationMode.BILINEAR), ToTensor(), Normalize(mean, std)])
    mode = image.convert("L") if channels == 1 else image
    expected = reference(mode)
    torch.testing.assert_close(Preprocessing((channels, 24, 24), mean, std)(image), expected, rtol=1e-6, atol=1e-6)


def test_a_preprocessing_converts_channels_and_keeps_an_image_of_the_right_size() -> None:
    grey, colour = Image.new("L", (4, 4), 51), Image.new("RGB", (4, 4), (255, 0, 0))
    assert torch.equal(Preprocessing((3, 4, 4), (0.0,) * 3, (1.0,) * 3)(grey), torch.full((3, 4, 4), 0.2))
    luma = Preprocessing((1, 4, 4), (0.0,), (1.0,))(colour)
    assert torch.equal(luma, torch.full((1, 4, 4), 76 / 255))
    assert Preprocessing((3, 2, 6), (0.0,) * 3, (1.0,) * 3)(colour).shape == (3, 2, 6)


PUBLISHED = (  # names in the published files and in transformers 4
    ("vit.layers.", "vit.encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


@pytest.mark.parametrize("form", ["transformers", "published", "published.bin"])
def test_a_folder_as_others_write_it(form: str, tmp_path: Path) -> None:
    model = tiny.vit()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if form == "transformers":
        model.module.save_pretrained(tmp_path)  # type: ignore[operator]
        assert (tmp_path / "model.safetensors").is_file()
    else:
        weights = {}
        for key, value in model.module.state_dict().items():
            key = own_name(key)
            for own, published in PUBLISHED:
                key = key.replace(own, published)
            weights[key] = value.clone()
        assert "vit.encoder.layer.0.attention.attention.query.weight" in weights
        assert "decoder.decoder_layers.0.output.dense.bias" in weights
        if form.endswith(".bin"):
            torch.save(weights, tmp_path / "pytorch_model.bin")
        else:
            save_file(weights, tmp_path / "model.safetensors")
    found = load_autoencoder(tmp_path)
    assert found.fingerprint() == model.fingerprint()
    assert torch.equal(found.encode(tiny.images(3)), model.encode(tiny.images(3)))


def test_a_model_of_the_current_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    (folder / "inner").mkdir(parents=True)
    tiny.conv().save_pretrained(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for place, source in ((folder, "."), (folder, "conv:."), (folder / "inner", ".."), (tmp_path, "conv:~/mine")):
        monkeypatch.chdir(place)
        assert load_autoencoder(source).name == "mine"


def test_an_interrupted_save_leaves_no_model_without_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(path: Path, *args: Any) -> None:
        if path.name != "traj_ood.json":
            return write_json(path, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr("traj_ood.autoencoders.vit_mae.write_json", written)
    with pytest.raises(KeyboardInterrupt):
        tiny.vit(mask_ratio=0.5).save_pretrained(tmp_path)
    with pytest.raises(TrajOODError, match="expected"):
        load_autoencoder(tmp_path)


def test_masked_reconstruction_in_the_type_of_the_model() -> None:
    images = tiny.images(3, (1, 8, 8))
    expected, model = tiny.vit().reconstruct_masked(images), tiny.vit()
    model.module.double()
    torch.testing.assert_close(model.reconstruct_masked(images), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(TrajOODError, match=r"expected float images \(B, 1, 8, 8\), got"):
        model.reconstruct_masked(images[:, :, :4])


@pytest.mark.parametrize("chunk", [0, -6, 2.5])
def test_an_impossible_chunk(chunk: Any) -> None:
    with pytest.raises(TrajOODError, match="custom: chunk: expected a whole number of at least 1 row, got"):
        CallableAutoencoder(lambda x: x, lambda z: z, (1, 4, 4), chunk=chunk)
