"""``traj-ood diagnose`` and ``list``: diagnose the attractors of a model; list all names."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from traj_ood.cli.base import NAME, PATH, SEED, autoencoder_of, examples, main, opening_of, reading_of, set_up, shared
from traj_ood.cli.console import note, say


@main.command(
    epilog=examples(
        "traj-ood diagnose fashion-mae --benchmark fashion",
        "traj-ood diagnose runs/my-mae --benchmark my-images.yaml --images 2000 --out runs/my-diagnosis",
    )
)
@click.argument("model", type=NAME)
@click.option("--benchmark", type=NAME, required=True, help="Source of the ID images: a name or a YAML file.")
@shared("data_root", "follow_links", "exif", "bit_depth", "stride", "allow", "input_size")
@click.option("--images", type=int, default=500, show_default=True, help="Most training and held-out images.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the training sample and the noise.")
@shared("tol", "max_steps", "device", "threads")
@click.option("--out", type=PATH, help="Folder.  [default: runs/<benchmark>--<model>--diagnosis]")
@shared("quiet")
def diagnose(model: str, benchmark: str, data_root: Path | None, out: Path | None, **options: Any) -> None:
    """Diagnose whether scores against the attractors of MODEL are meaningful, and if not, why and what to do.

    Reads ID images only. Writes diagnosis.json, residual curves and pictures of the attractors to OUT, and ends with
    exit code 1 if such scores would be meaningless.
    """
    from traj_ood.data import load_benchmark
    from traj_ood.dynamics.device import resolve_device
    from traj_ood.evaluation.diagnose import FILE_NAME
    from traj_ood.evaluation.diagnose import diagnose as run_diagnosis
    from traj_ood.io.files import check_can_write
    from traj_ood.io.sealed import refuse_inside

    set_up(options["threads"])
    if out is not None:
        refuse_inside(out)
    check_can_write(out or Path("runs"), FILE_NAME)  # before hours of work; the default's name comes from the model
    reading, opening = reading_of(options["exif"], options["bit_depth"]), opening_of(options)
    data = load_benchmark(benchmark, data_root, follow_links=options["follow_links"], reading=reading, opening=opening)
    device = resolve_device(options["device"])
    autoencoder = autoencoder_of(model, data, device, options["input_size"], quiet=options["quiet"])
    settings = {key: options[key] for key in ("images", "seed", "tol", "max_steps", "quiet")}
    found = run_diagnosis(autoencoder, data, **settings)
    folder = out or Path("runs") / f"{data.name}--{re.sub('[/:]', '-', autoencoder.name)}--diagnosis"
    found.save(folder)
    say(found.report(), kept=f"all results are in {folder}")
    note(f"Written to {folder}")
    if not found.meaningful:
        sys.exit(1)


@main.command("list", epilog=examples("traj-ood list", "traj-ood list scorers"))
@click.argument("what", type=click.Choice(["benchmarks", "scorers", "models", "all"]), default="all")
def list_(what: str) -> None:
    """List benchmarks, scorers and models by name."""
    from traj_ood.io.extensions import load_plugins

    if what in ("benchmarks", "all"):
        from traj_ood.data import list_benchmarks

        _section("benchmarks", [(b.name, f"{b.summary}; needs {b.needs}") for b in list_benchmarks()])
    if what in ("scorers", "all"):
        from traj_ood.scorers import RECOMMENDED, SCORERS

        load_plugins("traj_ood.scorers")
        _section("scorers", [(name, f"{c.summary}; options {c().options()}") for name, c in SCORERS.items()])
        _section("recommended", [(f"on {kind}s", found.scorer) for kind, found in RECOMMENDED.items()])
    if what in ("models", "all"):
        from traj_ood.autoencoders import FAMILIES, MODELS
        from traj_ood.backbones import LIBRARIES
        from traj_ood.training.config import CONFIGS

        load_plugins("traj_ood.models")
        _section("models", [(name, info.summary) for name, info in sorted(MODELS.items())])
        _section("model families", [(name, family.summary) for name, family in sorted(FAMILIES.items())])
        _section("backbone libraries", [(name, library.summary) for name, library in sorted(LIBRARIES.items())])
        heads = {path.stem: path.read_text(encoding="utf-8").partition("\n")[0] for path in CONFIGS.glob("*.yaml")}
        told = [(name, head.lstrip("# ").partition(": ")[0]) for name, head in sorted(heads.items())]
        _section(f"training configs, files in {CONFIGS}", told)


def _section(title: str, rows: list[tuple[str, str]]) -> None:
    say("\n".join([f"{title}:", *(f"  {name:<18} {text}" for name, text in rows)]))
