"""Damage of every kind to the files that traj_ood reads, and what became of it: the part `corrupt` of reliability.py.

Each case copies whole files, damages one of them in a way that a seed decides, and uses the copy as a user would. Three
ends are sound: an error of one line (``refused``), the very answers of the whole files (``same``), and, only for files
that people write by hand or where the damage may spell something else that is valid, another valid input (``other``):
an image with other pixels, a list without its last line. Everything else is a finding: any exception but TrajOODError,
an error of several lines, other answers from a folder that is sealed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from traj_ood.errors import TrajOODError

REFUSED, SAME, OTHER = "refused", "same", "other"
_LONGEST_ERROR = 2000
_SLOW = 30.0  # seconds of the processor for what takes a few milliseconds: as bad as no end at all
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**30,
    10**5000,
    1e308,
    -1e-300,
    float("nan"),
    float("inf"),
    "",
    "x" * 10_000,
    "../../../../etc/passwd",
    "/etc/passwd",
    "\x00",
    "\ud800",
    [],
    {},
    [[[[]]]],
    {"a": {"b": [1, None]}},
)


@dataclass(frozen=True)
class Subject:
    """Files of one kind.

    Attributes:
        name: in the record.
        folder: the whole files; never changed.
        use: a copy of ``folder`` → what is answered: the same value for the same answers.
        may_differ: whether damage may spell another valid input.
        check: of that other answer: raises AssertionError where it is not sound. Default: any is.
        files: which files to damage, as a suffix each. Default: all.
        kinds: of damage. Default: all.
    """

    name: str
    folder: Path
    use: Callable[[Path], Any]
    may_differ: bool = False
    check: Callable[[Any], None] = lambda answer: None
    files: tuple[str, ...] = ("",)
    kinds: tuple[str, ...] = ()


@dataclass
class Outcomes:
    """How often each end came, by kind of damage, and all findings."""

    ends: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    slowest_seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        total: Counter[str] = sum(self.ends.values(), Counter())
        return {
            "cases": sum(total.values()) + len(self.findings),
            **{end: total[end] for end in (REFUSED, SAME, OTHER)},
            "findings": self.findings,
            "slowest_seconds": round(self.slowest_seconds, 2),
            "by_damage": {kind: dict(sorted(ends.items())) for kind, ends in sorted(self.ends.items())},
        }


def run_cases(subject: Subject, cases: int, seed: int) -> Outcomes:
    """``cases`` damaged copies of one subject's files."""
    outcomes = Outcomes()
    whole = subject.use(subject.folder)
    for case in range(cases):
        draw = random.Random(f"{subject.name}/{seed}/{case}")
        with tempfile.TemporaryDirectory(prefix="corrupt-") as place:
            copy = Path(place) / subject.folder.name
            shutil.copytree(subject.folder, copy)
            kind, what = damage(copy, subject.files, draw, subject.kinds)
            began = time.process_time()
            end = _end(subject, copy, whole)
            seconds = time.process_time() - began
        outcomes.slowest_seconds = max(outcomes.slowest_seconds, seconds)
        end = f"took {seconds:.0f} s" if seconds > _SLOW and end in (REFUSED, SAME, OTHER) else end
        if end in (REFUSED, SAME, OTHER):
            outcomes.ends.setdefault(kind, Counter())[end] += 1
        else:
            outcomes.findings.append({"case": case, "damage": f"{kind}: {what}", "end": end})
    return outcomes


def _end(subject: Subject, copy: Path, whole: Any) -> str:
    """One of the three sound ends, or what else has happened."""
    try:
        answer = subject.use(copy)
    except TrajOODError as error:
        text = str(error)
        if "\n" in text or len(text) > _LONGEST_ERROR:
            return f"an error of {len(text.splitlines())} lines and {len(text)} characters: {text[:200]!r}"
        return REFUSED
    except (SystemExit, Exception) as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    if answer == whole:
        return SAME
    if not subject.may_differ:
        return "other answers than those of the whole files"
    try:
        subject.check(answer)
    except AssertionError as error:
        return f"unsound: {str(error)[:300]}"
    return OTHER


# ---------------------------------------------------------------------- damage


