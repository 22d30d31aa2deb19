"""Data-free probing (§4.1): attractors of Gaussian noise as a dictionary for images that the model may never have seen.

No data enters the dictionary: N starts from N(0, I) are iterated to their attractors, and those alone must reconstruct
the latents of test images by orthogonal matching pursuit. The yardstick is a random orthogonal basis of the latent
space. With the paper's models, where there is a network and a GPU::

    traj-ood analyze probe --paper --device cuda --data-root FOLDER_OF_IMAGE_FOLDERS        # Fig. 4, 7-9, 18
    traj-ood analyze probe --paper --device cuda --data-root … --option model=sdxl-vae      # Fig. 15
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from traj_ood.analysis.base import Answer, Question, register
from traj_ood.analysis.images import stack
from traj_ood.analysis.models import settle
from traj_ood.analysis.omp import Floats, OMPDictionary, random_basis
from traj_ood.analysis.sources import NamedImages, named_images
from traj_ood.analysis.subjects import TRAINED, Training, subject
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.attractors import AttractorDictionary
from traj_ood.autoencoders import Autoencoder, load_autoencoder
from traj_ood.dynamics.iterate import apply_in_chunks
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

ORTHOGONAL, ATTRACTORS, ONE_STEP = "orthogonal basis", "attractors", "one step"
DICTIONARIES = (ORTHOGONAL, ATTRACTORS, ONE_STEP)
_DRAWN = 512  # starts drawn from one seed, whatever the units of work
_UNIT = 64  # starts per unit of work, or the model's chunk where that is more: what an interruption can cost
_SHARE_SHOWN = 0.05
"""Of the atoms, in pictures and in the sentence: Fig. 4a's."""
_GALLERY = 24
_GROUP = 16  # images whose reconstructions are decoded together: 0.3 GB at 256 × 256 pixels


