"""Residuals and norms over many steps: a map that halves, random models of the paper's families, texts."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from traj_ood.analysis import Finding, Workspace, dynamics
from traj_ood.analysis.dynamics import Dynamics, OutputResidual, read_texts
from traj_ood.autoencoders import CallableAutoencoder, rehearsals
from traj_ood.drawing.charts import SERIES
from traj_ood.dynamics.iterate import iterate
from traj_ood.errors import TrajOODError
from traj_ood.io.parts import PartStore


def halving() -> CallableAutoencoder:
    """f(z) = z / 2, D(z) = z / 2 as an image."""
    return CallableAutoencoder(
        lambda x: x.flatten(1), lambda z: (z / 2).reshape(-1, 1, 2, 2), (1, 2, 2), name="half", chunk=4
    )


def test_a_map_that_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_images(tmp_path / "images", 6, 0, size=2)
    monkeypatch.setattr(dynamics, "load_autoencoder", lambda _: halving())
    question = Dynamics(models=("tiny/half",), images=str(tmp_path / "images"), image_samples=6, steps=60)
    finding = question.run(Workspace(tmp_path / "work"), tmp_path / "out")
    source = dynamics.training_images(str(tmp_path / "images"), None, 6, 0)
    start = torch.stack([halving().transform(source.load(i)).flatten() for i in range(6)]).norm(dim=1).mean().item()
    curves = finding.figures["curves"]["tiny/half"]
    assert curves["latent"][:3] == pytest.approx([start / 2, start / 4, start / 8], rel=1e-4)
    assert curves["output"][:3] == pytest.approx([start / 4, start / 8, start / 16], rel=1e-4)
    assert curves["norm"][:3] == pytest.approx([start, start / 2, start / 4], rel=1e-4)
    assert (len(curves["latent"]), len(curves["norm"]), len(curves["output"])) == (60, 61, 60)
    row = finding.figures["rows"][0]
    assert row["last_factor"] == pytest.approx(0.5, rel=1e-4)
    assert (row["samples"], row["latent_residual_falls_until_step"]) == (6, 60)
    assert row["left_the_finite_numbers"] == 0
    assert (finding.figures["rehearsal"], row["rehearsal"]) == (False, False)
    assert "changes by a factor of 0.5 a step at the end" in finding.sentence
    assert finding.pictures == ("pairs.png",)
    assert Finding.load(tmp_path / "out").figures == finding.figures


def test_an_interruption_loses_the_trajectories_of_few_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(_: str) -> CallableAutoencoder:
        return CallableAutoencoder(
            lambda x: x.flatten(1), lambda z: (z / 2).reshape(-1, 1, 2, 2), (1, 2, 2), name="half", chunk=48
        )

    saved: list[str] = []
    save = PartStore.save

    def counting(self: PartStore, key: str, *args: Any) -> None:
        saved.append(key)
        if len(saved) == stopped_at:
            raise KeyboardInterrupt
        save(self, key, *args)

    tiny.write_images(tmp_path / "images", 20, 0, size=2)
    monkeypatch.setattr(dynamics, "load_autoencoder", model)
    question = Dynamics(models=("tiny/half",), images=str(tmp_path / "images"), image_samples=20, steps=30)
    whole = question.run(Workspace(tmp_path / "whole"), tmp_path / "whole-out")
    monkeypatch.setattr(PartStore, "save", counting)
    stopped_at = 4
    with pytest.raises(KeyboardInterrupt):
        question.run(Workspace(tmp_path / "work"), tmp_path / "out")
    saved, stopped_at = [], 0
    assert question.run(Workspace(tmp_path / "work"), tmp_path / "out").figures == whole.figures
    assert len(saved) == 1  # of four units, three were stored


def test_the_decoder_of_an_own_model_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an attribute that is no weight decides, which its code does not show."""

    class Net(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return (latents * self.factor).reshape(-1, 1, 2, 2)

    tiny.write_images(tmp_path / "images", 4, 0, size=2)
    question = Dynamics(models=("tiny/net",), images=str(tmp_path / "images"), image_samples=4, steps=4)

    def factors(factor: float) -> list[float]:
        made = CallableAutoencoder.from_module(Net(factor), (1, 2, 2))
        monkeypatch.setattr(dynamics, "load_autoencoder", lambda _: made)
        curve = question.run(Workspace(tmp_path / "work"), tmp_path / "out").figures["curves"]["tiny/net"]["norm"]
        return [after / before for before, after in pairwise(curve)]

    assert factors(0.5) == pytest.approx([0.5] * 4, rel=1e-4)
    assert factors(0.7) == pytest.approx([0.7] * 4, rel=1e-4)


def test_trajectories_that_leave_the_finite_numbers_end_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grows = CallableAutoencoder(
        lambda x: x.flatten(1) * 1e9, lambda z: z.reshape(-1, 1, 2, 2), (1, 2, 2), name="grows", chunk=4
    )
    tiny.write_images(tmp_path / "images", 5, 0, size=2)
    monkeypatch.setattr(dynamics, "load_autoencoder", lambda _: grows)
    question = Dynamics(models=("tiny/grows",), images=str(tmp_path / "images"), image_samples=5, steps=8)
    finding = question.run(Workspace(tmp_path / "work"), tmp_path / "out")
    figures = finding.figures
    assert finding.sentence == (
        "The mean latent residual over 8 steps: tiny/grows: becomes NaN or infinite (5 of 5 samples)."
    )
    assert figures["rows"][0]["left_the_finite_numbers"] == 5
    assert figures["curves"]["tiny/grows"]["norm"][-1] is None
    assert figures["rows"][0]["last_factor"] is None


def row(model: str, lost: int, last: float | None, spread: float | None) -> dict[str, Any]:
    told: dict[str, Any] = {"model": model, "rehearsal": False, "samples": 4, "left_the_finite_numbers": lost}
    told |= {"latent_residual_first": 2.0, "latent_residual_last": last, "norm_spread": spread}
    return told | {"last_factor": 0.5 if last else None}


def test_bounded_norms_are_claimed_only_where_no_sample_is_lost() -> None:
    told = dynamics.sentence([row("a", 0, 1.0, 1.00001), row("b", 1, 1.0, 9.0), row("c", 0, 0.0, None)], 7)
    assert told == (
        "The mean latent residual over 7 steps: a: ends at 0.5 of its first value and changes by a factor of 0.5 a "
        "step at the end; b: ends at 0.5 of its first value and changes by a factor of 0.5 a step at the end (of those "
        "still finite; 1 of 4 samples become NaN or infinite); c: vanishes. "
        "From the first step on, the largest mean norm of a is at most 1.001 times its smallest."
    )
    assert "of every model is at most 2 times" in dynamics.sentence([row("a", 0, 1.0, 2.0)], 7)


def test_a_factor_is_of_the_same_samples_and_a_spread_of_every_step() -> None:
    """One of two samples is lost within the last steps: the mean then jumps to that of the other."""
    latent = torch.tensor([0.5, 0.25]).double() ** torch.arange(1, 61)[:, None]
    norm = torch.ones(2, 61, dtype=torch.float64)
    table = {"latent": latent.T.clone(), "norm": norm.clone()}
    whole = dynamics.summary("a", table)
    assert (whole["last_factor"], whole["norm_spread"]) == (pytest.approx(0.5, rel=1e-3), 1)
    table["norm"][1, 30] = torch.inf  # a norm that overflows: every number is still finite
    overflown = dynamics.summary("a", table)
    assert (overflown["left_the_finite_numbers"], overflown["norm_spread"]) == (0, None)
    table["latent"][0, 40:] = table["norm"][0, 41:] = torch.nan
    lost = dynamics.summary("a", table)
    assert (lost["left_the_finite_numbers"], lost["last_factor"]) == (1, None)


def test_missing_data_are_told_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dynamics, "_measured", lambda *_: pytest.fail("computed"))
    tiny.write_images(tmp_path / "images", 3, 0)
    models = ("fashion-mae", "rehearsal-llama")
    for options, message in (
        ({"texts": "nowhere.txt"}, r"nowhere\.txt: expected a text per line"),
        ({"image_samples": 4}, "expected 1 to 3 images"),
    ):
        settings: dict[str, Any] = {"images": "images", "image_samples": 3, **options}
        with pytest.raises(TrajOODError, match=message):
            Dynamics(models=models, **settings).run(Workspace(tmp_path / "work", data_root=tmp_path), tmp_path / "out")


