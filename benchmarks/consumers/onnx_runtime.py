"""Scores from an exported ONNX file with onnxruntime, numpy and pillow alone, no torch and no traj_ood:

    traj-ood export DETECTOR --format onnx --out detector.onnx
    python benchmarks/consumers/onnx_runtime.py detector.onnx photos/*.jpg > scores.csv

Writes CSV: path, score (higher = more out of distribution), p_value and reason: ok or ood, as the graph decides;
uncalibrated where the file holds no threshold; invalid: ... without a score. Exit code 3 when an image could not be
read. How an image becomes pixels (grey or RGB, resizing, cropping) stands in the file's metadata; normalisation is
inside the graph.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

BATCH = 32
NO_IMAGE = "invalid: the graph takes it for no image"
MAX_PIXELS = 89_478_485  # decoding more could exhaust the memory
# Known by their bytes. Others stay closed: Pillow would hand an EPS file to Ghostscript, which runs it as a program.
Image.init()
FORMATS = [name for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN]


class Model:
    """An exported detector.

    Attributes:
        metadata: what the file says of itself: input, preprocessing, scorer, steps, calibration.
    """

    def __init__(self, path: str) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.metadata: dict[str, Any] = json.loads(self.session.get_modelmeta().custom_metadata_map["traj_ood"])
        if self.metadata.get("reading", {}).get("bit_depth"):
            raise SystemExit(f"{path}: for images of another bit depth, which this program does not scale")

    def pixels(self, path: str) -> np.ndarray:
        """(C, H, W) float32 in [0, 1]."""
        how = self.metadata["preprocessing"]
        channels, height, width = how["shape"]
        with Image.open(path, formats=FORMATS) as file:
            image = _flat(file)
            if self.metadata.get("reading", {}).get("exif"):
                image.getexif().update(file.getexif())
                image = ImageOps.exif_transpose(image)
            image = image.convert(how["mode"])
        if how["resize"] == "none" and image.size != (width, height):
            raise ValueError(f"expected {width} x {height} pixels, since this model resizes none, got {image.size}")
        resample = Image.Resampling[how["filter"].upper()]
        if how["resize"] != "crop":
            image = image if image.size == (width, height) else image.resize((width, height), resample)
        else:
            short = min(image.size)
            size = [how["short_side"] if s == short else int(how["short_side"] * s / short) for s in image.size]
            image = image.resize((size[0], size[1]), resample)
            rests = (size[0] - width, size[1] - height)
            left, top = (rest // 2 if how["offset"] == "floor" else round(rest / 2) for rest in rests)
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, dtype=np.float32).reshape(height, width, channels) / np.float32(255)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def answers(self, pixels: np.ndarray) -> list[tuple[str, str, str]]:
        """(B, C, H, W) → (score, p_value, reason) of each, as the graph has decided."""
        names = [output.name for output in self.session.get_outputs()]
        said = dict(zip(names, (part.tolist() for part in self.session.run(names, {"images": pixels})), strict=True))
        if self.metadata.get("decisions") is None:
            nan = (NO_IMAGE if math.isnan(score) else "uncalibrated" for score in said["scores"])
            return [("" if r == NO_IMAGE else repr(s), "", r) for s, r in zip(said["scores"], nan, strict=True)]
        words = {int(code): reason for code, reason in self.metadata["decisions"].items()}
        found = zip(said["scores"], said["p_values"], said["decisions"], strict=True)
        return [("", "", NO_IMAGE) if words[d] == "invalid" else (repr(s), repr(p), words[d]) for s, p, d in found]


def rows(model: Model, paths: list[str]) -> Iterator[tuple[str, str, str, str]]:
    """(path, score, p_value, reason) of every image, in order, a batch at a time."""
    for start in range(0, len(paths), BATCH):
        read: dict[str, np.ndarray] = {}
        failed: dict[str, str] = {}
        for path in paths[start : start + BATCH]:
            try:
                read[path] = model.pixels(path)
            except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, …
                failed[path] = " ".join(str(error).split()) or type(error).__name__
        said = dict(zip(read, model.answers(np.stack(list(read.values()))), strict=True)) if read else {}
        for path in paths[start : start + BATCH]:
            yield (path, *(said[path] if path in said else ("", "", f"invalid: {failed[path]}")))


def _flat(image: Image.Image) -> Image.Image:
    """8 bits a channel without alpha, as traj_ood reads files; what it refuses, this refuses."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {image.width} x {image.height}")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError(f"expected a single image, got several frames or pages ({image.format})")
    tags = getattr(image, "tag_v2", {})
    white_is_zero = tags.get(262) == 0  # of 16-bit TIFFs; those of 8 bits Pillow turns itself
    deep = max(tags.get(258) or (8,)) > 8 or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image.load()
    if deep and not image.mode.startswith(("I", "F")) and 0 < np.asarray(image.convert("RGB")).max() < 16:
        raise ValueError("no 16-bit colour is 4096 or more, as in images of 10 or 12 bits: save it as 8 bit")
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "F":
        raise ValueError("expected 8 or 16 bits per channel, got floating point")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"expected grey of 8 or 16 bits, got integers from {grey.min()} to {grey.max()}")
        if 0 < grey.max() < 4096:
            raise ValueError("no 16-bit value is 4096 or more, as in images of 10 or 12 bits: save it as 8 bit")
        if white_is_zero:
            grey = 65535 - grey
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    return (image.convert("RGBA") if image.mode == "P" else image).convert("L" if image.mode in ("1", "LA") else "RGB")


def _quoted(text: str) -> str:
    """No spreadsheet may take a path for a formula; what begins with quotes before such a sign gets one more."""
    return "'" + text if text.lstrip("'")[:1] in tuple("=+-@\t\r\n") else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a file that `traj-ood export --format onnx` wrote")
    parser.add_argument("images", nargs="+", help="image files")
    options = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]  # any name
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("path", "score", "p_value", "reason"))
    broken = False
    for path, score, p_value, reason in rows(Model(options.model), options.images):
        writer.writerow((_quoted(path), score, p_value, reason))
        broken |= reason.startswith("invalid")
    if broken:
        sys.exit(3)


if __name__ == "__main__":
    main()
