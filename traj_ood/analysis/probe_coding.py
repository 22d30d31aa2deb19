"""Latents of images through dictionaries of atoms and back to images: what the probe measures."""

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
    """What became of the noise: end points, and (N, *L) finite images of one step."""

    dictionary: AttractorDictionary
    first: Tensor


@dataclass(frozen=True)
class Errors:
    """Of one set: ``image`` and ``latent`` (B, dictionaries, levels) mean squared errors, ``used`` (B, dictionaries)
    atoms that OMP could use, ``decoded`` (B,) error of D(E(x)), and ``inputs`` and ``pictures`` to draw."""

    name: str
    tensors: dict[str, Tensor]

    def means(self, kind: str) -> Tensor:
        """(dictionaries, levels) mean over the images."""
        return self.tensors[kind].mean(dim=0)


@dataclass(frozen=True)
class Coder:
    """Latents of images through the dictionaries and back to images."""

    model: Autoencoder
    dictionaries: Mapping[str, OMPDictionary]
    levels: tuple[int, ...]

    def measure(self, images: NamedImages, rows: range, shown: int) -> Unit:
        """All that :class:`Errors` holds of the images at ``rows``, the first ``shown`` of them to draw.

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
