"""Comparing scorers and runs: the verdict, corrected tests, the command and the formats of tables."""

from __future__ import annotations

import html.parser
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from click.testing import CliRunner, Result

from traj_ood.cli import main
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.compare import PairedScores, paired_bootstrap
from traj_ood.evaluation.leaderboard import leaderboard
from traj_ood.evaluation.leaderboard_text import Choice, csv_text, render
from traj_ood.evaluation.metrics import compute_metrics
from traj_ood.evaluation.results import Result as RunResult
from traj_ood.evaluation.runs import Run
from traj_ood.evaluation.text_tables import Bold, TextTable, latex
from traj_ood.evaluation.versus import compare_runs, compare_scorers, holm


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one benchmark, whose scores are then replaced by known ones: good > poor on both OOD sets."""
    folder = tmp_path_factory.mktemp("runs")
    yaml = tiny.write_benchmark(folder, test=40, ood=40)
    tiny.conv().save_pretrained(folder / "conv")
    done = call(
        *("bench", yaml, "--model", folder / "conv", "--out", folder / "out", "--scorers", "knn:k=2,mahalanobis"),
        *("--bootstrap", "0", "--no-plots", "--no-pictures", "-q", "--device", "cpu", "--on-duplicates", "warn"),
    )
    assert done.exit_code == 0, done.output
    (first,) = (folder / "out").iterdir()
    draw = np.random.default_rng(0)
    table = pd.read_parquet(first / "scores.parquet")
    ood = (table["role"] != "test").to_numpy()
    table["knn:k=2"] = draw.normal(size=len(table)) + 2.0 * ood
    table["mahalanobis"] = draw.normal(size=len(table)) + 0.3 * ood
    table.to_parquet(first / "scores.parquet")
    result = with_figures_of(table, RunResult.load(first / "result.json"))
    result.save(first / "result.json")
    shutil.copytree(first, first.parent / "second")
    data = {**result.data, "train": {**result.data["train"], "sha256": "f" * 64}}
    replace(result, seed=1, data=data).save(first.parent / "second" / "result.json")
    return folder / "out"


def with_figures_of(table: pd.DataFrame, result: RunResult) -> RunResult:
    scores = {str(name): own for name, own in table.groupby("split")}
    scorers = {}
    for label, scorer in result.scorers.items():
        sets = {
            name: replace(own, metrics=compute_metrics(scores["test"][label], scores[name][label]))
            for name, own in scorer.sets.items()
        }
        scorers[label] = replace(scorer, sets=sets)
    return replace(result, scorers=scorers)


def test_holm_is_that_of_the_definition() -> None:
    p = [0.01, 0.04, 0.03, 0.005, 0.9]
    order = np.argsort(p)
    expected = np.zeros(5)
    for rank, index in enumerate(order):
        expected[index] = max(min(1.0, (5 - j) * p[order[j]]) for j in range(rank + 1))
    assert holm(p) == pytest.approx(expected.tolist())
    assert holm([]) == []
    assert max(holm([0.9, 0.8])) == 1.0


def test_a_better_scorer_is_called_better_in_words_and_exit_code(runs: Path, tmp_path: Path) -> None:
    loaded = Run.load_all(runs)[:1]
    found = compare_scorers(loaded, "knn:k=2", "mahalanobis", resamples=400)
    assert loaded[0].scores is not None
    paired = PairedScores.from_tables([loaded[0].scores], "knn:k=2", "mahalanobis")
    direct = paired_bootstrap([paired], resamples=400)
    assert found.mean["auroc"] == direct.mean.auroc
    assert [row.difference for row in found.sets["fpr95"]] == [
        direct.sets[0][row.name].fpr95 for row in found.sets["fpr95"]
    ]
    assert found.outcome() == found.outcome("fpr95") == 1
    place = next(path for path in runs.iterdir() if path.name != "second")
    better = call("compare", place, "--scorers", "knn:k=2,mahalanobis", "--resamples", 400, "--json", tmp_path / "c")
    assert better.exit_code == 0, better.output
    assert better.stdout.startswith("knn:k=2 is better than mahalanobis in the mean AUROC over 2 OOD sets: +")
    assert json.loads((tmp_path / "c").read_text())["verdict"]["auroc"] == found.verdict()
    worse = call("compare", place, "--scorers", "mahalanobis,knn:k=2", "--resamples", 400, "--metric", "fpr95")
    assert worse.exit_code == 3
    assert "knn:k=2 is better than mahalanobis in the mean FPR95" in worse.stdout
    table = call("compare", place, "--scorers", "knn:k=2,mahalanobis", "--resamples", 400, "--format", "csv")
    read = pd.read_csv(io.StringIO(table.stdout))
    assert read["difference"][2] == pytest.approx(direct.mean.auroc.difference)
    assert (read["p_holm"].dropna() >= read["p"][read["p_holm"].notna()]).all()


def test_one_scorer_in_two_runs(runs: Path) -> None:
    one, two = Run.load_all(runs)
    same = compare_runs(one, two, "knn:k=2", resamples=50)
    assert same.outcome() == 0
    assert same.mean["auroc"].difference == 0
    assert same.verdict().startswith("No difference between knn:k=2 (")
    code = call("compare", *sorted(runs.iterdir()), "--scorers", "knn:k=2", "--resamples", 50).exit_code
    assert code == 1


def test_the_name_of_a_scorer_stands_for_its_only_label(runs: Path) -> None:
    one, two = Run.load_all(runs)
    labels = ("knn:k=2", "mahalanobis")
    assert compare_scorers([one], "knn", "mahalanobis", resamples=50) == compare_scorers([one], *labels, resamples=50)
    assert compare_runs(one, two, "knn", resamples=50) == compare_runs(one, two, "knn:k=2", resamples=50)
    with pytest.raises(TrajOODError, match="expected two scorers, got 'knn:k=2' twice"):
        compare_scorers([one], "knn", "knn:k=2")
    more = {**two.result.scorers, "knn:k=3": two.result.scorers["knn:k=2"]}
    other = replace(two, result=replace(two.result, scorers=more))
    several = r"scorer 'knn': expected one label of it in the runs, got knn:k=2, knn:k=3: give one"
    with pytest.raises(TrajOODError, match=several):
        compare_scorers([one, other], "knn", "mahalanobis")
    with pytest.raises(TrajOODError, match=several):
        compare_runs(one, other, "knn")
    with pytest.raises(TrajOODError, match=r"unknown scorer of .* 'knn:k': did you mean 'knn:k=2'"):
        compare_scorers([one], "knn:k", "mahalanobis")


def test_sets_are_named_with_their_benchmark_where_there_are_several(runs: Path) -> None:
    one, two = Run.load_all(runs)
    other = replace(two, result=replace(two.result, benchmark="other"))
    names = [row.name for row in compare_scorers([one], "knn:k=2", "mahalanobis", resamples=50).sets["auroc"]]
    found = compare_scorers([one, other], "knn:k=2", "mahalanobis", resamples=200)
    places = [f"{benchmark}: {name}" for benchmark in (one.result.benchmark, "other") for name in names]
    assert f"knn:k=2 is better on 4 ({', '.join(places)})" in found.verdict()
    assert [row[0].partition(" (")[0] for row in found.tables()[0].rows] == [*places, "mean over sets"]


def test_a_mean_over_several_models_names_them(runs: Path) -> None:
    one, two = Run.load_all(runs)
    name = one.result.model["name"]
    other = replace(two, result=replace(two.result, model={**two.result.model, "name": "other"}))
    same, pooled = (compare_scorers([one, run], "knn:k=2", "mahalanobis", resamples=50) for run in (two, other))
    assert same.notes()[0].startswith(f"Means over 2 runs of {one.result.benchmark}. Differences")
    assert pooled.notes()[0].startswith(f"Means over 2 runs of {one.result.benchmark} (2 models: {name}, other). ")
    assert compare_runs(one, other, "knn:k=2", resamples=50).notes()[0].startswith("Means over 1 run of ")
    twin = replace(two, result=replace(two.result, model={**two.result.model, "fingerprint": "0123456789ab"}))
    marks = sorted([one.result.model["fingerprint"][:8], "01234567"])
    words = f" (2 models: {name} {marks[0]}, {name} {marks[1]}). "
    assert words in compare_scorers([one, twin], "knn:k=2", "mahalanobis", resamples=50).notes()[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scorers", "knn:k=2,knn:k=2"], "expected two scorers, got 'knn:k=2' twice"),
        (["--scorers", "knn:k=2,mahalanobiss"], "did you mean 'mahalanobis'"),
        (["--scorers", "a,b,c"], "expected two labels, or one and two runs, got 3 label(s)"),
    ],
)
def test_what_cannot_be_compared(runs: Path, arguments: list[str], words: str) -> None:
    result = call("compare", runs, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_runs_on_other_images_are_not_compared(runs: Path) -> None:
    one, two = Run.load_all(runs)
    assert two.scores is not None
    two.scores.loc[0, "id"] = "another.png"
    with pytest.raises(TrajOODError, match="2 of 121 images are in one of"):
        compare_runs(one, two, "knn:k=2")
    with pytest.raises(TrajOODError, match=r"the images of .* are not those of run 0"):
        compare_scorers([one, two], "knn:k=2", "mahalanobis")


def test_other_images_of_the_same_names_are_told(runs: Path) -> None:
    one, two = Run.load_all(runs)
    assert not any("under the same names" in line for line in compare_runs(one, two, "knn:k=2", resamples=50).cautions)
    data = {**two.result.data, "bright": {**two.result.data["bright"], "contents": "0" * 64}}
    other = replace(two, result=replace(two.result, data=data))
    for found in (
        compare_runs(one, other, "knn:k=2", resamples=50),
        compare_scorers([one, other], "knn:k=2", "mahalanobis", resamples=50),
    ):
        assert found.notes()[1].startswith("⚠ Images or labels of `bright` differ between runs under the same names:")
    del data["bright"]["contents"]  # as in an older record
    assert not any("under the same names" in line for line in compare_runs(one, other, "knn:k=2").cautions)


def test_runs_with_other_roles_of_a_set_are_not_compared(runs: Path) -> None:
    one, two = Run.load_all(runs)
    scorers = {
        label: replace(scorer, sets={**scorer.sets, "bright": replace(scorer.sets["bright"], role="diagnostic")})
        for label, scorer in two.result.scorers.items()
    }
    other = replace(two, result=replace(two.result, scorers=scorers))
    with pytest.raises(TrajOODError, match=r"compare: bright is far in .* and diagnostic in .*, so their means are"):
        compare_runs(one, other, "knn:k=2")


def test_a_run_that_is_given_twice_does_not_count_twice(runs: Path, tmp_path: Path) -> None:
    first = next(path for path in runs.iterdir() if path.name != "second")
    shutil.copytree(first, tmp_path / "copied")
    labels = ["--scorers", "knn:k=2,mahalanobis", "--resamples", 50]
    for one, other in ((first, tmp_path / "copied"), (first, first)):
        twice = call("compare", one, other, *labels)
        assert twice.exit_code == 2
        assert f"compare: {one} and {other} hold one run, which would count twice in every mean" in twice.stderr
    one = call("compare", first, tmp_path / "copied", "--scorers", "knn:k=2", "--resamples", 50)
    assert one.exit_code == 1
    assert one.stdout.startswith("No difference between")
    shutil.copytree(runs, tmp_path / "copied" / "deeper")
    result = RunResult.load(first / "result.json")
    again = replace(result, created="2027-01-01T00:00:00+00:00", seconds={})  # computed once more
    again.save(tmp_path / "copied" / "result.json")
    places = [str(tmp_path / "copied"), str(tmp_path / "copied" / "deeper" / first.name)]
    for command in (["compare", *labels], ["leaderboard"], ["report"]):
        refused = call(*command, tmp_path / "copied")
        assert refused.exit_code == 2
        assert all(f"{place} " in refused.stderr for place in places)
        assert "hold one run, which would count twice in every mean: remove one of them" in refused.stderr


def test_scores_that_are_not_of_their_result_are_refused(runs: Path, tmp_path: Path) -> None:
    first = next(path for path in runs.iterdir() if path.name != "second")
    table, result = pd.read_parquet(first / "scores.parquet"), RunResult.load(first / "result.json")

    def refused(scores: pd.DataFrame, words: str, changed: RunResult = result) -> None:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        changed.save(folder / "result.json")
        scores.to_parquet(folder / "scores.parquet")
        for arguments in (["compare", folder, "--scorers", "knn:k=2,mahalanobis"], ["report", folder]):
            answer = call(*arguments)
            assert answer.exit_code == 2
            assert f"{folder / 'scores.parquet'}: {words}" in answer.stderr
            assert "one of the two files is of another run or was edited; copy both again, or run" in answer.stderr

    other, far = table.copy(), table["split"] == "bright"
    highest = table.loc[table["split"] == "test", "knn:k=2"].max()
    beaten = table.index[far & (table["knn:k=2"] < highest)][0]
    other.loc[beaten, "knn:k=2"] = highest + 1  # one image of 40
    refused(other, "its scores of knn:k=2 give an AUROC of ")
    refused(table[~far], "its images of bright are not those of result.json")
    refused(table.drop(index=table.index[far][0]), "its images of bright are not those of result.json")
    refused(table.assign(role=table["role"].replace("near", "diagnostic")), "its images of dim are not those of")
    refused(table.assign(split=table["split"].replace("dim", "dark")), "its images of dark, dim are not those of")
    refused(table[table["role"] != "test"], "its images of test are not those of result.json")
    scorer = result.scorers["mahalanobis"]
    sets = {n: replace(s, metrics=replace(s.metrics, auroc=s.metrics.auroc - 1e-8)) for n, s in scorer.sets.items()}
    edited = replace(result, scorers={**result.scorers, "mahalanobis": replace(scorer, sets=sets)})
    refused(table, "its scores of mahalanobis give an AUROC of ", edited)
    rounded = {n: replace(s, metrics=replace(s.metrics, auroc=s.metrics.auroc + 1e-12)) for n, s in scorer.sets.items()}
    replace(result, scorers={**result.scorers, "mahalanobis": replace(scorer, sets=rounded)}).save(
        tmp_path / "run" / "result.json"
    )
    assert Run.load_all(tmp_path)[0].scores is not None


def test_what_figures_do_not_show_is_said_beside_them(runs: Path, tmp_path: Path) -> None:
    first = next(path for path in runs.iterdir() if path.name != "second")
    result = RunResult.load(first / "result.json")
    labels = ["--scorers", "knn:k=2,mahalanobis", "--resamples", 50]
    said = [
        call("leaderboard", runs).stdout,
        call("compare", runs, *labels).stdout,
        call("compare", runs, *labels, "--format", "csv").stderr,
    ]
    assert not any("⚠" in text for text in said)
    data = {**result.data, "bright": {**result.data["bright"], "copies": {"dim": 21}}}
    for seed in (0, 1):  # of all training images
        shutil.copytree(first, tmp_path / str(seed))
        replace(result, seed=seed, data=data).save(tmp_path / str(seed) / "result.json")
    said = [
        call("leaderboard", tmp_path).stdout,
        call("compare", tmp_path, *labels).stdout,
        call("compare", tmp_path, *labels, "--format", "csv").stderr,
        call("compare", tmp_path / "0", tmp_path / "1", "--scorers", "knn:k=2", "--resamples", 50).stdout,
        call("leaderboard", tmp_path, "--format", "csv").stderr,
        call("leaderboard", tmp_path, "--format", "openood").stderr,
    ]
    for text in said:
        assert text.count("⚠ 21 of 40 images of `bright` are copies of images of `dim`.") == 1, text
        assert text.count("⚠ Seeds 0, 1 of `conv` drew the same training images: their runs are one measurement") == 1
    assert call("report", tmp_path).exit_code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<p>⚠ 21 of 40 images of bright are copies of images of dim.</p>") == 1
    assert page.count("<p>⚠ Seeds 0, 1 of conv drew the same training images: ") == 1


# ---------------------------------------------------------------------------------------------- formats


def test_the_leaderboard_in_every_format(runs: Path) -> None:
    results = [RunResult.load(next(p for p in runs.iterdir() if p.name != "second") / "result.json")]
    table = leaderboard(results)
    choice = Choice(("all_auroc",), sort="all_fpr95", top=1, tables=("means",))
    best = table.sort_values("all_fpr95").iloc[0]
    text = render(results, "latex", choice)
    assert text.count("\\toprule") == text.count("\\begin{tabular}{lrrrr}") == 1
    assert f"{latex(best['label'])} & \\textbf{{{100 * best['all_auroc']:.1f}}} & 0.0 & " in text
    assert render(results, "markdown", choice).count("\n| ") == 3
    read = pd.read_csv(io.StringIO(csv_text(results, Choice(("near_auroc",), sort="label"))))
    assert [c for c in read if c.endswith("auroc")] == ["near_auroc"]
    assert read["label"].tolist() == sorted(table["label"])
    parser = _Text()
    parser.feed(render(results, "html", Choice(scorers=("mahalanobis",))))
    assert parser.tags.count("table") == parser.data.count("mahalanobis") == 2
    for options, words in (
        (["--sort", "all"], "unknown leaderboard column to sort by 'all'"),
        (["--scorers", "knn:k=3"], "did you mean 'knn:k=2'"),
    ):
        result = call("leaderboard", runs.parent / "out" / "second", *options)
        assert result.exit_code == 2
        assert words in result.stderr
    listed = call(
        "leaderboard", runs / "second", "--format", "latex", "--columns", "near_auroc,far_auroc", "--tables", "means"
    )
    assert "near AUROC $\\uparrow$ & far AUROC $\\uparrow$" in listed.stdout


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.data: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.data.append(data)


def test_names_are_escaped_in_every_format() -> None:
    odd = "<b>|a_b & 50 % \\x$\n=1+1"
    table = TextTable(["name", "figure"], [[odd, Bold("1 ± 2")]], caption=odd, notes=["**n** `o`"])
    parser = _Text()
    parser.feed(table.text("html"))
    assert [tag for tag in parser.tags if tag == "b"] == ["b"]  # of the bold cell alone
    tex = table.text("latex")
    assert r"<b>|a\_b \& 50 \% \textbackslash{}x\$" in tex
    assert "\\textbf{1 $\\pm$ 2}" in tex
    assert len(table.markdown().splitlines()) == 3
    assert "\\|a_b" in table.markdown()
    for columns, wide in ((8, False), (9, True)):
        tex = TextTable(["name"] * columns, [["1"] * columns]).text("latex")
        assert (
            ("\\usepackage{booktabs,graphicx}" in tex)
            == ("\\resizebox{\\textwidth}{!}{%\n  \\begin{tab" in tex)
            == wide
        )
        assert tex.count("{") == tex.count("}")
    with pytest.raises(TrajOODError, match="unknown table format 'tex'"):
        table.text("tex")


def test_settings_in_which_runs_differ_are_named(runs: Path, tmp_path: Path) -> None:
    first = next(path for path in runs.iterdir() if path.name != "second")
    result = RunResult.load(first / "result.json")
    for steps in (20, 60):
        shutil.copytree(first, tmp_path / str(steps))
        replace(result, config={**result.config, "max_steps": steps}).save(tmp_path / str(steps) / "result.json")
    told = f"Runs of `{result.model['name']}` have other settings: max_steps (20, 60)."
    labels = ["--scorers", "knn:k=2,mahalanobis", "--resamples", 50]
    assert told in call("compare", tmp_path, *labels).stdout
    assert told in call("compare", tmp_path, *labels, "--format", "csv").stderr
    assert (
        told in call("compare", tmp_path / "20", tmp_path / "60", "--scorers", "mahalanobis", "--resamples", 50).stdout
    )
