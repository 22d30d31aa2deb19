"""OOD scorers: one file each, registered by name."""

from traj_ood.postprocessors.alignment import Alignment
from traj_ood.postprocessors.base import WHOLE_PATH, Evidence, FeatureScorer, Needs, Postprocessor
from traj_ood.postprocessors.contraction_rate import ContractionRate
from traj_ood.postprocessors.controls import EndDistance, FirstResidual, StartDistance, Steps
from traj_ood.postprocessors.early_path import EarlyPath
from traj_ood.postprocessors.early_trajectory import EarlyTrajectory
from traj_ood.postprocessors.feature_norm import FeatureNorm
from traj_ood.postprocessors.field import Field
from traj_ood.postprocessors.gmm import GMM
from traj_ood.postprocessors.isolation_forest import IsolationForest
from traj_ood.postprocessors.knn import KNN, PaperKNN
from traj_ood.postprocessors.knn_auto import KNNAuto
from traj_ood.postprocessors.lid import LID
from traj_ood.postprocessors.logits import Energy, MaxLogit, MaxSoftmax
from traj_ood.postprocessors.mahalanobis import Mahalanobis
from traj_ood.postprocessors.path_energy import PathEnergy
from traj_ood.postprocessors.pca import KernelPCA, PCAResidual
from traj_ood.postprocessors.reconstruction import Reconstruction
from traj_ood.postprocessors.registry import (
    POSTPROCESSORS,
    create_postprocessor,
    create_postprocessors,
    default_suite,
    register,
)
from traj_ood.postprocessors.signature import Signature
from traj_ood.postprocessors.trajectory import TrajectoryScore
from traj_ood.postprocessors.vim import ViM

__all__ = [
    "GMM",
    "KNN",
    "LID",
    "POSTPROCESSORS",
    "WHOLE_PATH",
    "Alignment",
    "ContractionRate",
    "EarlyPath",
    "EarlyTrajectory",
    "EndDistance",
    "Energy",
    "Evidence",
    "FeatureNorm",
    "FeatureScorer",
    "Field",
    "FirstResidual",
    "IsolationForest",
    "KNNAuto",
    "KernelPCA",
    "Mahalanobis",
    "MaxLogit",
    "MaxSoftmax",
    "Needs",
    "PCAResidual",
    "PaperKNN",
    "PathEnergy",
    "Postprocessor",
    "Reconstruction",
    "Signature",
    "StartDistance",
    "Steps",
    "TrajectoryScore",
    "ViM",
    "create_postprocessor",
    "create_postprocessors",
    "default_suite",
    "register",
]