def test_more_models_than_colours_are_refused_at_once() -> None:
    assert len(SERIES) == dynamics.MAX_MODELS
    Dynamics(models=tuple(f"{kind}{i}" for kind in ("a/", "causal-lm:") for i in range(6)))
    for kind in ("a/", "causal-lm:"):
        with pytest.raises(TrajOODError, match="models: expected at most 6 autoencoders and 6 language models"):
            Dynamics(models=tuple(f"{kind}{i}" for i in range(7)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rehearsal-dino", "did you mean 'rehearsal-dinov2'.*Known: .*causal-lm:SOURCE, .*rehearsal-llama"),
        ("causal-lm:", "unknown model of dynamics 'causal-lm:'"),
        ("diffusers:vae", "unknown model of dynamics 'diffusers:vae'"),
        (
            "causal-lm:./nowhere",
            r"expected a name or a folder, got \./nowhere, which is no folder: correct 'causal-lm:\./nowhere'",
        ),
        ("a/b/c", "got a/b/c, which is no folder"),
    ],
)
def test_all_names_are_checked_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(Dynamics, "_measured", lambda *_: pytest.fail("computed"))
    with pytest.raises(TrajOODError, match=message):
        Dynamics(models=("fashion-mae", name)).run(Workspace(tmp_path / "work"), tmp_path / "out")


