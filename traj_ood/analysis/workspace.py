"""Workspace: runs a question in units of work, which are stored in a folder and survive an interruption."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from traj_ood.data.contents import distrust
from traj_ood.dynamics.trajectory import join_tables
from traj_ood.errors import TrajOODError
from traj_ood.io.files import check_can_write
from traj_ood.io.parts import Part, PartStore
from traj_ood.text import printable

T = TypeVar("T")
_SCRATCH = re.compile(r"[\w-]+-[0-9a-f]{16}")
_UNIT = re.compile(_SCRATCH.pattern + r"\.safetensors")


@dataclass(frozen=True)
class Unit:
    """The result of a unit of work: tensors by name, and notes that JSON can hold (no NaN)."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Workspace:
    """A folder of finished units of work, with the device and data that further units use.

    Attributes:
        folder: holds a file ``<name>-<hash of the key>.safetensors`` per finished unit. Delete it to start over; units
            computed by another version of this package's code are computed again.
        device: where networks run.
        data_root: as for :func:`traj_ood.load_benchmark`; None is each dataset's usual places.
        quiet: whether to show no progress bars.
        resumed: seconds that the units read from the folder took in earlier runs.
    """

    folder: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data_root: Path | None = None
    quiet: bool = True
    resumed: float = field(default=0.0, init=False)

    def unit(self, name: str, key: Mapping[str, Any], compute: Callable[[], Unit]) -> Unit:
        """Return the unit ``name`` with key ``key``: read from the folder if it is finished, else computed and stored.

        Args:
            name: letters, digits, ``-`` and ``_``; part of the file name.
            key: plain data for JSON that contain everything that decides the numbers: options, seed, and fingerprints
                or digests of the inputs.
            compute: computes the unit if it is not stored. If it raises, nothing is stored.
        Raises:
            TrajOODError: a damaged file, a name or key that cannot be stored, or an unwritable folder.
        """
        store = PartStore(self.folder, "unit of work", "compute it again")
        label = self.scratch(name, key).name
        found = store.load(label)
        if found is not None:
            self.resumed += found.notes["seconds"]
            return Unit(found.tensors, found.notes["own"])
        check_can_write(self.folder, label)
        began = time.perf_counter()
        made = compute()
        notes = self._plain(name, made.notes)
        tensors = {k: v.detach().cpu().contiguous() for k, v in made.tensors.items()}
        seconds = round(time.perf_counter() - began, 2)
        store.save(label, Part(tensors=tensors, notes={"own": notes, "seconds": seconds}))
        return Unit(tensors, notes)

    def pieces(
        self,
        name: str,
        key: Mapping[str, Any],
        parts: Sequence[range],
        compute: Callable[[range], Unit],
        *,
        title: str,
        unit: str = "image",
    ) -> dict[str, Tensor]:
        """Compute a unit (see :meth:`unit`) for each of ``parts``, with a progress bar, and return their tensors,
        joined along the rows. Tables (n, t) of different width are padded with NaN.

        Args:
            name, key: see :meth:`unit`; the range of the part is added to the key.
            parts: at least one range of indices, such as those of :func:`traj_ood.data.batches.ranges_of`.
            title, unit: title of the progress bar, and the name of one index in it.
        """
        found = []
        with self._bar(title, unit, total=sum(map(len, parts))) as bar:
            for rows in parts:
                found.append(self.unit(name, {**key, "rows": [rows.start, rows.stop]}, partial(compute, rows)).tensors)
                bar.update(len(rows))
        return {name: _joined([tensors[name] for tensors in found]) for name in found[0]}

    def scratch(self, name: str, key: Mapping[str, Any]) -> Path:
        """A folder for temporary files of a unit, such as the checkpoints of a training; remove it afterwards."""
        digest = hashlib.sha256(json.dumps(self._plain(name, key), sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{name}-{digest}"

    def track(self, items: Collection[T], title: str, unit: str) -> tqdm[T]:
        """Iterate over ``items`` with a progress bar on stderr that appears after two seconds."""
        return self._bar(title, unit, iterable=items)

    def _bar(self, title: str, unit: str, **extent: Any) -> tqdm[Any]:
        return tqdm(desc=printable(title), unit=unit, delay=2, disable=self.quiet, dynamic_ncols=True, **extent)

    def discard(self) -> None:
        """Delete all units, finished or not, and forget the stored digests of images. Other files in the folder are
        kept, since they may not be ours."""
        distrust()
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if _UNIT.fullmatch(path.name):
                path.unlink()
            elif _SCRATCH.fullmatch(path.name) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def _plain(name: str, tree: Mapping[str, Any]) -> Any:
        if not re.fullmatch(r"[\w-]+", name):
            raise TrajOODError(f"unit name {name!r}: expected letters, digits, '_' and '-'; choose another name")
        try:
            return json.loads(json.dumps(dict(tree), sort_keys=True, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TrajOODError(f"unit {name}: expected plain data that JSON can hold, got: {error}") from error


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(parts)) if len({part.shape[1:] for part in parts}) == 1 else join_tables(parts)
