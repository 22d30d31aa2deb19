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

from traj_ood.dynamics.behaviour import waves
from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.scorers.scorer_set import ScorerSet

_STEPS = 2  # few, because chaotic dynamics amplify the rounding differences between devices
_COORDINATES = 16  # of z0, and of D(z0), that are recorded
_TOLERANCE = 0.05  # relative; devices and TF32 differ by 1e-3, other weights by the whole value
_NEWER = {"decoded"}  # what older detectors have not recorded


def probe(scorers: ScorerSet) -> dict[str, Any]:
    """Results on the two images as JSON data: coordinates of z0 and, if D is used, of D(z0), lengths of the first
    steps, and scores."""
    scorers.try_compile()  # before the copy, which would compile again
    short = copy.copy(scorers)
    short.max_steps = min(_STEPS, scorers.max_steps)
    encoding = scorers.autoencoder.examine(_images(scorers.autoencoder.input_shape))
    scored = short.score(encoding)
    path = scored.evidence.trajectory
    lengths = path.residuals.sqrt() if path is not None else torch.empty(2, 0)
    decoded = {"decoded": _sampled(scorers.autoencoder.decode(encoding.latents))} if scorers.needs.decoder else {}
    return {
        "latents": _sampled(encoding.latents),
        **decoded,
        "lengths": _numbers(lengths),
        "scores": _numbers(scored.scores[scorers.labels[0]][:, None]),
    }


def _sampled(rows: Tensor) -> list[list[float | None]]:
    """The root mean square and some coordinates of each of ``rows`` (B, …)."""
    values = rows.flatten(1).cpu().double()
    places = torch.linspace(0, values.shape[1] - 1, min(_COORDINATES, values.shape[1])).long()
    return _numbers(torch.cat([values.square().mean(dim=1, keepdim=True).sqrt(), values[:, places]], dim=1))


def check_probe(scorers: ScorerSet, expected: Mapping[str, Any], where: str) -> None:
    """Check that the results on the two images are those recorded when the detector was saved, up to rounding."""
    with foreign_errors(f"{where}: the model and the scorer do not fit together"):
        found = probe(scorers)
    for key, numbers in found.items():
        if not (_agree(expected.get(key), numbers) or (key in _NEWER and key not in expected)):
            raise TrajOODError(
                f"{where}: {key} of two test images differ from those at saving: the model or the scorer computes "
                "different values here: use the same model and versions (listed in the file)"
            )


def _images(shape: tuple[int, int, int]) -> Tensor:
    """The two images, (2, C, H, W): waves that are the same with every version of every library."""
    return waves(1, 2 * math.prod(shape)).float().reshape(2, *shape)


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