def test_names_that_a_loader_may_take(tmp_path: Path) -> None:
    for name in (*Dynamics.paper().models, "sd-vae", "causal-lm:gpt2", "diffusers:a/b/vae", str(tmp_path)):
        dynamics.check_name(name)


def test_texts_in_words() -> None:
    assert "texts: the documentation of the Python language here, the Pile (pile.jsonl) in the paper" in (
        Dynamics().differences()
    )


def test_output_residuals_are_those_of_decoded_points() -> None:
    model = tiny.toy(chunk=4)
    start = 1.4 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    trajectory = iterate(
        model.self_map, start, tol=1e-6, max_steps=50, observers=[OutputResidual(model)], chunk=model.chunk
    )
    found = trajectory.measure("output")
    assert len(set(trajectory.steps.tolist())) > 1  # they leave at different steps
    for row, z in enumerate(start):
        for step in range(1, int(trajectory.steps[row]) + 1):
            image = model.self_map(z[None])[0]
            moved = (model.decode_batch(image[None]) - model.decode_batch(z[None])).norm()
            torch.testing.assert_close(found[row, step], moved.double(), atol=1e-6, rtol=1e-5)
            z = image
    assert bool(found[:, 0].isnan().all())


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finding, Path, Dynamics]:
    folder = tmp_path_factory.mktemp("rehearsed")
    tiny.write_images(folder / "images", 5, 0)
    (folder / "texts.txt").write_text("\n".join(f"{i}: a text of more than sixteen bytes" for i in range(7)))
    question = Dynamics(
        models=(*rehearsals.PAIRS, *rehearsals.LANGUAGE),
        images="images",
        texts="texts.txt",
        image_samples=4,
        text_samples=5,
        steps=4,
        tokens=16,
    )
    return question.run(Workspace(folder / "work", data_root=folder), folder / "out"), folder, question


