"""``traj-ood calibrate``: give an existing detector a new threshold, from new ID images and without fitting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from traj_ood.cli.base import NAME, PATH, examples, main, opening_of, set_up, shared
from traj_ood.cli.console import note, say
from traj_ood.cli.detect import check_target
from traj_ood.errors import TrajOODError

if TYPE_CHECKING:
    from traj_ood.data.images import ImageSource
    from traj_ood.detector.conformal import Calibration


@main.command(
    epilog=examples(
        "traj-ood calibrate my.detector new-camera/ --tpr 0.99 --out my-2.detector",
        "traj-ood calibrate my.detector val.txt --data-root /data --by-class --out my-2.detector",
        "traj-ood calibrate my.detector new-camera/ --out my.detector --overwrite",
    )
)
@click.argument("detector", type=NAME)
@click.argument("images", metavar="IMAGES", type=NAME)
@click.option("--tpr", type=float, default=0.95, show_default=True, help="Share of ID images to accept.")
@click.option("--by-class", is_flag=True, help="Accept that share of every class, given in the image list.")
@click.option("--out", type=PATH, required=True, help="Folder for the detector with the new threshold.")
@click.option("--overwrite", is_flag=True, help="Replace the detector in OUT, which may be DETECTOR itself.")
@shared("data_root", "follow_links")
@click.option(
    "--known",
    type=click.Choice(["raise", "skip"]),
    default="raise",
    show_default=True,
    help="What to do with images that the detector was fitted on.",
)
@shared("device", "threads", "batch_size", "workers", "on_error", "stride", "allow")
@click.option("-q", "--quiet", is_flag=True, help="Print the threshold alone.")
def calibrate(detector: str, images: str, **options: Any) -> None:
    """Give DETECTOR (a folder) a new threshold from ID images that were not used for training.

    IMAGES is a folder, an image list, tar shards and the like (see `traj-ood score`), or a benchmark, whose val split
    is used. The model, the scorer and all scores stay the same; the detector in OUT lists all its calibrations in its
    README.md. Finished batches are kept in OUT.parts until it is written, so that an interrupted run continues when
    started again.
    """
    from traj_ood.data.id_images import calibration_images
    from traj_ood.detector import Detector
    from traj_ood.detector.batch_parts import parts_beside
    from traj_ood.detector.conformal import check_count

    set_up(options["threads"])
    check_target(options["out"], options["overwrite"])
    loaded = Detector.load(Path(detector), device=options["device"])
    loaded.batch_size, loaded.workers = options["batch_size"], options["workers"]
    found = calibration_images(
        images, options["data_root"], options["follow_links"], loaded.reading, opening_of(options)
    )
    check_count(len(found), options["tpr"])
    labels = _labels(found, images, options["tpr"]) if options["by_class"] else None
    before = loaded.calibration
    on_error: Literal["raise", "skip"] = options["on_error"]
    with parts_beside(options["out"]) as parts:
        loaded.calibrate(
            found,
            options["tpr"],
            labels=labels,
            on_error=on_error,
            on_known=options["known"],
            note=images,
            parts=parts,
            quiet=options["quiet"],
        )
        loaded.save(options["out"], overwrite=options["overwrite"])
    assert loaded.calibration is not None
    say(_calibrated(loaded.calibration, before, images), kept=f"the detector is in {options['out']}")
    if not options["quiet"]:
        note(f"Written to {options['out']}")


def _labels(found: ImageSource, source: str, tpr: float) -> list[str]:
    """The class of each image, after checking that there are enough images of each class."""
    from collections import Counter

    from traj_ood.detector.conformal import check_count

    labels = list(found.labels)
    if not labels:
        raise TrajOODError(
            f"--by-class: {source} has no classes: give an image list with a class after each path, or leave it out"
        )
    for label, count in sorted(Counter(labels).items()):
        check_count(count, tpr, f" of class {label!r}")
    return labels


def _calibrated(known: Calibration, before: Calibration | None, source: str) -> str:
    accepted = int((known.scores <= known.threshold).sum())
    earlier = "none" if before is None else f"{before.threshold:.6g} of {len(before):,} images"
    classes = f", each of {len(known.names)} classes," if known.names else ""
    return (
        f"threshold {known.threshold:.6g} (before: {earlier}): accepts {accepted:,} of {len(known):,} images of "
        f"{source} ({accepted / len(known):.1%}); requested: {known.tpr:.4g} of new ID images{classes.rstrip(',')}"
    )
