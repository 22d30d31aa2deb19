"""``traj-ood export``: write a detector as one file for other runtimes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from traj_ood.cli.base import PATH, examples, main, set_up, shared
from traj_ood.cli.console import say, warn
from traj_ood.errors import TrajOODError

if TYPE_CHECKING:
    from torch import Tensor

    from traj_ood.autoencoders import Autoencoder
    from traj_ood.export import Exported

_MAX_COMPARED = 32  # images


@main.command(
    "export",
    epilog=examples(
        "traj-ood export runs/detector --format onnx --out detector.onnx",
        "traj-ood export runs/detector --format torch --out detector.pt2 --images photos",
        "traj-ood export runs/trajectory-detector --format onnx --out detector.onnx --steps 16",
    ),
)
@click.argument("detector", type=PATH)
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", "torch"]),
    required=True,
    help="onnx for ONNX Runtime; torch for torch.export.load, which is safe only for files that you trust.",
)
@click.option("--out", type=PATH, required=True, help="File to write, usually .onnx or .pt2.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--steps", type=int, help="Evaluations of f.  [default: as many as the scorer reads]")
@click.option(
    "--images",
    type=PATH,
    help="Folder whose first 32 images are compared.  [default: scikit-image's photographs and textures]",
)
@shared("threads")
def export(
    detector: Path, form: str, out: Path, overwrite: bool, steps: int | None, images: Path | None, threads: int | None
) -> None:
    """Write DETECTOR (a folder) as one file that takes images (B, C, H, W) and returns scores.

    Pixels are float32 in [0, 1]; the file includes normalisation, network, attractors and scorer, and the threshold in
    its metadata. An ONNX file of a calibrated detector also returns p-values and decisions (0 ok, 1 ood, 2 invalid: a
    pixel is NaN or outside [0, 1]). The file is compared with the detector before it is kept.
    """
    from traj_ood.data.preprocessing import Normalised
    from traj_ood.detector import Detector
    from traj_ood.export import export_detector

    set_up(threads)
    if os.path.exists(out) and not overwrite:
        raise TrajOODError(f"{out}: exists already; choose another --out, or replace it with --overwrite")
    loaded = Detector.load(detector, device="cpu")
    compared = Normalised(_images(loaded.autoencoder, images)) if images is not None else None
    made = export_detector(loaded, out, form, steps=steps, images=compared)  # type: ignore[arg-type]
    say("\n".join(_report(made)), kept=f"the file is {made.path}")
    if loaded.calibration is not None and made.metadata["calibration"] is None:
        warn(
            "the detector's threshold holds for another number of steps and is not in the file: fit and calibrate a "
            "scorer whose horizon is this number of steps"
        )


def _images(autoencoder: Autoencoder, folder: Path) -> Tensor:
    import torch

    from traj_ood.data.images import read_folder

    found = read_folder(folder)
    return torch.stack([autoencoder.transform(found.load(i)) for i in range(min(_MAX_COMPARED, len(found)))])


def _report(made: Exported) -> list[str]:
    from traj_ood.export import ALLOWED

    what, found = made.metadata, made.agreement
    own = what["scorer"]["is_fitted"]
    other = f"{what['scorer']['label']} in Python, which is not the detector's own {what['scorer']['fitted']},"
    shape = ", ".join(map(str, what["input"]["shape"][1:]))
    threshold = what["calibration"]["threshold"] if what["calibration"] else None
    return [
        f"{what['scorer']['label']} on {what['model']['name']}, {what['steps']} evaluation(s) of f: "
        f"images (B, {shape}) float32 in [0, 1] -> {', '.join(what['outputs'])} (B,) {what['output']['dtype']}",
        f"Agrees with {'the detector' if own else other} on {found.images} images: largest relative difference "
        f"{found.difference:.1e} (allowed {ALLOWED:.0e})",
        f"Latency: {found.one[0]:.1f} ms for one image (detector {found.one[1]:.1f}), {found.many[0]:.1f} ms for "
        f"{found.images} (detector {found.many[1]:.1f})",
        f"Threshold: {f'{threshold:.6g}' if threshold is not None else 'none'}",
        f"Written to {made.path}, {made.size / 1e6:.1f} MB",
    ]
