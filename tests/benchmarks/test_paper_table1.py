"""benchmarks/paper_table1.py from end to end, on a tiny ViT-MAE and tiny images in OpenOOD's layout."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
from tiny import vit, write_images

from traj_ood.evaluation.metrics import compute_metrics
from traj_ood.evaluation.results import Result

SPLITS = ("test", "sun", "places", "textures", "inaturalist")
MEASURED = ["--attractors", "12", "--per-set", "5", "--max-steps", "20", "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    path = Path(__file__).parents[2] / "benchmarks" / "paper_table1.py"
    spec = importlib.util.spec_from_file_location("paper_table1", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper_table1"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["paper_table1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-mae"
    vit().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet with lists, SUN and Places as folders, Texture and iNaturalist with lists."""
    base = tmp_path_factory.mktemp("openood")
    places = {
        "train": ("images_largescale", "imagenet_1k/train", 90, "train_imagenet"),
        "test": ("images_largescale", "imagenet_1k/val", 90, "test_imagenet"),
        "sun": ("images_largescale", "sun", 140, None),
        "places": ("images_largescale", "places", 180, None),
        "textures": ("images_classic", "texture", 220, "test_textures"),
        "inaturalist": ("images_largescale", "inaturalist", 256, "test_inaturalist"),
    }
    for seed, (folder, place, high, name) in enumerate(places.values()):
        count = 14 if name == "train_imagenet" else 7
        write_images(base / folder / place, count, seed, high=high)
        if name:
            path = base / "benchmark_imglist" / "imagenet" / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{place}/{i:03d}.png -1\n" for i in range(count)))
    return base


