"""Training of surrogates: the same weights every time, also after an interruption; files, health, refusals."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from traj_ood.autoencoders import SurrogateAutoencoder, load_autoencoder
from traj_ood.backbones import CallableBackbone, Features, feature_cache
from traj_ood.data import Benchmark, load_benchmark
from traj_ood.errors import TrajOODError
from traj_ood.training import surrogate as module
from traj_ood.training import surrogate_cache
from traj_ood.training.surrogate import SurrogateRecipe, SurrogateTrainer, fit_surrogate, surrogate_health
from traj_ood.training.surrogate_cache import surrogate_for

N = 16
QUICK = SurrogateRecipe(steps=30, check_every=10, batch_size=32, hidden=(24,), bottleneck=6)


@pytest.fixture(autouse=True)
def _ignore_health() -> Iterator[None]:
    """Thirty steps make no attractors; the tests that are about the warning ask for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*unhealthy attractors")
        yield


def clustered(count: int = 300, clusters: int = 12, width: int = N, seed: int = 0) -> Tensor:
    """(count, width) a mixture of Gaussians with low-rank covariances."""
    draws = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(clusters, width, generator=draws)
    spread = torch.randn(clusters, width, 2, generator=draws)
    which = torch.randint(clusters, (count,), generator=draws)
    inside = torch.einsum("bnr,br->bn", spread[which], torch.randn(count, 2, generator=draws))
    return centres[which] + 0.5 * inside + 0.05 * torch.randn(count, width, generator=draws)


def fit(features: Tensor | None = None, recipe: SurrogateRecipe = QUICK, **options: Any) -> SurrogateAutoencoder:
    values = clustered() if features is None else features
    return fit_surrogate(tiny.backbone(), values, recipe, **({"quiet": True} | options))


def timeless(record: Any) -> dict[str, Any]:
    tree = json.loads(json.dumps(record))
    for line in tree["log"]:
        del line["seconds"]
    return {k: v for k, v in tree.items() if "seconds" not in k}


# ---------------------------------------------------------------------------------------------- training


def test_the_default_recipe_finds_the_clusters() -> None:
    features = clustered(1500, clusters=12, width=32)
    wide = CallableBackbone(lambda x: Features(x.flatten(1), None), (1, 4, 8), 32, module=nn.Module(), name="identity")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # healthy: nothing to warn of
        model = fit_surrogate(wide, features, SurrogateRecipe(steps=300, batch_size=128), quiet=True)
    health = model.record["health"]
    assert health["converged"] >= 0.95
    assert 10 <= health["distinct"] <= 30
    log = model.record["log"]
    assert log[-1]["val_loss"] < 0.6 * 1.0  # of the variance, which is 1 in standardised units
    assert log[-1]["val_clean"] < log[-1]["val_loss"]


def test_same_seed_same_weights_other_seed_other_weights() -> None:
    net = tiny.backbone()
    before = torch.get_rng_state()
    one = fit_surrogate(net, clustered(), QUICK, quiet=True)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are the caller's"
    torch.manual_seed(999)
    two, other = fit(), fit(seed=1)
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()
    assert timeless(one.record) == timeless(two.record)


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_resume_ends_with_the_same_weights(tmp_path: Path, rounds: int) -> None:
    whole = fit(out=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        tiny.interrupt_training(patch, rounds)
        with pytest.raises(KeyboardInterrupt):
            fit(out=tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoint.pt").is_file()
    assert not (tmp_path / "parts" / "training.json").exists()
    resumed = fit(out=tmp_path / "parts")
    for key, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[key]), key
    assert timeless(whole.record) == timeless(resumed.record)
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()


def test_interrupted_while_the_attractors_are_checked(tmp_path: Path) -> None:
    whole = fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "surrogate_health", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            fit(out=tmp_path)
    assert fit(out=tmp_path).fingerprint() == whole.fingerprint()


def test_early_stopping_keeps_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.5, 0.3, 0.4, 0.3, 0.6])
    seen: list[dict[str, Tensor]] = []

    def held_out(run: Any) -> tuple[float, float]:
        seen.append({k: v.clone() for k, v in run.network.state_dict().items()})
        return next(losses), 0.0

    monkeypatch.setattr(SurrogateTrainer, "held_out_loss", held_out)
    model = fit(recipe=SurrogateRecipe(steps=200, check_every=5, patience=2, hidden=(8,), bottleneck=4))
    assert len(model.record["log"]) == 4  # 0.4 and the second 0.3 are no better than the first
    assert model.record["best_step"] == 10
    assert model.record["validation_loss"] == 0.3
    for key, value in model.network.state_dict().items():
        assert torch.equal(value, seen[1][key]), key
    assert not any(p.requires_grad for p in model.network.parameters())


