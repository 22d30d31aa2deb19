"""Finds the fastest way to call a frozen network on this machine: rows per call and memory order, timed once.

Convolutions are often faster in channels-last order, and large batches do not fit into the caches: EfficientNet-Lite0
at 224 px on one core processes 14 images/s in calls of 64 rows in the usual order, and 39 images/s in calls of one row
in channels-last order. Which way is fastest depends on the network and the processor. It is timed for about a second,
and the decision is stored, because another decision in the next process would change the rounding of every feature.
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
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import package_digest
from traj_ood.io.trees import field_of, read_json

B = TypeVar("B", bound=Backbone)
_CANDIDATE_ROWS = (1, 6, 24)  # as in rows_per_call: with other numbers rounding depends on the position in the call
_MIN_SECONDS = 0.15  # timed per candidate; four to six candidates take about a second
_MAX_CALLS = 20
_FAST_ENOUGH = 0.002  # seconds per image: decoding a file of 500 px takes longer
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Calls:
    """A way to call a network: rows per call, and whether images are in channels-last memory order."""

    rows: int
    channels_last: bool


def tuned(backbone: B, root: Path) -> B:
    """Set ``chunk`` and ``channels_last`` of a backbone to the fastest way on this machine, and return it.

    Call it before any feature is extracted. A backbone is left unchanged if it is the user's own code, has a ``chunk``
    that was set, is on a GPU, takes no other number of rows, or if the decision cannot be stored: in ``root/calls``, in
    a file per network, machine, number of threads and version of this package and the libraries. Features of two ways
    agree up to float32 rounding, about 1e-6. A detector keeps the way it was fitted with on every machine.
    """
    if backbone.library == "custom" or backbone.device.type != "cpu":
        return backbone
    with backbone.fixed(), torch.inference_mode():
        backbone.try_once()  # it may reduce chunk, or empty ladder
    if backbone.chunk != ROWS or not backbone.ladder:
        return backbone
    name = hashlib.sha256(json.dumps([backbone.fingerprint(), package_digest(), *machine()]).encode()).hexdigest()
    path = root / "calls" / f"{name[:32]}.json"
    try:
        if not path.is_file():
            decision = {"backbone": backbone.name, **asdict(fastest(backbone))}
            write_atomic(path, (json.dumps(decision, indent=2) + "\n").encode(), replace=False)  # keep the first one
        stored = read_json(path, "how a network is called here", "delete it")
        calls = Calls(field_of(stored, "rows", int, str(path)), field_of(stored, "channels_last", bool, str(path)))
    except TrajOODError:  # the folder cannot be written, or the file is damaged: keep the defaults
        return backbone
    if calls.rows in _CANDIDATE_ROWS:
        backbone.chunk, backbone.channels_last = calls.rows, calls.channels_last
    return backbone


def fastest(backbone: Backbone) -> Calls:
    """The way with the least time per image; the backbone is left as it was.

    In each memory order, more rows are tried as long as they are faster. If an image already takes less time than
    decoding a file, the current way is returned.
    """
    before = Calls(backbone.chunk, backbone.channels_last)
    taken: dict[Calls, float] = {}
    try:
        if _seconds(backbone, Calls(_CANDIDATE_ROWS[1], False)) < _FAST_ENOUGH:
            return before
        for last in (False, True):
            best = float("inf")
            for rows in _CANDIDATE_ROWS:
                way = Calls(rows, last)
                taken[way] = _seconds(backbone, way)
                if taken[way] >= best:
                    break
                best = taken[way]
    finally:
        backbone.chunk, backbone.channels_last = before.rows, before.channels_last
    return min(taken, key=taken.__getitem__)


def machine() -> list[Any]:
    """The properties of the machine that decide the speed of a call: processor, vector instructions, threads."""
    known: Callable[[], str] = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")
    return [platform.machine(), _processor(), known(), torch.get_num_threads()]


def _processor() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _seconds(backbone: Backbone, way: Calls) -> float:
    """Seconds per image of the fastest of several calls, of which the first warms up; a long call is made only once."""
    backbone.chunk, backbone.channels_last = way.rows, way.channels_last
    images = torch.zeros(way.rows, *backbone.input_shape)
    taken: list[float] = []
    while sum(taken) < _MIN_SECONDS and len(taken) < _MAX_CALLS:
        start = time.perf_counter()
        backbone.extract(images)
        taken.append(time.perf_counter() - start)
    return min(taken) / way.rows
