"""Diagnose whether a model's attractors are meaningful: measure f = E∘D, and give a verdict, a reason and a remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from traj_ood.attractors import AttractorDictionary, Health, Verdict
from traj_ood.attractors.health import (
    HEALTHY_DISTINCT,
    RANDOM_EXPLAINED,
    SAME,
    Facts,
    directions,
    drawn_attractors,
    explained,
    explained_hidden,
    judge,
    reconstruction_errors,
    still_falling,
)
from traj_ood.autoencoders import Autoencoder
from traj_ood.data import Benchmark, Split
from traj_ood.data.batches import read_rows
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.jacobian import Derivative, spectral_radii
from traj_ood.dynamics.observers import Norm
from traj_ood.dynamics.progress import StepBar
from traj_ood.dynamics.trajectory import Status, join_tables
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.curves import curve_quantiles
from traj_ood.io.files import write_atomic
from traj_ood.io.parts import Part
from traj_ood.io.trees import as_json, write_json

FILE_NAME = "diagnosis.json"

COMMON = 0.5
"""Smallest share of held-out images at known attractors, and of images that keep their attractor under noise, without
a caution. Below it scores depend on which training images were drawn, or on invisible noise; the verdict is kept."""

_MIN_IMAGES = 2 * HEALTHY_DISTINCT  # with fewer images, hardly any model has 10 distinct attractors
_BATCH = 512  # large, because the last, slow trajectories of each batch need chunks of their own
_NOISE_IMAGES = 200  # in the noise test; standard error at most 3.5 %


@dataclass(frozen=True)
class AttractorGallery:
    """K attractors, sorted by the number of training images that end there, largest first.

    Attributes:
        decoded: (K, C, H, W) D(z*) in the model's normalised units; None if D does not decode to images.
        nearest: (K, C, H, W) training images whose targets are nearest to D(z*).
        ids: ids of the nearest images.
        visits: numbers of training images that end at each attractor.
        radii: spectral radii of the Jacobian.
        limits: (2, C) darkest and brightest values of the training images, for drawing.
    """

    decoded: Tensor | None
    nearest: Tensor
    ids: tuple[str, ...]
    visits: tuple[int, ...]
    radii: tuple[float, ...]
    limits: Tensor


@dataclass(frozen=True)
class ModelFacts(Facts):
    """Measurements in addition to the dictionary's health. Shares are fractions, or None if they could not be measured.

    Attributes:
        held_out_converged: share of held-out ID trajectories that converged.
        known: share of held-out ID images that converge to an attractor of the training images.
        agreement: share of converged held-out images that end at the same attractor with noise added.
        derivative: how the Jacobian was computed.
    """

    held_out_converged: float
    known: float | None
    agreement: float | None
    derivative: Derivative | None


@dataclass(frozen=True)
class Diagnosis(ModelFacts):
    """Result of :func:`diagnose`; further attributes are those of :class:`ModelFacts` and
    :class:`traj_ood.attractors.health.Facts`.

    Attributes:
        benchmark, model: names.
        fingerprint: fingerprint of the model.
        settings: images, held_out (number), held_out_split, seed, tol, max_steps and noise.
        health: health of the dictionary of the training images.
        verdict: the verdict with its reason and remedy.
        cautions: sentences on findings that do not affect the verdict.
        curves: residuals and norms over steps (see :func:`traj_ood.evaluation.curves.curve_quantiles`).
        gallery: attractors to look at; None if there are none.
    """

    benchmark: str
    model: str
    fingerprint: str
    settings: dict[str, Any]
    health: Health
    verdict: Verdict
    cautions: tuple[str, ...]
    curves: pd.DataFrame = field(repr=False, compare=False)
    gallery: AttractorGallery | None = field(repr=False, compare=False)

    @property
    def meaningful(self) -> bool:
        """Whether scores against this model's attractors are meaningful."""
        return self.verdict.meaningful

    def as_dict(self) -> dict[str, Any]:
        """All numbers and texts as JSON data, without curves and gallery, which are separate files."""
        kept = {k: v for k, v in vars(self).items() if k not in ("curves", "gallery")}
        kept |= {"health": self.health.as_dict(), "verdict": asdict(self.verdict)}
        return as_json(kept | {"meaningful": self.meaningful, "stable": self.stable})

    def report(self) -> str:
        """The findings as text, one per line, then the verdict."""
        lines = [f"{self.model} on {self.benchmark}", *(f"  {name:<21}{text}" for name, text in _findings(self))]
        lines += ["", f"Verdict: {self.verdict.text}"]
        lines += [f"Caution: {text}." for text in self.cautions]
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        """Write diagnosis.json, curves.parquet, dynamics.png and, if there are attractors, attractors.png.

        Raises:
            TrajOODError: the folder cannot be written.
        """
        from traj_ood.drawing.style import save_figure
        from traj_ood.evaluation.dynamics_plots import attractor_gallery, dynamics_curves

        folder = Path(folder)
        write_atomic(folder / "curves.parquet", lambda file: self.curves.to_parquet(file, index=False))
        save_figure(dynamics_curves(self.curves, self.settings["tol"]), folder / "dynamics.png")
        if self.gallery is not None:
            shown = self.gallery
            captions = [f"{n:,} images\nradius {r:.3f}" for n, r in zip(shown.visits, shown.radii, strict=True)]
            title = f"Attractors of {self.model}, and the nearest of {self.health.count:,} training images"
            decoded = None if shown.decoded is None else shown.decoded.numpy()
            limits = shown.limits.numpy()
            figure = attractor_gallery(decoded, shown.nearest.numpy(), captions, limits, title)
            save_figure(figure, folder / "attractors.png")
        write_json(folder / FILE_NAME, self.as_dict(), sort_keys=True)


