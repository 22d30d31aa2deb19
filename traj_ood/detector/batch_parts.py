"""The finished batches of a fit or a calibration, kept in a folder so that an interruption does not lose them."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from traj_ood.autoencoders.identity import code_of, model_identity
from traj_ood.data.batches import Batch
from traj_ood.detector.tensors import digests_of
from traj_ood.dynamics.own_functions import written_code
from traj_ood.errors import TrajOODError, check_whole
from traj_ood.io.files import alone_in
from traj_ood.io.parts import Part, PartStore
from traj_ood.io.tensor_file import digest_of
from traj_ood.io.trees import as_json
from traj_ood.scorers.batch_size import default_batch_size
from traj_ood.scorers.scorer_set import ScorerSet

CONTENTS = "contents"
"""Name of the digests of a batch's images among the tensors of its part, (B,) int64."""
_SIZE, _SIZE_FILE = "batch_size", "batch_size.json"


class BatchParts:
    """Parts of batches, each stored under a digest of all that it depends on: the model, the settings, the code, and
    the names and pixels of its images. A batch in which any of these differs is computed again.

    Args:
        folder: where the parts are stored; None: nowhere.
        what: what the batches belong to, in messages.
        scorers: the scorer set, of one scorer.
        batch_size: images per batch that are asked for. Default: those of the batches in the folder, else
            :func:`default_batch_size`.
        fitted: the tensors that the set has been fitted to, if the parts depend on them.

    Attributes:
        batch_size: images per batch, as asked for or chosen; None if nothing is stored and none are asked for.
    """

    def __init__(
        self,
        folder: str | Path | None,
        what: str,
        scorers: ScorerSet,
        batch_size: int | None,
        fitted: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._store = None
        self.batch_size = batch_size
        if folder is not None:
            folder = Path(folder).expanduser()
            self._store = PartStore(folder, f"batch of {what}", "compute it again", _SIZE_FILE, "delete this folder")
            self._identity = [what, _identity(scorers), digest_of(fitted or {}, None)]
            if batch_size is None:
                self.batch_size = self._recorded_size() or default_batch_size(scorers)

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
                key, part = "", None if batch.ids else Part()
                if self._store and batch.ids:
                    key = digest_of({CONTENTS: contents}, [*self._identity, batch.ids])
                    part = self._store.load(key)
                waiting.append((replace(batch, images=batch.images[:0].clone()), key, contents, part))
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
                if self._recorded_size() is None:
                    self._store.claim({_SIZE: self.batch_size})
                self._store.save(key, part)
            yield batch, part
        yield from stored()

    def _recorded_size(self) -> int | None:
        """The batch size with which the first batch was stored; None if there is none. Later, f may take another time,
        and batches of another size would be others."""
        assert self._store is not None
        if not self._store.index().is_file():
            return None
        size = self._store.open({_SIZE: None})[_SIZE]
        check_whole(f"{self._store.index()}: batch size", size, 1)
        return size


@contextlib.contextmanager
def parts_beside(out: Path) -> Iterator[Path | None]:
    """Context manager that yields ``OUT.parts``, the folder for the finished batches of a detector that is made at
    ``out``, and removes them at the end, unless the block raises an error; None while another process uses it."""
    folder = Path(f"{os.path.realpath(out)}.parts")  # "." has no name
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone_in(folder))
        except TrajOODError:
            yield None
            return
        yield folder
        remove_parts(folder)


def remove_parts(folder: Path) -> None:
    """Remove the parts in a folder, and the folder if nothing else is in it."""
    for path in folder.glob(f"{'[0-9a-f]' * 64}.safetensors"):
        path.unlink(missing_ok=True)
    (folder / _SIZE_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _identity(scorers: ScorerSet) -> dict[str, Any]:
    """What all parts of a scorer set depend on, except the code of this package and the fit, as JSON data."""
    scorers.try_compile()
    settings = ("tol", "max_steps", "backend", "approximate", "compile")
    autoencoder = scorers.autoencoder
    code = written_code(*code_of(autoencoder), *map(type, scorers.scorers))
    model = {**model_identity(autoencoder), "options": autoencoder.options(), "code": code}
    return as_json({"model": model, "scorer": scorers.labels, **{name: getattr(scorers, name) for name in settings}})
