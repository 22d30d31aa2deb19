"""``traj-ood bench``: run a benchmark."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from traj_ood.cli.base import NAME, PATH, SEED, autoencoder_of, examples, main, opening_of, reading_of, set_up, shared
from traj_ood.cli.console import note, say, warn
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.parallel import Team

if TYPE_CHECKING:
    from traj_ood.evaluation.evaluator import Evaluator, RunConfig

_FEW = 20
"""Number of images of a set from which 5 % is at least one, and FPR95 more than the rank of its outermost image."""


@main.command(
    epilog=examples(
        "traj-ood bench fashion --quick",
        "traj-ood bench fashion --scorers trajectory,knn:k=5,mahalanobis --attractors 500",
        "traj-ood bench imagenet-paper --model vit-mae-base --data-root /data/openood --device cuda",
        "traj-ood bench imagenet --model timm:vit_base_patch16_224 --data-root /data/openood --device cuda",
        "torchrun --nproc_per_node 2 -m traj_ood bench fashion",
        "traj-ood bench my-images.yaml --model runs/my-mae --on-error skip --quiet",
    )
)
@click.argument("benchmark", type=NAME)
@click.option(
    "--model",
    default="fashion-mae",
    show_default=True,
    help="Name, local folder or hub name of an autoencoder; or a backbone such as timm:<name> or openood:<network>:"
    "<checkpoint> (see `traj-ood list models`), for which a surrogate autoencoder is trained on its features of the ID "
    "training split, and cached.",
)
@click.option("--scorers", default="all", show_default=True, help="Comma-separated, options as name:key=value.")
@click.option("--attractors", type=int, help="ID training images to fit on.  [default: the benchmark's protocol]")
@click.option("--per-set", type=int, help="Most images per test and OOD set.  [default: the benchmark's protocol]")
@click.option("--quick", is_flag=True, help="Short for --attractors 1000 --per-set 300.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the training sample.")
@shared("tol", "max_steps")
@click.option("--mask-ratio", type=float, help="Fixed mask of a ViT-MAE.  [default: none]")
@click.option("--mask-seed", type=SEED, help="Seed of that mask.  [default: 0]")
@click.option("--bootstrap", type=int, default=500, show_default=True, help="Resamples for 95 % intervals; 0 for none.")
@shared("data_root", "follow_links")
@click.option("--allow-missing", is_flag=True, help="Omit missing OOD sets; the benchmark's name ends in -partial.")
@shared("exif", "bit_depth", "stride", "allow", "input_size")
@click.option("--out", type=PATH, default=Path("runs"), show_default=True, help="Results folder.")
@shared("device", "batch_size", "workers", "threads")
@click.option("--tf32/--no-tf32", default=False, show_default=True, help="Faster, coarser products on NVIDIA GPUs.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="bf16 takes the first steps of a test image in bfloat16 and the rest in fp32; attractors are always fp32. "
    "Scores over the whole path can differ.",
)
@shared("compile")
@click.option("--index", type=click.Choice(["auto", "faiss", "torch"]), default="auto", show_default=True)
@click.option(
    "--approximate",
    type=click.Choice(["none", "ivf", "hnsw"]),
    default="none",
    show_default=True,
    help="Allow an approximate search among 100,000 attractors or more.",
)
@shared("on_error")
@click.option(
    "--control/--no-control",
    default=None,
    help="Add a row for what the image files alone give away (spectrum, blockiness, size); reads every image once more."
    "  [default: on tiny-imagenet, imagenet-sample, cifar10 and cifar100]",
)
@click.option(
    "--on-duplicates",
    type=click.Choice(["error", "warn"]),
    help="What to do if training, test and OOD sets share images: files with the same bytes, whatever their names. An "
    "image that was saved again is not recognised.  [default: warn of up to 1 % of a set, error beyond]",
)
@click.option(
    "--fresh",
    is_flag=True,
    help="Discard an earlier run in the run's folder and ignore all caches: images are hashed, features extracted and "
    "a surrogate trained again.",
)
@click.option(
    "--plots",
    type=click.Choice(["none", "png", "svg", "pdf"]),
    default="png",
    show_default=True,
    help="Figures of the run: all scorers, the dynamics, and scores of the best ones. --no-plots is short for none.",
)
@click.option(
    "--plot-size",
    type=click.Choice(["screen", "one-column", "two-columns"]),
    default="screen",
    show_default=True,
    help="Width of the figures; for the columns of a paper, 3.4 or 7 inches, without titles.",
)
@click.option("--no-plots", is_flag=True, hidden=True)
@click.option(
    "--log",
    "trackers",
    multiple=True,
    type=NAME,
    metavar="KIND:TARGET",
    help="Log the finished run to a tracker: mlflow:FOLDER|URL, wandb:PROJECT, tensorboard:FOLDER. Repeatable.",
)
@click.option("--no-pictures", is_flag=True, help="Keep no thumbnails, paths and frames for `traj-ood report`.")
@shared("quiet")
def bench(benchmark: str, **options: Any) -> None:
    """Run BENCHMARK (a name from `traj-ood list benchmarks`, or a YAML file) and print its leaderboard.

    Writes result.json, scores.parquet (per image), curves.parquet, the attractors, plots and pictures for `traj-ood
    report` to OUT/<benchmark>--<model>--seed<k>/. An interrupted run continues where it stopped when started again;
    one that an unreadable image has ended does so with --on-error skip, too.

    An image's score is independent of its batch and position to 1e-9, relative, and the same batches on the same
    machine give identical bits. What another processor or number of threads changes is in docs/reliability.md.
    """
    from traj_ood.evaluation.leaderboard_text import render
    from traj_ood.evaluation.plots import plot_run
    from traj_ood.evaluation.tracking import log_result, tracker
    from traj_ood.io.sealed import refuse_inside

    set_up(options["threads"])
    refuse_inside(options["out"])
    team = Team.join()
    trackers = [tracker(spec) for spec in options["trackers"]] if team.is_main else []
    with team.together():
        evaluator = _evaluator(benchmark, options, team)
        result = evaluator.run(fresh=options["fresh"])
    if not team.is_main:
        return
    if not options["no_plots"] and options["plots"] != "none":
        plot_run(evaluator.folder, options["quiet"], options["plots"], options["plot_size"])
    say(render([result]), kept=f"all results are in {evaluator.folder}")
    for found in trackers:
        log_result(result, evaluator.folder, found)
    sizes = {name: data["count"] for name, data in result.data.items() if data["role"] not in ("train", "val")}
    if few := [f"{name} {size}" for name, size in sorted(sizes.items()) if size < _FEW]:  # a stored run is sorted, too
        warn(f"few images ({', '.join(few)}): FPR95 is read at 5 % of a set, less than one image; give {_FEW} or more")
    if result.failures:
        warn(f"{len(result.failures)} image(s) skipped, see {evaluator.folder}")
    note(f"Written to {evaluator.folder}")


def _evaluator(benchmark: str, options: dict[str, Any], team: Team) -> Evaluator:
    """The evaluator of a `bench` command, with its data, model (a surrogate for a backbone) and settings."""
    from traj_ood.backbones import is_backbone_spec
    from traj_ood.backbones.feature_cache import FeatureCache
    from traj_ood.data import load_benchmark
    from traj_ood.dynamics.device import resolve_device
    from traj_ood.evaluation.evaluator import Evaluator
    from traj_ood.io.files import cache_folder

    config = _run_config(options)
    quiet = options["quiet"] or not team.is_main
    if not quiet:
        note(f"Loading {options['model']} and the image lists of {benchmark}")
    reading = reading_of(options["exif"], options["bit_depth"])
    data = load_benchmark(
        benchmark,
        options["data_root"],
        follow_links=options["follow_links"],
        reading=reading,
        allow_missing=options["allow_missing"],
        opening=opening_of(options),
    )
    device = resolve_device(team.device(options["device"]), tf32=options["tf32"])
    model_options = {k: options[k] for k in ("mask_ratio", "mask_seed") if options[k] is not None}
    backbone = is_backbone_spec(options["model"])
    if backbone and model_options:
        raise TrajOODError(
            f"--mask-ratio and --mask-seed apply to a ViT-MAE, not to {options['model']}: leave them out"
        )
    settings = {key: options[key] for key in ("workers", "on_error")} | {"quiet": quiet}
    settings["fresh"] = options["fresh"] and team.is_main  # the other processes use the main process's result
    asked = options["model"], data, device, options["input_size"]
    model = team.main_first(lambda: autoencoder_of(*asked, model_options, **settings))
    return Evaluator(
        autoencoder=model,
        benchmark=data,
        config=config,
        out=options["out"],
        batch_size=options["batch_size"],
        workers=options["workers"],
        backend=options["index"],
        quiet=quiet,
        command="traj-ood " + shlex.join(sys.argv[1:]),
        cache=FeatureCache(cache_folder() / "features") if backbone else None,
        team=team,
        pictures=not options["no_pictures"],
        on_duplicates=options["on_duplicates"],
    )


def _run_config(options: dict[str, Any]) -> RunConfig:
    from traj_ood.evaluation.evaluator import RunConfig

    quick = {"attractors": 1000, "per_set": 300} if options["quick"] else {}
    return RunConfig(
        scorers=tuple(s for s in options["scorers"].split(",") if s.strip()),
        attractors=quick.get("attractors") if options["attractors"] is None else options["attractors"],
        per_set=quick.get("per_set") if options["per_set"] is None else options["per_set"],
        resamples=options["bootstrap"],
        **{key: options[key] for key in ("seed", "tol", "max_steps", "precision", "approximate")},
        **{key: options[key] for key in ("on_error", "control", "compile")},
    )