def test_held_out_features_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[bool, set[int]] = {True: set(), False: set()}
    original = SurrogateTrainer.standardised

    def standardised(trainer: SurrogateTrainer, asked: Tensor) -> Tensor:
        rows[trainer.module.training].update(asked.tolist())
        return original(trainer, asked)

    monkeypatch.setattr(SurrogateTrainer, "standardised", standardised)
    fit(recipe=SurrogateRecipe(steps=30, check_every=30, batch_size=64, val_fraction=0.2, hidden=(8,), bottleneck=4))
    assert (len(rows[True]), len(rows[False])) == (240, 60)
    assert not rows[True] & rows[False]


def test_held_out_loss_against_its_definition() -> None:
    model, features = fit(), clustered()
    run = SurrogateTrainer(model, features, QUICK, 0)
    clean = model.network.standardise(features[run.val])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    restore = [model.network.decode(model.network.encode(x)) for x in (clean + QUICK.noise(N) * noise, clean)]
    expected = tuple(float((r - clean).square().mean()) for r in restore)
    assert run.held_out_loss() == pytest.approx(expected, rel=1e-5)
    assert model.record["validation_loss"] == pytest.approx(expected[0], rel=1e-5)


def test_the_jacobian_penalty_contracts() -> None:
    def stretch(recipe: SurrogateRecipe) -> float:
        model = fit(recipe=recipe)
        start = model.examine_features(Features(clustered(20, seed=5), None)).latents.clone()
        jacobian = torch.func.vmap(torch.func.jacrev(lambda z: model.self_map(z[None])[0]))(start)
        return float(jacobian.square().sum(dim=(1, 2)).mean())

    plain = SurrogateRecipe(steps=60, check_every=60, batch_size=64, hidden=(24,), bottleneck=6, input_noise=0.1)
    assert stretch(SurrogateRecipe(**{**vars(plain), "jacobian": 1.0})) < 0.7 * stretch(plain)


def test_the_jacobian_penalty_estimates_the_frobenius_norm() -> None:
    run = SurrogateTrainer(fit(), clustered(), QUICK, 0)
    clean = run.network.standardise(run.features[:4])
    start = run.network.encode(clean)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: run.network.encode(run.network.decode(z[None]))[0]))(start)
    exact = float(jacobian.square().sum(dim=(1, 2)).mean()) / start.shape[1]  # E ‖Jv‖²/‖v‖² = ‖J‖²_F / k
    draws = torch.Generator().manual_seed(0)
    run.options = SurrogateRecipe(**{**vars(QUICK), "input_noise": 0.0})
    plain = float(run.loss(clean, draws))
    run.options = SurrogateRecipe(**{**vars(QUICK), "input_noise": 0.0, "jacobian": 1.0})
    penalties = [float(run.loss(clean, draws)) - plain for _ in range(600)]
    assert sum(penalties) / len(penalties) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("penalty", ["contractive", "asymmetry"])
