"""Reconstruction of images from dictionaries of atoms: the measurements of the probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from traj_ood.analysis.images import stack
from traj_ood.analysis.omp import OMPDictionary
from traj_ood.analysis.sources import NamedImages
from traj_ood.analysis.workspace import Unit
from traj_ood.attractors import AttractorDictionary
from traj_ood.autoencoders import Autoencoder
from traj_ood.errors import TrajOODError

ORTHOGONAL, ATTRACTORS, ONE_STEP = "orthogonal basis", "attractors", "one step"
DICTIONARIES = (ORTHOGONAL, ATTRACTORS, ONE_STEP)


@dataclass(frozen=True)
class Noise:
    """The trajectories from noise.

    Attributes:
        dictionary: their end points.
        first: (N, *L), the finite images of the starts under f.
    """

    dictionary: AttractorDictionary
    first: Tensor


@dataclass(frozen=True)
class Errors:
    """The errors on one set of images.

    Attributes:
        name: name of the set.
        tensors: ``image`` and ``latent`` (B, dictionaries, levels), mean squared errors; ``used`` (B, dictionaries),
            number of atoms that OMP used; ``decoded`` (B,), error of D(E(x)); ``inputs`` and ``pictures``, images and
            reconstructions to draw.
    """

    name: str
    tensors: dict[str, Tensor]

    def means(self, kind: str) -> Tensor:
        """Mean over the images, (dictionaries, levels)."""
        return self.tensors[kind].mean(dim=0)


@dataclass(frozen=True)
class Coder:
    """Reconstructs images of a model from dictionaries.

    Attributes:
        model: the autoencoder.
        dictionaries: by name.
        levels: numbers of atoms that a reconstruction may use.
    """

    model: Autoencoder
    dictionaries: Mapping[str, OMPDictionary]
    levels: tuple[int, ...]

    def measure(self, images: NamedImages, rows: range, shown: int) -> Unit:
        """Measure the tensors of :class:`Errors` for the images at ``rows``, and keep the first ``shown`` for figures.

        Raises:
            TrajOODError: latents or decoded images are not finite; the message names the first image.
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
                f"probe: expected finite {what}, got NaN or infinity from {self.model.name} for {ids[bad[0]]}: leave "
                "such images out, or use another model"
            )

    def _guesses(self, latent: Tensor) -> tuple[Tensor, list[int]]:
        """Reconstructions of one latent (*L), (dictionaries, levels, *L) float64, and the number of atoms each used."""
        target = latent.double().flatten().numpy()
        found = [d.reconstruct(target, self.levels) for d in self.dictionaries.values()]
        guesses = torch.from_numpy(np.stack([guess for guess, _ in found]))
        return guesses.unflatten(2, latent.shape), [used for _, used in found]


def _errors(differences: Tensor, dimensions: int) -> Tensor:
    """Mean squares over all but the first ``dimensions`` dimensions, float64."""
    return differences.double().square().flatten(dimensions).mean(dim=dimensions)
