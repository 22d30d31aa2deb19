"""OOD scorers: one file each, registered by name."""

from traj_ood.postprocessors.base import WHOLE_PATH, Evidence, FeatureScorer, Needs, Postprocessor
from traj_ood.postprocessors.controls import EndDistance, FirstResidual, StartDistance, Steps
from traj_ood.postprocessors.knn import KNN, PaperKNN
from traj_ood.postprocessors.logits import Energy, MaxLogit, MaxSoftmax
from traj_ood.postprocessors.mahalanobis import Mahalanobis
from traj_ood.postprocessors.reconstruction import Reconstruction
from traj_ood.postprocessors.registry import (
    POSTPROCESSORS,
    create_postprocessor,
    create_postprocessors,
    default_suite,
    register,
)
from traj_ood.postprocessors.trajectory import TrajectoryScore
from traj_ood.postprocessors.vim import ViM

__all__ = [
    "KNN",
    "POSTPROCESSORS",
    "WHOLE_PATH",
    "EndDistance",
    "Energy",
    "Evidence",
    "FeatureScorer",
    "FirstResidual",
    "Mahalanobis",
    "MaxLogit",
    "MaxSoftmax",
    "Needs",
    "PaperKNN",
    "Postprocessor",
    "Reconstruction",
    "StartDistance",
    "Steps",
    "TrajectoryScore",
    "ViM",
    "create_postprocessor",
    "create_postprocessors",
    "default_suite",
    "register",
]
