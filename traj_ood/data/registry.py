"""The registry of benchmarks, which are loaded by name or from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from traj_ood.data.benchmark import Benchmark
from traj_ood.data.cifar10_local import load_cifar10_local
from traj_ood.data.custom import load_custom
from traj_ood.data.decoding import AS_STORED, Reading
from traj_ood.data.fashion import load_fashion
from traj_ood.data.natural import NATURAL_BENCHMARKS, load_natural
from traj_ood.data.openood import OPENOOD_BENCHMARKS, load_openood
from traj_ood.data.records import DEFAULT_OPENING, Opening
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.extensions import load_plugins

_L = TypeVar("_L", bound=Callable[..., Benchmark])
_PLACES = "given as root, in $TRAJ_OOD_DATA or as ./data"
_DIAGNOSTICS = "textures, photos, noise (diagnostics)"


@dataclass(frozen=True)
class BenchmarkInfo:
    """A benchmark as ``traj-ood list benchmarks`` shows it: its name, what is compared, and which files it needs."""

    name: str
    summary: str
    needs: str


_REGISTRY: dict[str, tuple[BenchmarkInfo, Callable[..., Benchmark]]] = {}


def load_benchmark(
    name_or_yaml: str,
    root: str | Path | None = None,
    *,
    follow_links: bool = False,
    reading: Reading = AS_STORED,
    allow_missing: bool = False,
    opening: Opening = DEFAULT_OPENING,
) -> Benchmark:
    """Load a benchmark by its registered name, or from a YAML file.

    Args:
        name_or_yaml: a name such as ``"fashion"``, or a path that ends in ``.yaml`` or ``.yml``.
        root: folder of the data. Default: where each benchmark looks.
        follow_links: let image lists follow links out of their root. Default false, see
            :func:`traj_ood.data.read_image_list`.
        reading: how image files are decoded: EXIF orientation and bit depth.
        allow_missing: omit missing OOD sets, and end the benchmark's name in ``-partial``. Default false: an error
            names them.
        opening: how the sources of records in a YAML file are opened: addresses that are allowed, stride of videos.

    Raises:
        TrajOODError: the name is unknown (similar names are suggested), or data are missing or malformed.
    """
    if str(name_or_yaml).lower().endswith((".yaml", ".yml")):
        benchmark = load_custom(name_or_yaml, root, opening)
    else:
        if name_or_yaml not in _REGISTRY:
            load_plugins("traj_ood.benchmarks", name_or_yaml)
        if name_or_yaml not in _REGISTRY:
            raise unknown_name("benchmark", name_or_yaml, [*_REGISTRY, "a path to your own .yaml file"])
        may_miss = name_or_yaml in (*OPENOOD_BENCHMARKS, *NATURAL_BENCHMARKS)
        more = {"allow_missing": True} if allow_missing and may_miss else {}
        benchmark = _REGISTRY[name_or_yaml][1](root, **more)
    benchmark = benchmark.reading(reading) if reading != AS_STORED else benchmark
    return benchmark.following_links() if follow_links else benchmark


def register_benchmark(name: str, summary: str, needs: str = "nothing") -> Callable[[_L], _L]:
    """Decorator that registers a benchmark; the function is called with the root folder of the data, or None.

    >>> @register_benchmark("pets", "cats vs dogs (near)", needs="a folder pets/, given as root")  # doctest: +SKIP
    ... def load_pets(root):
    ...     return Benchmark(...)

    Args:
        name, summary, needs: what ``traj-ood list benchmarks`` shows. Default of ``needs``: no files.
    Raises:
        TrajOODError: the name is taken or not a single word, or the summary is empty.
    """

    def register(load: _L) -> _L:
        taken = _REGISTRY.get(name)
        if not re.fullmatch(r"\w[\w.-]*", name) or name.lower().endswith((".yaml", ".yml")) or not summary.strip():
            raise TrajOODError(f"benchmark {name!r}: expected a word as its name, and a summary: give both")
        if taken is not None and _home(taken[1]) != _home(load):  # a module may be reloaded
            raise TrajOODError(f"benchmark name {name!r} is taken by {_home(taken[1])}: choose another")
        _REGISTRY[name] = (BenchmarkInfo(name, summary, needs), load)
        return load

    return register


def _home(load: Callable[..., Benchmark]) -> str:
    function = load.func if isinstance(load, partial) else load
    return f"{function.__module__}.{getattr(function, '__qualname__', '')}"


def list_benchmarks() -> list[BenchmarkInfo]:
    """All registered benchmarks, including those of installed plugins."""
    load_plugins("traj_ood.benchmarks")
    return [info for info, _ in _REGISTRY.values()]


register_benchmark(
    "fashion",
    f"Fashion-MNIST without sandals, sneakers and bags vs those (near), digits and faces (far); {_DIAGNOSTICS}",
    "nothing: Fashion-MNIST (30 MB) is found on this machine or fetched",
)(load_fashion)
for _name, _summary in OPENOOD_BENCHMARKS.items():
    register_benchmark(_name, _summary, f"OpenOOD's data folder, {_PLACES}")(partial(load_openood, _name))
register_benchmark(
    "cifar10-local",
    "CIFAR-10 without cats, deer and trucks vs those (near), Fashion-MNIST and ImageNet samples (far); " + _DIAGNOSTICS,
    f"folders cifar10/ and imagenet_sample/ of JPEG files, {_PLACES}",
)(load_cifar10_local)
for _name, _suite in NATURAL_BENCHMARKS.items():
    register_benchmark(
        _name,
        f"{_suite.images} vs scenes (near) and textures, chest X-rays, digits (far), all at {_suite.side} pixels "
        "through one JPEG step",
        f"folders {_suite.folder}/, scenes/, dtd10/, chest_xray/ and mnist/, {_PLACES}",
    )(partial(load_natural, _name))