def diagnose(
    autoencoder: Autoencoder,
    benchmark: Benchmark,
    *,
    images: int = 500,
    seed: int = 0,
    tol: float = 1e-5,
    max_steps: int = 500,
    noise: float = 0.1,
    quiet: bool = True,
) -> Diagnosis:
    """Measure whether f = E∘D has attractors, whether they are stable, and what they tell about ID images.

    Args:
        autoencoder: the model, on the device to use.
        benchmark: attractors are computed from its training split; its val split, or without one as many other training
            images, is held out. Test and OOD images are not used.
        images: most training images, and most held-out images. Default 500: shares have a standard error of 2 %.
        seed: seed of the training sample, the noise and the sampled attractors.
        tol, max_steps: see :func:`traj_ood.iterate`; the defaults are the paper's.
        noise: standard deviation, in the model's normalised units, of the noise added to images to test whether they
            keep their attractors. Default 0.1, hardly visible.
        quiet: no progress bar.
    Raises:
        TrajOODError: there are too few training images, or ``noise`` is not positive.
    """
    train, held = diagnosis_splits(benchmark, images, seed)
    if not noise > 0:
        raise TrajOODError(f"diagnose: expected noise above 0, got {noise}; 0.1 is the default")
    total = len(train.images) + len(held.images) + min(_NOISE_IMAGES, len(held.images))
    with StepBar(total, "diagnose", quiet=quiet) as bar:
        walk = partial(_walk, autoencoder, bar=bar, tol=tol, max_steps=max_steps)
        known, unseen = (walk(read_rows(autoencoder, s.images, range(len(s.images))).images) for s in (train, held))
        agreement = _agreement(walk, unseen, noise, seed, bar)
    health = known.dictionary.health()
    share, hidden = _explained(autoencoder, known, unseen)
    gallery, derivative = _gallery(autoencoder, train, known, seed)
    residuals = join_tables([part.tensors["residuals"] for part in known.parts])
    facts = ModelFacts(
        held_out_converged=float((unseen.dictionary.statuses == Status.CONVERGED).double().mean()),
        still_falling=still_falling(residuals, known.dictionary.statuses),
        known=_known_share(known.dictionary, unseen.dictionary),
        agreement=agreement,
        radii=gallery.radii if gallery is not None else (),
        derivative=derivative,
        explained=share,
        explained_hidden=hidden,
    )
    verdict = judge(health, facts)
    curves = [curve_quantiles(split, walked.parts, tol) for split, walked in ((train, known), (held, unseen))]
    return Diagnosis(
        benchmark=benchmark.name,
        model=autoencoder.name,
        fingerprint=autoencoder.fingerprint(),
        settings={"images": len(train.images), "held_out": len(held.images), "held_out_split": held.name}
        | {"seed": seed, "tol": tol, "max_steps": max_steps, "noise": noise},
        health=health,
        verdict=verdict,
        cautions=cautions_about(verdict, facts, noise),
        curves=pd.concat(curves, ignore_index=True),
        gallery=gallery,
        **vars(facts),
    )


