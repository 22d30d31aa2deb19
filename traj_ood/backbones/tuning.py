"""How a frozen network is called fastest on this machine: rows at a time and the order of pixels in memory, timed once.

A convolution over channels that lie next to each other is often the faster one, and large batches leave the caches:
EfficientNet-Lite0 at 224 px on one core makes 14 images a second of 64 rows in the usual order, 39 of one row with its
channels last. Which is fastest follows the network and the processor, so it is timed, for about a second, and kept: a
decision that came out otherwise in the next process would move every feature by its rounding.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from traj_ood.backbones.base import Backbone
from traj_ood.dynamics.chunks import ROWS
from traj_ood.errors import TrajOODError
from traj_ood.io.files import cache_folder, write_atomic
from traj_ood.io.provenance import package_digest
from traj_ood.io.trees import field_of, read_json

B = TypeVar("B", bound=Backbone)
_ROWS = (1, 6, 24)  # as rows_per_call has them: places in other numbers of rows round otherwise
_SECONDS = 0.15  # of each way, at least; four to six ways are about a second
_MOST_CALLS = 20
_QUICK = 0.002  # seconds an image: a file of 500 px takes longer to decode
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Calls:
    """Rows of one call of a network, and whether the channels of its images come last in memory."""

    rows: int
    channels_last: bool


def tuned(backbone: B, root: Path | None = None) -> B:
    """The backbone, from now on called in the way that is fastest on this machine, to be used before any feature is
    made. Left as it is: one of the user's own code, one whose ``chunk`` was set, one on a GPU, one that takes no other
    number of rows, and any where the decision cannot be kept.

    Features of two ways agree to the rounding of float32, about 1e-6. A detector keeps the way that it was fitted
    with, whichever machine it goes to.

    Args:
        root: decisions go to ``root/calls``, a file for each network, machine, number of threads and version of this
            package and the libraries. Default: the cache folder.
    """
    if backbone.library == "custom" or backbone.chunk != ROWS or backbone.device.type != "cpu" or not backbone.ladder:
        return backbone
    name = hashlib.sha256(json.dumps([backbone.fingerprint(), package_digest(), *machine()]).encode()).hexdigest()
    path = (root or cache_folder()) / "calls" / f"{name[:32]}.json"
    try:
        if not path.is_file():
            decision = {"backbone": backbone.name, **asdict(fastest(backbone))}
            write_atomic(path, (json.dumps(decision, indent=2) + "\n").encode(), replace=False)  # the first one stays
        stored = read_json(path, "how a network is called here", "delete it")
        calls = Calls(field_of(stored, "rows", int, str(path)), field_of(stored, "channels_last", bool, str(path)))
    except TrajOODError:  # a folder that cannot be written, or a damaged file: as everywhere else
        return backbone
    if calls.rows in _ROWS:
        backbone.chunk, backbone.channels_last = calls.rows, calls.channels_last
    return backbone


def fastest(backbone: Backbone) -> Calls:
    """The way with the least time an image; the backbone is left as it was. In each order more rows are tried for as
    long as they are faster. Where an image takes less than reading one does, it is the way it is called now."""
    before = Calls(backbone.chunk, backbone.channels_last)
    taken: dict[Calls, float] = {}
    try:
        if _seconds(backbone, Calls(_ROWS[1], False)) < _QUICK:
            return before
        for last in (False, True):
            best = float("inf")
            for rows in _ROWS:
                way = Calls(rows, last)
                taken[way] = _seconds(backbone, way)
                if taken[way] >= best:
                    break
                best = taken[way]
    finally:
        backbone.chunk, backbone.channels_last = before.rows, before.channels_last
    return min(taken, key=taken.__getitem__)


def machine() -> list[Any]:
    """What decides the speed of a call besides the network: processor, vector instructions, threads. No name of it."""
    known: Callable[[], str] = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")
    return [platform.machine(), _processor(), known(), torch.get_num_threads()]


def _processor() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _seconds(backbone: Backbone, way: Calls) -> float:
    """Of the fastest call, by image. The first one makes ready what the others use; a long one counts all the same."""
    backbone.chunk, backbone.channels_last = way.rows, way.channels_last
    images = torch.zeros(way.rows, *backbone.input_shape)
    taken: list[float] = []
    while sum(taken) < _SECONDS and len(taken) < _MOST_CALLS:
        start = time.perf_counter()
        backbone.extract(images)
        taken.append(time.perf_counter() - start)
    return min(taken) / way.rows
