"""How image files become pixels, from the command line to a detector that remembers it."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner, Result
from PIL import Image

from traj_ood import Detector
from traj_ood.cli import main
from traj_ood.data import Reading, decoding, read_folder
from traj_ood.data.decoding import AS_STORED, open_bytes, open_image, size_of
from traj_ood.errors import TrajOODError
from traj_ood.export import export_detector


def photographs(folder: Path, count: int = 24) -> Path:
    """Pictures that a camera held upright stores lying down."""
    folder.mkdir()
    exif = Image.Exif()
    exif[274] = 6
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 200, (16, 16), dtype=np.uint8)
        pixels[:, :5] = 250
        Image.fromarray(pixels).save(folder / f"{i:02}.png", exif=exif)
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def scores(text: str) -> list[float]:
    return [float(row["score"]) for row in csv.DictReader(io.StringIO(text))]


def test_a_detector_reads_as_its_training_images_were_read(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos")
    images = replace(read_folder(folder), exif=True)
    fitted = Detector.fit(tiny.conv(), images, "field")
    fitted.save(tmp_path / "d")
    detector = Detector.load(tmp_path / "d")
    assert detector.reading == Reading(exif=True)
    assert "read with exif = True" in (tmp_path / "d" / "README.md").read_text()
    turned = [images.load(i) for i in range(4)]
    expected = detector.score(images.select(range(4)))
    paths = [folder / path for path in images.paths[:4]]
    with Image.open(paths[0]) as first:
        in_memory: list[Any] = [first, *turned[1:]]
        for given in (paths, in_memory, turned):
            torch.testing.assert_close(detector.score(given), expected, rtol=1e-9, atol=0)
    with pytest.raises(TrajOODError, match="as the detector's training images were, got exif=False, bit_depth=None"):
        detector.score(read_folder(folder))


def test_fit_and_score_follow_the_options(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos")
    (folder / "notes.txt").write_text("no image")
    tiny.conv().save_pretrained(tmp_path / "conv")
    common = ["--model", tmp_path / "conv", "--tpr", "0.5", "--quiet", "--device", "cpu"]
    for name, options in (("plain", []), ("upright", ["--exif"])):
        result = call("fit", folder, *common, *options, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert "warning:" in result.stderr
        assert "left out 1 file(s) that are no images: .txt 1" in result.stderr
    assert json.loads((tmp_path / "upright" / "detector.json").read_text())["training"]["reading"] == {"exif": True}
    found = {}
    for name, options in (("plain", []), ("upright", []), ("upright", ["--no-exif"])):
        result = call("score", tmp_path / name, folder, "--device", "cpu", *options)
        assert result.exit_code == 0, result.output
        assert "left out 1 file(s) that are no images: .txt 1" in result.stderr
        assert len(scores(result.stdout)) == 24
        found[" ".join([name, *options])] = scores(result.stdout)
    assert len({tuple(values) for values in found.values()}) == 3
    assert scores(call("score", tmp_path / "upright", folder, "--exif", "--quiet").stdout) == found["upright"]


def test_dark_images_need_a_bit_depth(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    for i in range(24):
        values = np.random.default_rng(i).integers(0, 4096, (16, 16), dtype=np.uint16)
        Image.fromarray(values).save(folder / f"{i:02}.png")
    tiny.conv().save_pretrained(tmp_path / "conv")
    common = ["fit", folder, "--model", tmp_path / "conv", "--tpr", "0.5", "--quiet", "--device", "cpu", "--out"]
    result = call(*common, tmp_path / "d")
    assert result.exit_code == 2
    assert "--bit-depth 10, 12, 14 or 16" in result.stderr
    assert call(*common, tmp_path / "d", "--bit-depth", "12").exit_code == 0
    detector = Detector.load(tmp_path / "d")
    assert detector.reading == Reading(bit_depth=12)
    for reading in (Reading(exif=True), Reading()):
        detector.reading = reading
        detector.save(tmp_path / "changed")
        assert Detector.load(tmp_path / "changed").reading == reading
    assert call("score", tmp_path / "d", folder, "--quiet").exit_code == 0


@pytest.mark.parametrize("command", ["bench", "diagnose"])
def test_a_benchmark_is_read_as_asked(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from traj_ood.data import registry

    yaml = tiny.write_benchmark(tmp_path)
    asked: list[Reading] = []

    def remembered(name: str, root: Any = None, *, reading: Reading = AS_STORED, **_: Any) -> Any:
        asked.append(reading)
        made = registry.load_benchmark(name, root, reading=reading)
        assert all(split.images.reading() == {"exif": True, "bit_depth": 12} for split in made.splits())  # type: ignore[attr-defined]
        raise TrajOODError("enough")

    monkeypatch.setattr("traj_ood.data.load_benchmark", remembered)
    tiny.conv().save_pretrained(tmp_path / "conv")
    model = ["--model", tmp_path / "conv"] if command == "bench" else ["--benchmark", yaml]
    first = yaml if command == "bench" else tmp_path / "conv"
    result = call(command, first, *model, "--exif", "--bit-depth", "12", "--out", tmp_path / "out")
    assert (result.exit_code, asked) == (2, [Reading(True, 12)]), result.output


@pytest.mark.slow
def test_an_exported_file_says_how_images_are_read_and_its_reader_turns_them(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    where = Path(__file__).parents[2] / "benchmarks" / "consumers" / "onnx_runtime.py"
    spec = importlib.util.spec_from_file_location("consumer", where)
    assert spec is not None
    assert spec.loader is not None
    consumer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(consumer)
    folder = photographs(tmp_path / "photos")
    images = replace(read_folder(folder), exif=True)
    detector = Detector.fit(tiny.conv(), images, "field")
    made = export_detector(detector, tmp_path / "x.onnx", "onnx")
    assert made.metadata["reading"] == {"exif": True}
    model = consumer.Model(str(tmp_path / "x.onnx"))
    answers = model.answers(np.stack([model.pixels(str(folder / path)) for path in images.paths[:3]]))
    found = [float(score) for score, _, _ in answers]
    np.testing.assert_allclose(found, detector.score(images.select(range(3))).numpy(), rtol=1e-4)


# ---------------------------------------------------------------------- files that are larger than they say


def tiff_in_tiles(side: int, tile: int) -> bytes:
    """A grey image of ``side`` pixels in one deflated tile of ``tile``, black."""
    content = zlib.compress(bytes(tile * tile))
    tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile)]
    tags += [(324, 8 + 2 + 12 * 10 + 4), (325, len(content))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + content


def test_a_tile_that_is_larger_than_its_image_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = tiff_in_tiles(20, 32), tiff_in_tiles(20, 512)
    assert (size_of(small), size_of(large)) == ((32, 32), (512, 512))
    assert open_bytes(small, "a.tif").size == open_bytes(large, "a.tif").size == (20, 20)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 10_000)
    assert open_bytes(small, "a.tif").size == (20, 20)
    with pytest.raises(TrajOODError, match="at most 10000 pixels, got 512 x 512 pixels"):
        open_bytes(large, "a.tif")


def test_a_jpeg_of_many_scans_is_refused_and_one_with_a_film_behind_it_is_not(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    thumbnail = Image.Exif()
    thumbnail[270] = "\xff\xda" * 200
    Image.fromarray(pixels).save(file, "JPEG", progressive=True, exif=thumbnail)
    plain = file.getvalue()
    film = plain + b"\xff\xda" * 200
    assert np.array_equal(open_bytes(film, "a.jpg"), open_bytes(plain, "a.jpg"))
    last = plain.rindex(b"\xff\xda")
    many = plain[:last] + 200 * plain[last:-2] + plain[-2:]
    (tmp_path / "a.jpg").write_bytes(many)
    for call_it in (lambda: open_bytes(many, "a.jpg"), lambda: open_image(tmp_path / "a.jpg")):
        with pytest.raises(TrajOODError, match=r"a\.jpg: expected a JPEG of at most 100 scans, got more"):
            call_it()
