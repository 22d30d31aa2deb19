"""Data-free probing (§4.1): attractors of Gaussian noise as a dictionary for images.

The dictionary is made without data: N starts from N(0, I) are iterated to their attractors, from which latents of test
images are reconstructed by orthogonal matching pursuit. The baseline is a random orthogonal basis of the latent space.
With the paper's models, on a machine with a network and a GPU::

    traj-ood analyze probe --paper --device cuda --data-root FOLDER_OF_IMAGE_FOLDERS        # Fig. 4, 7-9, 18
    traj-ood analyze probe --paper --device cuda --data-root … --option model=sdxl-vae      # Fig. 15
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from traj_ood.analysis.base import Answer, register
from traj_ood.analysis.models import settle
from traj_ood.analysis.probe_coding import (
    ATTRACTORS,
    ONE_STEP,
    ORTHOGONAL,
    Coder,
    Errors,
    OMPDictionary,
    random_basis,
)
from traj_ood.analysis.probe_report import Report, errors_figure
from traj_ood.analysis.subjects import TRAINED, ModelQuestion, NamedImages, named_images
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.attractors import AttractorDictionary
from traj_ood.autoencoders import Autoencoder, load_autoencoder
from traj_ood.autoencoders.identity import model_identity
from traj_ood.data.batches import ranges_of
from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

_DRAW_STARTS = 512  # starts drawn from one seed, independent of the units of work
_UNIT_STARTS = 64  # starts per unit of work, or the model's chunk if larger
_GROUP_IMAGES = 16  # images whose reconstructions are decoded together: 0.3 GB at 256 × 256 pixels


@register
@dataclass(frozen=True)
class Probe(ModelQuestion):
    """How well attractors of noise reconstruct images, compared with atoms that do not depend on the model.

    Attributes:
        data: benchmarks (their test and OOD splits), ``fashion-mnist``, ``mnist``, ``cifar10``, or folders of images,
            also in --data-root.
        images: maximum number of images per set. Default 50.
        atoms: N, the size of each dictionary; none (default) is the latent's dimension, as in the paper.
        shares: numbers of atoms that a reconstruction may use, as shares of N, ascending.
        tol: tolerance on the squared residual. Default 1e-5, the paper's (App. D).
        max_steps: step limit. Default 500, the paper's (App. D).
        examples: number of images per set in the figures of reconstructions.
        pictured: number of sets in these figures, the first of ``data``; 0 draws none.
        trained_on: image set that ``conv`` is trained on.
    """

    name: ClassVar[str] = "probe"
    figure: ClassVar[str] = "Figs 4, 7-9, 15, 18"
    summary: ClassVar[str] = (
        "attractors of noise as a data-free dictionary of images, against a random orthogonal basis"
    )
    choices: ClassVar[tuple[str, ...]] = (
        "The error is that of decoded images against the images, in the model's normalised pixel units; the paper does "
        "not say against what. The error in latent space, and that of D(E(x)), which is about the lowest that a "
        "dictionary can reach, are recorded, too.",
        "Atoms have length 1 and are not centred. Attractors share a common part, the mean latent, that a random basis "
        "lacks. The dictionary 'one step', f applied once to the same noise, shares it, too, so that the advantage of "
        "attractors over it is due to the iteration.",
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

    at_least: ClassVar = {**ModelQuestion.at_least, "images": 1, "max_steps": 2, "examples": 1, "pictured": 0}
    meanings: ClassVar = {
        **ModelQuestion.meanings,
        "atoms": {None: "as many as the latent has dimensions"},
        "pictured": {0: "no set"},
    }

    data: tuple[str, ...] = ("fashion",)
    images: int = 50
    atoms: int | None = None
    shares: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1)
    tol: float = 1e-5
    max_steps: int = 500
    examples: int = 5
    pictured: int = 3
    trained_on: str = "cifar10"
    bottleneck: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.atoms is None or self.atoms >= 2, "atoms", "at least 2, or none")
        ascending = list(self.shares) == sorted(set(self.shares))
        self.expect(bool(self.shares) and ascending, "shares", "at least one, ascending")
        self.expect(all(0 < s <= 1 for s in self.shares), "shares", "parts of the atoms, above 0 and at most 1")
        self.expect(self.tol > 0, "tol", "a squared residual above 0")
        self.expect(bool(self.data), "data", "at least one set of images")

    @classmethod
    def paper(cls) -> Probe:
        """§4.1: Stable Diffusion's autoencoder, N = k = 4096, 500 images of each of six sets, given as folders."""
        folders = ("LAION2B", "ImageNet1k", "EuroSAT", "CIFAR100", "PatchCamelyon", "Places365")
        return cls(model="sd-vae", data=folders, images=500, pictured=len(folders))

    def answer(self, work: Workspace) -> Answer:
        sets = named_images(self.data, work.data_root, self.images)  # fails before a model is trained
        trained = self.model == TRAINED
        model = self.subject(work, self.trained_on).model if trained else load_autoencoder(self.model).to(work.device)
        zeros = model.encode(torch.zeros(1, *model.input_shape))
        dimension = zeros[0].numel()
        count = self.atoms or dimension
        self.expect(count <= dimension, "atoms", f"at most {dimension}, the dimension of {model.name}'s latents")
        _check_images(model, zeros)
        key = self.settings("seed", "tol", "max_steps") | {"model": model_identity(model), "atoms": count}
        ends, once = self._noise(work, model, tuple(zeros.shape[1:]), count, key)
        bases = {
            ORTHOGONAL: random_basis(count, dimension, self.seed),
            ATTRACTORS: ends.points[ends.statuses != Status.NON_FINITE].flatten(1),
            ONE_STEP: once[once.isfinite().all(dim=1)],
        }
        for name, atoms in bases.items():
            self._check_atoms(name, atoms, count)
        levels = tuple(sorted({max(1, round(share * count)) for share in self.shares}))
        coder = Coder(model, {name: OMPDictionary(atoms) for name, atoms in bases.items()}, levels)
        found = [self._of_set(work, coder, images, key) for images in sets]
        return Report(ends, coder, found, self.max_steps, self.pictured).answer()

    def drawn(self, figures: Mapping[str, Any]) -> Mapping[str, Callable[[], Figure]]:
        return {"probe.png": partial(errors_figure, figures)}

    def _check_atoms(self, name: str, atoms: Tensor, starts: int) -> None:
        """Check that there are atoms and that none is zero."""
        zero = int((atoms.double().norm(dim=1) == 0).sum())
        if len(atoms) and not zero:
            return
        got = f"{zero} of {len(atoms)} that are 0" if zero else f"none: all {starts} starts became NaN or infinite"
        advice = "other training options" if self.model == TRAINED else f"another (traj-ood diagnose {self.model})"
        raise TrajOODError(
            f"probe: {name}: expected finite atoms that are not 0, got {got}; noise yields no dictionary of the model "
            f"{self.model}: use {advice}"
        )

    def _noise(
        self, work: Workspace, model: Autoencoder, shape: tuple[int, ...], count: int, key: Mapping[str, Any]
    ) -> tuple[AttractorDictionary, Tensor]:
        """The end points of N starts from N(0, I), and the starts' images under f, (N, k)."""

        def compute(rows: range) -> Unit:
            start = noise_starts(rows, count, shape, self.seed).to(model.device)
            with model.fixed(), torch.inference_mode():
                once = apply_in_chunks(model.self_map, start, model.chunk)
            ends, _ = settle(model, start, tol=self.tol, max_steps=self.max_steps)
            return Unit({**ends.tensors(), "once": once})

        parts = start_rows(count, max(_UNIT_STARTS, model.chunk))
        found = work.pieces("noise", key, parts, compute, title="attractors of noise", unit="start")
        once = found.pop("once").flatten(1)
        return AttractorDictionary(ids=tuple(map(str, range(count))), provenance={}, **found), once

    def _of_set(self, work: Workspace, coder: Coder, images: NamedImages, key: Mapping[str, Any]) -> Errors:
        """The errors of every dictionary at every level on one set of images."""
        key = {**key, "images": images.source.digest(), "levels": list(coder.levels), "shown": self.examples}

        def measure(rows: range) -> Unit:
            return coder.measure(images, rows, max(0, min(len(rows), self.examples - rows.start)))

        parts = ranges_of(len(images.source), _GROUP_IMAGES)
        return Errors(images.name, work.pieces("reconstructions", key, parts, measure, title=images.name))


def start_rows(count: int, size: int) -> list[range]:
    """Split ``count`` starts into ranges of at most ``size``, each within a single draw."""
    draws = ranges_of(count, _DRAW_STARTS)
    return [draw[part.start : part.stop] for draw in draws for part in ranges_of(len(draw), size)]


def noise_starts(rows: range, count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """The starts ``rows`` of ``count``, (n, *L), taken from a whole draw so that they do not depend on the ranges."""
    draw = rows.start // _DRAW_STARTS
    draws = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    begin = draw * _DRAW_STARTS
    whole = torch.randn(min(_DRAW_STARTS, count - begin), *shape, generator=draws)
    return whole[rows.start - begin : rows.stop - begin]


def _check_images(model: Autoencoder, latents: Tensor) -> None:
    shape = tuple(model.decode(latents).shape[1:])
    if shape != model.input_shape:
        raise TrajOODError(
            f"probe: expected a model that decodes to images {model.input_shape}, got {shape} from {model.name}: use "
            "an autoencoder of images, as a surrogate reconstructs features"
        )
