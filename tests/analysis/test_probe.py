"""Data-free probing: the pursuit against NumPy, dictionaries without data, and a model whose attractors are known."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray

from traj_ood.analysis import Finding, Workspace, find_question, options_from, probe, subjects
from traj_ood.analysis.probe import Probe
from traj_ood.analysis.probe_coding import ATTRACTORS, DICTIONARIES, ORTHOGONAL, OMPDictionary, random_basis
from traj_ood.autoencoders import CallableAutoencoder
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError


def pursuit(atoms: NDArray[np.float64], target: NDArray[np.float64], count: int) -> list[NDArray[np.float64]]:
    """Orthogonal matching pursuit as it is defined: every reconstruction on the way to ``count`` atoms (N, k)."""
    chosen: list[int] = []
    found, rest = [], target
    for _ in range(count):
        chosen.append(int(np.abs(atoms @ rest).argmax()))
        weights, *_ = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)
        found.append(weights @ atoms[chosen])
        rest = target - found[-1]
    return found


@pytest.mark.parametrize("common", [0.0, 3.0])
def test_the_pursuit_is_the_brute_force_one(common: float) -> None:
    """Also for atoms that share a large part, as attractors do."""
    draw = np.random.default_rng(0)
    raw = draw.standard_normal((60, 40)) + common * draw.standard_normal(40)
    dictionary = OMPDictionary(torch.from_numpy(raw))
    atoms = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(dictionary.atoms, atoms)
    for _ in range(3):
        target = draw.standard_normal(40)
        found, used = dictionary.reconstruct(target, (1, 2, 5, 12))
        assert used == 12
        expected = pursuit(atoms, target, 12)
        np.testing.assert_allclose(found, [expected[m - 1] for m in (1, 2, 5, 12)], atol=1e-9)


def test_with_an_orthogonal_basis_the_pursuit_keeps_the_largest_coordinates() -> None:
    basis = random_basis(30, 30, seed=1)
    target = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coordinates = basis @ target
    found, used = OMPDictionary(basis).reconstruct(target.numpy(), (4, 30))
    kept = coordinates.clone()
    kept[coordinates.abs().argsort()[:-4]] = 0
    np.testing.assert_allclose(found[0], (kept @ basis).numpy(), atol=1e-12)
    np.testing.assert_allclose(found[1], target.numpy(), atol=1e-12)
    assert used == 30


def test_a_random_basis_is_orthonormal_and_of_its_seed() -> None:
    part = random_basis(5, 12, seed=3)
    torch.testing.assert_close(part @ part.T, torch.eye(5, dtype=torch.float64))
    assert torch.equal(part, random_basis(5, 12, seed=3))
    assert not torch.equal(part, random_basis(5, 12, seed=4))


def test_atoms_that_repeat_end_the_pursuit_early_and_in_silence() -> None:
    draw = np.random.default_rng(0)
    three = draw.standard_normal((3, 10))
    dictionary = OMPDictionary(torch.from_numpy(np.repeat(three, 4, axis=0)))
    target = draw.standard_normal(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, used = dictionary.reconstruct(target, (2, 3, 9))
    assert used == 3
    weights, *_ = np.linalg.lstsq(three.T, target, rcond=None)
    np.testing.assert_allclose(found[1:], [weights @ three] * 2, atol=1e-9)
    assert dictionary.reconstruct(np.zeros(10), (1, 2))[1] == 0


def test_rank_and_energy_of_a_dictionary() -> None:
    draw = np.random.default_rng(0)
    low = draw.standard_normal((20, 4)) @ draw.standard_normal((4, 15))
    rank, energy = OMPDictionary(torch.from_numpy(low)).spectrum()
    assert rank == np.linalg.matrix_rank(low) == 4
    values = np.linalg.svd(low / np.linalg.norm(low, axis=1, keepdims=True), compute_uv=False) ** 2
    assert energy == int(np.searchsorted(np.cumsum(values) / values.sum(), 0.9)) + 1
    assert OMPDictionary(torch.eye(5)).spectrum() == (5, 5)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    tiny.conv().save_pretrained(tmp_path / "conv")
    for seed, name in enumerate(("dark", "bright")):
        tiny.write_images(tmp_path / name, 6, seed, high=(90, 256)[seed])
    return tmp_path


def asked(folders: Path, **options: Any) -> Probe:
    settings: dict[str, Any] = {"images": 4, "shares": (0.2, 0.5, 1.0), "max_steps": 20, "examples": 2}
    settings |= {"model": str(folders / "conv"), "data": ("dark", "bright")}
    return Probe(**{**settings, **options})


def work(folders: Path) -> Workspace:
    return Workspace(folders / "work", data_root=folders)


def test_a_whole_basis_loses_nothing(folders: Path) -> None:
    """All 6 directions of a 6-dimensional latent: the error that is left is that of D(E(x))."""
    finding = asked(folders).run(work(folders), folders / "out")
    rows = {(r["set"], r["dictionary"], r["atoms"]): r for r in finding.figures["rows"]}
    assert len(rows) == 2 * len(DICTIONARIES) * 3
    for name in ("dark", "bright"):
        whole = rows[name, ORTHOGONAL, 6]
        assert whole["latent_mse"] < 1e-12
        assert whole["image_mse"] == pytest.approx(whole["image_mse_of_D(E(x))"], rel=1e-4)
        for dictionary in DICTIONARIES:
            errors = [rows[name, dictionary, m]["latent_mse"] for m in (1, 3, 6)]
            assert errors == sorted(errors, reverse=True)
    assert {p.name for p in (folders / "out").iterdir()} == {"finding.json", *finding.pictures}
    assert set(finding.pictures) == {"probe.png", "atoms.png", "reconstructions.png", "growth.png"}
    assert Finding.load(folders / "out").figures == finding.figures
    assert finding.sentence.startswith("Of 6 starts from noise ")
    assert (finding.figures["ratio_atoms"], finding.figures["ratio_share"]) == (1, pytest.approx(1 / 6))
    assert set(finding.figures["ratio"][ATTRACTORS]) == {"dark", "bright"}


def test_errors_are_those_of_the_images(folders: Path) -> None:
    """Against the same thing written out for one image."""
    question = asked(folders, images=1, data=("dark",), pictured=0)
    finding = question.run(work(folders), folders / "out")
    model = tiny.conv()
    source = subjects.named_images(("dark",), folders, 1)[0].source
    image = model.transform(source.load(0))[None]
    latent = model.encode(image)[0].double().numpy()
    guess = pursuit(random_basis(6, 6, 0).numpy(), latent, 3)[-1]
    expected = float((model.decode(torch.from_numpy(guess)[None].float()) - image).square().mean())
    found = [r["image_mse"] for r in finding.figures["rows"] if (r["dictionary"], r["atoms"]) == (ORTHOGONAL, 3)]
    assert found == pytest.approx([expected], rel=1e-5)


def test_no_data_enter_the_dictionary_and_nothing_is_computed_twice(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = asked(folders, data=("dark",), pictured=0).run(work(folders), folders / "one")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(probe, "settle", never)
    other = asked(folders, data=("bright",), pictured=0).run(work(folders), folders / "two")
    assert first.figures["dictionaries"] == other.figures["dictionaries"]
    monkeypatch.setattr(probe.Coder, "measure", never)
    again = asked(folders, data=("dark",), pictured=0).run(work(folders), folders / "three")
    assert again.figures == first.figures


def test_attractors_of_a_model_that_has_sixteen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's are {−1, 1}⁴: four of them span the latents unless they depend on each other."""
    monkeypatch.setattr(probe, "load_autoencoder", lambda _: tiny.toy())
    tiny.write_images(tmp_path / "images", 3, 0, size=2)
    finding = Probe(data=(str(tmp_path / "images"),), shares=(0.25, 1.0), examples=1, pictured=0).run(
        Workspace(tmp_path / "work"), tmp_path / "out"
    )
    figures = finding.figures
    assert (figures["latent_dimension"], figures["atoms"], figures["converged"]) == (4, 4, 1.0)
    draws = torch.Generator().manual_seed(0)
    signs = torch.randn(4, 4, generator=draws).sign()
    assert figures["distinct_end_points"] == len({tuple(row) for row in signs.tolist()})
    about = next(d for d in figures["dictionaries"] if d["dictionary"] == ATTRACTORS)
    assert about["rank"] == np.linalg.matrix_rank(signs.numpy())