def test_the_other_penalties_are_quadratic_forms_of_the_float64_jacobian(penalty: str) -> None:
    """Exactly at the direction that is drawn; and the mean over directions is the squared norm."""
    run = SurrogateTrainer(fit(), clustered(), QUICK, 0)
    run.network = copy.deepcopy(run.network).double()
    clean = run.network.standardise(run.features[:4].double())
    latents = run.network.encode(clean)
    if penalty == "contractive":
        points, forward = clean, run.network.encode
    else:
        points, forward = latents, lambda z: run.network.encode(run.network.decode(z))
    jacobians = torch.stack([torch.autograd.functional.jacobian(lambda x: forward(x[None])[0], p) for p in points])
    matrices = jacobians if penalty == "contractive" else jacobians - jacobians.mT
    run.options = SurrogateRecipe(**{**vars(QUICK), penalty: 2.0})
    draws, same = (torch.Generator().manual_seed(3) for _ in range(2))
    v = torch.randn(latents.shape, generator=same).double()
    expected = torch.einsum("bk,bkn->bn", v, matrices).square().sum(dim=1).mean() / points.shape[1]
    assert float(run.penalties(clean, latents, draws)) == pytest.approx(2 * float(expected), rel=1e-9)
    found = [float(run.penalties(clean, latents, draws)) for _ in range(600)]
    norm = float(matrices.square().sum(dim=(1, 2)).mean()) / points.shape[1]
    assert sum(found) / len(found) == pytest.approx(2 * norm, rel=0.1)


@pytest.mark.parametrize("penalty", ["contractive", "asymmetry"])
def test_the_other_penalties_lower_what_they_penalise(penalty: str) -> None:
    def size(recipe: SurrogateRecipe) -> float:
        model = fit(recipe=recipe)
        clean = model.network.standardise(clustered(20, seed=5))
        latents = model.network.encode(clean)
        if penalty == "contractive":
            own = torch.func.vmap(torch.func.jacrev(lambda x: model.network.encode(x[None])[0]))(clean)
        else:
            own = torch.func.vmap(torch.func.jacrev(lambda z: model.self_map(z[None])[0]))(latents)
            own = own - own.mT
        return float(own.square().sum(dim=(1, 2)).mean())

    plain = SurrogateRecipe(steps=60, check_every=60, batch_size=64, hidden=(24,), bottleneck=6, input_noise=0.1)
    assert size(SurrogateRecipe(**{**vars(plain), penalty: 1.0})) < 0.7 * size(plain)


def test_each_row_draws_one_of_several_noise_levels() -> None:
    run = SurrogateTrainer(fit(), clustered(), QUICK, 0)
    clean = torch.zeros(400, N)
    single, several = (torch.Generator().manual_seed(1) for _ in range(2))
    one = run.noisy(clean, single)
    run.options = SurrogateRecipe(**{**vars(QUICK), "noise_levels": (0.0, 0.5, 2.0)})
    ratios = (run.noisy(clean, several) / one).mean(dim=1)
    values, counts = ratios.round(decimals=4).unique(return_counts=True)
    assert values.tolist() == [0.0, 0.5, 2.0]
    assert int(counts.min()) > 80


def test_the_default_noise_grows_with_the_width() -> None:
    assert [SurrogateRecipe().noise(n) for n in (16, 100, 400, 1600)] == pytest.approx([0.7, 0.7, 1.1, 2.2])
    assert SurrogateRecipe(input_noise=0.0).noise(1024) == 0.0


