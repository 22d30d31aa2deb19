"""``traj-ood fit`` and ``score``: fit a detector, and score images with it."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from traj_ood.cli.base import (
    BIT_DEPTH,
    NAME,
    PATH,
    SEED,
    autoencoder_of,
    examples,
    main,
    opening_of,
    reading_of,
    set_up,
    shared,
)
from traj_ood.cli.console import note, say, warn
from traj_ood.errors import TrajOODError

if TYPE_CHECKING:
    import torch

    from traj_ood.autoencoders import Autoencoder
    from traj_ood.data import Benchmark, Reading, Split
    from traj_ood.data.id_images import IDImages
    from traj_ood.detector import Detector
    from traj_ood.stream import Entry, Tally

_SHOWN = 3  # sources in a warning
_FAILED = 3  # exit code: every image has a row, some of them an error


@main.command(
    epilog=examples(
        "traj-ood fit fashion --model fashion-mae --out fashion.detector",
        "traj-ood fit my-images/ --model facebook/vit-mae-base --out my.detector --tpr 0.99",
        "traj-ood fit train.txt --data-root /data --model timm:resnet50 --scorer mahalanobis --calibrate val/ --out d",
    )
)
@click.argument("source", metavar="IMAGES", type=NAME)
@click.option(
    "--model", type=NAME, required=True, help="As in `traj-ood bench`; a backbone's surrogate is trained on IMAGES."
)
@click.option(
    "--scorer", help="Name, with options as name:key=value.  [default: the one recommended for the kind of model]"
)
@click.option("--images", "count", type=int, help="Images to fit on.  [default: the benchmark's protocol, or all]")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of that sample and of the held-out images.")
@click.option(
    "--calibrate",
    "calibration",
    type=NAME,
    metavar="FOLDER|LIST",
    help="ID images on which neither the detector nor the model was trained.  [default: the benchmark's val split, "
    "else a fifth of IMAGES, held out; at most 2,000]",
)
@click.option("--tpr", type=float, default=0.95, show_default=True, help="Share of ID images to accept.")
@shared("data_root", "follow_links", "exif", "bit_depth", "input_size", "tol", "max_steps")
@click.option("--out", type=PATH, required=True, help="Folder for the detector.")
@click.option("--overwrite", is_flag=True, help="Replace the detector in OUT.")
@shared("device", "threads", "compile", "batch_size", "workers", "on_error", "quiet", "stride", "allow")
def fit(source: str, **options: Any) -> None:
    """Fit a detector on in-distribution IMAGES: a folder, an image list, or a benchmark's name or YAML file.

    The scorer is fitted on one part of the images, and the threshold and p-values are calibrated on another part. No
    OOD images are used. Finished batches are kept in OUT.parts until the detector is written, so that an interrupted
    run continues when started again.
    """
    from traj_ood.data.id_images import choose_id_images
    from traj_ood.detector import Detector
    from traj_ood.detector.batch_parts import parts_beside
    from traj_ood.detector.conformal import check_count, images_needed
    from traj_ood.dynamics.device import resolve_device

    set_up(options["threads"])
    check_target(options["out"], options["overwrite"])
    device, on_error = resolve_device(options["device"]), options["on_error"]
    chosen = choose_id_images(
        source,
        count=options["count"],
        seed=options["seed"],
        calibration=options["calibration"],
        least=images_needed(options["tpr"]),
        root=options["data_root"],
        follow_links=options["follow_links"],
        reading=reading_of(options["exif"], options["bit_depth"]),
        opening=opening_of(options),
    )
    check_count(len(chosen.calibration), options["tpr"])  # before anything is computed
    settings = ("tol", "max_steps", "compile", "batch_size", "workers", "on_error", "quiet")
    with parts_beside(options["out"]) as parts:
        detector = Detector.fit(
            _model(options, chosen, device),
            chosen.fit,
            options["scorer"],
            parts=parts,
            **{key: options[key] for key in settings},
        )
        if not options["quiet"]:
            note(f"Calibrating on {len(chosen.calibration):,} {chosen.origin}")
        # Data sets contain duplicates, so that a held-out image may also be among those fitted on.
        on_known: Literal["raise", "skip"] = "raise" if options["calibration"] else "skip"
        detector.calibrate(
            chosen.calibration,
            options["tpr"],
            on_error=on_error,
            on_known=on_known,
            parts=parts,
            quiet=options["quiet"],
        )
        detector.save(options["out"], overwrite=options["overwrite"])
    say(_fitted(detector, chosen, source), kept=f"the detector is in {options['out']}")
    note(f"Written to {options['out']}")


def check_target(out: Path, overwrite: bool) -> None:
    """Check, before anything is computed, that a detector can be saved to ``out``."""
    from traj_ood.detector import FILE_NAME, refuse_inside
    from traj_ood.io.files import check_can_write

    refuse_inside(out.absolute().parent)
    is_detector = (out / FILE_NAME).is_file()
    if is_detector and not overwrite:
        raise TrajOODError(f"{out}: has a detector already; choose another --out, or replace it with --overwrite")
    if not is_detector and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise TrajOODError(f"{out}: expected a new or empty folder, or a detector to replace; choose another --out")
    check_can_write(out)


def _fitted(detector: Detector, chosen: IDImages, source: str) -> str:
    """A summary of the detector, with the share of the calibration images that it accepts."""
    training, known = detector.training, detector.calibration
    assert known is not None
    count, accepted = len(known), int((known.scores <= known.threshold).sum())
    skipped = f" ({training['skipped']} could not be read)" if training["skipped"] else ""
    return (
        f"{detector.scorer.label} on {detector.autoencoder.name}: fitted on {training['images']:,} images of "
        f"{source}{skipped}\n"
        f"threshold {known.threshold:.6g}: accepts {accepted:,} of {count:,} {chosen.origin} ({accepted / count:.1%}); "
        f"requested: {known.tpr:.4g} of new ID images"
    )


def _model(options: dict[str, Any], chosen: IDImages, device: torch.device) -> Autoencoder:
    """The autoencoder, or the surrogate of a backbone, which is never trained on the calibration images."""
    from traj_ood.data import Split

    train = cast("Benchmark", _TrainingSplit(chosen.name, Split("train", "train", chosen.train)))
    settings = {key: options[key] for key in ("workers", "on_error", "quiet")}
    return autoencoder_of(options["model"], train, device, options["input_size"], **settings)


@dataclass(frozen=True)
class _TrainingSplit:
    """A benchmark without test split and OOD sets, with the attributes that :func:`surrogate_for` reads."""

    name: str
    train: Split
    how_to_get: str = ""

    def splits(self) -> list[Split]:
        return [self.train]


@main.command(
    epilog=examples(
        "traj-ood score fashion.detector photo.png more-photos/ --out scores.csv",
        "find /data -name '*.jpg' -print0 | traj-ood score my.detector --null - --out scores.parquet",
        "traj-ood score my.detector /data/huge --out scores.jsonl --resume",
        "traj-ood score my.detector --list lists/test.txt --root /data | grep ,ood,",
    )
)
@click.argument("detector", type=NAME)
@click.argument("sources", nargs=-1, metavar="[FILES|FOLDERS|-]...")
@click.option(
    "--list", "list_path", type=NAME, help="Image list, `relative/path label` per line; read after FILES and FOLDERS."
)
@click.option(
    "--root",
    type=NAME,
    help="Folder to which the list's paths are relative, and which they may not leave.  [default: the list's folder]",
)
@click.option("--null", is_flag=True, help="Paths on standard input end in NUL bytes, as from find -print0.")
@click.option("--follow-links", is_flag=True, help="Follow links that lead out of their folder or out of the root.")
@click.option(
    "--exif/--no-exif", default=None, help="Rotate photographs according to EXIF.  [default: as for DETECTOR's images]"
)
@click.option("--bit-depth", type=BIT_DEPTH, help="Used bits in 16-bit files.  [default: as for DETECTOR's images]")
@click.option("--out", type=PATH, help="File to write.  [default: standard output]")
@click.option(
    "--format", type=click.Choice(["csv", "jsonl", "parquet"]), help="[default: by the suffix of --out, else csv]"
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the unfinished file of an interrupted run, if there is one.",
)
@click.option("--overwrite", is_flag=True, help="Start again, and replace --out at the end.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: on the cluster at RAY_ADDRESS, else on this machine; --out is a folder of Parquet files.",
)
@shared("quote_formulas", "device", "threads", "compile", "batch_size", "workers")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@shared("stride", "allow")
def score(detector: str, sources: tuple[str, ...], **options: Any) -> None:
    """Score images with DETECTOR (a folder written by `traj-ood fit`): files, folders, - for paths on standard input,
    tar shards (a-{00..09}.tar), Parquet with a column of images, hf:NAME@SPLIT, videos, addresses that --allow permits.

    Writes one row per image, in order: path, score (higher = more OOD), p_value, decision (id or ood), steps, status,
    error, content (a digest of the file, by which --resume recognises changed files), reason (ok, ood or invalid: …).
    An image that cannot be judged has a row with the reason; the run continues and ends with exit code 3. Folders are
    searched recursively, without hidden files.

    --out is written as OUT.part and renamed at the end, so that a file of that name is always complete. For Parquet,
    OUT.part has JSON lines.

    An image's score is independent of its batch and position to 1e-9, relative, and the same batches on the same
    machine give identical bits. What another processor or number of threads changes is in docs/reliability.md.
    """
    check_sources(sources, options)
    twice = _given_twice(sources)
    if twice:
        more = f" and {len(twice) - _SHOWN} more" if len(twice) > _SHOWN else ""
        warn(f"{', '.join(twice[:_SHOWN])}{more}: given twice, or within another source: such images have several rows")
    if options["engine"] == "ray":
        score_on_ray(detector, sources, options)
        return
    try:
        tally = _score(detector, sources, options)
    except KeyboardInterrupt:
        part = Path(f"{options['out']}.part")
        kept = f"; rows so far are in {part}: continue with --resume" if part.exists() else ""
        note(f"traj-ood: interrupted{kept}")
        sys.exit(130)
    if tally.failed:
        if not options["quiet"]:
            warn(f"{tally.failed} image(s) failed, see the column error")
        sys.exit(_FAILED)


def _score(folder: str, sources: tuple[str, ...], options: dict[str, Any]) -> Tally:
    from tqdm import tqdm

    from traj_ood.data.images import left_out
    from traj_ood.detector import Detector, refuse_inside
    from traj_ood.stream import open_table, write_scores

    set_up(options["threads"])
    resume, out = options["resume"], options["out"]
    if out is not None:
        refuse_inside(out.parent)
    asked = {key: options[key] for key in ("format", "resume", "overwrite", "quote_formulas")}
    with open_table(out, **asked) as table:
        detector = Detector.load(Path(folder), device=options["device"], compile=options["compile"])
        detector.reading = _reading(detector.reading, options)
        if detector.calibration is None:
            warn(f"{folder} is not calibrated: p_value and decision stay empty")
        others: dict[str, Counter[str]] = {}
        began = time.perf_counter()
        # On a terminal, rows and a progress bar would overwrite each other.
        silent = options["quiet"] or (out is None and sys.stdout.isatty())
        with tqdm(unit="img", delay=2, disable=silent, dynamic_ncols=True, leave=False) as bar:
            tally, earlier = write_scores(
                detector,
                _entries(sources, options, others),
                table,
                resume=resume,
                batch_size=options["batch_size"],
                workers=options["workers"],
                on_rows=lambda rows: bar.update(len(rows)),
            )
    for source, found in others.items():
        if found:
            warn(left_out(source, found))
    if not options["quiet"]:
        note(_summary(tally, earlier, time.perf_counter() - began, out))
    return tally


def score_on_ray(detector: str, sources: tuple[str, ...], options: dict[str, Any]) -> None:
    """Score with ``--engine ray``, into a folder."""
    from traj_ood.data import Reading
    from traj_ood.data.records import is_records
    from traj_ood.detector import FILE_NAME, SCHEMA
    from traj_ood.distributed import read_rows_of, score_to
    from traj_ood.distributed.engine import Workers
    from traj_ood.io.sealed import open_sealed

    out = options["out"]
    if out is None or options["format"] not in (None, "parquet") or options["overwrite"]:
        raise TrajOODError("--engine ray: expected --out with a new folder, or --resume, for Parquet files")
    if options["compile"]:
        raise TrajOODError("--compile: expected --engine local, got ray, whose workers compute f itself: leave it out")
    records = [source for source in sources if is_records(source)]
    if records and (len(records) < len(sources) or options["list_path"]):
        raise TrajOODError("--engine ray: expected sources of records or of files, got both: score them separately")
    given: Any = records or _entries(sources, options, {})
    workers = Workers(threads=options["threads"] or 1, batch=options["batch_size"])
    own = Reading(**open_sealed(Path(detector).expanduser(), FILE_NAME, SCHEMA)["training"].get("reading", {}))
    asked = _reading(own, options)
    read = None if asked == own else asked.options()
    score_to(out, given, detector, resume=options["resume"], workers=workers, opening=opening_of(options), reading=read)
    rows = read_rows_of(out)
    failed = int((rows["status"] == "error").sum())
    if not options["quiet"]:
        note(f"{len(rows):,} rows in {out}, {failed:,} of images that failed")
    if failed:
        sys.exit(_FAILED)


def _reading(own: Reading, options: dict[str, Any]) -> Reading:
    """The detector's reading, changed by the given options."""
    exif = own.exif if options["exif"] is None else options["exif"]
    return reading_of(exif, options["bit_depth"] or (str(own.bit_depth) if own.bit_depth else None))


