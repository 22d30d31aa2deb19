"""``traj-ood report``: one self-contained HTML page of what runs left in their folders."""

from traj_ood.evaluation.runs import Run
from traj_ood.report.page import render, write_report

__all__ = ["Run", "render", "write_report"]