def damage(folder: Path, suffixes: Iterable[str], draw: random.Random, only: Collection[str] = ()) -> tuple[str, str]:
    """Damage one file below ``folder``, in one of the ways ``only`` if given; returns the way and where it is."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.endswith(tuple(suffixes)))
    path = draw.choice(files)
    content = path.read_bytes()
    kinds: dict[str, Callable[[], Any]] = {
        "bit": lambda: path.write_bytes(_flipped(content, draw, 1)),
        "bits": lambda: path.write_bytes(_flipped(content, draw, 8)),
        "cut": lambda: path.write_bytes(content[: draw.randrange(len(content))]),
        "empty": lambda: path.write_bytes(b""),
        "longer": lambda: path.write_bytes(content + draw.randbytes(draw.choice((1, 17, 4096)))),
        "head": lambda: path.write_bytes(draw.randbytes(min(16, len(content))) + content[16:]),
        "zeros": lambda: path.write_bytes(_replaced(content, draw, lambda n: bytes(n))),
        "noise": lambda: path.write_bytes(_replaced(content, draw, draw.randbytes)),
        "hole": lambda: path.write_bytes(_replaced(content, draw, lambda n: b"")),
        "random": lambda: path.write_bytes(draw.randbytes(draw.choice((1, 8, 100, len(content))))),
        "swap": lambda: path.write_bytes(draw.choice(files).read_bytes()),
        "gone": path.unlink,
        "folder": lambda: (path.unlink(), path.mkdir()),
        "link": lambda: (path.unlink(), path.symlink_to("/etc/passwd")),
        "loop": lambda: (path.unlink(), path.symlink_to(path)),
    }
    if path.suffix == ".json":
        for kind in ("value", "key", "deep"):
            kinds[f"json {kind}"] = partial(_edit_json, path, kind, draw)
        if "digest" in json.loads(content):
            for kind in ("value", "key"):
                kinds[f"sealed {kind}"] = partial(_edit_json, path, kind, draw, reseal=True)
    if path.suffix == ".safetensors":
        kinds["tensors length"] = lambda: path.write_bytes(
            struct.pack("<Q", draw.choice((0, 1, len(content), 2**32, 2**63, 2**64 - 1))) + content[8:]
        )
        kinds["tensors header"] = partial(_edit_tensors, path, draw)
    if path.suffix in (".yaml", ".txt"):
        kinds["line"] = partial(_edit_line, path, draw)
    kind = draw.choice(sorted(kinds.keys() & set(only) if only else kinds))
    kinds[kind]()
    return kind, path.relative_to(folder).as_posix()


def _flipped(content: bytes, draw: random.Random, count: int) -> bytes:
    changed = bytearray(content)
    for _ in range(count):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _replaced(content: bytes, draw: random.Random, fill: Callable[[int], bytes]) -> bytes:
    start = draw.randrange(len(content))
    count = min(draw.choice((1, 4, 64, 1024)), len(content) - start)
    return content[:start] + fill(count) + content[start + count :]


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested dicts and lists."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in list(pairs) for place in [(tree, key), *_places(value)]]


def _edit_json(path: Path, kind: str, draw: random.Random, reseal: bool = False) -> None:
    """Another value, another key, or nesting without end; ``reseal`` makes a detector's digest fit again."""
    tree = json.loads(path.read_text())
    container, key = draw.choice(_places(tree))
    if kind == "deep":
        path.write_text('{"a":' * 100_000)
        return
    if kind == "key" and isinstance(container, dict):
        value = container.pop(key)
        if draw.random() < 0.5:
            container[draw.choice(("../x", "a b", f"{key}2", ""))] = value
    else:
        container[key] = draw.choice(ODD_VALUES)
    if reseal:
        tree.pop("digest", None)
        tree["digest"] = hashlib.sha256(_json_text(tree).encode()).hexdigest()
    path.write_text(_json_text(tree))


def _json_text(tree: Any) -> str:
    sys.set_int_max_str_digits(0)  # 10**5000 is one of the odd values
    try:
        return json.dumps(tree, indent=2, sort_keys=True) + "\n"
    finally:
        sys.set_int_max_str_digits(4300)


