"""``traj-ood train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from traj_ood.cli.base import (
    NAME,
    PATH,
    THREADS,
    examples,
    main,
    one_line_errors,
    reading_of,
    reading_options,
    silence_libraries,
)
from traj_ood.cli.console import note


@main.command(
    epilog=examples(
        "traj-ood train fashion-mae --out runs/fashion-mae",
        "traj-ood train my-config.yaml --out runs/my-mae --device cuda",
    )
)
@click.argument("config", type=NAME)
@click.option("--out", type=PATH, required=True, help="Folder for model, log and checkpoint.")
@click.option("--data-root", type=PATH, help="Where the benchmark's images are.")
@click.option("--follow-links", is_flag=True, help="Let image lists reach out of their root by links.")
@reading_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--threads", type=THREADS, help="CPU threads that compute.  [default: all]")
@click.option("--fresh", is_flag=True, help="Discard an earlier checkpoint in OUT instead of resuming from it.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bars; for logs.")
@one_line_errors
def train(
    config: str,
    out: Path,
    data_root: Path | None,
    exif: bool,
    bit_depth: str | None,
    device: str,
    threads: int | None,
    **options: Any,
) -> None:
    """Train an autoencoder on a benchmark's ID training split as CONFIG says (a YAML file or a bundled name).

    Resumes from the checkpoint in OUT when there is one. OUT can then be given to `traj-ood bench --model`.
    """
    import torch

    from traj_ood.detector import refuse_inside
    from traj_ood.dynamics.device import resolve_device
    from traj_ood.training.autoencoder import train_model
    from traj_ood.training.config import TrainConfig

    silence_libraries()
    refuse_inside(out)
    if threads:
        torch.set_num_threads(threads)
    settings = TrainConfig.load(config)
    reading = reading_of(exif, bit_depth)
    train_model(settings, out, data_root=data_root, reading=reading, device=resolve_device(device), **options)
    note(f"Written to {out}")
