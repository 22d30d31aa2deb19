"""``traj-ood train``: train an autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from traj_ood.cli.base import NAME, PATH, examples, main, opening_of, reading_of, set_up, shared
from traj_ood.cli.console import note


@main.command(
    epilog=examples(
        "traj-ood train fashion-mae --out runs/fashion-mae",
        "traj-ood train my-config.yaml --out runs/my-mae --device cuda",
    )
)
@click.argument("config", type=NAME)
@click.option(
    "--out",
    type=PATH,
    required=True,
    help="Folder for model, log and checkpoint: new, empty, or of an unfinished training.",
)
@shared("data_root", "follow_links", "exif", "bit_depth", "stride", "allow", "device", "threads")
@click.option("--fresh", is_flag=True, help="Discard an earlier checkpoint or model in OUT.")
@shared("quiet")
def train(config: str, out: Path, **options: Any) -> None:
    """Train an autoencoder on a benchmark's ID training split, configured by CONFIG (a YAML file, or a
    bundled name from `traj-ood list models`).

    Resumes from the checkpoint in OUT if there is one. OUT can then be given to `traj-ood bench --model`.
    """
    from traj_ood.dynamics.device import resolve_device
    from traj_ood.io.sealed import refuse_inside
    from traj_ood.training.autoencoder import train_model
    from traj_ood.training.config import TrainConfig

    set_up(options["threads"])
    refuse_inside(out)
    settings = TrainConfig.load(config)
    train_model(
        settings,
        out,
        reading=reading_of(options["exif"], options["bit_depth"]),
        opening=opening_of(options),
        device=resolve_device(options["device"]),
        **{key: options[key] for key in ("data_root", "follow_links", "fresh", "quiet")},
    )
    note(f"Written to {out}")