def linear(rate: float) -> CallableAutoencoder:
    """f(z) = rate · z."""
    return CallableAutoencoder(
        lambda x: x.flatten(1), lambda z: (rate * z).reshape(-1, 1, 2, 2), (1, 2, 2), name="linear", chunk=4
    )


def of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, **options: Any) -> Finding:
    monkeypatch.setattr(probe, "load_autoencoder", lambda _: linear(rate))
    tiny.write_images(tmp_path / "images", 3, 0, size=2)
    question = Probe(data=(str(tmp_path / "images"),), shares=(0.5, 1.0), examples=1, pictured=0, **options)
    return question.run(Workspace(tmp_path / f"work{rate}"), tmp_path / "out")


def test_points_that_never_settle_are_not_said_to_converge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = of(tmp_path, monkeypatch, 1.5, max_steps=20)
    assert (finding.figures["converged"], finding.figures["finite"]) == (0.0, 1.0)
    assert finding.sentence.startswith(
        "Of 4 starts from noise 0 (0.0%) converged within 20 steps and 0 became NaN or infinite; the finite end "
        "points (4, distinct: 4) are the atoms"
    )
    assert "With at most 2 atoms (50.0% of the starts; 2 in the median reconstruction" in finding.sentence


def test_atoms_that_the_pursuit_could_not_use_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled = probe.settle

    def three_lost(*arguments: Any, **options: Any) -> Any:
        ends, path = settled(*arguments, **options)
        ends.statuses[1:] = int(Status.NON_FINITE)
        return ends, path

    monkeypatch.setattr(probe, "settle", three_lost)
    finding = of(tmp_path, monkeypatch, 0.5)
    assert finding.figures["finite"] == 0.25
    assert "3 became NaN or infinite; the finite end points (1, distinct: 1)" in finding.sentence
    assert "With at most 2 atoms (50.0% of the starts; 1 in the median reconstruction, 2 of the" in finding.sentence
    used = [r["median_atoms_used"] for r in finding.figures["rows"] if r["dictionary"] == ATTRACTORS]
    assert used == [1, 1]


