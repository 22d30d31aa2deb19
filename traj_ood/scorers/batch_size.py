"""The default number of images per batch: as many as memory permits, fewer for a slow network."""

from __future__ import annotations

import math
import time

import torch

from traj_ood.dynamics.iterate import iterate
from traj_ood.scorers.scorer_set import ScorerSet

_MAX_BATCH = 512  # images
_LATENT_BYTES = 2**26  # limit on the images or latents of a batch, whichever are larger
_MAX_SECONDS = 120  # limit on the time that f may need for a batch, since what an interruption loses is whole batches


def default_batch_size(scorers: ScorerSet) -> int:
    """The default number of images per batch: whole chunks of the model, at most 512 images and 64 MiB of latents, and
    no more than f iterates in two minutes if every trajectory reaches the step limit. Results do not depend on it.

    f is timed with one call of a chunk, if it is iterated at all.
    """
    model = scorers.autoencoder
    latent = model.encode(torch.zeros(1, *model.input_shape))
    most = min(_MAX_BATCH, _LATENT_BYTES // (4 * max(latent.numel(), math.prod(model.input_shape))))
    steps = scorers.max_steps if scorers.needs.dictionary else min(scorers.max_steps, scorers.needs.steps)
    if steps:
        chunk = latent.repeat(model.chunk, *[1] * (latent.ndim - 1))
        began = time.perf_counter()
        iterate(model.self_map, chunk, max_steps=1, chunk=model.chunk)
        seconds = (time.perf_counter() - began) / model.chunk
        most = min(most, int(_MAX_SECONDS / (seconds * steps)))
    return max(1, most // model.chunk) * model.chunk
