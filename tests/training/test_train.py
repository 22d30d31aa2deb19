"""Training: configs that are refused, losses that fall, and resuming to exactly the same weights."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

from traj_ood.autoencoders import Autoencoder, ConvAutoencoder, ViTMAE, load_autoencoder
from traj_ood.autoencoders.vit_mae import own_name
from traj_ood.errors import TrajOODError
from traj_ood.training.autoencoder import build_autoencoder, train_model
from traj_ood.training.config import CONFIGS, Recipe, TrainConfig
from traj_ood.training.loop import learning_rate

VIT = {k: v for k, v in tiny.VIT.items() if k not in ("image_size", "num_channels")}
RECIPE = {"epochs": 3, "batch_size": 8, "learning_rate": 0.005, "input_noise": 0.1}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.write_benchmark(tmp_path, train=40, val=5, test=3, ood=3)
    return tmp_path


def write(place: Path, family: str = "conv", recipe: dict[str, Any] | None = None, **changes: Any) -> str:
    model = {"width": 4, "bottleneck": 6} if family == "conv" else VIT
    own: dict[str, Any] = {} if family == "conv" else {"mask_ratios": [0.0, 0.5], "flip": True}
    tree = {
        "name": f"tiny-{family}",
        "benchmark": str(place / "tiny.yaml"),
        "family": family,
        "image_size": 8,
        "channels": 1,
        "model": model,
        "recipe": {**RECIPE, **own, **(recipe or {})},
        "health_images": 3,
        **changes,
    }
    path = place / "train.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in tree.items() if v is not None}))
    return str(path)


def train(place: Path, out: str, *, fresh: bool = False, **changes: Any) -> Autoencoder:
    return train_model(TrainConfig.load(write(place, **changes)), str(place / out), fresh=fresh, quiet=True)


def weights(model: Autoencoder) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.module.state_dict().items()}


# ---------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("family", ["conv", "vit_mae"])
def test_training_lowers_the_loss_and_writes_everything(
    place: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = train(place, "out", family=family, recipe={"learning_rate": 0.02, "batch_size": 2})
    out = place / "out"
    record = json.loads((out / "training.json").read_text())
    losses = [line["loss"] for line in record["log"]]
    assert [line["epoch"] for line in record["log"]] == [1, 2, 3]
    assert losses[-1] < 0.98 * losses[0]
    assert all(math.isfinite(v) for v in losses)
    assert record["config"]["recipe"]["batch_size"] == 2
    assert record["data"]["train"]["count"] == 40
    assert record["health"]["count"] == 3
    assert record["fingerprint"] == model.fingerprint()
    assert 0 < record["validation_loss"] < 3
    card = (out / "README.md").read_text()
    for text in (f"# tiny-{family}", f"{losses[0]:.4f}", f"{losses[-1]:.4f}", "## Losses", "## Convergence"):
        assert text in card
    loaded = load_autoencoder(out)
    assert isinstance(loaded, ViTMAE if family == "vit_mae" else ConvAutoencoder)
    assert loaded.fingerprint() == model.fingerprint()
    assert not (out / "checkpoint.pt").exists()
    assert not [p for p in out.rglob("*") if p.suffix == ".tmp"]
    assert [json.loads(line)["epoch"] for line in capsys.readouterr().err.strip().splitlines()] == [1, 2, 3]
    assert not any(p.requires_grad for p in model.module.parameters())
    assert not model.module.training


def test_the_card_tells_of_noise_where_there_was_some(place: Path) -> None:
    for noise, told in ((0.1, True), (0.0, False)):
        train(place, f"out-{noise}", recipe={"epochs": 1, "input_noise": noise})
        card = (place / f"out-{noise}" / "README.md").read_text()
        assert ("trained to remove noise" in card) == told
        assert ("Training loss (corrupted input, mean squared error" in card) == told
        assert "mean squared error, normalised units)" in card


def test_the_callers_random_numbers_are_the_callers(place: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(place, "out", recipe={"epochs": 1})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_finished_training_is_not_replaced_unasked(place: Path) -> None:
    trained = train(place, "out", recipe={"epochs": 1})
    with pytest.raises(TrajOODError, match=r"out: holds a finished training \(training\.json\).*--fresh"):
        train(place, "out", recipe={"epochs": 1}, seed=7)
    assert load_autoencoder(place / "out").fingerprint() == trained.fingerprint()
    again = train(place, "out", recipe={"epochs": 1}, seed=7, fresh=True)
    assert load_autoencoder(place / "out").fingerprint() == again.fingerprint() != trained.fingerprint()


def test_normalisation_is_that_of_the_training_images(place: Path) -> None:
    import numpy as np
    from PIL import Image

    model = train(place, "out", recipe={"epochs": 1})
    assert isinstance(model, ConvAutoencoder)
    files = sorted((place / "images" / "train").iterdir())
    pixels = np.stack([np.asarray(Image.open(p)) for p in files]) / 255
    assert model.mean == pytest.approx((pixels.mean(),), abs=1e-4)
    assert model.std == pytest.approx((pixels.std(),), abs=1e-3)
    assert load_autoencoder(place / "out").options() == model.options()


def test_position_tables_stay_as_they_are(place: Path) -> None:
    model = train(place, "out", family="vit_mae", recipe={"epochs": 1})
    fresh = build_autoencoder(TrainConfig.load(write(place, "vit_mae")), (0.5,), (0.5,))
    for key, value in weights(fresh).items():
        if key.endswith(("position_embeddings", "decoder_pos_embed")):
            assert torch.equal(weights(model)[key], value)
            assert value.any()
    changed = [k for k, v in weights(fresh).items() if not torch.equal(weights(model)[k], v)]
    assert len(changed) > 20


def test_same_seed_same_weights_other_seed_other_weights(place: Path) -> None:
    one, two, other = (train(place, f"out{i}", recipe={"epochs": 1}, seed=s) for i, s in enumerate((0, 0, 1)))
    assert one.fingerprint() == two.fingerprint()
    assert one.fingerprint() != other.fingerprint()


def test_masked_loss_and_linear_adam(place: Path) -> None:
    train(place, "a", family="vit_mae", recipe={"epochs": 1, "loss": "masked", "mask_ratios": [0.5, 0.75]})
    train(place, "b", recipe={"epochs": 1, "optimizer": "adam", "schedule": "linear", "warmup": 0.0})


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("family", "epochs", "changes"),
    [
        ("conv", 1, {}),
        ("conv", 2, {}),
        ("vit_mae", 1, {}),
        ("vit_mae", 1, {"model": {**VIT, "hidden_dropout_prob": 0.3}}),
    ],
    ids=["conv-1", "conv-2", "vit-1", "vit-dropout"],
)
def test_resume_ends_with_the_same_weights(place: Path, family: str, epochs: int, changes: dict[str, Any]) -> None:
    whole = train(place, "whole", family=family, **changes)
    with pytest.MonkeyPatch.context() as patch:
        tiny.interrupt_training(patch, epochs)
        with pytest.raises(KeyboardInterrupt):
            train(place, "parts", family=family, **changes)
    assert (place / "parts" / "checkpoint.pt").is_file()
    assert not (place / "parts" / "training.json").exists()
    torch.manual_seed(999)  # whatever the process did in between
    resumed = train(place, "parts", family=family, **changes)
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key
    log = json.loads((place / "parts" / "training.json").read_text())["log"]
    reference = json.loads((place / "whole" / "training.json").read_text())["log"]
    assert [(e["epoch"], e["loss"]) for e in log] == [(e["epoch"], e["loss"]) for e in reference]


def test_interrupted_after_the_last_epoch(place: Path) -> None:
    whole = train(place, "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConvAutoencoder, "save_pretrained", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train(place, "parts")
    assert train(place, "parts").fingerprint() == whole.fingerprint()


def interrupted(place: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        tiny.interrupt_training(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(place, "out")


def test_another_config_is_refused(place: Path) -> None:
    interrupted(place)
    with pytest.raises(
        TrajOODError, match=r"checkpoint\.pt: checkpoint of a run with another config: choose another folder"
    ):
        train(place, "out", recipe={"learning_rate": 0.004})
    with pytest.raises(TrajOODError, match="checkpoint of a run with another config"):
        train(place, "out", seed=7)
    expected = train(place, "whole", seed=7)
    assert train(place, "out", seed=7, fresh=True).fingerprint() == expected.fingerprint()


def test_other_images_or_other_code_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(place)
    path = next((place / "images" / "train").iterdir())
    before = path.read_bytes()
    path.write_bytes((place / "images" / "far" / "001.png").read_bytes())
    with pytest.raises(
        TrajOODError, match=r"checkpoint\.pt: checkpoint of a run with another images: choose another folder"
    ):
        train(place, "out")
    path.write_bytes(before)
    with monkeypatch.context() as patch:
        patch.setattr("traj_ood.training.loop.code_digest", lambda: "0" * 16)
        with pytest.raises(TrajOODError, match=r"checkpoint of a run with another code: .* or start over with --fresh"):
            train(place, "out")
    train(place, "out")


@pytest.mark.parametrize("content", [b"", b"rubbish", None])
def test_damaged_checkpoint(place: Path, content: bytes | None) -> None:
    interrupted(place)
    path = place / "out" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(TrajOODError, match=r"checkpoint\.pt: damaged checkpoint .*: delete it, or .* --fresh"):
        train(place, "out")
    train(place, "out", fresh=True)


# ---------------------------------------------------------------------------------------------- learning rate


def test_learning_rate_schedules() -> None:
    def rates(**changes: Any) -> list[float]:
        recipe = Recipe(learning_rate=2.0, **changes)
        return [learning_rate(recipe, step, 20) for step in range(20)]

    cosine = rates(warmup=0.2)
    assert cosine[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert cosine[4] == pytest.approx(2.0)
    assert cosine[12] == pytest.approx(1.0)  # half way through the 16 steps after the warm-up
    assert cosine[8] == pytest.approx(1 + math.cos(math.pi / 4))
    assert all(a > b for a, b in pairwise(cosine[4:]))
    assert cosine[-1] == pytest.approx(1 + math.cos(math.pi * 15 / 16))
    linear = rates(warmup=0.2, schedule="linear")
    assert linear[4:] == pytest.approx([2 * (1 - i / 16) for i in range(16)])
    assert rates(warmup=0.2, schedule="constant")[4:] == [2.0] * 16
    assert rates(warmup=0.0, schedule="constant") == pytest.approx([2.0] * 20)
    assert all(0 < r <= 2.0 for r in rates(warmup=1.0))


def test_logged_rate_is_the_schedules(place: Path) -> None:
    train(place, "out")
    log = json.loads((place / "out" / "training.json").read_text())["log"]
    recipe = TrainConfig.load(write(place)).recipe
    assert [e["learning_rate"] for e in log] == pytest.approx([learning_rate(recipe, 5 * e + 4, 15) for e in range(3)])


def test_ood_sets_are_not_needed(place: Path) -> None:
    for split in ("train_cifar10", "val_cifar10", "test_cifar10", "test_tin"):  # of nine lists
        lines = []
        for i in range(3):
            path = place / "images_classic" / split / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 60 * i, np.uint8)).save(path)
            lines.append(f"{split}/{i}.png {i % 2}\n")
        (place / "benchmark_imglist" / "cifar10").mkdir(parents=True, exist_ok=True)
        (place / "benchmark_imglist" / "cifar10" / f"{split}.txt").write_text("".join(lines))
    config = TrainConfig.load(write(place, benchmark="cifar10"))
    train_model(config, place / "out", data_root=place, quiet=True)
    assert json.loads((place / "out" / "training.json").read_text())["data"]["train"]["count"] == 3


# ---------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_bundled_configs_load_and_build(path: Path) -> None:
    config = TrainConfig.load(path.stem)
    assert config.name == path.stem
    if config.family == "classifier":
        with pytest.raises(TrajOODError, match="expected an autoencoder family, got 'classifier'"):
            build_autoencoder(config, (0.5,), (0.5,))
        return
    model = build_autoencoder(config, (0.5,) * config.channels, (0.5,) * config.channels)
    assert model.input_shape == (config.channels, config.image_size, config.image_size)


def test_bundled_model_is_what_its_config_builds() -> None:
    folder = CONFIGS.parent / "models" / "fashion-mae"
    if not folder.is_dir():
        pytest.skip("the bundled model is not in this checkout")
    model = load_autoencoder("fashion-mae")
    built = build_autoencoder(TrainConfig.load("fashion-mae"), (0.5,), (0.5,))
    assert {k: v.shape for k, v in weights(model).items()} == {own_name(k): v.shape for k, v in weights(built).items()}
    record = json.loads((folder / "training.json").read_text())
    assert record["fingerprint"] == model.fingerprint()
    assert record["health"]["converged"] >= 0.95
    assert record["health"]["distinct"] > 100
    assert (folder / "model.safetensors").stat().st_size < 5_000_000


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"nmae": "x"}, r"unknown key of .*train\.yaml 'nmae': did you mean 'name'"),
        ({"recipe": {"epoch": 3}}, r"unknown key of .*train\.yaml, recipe 'epoch': did you mean 'epochs'"),
        ({"family": "vitmae"}, r"unknown family of .*train\.yaml 'vitmae': did you mean 'vit_mae'"),
        ({"name": None}, r"train\.yaml: missing name"),
        ({"benchmark": None, "channels": None}, r"train\.yaml: missing benchmark, channels"),
        ({"recipe": {"epochs": 0}}, "train: epochs must be at least 1, got 0"),
        ({"recipe": {"batch_size": -1}}, "train: batch_size must be at least 1, got -1"),
        ({"recipe": {"learning_rate": 0.0}}, r"train: learning_rate must be above 0 and finite, got 0\.0"),
        ({"recipe": {"clip": -1.0}}, r"train: clip must be above 0, got -1\.0"),
        ({"recipe": {"input_noise": -0.1}}, r"train: input_noise must be 0 or more and finite, got -0\.1"),
        ({"recipe": {"warmup": 2.0}}, r"train: warmup must be a share from 0 to 1, got 2\.0"),
        (
            {"recipe": {"optimizer": "adamW"}},
            r"unknown recipe\.optimizer of .*train\.yaml 'adamW': did you mean .*'adamw'",
        ),
        ({"recipe": {"schedule": "cosin"}}, "unknown recipe.schedule of .* 'cosin': did you mean 'cosine'"),
        ({"recipe": {"loss": "mask"}}, "unknown recipe.loss of .* 'mask': did you mean 'masked'"),
        ({"recipe": {"loss": "masked"}}, "loss 'masked': expected mask ratios above 0, got 0"),
        ({"recipe": {"epochs": "three"}}, r"train\.yaml, key recipe.epochs: expected int, got 'three'"),
        ({"recipe": {"mask_ratios": 0.5}}, r"key recipe.mask_ratios: expected a list of floats, got 0\.5"),
        ({"recipe": {"mask_ratios": []}}, "mask_ratios: expected at least one, got none"),
        ({"recipe": {"mask_ratios": [0.5, 1.5]}}, r"train: mask_ratios must be shares from 0 to 1, got \(0\.5, 1\.5\)"),
        ({"recipe": {"mask_ratios": [-0.5]}}, r"train: mask_ratios must be shares from 0 to 1, got \(-0\.5,\)"),
        ({"recipe": {"learning_rate": True}}, "key recipe.learning_rate: expected float, got True"),
        ({"recipe": {"clip": math.inf}}, "key recipe.clip: expected float, got inf"),
        ({"seed": 10**12}, "key seed: expected int, got 1000000000000"),
        ({"recipe": {"learning_rate": "fast"}}, "key recipe.learning_rate: expected float, got 'fast'"),
        ({"image_size": "big"}, r"train\.yaml, key image_size: expected int, got 'big'"),
        ({"channels": 0}, r"channels"),
        ({"model": {"widht": 3}}, r"widht"),
        ({"model": [3]}, r"train\.yaml, key model: expected a mapping, got \[3\]"),
    ],
)
def test_bad_configs(place: Path, changes: dict[str, Any], text: str) -> None:
    path = write(place, **{k: v for k, v in changes.items() if k != "recipe"})
    if "recipe" in changes:
        tree = yaml.safe_load(Path(path).read_text())
        Path(path).write_text(yaml.safe_dump({**tree, "recipe": {**RECIPE, **changes["recipe"]}}))
    with pytest.raises(TrajOODError, match=text):
        train_model(TrainConfig.load(path), place / "out", quiet=True)
    assert not (place / "out").exists()


@pytest.mark.parametrize("key", ["hidden_sise", "patchsize"])
def test_misspelt_geometry_of_a_vit_mae(place: Path, key: str) -> None:
    config = TrainConfig.load(write(place, "vit_mae", model={**VIT, key: 4}))
    with pytest.raises(TrajOODError, match=key):
        build_autoencoder(config, (0.5,), (0.5,))


@pytest.mark.parametrize(
    "geometry", [{"patch_size": 0}, {"patch_size": 16}, {"hidden_size": 18}, {"num_hidden_layers": "two"}]
)
def test_impossible_geometry_of_a_vit_mae(place: Path, geometry: dict[str, int]) -> None:
    config = TrainConfig.load(write(place, "vit_mae", model={**VIT, **geometry}))
    with pytest.raises(TrajOODError):
        build_autoencoder(config, (0.5,), (0.5,))


def test_yaml_numbers_without_a_point(place: Path) -> None:
    # YAML reads 5e-3 as text; a config that says so is meant
    path = Path(write(place, recipe={"epochs": 1}))
    path.write_text(path.read_text().replace("learning_rate: 0.005", "learning_rate: 5e-3"))
    assert "learning_rate: 5e-3" in path.read_text()
    assert TrainConfig.load(str(path)).recipe.learning_rate == 0.005


@pytest.mark.parametrize("content", ["", "[1]", "text", "recipe: 5\nfamily: conv"])
def test_files_that_are_no_config(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(TrajOODError, match=r"c\.yaml"):
        TrainConfig.load(str(path))


def test_files_that_are_not_yaml_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: [1\nx: }")
    with pytest.raises(TrajOODError, match=r"c\.yaml.*: malformed YAML \("):
        TrainConfig.load(str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrajOODError, match=r"c\.yaml"):
        TrainConfig.load(str(tmp_path / "c.yaml"))
    with pytest.raises(TrajOODError, match=r"none\.yaml: no such training config"):
        TrainConfig.load(str(tmp_path / "none.yaml"))
    with pytest.raises(TrajOODError, match="unknown training config 'fashion-me': did you mean 'fashion-mae'"):
        TrainConfig.load("fashion-me")


# ---------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("family", ["conv", "vit_mae"])
def test_diverging_loss(place: Path, family: str) -> None:
    with pytest.raises(TrajOODError, match=r"tiny-\w+: the loss is (nan|inf) in step \d of 15: lower the learning"):
        train(place, "out", family=family, recipe={"learning_rate": 1e30, "warmup": 0.0})
    assert not (place / "out" / "model.safetensors").exists()


def test_conv_with_masks(place: Path) -> None:
    with pytest.raises(TrajOODError, match=r"tiny-conv: a conv autoencoder has no masking, got mask ratio 0\.5"):
        train(place, "out", recipe={"mask_ratios": [0.5]})


def test_missing_images_are_found_first(place: Path) -> None:
    (place / "images" / "train" / "007.png").write_bytes(b"")
    with pytest.raises(TrajOODError, match=r"1 image files are missing or empty in train .*007\.png"):
        train(place, "out")
    assert not (place / "out").exists()


def test_unwritable_folder(place: Path) -> None:
    (place / "file").write_text("")
    with pytest.raises(TrajOODError, match="expected a folder that can be written"):
        train(place, "file/out")


def test_a_folder_of_other_files_is_refused(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / ".gitignore").write_text("*")
    (place / "out" / "README.md").write_text("mine")
    with pytest.raises(TrajOODError, match=r"out: expected a new or empty folder, .*, found 'README\.md'.*--out"):
        train(place, "out")
    assert (place / "out" / "README.md").read_text() == "mine"
    (place / "out" / "README.md").unlink()
    train(place, "out", recipe={"epochs": 1})
