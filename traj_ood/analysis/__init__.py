"""What the latent vector field says about a model: one file per question of the paper, each with its options, its
result and its pictures. See :mod:`traj_ood.analysis.base`."""

from traj_ood.analysis.base import NAMES, Answer, Finding, Question, find_question, options_from, register
from traj_ood.analysis.workspace import Unit, Workspace

__all__ = [
    "NAMES",
    "Answer",
    "Finding",
    "Question",
    "Unit",
    "Workspace",
    "find_question",
    "options_from",
    "register",
]
