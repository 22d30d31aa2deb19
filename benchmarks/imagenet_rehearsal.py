"""REHEARSAL of the imagenet-paper benchmark: python benchmarks/imagenet_rehearsal.py --images FOLDER_OR_ZIP

Takes real JPEGs, lays a handful out as OpenOOD lays out ImageNet, SUN, Places, Texture and iNaturalist, and runs the
whole evaluator on a ViT-MAE of base geometry with RANDOM weights. It shows that lists, folders, transforms, latents of
151,296 dimensions and every file of a run work together, and how long they take. The set names are labels only and the
weights know nothing, so its scores mean nothing, and none is recorded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shutil
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from engine import BASE

from traj_ood import Evaluator, RunConfig, ViTMAE, load_benchmark
from traj_ood.autoencoders.vit_mae import build_model
from traj_ood.files import write_atomic
from traj_ood.results import environment, git_commit

# Where OpenOOD keeps each role's images, and the list that names them (None: read as a folder, v1.5 has no list).
LAYOUT = {
    "train": ("images_largescale", "imagenet_1k/train/n00000000", "train_imagenet.txt"),
    "test": ("images_largescale", "imagenet_1k/val", "test_imagenet.txt"),
    "sun": ("images_largescale", "sun/images", None),
    "places": ("images_largescale", "places/images", None),
    "textures": ("images_classic", "texture/banded", "test_textures.txt"),
    "inaturalist": ("images_largescale", "inaturalist/images", "test_inaturalist.txt"),
}

SCORERS = ("trajectory", "trajectory:view=cls", "knn:k=2", "knn-paper", "mahalanobis", "reconstruction:masked=true")


def lay_out(images: list[Path], root: Path, per_set: int) -> None:
    """Copy ``per_set`` different images into each role's place and write the lists."""
    stream = iter(images)
    for role, (base, folder, image_list) in LAYOUT.items():
        lines = []
        for path in itertools.islice(stream, per_set):
            target = root / base / folder / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            lines.append(f"{folder}/{path.name} {0 if role in ('train', 'test') else -1}\n")
        if len(lines) < per_set:
            raise SystemExit(f"expected at least {per_set * len(LAYOUT)} JPEGs, got {len(images)}")
        if image_list:
            path = root / "benchmark_imglist" / "imagenet" / image_list
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder or zip file of JPEGs")
    parser.add_argument("--per-set", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/rehearsal.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.images
        if folder.is_file():
            folder = Path(scratch) / "unzipped"
            zipfile.ZipFile(arguments.images).extractall(folder)
        root = Path(scratch) / "openood"
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg"))
        lay_out(found, root, arguments.per_set)
        torch.manual_seed(0)
        began = time.perf_counter()
        evaluator = Evaluator(
            ViTMAE(build_model(BASE), name="random-vit-mae-base"),
            load_benchmark("imagenet-paper", root),
            RunConfig(SCORERS, attractors=arguments.per_set, max_steps=arguments.max_steps, resamples=0),
            out=Path(scratch) / "runs",
        )
        result = evaluator.run()
        seconds = time.perf_counter() - began
        written = sorted(p.name for p in evaluator.folder.iterdir())
    record = {
        "what": "REHEARSAL with random weights on a handful of images: times and counts only, no scores",
        "benchmark": result.benchmark,
        "model": result.model,
        "images": {name: entry["count"] for name, entry in result.data.items()},
        "max_steps": arguments.max_steps,
        "scorers": sorted(result.scorers),
        "written": written,
        "dictionary_warnings": result.dictionary["warnings"],
        "seconds": result.seconds | {"total": round(seconds, 1)},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "versions": result.versions | environment(),
        "commit": git_commit(Path(__file__).parent),
    }
    write_atomic(arguments.out, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    print(json.dumps(record, indent=2, sort_keys=True))


if __name__ == "__main__":
    main()
