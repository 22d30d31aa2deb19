"""Results on two fixed images, recorded when a detector is saved and compared when it is loaded.

Hashes only show that the files are intact. The probe shows that this machine's libraries, this version of the scorer
and a user-provided model still compute the same. It costs one encoding and two steps of one chunk of rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.scorers.scorer_set import ScorerSet

_STEPS = 2  # few, because chaotic dynamics amplify the rounding differences between devices
_COORDINATES = 16  # of z0 that are recorded
_TOLERANCE = 0.05  # relative; devices and TF32 differ by 1e-3, other weights by the whole value


def probe(scorers: ScorerSet) -> dict[str, Any]:
    """Results on the two images as JSON data: coordinates of z0, lengths of the first steps, and scores."""
    scorers.try_compile()  # before the copy, which would compile again
    short = copy.copy(scorers)
    short.max_steps = min(_STEPS, scorers.max_steps)
    encoding = scorers.autoencoder.examine(_images(scorers.autoencoder.input_shape))
    scored = short.score(encoding)
    latents = encoding.latents.flatten(1).cpu().double()
    places = torch.linspace(0, latents.shape[1] - 1, min(_COORDINATES, latents.shape[1])).long()
    rms = latents.square().mean(dim=1, keepdim=True).sqrt()
    path = scored.evidence.trajectory
    lengths = path.residuals.sqrt() if path is not None else torch.empty(2, 0)
    return {
        "latents": _numbers(torch.cat([rms, latents[:, places]], dim=1)),
        "lengths": _numbers(lengths),
        "scores": _numbers(scored.scores[scorers.labels[0]][:, None]),
    }


def check_probe(scorers: ScorerSet, expected: Mapping[str, Any], where: str) -> None:
    """Check that the results on the two images are those recorded when the detector was saved, up to rounding."""
    with foreign_errors(f"{where}: the model and the scorer do not fit together"):
        found = probe(scorers)
    for key, numbers in found.items():
        if not _agree(expected.get(key), numbers):
            raise TrajOODError(
                f"{where}: {key} of two test images differ from those at saving: the model or the scorer computes "
                "different values here: use the same model and versions (listed in the file)"
            )


def _images(shape: tuple[int, int, int]) -> Tensor:
    """The two images, (2, C, H, W): waves that are the same with every version of every library."""
    place = torch.arange(2 * math.prod(shape), dtype=torch.float64)
    return torch.sin(0.37 * place + (0.011 * place).square()).float().reshape(2, *shape)


def _numbers(values: Tensor) -> list[list[float | None]]:
    return [[v if math.isfinite(v) else None for v in row] for row in values.double().tolist()]


def _agree(expected: object, found: list[list[float | None]]) -> bool:
    """Whether values agree relative to the largest of their row, so that values near zero have no weight."""
    try:
        there, here = (np.array(rows, dtype=np.float64) for rows in (expected, found))  # None becomes NaN
    except (TypeError, ValueError, OverflowError):  # anything but rows of numbers
        return False
    if there.shape != here.shape:
        return False
    near = _TOLERANCE * np.nanmax(np.abs(here), axis=1, initial=0, keepdims=True) + 1e-6
    return bool(((np.abs(there - here) <= near) | (np.isnan(there) & np.isnan(here))).all())
