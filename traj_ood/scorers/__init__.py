"""OOD scorers: one file each, registered by name."""

from traj_ood.scorers.alignment import Alignment
from traj_ood.scorers.base import WHOLE_PATH, Evidence, FeatureScorer, Needs, Scorer
from traj_ood.scorers.contraction_rate import ContractionRate
from traj_ood.scorers.controls import EndDistance, FirstResidual, StartDistance, Steps
from traj_ood.scorers.early_path import EarlyPath
from traj_ood.scorers.early_trajectory import EarlyTrajectory
from traj_ood.scorers.feature_norm import FeatureNorm
from traj_ood.scorers.field import Field
from traj_ood.scorers.gmm import GMM
from traj_ood.scorers.isolation_forest import IsolationForest
from traj_ood.scorers.knn import KNN, PaperKNN
from traj_ood.scorers.knn_auto import KNNAuto
from traj_ood.scorers.lid import LID
from traj_ood.scorers.logits import Energy, MaxLogit, MaxSoftmax
from traj_ood.scorers.mahalanobis import Mahalanobis
from traj_ood.scorers.path_energy import PathEnergy
from traj_ood.scorers.pca import KernelPCA, PCAResidual
from traj_ood.scorers.reconstruction import Reconstruction
from traj_ood.scorers.registry import (
    SCORERS,
    create_scorer,
    create_scorers,
    default_suite,
    register,
)
from traj_ood.scorers.signature import Signature
from traj_ood.scorers.trajectory import TrajectoryScore
from traj_ood.scorers.vim import ViM

__all__ = [
    "GMM",
    "KNN",
    "LID",
    "SCORERS",
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
    "Reconstruction",
    "Scorer",
    "Signature",
    "StartDistance",
    "Steps",
    "TrajectoryScore",
    "ViM",
    "create_scorer",
    "create_scorers",
    "default_suite",
    "register",
]
