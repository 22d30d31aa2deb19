"""Leaderboard: means over seeds against hand computation, what is never mixed, the README's tables."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from traj_ood.cli import main
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.leaderboard import leaderboard, per_set
from traj_ood.evaluation.leaderboard_text import DEFAULT_COLUMNS, Choice, csv_text, openood_csv, render
from traj_ood.evaluation.metrics import Metrics
from traj_ood.evaluation.results import Result, ScorerResult, SetScore, with_diagnostics
from traj_ood.evaluation.text_tables import put_between_markers

START, END = "<!-- leaderboard:start -->", "<!-- leaderboard:end -->"


def render_markdown(results: list[Result], columns: Sequence[str] = DEFAULT_COLUMNS) -> str:
    return render(results, choice=Choice(columns))


def metrics(auroc: float) -> Metrics:
    return Metrics(auroc, aupr_in=auroc - 0.1, aupr_out=auroc - 0.2, fpr95=1 - auroc, fpr95_openood=(1 - auroc) / 2)


def scorer(label: str, near: float, far: float, cost: float | None = None, **options: Any) -> ScorerResult:
    sets = {
        "bags": SetScore("near", 10, metrics(near), {}),
        "digits": SetScore("far", 20, metrics(far), {}),
        "noise": SetScore("far", 30, metrics(1.0), {}),
    }
    return ScorerResult(label, options, f"What {label} measures.", cost, sets)


def run(seed: int = 0, **changes: Any) -> Result:
    trajectory = scorer("Trajectory", 0.60 + seed / 10, 0.90, cost=100.0 + seed)
    fields: dict[str, Any] = {
        "name": f"run{seed}",
        "benchmark": "fashion",
        "model": {"name": "vitmae", "fingerprint": "aaaabbbbcccc"},
        "config": {"tol": 1e-5, "seed": seed},
        "seed": seed,
        "command": "traj-ood bench",
        "commit": None,
        "versions": {},
        "created": "2026-01-02T03:04:05+00:00",
        "seconds": {},
        "data": {
            "train": {"role": "train", "count": 5, "sha256": f"drawn with seed {seed}"},
            "digits": {"role": "far", "count": 20, "sha256": "1111111111"},
        },
        "dictionary": {"healthy": True, "warnings": []},
        "failures": [],
        "scorers": {"trajectory": trajectory, "knn": scorer("KNN", 0.5, 0.7)},
    }
    return Result(**{**fields, **changes})


def row(table: pd.DataFrame, name: str) -> pd.Series:
    found = table[table["scorer"] == name]
    assert len(found) == 1
    return found.iloc[0]


def test_seeds_are_averaged_as_by_hand() -> None:
    table = leaderboard([run(2), run(0), run(1)])
    assert list(table["scorer"]) == ["trajectory", "knn"]  # best all-AUROC first
    got = row(table, "trajectory")
    near = [0.6, 0.7, 0.8]
    assert got["seeds"] == 3
    assert got["near_auroc"] == pytest.approx(0.7)
    assert got["near_auroc_std"] == pytest.approx(statistics.stdev(near)) == pytest.approx(0.1)
    assert got["far_auroc"] == pytest.approx(0.95)
    assert got["far_auroc_std"] == pytest.approx(0.0)
    assert got["all_auroc"] == pytest.approx((0.7 + 0.9 + 1.0) / 3)
    assert got["all_auroc_std"] == pytest.approx(statistics.stdev([(n + 1.9) / 3 for n in near]))
    assert got["near_fpr95"] == pytest.approx(0.3)
    assert got["near_fpr95_openood"] == pytest.approx(0.15)
    assert got["near_aupr_in"] == pytest.approx(0.6)
    assert got["near_aupr_out"] == pytest.approx(0.5)
    assert got["f_evaluations"] == pytest.approx(101.0)
    assert math.isnan(row(table, "knn")["f_evaluations"])
    assert set(table["variant"]) == {""}


def test_one_seed_has_no_deviation_and_a_missing_role_no_mean() -> None:
    knn = scorer("KNN", 0.5, 0.7)
    far = ScorerResult("KNN", {}, "", None, {k: s for k, s in knn.sets.items() if s.role == "far"})
    got = row(leaderboard([run(scorers={"knn": far})]), "knn")
    assert got["seeds"] == 1
    assert math.isnan(got["far_auroc_std"])
    assert math.isnan(got["near_auroc"])
    assert got["far_auroc"] == got["all_auroc"] == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("changes", "variants"),
    [
        ({"config": {"tol": 1e-3}}, ["config.tol=0.001", "config.tol=1e-05"]),
        (
            {"data": {"digits": {"role": "far", "count": 20, "sha256": "2222222222"}}},
            ["data.digits=11111111", "data.digits=22222222"],
        ),
        ({"model": {"name": "vitmae", "fingerprint": "ddddeeeeffff"}}, ["model=aaaabbbb", "model=ddddeeee"]),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_never_averaged(changes: dict, variants: list[str]) -> None:
    table = leaderboard([run(0), run(1, **changes)])
    assert list(table["seeds"]) == [1, 1, 1, 1]
    assert sorted(table.loc[table["scorer"] == "trajectory", "variant"]) == variants
    assert sorted(table.loc[table["scorer"] == "knn", "variant"]) == variants
    assert "**" not in render_markdown([run(0), run(1, **changes)]).split("All figures")[0]  # no winner across data


def test_settings_that_older_records_lack_are_those_of_their_time() -> None:
    newer = {"precision": "fp32", "approximate": "none"}
    older, same, other = run(0), run(1), run(1)
    same.config.update(newer)
    other.config.update(newer | {"precision": "bf16"})
    table = leaderboard([older, same])
    assert (set(table["seeds"]), set(table["variant"])) == ({2}, {""})
    table = leaderboard([older, other])
    assert set(table["variant"]) == {"config.precision=fp32", "config.precision=bf16"}


def test_other_data_is_named_even_when_no_scorer_is_in_both_runs() -> None:
    other = {"digits": {"role": "far", "count": 20, "sha256": "2222222222"}}
    one = run(0, scorers={"knn": scorer("KNN", 0.5, 0.7)})
    two = run(0, scorers={"trajectory": scorer("Trajectory", 0.5, 0.7)}, data=other)
    table = leaderboard([one, two])
    assert row(table, "knn")["variant"] == "data.digits=11111111"
    assert row(table, "trajectory")["variant"] == "data.digits=22222222"


def test_other_options_and_sets_make_another_row_of_that_scorer_only() -> None:
    two = run(1)
    scorers = {**two.scorers, "knn": scorer("KNN", 0.5, 0.7, k=5)}
    table = leaderboard([run(0), run(1, scorers=scorers)])
    assert row(table, "trajectory")["seeds"] == 2
    assert sorted(table.loc[table["scorer"] == "knn", "variant"]) == ["options.k=5", "options.k=absent"]


def test_benchmarks_and_models_have_their_own_rows_without_a_variant() -> None:
    table = leaderboard([run(), run(benchmark="imagenet"), run(model={"name": "conv", "fingerprint": "9"})])
    assert len(table) == 6
    assert set(table["variant"]) == {""}


def test_a_seed_that_comes_twice_is_refused() -> None:
    with pytest.raises(TrajOODError) as error:
        leaderboard([run(0), run(0, name="again")])
    assert str(error.value) == (
        "leaderboard: expected one result per seed for fashion, vitmae, trajectory; "
        "got seed 0 twice ('run0' of 2026-01-02T03:04:05+00:00 and 'again' of 2026-01-02T03:04:05+00:00); "
        "remove one of them"
    )


def test_no_results_is_an_error() -> None:
    for function in (leaderboard, per_set, render_markdown):
        with pytest.raises(TrajOODError, match="leaderboard: expected at least 1 result, got 0"):
            function([])


def test_per_set_keeps_each_set_apart_near_first() -> None:
    table = per_set([run(0), run(1)])
    trajectory = table[table["scorer"] == "trajectory"]
    assert list(trajectory["set"]) == ["bags", "digits", "noise"]
    assert list(trajectory["role"]) == ["near", "far", "far"]
    assert trajectory.iloc[0]["auroc"] == pytest.approx(0.65)
    assert trajectory.iloc[0]["auroc_std"] == pytest.approx(statistics.stdev([0.6, 0.7]))
    assert trajectory.iloc[1]["fpr95"] == pytest.approx(0.1)


def test_markdown_is_the_readme_table() -> None:
    text = render_markdown([run(0), run(1)], columns=["near_auroc", "all_auroc", "all_fpr95", "all_fpr95_openood"])
    lines = text.splitlines()
    assert lines[0] == "### fashion · vitmae"
    assert lines[2:6] == [
        "| Scorer | near AUROC ↑ | all AUROC ↑ | all FPR95 ↓ | all FPR95-OpenOOD ↓ | f / image | Dictionary | Seeds |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
        "| Trajectory | **65.0 ± 7.1** | **85.0 ± 2.4** | **15.0 ± 2.4** | **7.5 ± 1.2** | 100.5 | healthy | 2 |",
        "| KNN | 50.0 ± 0.0 | 73.3 ± 0.0 | 26.7 ± 0.0 | 13.3 ± 0.0 | — | not used | 2 |",
    ]
    assert "| Scorer | bags (near) | digits (far) | noise (far) |" in lines
    assert "| Trajectory | 65.0 ± 7.1 | 90.0 ± 0.0 | 100.0 ± 0.0 |" in lines
    assert "**FPR95** is the paper's" in text
    assert "**FPR95-OpenOOD** is OpenOOD's" in text
    assert "⚠" not in text


def test_a_dictionary_that_no_scorer_reads_is_not_called_healthy() -> None:
    unread = {"used": False, "healthy": True, "warnings": []}
    rows = [line for line in render_markdown([run(dictionary=unread)]).splitlines() if "| 1 |" in line]
    assert len(rows) == 2
    assert all("| not used |" in line for line in rows)
    assert not leaderboard([run(dictionary=unread)])["used"].any()
    used = leaderboard([run()]).set_index("scorer")["used"]  # older results do not tell, the scorers do
    assert used.to_dict() == {"trajectory": True, "knn": False}


def test_an_unhealthy_dictionary_is_marked_and_explained() -> None:
    sick = {"healthy": False, "warnings": ["only 61.0 % converged", "4 distinct attractors"]}
    text = render_markdown([run(0), run(1, dictionary=sick)])
    assert text.count("⚠ unhealthy [1]") == text.count("| not used |") == 1  # knn reads no attractors
    assert "| Trajectory ⚠ |" in text
    assert "| KNN |" in text
    footnotes = [line for line in text.splitlines() if line.startswith("⚠ [1]")]
    assert footnotes == [
        "⚠ [1] Unhealthy attractor dictionary; scores that use attractors are not to be trusted here: "
        "seed 1: only 61.0 % converged; seed 1: 4 distinct attractors."
    ]
    table = leaderboard([run(0), run(1, dictionary=sick)]).set_index("scorer")
    assert table["healthy"].to_dict() == {"trajectory": False, "knn": True}
    own = {"own": scorer("own", 0.5, 0.6)}  # not imported here: it may read attractors
    assert not leaderboard([run(scorers=own, dictionary=sick)])["healthy"].any()


def test_bars_in_labels_do_not_break_the_table() -> None:
    text = render_markdown([run(scorers={"x": scorer("a|b", 0.5, 0.6)})])
    assert "| a\\|b |" in text


def test_an_unknown_column_is_named() -> None:
    with pytest.raises(TrajOODError, match=r"unknown leaderboard column 'all_aurok': did you mean 'all_auroc'"):
        render_markdown([run()], columns=["all_aurok"])


def test_csv_holds_the_leaderboard() -> None:
    read = pd.read_csv(io.StringIO(csv_text([run(0), run(1)])))
    assert list(read.columns) == list(leaderboard([run(0), run(1)]).columns)
    assert read["near_auroc"][0] == pytest.approx(0.65)


def test_texts_of_a_csv_that_a_spreadsheet_would_run_are_quoted() -> None:
    odd = run(model={"name": "=1+1", "fingerprint": "a"}, benchmark="-3\x1b[2J\n|")
    texts = (csv_text([odd]), csv_text([odd], quote_formulas=False))
    quoted, plain = (pd.read_csv(io.StringIO(text)) for text in texts)
    assert (quoted["model"][0], plain["model"][0]) == ("'=1+1", "=1+1")
    assert quoted["benchmark"][0] == "'-3\x1b[2J\n|"  # a data file keeps the name
    assert quoted["all_auroc"].tolist() == plain["all_auroc"].tolist()
    assert ",'=1+1," in openood_csv([odd])
    assert ",=1+1," in openood_csv([odd], quote_formulas=False)
    assert "### -3\\x1b[2J\\n|" in render_markdown([odd])


def test_readme_is_replaced_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    put_between_markers(readme, "leaderboard", "new\n")
    assert readme.read_text() == f"before\n{START}\nnew\n{END}\nafter\n"
    put_between_markers(readme, "leaderboard", "new\n")
    assert readme.read_text() == f"before\n{START}\nnew\n{END}\nafter\n"


def test_a_readme_keeps_its_line_ends(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_bytes(f"before\n{START}\nold\n{END}\nafter\n".replace("\n", "\r\n").encode())
    put_between_markers(readme, "leaderboard", "| a |\n| b |\n")
    expected = f"before\n{START}\n| a |\n| b |\n{END}\nafter\n"
    assert readme.read_bytes().decode() == expected.replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("text", "found"),
    [("nothing", "0 and 0"), (START, "1 and 0"), (f"{END}{START}", "1 and 1"), (START * 2, "2 and 0")],
)
def test_a_readme_without_markers_is_left_alone(tmp_path: Path, text: str, found: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(TrajOODError) as error:
        put_between_markers(readme, "leaderboard", "new")
    assert str(error.value) == (
        f"{readme}: expected {START} once and {END} once after it, got {found}; "
        "put both markers where the table belongs"
    )
    assert readme.read_text() == text
    with pytest.raises(TrajOODError, match="expected a Markdown file in UTF-8"):
        put_between_markers(tmp_path / "absent.md", "leaderboard", "new")


def test_openood_rows_in_the_columns_of_its_leaderboard() -> None:
    model = {"name": "vitmae", "fingerprint": "aaaabbbbcccc", "family": "vit-mae"}
    sick = {"healthy": False, "warnings": ["few distinct end points"]}
    text = openood_csv([run(0, model=model), run(1, model=model), run(2, model=model, dictionary=sick)])
    assert text.splitlines() == [
        "Training,Scorer,Near-OOD_AUROC,Far-OOD_AUROC,ID_Accuracy,Outlier_Data,Arch,Additional_Description",
        "vit-mae,Trajectory,70.00 ± 10.00,95.00 ± 0.00,/,No,vitmae,fashion; 3 seeds; unhealthy attractors",
        "vit-mae,KNN,50.00 ± 0.00,85.00 ± 0.00,/,No,vitmae,fashion; 3 seeds",
    ]


def test_openood_rows_can_be_chosen_and_sorted() -> None:
    def shown(choice: Choice) -> list[str]:
        return [line.split(",")[1] for line in openood_csv([run(0)], choice).splitlines()[1:]]

    assert shown(Choice()) == ["Trajectory", "KNN"]
    assert shown(Choice(sort="label")) == ["KNN", "Trajectory"]
    assert shown(Choice(scorers=["KNN"])) == ["KNN"]
    assert shown(Choice(top=1)) == ["Trajectory"]


def test_openood_rows_of_one_seed_and_of_a_missing_role() -> None:
    knn = scorer("KNN, k=5", 0.5, 0.7)
    far = ScorerResult("KNN, k=5", {}, "", None, {k: s for k, s in knn.sets.items() if s.role == "far"})
    text = openood_csv([run(scorers={"knn": far})])
    assert text.splitlines()[1] == '/,"KNN, k=5",/,85.00,/,No,vitmae,fashion; 1 seed'
    with pytest.raises(TrajOODError, match="expected at least 1 result, got 0"):
        openood_csv([])


# ---------------------------------------------------------------------------------------------- diagnostics


def test_diagnostics_have_columns_and_are_in_no_mean() -> None:
    text = render_markdown([run(0), run(1)], columns=["all_auroc"])
    assert "Means include bags (near) and digits, noise (far)." in text.splitlines()
    runs = with_diagnostics([run(0), run(1)], ["noise"])
    table = leaderboard(runs)
    got = row(table, "trajectory")
    assert got["all_auroc"] == pytest.approx((0.65 + 0.9) / 2)
    assert got["far_auroc"] == pytest.approx(0.9)
    assert got["diagnostics"] == "noise"
    assert list(per_set(runs)["role"])[:3] == ["near", "far", "diagnostic"]
    text = render_markdown(runs, columns=["all_auroc"])
    assert "Means include bags (near) and digits (far); noise is a diagnostic and is left out." in text.splitlines()
    assert "| Scorer | bags (near) | digits (far) | noise (diagnostic) |" in text
    assert openood_csv(runs).splitlines()[1].endswith(",fashion; 2 seeds; means without noise")
    with pytest.raises(TrajOODError, match="unknown OOD set of these results 'nosie': did you mean 'noise'"):
        with_diagnostics([run(0)], ["nosie"])


def test_runs_whose_means_hold_other_sets_are_never_averaged() -> None:
    (new,) = with_diagnostics([run(1)], ["noise"])
    table = leaderboard([run(0), new])
    assert sorted(table.loc[table["scorer"] == "knn", "variant"]) == ["sets.noise=diagnostic", "sets.noise=far"]
    text = render_markdown([run(0), new], columns=["all_auroc"])
    assert "Means include bags (near) and digits, noise (far) (sets.noise=far)." in text
    assert "and is left out (sets.noise=diagnostic)." in text
    text = render_markdown([run(0), new, run(2, config={"tol": 1e-3})])
    assert "digits, noise (far) (config.tol=1e-05, sets.noise=far; or config.tol=0.001, sets.noise=far)." in text


def test_the_option_of_the_command(tmp_path: Path) -> None:
    run(0).save(tmp_path / "a" / "result.json")
    done = CliRunner().invoke(main, ["leaderboard", str(tmp_path), "--diagnostics", "noise", "--columns", "all_auroc"])
    assert done.exit_code == 0, done.output
    assert "| Trajectory | **75.0** |" in done.stdout
    wrong = CliRunner().invoke(main, ["leaderboard", str(tmp_path), "--diagnostics", "nosie"])
    assert wrong.exit_code == 2


def test_several_folders_are_one_leaderboard(tmp_path: Path) -> None:
    for seed in (0, 1):
        run(seed).save(tmp_path / f"{seed}" / "result.json")
    places = [str(tmp_path / "0"), str(tmp_path / "1")]
    one, both = (CliRunner().invoke(main, ["leaderboard", *part, "--format", "csv"]) for part in (places[:1], places))
    assert [set(pd.read_csv(io.StringIO(text.stdout))["seeds"]) for text in (one, both)] == [{1}, {2}]
    twice = CliRunner().invoke(main, ["leaderboard", places[0], places[0]])
    assert twice.exit_code == 0
    assert twice.stdout == CliRunner().invoke(main, ["leaderboard", places[0]]).stdout


def test_a_plain_name_shows_every_label_of_its_scorer() -> None:
    result = run(0)
    scorers = {f"{name}:k=5" if name == "knn" else name: value for name, value in result.scorers.items()}
    table = leaderboard([replace(result, scorers=scorers)])
    assert set(Choice(scorers=("knn",)).of(table)["scorer"]) == {"knn:k=5"}
    assert set(Choice(scorers=("trajectory",)).of(table)["scorer"]) == {"trajectory"}
    with pytest.raises(TrajOODError, match="unknown scorer of these results 'kn'"):
        Choice(scorers=("kn",)).of(table)


@pytest.mark.parametrize(
    ("scorer", "reads"),
    [("path-energy:two_sided=true", False), ("contraction-rate:two_sided=true", False), ("path-signature", True)],
)
def test_health_is_told_of_scorers_that_read_attractors(scorer: str, reads: bool) -> None:
    result = run(0)
    sick = {"healthy": False, "warnings": ["only 1 distinct attractor"]}
    row = leaderboard([replace(result, scorers={scorer: result.scorers["knn"]}, dictionary=sick)]).iloc[0]
    assert (row["healthy"], row["used"]) == (not reads, reads)
