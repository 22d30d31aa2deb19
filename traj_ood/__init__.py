"""traj_ood: the trajectory-to-attractor OOD score, its baselines and an OpenOOD-style benchmark.

The names below are the public API. They load on first use, so that ``import traj_ood`` stays fast.
"""

from __future__ import annotations

import os
import warnings
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
        register_autoencoder,
    )
    from traj_ood.backbones import Backbone, CallableBackbone, Features, load_backbone, register_backbone
    from traj_ood.data import Benchmark, Split, list_benchmarks, load_benchmark, register_benchmark
    from traj_ood.data.preprocessing import Normalised, Preprocessing
    from traj_ood.detector import Decision, Detector, Judgement
    from traj_ood.dynamics.iterate import iterate
    from traj_ood.dynamics.maps import LowPrecision
    from traj_ood.dynamics.observers import Norm, Observer
    from traj_ood.dynamics.trajectory import Status, Trajectory
    from traj_ood.errors import TrajOODError
    from traj_ood.evaluation.diagnose import Diagnosis
    from traj_ood.evaluation.evaluator import Evaluator, RunConfig
    from traj_ood.evaluation.metrics import Metrics, bootstrap, compute_metrics
    from traj_ood.evaluation.results import Result
    from traj_ood.index import NeighborIndex, Neighbors, Recall
    from traj_ood.io.extensions import import_extension
    from traj_ood.scorers import Evidence, FeatureScorer, Needs, Scorer, create_scorer, recommended, register
    from traj_ood.scorers.scorer_set import Scored, ScorerSet
    from traj_ood.training.surrogate import SurrogateRecipe
    from traj_ood.training.surrogate_cache import surrogate_for

# MKL's default rounds some small products by memory address, so that a score would depend on an image's place in a
# batch (FixedFunction.try_places). MKL reads this setting at its first product; no cost of it could be measured.
os.environ.setdefault("MKL_CBWR", "AUTO")

__version__ = "0.1.0"

_HOME = {
    "attractors": (
        "AttractorDictionary",
        "Health",
        "NearestAttractor",
        "Verdict",
    ),
    "autoencoders": (
        "Autoencoder",
        "CallableAutoencoder",
        "ConvAutoencoder",
        "ConvNetwork",
        "SurrogateAutoencoder",
        "SurrogateNetwork",
        "ViTMAE",
        "load_autoencoder",
        "register_autoencoder",
    ),
    "backbones": (
        "Backbone",
        "CallableBackbone",
        "Features",
        "load_backbone",
        "register_backbone",
    ),
    "data": (
        "Benchmark",
        "Split",
        "list_benchmarks",
        "load_benchmark",
        "register_benchmark",
    ),
    "data.preprocessing": (
        "Normalised",
        "Preprocessing",
    ),
    "detector": (
        "Decision",
        "Detector",
        "Judgement",
    ),
    "dynamics.maps": ("LowPrecision",),
    "dynamics.iterate": ("iterate",),
    "dynamics.observers": ("Norm", "Observer"),
    "dynamics.trajectory": (
        "Status",
        "Trajectory",
    ),
    "errors": ("TrajOODError",),
    "evaluation.diagnose": ("Diagnosis",),
    "evaluation.evaluator": (
        "Evaluator",
        "RunConfig",
    ),
    "evaluation.metrics": (
        "Metrics",
        "bootstrap",
        "compute_metrics",
    ),
    "evaluation.results": ("Result",),
    "index": (
        "NeighborIndex",
        "Neighbors",
        "Recall",
    ),
    "io.extensions": ("import_extension",),
    "scorers": (
        "Evidence",
        "FeatureScorer",
        "Needs",
        "Scorer",
        "create_scorer",
        "recommended",
        "register",
    ),
    "scorers.scorer_set": (
        "Scored",
        "ScorerSet",
    ),
    "training.surrogate": ("SurrogateRecipe",),
    "training.surrogate_cache": ("surrogate_for",),
}
# Deprecated names from the first releases, which followed OpenOOD's term "postprocessor".
_FORMER = {"Postprocessor": "Scorer", "create_postprocessor": "create_scorer"}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name in _FORMER:
        warnings.warn(f"traj_ood.{name} is now traj_ood.{_FORMER[name]}", DeprecationWarning, stacklevel=2)
        name = _FORMER[name]
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'traj_ood' has no attribute {name!r}")
    return getattr(import_module(f"traj_ood.{_MODULE_OF[name]}"), name)