def test_learning_rate() -> None:
    recipe = SurrogateRecipe(steps=20, warmup=0.2, learning_rate=2.0)
    rates = [SurrogateTrainer(fit(), clustered(), recipe, 0).rate(step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[12] == pytest.approx(1.0)
    assert all(0 < r <= 2 for r in rates)


def test_latent_noise_and_small_batches_train() -> None:
    recipe = SurrogateRecipe(steps=5, batch_size=1000, latent_noise=0.3, hidden=(), bottleneck=4, latent_norm=False)
    model = fit(recipe=recipe)
    assert model.record["log"][-1]["step"] == 5
    assert model.network.hidden == ()


# ---------------------------------------------------------------------------------------------- what is written


def test_files(tmp_path: Path) -> None:
    model = fit(out=tmp_path, data={"benchmark": "b", "split": "train", "count": 300, "sha256": "0"}, name="mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "log.jsonl",
        "model.safetensors",
        "training.json",
    ]
    record = json.loads((tmp_path / "training.json").read_text())
    assert record == json.loads(json.dumps(model.record))
    assert record["fingerprint"] == model.fingerprint()
    assert record["data"] == {**record["data"], "benchmark": "b", "trained_on": 270, "held_out": 30}
    assert record["recipe"]["steps"] == 30
    assert [line["step"] for line in record["log"]] == [10, 20, 30]
    assert record["versions"]["torch"]
    assert json.loads((tmp_path / "config.json").read_text())["recipe"] == record["recipe"]
    card = (tmp_path / "README.md").read_text()
    for text in ("# Surrogate of custom:tiny", "16 → 24 → 6", "`train` of the benchmark `b`", "distinct attractors"):
        assert text in card
    assert str(tmp_path) not in card
    loaded = load_autoencoder(tmp_path, backbone=tiny.backbone())
    assert loaded.fingerprint() == model.fingerprint()
    assert isinstance(loaded, SurrogateAutoencoder)
    assert loaded.record == record


def test_the_card_of_a_surrogate_without_noise(tmp_path: Path) -> None:
    for noise, told in ((None, True), (0.0, False)):
        fit(out=tmp_path / str(told), recipe=replace(QUICK, input_noise=noise))
        assert ("to remove noise" in (tmp_path / str(told) / "README.md").read_text()) == told


def test_unhealthy_attractors_are_told_of() -> None:
    with pytest.warns(UserWarning, match=r"surrogate of custom:tiny: unhealthy attractors: only \d+") as told:
        model = fit(clustered(64, clusters=1), SurrogateRecipe(steps=60, hidden=(16,), bottleneck=4, jacobian=1.0))
    assert not model.record["health"]["healthy"]
    assert {warning.filename for warning in told if "unhealthy" in str(warning.message)} == {__file__}


def test_features_that_require_gradients_are_plain_numbers(tmp_path: Path) -> None:
    values = clustered().requires_grad_(True)
    model = fit(values * 1, out=tmp_path / "out")
    assert model.fingerprint() == fit().fingerprint()
    assert values.grad is None


def test_the_callers_settings_change_nothing(benchmark: Benchmark, tmp_path: Path) -> None:
    net, values = tiny.backbone(), clustered()
    expected = [make(net, benchmark, tmp_path / "a").fingerprint(), fit_surrogate(net, values, QUICK).fingerprint()]
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = [make(net, benchmark, tmp_path / "b").fingerprint(), fit_surrogate(net, values, QUICK).fingerprint()]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found == expected
    one, other = (next((tmp_path / side / "features").rglob("0*.safetensors")).read_bytes() for side in "ab")
    assert one == other


def test_health_is_measured_on_at_most_2000_features() -> None:
    model = fit()
    assert surrogate_health(model, clustered(2100)).count == 2000
    assert surrogate_health(model, clustered(40)).count == 40


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("features", "text"),
    [
        (clustered(31), "surrogate of custom:tiny: expected features of at least 32 ID training images, got 31"),
        (torch.zeros(50, 9), r"expected float features \(B, 16\), got torch.float32 of shape \(50, 9\)"),
        (torch.zeros(50, N, dtype=torch.int64), r"expected float features \(B, 16\), got torch.int64"),
        (torch.full((50, N), torch.nan), r"50 row\(s\) of features hold NaN"),
        (torch.ones(50, N), "no dimension of the 50 features varies"),
    ],
    ids=["few", "narrow", "int", "nan", "constant"],
)
def test_bad_features(features: Tensor, text: str, tmp_path: Path) -> None:
    with pytest.raises(TrajOODError, match=text):
        fit(features, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SurrogateTrainer, "loss", lambda run, clean, draws: clean.sum() * torch.nan)
    with pytest.raises(TrajOODError, match="custom:tiny: the loss is nan in step 0 of 30: lower the learning rate"):
        fit()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": 0}, "surrogate recipe: steps must be at least 1, got 0"),
        ({"check_every": 0}, "check_every must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"batch_size": -2}, "batch_size must be at least 1, got -2"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
        ({"clip": float("nan")}, "clip must be above 0 and finite, got nan"),
        ({"input_noise": -1.0}, "input_noise must be 0 or more and finite, got -1.0"),
        ({"jacobian": float("inf")}, "jacobian must be 0 or more and finite, got inf"),
        ({"contractive": -1.0}, "contractive must be 0 or more and finite, got -1.0"),
        ({"asymmetry": float("nan")}, "asymmetry must be 0 or more and finite, got nan"),
        ({"noise_levels": ()}, r"noise_levels must be one or more finite factors of at least 0, got \(\)"),
        (
            {"noise_levels": (1.0, -2.0)},
            r"noise_levels must be one or more finite factors of at least 0, got \(1\.0",
        ),
        ({"val_fraction": 0.0}, "val_fraction must be between 0 and 1, got 0.0"),
        ({"warmup": 1.5}, "warmup must be a share from 0 to 1, got 1.5"),
        ({"activation": "gleu"}, "unknown surrogate activation 'gleu': did you mean"),
        ({"hidden": (0,)}, r"widths must be at least 1, got hidden \(0,\) and bottleneck None"),
        ({"bottleneck": 0}, "widths must be at least 1, got hidden None and bottleneck 0"),
    ],
)
def test_impossible_recipes(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        SurrogateRecipe(**changes)


def interrupted(out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        tiny.interrupt_training(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            fit(out=out)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    changed = SurrogateRecipe(**{**vars(QUICK), "learning_rate": 0.01})
    with pytest.raises(TrajOODError, match=r"checkpoint of a run with another recipe: choose another folder"):
        fit(recipe=changed, out=tmp_path)
    with pytest.raises(TrajOODError, match="checkpoint of a run with another seed, features"):
        fit(clustered(seed=1), seed=1, out=tmp_path)
    assert fit(recipe=changed, out=tmp_path, fresh=True).fingerprint() == fit(recipe=changed).fingerprint()


@pytest.mark.parametrize("content", [b"", b"rubbish", None])
def test_damaged_checkpoint(tmp_path: Path, content: bytes | None) -> None:
    interrupted(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(TrajOODError, match=r"checkpoint\.pt: damaged checkpoint .*: delete it, or .*fresh=True"):
        fit(out=tmp_path)
    fit(out=tmp_path, fresh=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajOODError, match="expected a folder that can be written"):
        fit(out=tmp_path / "file" / "out")


# ---------------------------------------------------------------------------------------------- surrogate_for


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    return load_benchmark(str(tiny.write_benchmark(tmp_path, train=40, val=3, test=3, ood=3)))


def make(net: CallableBackbone, benchmark: Benchmark, out: Path, **options: Any) -> SurrogateAutoencoder:
    return surrogate_for(net, benchmark, out=str(out), **({"recipe": QUICK, "quiet": True} | options))


def refuse_to_read(patch: pytest.MonkeyPatch) -> None:
    """No image is read any more: features come from the cache."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("extracted again")

    patch.setattr(feature_cache, "read_parts", refuse)


def test_a_finished_surrogate_is_loaded(benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, net = tmp_path / "cache", tiny.backbone()
    first = make(net, benchmark, out)
    assert net.calls > 0
    folder = next((out / "surrogates").iterdir())
    assert folder.name.startswith("custom-tiny-")
    record = json.loads((folder / "training.json").read_text())
    assert record["data"]["sha256"] == benchmark.train.images.digest()
    assert (record["data"]["count"], record["data"]["skipped"]) == (40, 0)
    with monkeypatch.context() as patch:
        patch.setattr(surrogate_cache, "fit_surrogate", None)
        refuse_to_read(patch)
        second = make(tiny.backbone(), benchmark, out)
    assert second.fingerprint() == first.fingerprint()
    assert second.record["health"] == first.record["health"]
    # the same as by hand
    images = torch.stack([net.transform(benchmark.train.images.load(i)) for i in range(40)])
    by_hand = fit_surrogate(tiny.backbone(), tiny.backbone().extract(images).features, QUICK, quiet=True)
    assert by_hand.fingerprint() == first.fingerprint()


def test_features_are_extracted_once_for_several_recipes_and_seeds(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tiny.backbone(), benchmark, tmp_path / "cache", limit=33)
    other = SurrogateRecipe(steps=5, hidden=(8,), bottleneck=4)
    with monkeypatch.context() as patch:
        refuse_to_read(patch)
        make(tiny.backbone(), benchmark, tmp_path / "cache", limit=33, seed=1)
        make(tiny.backbone(), benchmark, tmp_path / "cache", limit=33, recipe=other)
        with pytest.raises(AssertionError, match="extracted again"):
            make(tiny.backbone(), benchmark, tmp_path / "cache", limit=33, fresh=True)
    assert len(list((tmp_path / "cache" / "surrogates").iterdir())) == 3
    make(tiny.backbone(seed=1), benchmark, tmp_path / "cache", limit=33)
    assert len(list((tmp_path / "cache" / "surrogates").iterdir())) == 4


def test_a_backbone_of_the_same_weights_and_another_width_has_features_of_its_own(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    body = nn.Linear(64, N)

    def first(width: int) -> CallableBackbone:
        return CallableBackbone(lambda x: body(x.flatten(1))[:, :width], (1, 8, 8), width, module=body)

    assert first(N).fingerprint() == first(N - 2).fingerprint()
    for width in (N, N - 2, N):
        assert make(first(width), benchmark, tmp_path / "cache").feature_dim == width
    assert len(list((tmp_path / "cache" / "surrogates").iterdir())) == 2


def test_the_limit_samples_the_training_split(benchmark: Benchmark, tmp_path: Path) -> None:
    record = make(tiny.backbone(), benchmark, tmp_path / "cache", limit=33).record
    assert record["data"]["trained_on"] + record["data"]["held_out"] == record["data"]["count"] == 33


def test_unreadable_images(benchmark: Benchmark, tmp_path: Path) -> None:
    (tmp_path / "images" / "train" / "003.png").write_bytes(b"no image")
    with pytest.raises(TrajOODError, match=r"003\.png"):
        make(tiny.backbone(), benchmark, tmp_path / "cache")
    record = make(tiny.backbone(), benchmark, tmp_path / "cache", on_error="skip").record
    assert (record["data"]["count"], record["data"]["skipped"]) == (40, 1)
    assert record["data"]["trained_on"] + record["data"]["held_out"] == 39
    with pytest.raises(TrajOODError, match=r"003\.png"):  # a finished surrogate does not hide what was skipped
        make(tiny.backbone(), benchmark, tmp_path / "cache")
    tiny.write_images(tmp_path / "images" / "train", 4, 0, high=90)
    assert make(tiny.backbone(), benchmark, tmp_path / "cache").record["data"]["skipped"] == 0


def test_too_few_images_are_refused_before_any_work(tmp_path: Path) -> None:
    small, net = load_benchmark(str(tiny.write_benchmark(tmp_path))), tiny.backbone()
    with pytest.raises(TrajOODError, match="features of at least 32 ID training images, got 12"):
        make(net, small, tmp_path / "cache")
    assert (net.calls, (tmp_path / "cache").exists()) == (0, False)


def test_damaged_surrogate_in_the_cache(benchmark: Benchmark, tmp_path: Path) -> None:
    make(tiny.backbone(), benchmark, tmp_path / "cache")
    folder = next((tmp_path / "cache" / "surrogates").iterdir())
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(TrajOODError, match=r"expected config\.json and model\.safetensors of a surrogate"):
        make(tiny.backbone(), benchmark, tmp_path / "cache")
    make(tiny.backbone(), benchmark, tmp_path / "cache", fresh=True)
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"workers": 0}, "expected at least 1 worker and a limit of at least 32 images, got 0 and 50000"),
        ({"limit": 10}, "expected at least 1 worker and a limit of at least 32 images, got 2 and 10"),
        ({"on_error": "skipp"}, "unknown value of on_error 'skipp': did you mean 'skip'"),
    ],
)
def test_impossible_arguments(benchmark: Benchmark, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        make(tiny.backbone(), benchmark, tmp_path / "cache", **options)


def test_specs_are_loaded(benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surrogate_cache, "load_backbone", lambda spec: tiny.backbone(name=spec))
    monkeypatch.setenv("TRAJ_OOD_DATA", str(tmp_path / "home"))
    model = surrogate_for("timm:tiny", benchmark, recipe=QUICK, quiet=True, device=torch.device("cpu"))
    assert model.name == "timm:tiny"
    assert [p.name.split("-")[0] for p in (tmp_path / "home" / "surrogates").iterdir()] == ["timm"]
