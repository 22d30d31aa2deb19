"""``traj-ood report``: one self-contained HTML page of what runs left in their folders."""

from traj_ood.report.page import render, write_report
from traj_ood.report.runs import Run

__all__ = ["Run", "render", "write_report"]
