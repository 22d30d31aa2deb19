"""``traj-ood train``: train an autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from traj_ood.cli.base import (
    NAME,
    PATH,
    device_option,
    examples,
    follow_links_option,
    main,
    one_line_errors,
    quiet_option,
    reading_of,
    reading_options,
    set_up,
    threads_option,
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
@click.option("--data-root", type=PATH, help="Folder of the benchmark's images.")
@follow_links_option
@reading_options
@device_option
@threads_option
@click.option("--fresh", is_flag=True, help="Discard an earlier checkpoint in OUT instead of resuming from it.")
@quiet_option
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
    """Train an autoencoder on a benchmark's ID training split, configured by CONFIG (a YAML file or a bundled name).

    Resumes from the checkpoint in OUT if there is one. OUT can then be given to `traj-ood bench --model`.
    """
    from traj_ood.detector import refuse_inside
    from traj_ood.dynamics.device import resolve_device
    from traj_ood.training.autoencoder import train_model
    from traj_ood.training.config import TrainConfig

    set_up(threads)
    refuse_inside(out)
    settings = TrainConfig.load(config)
    reading = reading_of(exif, bit_depth)
    train_model(settings, out, data_root=data_root, reading=reading, device=resolve_device(device), **options)
    note(f"Written to {out}")