def cautions_about(verdict: Verdict, facts: ModelFacts, noise: float) -> tuple[str, ...]:
    """Cautions for a good verdict; a bad one has none."""
    if not verdict.meaningful:
        return ()
    found = []
    if facts.known is not None and facts.known < COMMON:
        found.append(
            f"only {facts.known:.0%} of held-out ID images end at an attractor of the training images, so distances "
            "depend on which were drawn: use more training images"
        )
    if facts.agreement is not None and facts.agreement < COMMON:
        found.append(
            f"only {facts.agreement:.0%} of images keep their attractor under noise of {noise:g}, so end points carry "
            "little information about an image: prefer scorers of the first steps, such as field or early-path"
        )
    if facts.explained < RANDOM_EXPLAINED:
        found.append(
            f"D(E(x)) explains {facts.explained:.0%} of the variance of held-out images, as after training only on "
            "hidden patches: f acts on distorted images"
        )
    return tuple(found)


_NOT_MEASURED = "not measured: no trajectory converged"


def _findings(d: Diagnosis) -> list[tuple[str, str]]:
    """Name and text of each line of the report."""
    health, settings = d.health, d.settings
    steps, moved = health.steps_quantiles, health.displacement_quantiles
    split = settings["held_out_split"]
    hidden = "" if d.explained_hidden is None else f", {d.explained_hidden:.0%} on hidden patches"
    rows = [
        ("images", f"{settings['images']:,} of the training split, {settings['held_out']:,} held out ({split})"),
        ("iteration", f"to a squared residual below {settings['tol']:g}, at most {settings['max_steps']} steps"),
        ("converged", f"{health.converged:.1%} of training, {d.held_out_converged:.1%} of held-out images"),
    ]
    if health.converged < 1 and d.still_falling is not None:
        rows.append(("still approaching", f"{d.still_falling:.0%} of those at the step limit"))
    rows += [
        ("steps", f"median {steps[2]:.0f}, 5 to 95 %: {steps[0]:.0f} to {steps[4]:.0f}" if steps else "none"),
        ("displacement", f"median {moved[2]:.2f} of ‖z0‖" if moved else "none"),
        ("distinct attractors", f"{health.distinct} of {health.count:,} end points (cosine >= {SAME})"),
        ("spectral radius", _radius_text(d)),
        ("basins", _share(d.agreement, f"of images keep their attractor under noise of {settings['noise']:g}")),
        ("held-out ID", _share(d.known, "of images end at an attractor of the training images")),
        ("reconstruction", f"D(E(x)) explains {d.explained:.0%} of the variance{hidden}"),
    ]
    return rows


def _radius_text(d: Diagnosis) -> str:
    if not d.radii:
        return _NOT_MEASURED
    text = (
        f"median {median(d.radii):.3f}, largest {max(d.radii):.3f}; {d.stable:.0%} of {len(d.radii)} attractors stable"
    )
    return text + (" (by differences)" if d.derivative == "differences" else "")


def _share(value: float | None, of_what: str) -> str:
    return _NOT_MEASURED if value is None else f"{value:.0%} {of_what}"


# ---------------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class _Walk:
    """The trajectories of normalised images (N, C, H, W): end points; steps, squared residuals and norms by batch; and
    squared errors (N,) of D(E(x)), summed over pixels, against its targets (N, *)."""

    images: Tensor
    dictionary: AttractorDictionary
    parts: Sequence[Part]
    errors: Tensor
    targets: Tensor

    @property
    def converged(self) -> Tensor:
        return self.dictionary.statuses == Status.CONVERGED


def _walk(model: Autoencoder, images: Tensor, *, bar: StepBar, tol: float, max_steps: int) -> _Walk:
    """Iterate f on images, batch by batch."""
    ends, parts, errors, targets = [], [], [], []
    for some in images.split(_BATCH):
        encoding = model.examine(some)
        bar.begin(len(some))
        path = iterate(
            model.self_map,
            encoding.latents,
            tol=tol,
            max_steps=max_steps,
            observers=[Norm()],
            chunk=model.chunk,
            on_step=bar.on_step,
        )
        bar.finish(len(some))
        ids = tuple(map(str, range(len(some))))
        ends.append(AttractorDictionary.from_trajectory(encoding.latents, path, ids))
        curves = {"residuals": path.residuals, "norm": path.measure("norm")}
        parts.append(Part(ids, tensors={"steps": path.steps, "status": path.status, **curves}))
        errors.append(reconstruction_errors(model, encoding))
        targets.append(encoding.target.cpu())
    return _Walk(images, AttractorDictionary.concatenate(ends), parts, torch.cat(errors), torch.cat(targets))


