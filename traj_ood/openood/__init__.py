"""Use every scorer as a postprocessor in OpenOOD (v1.5, main of December 2025).

``register()`` makes the scorer ``knn-paper`` available in OpenOOD as ``traj_ood_knn_paper``; the prefix keeps it apart
from OpenOOD's own ``knn``, ``vim``, …, which are unchanged. Then

>>> from traj_ood import openood as bridge                                         # doctest: +SKIP
>>> net = bridge.AutoencoderNet(traj_ood.load_autoencoder("fashion-mae"))          # doctest: +SKIP
>>> bridge.evaluator(net, "cifar10", "traj_ood_trajectory").eval_ood()             # doctest: +SKIP

or, in a clone of OpenOOD, ``python -m traj_ood.openood main.py --config … configs/postprocessors/traj_ood_knn.yml``.

OpenOOD's confidence is HIGH = in distribution; the sign is flipped in :mod:`traj_ood.openood.bridge` only. openood is
imported when a function here first needs it.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from traj_ood.autoencoders import Autoencoder
from traj_ood.errors import TrajOODError
from traj_ood.openood.bridge import Bridge, postprocessor_class
from traj_ood.openood.library import load_library, serve_pipelines
from traj_ood.openood.nets import AutoencoderNet, device_of, preprocessor
from traj_ood.openood.settings import Settings, config_section, openood_names, write_configs

__all__ = [
    "AutoencoderNet",
    "Bridge",
    "Settings",
    "config_root",
    "evaluator",
    "openood_names",
    "postprocessor",
    "preprocessor",
    "register",
    "write_configs",
]


def register(config_root: str | Path | None = None) -> list[str]:
    """Register every scorer as a postprocessor in OpenOOD.

    OpenOOD has two registries: a table for its ``Evaluator``, and a function for its command-line pipelines, which is
    wrapped because its table cannot be accessed. Calling ``register`` again has no effect.

    Args:
        config_root: folder of OpenOOD's configs; missing yml files are written to its ``postprocessors``, existing ones
            kept. OpenOOD would look for a missing file on the network and fail. Default: none; pass
            :func:`config_root` to the Evaluator instead.
    Returns:
        The names, sorted.
    Raises:
        TrajOODError: openood is missing, incomplete or too old, a name is taken, or the folder cannot be written.
    """
    library = load_library()
    cls = postprocessor_class()
    table = library.api_postprocessor.postprocessors
    for name in openood_names():
        if table.setdefault(name, cls) is not cls:
            raise TrajOODError(f"OpenOOD's postprocessor name {name!r} is taken by {table[name].__name__}: rename it")
    serve_pipelines(library.utils, cls)
    if config_root is not None:
        write_configs(Path(config_root) / "postprocessors", keep=True)
    return sorted(openood_names())


def config_root() -> str:
    """A temporary folder with the yml files of all registered scorers, for ``Evaluator(config_root=…)``.

    It has no others: with this folder and one of OpenOOD's own names, OpenOOD downloads that yml file into it.
    """
    folder = _own_configs()
    write_configs(folder / "postprocessors", keep=True)  # again, as more scorers may have been registered
    return str(folder)


@cache
def _own_configs() -> Path:
    """A folder that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="traj_ood-openood-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_own_root = config_root  # an alias, because an argument of evaluator() has the same name


def evaluator(
    net: nn.Module | Autoencoder,
    id_name: str,
    postprocessor: Any,
    *,
    data_root: str | Path = "./data",
    config_root: str | Path | None = None,
    fsood: bool = False,
    **options: Any,
) -> Any:
    """OpenOOD's ``Evaluator``, unchanged, made usable without a GPU and for models without classes.

    OpenOOD computes the accuracy on CUDA whatever the device of the network, also for networks without classes. Here it
    is NaN (not available) for a model without a classifier, and computed on the network's own device for a classifier
    that is not on CUDA.

    Args:
        net: a classifier of OpenOOD, an :class:`AutoencoderNet`, or an Autoencoder, which is wrapped.
        id_name: OpenOOD's benchmark, such as ``cifar10``.
        postprocessor: a name, ours or OpenOOD's, or an instance (see :func:`postprocessor`).
        data_root: OpenOOD's data folder; OpenOOD downloads missing data.
        config_root: folder of configs. Default: ours for our names, OpenOOD's for others.
        fsood: also compute the accuracy on covariate-shifted sets, which ``eval_ood(fsood=True)`` reports.
        options: further arguments of the Evaluator (``batch_size``, ``shuffle``, ``num_workers``, ``preprocessor``).
            The preprocessor of an autoencoder defaults to :func:`preprocessor`.
    Raises:
        TrajOODError: as :func:`register`, or if the scorer refuses the model or data.
    """
    register()
    net = AutoencoderNet(net) if isinstance(net, Autoencoder) else net
    if isinstance(net, AutoencoderNet):
        options.setdefault("preprocessor", preprocessor(net))
    if isinstance(postprocessor, str):
        own = _own_root() if postprocessor in openood_names() else None
        folder = config_root or own  # None: OpenOOD's own
        options |= {"postprocessor_name": postprocessor, "config_root": str(folder) if folder else None}
    else:
        options["postprocessor"] = postprocessor
    made = load_library().api.Evaluator(net, id_name=id_name, data_root=str(data_root), **options)
    if isinstance(net, AutoencoderNet) and not net.autoencoder.classes:
        made.metrics["id_acc"] = made.metrics["csid_acc"] = float("nan")
    elif device_of(net).type != "cuda":
        loaders = made.dataloader_dict
        made.scores["id_preds"], made.scores["id_labels"] = _predict(net, loaders["id"]["test"])
        for name, loader in loaders["csid"].items() if fsood else ():
            made.scores["csid_preds"][name], made.scores["csid_labels"][name] = _predict(net, loader)
    return made


def postprocessor(
    spec: str,
    *,
    attractors: int = 2000,
    seed: int = 0,
    tol: float = 1e-5,
    max_steps: int = 500,
    sweep: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """An instance for ``Evaluator(postprocessor=…)`` of a scorer such as ``trajectory:horizon=16``.

    Args:
        spec: see :func:`traj_ood.create_scorer`.
        attractors, seed, tol, max_steps: see :class:`Settings`.
        sweep: values by option; turns on OpenOOD's automatic parameter search. Default: none.
    Raises:
        TrajOODError: openood is missing, or the spec or the sweep is invalid.
    """
    learning = {"attractors": attractors, "seed": seed, "tol": tol, "max_steps": max_steps}
    section = config_section(spec, search=bool(sweep), sweep=sweep or {}, **learning)
    return postprocessor_class()(load_library().config.Config(postprocessor=section))


def _predict(net: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
    """Predicted classes and labels, (N,) each, computed on the network's device."""
    net.eval()
    with torch.no_grad():
        pairs = [(net(batch["data"].to(device_of(net))).argmax(1).cpu(), batch["label"]) for batch in loader]
    return torch.cat([p for p, _ in pairs]), torch.cat([label for _, label in pairs])
