"""OOD scorers: one file each, registered by name when it is imported here.

A new scorer is a file of its own and an import below; nothing else is edited. What belongs to the suite ``all``, its
class declares itself (:attr:`Scorer.suite`).
"""

from traj_ood.scorers.alignment import Alignment as Alignment
from traj_ood.scorers.ash import ASH as ASH
from traj_ood.scorers.base import WHOLE_PATH as WHOLE_PATH
from traj_ood.scorers.base import Evidence as Evidence
from traj_ood.scorers.base import FeatureScorer as FeatureScorer
from traj_ood.scorers.base import Needs as Needs
from traj_ood.scorers.base import Scorer as Scorer
from traj_ood.scorers.contraction_rate import ContractionRate as ContractionRate
from traj_ood.scorers.controls import EndDistance as EndDistance
from traj_ood.scorers.controls import FirstResidual as FirstResidual
from traj_ood.scorers.controls import StartDistance as StartDistance
from traj_ood.scorers.controls import Steps as Steps
from traj_ood.scorers.diffpath import DiffPath as DiffPath
from traj_ood.scorers.early_path import EarlyPath as EarlyPath
from traj_ood.scorers.early_trajectory import EarlyTrajectory as EarlyTrajectory
from traj_ood.scorers.entry_path import EntryPath as EntryPath
from traj_ood.scorers.fdbd import FDBD as FDBD
from traj_ood.scorers.feature_norm import FeatureNorm as FeatureNorm
from traj_ood.scorers.field import Field as Field
from traj_ood.scorers.gen import GEN as GEN
from traj_ood.scorers.gmm import GMM as GMM
from traj_ood.scorers.isolation_forest import IsolationForest as IsolationForest
from traj_ood.scorers.knn import KNN as KNN
from traj_ood.scorers.knn import PaperKNN as PaperKNN
from traj_ood.scorers.knn_auto import KNNAuto as KNNAuto
from traj_ood.scorers.lid import LID as LID
from traj_ood.scorers.logits import Energy as Energy
from traj_ood.scorers.logits import MaxLogit as MaxLogit
from traj_ood.scorers.logits import MaxSoftmax as MaxSoftmax
from traj_ood.scorers.mahalanobis import Mahalanobis as Mahalanobis
from traj_ood.scorers.msma import MSMA as MSMA
from traj_ood.scorers.nci import NCI as NCI
from traj_ood.scorers.nnguide import NNGuide as NNGuide
from traj_ood.scorers.patchcore import PatchCore as PatchCore
from traj_ood.scorers.path_energy import PathEnergy as PathEnergy
from traj_ood.scorers.pca import KernelPCA as KernelPCA
from traj_ood.scorers.pca import PCAResidual as PCAResidual
from traj_ood.scorers.react import ReAct as ReAct
from traj_ood.scorers.recommended import RECOMMENDED as RECOMMENDED
from traj_ood.scorers.recommended import Recommendation as Recommendation
from traj_ood.scorers.recommended import recommended as recommended
from traj_ood.scorers.reconstruction import Reconstruction as Reconstruction
from traj_ood.scorers.registry import SCORERS as SCORERS
from traj_ood.scorers.registry import create_scorer as create_scorer
from traj_ood.scorers.registry import create_scorers as create_scorers
from traj_ood.scorers.registry import default_suite as default_suite
from traj_ood.scorers.registry import register as register
from traj_ood.scorers.residual import Residual as Residual
from traj_ood.scorers.rmds import RMDS as RMDS
from traj_ood.scorers.scale import SCALE as SCALE
from traj_ood.scorers.scoped import SCOPED as SCOPED
from traj_ood.scorers.she import SHE as SHE
from traj_ood.scorers.signature import Signature as Signature
from traj_ood.scorers.ssd import SSD as SSD
from traj_ood.scorers.trajectory import TrajectoryScore as TrajectoryScore
from traj_ood.scorers.vim import ViM as ViM
