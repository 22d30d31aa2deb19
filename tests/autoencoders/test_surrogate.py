"""SurrogateAutoencoder: its map against analytic limits, its files, and every scorer on top of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from traj_ood.autoencoders import SurrogateAutoencoder, SurrogateNetwork, load_autoencoder
from traj_ood.backbones import CallableBackbone, Features
from traj_ood.data.preprocessing import Normalised
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError
from traj_ood.scorers import default_suite
from traj_ood.scorers.scorer_set import ScorerSet

N, K, CLASSES = 12, 5, 3


def backbone(seed: int = 0, name: str = "custom", chunk: int = 4, classes: int = CLASSES) -> CallableBackbone:
    """A small convolutional classifier with random weights on images (1, 8, 8)."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(1, N, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(N, CLASSES)

    def forward(images: Tensor) -> Features:
        features = body(images)
        return Features(features, head(features) if classes else None)

    linear = (head.weight.detach(), head.bias.detach()) if classes else None
    module = nn.ModuleDict({"body": body, "head": head})
    return CallableBackbone(forward, (1, 8, 8), N, classes=classes, module=module, name=name, head=linear, chunk=chunk)


def network(seed: int = 0, **options: Any) -> SurrogateNetwork:
    """Random weights with the statistics of the backbone's features."""
    torch.manual_seed(seed)
    net = SurrogateNetwork(N, **({"hidden": (16,), "bottleneck": K} | options))
    net.set_statistics(backbone().extract(tiny.images(50)).features)
    return net


def surrogate(**options: Any) -> SurrogateAutoencoder:
    return SurrogateAutoencoder(backbone(), network(), **options)


# ---------------------------------------------------------------------------------------------- the network


def test_default_geometry_scales_with_the_features() -> None:
    shapes = {n: (net.hidden, net.bottleneck) for n in (8, 128, 512, 2048) for net in [SurrogateNetwork(n)]}
    assert shapes == {8: ((256,), 16), 128: ((256,), 64), 512: ((512,), 128), 2048: ((512,), 128)}


def test_statistics_against_float64() -> None:
    features = 1e3 + torch.randn(9000, N, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, N)
    net = SurrogateNetwork(N)
    net.set_statistics(features)
    torch.testing.assert_close(net.mean, features.double().mean(dim=0).float())
    torch.testing.assert_close(net.std, features.double().std(dim=0, correction=0).float())
    standard = net.standardise(features).double()
    assert standard.mean(dim=0).abs().max() < 1e-3
    assert (standard.std(dim=0) - 1).abs().max() < 1e-3


def test_dimensions_without_variance_stay_harmless() -> None:
    features = torch.randn(200, N, generator=torch.Generator().manual_seed(0))
    features[:, 0] = 0.0
    features[:, 1] = 7.3  # a constant that float32 sums do not return exactly
    features[:, 2] = 0.0
    features[5, 2] = 1e-4  # one image in 200 wakes it
    net = SurrogateNetwork(N)
    net.set_statistics(features)
    live = features.double().std(dim=0, correction=0)
    assert net.std[:3].tolist() == pytest.approx([0.1 * float(live[2:].median())] * 3, rel=0.2)
    assert net.standardise(features)[:, :3].abs().max() < 1e-2
    with pytest.raises(TrajOODError, match="no dimension of the 5 features varies: every image looks the same"):
        net.set_statistics(torch.full((5, N), 7.3))