def test_rehearsals_are_called_so(rehearsed: tuple[Finding, Path, Dynamics]) -> None:
    finding, folder, _ = rehearsed
    assert finding.figures["rehearsal"] is True
    assert finding.figures["rehearsed_models"] == [*rehearsals.PAIRS, *rehearsals.LANGUAGE]
    assert any("a rehearsal that says nothing of trained models" in text for text in finding.differences)
    assert finding.sentence.count("(random weights)") == 4
    assert [row["samples"] for row in finding.figures["rows"]] == [4, 4, 5, 5]
    assert [("output" in c) for c in finding.figures["curves"].values()] == [True, True, False, False]
    assert {"pairs.png", "language.png"} == set(finding.pictures)
    assert all((folder / "out" / name).stat().st_size > 5000 for name in finding.pictures)


def test_finished_units_are_not_computed_again(
    rehearsed: tuple[Finding, Path, Dynamics], monkeypatch: pytest.MonkeyPatch
) -> None:
    finding, folder, question = rehearsed

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(dynamics, "iterate", never)
    again = question.run(Workspace(folder / "work", data_root=folder), folder / "again")
    assert again.figures == finding.figures


def test_rehearsals_by_name_and_seed() -> None:
    first, again = (rehearsals.rehearsal_pair("rehearsal-dinov2", 1).fingerprint() for _ in range(2))
    assert first == again != rehearsals.rehearsal_pair("rehearsal-dinov2", 2).fingerprint()
    with pytest.raises(TrajOODError, match="unknown rehearsal 'rehearsal-dino': did you mean 'rehearsal-dinov2'"):
        rehearsals.rehearsal_pair("rehearsal-dino")
    with pytest.raises(TrajOODError, match="unknown rehearsal 'rehearsal-gpt'"):
        rehearsals.rehearsal_language_model("rehearsal-gpt")


def test_texts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "meta": 1}) for t in ("one", "two\nlines")))
    assert read_texts(tmp_path / "a.txt") == ["one", "two"]
    assert read_texts(tmp_path / "a.jsonl") == ["one", "two\nlines"]
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
    assert read_texts(tmp_path / "c.jsonl") == ["a\u2028b\x85c"]
    (tmp_path / "b.jsonl").write_text('{"words": 1}')
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    for name in ("b.jsonl", "nowhere.txt", "latin.txt"):
        with pytest.raises(TrajOODError, match=rf"{name}: expected a text per line, or JSON lines with the key 'text'"):
            read_texts(tmp_path / name)
    with pytest.raises(TrajOODError, match="expected at least one text, found none"):
        read_texts(tmp_path / "empty.txt")


def test_the_documentation_has_texts_enough() -> None:
    texts = dynamics.documentation()
    assert sum(len(text) >= 500 for text in texts) > 300
    assert len(set(texts)) > 0.9 * len(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "dynamics: models: expected different ones"),
        ({"models": ("a", "a")}, "dynamics: models: expected different ones, got a, a"),
        ({"steps": 1}, "dynamics: steps: expected at least 2, got 1"),
        ({"text_samples": 0}, "dynamics: text_samples: expected at least 1, got 0"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrajOODError, match=message):
        Dynamics(**options)


def test_too_few_texts_are_told(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("short\nlong enough for sixteen\n")
    question = Dynamics(models=("rehearsal-llama",), texts="texts.txt", text_samples=2, tokens=16)
    with pytest.raises(TrajOODError, match=r"expected 2 of at least 16 tokens, got 1 from texts\.txt: use fewer"):
        question.run(Workspace(tmp_path / "work", data_root=tmp_path), tmp_path / "out")


def test_the_papers_settings() -> None:
    paper = Dynamics.paper()
    assert (paper.steps, paper.image_samples, paper.text_samples, len(paper.models)) == (300, 500, 1000, 4)
    assert paper.differences() == ()
