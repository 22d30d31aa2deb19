"""The paper's analyses of the latent vector field: one file per question, with its options, results and figures.

See :mod:`traj_ood.analysis.base`. Importing a file registers its question.
"""

from traj_ood.analysis.base import QUESTIONS as QUESTIONS
from traj_ood.analysis.base import Answer as Answer
from traj_ood.analysis.base import Finding as Finding
from traj_ood.analysis.base import Question as Question
from traj_ood.analysis.base import find_question as find_question
from traj_ood.analysis.base import options_from as options_from
from traj_ood.analysis.base import redraw as redraw
from traj_ood.analysis.base import register as register
from traj_ood.analysis.contraction import Contraction as Contraction
from traj_ood.analysis.convergence import Convergence as Convergence
from traj_ood.analysis.decomposition import Decomposition as Decomposition
from traj_ood.analysis.dynamics import Dynamics as Dynamics
from traj_ood.analysis.field import VectorField as VectorField

# isort: off  (the paper's order, in which they are listed)
from traj_ood.analysis.memorization import Memorization as Memorization
from traj_ood.analysis.overfitting import Overfitting as Overfitting
from traj_ood.analysis.probe import Probe as Probe
from traj_ood.analysis.regularizers import Regularizers as Regularizers
from traj_ood.analysis.score_field import ScoreField as ScoreField
from traj_ood.analysis.training import Training as Training
from traj_ood.analysis.workspace import Unit as Unit
from traj_ood.analysis.workspace import Workspace as Workspace