def _edit_tensors(path: Path, draw: random.Random) -> None:
    """Another dtype, shape or place of one tensor, in a header of the right length."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    entry = header[draw.choice(names)] if names else header.setdefault("extra", {})
    changes: list[tuple[str, Any]] = [
        ("dtype", draw.choice(("F64", "F16", "I64", "BOOL", "X9"))),
        ("shape", draw.choice(([], [1], [-1], [2**40, 2**40], [0], "3"))),
        ("data_offsets", draw.choice(([0, 0], [0, 2**50], [8, 4], [-4, 0], None))),
    ]
    key, value = draw.choice(changes)
    entry[key] = value
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _edit_line(path: Path, draw: random.Random) -> None:
    """A line of a list or YAML file: gone, twice, or with something odd in it."""
    lines = path.read_text().splitlines()
    at = draw.randrange(len(lines))
    head = lines[at].partition(":")[0]
    odd = draw.choice(
        (
            "../../../etc/passwd 0",
            "/etc/passwd 0",
            "a/../../b.png 1",
            "\x00",
            "x" * 100_000,
            f"{head}: !!python/object/apply:os.system ['touch /tmp/traj_ood-was-here']",
            f"{head}: &a [*a]",
            f"{head}: {'[' * 5000}",
            f"{head}: 99999999999999999999999999",
            f"{head}: .nan",
            f"{head}: -1",
            f"{head}: 1e308",
            f"{head}: ../../../../etc",
            f"{head}: 2001-01-01",
            f"{head}: 2001-99-99",
            f"{head}: {'9' * 5000}",
            f"? {head}",
            f"{head}: {{<<: 3}}",
            "{}: {}",
            "\ufeff",
        )
    )
    change = draw.choice(("gone", "twice", "odd", "odd", "odd"))
    lines[at : at + 1] = [] if change == "gone" else [lines[at]] * 2 if change == "twice" else [odd]
    path.write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------------- subjects


def subjects(place: Path) -> list[Subject]:
    """Small examples of everything that is read from disk, written below ``place``."""
    return [*detector_subjects(place), *model_subjects(place), *text_subjects(place), image_subject(place)]


def detector_subjects(place: Path) -> list[Subject]:
    import torch

    from traj_ood.data.preprocessing import Normalised
    from traj_ood.detector import Detector

    new = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(9))

    def use(folder: Path) -> Any:
        judged = Detector.load(folder, device="cpu").judge(Normalised(new))
        assert judged.p_values is not None
        return judged.scores.numpy().tobytes(), judged.p_values.numpy().tobytes()

    found = []
    for model, scorer in (("vit", "field"), ("conv", "trajectory")):
        folder = place / f"detector-{model}"
        draw = torch.Generator().manual_seed(3)
        fit, held_out = (torch.randn(n, 1, 8, 8, generator=draw) for n in (24, 20))
        Detector.fit(small_model(model), Normalised(fit), scorer, max_steps=8).calibrate(Normalised(held_out)).save(
            folder
        )
        found.append(Subject(f"detector {model} {scorer}", folder, use))
        # Who can write the folder can write its seal, too: any valid detector may come of it, but nothing worse.
        kinds = ("sealed value", "sealed key")
        found.append(Subject(f"resealed {model}", folder, use, may_differ=True, files=("detector.json",), kinds=kinds))
    return found


def model_subjects(place: Path) -> list[Subject]:
    import torch

    from traj_ood.autoencoders import load_autoencoder

    new = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(9))

    def use(folder: Path) -> Any:
        model = load_autoencoder(str(folder), name="model")
        if tuple(model.input_shape) != (1, 8, 8):
            return model.input_shape  # a folder's config may say so; it is another model
        latents = model.encode(new)
        return latents.numpy().tobytes(), model.decode(latents).numpy().tobytes()

    found = []
    for model in ("vit", "conv"):
        folder = place / f"model-{model}"
        small_model(model).save_pretrained(folder)
        found.append(Subject(f"model {model}", folder, use))
    return found


def text_subjects(place: Path) -> list[Subject]:
    """An image list, a benchmark's YAML (its images stand outside, so only the text is damaged) and training YAML."""
    from traj_ood.data import load_benchmark, preflight, read_image_list
    from traj_ood.training.autoencoder import build_autoencoder
    from traj_ood.training.config import TrainConfig

    images = place / "images"
    for k, name in enumerate(("train", "test", "far")):
        write_images(images / name, 12, seed=k)
    root = os.path.realpath(images)

    def in_root(paths: Any) -> None:
        for path in paths:
            assert os.path.realpath(path).startswith(root + os.sep), f"{path} is outside {root}"

    def use_list(folder: Path) -> Any:
        source = read_image_list(folder / "list.txt", images / "train")
        for k in range(len(source)):
            source.load(k)
        return tuple(source.resolved())

    def use_benchmark(folder: Path) -> Any:
        benchmark = load_benchmark(str(folder / "tiny.yaml"))
        preflight(benchmark)
        sources: list[Any] = [split.images for split in benchmark.splits()]
        return tuple(path for source in sources for path in source.resolved())

    def use_training(folder: Path) -> Any:
        config = TrainConfig.load(str(folder / "train.yaml"))
        model = build_autoencoder(config, (0.5,) * config.channels, (0.5,) * config.channels)
        return repr(config), model.input_shape

    lists, benchmark, training = (place / name for name in ("list", "benchmark", "training"))
    for folder in (lists, benchmark, training):
        folder.mkdir(parents=True)
    (lists / "list.txt").write_text("".join(f"{k:03d}.png {k % 3}\n" for k in range(12)))
    (benchmark / "tiny.yaml").write_text(
        f"name: tiny\nroot: {images}\ntrain: train\ntest: test\nfar: {{bright: far}}\n"
    )
    (training / "train.yaml").write_text(
        "name: small\nbenchmark: fashion\nfamily: conv\nimage_size: 8\nchannels: 1\nmodel:\n  width: 2\n"
        "  bottleneck: 4\nrecipe:\n  epochs: 1\n  batch_size: 4\nseed: 3\nhealth_images: 10\n"
    )
    return [
        Subject("image list", lists, use_list, may_differ=True, check=in_root),
        Subject("benchmark YAML", benchmark, use_benchmark, may_differ=True),
        Subject("training YAML", training, use_training, may_differ=True),
    ]


