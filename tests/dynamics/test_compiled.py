"""f through torch.compile: the same numbers, one shape, f itself where the compiler fails, and runs of their own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from torch import Tensor

from traj_ood import Detector, Normalised, ScorerSet
from traj_ood.cli import main
from traj_ood.data import load_benchmark
from traj_ood.dynamics.compiled import CompiledMap
from traj_ood.dynamics.fixed_function import name_around
from traj_ood.dynamics.iterate import iterate
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.evaluator import Evaluator, RunConfig
from traj_ood.io.parts import PartStore


def halve(z: Tensor) -> Tensor:
    return torch.tanh(0.5 * z)


def test_one_shape_is_compiled_and_others_are_answered_by_f(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[int, ...]] = []

    def pretend(function: Any, **options: Any) -> Any:
        assert options == {"dynamic": False, "mode": "default"}

        def call(z: Tensor) -> Tensor:
            compiled.append(tuple(z.shape))
            return function(z)  # type: ignore[no-any-return]

        return call

    monkeypatch.setattr(torch, "compile", pretend)
    f, start = CompiledMap(halve), torch.linspace(-3, 3, 40)[:, None]
    path, plain = (iterate(g, start, chunk=8, max_steps=30) for g in (f, halve))
    assert torch.equal(path.steps, plain.steps)
    assert set(compiled) == {(8, 1)}
    torch.testing.assert_close(f(start[:3]), halve(start[:3]))
    assert set(compiled) == {(8, 1)}
    assert not f.fell_back


def test_where_the_compiler_fails_f_answers_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def call(z: Tensor) -> Tensor:
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    f, z = CompiledMap(halve), torch.ones(2, 3)
    with pytest.warns(UserWarning, match=r"torch.compile failed, f runs uncompiled \(RuntimeError: no C\+\+ compiler"):
        assert torch.equal(f(z), halve(z))
    assert torch.equal(f(z), halve(z))  # and says so once
    assert f.fell_back.startswith("RuntimeError")


def test_a_fault_of_f_is_f_s_own() -> None:
    def faulty(z: Tensor) -> Tensor:
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        CompiledMap(faulty)(torch.ones(1, 1))


def test_other_numbers_of_rows_than_those_asked_for_are_never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def pretend(function: Any, **options: Any) -> Any:
        return lambda z: (compiled.append(len(z)), function(z))[1]

    monkeypatch.setattr(torch, "compile", pretend)
    f = CompiledMap(halve, rows=6)
    for count in (1, 12, 6, 1, 6):
        torch.testing.assert_close(f(torch.ones(count, 2)), halve(torch.ones(count, 2)))
    assert compiled == [6, 6]


def test_the_model_behind_it_is_fixed_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.vit()
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model.module.train()
    path = iterate(CompiledMap(model.self_map), model.encode(tiny.images(3)), chunk=model.chunk, max_steps=3)
    plain = iterate(model.self_map, model.encode(tiny.images(3)), chunk=model.chunk, max_steps=3)
    torch.testing.assert_close(path.final, plain.final, rtol=0, atol=0)
    assert model.module.training
    assert name_around(CompiledMap(model.self_map)).startswith(model.name)


# ---------------------------------------------------------------------------------------------- runs and detectors

SCORERS = ["trajectory:horizon=8", "field", "path-energy", "knn:k=2"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A compiler that compiles nothing: rows of each call of what it made."""
    found: list[int] = []

    def pretend(function: Any, **options: Any) -> Any:
        return lambda z: (found.append(len(z)), function(z))[1]

    monkeypatch.setattr(torch, "compile", pretend)
    return found


@pytest.fixture
def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)


def scores_of(compile: bool, scorers: list[str] = SCORERS) -> tuple[ScorerSet, dict[str, Tensor]]:
    made = ScorerSet(tiny.vit(), scorers, max_steps=12, compile=compile).fit(Normalised(tiny.images(20)))
    return made, made.score(Normalised(tiny.images(9, seed=1))).scores


@pytest.mark.slow
def test_compiled_scores_are_the_plain_ones_to_rounding() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile failed")
        compiled, found = scores_of(True)
    assert compiled.compile
    _, expected = scores_of(False)
    assert found.keys() == expected.keys()
    for label, values in expected.items():
        torch.testing.assert_close(found[label], values, rtol=1e-5, atol=0, msg=label)


def test_all_paths_are_walked_with_it_those_of_training_images_too(calls: list[int]) -> None:
    compiled, found = scores_of(True, ["trajectory", "path-energy:two_sided=true"])
    assert compiled.compile
    assert set(calls) == {6}  # whole chunks, and nothing else
    assert compiled.dictionary is not None
    assert compiled.dictionary.provenance["compile"] is True
    plain, expected = scores_of(False, ["trajectory", "path-energy:two_sided=true"])
    assert "compile" not in plain.dictionary.provenance  # type: ignore[union-attr]
    for label, values in expected.items():
        torch.testing.assert_close(found[label], values, rtol=1e-9, atol=0)