def _summary(tally: Tally, earlier: Tally, seconds: float, out: Path | None) -> str:
    new = tally.count - earlier.count
    text = f"{new:,} images in {seconds:.1f} s ({new / max(seconds, 1e-9):.1f} images/s)"
    text += f", after {earlier.count:,} of an earlier run" if earlier.count else ""
    return text if out is None else f"{text}; written to {out}"


def check_sources(sources: tuple[str, ...], options: dict[str, Any]) -> None:
    if not sources and options["list_path"] is None:
        raise TrajOODError("nothing to score: expected files, folders, - for paths on standard input, or --list")
    if sources.count("-") > 1:
        raise TrajOODError("standard input (-) can be read only once: leave the others out")
    if options["root"] is not None and options["list_path"] is None:
        raise TrajOODError("--root applies to --list: give a list, or leave it out")
    if options["list_path"] is not None and not os.path.exists(options["list_path"]):
        raise TrajOODError(
            f"image list {options['list_path']}: cannot be read (No such file); give a text file of paths"
        )
    if options["null"] and "-" not in sources:
        raise TrajOODError("--null applies to paths on standard input: add - to the sources, or leave it out")


def _given_twice(sources: tuple[str, ...]) -> list[str]:
    """The sources that are given more than once, or are inside of another one."""
    places = {source: os.path.realpath(source) if os.path.exists(source) else source for source in sources}
    count = Counter(places[source] for source in sources)
    inside = {source for source, place in places.items() if any(str(up) in count for up in Path(place).parents)}
    return [source for source, place in places.items() if count[place] > 1 or source in inside]


def _entries(sources: tuple[str, ...], options: dict[str, Any], others: dict[str, Counter[str]]) -> Iterator[Entry]:
    """Iterate over the images to score; ``others`` counts files that are no images, by folder and suffix."""
    from traj_ood.data.records import is_records, read_records
    from traj_ood.stream import Entry, read_list, read_paths, walk

    for source in sources:
        if source == "-":
            if sys.stdin is None:
                raise TrajOODError("standard input (-) is closed: give files or folders, or paths on standard input")
            # Unbuffered: a thread that waits for input while holding a buffer's lock would block Python's exit.
            yield from read_paths(getattr(sys.stdin.buffer, "raw", sys.stdin.buffer), null=options["null"])
        elif is_records(source):
            for record in read_records(source, opening_of(options)):
                yield Entry(record.key, record.error, record.content)
        elif os.path.isdir(source):
            others[source] = Counter()
            yield from walk(source, follow_links=options["follow_links"], others=others[source])
        else:
            yield Entry(source)
    if options["list_path"] is not None:
        root = options["root"] or os.path.dirname(options["list_path"])
        yield from read_list(options["list_path"], root, follow_links=options["follow_links"])
