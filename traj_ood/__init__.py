"""traj_ood: the trajectory-to-attractor OOD score, its baselines and an OpenOOD-style benchmark.

The names below are the public API. They load on first use, so that ``import traj_ood`` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traj_ood.attractors import AttractorDictionary, Health, NearestAttractor, Verdict
    from traj_ood.autoencoders import (
        Autoencoder,
        CallableAutoencoder,
        ConvAutoencoder,
        ConvNetwork,
        SurrogateAutoencoder,
        SurrogateNetwork,
        ViTMAE,
        load_autoencoder,
    )
    from traj_ood.backbones import Backbone, CallableBackbone, load_backbone
    from traj_ood.data import Benchmark, Split, list_benchmarks, load_benchmark
    from traj_ood.detector import Detector, Judgement
    from traj_ood.diagnose import Diagnosis
    from traj_ood.engine import LowPrecision, Norm, Observer, iterate
    from traj_ood.errors import TrajOODError
    from traj_ood.evaluator import Evaluator, RunConfig
    from traj_ood.fit_surrogate import SurrogateRecipe, surrogate_for
    from traj_ood.index import NeighborIndex, Neighbors, Recall
    from traj_ood.metrics import Metrics, bootstrap, compute_metrics
    from traj_ood.postprocessors import Evidence, Postprocessor, create_postprocessor, register
    from traj_ood.preprocessing import Normalised, Preprocessing
    from traj_ood.results import Result
    from traj_ood.scoring import Scored, ScorerSet
    from traj_ood.trajectory import Status, Trajectory

__version__ = "0.1.0"

_HOME = {
    "attractors": ("AttractorDictionary", "Health", "NearestAttractor", "Verdict"),
    "autoencoders": (
        "Autoencoder",
        "CallableAutoencoder",
        "ConvAutoencoder",
        "ConvNetwork",
        "SurrogateAutoencoder",
        "SurrogateNetwork",
        "ViTMAE",
        "load_autoencoder",
    ),
    "backbones": ("Backbone", "CallableBackbone", "load_backbone"),
    "data": ("Benchmark", "Split", "list_benchmarks", "load_benchmark"),
    "detector": ("Detector", "Judgement"),
    "diagnose": ("Diagnosis",),
    "engine": ("LowPrecision", "Norm", "Observer", "iterate"),
    "errors": ("TrajOODError",),
    "evaluator": ("Evaluator", "RunConfig"),
    "fit_surrogate": ("SurrogateRecipe", "surrogate_for"),
    "index": ("NeighborIndex", "Neighbors", "Recall"),
    "metrics": ("Metrics", "bootstrap", "compute_metrics"),
    "postprocessors": ("Evidence", "Postprocessor", "create_postprocessor", "register"),
    "preprocessing": ("Normalised", "Preprocessing"),
    "results": ("Result",),
    "scoring": ("Scored", "ScorerSet"),
    "trajectory": ("Status", "Trajectory"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'traj_ood' has no attribute {name!r}")
    return getattr(import_module(f"traj_ood.{_MODULE_OF[name]}"), name)
