"""A fitted scorer set as one torch module, which exporters can record as a graph."""

from traj_ood.graph.fixed_steps import reference
from traj_ood.graph.module import DetectorModule, HasScorers, as_module
from traj_ood.graph.step import EXAMPLE_ROWS, PinnedTensors, can_scan

__all__ = ["EXAMPLE_ROWS", "DetectorModule", "HasScorers", "PinnedTensors", "as_module", "can_scan", "reference"]