@pytest.fixture(scope="module")
def finished(script: ModuleType, model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT after one run with --vary."""
    out = tmp_path_factory.mktemp("table1")
    script.main(["--data-root", str(root), "--model", str(model), "--out", str(out), "--vary", *MEASURED])
    return out


def summary_of(out: Path, name: str = "table1.json") -> dict[str, Any]:
    return json.loads((out / name).read_text())


def test_the_papers_numbers(script: ModuleType) -> None:
    assert set(script.PAPER) == set(script.METHODS)
    assert all(len(row) == len(script.SETS) == 4 for row in script.PAPER.values())
    assert all(0 <= x <= 100 for row in script.PAPER.values() for pair in row for x in pair)
    # Reading the row of the trajectory score aloud from Table 1.
    assert script.PAPER["d(attractors)"] == ((29.6, 91.2), (29.9, 91.0), (25.9, 92.6), (29.9, 91.3))


def test_the_default_geometry_is_base(script: ModuleType) -> None:
    """He et al. 2022, §4 and Table 1: ViT-B/16 at 224 with a decoder of 8 blocks, 512 wide."""
    from transformers import ViTMAEConfig

    config = ViTMAEConfig()
    encoder = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    decoder = (config.decoder_hidden_size, config.decoder_num_hidden_layers, config.decoder_intermediate_size)
    assert (config.image_size, config.patch_size, encoder) == (224, 16, (768, 12, 12, 3072))
    assert decoder == (512, 8, 2048)
    # Weights and biases of the blocks (4 d² + 2 d m, and their biases and norms), embeddings, mask and class tokens.
    blocks = 12 * (4 * 768**2 + 2 * 768 * 3072 + 9 * 768 + 3072) + 8 * (4 * 512**2 + 2 * 512 * 2048 + 9 * 512 + 2048)
    ends = 768 * 768 + 768 + 2 * 768 + 2 * 512 + 768 * 512 + 512 + 512 * 768 + 768
    assert blocks + ends + 197 * (768 + 512) + 768 + 512 == script.BASE_PARAMETERS


def test_every_row_and_column_is_there(script: ModuleType, finished: Path) -> None:
    lines = (finished / "table1.md").read_text().splitlines()
    assert lines[0] == "## Table 1: the paper's and ours"
    tables = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    start = next(i for i, row in enumerate(tables) if row[:2] == ["Method", "Choice"])
    first, second = tables[:start], tables[start:]
    sets = [*script.SETS.values(), "mean"]
    assert [row[:2] for row in first[2:]] == [[s, m] for s in sets for m in script.METHODS]
    assert all(len(row) == 6 for row in first)
    assert second[0] == ["Method", "Choice", "Setting", *sets]
    assert len(second) - 2 == len(script.IN_ONE_PASS) + len(script.MASKINGS)
    rows = [row[:3] for row in second[2:]]
    assert len({tuple(row) for row in rows}) == len(rows)
    assert [r[1:] for r in rows if r[0] == "d(attractors)"] == [
        ["default", "all tokens, own length, no mask"],
        ["latent view", "CLS token"],
        ["latent view", "mean of patch tokens"],
        ["length", "horizon 16"],
        ["length", "horizon 64"],
        ["masking", "25 % hidden"],
        ["masking", "75 % hidden"],
    ]
    assert all(len(row) == 8 and "nan" not in " ".join(row) for row in second)
    assert "Not run" not in "\n".join(lines)


def test_each_variation_moves_one_choice(script: ModuleType) -> None:
    for variation in script.IN_ONE_PASS:
        name, *options = variation.scorer.split(":")
        if variation.choice != "another method":
            assert name == script.METHODS[variation.method]
            assert len(options) == (variation.choice != "default")
    assert all(v.scorer == script.METHODS[v.method] and v.run != "default" for v in script.MASKINGS)


def test_the_summary_is_what_the_results_say(script: ModuleType, finished: Path) -> None:
    summary = summary_of(finished)
    results = {name: Result.load(finished / run["result"]) for name, run in summary["runs"].items()}
    assert list(results) == ["default", "mask-0.25", "mask-0.75"]
    assert [r.config["model_options"]["mask_ratio"] for r in results.values()] == [0.0, 0.25, 0.75]
    assert len({r.model["fingerprint"] for r in results.values()}) == 3
    paper = {(m, s): pair for m, row in script.PAPER.items() for s, pair in zip(script.SETS, row, strict=True)}
    assert len(summary["table"]) == 20
    for row in summary["table"]:
        scorer = results["default"].scorers[row["scorer"]]
        metrics = scorer.all if row["set"] == "mean" else scorer.sets[row["set"]].metrics
        assert (row["ours"]["fpr95"], row["ours"]["auroc"]) == (metrics.fpr95, metrics.auroc)
        if row["set"] != "mean":
            expected = paper[row["method"], row["set"]]
            assert [100 * row["paper"][k] for k in ("fpr95", "auroc")] == pytest.approx(expected)
            assert row["ours"]["intervals"]["auroc"] == list(scorer.sets[row["set"]].intervals["auroc"])
    for row in summary["variations"]:
        sets = results[row["run"]].scorers[row["scorer"]].sets
        assert all(row["sets"][name]["auroc"] == sets[name].metrics.auroc for name in script.SETS)
    for name, run in summary["runs"].items():
        recorded = results[name]
        assert (run["seed"], run["commit"], run["command"]) == (0, recorded.commit, recorded.command)
        assert run["versions"] == recorded.versions
        assert "--data-root openood" in run["command"]
        assert run["command"].endswith("--attractors 12 --per-set 5 --max-steps 20 --seed 0")
        assert "--vary" in run["command"]
    assert str(finished) not in json.dumps(summary)
    assert not summary["rehearsal"]


def test_the_table_is_in_the_papers_convention(finished: Path) -> None:
    summary = summary_of(finished)
    path = finished / summary["runs"]["default"]["result"]
    table = pd.read_parquet(path.parent / "scores.parquet").groupby("split")["knn-paper"]
    expected = compute_metrics(table.get_group("test"), table.get_group("sun"))
    row = next(r for r in summary["table"] if (r["set"], r["scorer"]) == ("sun", "knn-paper"))
    assert row["ours"]["fpr95"] == expected.fpr95


def test_departures_from_the_paper_are_told(finished: Path) -> None:
    summary, text = summary_of(finished), (finished / "table1.md").read_text()
    parameters = vit().parameter_count()
    assert summary["departures"] == [
        f"model of {parameters:,} parameters, not ViT-MAE base's 111,907,840",
        "12 attractors, not 2,000",
        "test 5, sun 5, places 5, textures 5, inaturalist 5 images, not 2,000",
        "at most 20 steps, not 500",
    ]
    assert f"**Not comparable with the paper**: {'; '.join(summary['departures'])}." in text
    assert "AUROC ↑ paper (not comparable)" in text
    for name, run in summary["runs"].items():
        for warning in run["dictionary"]["warnings"]:
            assert f"- **Unhealthy attractors in run {name}**: {warning}." in text


def test_the_papers_protocol_has_no_departures(script: ModuleType, finished: Path) -> None:
    result = Result.load(finished / summary_of(finished)["runs"]["default"]["result"])
    result = replace(
        result,
        model=result.model | {"parameters": script.BASE_PARAMETERS},
        config=result.config | {"attractors": 2000, "max_steps": 500},
        data={name: entry | {"count": 2000} for name, entry in result.data.items()},
    )
    assert script.departures(result, rehearsal=False) == []
    arguments = script.parse([])
    assert script.departures(result, rehearsal=True) != []
    text = script.render(script.summarize(arguments, {"default": result}, {"default": "x"}))
    assert "comparable" not in text
    assert "Not run: mask-0.25, mask-0.75 (`--vary`)." in text


def test_a_second_call_computes_nothing_and_prints_the_same(
    script: ModuleType,
    model: Path,
    root: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    monkeypatch.setattr(script.Evaluator, "_compute", None)
    script.main(["--data-root", str(root), "--model", str(model), "--out", str(finished), "--vary", *MEASURED])
    assert capsys.readouterr().out == (finished / "table1.md").read_text()
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_dry_run_writes_nothing(
    script: ModuleType,
    model: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "TIMING_SECONDS", 0.0)
    out = tmp_path / "out"
    before = sorted(root.rglob("*"))
    with pytest.raises(SystemExit) as status:
        script.main(["--dry-run", "--data-root", str(root), "--model", str(model), "--out", str(out), *MEASURED])
    printed = capsys.readouterr()
    assert status.value.code == 0
    assert not out.exists()
    assert sorted(root.rglob("*")) == before
    assert printed.err == ""
    assert "every image is there (train 12, test 5, sun 5, places 5, textures 5, inaturalist 5)" in printed.out
    assert "for all 3 runs of --vary" in printed.out
    assert "every image runs all 20 steps" in printed.out


def test_the_hours_are_the_worst_case(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "seconds_per_call", lambda model: (3.6, 2))
    model = vit()
    model.chunk = 12  # 6 x 167 chunks, 505 evaluations each
    text = script.expected_hours(script.parse([]), model)
    assert f"at most {1002 * 505 * 3.6 / 3600:.3g} hours for the default run (12,000 images)" in text
    assert f"at most {3 * 1002 * 505 * 3.6 / 3600:.3g} hours for all 3 runs" in text


def test_dry_run_names_missing_data_and_model_at_once(
    script: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "TIMING_SECONDS", 0.0)
    missing = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as status:
        script.main(["--dry-run", "--data-root", missing, "--model", missing])
    assert status.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0] == (
        f"paper_table1: error: model '{missing}': no such folder; expected a folder with config.json and "
        "model.safetensors"
    )
    assert errors[1].startswith("paper_table1: error: benchmark 'imagenet-paper': expected OpenOOD's layout")
    # Without the data the hours are still told.
    with pytest.raises(SystemExit) as status:
        script.main(["--dry-run", "--data-root", missing, "--model", str(model), "--device", "cpu"])
    printed = capsys.readouterr()
    assert status.value.code == 2
    assert "Expected: at most" in printed.out
    assert printed.err.count("paper_table1: error:") == 1


def test_missing_images_are_reported_as_the_evaluator_does(
    script: ModuleType,
    model: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "TIMING_SECONDS", 0.0)
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "images_classic/texture/003.png").unlink()
    common = ["--data-root", str(copy), "--model", str(model), "--out", str(tmp_path / "out"), *MEASURED]
    said = []
    for extra in (["--per-set", "7"], ["--per-set", "7", "--dry-run"]):
        with pytest.raises(SystemExit) as status:
            script.main([*common, *extra])
        assert status.value.code == 2
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said[0] == said[1]
    assert "1 image files are missing or empty in textures (1 of 7); expected e.g." in said[0]
    assert not list(tmp_path.glob("out/**/*.json"))


@pytest.mark.parametrize("zipped", [False, True])
def test_a_rehearsal_says_so_everywhere(
    script: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool
) -> None:
    source = tmp_path / "photos"
    write_images(source / "a", 20, seed=1)
    write_images(source / "b", 20, seed=2)  # the same file names again
    if zipped:
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
            for path in source.rglob("*.png"):
                file.write(path, path.relative_to(source))
        source = tmp_path / "photos.zip"
    out = tmp_path / "out"
    script.main(["--rehearsal", str(source), "--model", str(model), "--out", str(out), "--quiet", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert printed.startswith("## REHEARSAL of Table 1: these figures mean nothing\n")
    assert "### REHEARSAL: one choice varied at a time" in printed
    assert "AUROC ↑ paper (not comparable)" in printed
    assert "Images: train 16, " in printed
    assert printed == (out / "rehearsal-table1.md").read_text()
    summary = summary_of(out, "rehearsal-table1.json")
    assert summary["rehearsal"]
    assert summary["what"].startswith("REHEARSAL")
    assert summary["departures"][0] == "a rehearsal: images of one folder stand in for every set"
    result = Result.load(out / "default/rehearsal-imagenet-paper--tiny-mae--seed0/result.json")
    assert result.benchmark == "rehearsal-imagenet-paper"
    assert {name: entry["count"] for name, entry in result.data.items()} == {"train": 16, **dict.fromkeys(SPLITS, 4)}
    assert not (out / "table1.json").exists()
    assert str(tmp_path) not in json.dumps(summary)


def test_bad_rehearsals_are_refused(
    script: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "few", 35, seed=1)
    (tmp_path / "text.zip").write_text("no zip file")
    for source, message in {
        "few": "expected at least 36 JPEG or PNG images (16 attractors, 5 x 4 to score), got 35; name another folder "
        "or ask for fewer",
        "text.zip": "expected a folder or zip file of images, got File is not a zip file",
    }.items():
        with pytest.raises(SystemExit) as status:
            script.main(["--rehearsal", str(tmp_path / source), "--model", str(model), "--out", str(tmp_path / "out")])
        assert status.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"paper_table1: error: --rehearsal {tmp_path / source}: {message}"
        )
    with pytest.raises(SystemExit):
        script.main(["--rehearsal", str(tmp_path), "--data-root", str(tmp_path)])
    assert "--rehearsal brings its own data: leave out --data-root" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