def image_subject(place: Path) -> Subject:
    """One file of every format that is read; the answer is every file's pixels, or its error."""
    from traj_ood.data.decoding import open_image

    folder = place / "pictures"
    write_pictures(folder)

    def use(copy: Path) -> Any:
        path = next(copy / whole.name for whole in sorted(folder.iterdir()) if not _same_file(copy / whole.name, whole))
        image = open_image(path)
        return image.mode, image.size, image.tobytes()

    def check(answer: Any) -> None:
        assert answer[0] in ("L", "RGB"), answer[0]

    return Subject("images", folder, _or_whole(use), may_differ=True, check=check)


def _or_whole(use: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Where the damage changed nothing, such as a file swapped with itself, the answer is that of the whole files."""

    def wrapped(copy: Path) -> Any:
        try:
            return use(copy)
        except StopIteration:
            return "whole"

    return wrapped


def _same_file(path: Path, whole: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.read_bytes() == whole.read_bytes()


def write_images(folder: Path, count: int, seed: int, size: int = 8, high: int = 256) -> None:
    """``count`` greyscale PNG files ``000.png`` …, all different."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for k in range(count):
        brightness = draw.uniform(0, high)
        pixels = 0.7 * brightness + 0.3 * draw.uniform(0, high, (size, size))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k:03d}.png")


def write_pictures(folder: Path) -> None:
    """A picture in every format and mode."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((96, 80))
    modes = {"RGB": ("jpg", "png", "gif", "tif", "webp", "bmp", "ppm"), "L": ("jpg", "png", "tif", "pgm")}
    modes |= {"P": ("png", "gif", "bmp"), "RGBA": ("png", "webp", "tif"), "CMYK": ("jpg", "tif"), "1": ("png", "tif")}
    for mode, suffixes in modes.items():
        for suffix in suffixes:
            picture.convert(mode).save(folder / f"{mode}.{suffix}")
    picture.save(folder / "progressive.jpg", progressive=True)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        picture.save(folder / f"{compression}.tif", compression=compression)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "16-bit.png")


def small_model(name: str) -> Any:
    """A small model with random weights."""
    import torch

    from traj_ood.autoencoders import ConvAutoencoder, ConvNetwork, ViTMAE
    from traj_ood.autoencoders.vit_mae import build_model

    torch.manual_seed(0)
    if name == "conv":
        model: Any = ConvAutoencoder(ConvNetwork(channels=1, size=8, width=2, bottleneck=6))
    else:
        sizes = dict.fromkeys(("hidden_size", "intermediate_size", "decoder_hidden_size"), 16)
        sizes |= dict.fromkeys(("num_hidden_layers", "decoder_num_hidden_layers", "num_channels"), 1)
        sizes |= dict.fromkeys(("num_attention_heads", "decoder_num_attention_heads"), 2)
        network = build_model({**sizes, "decoder_intermediate_size": 16, "image_size": 8, "patch_size": 4})
        with torch.no_grad():  # with weights as small as they are made, f is nearly constant
            for parameter in network.parameters():
                parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
        model = ViTMAE(network)
    model.chunk = 8
    return model