def _agreement(walk: Callable[[Tensor], _Walk], clean: _Walk, noise: float, seed: int, bar: StepBar) -> float | None:
    """The share of converged images, out of an evenly spaced sample, that end at the same attractor with noise."""
    most = min(_NOISE_IMAGES, len(clean.images))
    rows = torch.linspace(0, len(clean.images) - 1, most, dtype=torch.float32).round().long()
    images, draws = clean.images[rows], torch.Generator().manual_seed(seed)
    noisy = images + noise * torch.randn(images.shape, dtype=images.dtype, generator=draws)
    counted = clean.converged[rows]
    bar.skip(int((~counted).sum()))  # these would take the longest, and count for nothing
    if not bool(counted.any()):
        return None
    disturbed = walk(noisy[counted])
    before, after = (directions(d.points) for d in (clean.dictionary, disturbed.dictionary))
    same = ((before[rows[counted]] * after).sum(dim=1) >= SAME) & disturbed.converged
    return float(same.double().mean())


def diagnosis_splits(benchmark: Benchmark, images: int, seed: int) -> tuple[Split, Split]:
    """The training images for the attractors, and held-out ID images: val, else other training images."""
    if images < _MIN_IMAGES:
        raise TrajOODError(f"diagnose: expected at least {_MIN_IMAGES} images, got {images}: ask for more")
    split = benchmark.train
    available = len(split.images) if benchmark.val is not None else len(split.images) // 2
    count = min(images, available)
    if count < _MIN_IMAGES:
        raise TrajOODError(
            f"diagnose: expected at least {_MIN_IMAGES} training images of benchmark {benchmark.name!r}, got "
            f"{count} (its training split has {len(split.images)}, half of it held out if there is no val split)"
        )
    if benchmark.val is not None:
        sample = benchmark.subsample(train=count, per_set=images, seed=seed)
        assert sample.val is not None
        return sample.train, sample.val
    both = benchmark.subsample(train=2 * count, per_set=None, seed=seed).train.images
    # Shuffled, because lists are often sorted by class, or alternate between two kinds.
    drawn = torch.randperm(2 * count, generator=torch.Generator().manual_seed(seed)).tolist()
    halves = [both.select(sorted(part)) for part in (drawn[:count], drawn[count:])]
    return Split(split.name, "train", halves[0]), Split(f"{split.name}-held-out", "val", halves[1])


def _known_share(known: AttractorDictionary, unseen: AttractorDictionary) -> float | None:
    attractors = known.points[known.statuses == Status.CONVERGED]
    if not len(attractors):
        return None
    cosines = (directions(unseen.points) @ directions(attractors).T).amax(dim=1)
    return float(((cosines >= SAME) & (unseen.statuses == Status.CONVERGED)).double().mean())


def _explained(model: Autoencoder, known: _Walk, unseen: _Walk) -> tuple[float, float | None]:
    """Share of the held-out targets' variance about the training mean that D(E(x)) explains; and on hidden patches."""
    mean = known.targets.double().mean(dim=0)
    share = explained(unseen.errors, unseen.targets, mean)
    if math.isnan(share):
        raise TrajOODError("diagnose: expected different ID images, got held-out images that are all the same")
    return share, explained_hidden(model, unseen.targets, mean)


def _gallery(
    model: Autoencoder, split: Split, walk: _Walk, seed: int
) -> tuple[AttractorGallery | None, Derivative | None]:
    """Up to 16 attractors, sampled by the number of training images that end there, with radius and nearest image."""
    ends = walk.dictionary.points[walk.converged]
    if not len(ends):
        return None, None
    drawn = drawn_attractors(ends, seed)
    points = ends[[leader for leader, _ in drawn]].to(model.device)
    radii = spectral_radii(model.self_map, points, chunk=model.chunk, seed=seed)
    decoded = model.decode(points).cpu()
    nearest = torch.cdist(decoded.flatten(1).double(), walk.targets.flatten(1).double()).argmin(dim=1)
    shown = walk.images.transpose(0, 1).flatten(1)
    gallery = AttractorGallery(
        decoded=decoded if tuple(decoded.shape[1:]) == tuple(model.input_shape) else None,
        nearest=walk.images[nearest],
        ids=tuple(split.images.ids[i] for i in nearest.tolist()),
        visits=tuple(visits for _, visits in drawn),
        radii=tuple(radii.values.tolist()),
        limits=torch.stack([shown.amin(dim=1), shown.amax(dim=1)]),
    )
    return gallery, radii.derivative