def test_scorers_that_walk_no_path_compile_nothing(calls: list[int]) -> None:
    compiled, _ = scores_of(True, ["knn:k=2", "mahalanobis"])
    assert not compiled.compile
    assert not calls


@pytest.mark.usefixtures("_broken")
def test_where_the_compiler_fails_a_set_is_a_plain_one_and_says_so_once() -> None:
    with pytest.warns(UserWarning, match=r"torch.compile failed, f runs uncompiled \(RuntimeError: no C\+\+") as said:
        fallen, found = scores_of(True)
    assert len([w for w in said if "torch.compile" in str(w.message)]) == 1
    assert not fallen.compile
    _, expected = scores_of(False)
    assert all(torch.equal(found[label], expected[label]) for label in expected)


def evaluator(place: Path, compile: bool) -> Evaluator:
    config = RunConfig(("trajectory", "field"), max_steps=6, resamples=0, compile=compile)
    data = load_benchmark(str(place / "tiny.yaml"))
    return Evaluator(tiny.vit(name="vit"), data, config, place / "out", batch_size=5, quiet=True, pictures=False)


def test_a_compiled_run_and_a_plain_one_are_never_one(
    tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_benchmark(tmp_path)
    save = PartStore.save

    def interrupted(store: PartStore, key: str, part: Any) -> None:
        if key.startswith("test"):
            raise KeyboardInterrupt
        save(store, key, part)

    for first, then in ((True, False), (False, True)):
        with monkeypatch.context() as patch:
            patch.setattr(PartStore, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                evaluator(tmp_path, first).run(fresh=True)
        with pytest.raises(TrajOODError, match=r"another config \(config.compile: .*: choose another --out"):
            evaluator(tmp_path, then).run()  # neither are its parts taken
        result = evaluator(tmp_path, first).run()
        assert result.config.get("compile", False) is first
        with pytest.raises(TrajOODError, match=r"another config \(config.compile: .*: choose another --out"):
            evaluator(tmp_path, then).run()
    assert calls


@pytest.mark.usefixtures("_broken")
def test_a_run_that_could_not_be_compiled_is_a_plain_one(tmp_path: Path) -> None:
    tiny.write_benchmark(tmp_path)
    with pytest.warns(UserWarning, match="torch.compile failed"):
        result = evaluator(tmp_path, True).run()
    assert "compile" not in result.config
    assert evaluator(tmp_path, False).run().created == result.created


def test_a_detector_is_compiled_for_whole_chunks(tmp_path: Path, calls: list[int]) -> None:
    model, images = tiny.vit(), tiny.images(20)
    detector = Detector.fit(model, Normalised(images), "path-energy", compile=True)
    assert detector.training["compile"] is True
    detector.save(tmp_path / "detector")
    calls.clear()
    plain = Detector.load(tmp_path / "detector", device="cpu")
    expected = plain.score(Normalised(images))
    assert not calls
    loaded = Detector.load(tmp_path / "detector", device="cpu", compile=True)
    assert calls  # its test images already
    calls.clear()
    torch.testing.assert_close(loaded.score(Normalised(images)), expected, rtol=1e-9, atol=0)
    assert set(calls) == {6}
    calls.clear()
    loaded.score(Normalised(images[:1]))
    assert not calls


def test_the_command_line(tmp_path: Path, calls: list[int]) -> None:
    def call(*words: object) -> Any:
        return CliRunner().invoke(main, [str(word) for word in words])

    tiny.vit().save_pretrained(tmp_path / "mae")
    tiny.write_images(tmp_path / "id", 60, seed=0, high=90)
    detector = tmp_path / "detector"
    chosen = ["--scorer", "path-energy", "--device", "cpu", "--quiet", "--compile"]
    fitted = call("fit", tmp_path / "id", "--model", tmp_path / "mae", "--out", detector, *chosen)
    assert fitted.exit_code == 0, fitted.output
    assert calls
    calls.clear()
    rows = [call("score", detector, tmp_path / "id", "--quiet", *word) for word in ((), ("--compile",))]
    assert [result.exit_code for result in rows] == [0, 0]
    assert calls
    assert rows[0].stdout == rows[1].stdout
    refused = call("score", detector, tmp_path / "id", "--engine", "ray", "--out", tmp_path / "rows", "--compile")
    assert refused.exit_code == 2
    assert "--compile: expected --engine local, got ray" in refused.stderr