def test_latent_norm_fixes_the_length() -> None:
    latents = network().encode(torch.randn(20, N))
    assert latents.norm(dim=1).tolist() == pytest.approx([K**0.5] * 20, rel=1e-3)
    assert network(latent_norm=False).encode(torch.randn(20, N)).norm(dim=1).std() > 0.1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"hidden": (0,)}, "surrogate: widths must be at least 1, got 12 → 0 → 5"),
        ({"bottleneck": -1}, "surrogate: widths must be at least 1, got 12 → 16 → -1"),
        ({"activation": "geluu"}, "unknown surrogate activation 'geluu': did you mean 'gelu'"),
    ],
)
def test_impossible_networks(options: dict[str, Any], text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        network(**options)


# ---------------------------------------------------------------------------------------------- the map


def test_a_linear_map_reaches_its_analytic_limit() -> None:
    # E(x) = A x + a, D(z) = B z + b: f(z) = M z + c with M = A B, whose limit is (I − M)⁻¹ c when M contracts.
    net = network(hidden=(), activation="identity", latent_norm=False)
    with torch.no_grad():
        net.decoder[0].weight *= 0.5 / torch.linalg.matrix_norm(net.encoder[0].weight @ net.decoder[0].weight, 2)
    a, b = net.encoder[0], net.decoder[0]
    matrix = a.weight.double() @ b.weight.double()
    limit = torch.linalg.solve(torch.eye(K).double() - matrix, a.weight.double() @ b.bias.double() + a.bias.double())
    model = SurrogateAutoencoder(backbone(), net)
    encoding = model.examine(tiny.images(7))
    path = iterate(model.self_map, encoding.latents, tol=1e-13, chunk=model.chunk)
    assert bool((path.status == Status.CONVERGED).all())
    torch.testing.assert_close(path.final, limit.float().expand(7, -1), atol=1e-5, rtol=0)
    # and one step is the affine map itself
    once = model.self_map(encoding.latents).double()
    expected = encoding.latents.double() @ matrix.T + a.weight.double() @ b.bias.double() + a.bias.double()
    torch.testing.assert_close(once, expected, atol=1e-5, rtol=0)


def test_examine_encode_and_the_definition_agree() -> None:
    model, images = surrogate(), tiny.images(9)
    encoding = model.examine(images)
    features = model.backbone.extract(images)
    assert len(encoding) == 9
    torch.testing.assert_close(encoding.latents, model.encode(images), rtol=1e-5, atol=1e-6)
    assert encoding.features is not None and torch.equal(encoding.features, features.features)  # noqa: PT018
    assert encoding.logits is not None and torch.equal(encoding.logits, features.logits)  # noqa: PT018
    expected = (features.features - model.network.mean) / model.network.std
    torch.testing.assert_close(encoding.target, expected)
    torch.testing.assert_close(encoding.latents, model.network.encode(expected))
    torch.testing.assert_close(model.encode_batch(images[:4]), encoding.latents[:4])
    torch.testing.assert_close(model.decode(encoding.latents), model.network.decode(encoding.latents))
    again = model.examine_features(features)
    assert torch.equal(again.latents, encoding.latents)
    assert torch.equal(again.target, encoding.target)


def test_f_never_touches_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = surrogate()
    fitted = ScorerSet(model, ["trajectory"], max_steps=20).fit(Normalised(tiny.images(12)))
    encoding = model.examine(tiny.images(5, seed=3))

    def refuse(*args: object) -> None:
        raise AssertionError("the backbone was called")

    monkeypatch.setattr(model.backbone, "forward_batch", refuse)
    monkeypatch.setattr(model.backbone, "extract", refuse)
    assert fitted.score(encoding).scores["trajectory"].shape == (5,)


def test_no_result_depends_on_the_batch() -> None:
    model = surrogate()
    images = tiny.images(11, seed=2)
    halves = [model.examine(images[:4]), model.examine(images[4:])]
    for part_of in ("latents", "target", "features", "logits"):
        joined = torch.cat([getattr(half, part_of) for half in halves])
        torch.testing.assert_close(joined, getattr(model.examine(images), part_of), rtol=1e-5, atol=1e-6)


def test_every_scorer_of_the_default_suite_runs() -> None:
    model = surrogate()
    labels = torch.arange(20) % CLASSES
    scorers = ScorerSet(model, ["all"], max_steps=30).fit(Normalised(tiny.images(20, seed=1)), labels=labels)
    scored = scorers.score(Normalised(3 * tiny.images(6, seed=2)))
    assert len(scored.scores) >= len(set(default_suite(model))) >= 10
    for label, values in scored.scores.items():
        assert values.shape == (6,), label
        assert bool(values.isfinite().all()), label


def test_reconstruction_is_measured_in_standardised_features() -> None:
    model, images = surrogate(), tiny.images(6, seed=2)
    scored = ScorerSet(model, ["reconstruction"]).fit(Normalised(tiny.images(8))).score(Normalised(images))
    standard = model.network.standardise(model.backbone.extract(images).features)
    expected = (model.network.decode(model.network.encode(standard)) - standard).square().mean(dim=1)
    torch.testing.assert_close(scored.scores["reconstruction"], expected.double(), rtol=1e-5, atol=0)


def test_what_it_says_of_itself() -> None:
    model = surrogate()
    assert (model.name, model.family, model.input_shape) == ("custom", "surrogate", (1, 8, 8))
    assert (model.feature_dim, model.classes) == (N, CLASSES)
    head = model.head()
    assert head is not None and tuple(head[0].shape) == (CLASSES, N)  # noqa: PT018
    assert surrogate(name="mine").name == "mine"
    own = sum(p.numel() for p in model.network.parameters())
    assert model.parameter_count() == own + model.backbone.parameter_count()
    assert model.to("cpu") is model
    bare = SurrogateAutoencoder(backbone(classes=0), network())
    assert (bare.classes, bare.head(), bare.examine(tiny.images(2)).logits) == (0, None, None)


def test_fingerprint_covers_backbone_network_and_statistics() -> None:
    base = surrogate().fingerprint()
    assert base == surrogate(name="other").fingerprint()
    other_net, other_statistics = network(seed=1), network()
    other_statistics.mean += 1e-3
    others = [
        SurrogateAutoencoder(backbone(seed=1), network()),
        SurrogateAutoencoder(backbone(), other_net),
        SurrogateAutoencoder(backbone(), other_statistics),
        SurrogateAutoencoder(backbone(), network(activation="relu")),
    ]
    assert len({base, *(m.fingerprint() for m in others)}) == 5


def test_mean_and_std_can_be_given() -> None:
    net = SurrogateNetwork(N, (16,), K)
    model = SurrogateAutoencoder(backbone(), net, mean=torch.full((N,), 2.0), std=torch.full((N,), 4.0))
    features = model.backbone.extract(tiny.images(3)).features
    torch.testing.assert_close(model.examine(tiny.images(3)).target, (features - 2) / 4)
    with pytest.raises(TrajOODError, match=r"custom: std: expected shape \(12,\), got \(3,\)"):
        SurrogateAutoencoder(backbone(), net, std=torch.ones(3))
    with pytest.raises(TrajOODError, match="custom: expected positive deviations of the features"):
        SurrogateAutoencoder(backbone(), net, std=torch.zeros(N))


def test_bad_features_are_refused() -> None:
    model = surrogate()
    with pytest.raises(TrajOODError, match=r"custom: expected a network for the 12 features of custom, got one for 9"):
        SurrogateAutoencoder(backbone(), SurrogateNetwork(9))
    with pytest.raises(TrajOODError, match=r"custom: expected float features \(B, 12\), got torch.float32 of shape"):
        model.examine_features(Features(torch.zeros(2, 9), None))
    with pytest.raises(TrajOODError, match=r"custom: expected float features \(B, 12\), got torch.int64"):
        model.examine_features(Features(torch.zeros(2, N, dtype=torch.int64), None))
    features = torch.zeros(5000, N)
    features[4999, 3] = torch.nan
    with pytest.raises(TrajOODError, match=r"custom: 1 row\(s\) of features hold NaN .*, first at row 4999"):
        model.examine_features(Features(features, None))
    with pytest.raises(TrajOODError, match="expected float images"):
        model.encode(torch.zeros(2, 1, 9, 9))


# ---------------------------------------------------------------------------------------------- files


def test_round_trip(tmp_path: Path) -> None:
    model = surrogate()
    model.save_pretrained(str(tmp_path / "s"), {"steps": 3})
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["model_type"] == "traj_ood_surrogate"
    assert config["recipe"] == {"steps": 3}
    assert config["backbone"] == {"spec": "custom", "name": "custom", "fingerprint": backbone().fingerprint()}
    for loaded in (
        SurrogateAutoencoder.from_pretrained(tmp_path / "s", backbone()),
        load_autoencoder(tmp_path / "s", backbone=backbone()),
    ):
        assert loaded.fingerprint() == model.fingerprint()
        assert torch.equal(loaded.encode(tiny.images(3)), model.encode(tiny.images(3)))
    assert SurrogateAutoencoder.from_pretrained(tmp_path / "s", backbone(), name="x").name == "x"


def test_the_backbone_is_loaded_by_its_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = backbone()
    mine.spec = "timm:mine"
    SurrogateAutoencoder(mine, network()).save_pretrained(tmp_path)
    asked: list[str] = []

    def load(spec: str) -> CallableBackbone:
        asked.append(spec)
        return backbone()

    monkeypatch.setattr("traj_ood.autoencoders.surrogate.load_backbone", load)
    SurrogateAutoencoder.from_pretrained(tmp_path)
    assert asked == ["timm:mine"]


def test_another_backbone_is_refused_and_both_are_named(tmp_path: Path) -> None:
    surrogate().save_pretrained(tmp_path)
    other = backbone(seed=1, name="retrained")
    first, second = backbone().fingerprint()[:12], other.fingerprint()[:12]
    text = (
        rf"trained on the features of custom \(fingerprint {first}…\), got retrained \({second}…\): pass the backbone"
    )
    with pytest.raises(TrajOODError, match=text):
        SurrogateAutoencoder.from_pretrained(tmp_path, other)


def test_a_backbone_of_your_own_must_be_passed(tmp_path: Path) -> None:
    surrogate().save_pretrained(tmp_path)
    with pytest.raises(TrajOODError, match=r"features of 'custom', a backbone of your own: pass it as backbone="):
        load_autoencoder(tmp_path)


def _damage(folder: Path, how: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    tree = json.loads(config.read_text())
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif how == "not json":
        config.write_text("{")
    elif how == "no backbone":
        config.write_text(json.dumps({k: v for k, v in tree.items() if k != "backbone"}))
    elif how == "other family":
        config.write_text(json.dumps({**tree, "model_type": "traj_ood_conv"}))
    elif how == "unknown key":
        config.write_text(json.dumps({**tree, "network": {**tree["network"], "widht": 3}}))
    elif how == "other width":
        config.write_text(json.dumps({**tree, "network": {**tree["network"], "bottleneck": K + 1}}))
    elif how == "record":
        (folder / "training.json").write_text("[1]")
    else:
        tensors = load_file(weights)
        tensors["std" if how == "zero std" else "encoder.0.bias"][0] = 0.0 if how == "zero std" else torch.nan
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("no config", r"config\.json: expected the config of a model, got No such file"),
        ("no weights", r"expected config\.json and model\.safetensors of a surrogate"),
        ("truncated", r"expected config\.json and model\.safetensors of a surrogate"),
        ("not json", r"config\.json: expected JSON, got"),
        ("no backbone", r"of a surrogate \('backbone'\)"),
        ("other family", r"config\.json: expected model_type 'traj_ood_surrogate', got 'traj_ood_conv'"),
        ("unknown key", r"of a surrogate \(.*widht"),
        ("other width", r"model\.safetensors: weights of another architecture"),
        ("record", r"training\.json: expected a JSON object, got list"),
        ("nan", r"encoder\.0\.bias holds NaN or infinite weights"),
        ("zero std", "expected positive deviations of the features"),
    ],
)
def test_damaged_files(tmp_path: Path, how: str, text: str) -> None:
    surrogate().save_pretrained(tmp_path)
    _damage(tmp_path, how)
    with pytest.raises(TrajOODError, match=text) as caught:
        SurrogateAutoencoder.from_pretrained(tmp_path, backbone())
    assert "\n" not in str(caught.value)
