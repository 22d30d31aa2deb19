"""What a run keeps for pictures: the right points, the right images, the same bytes, nothing from a damaged file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from traj_ood.attractors import AttractorDictionary
from traj_ood.autoencoders import CallableAutoencoder, SurrogateAutoencoder, SurrogateNetwork, load_autoencoder
from traj_ood.backbones import CallableBackbone, Features
from traj_ood.data import Benchmark, load_benchmark
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.evaluator import Evaluator, RunConfig
from traj_ood.evaluation.gallery import (
    FILE_NAME,
    FRAME_STEPS,
    MISTAKES,
    SIDE,
    Album,
    PathSample,
    Pictures,
    chosen_scorers,
    keep_pictures,
    principal_plane,
    view_limits,
)
from traj_ood.evaluation.metrics import Metrics
from traj_ood.evaluation.results import Result, ScorerResult, SetScore

SCORERS = ("trajectory", "knn:k=3", "mahalanobis", "reconstruction")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    tiny.write_benchmark(folder)
    tiny.vit().save_pretrained(folder / "mae")
    return folder


def evaluator(place: Path, out: Path, model: Any = None, scorers: tuple[str, ...] = SCORERS, **more: Any) -> Evaluator:
    config = RunConfig(scorers=scorers, max_steps=12, resamples=0)
    data = load_benchmark(str(place / "tiny.yaml"))
    return Evaluator(model or load_autoencoder(place / "mae"), data, config, out, quiet=True, **more)


@pytest.fixture(scope="module")
def run(place: Path) -> tuple[Evaluator, Result, Pictures]:
    done = evaluator(place, place / "done")
    result = done.run()
    return done, result, Pictures.load(done.folder / FILE_NAME)


def pixels(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def images_of(model: Any, data: Benchmark, samples: tuple[PathSample, ...]) -> torch.Tensor:
    splits = {s.name: s for s in data.splits()}
    return torch.stack(
        [model.transform(splits[s.split].images.load(list(splits[s.split].images.ids).index(s.id))) for s in samples]
    )


# ---------------------------------------------------------------------------------------------- paths


def test_paths_are_the_points_of_f_in_the_plane_of_scikit_learns_pca(run: tuple[Evaluator, Result, Pictures]) -> None:
    from sklearn.decomposition import PCA

    done, _, kept = run
    model = done.autoencoder
    ends = AttractorDictionary.load(done.folder / "attractors.safetensors").points.flatten(1).double().numpy()
    plane = PCA(2, svd_solver="full").fit(ends)
    assert kept.plane == "attractors"
    assert kept.explained == pytest.approx(plane.explained_variance_ratio_.sum(), rel=1e-6)
    z = model.encode(images_of(model, done.sample, kept.samples))
    points = [z]
    for _ in range(max(s.steps for s in kept.samples)):
        z = model.encode(model.decode(z))
        points.append(z)
    expected = np.stack([plane.transform(p.flatten(1).double().numpy()) for p in points], axis=1)
    signs = np.sign((expected * np.nan_to_num(kept.paths)).sum(axis=(0, 1)))  # a component's sign is a convention
    for sample, ours, theirs in zip(kept.samples, kept.paths, expected, strict=True):
        length = sample.steps + 1
        np.testing.assert_allclose(ours[:length], theirs[:length] * signs, rtol=1e-3, atol=1e-4)
        assert np.isnan(ours[length:]).all()
    np.testing.assert_allclose(kept.attractors, plane.transform(ends) * signs, rtol=1e-3, atol=1e-4)


def test_samples_are_spread_over_the_test_split_and_every_set(run: tuple[Evaluator, Result, Pictures]) -> None:
    _, _, kept = run
    assert {s.split for s in kept.samples} == {"test", "dim", "bright"}
    assert [s.role for s in kept.samples] == ["test"] * 10 + ["near"] * 8 + ["far"] * 8
    assert len({(s.split, s.id) for s in kept.samples}) == len(kept.samples)


def test_a_plane_of_its_own_is_shown_whole_with_its_vector_field(place: Path, tmp_path: Path) -> None:
    def decode(z: torch.Tensor) -> torch.Tensor:
        return (0.5 * z + torch.tensor([1.0, 0.0])).unflatten(1, (1, 1, 2))

    def encode(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :2]

    model = CallableAutoencoder(encode, decode, (1, 1, 2), name="plane")
    done = evaluator(place, tmp_path, model, ("trajectory",))
    done.run()
    kept = Pictures.load(done.folder / FILE_NAME)
    assert (kept.plane, kept.explained) == ("latent", 1.0)
    starts = images_of(model, done.sample, kept.samples).flatten(1).numpy()
    np.testing.assert_array_equal(kept.paths[:, 0], starts)
    np.testing.assert_allclose(kept.paths[:, 1], 0.5 * starts + [1, 0], rtol=1e-6)
    z, arrows = kept.field[:, :2], kept.field[:, 2:]
    np.testing.assert_allclose(arrows, 0.5 * z + [1, 0] - z, atol=1e-6)
    assert len(kept.field) == 21**2


def test_a_run_without_attractors_shows_the_plane_of_the_starts(place: Path, tmp_path: Path) -> None:
    done = evaluator(place, tmp_path, scorers=("mahalanobis",))
    done.run()
    kept = Pictures.load(done.folder / FILE_NAME)
    assert kept.plane == "starts"
    assert kept.attractors.shape == (0, 2)
    assert 0 < kept.explained <= 1
    assert np.isfinite(kept.paths[:, 0]).all()


def test_the_view_holds_everything_but_what_flies_off() -> None:
    paths = np.random.default_rng(0).normal(size=(8, 30, 2)).astype(np.float32)
    paths[0, 9:] = np.nan
    attractors = np.array([[5, 0]], dtype=np.float32)
    low, high = view_limits(paths, attractors)
    every = np.concatenate([paths.reshape(-1, 2), attractors])
    assert (low < np.nanmin(every, axis=0)).all()
    assert (high > np.nanmax(every, axis=0)).all()
    wild = paths.copy()
    wild[3, 7] = 3e38
    assert (view_limits(wild, attractors)[1] < 20).all()
    for nothing in (np.full_like(paths, np.nan), np.zeros_like(paths)):
        low, high = view_limits(nothing, attractors[:0])
        assert (low < high).all()


@pytest.mark.parametrize("points", [torch.ones(5, 4), torch.arange(5.0)[:, None] * torch.ones(4), torch.eye(2)])
def test_points_that_span_no_plane_have_none(points: torch.Tensor) -> None:
    assert principal_plane(points) is None


# ---------------------------------------------------------------------------------------------- frames


def test_frames_are_what_the_decoder_shows(run: tuple[Evaluator, Result, Pictures]) -> None:
    done, _, kept = run
    model = done.autoencoder
    images = images_of(model, done.sample, kept.samples)
    low, high = images.min(), images.max()
    assert len(kept.frames) == 5  # three ID samples; two OOD sets have one each
    assert len({kept.samples[f.sample].split for f in kept.frames}) == 3
    for film in kept.frames:
        sample = kept.samples[film.sample]
        steps = [t for t in FRAME_STEPS if t < sample.steps]
        last = "D(z*)" if sample.status == 0 else f"D(z{sample.steps})"
        assert film.captions == ("x", *(f"D(z{t})" for t in steps), last)
        z, expected = model.encode(images[film.sample][None]), [images[film.sample]]
        for t in range(sample.steps + 1):
            if t in steps or t == sample.steps:
                expected.append(model.decode(z)[0])
            z = model.encode(model.decode(z))
        for key, image in zip(film.images, expected, strict=True):
            grey = (255 * ((image[0] - low) / (high - low)).clamp(0, 1)).numpy()
            assert np.abs(pixels(kept.images[key]).astype(float) - grey).max() <= 0.51


def test_a_model_that_decodes_to_features_has_no_frames_and_says_so(place: Path, tmp_path: Path) -> None:
    backbone = CallableBackbone(lambda x: Features(x.flatten(1)[:, :12], None), (1, 8, 8), 12, module=torch.nn.Module())
    torch.manual_seed(0)
    network = SurrogateNetwork(12, hidden=[8], bottleneck=4)
    done = evaluator(place, tmp_path, SurrogateAutoencoder(backbone, network), ("first-residual",))
    done.run()
    kept = Pictures.load(done.folder / FILE_NAME)
    assert kept.frames == ()
    assert kept.no_frames == "the decoder of this model returns features of a backbone, not images"
    assert len(kept.paths) == len(kept.samples) > 0


# ---------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_the_extremes_of_the_scores(run: tuple[Evaluator, Result, Pictures]) -> None:
    done, result, kept = run
    table = pd.read_parquet(done.folder / "scores.parquet")
    assert kept.mistakes.keys() == set(chosen_scorers(result.scorers))
    splits = {s.name: s for s in done.sample.splits()}
    for label, sides in kept.mistakes.items():
        ood, known = table[table["role"] != "test"], table[table["role"] == "test"]
        assert [m.score for m in sides["ood"]] == sorted(ood[label])[:MISTAKES]
        assert [m.score for m in sides["id"]] == sorted(known[label], reverse=True)[:MISTAKES]
        for mistake in (*sides["ood"], *sides["id"]):
            row = table[(table["split"] == mistake.split) & (table["id"] == mistake.id)]
            assert row[label].item() == mistake.score
            images = splits[mistake.split].images
            original = images.load(list(images.ids).index(mistake.id))
            np.testing.assert_array_equal(pixels(kept.images[mistake.image]), np.asarray(original))


def test_an_image_is_kept_once_however_often_it_is_shown(run: tuple[Evaluator, Result, Pictures]) -> None:
    _, _, kept = run
    shown = {(m.split, m.id): m.image for sides in kept.mistakes.values() for found in sides.values() for m in found}
    frames = sum(len(f.images) for f in kept.frames)
    assert len(kept.images) == len(shown) + frames


def test_chosen_scorers() -> None:
    def scorer(label: str, auroc: float | None) -> ScorerResult:
        sets = {} if auroc is None else {"x": SetScore("far", 5, Metrics(auroc, 0, 0, 0, 0), {})}
        return ScorerResult(label, {}, "", None, sets)

    aurocs = {"a": 0.9, "b": 0.8, "c": 0.8, "d": 0.7, "trajectory": 0.3, "trajectory:horizon=4": 0.4, "field": 0.1}
    scorers = {k: scorer(k, v) for k, v in [*aurocs.items(), ("none", None)]}
    assert chosen_scorers(scorers) == ["a", "b", "c", "trajectory:horizon=4", "field"]
    assert chosen_scorers({"none": scorer("none", None)}) == []


def test_the_largest_gallery_stays_below_its_limit(run: tuple[Evaluator, Result, Pictures]) -> None:
    """Noise in colour is the worst a PNG can be asked to hold."""
    done, _, _ = run
    album = Album(done.sample)
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    key = album.add(Image.fromarray(noise[:SIDE, :SIDE]))
    worst = len(album.pngs[key])
    mistakes, frames, paths = 5 * 2 * MISTAKES, 6 * (2 + len(FRAME_STEPS)), 28 * 501 * 2 * 4
    assert (mistakes + frames) * worst + paths < 1.6e6
    assert pixels(album.pngs[album.add(Image.fromarray(noise))]).shape == (43, SIDE, 3)


# ---------------------------------------------------------------------------------------------- a run


def test_the_same_run_keeps_the_same_bytes(
    run: tuple[Evaluator, Result, Pictures], place: Path, tmp_path: Path
) -> None:
    done, _, _ = run
    again = evaluator(place, tmp_path)
    again.run()
    assert (again.folder / FILE_NAME).read_bytes() == (done.folder / FILE_NAME).read_bytes()


def test_pictures_can_be_left_out_and_added_later(
    run: tuple[Evaluator, Result, Pictures], place: Path, tmp_path: Path
) -> None:
    done, _, _ = run
    first = evaluator(place, tmp_path, pictures=False)
    first.run()
    gallery, record = first.folder / FILE_NAME, first.folder / "result.json"
    assert not gallery.exists()
    before = record.read_bytes()
    evaluator(place, tmp_path).run()
    assert gallery.read_bytes() == (done.folder / FILE_NAME).read_bytes()
    assert record.read_bytes() == before
    (first.folder / "attractors.safetensors").unlink()  # as in a recorded run
    gallery.unlink()
    evaluator(place, tmp_path).run()
    assert Pictures.load(gallery).plane == "starts"


def test_a_table_of_other_images_is_refused(run: tuple[Evaluator, Result, Pictures]) -> None:
    done, result, _ = run
    table = pd.read_parquet(done.folder / "scores.parquet")
    for column, value, text in (
        ("split", "moon", "expected splits of the benchmark, got 'moon'"),
        ("id", "gone.png", "has no image 'gone.png'"),
    ):
        other = table.assign(**{column: value})
        with pytest.raises(TrajOODError, match=text):
            keep_pictures(done.autoencoder, done.sample, other, result.scorers, None)


# ---------------------------------------------------------------------------------------------- files


def test_what_is_saved_is_loaded(run: tuple[Evaluator, Result, Pictures], tmp_path: Path) -> None:
    _, _, kept = run
    kept.save(tmp_path / "new" / FILE_NAME)
    loaded = Pictures.load(tmp_path / "new" / FILE_NAME)
    for name, value in vars(kept).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(loaded, name), value)
        else:
            assert getattr(loaded, name) == value


def damaged(path: Path, changes: dict[str, Any], tensors: dict[str, Any]) -> None:
    """The gallery with some of its words and tables replaced (None removes), without a digest."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        words = json.loads(file.metadata()["gallery"])
    held = load_file(path) | tensors
    words = {k: v for k, v in (words | changes).items() if v is not None}
    save_file({k: v for k, v in held.items() if v is not None}, path, {"gallery": json.dumps(words)})