def test_noise_that_is_no_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        TrajOODError,
        match=r"probe: attractors: .*got 4 of 4 that are 0; .* use another \(traj-ood diagnose fashion-mae\)",
    ):
        of(tmp_path, monkeypatch, 0.0)
    with pytest.raises(TrajOODError, match=r"probe: attractors: .*got none: all 4 starts became NaN or infinite; "):
        of(tmp_path, monkeypatch, 1e15)


def test_images_that_the_model_makes_nothing_finite_of_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only images have the value 77, so that noise is finite and images are not.
    made = CallableAutoencoder(
        lambda x: x.flatten(1) / (x.flatten(1) != 77),
        lambda z: (0.5 * z).reshape(-1, 1, 2, 2),
        (1, 2, 2),
        transform=lambda _: torch.full((1, 2, 2), 77.0),
        name="linear",
        chunk=4,
    )
    tiny.write_images(tmp_path / "images", 3, 0, size=2)
    monkeypatch.setattr(probe, "load_autoencoder", lambda _: made)
    question = Probe(data=(str(tmp_path / "images"),), shares=(0.5, 1.0))
    with pytest.raises(TrajOODError, match=r"expected finite latents, got NaN or infinity from linear for images/000"):
        question.run(Workspace(tmp_path / "work"), tmp_path / "out")