@register
@dataclass(frozen=True)
class Probe(Question):
    """How well do attractors of noise reconstruct images, against atoms that know nothing of the model?

    Attributes:
        model: as for :func:`traj_ood.load_autoencoder`, default the bundled one; or ``conv``, an autoencoder of Table 4
            that is trained first, on ``train_images`` (0: all) of the image set ``trained_on``, with ``epochs``,
            ``bottleneck`` and ``width``.
        data: benchmarks (their test and OOD splits), ``fashion-mnist``, ``mnist``, ``cifar10``, or folders of images,
            also below --data-root.
        images: of each set, at most. Default 50.
        atoms: N, the size of each dictionary; none is the latent's dimension, as in the paper.
        shares: of N, how many atoms a reconstruction may use, ascending.
        tol, max_steps: of the iteration from noise; the defaults are the paper's (App. D).
        examples: images of each set in the pictures. pictured: sets in them, the first of ``data``; 0 draws neither.
    """

    name: ClassVar[str] = "probe"
    figure: ClassVar[str] = "Figs 4, 7-9, 15, 18"
    summary: ClassVar[str] = (
        "attractors of noise as a data-free dictionary of images, against a random orthogonal basis"
    )
    choices: ClassVar[tuple[str, ...]] = (
        "The error is that of decoded images against the images, in the model's normalised pixel units; the paper does "
        "not say against what. The error in latent space, and that of D(E(x)), which no dictionary undercuts by much, "
        "stand beside it.",
        "Atoms have length 1 and are not centred. Attractors share a common part, the mean latent, that a random basis "
        "lacks. The dictionary 'one step' shares it, too: f applied once to the same noise. What attractors do better "
        "than that is due to the iteration.",
        "The paper calls its baseline both 'the initial orthogonal samples' and 'a random orthogonal basis'; here it "
        "is a random orthogonal basis that is independent of the starts of the noise, which are not orthogonal.",
        "The shares of the atoms on the paper's axis are not stated but for 5 %.",
        "The paper pictures LAION, ImageNet and Camelyon (Figs 7-9), with five images each; with --paper every set is "
        "pictured. reconstructions.png shows the examples of a set at one number of atoms, growth.png a single one of "
        "them at every number, where the paper shows five.",
        "A latent is E(x); for AutoencoderKL the posterior's mean, unscaled, since sampling would make f random.",
        "Atoms beyond the rank of the attractors only differ by how far they had converged; the pursuit may still use "
        "those differences, as it would in the paper.",
    )

    unstated: ClassVar[tuple[str, ...]] = (
        "shares", "pictured", "trained_on", "train_images", "epochs", "bottleneck", "width"
    )  # fmt: skip

    model: str = "fashion-mae"
    data: tuple[str, ...] = ("fashion",)
    images: int = 50
    atoms: int | None = None
    shares: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1)
    tol: float = 1e-5
    max_steps: int = 500
    examples: int = 5
    pictured: int = 3
    trained_on: str = "cifar10"
    train_images: int = 10_000
    epochs: int = 10
    bottleneck: int = 256
    width: int = 16

    def __post_init__(self) -> None:
        self.expect(self.images >= 1, "images", "at least 1")
        self.expect(self.atoms is None or self.atoms >= 2, "atoms", "at least 2, or none")
        ascending = all(a < b for a, b in zip(self.shares, self.shares[1:], strict=False))
        self.expect(bool(self.shares) and ascending, "shares", "at least one, ascending")
        self.expect(all(0 < s <= 1 for s in self.shares), "shares", "parts of the atoms, above 0 and at most 1")
        self.expect(self.tol > 0, "tol", "a squared residual above 0")
        self.expect(self.max_steps >= 2, "max_steps", "at least 2")
        self.expect(self.examples >= 1, "examples", "at least 1")
        self.expect(self.pictured >= 0, "pictured", "at least 0")
        self.expect(bool(self.data), "data", "at least one set of images")

    @classmethod
    def paper(cls) -> Probe:
        """§4.1: Stable Diffusion's autoencoder, N = k = 4096, 500 images of each of six sets, given as folders."""
        folders = ("LAION2B", "ImageNet1k", "EuroSAT", "CIFAR100", "PatchCamelyon", "Places365")
        return cls(model="sd-vae", data=folders, images=500, pictured=len(folders))

    def shown(self, option: str, value: Any) -> str:
        if option == "atoms" and value is None:
            return "as many as the latent has dimensions"
        words = {"train_images": "all", "pictured": "no set"}
        return words[option] if option in words and value == 0 else super().shown(option, value)

    def answer(self, work: Workspace) -> Answer:
        sets = named_images(self.data, work.data_root, self.images)  # before a model is trained for them
        model = self._model(work)
        zeros = model.encode(torch.zeros(1, *model.input_shape))
        dimension = zeros[0].numel()
        count = self.atoms or dimension
        self.expect(count <= dimension, "atoms", f"at most {dimension}, the dimension of {model.name}'s latents")
        _check_images(model, zeros)
        key = {
            "model": model.fingerprint(),
            "atoms": count,
            "seed": self.seed,
            "tol": self.tol,
            "max_steps": self.max_steps,
        }
        noise = self._attractors(work, model, tuple(zeros.shape[1:]), count, key)
        bases = {
            ORTHOGONAL: random_basis(count, dimension, self.seed),
            ATTRACTORS: noise.dictionary.points[noise.dictionary.statuses != Status.NON_FINITE].flatten(1),
            ONE_STEP: noise.first.flatten(1),
        }
        for name, atoms in bases.items():
            self._check_atoms(name, atoms, count)
        coder = _Coder(model, {name: OMPDictionary(atoms) for name, atoms in bases.items()}, self._levels(count))
        found = [self._of_set(work, coder, images, key) for images in sets]
        return _Report(self, model, noise, coder, found).answer()

    def _model(self, work: Workspace) -> Autoencoder:
        if self.model != TRAINED:
            return load_autoencoder(self.model).to(work.device)
        training = Training(self.train_images, self.epochs, self.bottleneck, self.width)
        return subject(work, TRAINED, self.trained_on, self.seed, training).model

    def _check_atoms(self, name: str, atoms: Tensor, starts: int) -> None:
        """Refuse atoms of which no image can be made: none is left, or one has no direction."""
        zero = int((atoms.double().norm(dim=1) == 0).sum())
        if len(atoms) and not zero:
            return
        got = f"{zero} of {len(atoms)} that are 0" if zero else f"none: all {starts} starts left the finite numbers"
        advice = "other training options" if self.model == TRAINED else f"another (traj-ood diagnose {self.model})"
        raise TrajOODError(
            f"probe: {name}: expected finite atoms that are not 0, got {got}; noise yields no dictionary of the model "
            f"{self.model}: take {advice}"
        )

    def _levels(self, count: int) -> tuple[int, ...]:
        return tuple(sorted({max(1, round(share * count)) for share in self.shares}))

    def _attractors(
        self, work: Workspace, model: Autoencoder, shape: tuple[int, ...], count: int, key: Mapping[str, Any]
    ) -> _Noise:
        """Where N starts from N(0, I) end, some starts a unit."""
        parts, first = [], []
        with work.bar(count, "attractors of noise", "start") as bar:
            for rows in _parts(count, max(_UNIT, model.chunk)):
                ids = tuple(f"noise/{i}" for i in rows)

                def compute(rows: range = rows, ids: tuple[str, ...] = ids) -> Unit:
                    start = _noise(rows, count, shape, self.seed).to(model.device)
                    with torch.inference_mode():
                        once = apply_in_chunks(model.self_map, start, model.chunk)
                    ends, _ = settle(model, start, ids, tol=self.tol, max_steps=self.max_steps)
                    return Unit({**ends.tensors(), "once": once})

                unit = work.unit("noise", {**key, "rows": [rows.start, rows.stop]}, compute)
                tensors = dict(unit.tensors)
                first.append(tensors.pop("once"))
                parts.append(AttractorDictionary(ids=ids, provenance={}, **tensors))
                bar.update(len(rows))
        ends = AttractorDictionary.concatenate(parts)
        usable = torch.cat(first)
        return _Noise(ends, usable[usable.flatten(1).isfinite().all(dim=1)])

    def _of_set(self, work: Workspace, coder: _Coder, images: NamedImages, key: Mapping[str, Any]) -> _Errors:
        """Errors of every dictionary at every level on one set of images, a group of images a unit."""
        key = {**key, "images": images.source.digest(), "levels": list(coder.levels)}
        parts: list[Mapping[str, Tensor]] = []
        with work.bar(len(images.source), images.name, "image") as bar:
            for begin in range(0, len(images.source), _GROUP):
                rows = range(begin, min(begin + _GROUP, len(images.source)))
                shown = min(len(rows), max(0, self.examples - begin))

                def compute(rows: range = rows, shown: int = shown) -> Unit:
                    return coder.measure(images, rows, shown)

                unit = work.unit("reconstructions", {**key, "rows": [rows.start, rows.stop], "shown": shown}, compute)
                parts.append(unit.tensors)
                bar.update(len(rows))
        return _Errors(images.name, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


@dataclass(frozen=True)
class _Noise:
    """What became of the noise: end points, and (N, *L) finite images of one step."""

    dictionary: AttractorDictionary
    first: Tensor


@dataclass(frozen=True)
class _Errors:
    """Of one set: ``image`` and ``latent`` (B, dictionaries, levels) mean squared errors, ``used`` (B, dictionaries)
    atoms that OMP could use, ``decoded`` (B,) error of D(E(x)), and ``inputs`` and ``pictures`` to draw."""

    name: str
    tensors: dict[str, Tensor]

    def means(self, kind: str) -> Tensor:
        """(dictionaries, levels) mean over the images."""
        return self.tensors[kind].mean(dim=0)


def _parts(count: int, size: int) -> list[range]:
    """The places of ``count`` starts, at most ``size`` a part; no part reaches over two draws."""
    return [
        range(begin, min(begin + size, drawn + _DRAWN, count))
        for drawn in range(0, count, _DRAWN)
        for begin in range(drawn, min(drawn + _DRAWN, count), size)
    ]


def _noise(rows: range, count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """(n, *L) the starts at ``rows`` of ``count``: part of one draw, so that no number depends on the parts."""
    draw = rows.start // _DRAWN
    draws = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    begin = draw * _DRAWN
    whole = torch.randn(min(_DRAWN, count - begin), *shape, generator=draws)
    return whole[rows.start - begin : rows.stop - begin]


@dataclass(frozen=True)
class _Coder:
    """Latents of images through the dictionaries and back to images."""

    model: Autoencoder
    dictionaries: Mapping[str, OMPDictionary]
    levels: tuple[int, ...]

    def measure(self, images: NamedImages, rows: range, shown: int) -> Unit:
        """All that :class:`_Errors` holds of the images at ``rows``, the first ``shown`` of them to draw.

        Raises:
            TrajOODError: the model makes of an image what is not finite; it is named.
        """
        source = images.source.select(list(rows))
        pixels = stack(self.model, source)
        latents = self.model.encode(pixels).cpu()
        self._check_finite("latents", latents, source.ids)
        coded = [self._guesses(latent) for latent in latents]
        guesses = torch.stack([guess for guess, _ in coded])  # (n, dictionaries, levels, *L)
        decoded = self.model.decode(guesses.flatten(0, 2).to(latents)).cpu().unflatten(0, guesses.shape[:3])
        own = self.model.decode(latents).cpu()
        self._check_finite("images decoded", torch.cat([decoded.flatten(1), own.flatten(1)], dim=1), source.ids)
        return Unit(
            {
                "inputs": pixels[:shown],
                "pictures": decoded[:shown],
                "decoded": _errors(own - pixels, 1),
                "image": _errors(decoded - pixels[:, None, None], 3),
                "latent": _errors(guesses - latents[:, None, None], 3),
                "used": torch.tensor([used for _, used in coded]),
            }
        )

    def _check_finite(self, what: str, values: Tensor, ids: Sequence[str]) -> None:
        bad = (~values.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise TrajOODError(
                f"probe: expected finite {what}, {self.model.name} gives NaN or infinity for {ids[bad[0]]}; leave such "
                "images out, or take another model"
            )

    def _guesses(self, latent: Tensor) -> tuple[Tensor, list[int]]:
        """(dictionaries, levels, *L) float64 reconstructions of one latent (*L), and the atoms each could use."""
        target = latent.double().flatten().numpy()
        found = [d.reconstruct(target, self.levels) for d in self.dictionaries.values()]
        guesses = torch.from_numpy(np.stack([guess for guess, _ in found]))
        return guesses.unflatten(2, latent.shape), [used for _, used in found]


def _errors(differences: Tensor, dimensions: int) -> Tensor:
    """Mean squares over all but the first ``dimensions``, float64."""
    return differences.double().square().flatten(dimensions).mean(dim=dimensions)


@dataclass(frozen=True)
class _Report:
    """Figures, sentence and pictures."""

    question: Probe
    model: Autoencoder
    noise: _Noise
    coder: _Coder
    sets: Sequence[_Errors]

    def answer(self) -> Answer:
        rows = [row for errors in self.sets for row in self._rows(errors)]
        at = self._shown_level()
        ratios = {name: [self._ratio(errors, name, at) for errors in self.sets] for name in (ATTRACTORS, ONE_STEP)}
        ends = self.noise.dictionary
        figures = {
            "model": self.model.name,
            "latent_dimension": int(ends.points[0].numel()),
            "atoms": len(ends),
            "converged": self._share(Status.CONVERGED),
            "finite": 1 - self._share(Status.NON_FINITE),
            "median_steps": float(ends.steps.double().median()),
            "distinct_end_points": len(ends.distinct()),
            "dictionaries": [self._about(name) for name in DICTIONARIES],
            "unit": "mean squared error in the model's normalised pixel units, mean over images",
            "rows": rows,
            "ratio": {name: dict(zip([e.name for e in self.sets], r, strict=True)) for name, r in ratios.items()},
            "ratio_atoms": self.coder.levels[at],
            "ratio_share": self.coder.levels[at] / len(ends),
        }
        return Answer(figures, self._sentence(ratios, at), self._pictures(at))

    def _share(self, status: Status) -> float:
        """Of the starts from noise, those that ended so."""
        return float((self.noise.dictionary.statuses == status).double().mean())

    def _used(self, errors: Sequence[_Errors], name: str, level: int) -> float:
        """Atoms in a reconstruction that may have ``level``, the median over the images: a pursuit may end before."""
        used = torch.cat([e.tensors["used"][:, DICTIONARIES.index(name)] for e in errors])
        return float(used.clamp(max=level).double().median())

    def _shown_level(self) -> int:
        """Place of the level nearest to 5 % of the atoms."""
        wanted = _SHARE_SHOWN * len(self.noise.dictionary)
        return min(range(len(self.coder.levels)), key=lambda i: abs(self.coder.levels[i] - wanted))

    def _ratio(self, errors: _Errors, name: str, at: int) -> float | None:
        """Error over that of the random basis; None where the basis makes no error to compare with."""
        means = errors.means("image")[:, at]
        ratio = float(means[DICTIONARIES.index(name)] / means[DICTIONARIES.index(ORTHOGONAL)])
        return ratio if math.isfinite(ratio) else None

    def _about(self, name: str) -> dict[str, Any]:
        dictionary = self.coder.dictionaries[name]
        rank, energy = dictionary.spectrum()
        return {
            "dictionary": name,
            "atoms": len(dictionary),
            "rank": rank,
            "directions_of_90_percent": energy,
            "median_atoms_used": self._used(self.sets, name, len(dictionary)),
        }

    def _rows(self, errors: _Errors) -> list[dict[str, Any]]:
        image, latent = errors.means("image"), errors.means("latent")
        count = len(self.noise.dictionary)
        return [
            {
                "set": errors.name,
                "images": int(errors.tensors["decoded"].numel()),
                "dictionary": name,
                "atoms": level,
                "share": level / count,
                "median_atoms_used": self._used([errors], name, level),
                "image_mse": float(image[d, i]),
                "latent_mse": float(latent[d, i]),
                "image_mse_of_D(E(x))": float(errors.tensors["decoded"].mean()),
            }
            for d, name in enumerate(DICTIONARIES)
            for i, level in enumerate(self.coder.levels)
        ]

    def _sentence(self, ratios: Mapping[str, list[float | None]], at: int) -> str:
        level, ends = self.coder.levels[at], self.noise.dictionary
        names = [errors.name for errors in self.sets]
        means = [errors.means("image")[:, at].tolist() for errors in self.sets]

        def lower(one: str, other: str) -> str:
            a, b = DICTIONARIES.index(one), DICTIONARIES.index(other)
            return _told([n for n, errors in zip(names, means, strict=True) if errors[a] < errors[b]], len(names))

        converged, lost = (int((ends.statuses == s).sum()) for s in (Status.CONVERGED, Status.NON_FINITE))
        used = {name: f"{self._used(self.sets, name, level):g}" for name in DICTIONARIES}
        return (
            f"Of {len(ends):,} starts from noise {converged:,} ({converged / len(ends):.1%}) converged within "
            f"{self.question.max_steps:,} steps and {lost:,} left the finite numbers; the finite end points "
            f"({len(ends) - lost:,}, distinct: {len(ends.distinct()):,}) are the atoms called attractors. With at most "
            f"{level:,} atoms ({level / len(ends):.1%} of the starts; {used[ATTRACTORS]} in the median reconstruction, "
            f"{used[ORTHOGONAL]} of the random basis) they have a lower error than a random orthogonal basis on "
            f"{lower(ATTRACTORS, ORTHOGONAL)} (median ratio {_median(ratios[ATTRACTORS])}). f applied once "
            f"to the noise does so on {lower(ONE_STEP, ORTHOGONAL)} ({_median(ratios[ONE_STEP])}; "
            f"{used[ONE_STEP]} atoms); attractors have a lower error than that on {lower(ATTRACTORS, ONE_STEP)}."
        )

    def _pictures(self, at: int) -> dict[str, Callable[[], Figure]]:
        found: dict[str, Callable[[], Figure]] = {"probe.png": self._draw_errors, "atoms.png": self._draw_atoms}
        if self.question.pictured:
            found["reconstructions.png"] = lambda: self._draw_reconstructions(at)
            found["growth.png"] = self._draw_growth
        return found

    def _draw_errors(self) -> Figure:
        from traj_ood.drawing.charts import Curve, Panel, curves

        panels = []
        for errors in self.sets:
            means, levels = errors.means("image"), [float(level) for level in self.coder.levels]
            lines = [Curve(name, levels, means[d].tolist()) for d, name in enumerate(DICTIONARIES)]
            floor = float(errors.tensors["decoded"].mean())
            lines.append(Curve("D(E(x))", levels, [floor] * len(levels)))
            log_y = floor > 0 or bool((means > 0).any())
            panels.append(Panel(errors.name, "atoms used", "MSE of decoded images", lines, log_x="2", log_y=log_y))
        title = f"Data-free probing of {self.model.name}: {len(self.noise.dictionary):,} starts from noise"
        return curves(panels, title)

    def _draw_reconstructions(self, at: int) -> Figure:
        from traj_ood.drawing.charts import PictureRow, picture_rows

        rows = []
        for errors in self.sets[: self.question.pictured]:
            rows.append(PictureRow(errors.name, errors.tensors["inputs"].numpy(), self._limits()))
            for d, name in enumerate(DICTIONARIES):
                rows.append(PictureRow(_broken(name), errors.tensors["pictures"][:, d, at].numpy(), self._limits()))
        level = self.coder.levels[at]
        share = level / len(self.noise.dictionary)
        return picture_rows(rows, f"{self.model.name}: reconstructions with at most {level} atoms ({share:.1%})")

    def _draw_growth(self) -> Figure:
        from traj_ood.drawing.charts import PictureRow, picture_rows

        rows = []
        for errors in self.sets[: self.question.pictured]:
            for d, name in enumerate(DICTIONARIES):
                line = torch.cat([errors.tensors["pictures"][0, d], errors.tensors["inputs"][:1]])
                captions = [*(f"{level} atoms" for level in self.coder.levels), "input"]
                label = f"{errors.name}\n{_broken(name)}" if d == 0 else _broken(name)
                rows.append(PictureRow(label, line.numpy(), self._limits(), captions if d == 0 else ()))
        return picture_rows(rows, f"{self.model.name}: one image of a set with more and more atoms")

    def _draw_atoms(self) -> Figure:
        from traj_ood.drawing.charts import PictureRow, picture_rows

        ends = self.noise.dictionary
        kept = ends.distinct()[:_GALLERY]
        images = self.model.decode(ends.usable()[kept].to(self.model.device)).cpu()
        title = (
            f"{self.model.name}: where noise ends, decoded ({self._share(Status.CONVERGED):.1%} converged), "
            f"{len(kept)} of {len(ends.distinct()):,} distinct points"
        )
        rows = [PictureRow("", part.numpy(), self._limits()) for part in images.split(8)]
        return picture_rows(rows, title)

    def _limits(self) -> Floats:
        """(2, C): black and white in the model's units."""
        ends = [
            self.model.transform(Image.new("RGB", (8, 8), colour)).flatten(1)[:, 0] for colour in ("black", "white")
        ]
        return torch.stack(ends).double().numpy()


def _median(ratios: Sequence[float | None]) -> str:
    """Of those that could be measured, in words."""
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{median(known):.2g}" if known else "none: the basis makes no error"


def _told(names: Sequence[str], count: int) -> str:
    """Which of the sets, in words."""
    some = f" ({', '.join(names)})" if 0 < len(names) < count else ""
    return f"{len(names)} of {count} sets of images{some}"


def _broken(name: str) -> str:
    return name.replace(" ", "\n")


def _check_images(model: Autoencoder, latents: Tensor) -> None:
    shape = tuple(model.decode(latents).shape[1:])
    if shape != model.input_shape:
        raise TrajOODError(
            f"probe: expected a model that decodes to images {model.input_shape}, {model.name} decodes to {shape}; "
            "a surrogate reconstructs features: use the autoencoder of images"
        )
