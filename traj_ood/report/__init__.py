"""``traj-ood report``: one self-contained HTML page made from the folders of runs."""

from traj_ood.evaluation.runs import Run
from traj_ood.report.page import render, write_report

__all__ = ["Run", "render", "write_report"]