def test_a_basis_without_error_has_no_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Black images: E(x) = 0 needs no atom."""
    monkeypatch.setattr(probe, "load_autoencoder", lambda _: linear(0.5))
    tiny.write_images(tmp_path / "images", 3, 0, size=2, high=1)
    question = Probe(data=(str(tmp_path / "images"),), shares=(0.5, 1.0), pictured=0)
    finding = question.run(Workspace(tmp_path / "work"), tmp_path / "out")
    assert set(finding.figures["ratio"][ATTRACTORS].values()) == {None}
    assert "on 0 of 1 sets of images (median ratio none: the basis makes no error)" in finding.sentence


def test_data_are_checked_before_a_model_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "subject", lambda *_: pytest.fail("trained"))
    with pytest.raises(TrajOODError, match=r"unknown set of images 'nowhere': Known: .*[^0], cifar10, cifar10-local"):
        Probe(model="conv", data=("nowhere",)).run(Workspace(tmp_path / "work"), tmp_path / "out")


def test_a_folder_does_not_stand_for_a_benchmark_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fashion", "mnist", "mine"):
        Path(name).mkdir()
    assert subjects.folder_of("fashion", tmp_path) is subjects.folder_of("mnist", tmp_path) is None
    assert subjects.folder_of("./fashion", None) == Path("fashion")
    assert subjects.folder_of("mine", None) == Path("mine")


def test_the_starts_do_not_depend_on_the_units() -> None:
    whole = [
        torch.randn(n, 3, generator=torch.Generator().manual_seed(2 * 1_000_003 + i)) for i, n in [(0, 512), (1, 88)]
    ]
    for size in (64, 100, 1000):
        rows = probe.start_rows(600, size)
        assert [i for part in rows for i in part] == list(range(600))
        assert max(map(len, rows)) <= size
        assert torch.equal(torch.cat([probe.noise_starts(part, 600, (3,), 2) for part in rows]), torch.cat(whole))


def test_units_are_small_and_an_interruption_costs_one(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_UNIT_STARTS", 1)
    monkeypatch.setattr(probe, "_GROUP_IMAGES", 3)
    chunked = tiny.conv()
    chunked.chunk = 2
    monkeypatch.setattr(probe, "load_autoencoder", lambda _: chunked)
    measure, calls = probe.Coder.measure, []

    def breaks(self: probe.Coder, images: subjects.NamedImages, rows: range, shown: int) -> Any:
        calls.append((images.name, rows, shown))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, images, rows, shown)

    monkeypatch.setattr(probe.Coder, "measure", breaks)
    question = asked(folders, images=5, examples=4, data=("dark",))
    with pytest.raises(KeyboardInterrupt):
        question.run(work(folders), folders / "out")
    assert len(list((folders / "work").glob("noise-*"))) == 3
    assert len(list((folders / "work").glob("reconstructions-*"))) == 1
    found = question.run(work(folders), folders / "out")
    assert calls == [("dark", range(3), 3), *[("dark", range(3, 5), 1)] * 2]
    monkeypatch.setattr(probe, "_UNIT_STARTS", 64)
    at_once = question.run(Workspace(folders / "other", data_root=folders), folders / "out")
    assert at_once.figures == found.figures


def test_a_model_that_is_trained_first(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def trained(question: Probe, space: Workspace, data: str) -> subjects.Subject:
        asked_for.append((data, question.train_images, question.epochs, question.bottleneck, question.width))
        images = subjects.named_images(("dark",), folders, 1)[0].source
        return subjects.Subject(tiny.conv(), images, images)

    monkeypatch.setattr(Probe, "subject", trained)
    finding = asked(folders, model="conv", bottleneck=6, epochs=2, pictured=0).run(work(folders), folders / "out")
    assert asked_for == [("cifar10", 10_000, 2, 6, 16)]
    assert finding.figures["latent_dimension"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "probe: images: expected at least 1, got 0"),
        ({"atoms": 1}, "probe: atoms: expected at least 2, or none, got 1"),
        ({"shares": (0.5, 0.1)}, r"probe: shares: expected at least one, ascending, got 0\.5, 0\.1"),
        ({"shares": (0.0, 0.1)}, "probe: shares: expected parts of the atoms, above 0 and at most 1"),
        ({"tol": 0.0}, r"probe: tol: expected a squared residual above 0, got 0\.0"),
        ({"max_steps": 1}, "probe: max_steps: expected at least 2, got 1"),
        ({"data": ()}, "probe: data: expected at least one set of images"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrajOODError, match=message):
        Probe(**options)


def test_what_cannot_be_asked(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrajOODError, match="probe: atoms: expected at most 6, the dimension of conv's latents, got 7"):
        asked(folders, atoms=7).run(work(folders), folders / "out")
    with pytest.raises(TrajOODError, match="unknown set of images 'fashon': did you mean 'fashion'"):
        asked(folders, data=("fashon",)).run(work(folders), folders / "out")
    with pytest.raises(TrajOODError, match="expected sets of images with different names, got 'dark' twice"):
        asked(folders, data=("dark", str(folders / "dark"))).run(work(folders), folders / "out")
    model = tiny.conv()
    monkeypatch.setattr(model, "decode", lambda latents: latents)  # as a surrogate, whose targets are features
    monkeypatch.setattr(probe, "load_autoencoder", lambda _: model)
    with pytest.raises(TrajOODError, match="expected a model that decodes to images"):
        asked(folders).run(work(folders), folders / "out")


def test_options_as_text_and_the_papers(folders: Path) -> None:
    question = options_from(find_question("probe"), ["atoms=none", "shares=0.05,0.1", "data=fashion,cifar10"])
    assert (question.atoms, question.shares, question.data) == (None, (0.05, 0.1), ("fashion", "cifar10"))  # type: ignore[attr-defined]
    smaller = Probe(atoms=64).differences()
    assert "atoms: 64 here, as many as the latent has dimensions in the paper" in smaller
    words = Probe(pictured=0, train_images=0).differences()
    assert "pictured: no set here, 6 with --paper (the paper does not state it)" in words
    assert "train_images: all here, 10000 with --paper (the paper does not state it)" in words
    paper = Probe.paper()
    assert paper.differences() == ()
    assert paper.pictured == len(paper.data)
    assert (paper.model, paper.images, paper.tol, paper.max_steps, len(paper.data)) == ("sd-vae", 500, 1e-5, 500, 6)


def test_sets_of_images_by_name(tmp_path: Path) -> None:
    yaml = tiny.write_benchmark(tmp_path)
    found = subjects.named_images((str(yaml), str(tmp_path / "images" / "train")), None, 5)
    assert [images.name for images in found] == ["tiny test", "dim", "bright", "train"]
    assert [len(images.source) for images in found] == [5] * 4
    drawn = subjects.training_images(str(yaml), None, 3, seed=1)
    assert len(drawn) == 3
    assert all("train" in image_id for image_id in drawn.ids)
    with pytest.raises(TrajOODError, match=r"expected 1 to 12 images.*, got 13"):
        subjects.training_images(str(yaml), None, 13, seed=1)
