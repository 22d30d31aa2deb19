"""Questions, their options and records, and the folder of finished units."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from shorthand import raises
from tiny_digits import write_digits

from traj_ood.analysis import (
    QUESTIONS,
    Answer,
    Finding,
    Question,
    Unit,
    Workspace,
    base,
    find_question,
    options_from,
    redraw,
)
from traj_ood.analysis.images import load_images, sample, spread
from traj_ood.cli import main
from traj_ood.drawing.charts import Curve, DotPanel, Panel, PictureRow, curves, dots, picture_rows
from traj_ood.drawing.style import Figure, save_figure
from traj_ood.io.options import write_option


@dataclass(frozen=True)
class Toy(Question):
    name: ClassVar[str] = "toy"
    figure: ClassVar[str] = "Fig. 0"
    summary: ClassVar[str] = "nothing"
    choices: ClassVar[tuple[str, ...]] = ("Everything is ours.",)
    unstated: ClassVar[tuple[str, ...]] = ("scale",)

    size: int = 3
    scale: float = 0.5
    words: tuple[str, ...] = ("a",)
    counts: tuple[int, ...] = (1, 2)
    flag: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        self.expect(self.size >= 1, "size", "at least 1")

    @classmethod
    def paper(cls) -> Toy:
        return cls(size=500, scale=2.0)

    def answer(self, work: Workspace) -> Answer:
        unit = work.unit("sum", {"size": self.size}, lambda: Unit({"x": torch.ones(self.size)}, {"sum": self.size}))
        pictures = {"toy.png": lambda: Figure(figsize=(1, 1))}
        return Answer({"sum": unit.notes["sum"]}, f"The sum is {unit.notes['sum']}.", pictures, ("ran twice",))


# ---------------------------------------------------------------------------------------------- options and records


def test_options_are_parsed_by_the_kind_of_their_field() -> None:
    asked = options_from(Toy, ["size=7", "scale=1e-3", "words=x, y", "counts=4", "flag=true", "limit=9", "seed=2"])
    assert asked == Toy(2, 7, 1e-3, ("x", "y"), (4,), True, 9)
    assert options_from(Toy, ["limit=none"]).limit is None  # type: ignore[attr-defined]
    assert options_from(Toy, ["size=7"], paper=True) == Toy(size=7, scale=2.0)


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_options_of_every_question_are_read_as_they_are_shown(name: str) -> None:
    for question in (find_question(name)(), find_question(name).paper()):
        shown = [f"{key}={write_option(value, ',')}" for key, value in question.options().items()]
        assert options_from(type(question), shown) == question


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        ("size", "toy: expected options as key=value, got 'size'"),
        ("sise=3", "unknown option of toy 'sise': did you mean"),
        ("size=many", "toy, option size: expected int, got 'many'"),
        ("scale=inf", "toy, option scale: expected float, got 'inf'"),
        ("scale=nan", "toy, option scale: expected float, got 'nan'"),
        ("flag=yes", "toy, option flag: expected true or false, got 'yes'"),
        ("counts=1,x", "toy, option counts: expected int, got 'x'"),
        ("size=0", "toy: size: expected at least 1, got 0"),
    ],
)
def test_bad_options_say_what_was_expected(pair: str, text: str) -> None:
    with raises(text):
        options_from(Toy, [pair])


def test_differences_name_every_option_that_is_not_the_papers() -> None:
    assert Toy(seed=5).differences() == (
        "size: 3 here, 500 in the paper",
        "scale: 0.5 here, 2.0 with --paper (the paper does not state it)",
    )
    assert Toy.paper().differences() == ()


def test_a_run_records_everything_and_loads_again(tmp_path: Path) -> None:
    finding = Toy(seed=4).run(Workspace(tmp_path / "units"), tmp_path, command="traj-ood analyze toy")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    tree = json.loads((tmp_path / "finding.json").read_text())
    assert tree["schema"] == base.SCHEMA
    assert tree["figures"] == {"sum": 3}
    assert tree["sentence"] == "The sum is 3."
    assert tree["differences"][-1] == "ran twice"
    assert len(tree["differences"]) == 3
    assert (tree["seed"], tree["command"], tree["paper"]) == (4, "traj-ood analyze toy", "Fig. 0")
    assert tree["options"]["counts"] == [1, 2]
    assert {"torch", "python"} <= set(tree["versions"])
    assert Finding.load(tmp_path) == Finding.load(tmp_path / "finding.json")
    assert Finding.load(tmp_path).differences == finding.differences


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object()])
def test_figures_that_are_no_numbers_are_refused_and_nothing_is_written(tmp_path: Path, bad: object) -> None:
    class Bad(Toy):
        def answer(self, work: Workspace) -> Answer:
            return Answer({"x": bad}, "", {"toy.png": Figure})

    with raises("toy: expected finite plain figures"):
        Bad().run(Workspace(tmp_path / "units"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_hours_of_work(tmp_path: Path) -> None:
    class Hours(Toy):
        def answer(self, work: Workspace) -> Answer:
            work.unit("hours", {}, lambda: pytest.fail("computed"))
            return pytest.fail("computed")

    (tmp_path / "file").write_text("")
    with raises("file/out: expected a folder that can be written (for finding.json), got: Not a directory"):
        Hours().run(Workspace(tmp_path / "units"), tmp_path / "file" / "out")
    with raises("expected a folder that can be written"):
        Hours().run(Workspace(tmp_path / "file" / "units"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_records_that_are_none_are_refused(tmp_path: Path) -> None:
    with raises("finding.json: expected a finding, got No such file"):
        Finding.load(tmp_path / "finding.json")
    (tmp_path / "finding.json").write_text("{")
    with raises("finding.json: expected JSON"):
        Finding.load(tmp_path)
    (tmp_path / "finding.json").write_text('{"schema": "other/1"}')
    with raises("expected a finding of schema traj_ood.finding/1, got schema other/1"):
        Finding.load(tmp_path)


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_is_found_by_its_name_and_describes_itself(name: str) -> None:
    found = find_question(name)
    assert found.name == name
    assert found.summary
    assert found.figure
    assert isinstance(found(), found)
    assert found.paper().differences() == ()
    json.dumps(found().options(), allow_nan=False)


def test_unknown_and_taken_names() -> None:
    with raises("unknown question 'memorisation': did you mean 'memorization'"):
        find_question("memorisation")
    taken = type("Other", (Toy,), {"name": "memorization"})
    with raises("question 'memorization' is taken by traj_ood.analysis.memorization.Memorization"):
        base.register(taken)


# ---------------------------------------------------------------------------------------------- units of work


def test_a_finished_unit_is_not_computed_again(tmp_path: Path) -> None:
    calls = []

    def compute() -> Unit:
        calls.append(1)
        return Unit({"x": torch.arange(3.0)[::2]}, {"list": [1, None]})

    first = Workspace(tmp_path).unit("part", {"k": 2}, compute)
    work = Workspace(tmp_path)
    again = work.unit("part", {"k": 2}, compute)
    assert len(calls) == 1
    assert torch.equal(first.tensors["x"], again.tensors["x"])
    assert again.notes == {"list": [1, None]}
    assert work.resumed >= 0
    work.unit("part", {"k": 3}, compute)
    work.unit("other", {"k": 2}, compute)
    assert len(calls) == 3


def test_what_interrupts_a_unit_leaves_the_finished_ones_and_no_other(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    work.unit("part", {"k": 1}, lambda: Unit(notes={"value": 1}))

    def interrupted() -> Unit:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.unit("part", {"k": 2}, interrupted)
    assert len(list(tmp_path.iterdir())) == 1
    assert Workspace(tmp_path).unit("part", {"k": 1}, interrupted).notes == {"value": 1}


def test_discarding_units_leaves_everything_else(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    work.discard()  # of nothing
    work.unit("part", {"k": 1}, Unit)
    (work.scratch("part", {"k": 2})).mkdir()
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "model.safetensors").touch()
    work.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "thesis", "thesis.txt"]


def test_units_of_other_code_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def compute() -> Unit:
        made.append(len(made))
        return Unit(notes={"value": made[-1]})

    for code in ("a", "a", "b", "b"):
        monkeypatch.setattr("traj_ood.io.parts.code_digest", lambda code=code: code)
        work = Workspace(tmp_path)
        assert work.unit("part", {"k": 1}, compute).notes == {"value": "ab".index(code)}
    assert made == [0, 1]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_seed_that_no_generator_takes_is_refused(tmp_path: Path) -> None:
    for seed in (-1, 2**31):
        with raises(f"toy: seed: expected 0 to 2147483647, got {seed}"):
            Toy(seed=seed).run(Workspace(tmp_path / "units"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_drawn_is_recorded_first(tmp_path: Path) -> None:
    class Undrawn(Toy):
        def answer(self, work: Workspace) -> Answer:
            return Answer({"x": 1}, "", {"toy.png": lambda: [][0]})

    with pytest.raises(IndexError):
        Undrawn().run(Workspace(tmp_path / "units"), tmp_path)
    assert Finding.load(tmp_path).figures == {"x": 1}


def test_damaged_units_and_unfit_keys_are_named(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    work.unit("part", {}, Unit)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    with raises(f"{path}: not a readable unit of work"):
        work.unit("part", {}, Unit)
    with raises("unit name 'a/b': expected letters"):
        work.unit("a/b", {}, Unit)
    with raises("unit part: expected plain data that JSON can hold"):
        work.unit("part", {"x": float("nan")}, Unit)
    with raises("unit part: expected plain data"):
        work.unit("part", {"x": 2}, lambda: Unit(notes={"x": object()}))


# ---------------------------------------------------------------------------------------------- images


def test_mnist_is_read_from_a_folder_and_not_mistaken_for_fashion(tmp_path: Path) -> None:
    data = load_images("mnist", write_digits(tmp_path / "a"))
    assert (data.name, data.shape, len(data.train), len(data.test)) == ("mnist", (1, 28, 28), 40, 20)
    write_digits(tmp_path / "b" / "MNIST" / "raw")
    assert load_images("mnist", tmp_path / "b").train.digest() == data.train.digest()
    with raises("expected MNIST's digits, got images of which"):
        load_images("mnist", write_digits(tmp_path / "c", bright=0.5))
    with raises("MNIST: expected train-images-idx3-ubyte[.gz]"):
        load_images("mnist", tmp_path)
    with raises("expected Fashion-MNIST's clothes, got images of which 20% is not black, as in MNIST"):
        load_images("fashion-mnist", tmp_path / "a")


def test_one_root_serves_sets_of_the_same_file_names(tmp_path: Path) -> None:
    write_digits(tmp_path / "mnist")
    write_digits(tmp_path / "fashion-mnist", bright=0.5)
    digits, clothes = load_images("mnist", tmp_path), load_images("fashion-mnist", tmp_path)
    assert digits.train.digest() != clothes.train.digest()
    assert digits.train.digest() == load_images("mnist", tmp_path / "mnist").train.digest()


def test_cifar10_folders_are_checked(tmp_path: Path) -> None:
    with raises(f"{tmp_path / 'cifar10/train/airplane'}: expected a folder of 5,000 CIFAR-10 images"):
        load_images("cifar10", tmp_path)
    with raises("unknown image set 'cifar': did you mean 'cifar10'?"):
        load_images("cifar", tmp_path)


def test_samples_grow_with_their_size_and_refuse_more_than_there_is(tmp_path: Path) -> None:
    images = load_images("mnist", write_digits(tmp_path)).train
    small, large = sample(images, 5, 1, "train"), sample(images, 9, 1, "train")
    assert set(small.ids) < set(large.ids)
    assert sample(images, 0, 1, "train") is images
    with raises("train: expected 1 to 40 images, got 41; ask for fewer"):
        sample(images, 41, 1, "train")


def test_places_at_even_distances() -> None:
    assert spread(10, 1) == (0,)
    assert spread(10, 2) == (0, 9)
    assert spread(5, 5) == (0, 1, 2, 3, 4)
    places = torch.tensor(spread(4000, 2100))  # more than half of them: a stride would take the first 2,100
    assert len(set(places.tolist())) == 2100
    assert set(places.diff().tolist()) == {1, 2}


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_answers_and_continues(tmp_path: Path) -> None:
    digits = write_digits(tmp_path / "digits")
    command = ["analyze", "memorization", "--quiet", "--data-root", str(digits), "--out", str(tmp_path / "out")]
    for option in ("data=mnist", "images=16", "epochs=1", "batch=8", "width=1", "starts=4", "test=6", "max_steps=3"):
        command += ["--option", option]
    command += ["--option", "bottlenecks=2,3"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "From k = 2 to 3 the memorisation coefficient goes" in done.output
    assert "differs: epochs: 1 here, 500 in the paper" in done.output
    finding = Finding.load(tmp_path / "out")
    assert [row["bottleneck"] for row in finding.figures["rows"]] == [2, 3]
    assert all((tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in finding.pictures)
    units = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "units").iterdir()}
    assert CliRunner().invoke(main, command).exit_code == 0
    assert units == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "units").iterdir()}
    assert Finding.load(tmp_path / "out").figures == finding.figures


def test_the_command_shows_options_and_refuses_bad_ones() -> None:
    shown = CliRunner().invoke(main, ["analyze", "memorization", "--show", "--option", "epochs=3"])
    assert re.search(r"epochs +3 +\(paper: 500\)", shown.output)
    bad = CliRunner().invoke(main, ["analyze", "memorizations"])
    assert bad.exit_code == 2
    assert "unknown question 'memorizations': did you mean 'memorization'" in bad.output
    bad = CliRunner().invoke(main, ["analyze", "memorization", "--option", "starts=0"])
    assert "memorization: starts: expected at least 1, got 0" in bad.output


# ---------------------------------------------------------------------------------------------- the figures' scripts


def test_a_script_records_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "figures"))
    import record  # type: ignore[import-not-found]

    monkeypatch.setattr(record, "find_question", lambda name: Toy)
    arguments = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--seed", "3", "-o", "size=4"]
    arguments += ["-o", "scale=9"]
    monkeypatch.setattr("sys.argv", ["benchmarks/figures/toy.py", *arguments])
    record.record("toy")
    assert capsys.readouterr().out == "The sum is 4.\n"
    finding = Finding.load(tmp_path / "out")
    assert finding.command.startswith("python benchmarks/figures/toy.py --out ")
    assert (finding.seed, finding.options["size"], finding.options["scale"]) == (3, 4, 9.0)
    monkeypatch.setattr("sys.argv", ["toy.py", "-o", "size=0"])
    with pytest.raises(SystemExit, match="error: toy: size: expected at least 1, got 0"):
        record.record("toy")


def test_every_question_has_a_script() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "figures"
    for name in QUESTIONS:
        assert f'record("{name}"' in (folder / f"{name}.py").read_text()


# ---------------------------------------------------------------------------------------------- pictures


def test_pictures_refuse_what_cannot_be_drawn() -> None:
    with raises("plot: expected panels of at most 6 curves, got [7]"):
        curves([Panel("", "", "", [Curve("", [1], [1])] * 7)], "")
    with raises("plot: expected rows of images (K, C, H, W), got shapes [(2, 3)]"):
        picture_rows([PictureRow("", torch.ones(2, 3).numpy(), [[0.0], [1.0]])], "")
    with raises("plot: expected values for each of 2 names in every series, got [1]"):
        dots(["a", "b"], [DotPanel("", {"x": [[1.0]]})], 1, "")


def test_what_was_not_measured_is_a_gap(tmp_path: Path) -> None:
    line = curves([Panel("", "", "", [Curve("", [1, 2], [None, 1.0], [None, 0.1])], "2")], "title")
    assert line.axes[0].get_lines()[0].get_ydata() == pytest.approx([np.nan, 1], nan_ok=True)
    rows = dots(["a", "b"], [DotPanel("", {"x": [[1.0, 2.0], [None]], "y": [[3.0], [0.0]]}, least=0.5)], 1, "title")
    assert [list(drawn.get_xdata()) for drawn in rows.axes[0].get_lines()] == [[1, 2], [3, 0.5]]
    for figure in (line, rows):
        save_figure(figure, tmp_path / "a.png")


def test_a_curve_without_a_finite_value_is_drawn(tmp_path: Path) -> None:
    lines = [Curve("none", range(5), [None] * 5), Curve("zero", range(5), [0.0] * 5)]
    panels = [Panel("", "", "", lines, limits=(0, None)), Panel("", "", "", lines, log_y=True)]
    panels.append(Panel("", "", "", lines, diagonal=True))
    save_figure(curves(panels, "title"), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------- drawn again

RECORDED = Path(__file__).parents[2] / "results" / "figures"


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in RECORDED.glob("*/finding.json")))
def test_recorded_figures_suffice_for_what_a_question_draws_of_them(folder: str) -> None:
    found = Finding.load(RECORDED / folder)
    asked = options_from(
        find_question(found.question), [f"{k}={write_option(v, ',')}" for k, v in found.options.items()]
    )
    for file, draw in asked.drawn(found.figures).items():
        assert file in found.pictures
        assert draw().axes


def test_redraw_writes_the_pictures_and_nothing_else(tmp_path: Path) -> None:
    record = (RECORDED / "memorization" / "finding.json").read_bytes()
    (tmp_path / "finding.json").write_bytes(record)
    assert redraw(tmp_path) == [tmp_path / "memorization.png"]
    assert (tmp_path / "memorization.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"finding.json", "memorization.png"}
    assert (tmp_path / "finding.json").read_bytes() == record
    with raises("expected a finding"):
        redraw(tmp_path / "none")


def test_legends_of_panels_stand_below_their_curves() -> None:
    lines = [Curve("one", [1, 2], [0, 1]), Curve("another one", [1, 2], [1, 0])]
    figure = curves([Panel("a", "x", "y", lines), Panel("b", "x", "y", [*lines[:1], Curve("third", [1], [1])])], "t")
    figure.draw_without_rendering()
    for axis in figure.axes:
        legend = axis.get_legend()
        assert legend is not None
        assert legend.get_window_extent().y1 < axis.get_window_extent().y0
