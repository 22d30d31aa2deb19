"""The bound of Prop. 3.2 where it fails as stated, and its terms against NumPy on linear decoders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from shorthand import noise, raises
from torch import Tensor

from traj_ood.analysis import Workspace, find_question, options_from, subjects
from traj_ood.analysis.decomposition import (
    Decomposition,
    bounds,
    elsewhere,
    lipschitz,
    nearest,
    sentence_of,
    summary,
    terms,
    terms_figure,
)
from traj_ood.analysis.singular import spectral_norms
from traj_ood.drawing.style import save_figure

# ---------------------------------------------------------------------------------------------- the inequality


def test_the_stated_form_fails_although_its_assumptions_hold() -> None:
    """On a line with D the identity (L_D = 1): x = 0, Π(z) = 1, z = 2. Error 4, prototype 1, coverage 1."""
    x, z, prototype = (torch.full((1, 1), value, dtype=torch.float64) for value in (0.0, 2.0, 1.0))
    found = terms(x, z, prototype, z, prototype)
    assert {k: v.item() for k, v in found.items()} == {"error": 4, "prototype": 1, "distortion": 1, "gap": 1}
    row = summary({**found, "lipschitz": torch.ones(()), "elsewhere": torch.full((1,), 0.5).double()})
    assert row["forms"]["proof step"] == {"holds": 0, "median_ratio": 0.5, "worst_ratio": 0.5}
    assert row["forms"]["stated"] == {"holds": 0, "median_ratio": 0.5, "worst_ratio": 0.5}
    assert row["forms"]["corrected"] == {"holds": 1, "median_ratio": 1, "worst_ratio": 1}  # and is attained
    assert row["forms"]["held out"] == {"holds": 0, "median_ratio": 0.625, "worst_ratio": 0.625}
    assert row["needed"] == pytest.approx(3**0.5)


def lengths(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_exact_reconstructions_have_no_ratio() -> None:
    """Second image: no error at all, and the form holds."""
    parts = {"prototype": lengths(1, 0), "distortion": lengths(1, 0), "gap": lengths(1, 0), "elsewhere": lengths(1, 1)}
    parts["lipschitz"] = torch.ones(()).double()
    row = summary({**parts, "error": lengths(4, 0)})
    assert row["forms"]["proof step"] == {"holds": 0.5, "median_ratio": 0.5, "worst_ratio": 0.5}
    row = summary({**parts, "error": lengths(0, 0)})
    assert row["forms"]["proof step"] == {"holds": 1, "median_ratio": None, "worst_ratio": None}
    told = sentence_of("m", {**row, "attractors": 2})
    assert "worst" not in told
    assert "100.0%" in told


def test_a_constant_that_is_not_finite_is_told_and_drawn(tmp_path: Path) -> None:
    parts = {"error": lengths(4, 1), "prototype": lengths(1, 1), "distortion": lengths(1, 1), "gap": lengths(0, 1)}
    parts |= {"lipschitz": lengths(torch.inf)[0], "elsewhere": lengths(1, torch.inf)}
    row = summary(parts)
    assert (row["lipschitz"], row["coverage"]) == (None, None)
    assert row["needed"] is None  # z lies on the attractor: no L_D makes up for the missing 3
    assert row["forms"]["stated"] == {"holds": None, "median_ratio": None, "worst_ratio": None}
    assert row["forms"]["proof step"]["holds"] == 0.5
    json.dumps(row, allow_nan=False)
    assert "L_D is not finite" in sentence_of("m", {**row, "attractors": 2})
    figure = terms_figure([{**row, "attractors": 2}], parts, "m")
    assert [len(line.get_xdata()) for line in figure.axes[2].get_lines()[:4]] == [2, 0, 0, 0]  # no L_D, no ratio
    save_figure(figure, tmp_path / "a.png")


def test_held_out_constants_are_those_of_the_other_half() -> None:
    distortion, gap = lengths(4, 9, 16, 1), lengths(1, 1, 1, 0)
    norms, places = lengths(1, 5), torch.tensor([0, 3])
    assert elsewhere(distortion, gap, norms, places).tolist() == [5, 4, 5, 4]
    assert elsewhere(distortion, gap, norms[:1], places[:1]).tolist() == [3, 4, 3, 4]
    assert float(lipschitz(distortion, gap, lengths(torch.nan))) == float("inf")


def test_with_the_true_constant_the_corrected_form_holds_for_every_linear_decoder() -> None:
    failing = []
    for seed in range(20):
        decoder, codes, prototypes = noise(6, 3, seed=seed), noise(50, 3, seed=seed + 50), noise(50, 3, seed=seed + 90)
        images = noise(50, 6, seed=seed + 130)
        found = terms(images, codes @ decoder.T, prototypes @ decoder.T, codes, prototypes)
        true = torch.linalg.matrix_norm(decoder, ord=2)
        sides = bounds({**found, "lipschitz": true, "elsewhere": true.expand(50)})
        assert torch.equal(sides["corrected"], sides["held out"])
        assert bool((sides["corrected"] >= found["error"]).all())
        failing.append(float((sides["proof step"] < found["error"]).double().mean()))
    assert 0.05 < sum(failing) / len(failing) < 0.5  # the step of the proof is no inequality


def test_terms_are_numpys() -> None:
    x, own, near = (noise(4, 1, 3, 3, seed=s).numpy() for s in range(3))
    z, p = noise(4, 5, seed=3).numpy(), noise(4, 5, seed=4).numpy()
    found = terms(*(torch.from_numpy(v) for v in (x, own, near, z, p)))
    for key, difference in (("error", x - own), ("prototype", x - near), ("distortion", near - own), ("gap", z - p)):
        np.testing.assert_allclose(found[key].numpy(), (difference.reshape(4, -1) ** 2).sum(axis=1))


def test_the_estimate_reaches_the_constant_of_a_linear_decoder_and_never_passes_it() -> None:
    decoder = noise(8, 3)
    true = float(torch.linalg.matrix_norm(decoder, ord=2))
    a, b = noise(40, 3, seed=1), noise(40, 3, seed=2)
    distortion = ((a - b) @ decoder.T).square().sum(dim=1)
    gap = (a - b).square().sum(dim=1)
    assert float(lipschitz(distortion, gap, torch.zeros(1))) <= true
    norms = spectral_norms(lambda z: z @ decoder.T, a[:3])
    assert float(lipschitz(distortion, gap, norms)) == pytest.approx(true, rel=1e-3)
    assert float(lipschitz(torch.zeros(2), torch.zeros(2), torch.tensor([0.5]))) == 0.5  # codes that are attractors


def test_the_nearest_attractor_is_the_nearest() -> None:
    codes, attractors = noise(30, 2, 3).float(), noise(9, 2, 3, seed=1).float()
    expected = attractors[torch.cdist(codes.flatten(1), attractors.flatten(1)).argmin(dim=1)]
    assert torch.equal(nearest(codes, attractors), expected)


# ---------------------------------------------------------------------------------------------- the question


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    tiny.conv().save_pretrained(tmp_path / "model")
    data = tiny.write_benchmark(tmp_path / "data")
    return [f"model={tmp_path / 'model'}", f"data={data}", "attractors=10", "sizes=2,400", "images=6", "points=2"]


def test_the_question_is_answered_drawn_and_resumed(tmp_path: Path, pairs: list[str]) -> None:
    question = options_from(find_question("decomposition"), pairs)
    finding = question.run(Workspace(tmp_path / "work"), tmp_path / "out")
    rows = finding.figures["rows"]
    assert [row["attractors"] for row in rows] == [2, 10]  # a dictionary is no larger than what settled
    assert rows[0]["gap"] >= rows[1]["gap"]
    assert rows[0]["error"] == rows[1]["error"]
    assert all(row["forms"]["corrected"]["worst_ratio"] >= 1 for row in rows)
    assert (tmp_path / "out" / "decomposition.png").read_bytes().startswith(b"\x89PNG")
    work = Workspace(tmp_path / "work")
    assert question.run(work, tmp_path / "again").figures == finding.figures
    assert work.resumed > 0


@pytest.mark.slow
def test_chunks_change_no_number(tmp_path: Path, pairs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.write_benchmark(tmp_path / "data")
    tiny.conv().save_pretrained(tmp_path / "model")
    question = Decomposition(
        model=str(tmp_path / "model"), data=str(data), attractors=11, sizes=(2,), images=6, points=2
    )
    figures = []
    for size in (1000, 1):  # the model's own chunk of rows is the least
        monkeypatch.setattr(subjects, "_UNIT_IMAGES", size)
        work = Workspace(tmp_path / f"work-{size}")
        figures.append(question.run(work, tmp_path / "out").figures)
    assert figures[0] == figures[1]


def test_only_what_settled_is_counted(tmp_path: Path, pairs: list[str]) -> None:
    question = options_from(find_question("decomposition"), [*pairs, "tol=1e-9", "max_steps=9"])
    figures = question.run(Workspace(tmp_path / "work"), tmp_path / "out").figures
    assert figures["distinct"] <= round(10 * figures["converged"])


def test_a_folder_has_no_test_images(tmp_path: Path, pairs: list[str]) -> None:
    tiny.write_images(tmp_path / "photos", 12, seed=1)
    question = options_from(find_question("decomposition"), [*pairs, f"data={tmp_path / 'photos'}"])
    with raises("decomposition: data: expected an image set or a benchmark"):
        question.run(Workspace(tmp_path / "work"), tmp_path / "out")


def test_differences_claim_nothing_of_the_paper() -> None:
    told = Decomposition().differences()
    assert "train_images: 10000 here, all with --paper (the paper does not state it)" in told
    assert not any(line.endswith("in the paper") for line in told)
    assert {"seed", *Decomposition.unstated} == set(Decomposition().options())


def test_what_cannot_be_measured_is_told_in_one_line(tmp_path: Path, pairs: list[str]) -> None:
    restless = tiny.conv()
    for parameter in restless.module.parameters():
        parameter.mul_(3)
    restless.save_pretrained(tmp_path / "restless")
    changes = [f"model={tmp_path / 'restless'}", "tol=1e-30", "max_steps=2"]
    unsettled = options_from(find_question("decomposition"), [*pairs, *changes])
    with raises("decomposition: expected trajectories that converge, got 0 of 10"):
        unsettled.run(Workspace(tmp_path / "work"), tmp_path / "out")
    with raises("decomposition: expected 1 to 10 images"):
        options_from(find_question("decomposition"), [*pairs, "images=50"]).run(
            Workspace(tmp_path / "w"), tmp_path / "o"
        )
    with raises("decomposition: sizes: expected numbers of at least 1, got 0"):
        Decomposition(sizes=(0,))
    assert not (tmp_path / "out").exists()
