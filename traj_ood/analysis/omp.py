"""Orthogonal matching pursuit with a dictionary of atoms, and a random orthogonal basis as baseline."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


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
