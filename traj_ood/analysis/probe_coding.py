"""Reconstruction of images from dictionaries of atoms, by orthogonal matching pursuit: what the probe measures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from traj_ood.analysis.images import stack
from traj_ood.analysis.subjects import NamedImages
from traj_ood.analysis.workspace import Unit
from traj_ood.autoencoders import Autoencoder
from traj_ood.errors import TrajOODError

Floats = NDArray[np.float64]
ORTHOGONAL, ATTRACTORS, ONE_STEP = "orthogonal basis", "attractors", "one step"
DICTIONARIES = (ORTHOGONAL, ATTRACTORS, ONE_STEP)


def random_basis(count: int, dimension: int, seed: int) -> Tensor:
    """The first rows of a uniformly random (Haar) orthogonal basis, (count, dimension) float64.

    Computed by QR of a Gaussian matrix, with the signs that make the distribution uniform.
    """
    draws = torch.Generator().manual_seed(seed * 1_000_003 + 999_983)
    gaussian = torch.randn(dimension, count, generator=draws, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).T.contiguous()


class OMPDictionary:
    """A dictionary for orthogonal matching pursuit, of atoms (N, k) other than 0; they are scaled to length 1 in
    float64."""

    def __init__(self, atoms: Tensor) -> None:
        raw = atoms.detach().cpu().double()
        self.atoms: Floats = (raw / raw.norm(dim=1, keepdim=True)).numpy()
        self.gram: Floats = self.atoms @ self.atoms.T

    def __len__(self) -> int:
        return len(self.atoms)

    def reconstruct(self, target: Floats, levels: Sequence[int]) -> tuple[Floats, int]:
        """Approximate a latent by few atoms, with scikit-learn's ``orthogonal_mp_gram``.

        In each step the pursuit adds the atom most correlated with the residual and solves least squares over all atoms
        chosen so far, so the reconstruction with m atoms is the m-th step.

        Args:
            target: (k,).
            levels: numbers of atoms, ascending.
        Returns:
            The reconstructions (levels, k), and the number of atoms used. The pursuit ends early, and later levels
            repeat the last reconstruction, if that is exact or every further atom depends on those chosen.
        """
        from sklearn.linear_model import orthogonal_mp_gram

        most = min(max(levels), len(self))
        with warnings.catch_warnings():  # an early end is returned as ``used``
            warnings.simplefilter("ignore", RuntimeWarning)
            path = orthogonal_mp_gram(
                self.gram, self.atoms @ target, n_nonzero_coefs=most, return_path=True, copy_Gram=True
            )
        path = np.asarray(path, dtype=np.float64).reshape(len(self), -1)
        used = int((np.abs(path).sum(axis=0) > 0).sum())
        if not used:
            return np.zeros((len(levels), len(target))), 0
        columns = [min(level, used) - 1 for level in levels]
        return path[:, columns].T @ self.atoms, used

    def spectrum(self) -> tuple[int, int]:
        """Numerical rank, and the number of directions that hold 90 % of the atoms' energy."""
        values = np.sort(np.linalg.eigvalsh(self.gram))[::-1].clip(min=0)
        # Atoms are computed in float32: singular values below its rounding do not count.
        least = values[0] * (len(values) * np.finfo(np.float32).eps) ** 2
        rank = int((values > least).sum())
        return rank, int(np.searchsorted(np.cumsum(values) / values.sum(), 0.9) + 1)


@dataclass(frozen=True)
class Errors:
    """The errors on one set of images.

    Attributes:
        tensors: ``image`` and ``latent`` (B, dictionaries, levels), mean squared errors; ``used`` (B, dictionaries),
            number of atoms that OMP used; ``decoded`` (B,), error of D(E(x)); ``inputs`` and ``pictures``, images and
            reconstructions to draw.
    """

    name: str
    tensors: dict[str, Tensor]

    def means(self, kind: str, dictionary: str) -> Tensor:
        """Means over the images for one dictionary, (levels,); ``kind`` is ``image`` or ``latent``."""
        return self.tensors[kind].mean(dim=0)[DICTIONARIES.index(dictionary)]


@dataclass(frozen=True)
class Coder:
    """Reconstructs images of a model from dictionaries, of which it may use ``levels`` numbers of atoms."""

    model: Autoencoder
    dictionaries: Mapping[str, OMPDictionary]
    levels: tuple[int, ...]

    def measure(self, images: NamedImages, rows: range, shown: int) -> Unit:
        """Measure the tensors of :class:`Errors` for the images at ``rows``, and keep the first ``shown`` for figures.

        Raises:
            TrajOODError: latents or decoded images are not finite; the message names the first image.
        """
        source = images.source.select(list(rows))
        pixels = stack(self.model.transform, source)
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
