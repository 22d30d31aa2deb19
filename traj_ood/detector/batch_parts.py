"""The finished batches of a fit or a calibration, kept in a folder so that an interruption does not lose them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood.autoencoders.identity import model_identity
from traj_ood.data.batches import Batch
from traj_ood.detector.tensors import digests_of
from traj_ood.io.parts import Part, PartStore
from traj_ood.io.tensor_file import digest_of
from traj_ood.io.trees import as_json
from traj_ood.scorers.scorer_set import ScorerSet

CONTENTS = "contents"
"""Name of the digests of a batch's images among the tensors of its part, (B,) int64."""


class BatchParts:
    """Parts of batches, each stored under a digest of all that it depends on: the model, the settings, the code, and
    the names and pixels of its images. A batch in which any of these differs is computed again.

    Args:
        folder: where the parts are stored; None: nowhere.
        what: what the batches belong to, in messages.
        scorers: the scorer set, of one scorer.
        fitted: the tensors that the set has been fitted to, if the parts depend on them.
    """

    def __init__(
        self, folder: str | Path | None, what: str, scorers: ScorerSet, fitted: Mapping[str, Tensor] | None = None
    ) -> None:
        self._store = None
        if folder is not None:
            self._store = PartStore(Path(folder).expanduser(), f"batch of {what}", "compute it again")
            self._identity = [what, _identity(scorers), digest_of(fitted or {}, None)]

    def each(
        self, batches: Iterable[Batch], compute: Callable[[Iterator[Batch]], Iterator[Part]]
    ) -> Iterator[tuple[Batch, Part]]:
        """Yield each batch, without its images, with its part, in order: the stored ones, and those that ``compute``
        makes of a stream of the others, which are stored at once. Each part also has :data:`CONTENTS`; a batch without
        readable images has an empty one."""
        waiting: deque[tuple[Batch, str, Tensor, Part | None]] = deque()

        def missing() -> Iterator[Batch]:
            for batch in batches:
                contents = digests_of(batch.images)
                key = digest_of({CONTENTS: contents}, [*self._identity, batch.ids]) if self._store else ""
                part = self._store.load(key) if self._store and batch.ids else None if batch.ids else Part()
                waiting.append((replace(batch, images=torch.empty(0)), key, contents, part))
                if part is None:
                    yield batch

        def stored() -> Iterator[tuple[Batch, Part]]:
            while waiting and (part := waiting[0][-1]) is not None:
                yield waiting.popleft()[0], part

        for made in compute(missing()):
            yield from stored()
            batch, key, contents, _ = waiting.popleft()
            part = replace(made, tensors={**made.tensors, CONTENTS: contents})
            if self._store:
                self._store.save(key, part)
            yield batch, part
        yield from stored()


def remove_parts(folder: Path) -> None:
    """Remove the parts in a folder, and the folder if nothing else is in it."""
    for path in folder.glob(f"{'[0-9a-f]' * 64}.safetensors"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _identity(scorers: ScorerSet) -> dict[str, Any]:
    """What all parts of a scorer set depend on, except the code and the fit, as JSON data."""
    scorers.try_compile()
    settings = ("tol", "max_steps", "backend", "approximate", "compile")
    model = {**model_identity(scorers.autoencoder), "options": scorers.autoencoder.options()}
    return as_json({"model": model, "scorer": scorers.labels, **{name: getattr(scorers, name) for name in settings}})