@pytest.mark.parametrize(
    ("words", "tensors"),
    [
        ({"schema": "traj_ood.gallery/0"}, {}),
        ({"samples": None}, {}),
        ({"samples": []}, {}),
        ({"plane": "tangent"}, {}),
        ({"explained": "most"}, {}),
        ({"frames": [{"sample": 99, "captions": ["x"], "images": ["000"]}]}, {}),
        ({"frames": [{"sample": 0, "captions": [], "images": ["000"]}]}, {}),
        ({}, {"image/000": None}),
        ({}, {"image/000": np.frombuffer(b"GIF89a", dtype=np.uint8)}),
        ({}, {"paths": np.zeros((1, 2, 2), dtype=np.float32)}),
        ({}, {"paths": np.zeros((1, 2, 2), dtype=np.float64)}),
        ({}, {"attractors": np.full((3, 2), np.inf, dtype=np.float32)}),
    ],
)
def test_a_damaged_gallery_is_refused_by_name(
    run: tuple[Evaluator, Result, Pictures], tmp_path: Path, words: dict[str, Any], tensors: dict[str, Any]
) -> None:
    path = tmp_path / FILE_NAME
    run[2].save(path)
    damaged(path, words, tensors)
    with pytest.raises(TrajOODError, match=f"{FILE_NAME}: not a readable gallery of a run"):
        Pictures.load(path)


def test_a_gallery_that_is_cut_is_refused(run: tuple[Evaluator, Result, Pictures], tmp_path: Path) -> None:
    whole = (run[0].folder / FILE_NAME).read_bytes()
    path = tmp_path / FILE_NAME
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TrajOODError, match="start the run's command again"):
            Pictures.load(path)
