"""Export a detector to one file for other runtimes, or to an nn.Module, with a fixed number of steps."""

from traj_ood.export.check import ALLOWED, Agreement, real_images, relative_difference
from traj_ood.export.file import SCHEMA, Exported, describe, export_detector
from traj_ood.export.formats import FORMATS, OUTPUTS, Format, open_answers, open_file
from traj_ood.graph import DetectorModule, as_module

__all__ = [
    "ALLOWED",
    "FORMATS",
    "OUTPUTS",
    "SCHEMA",
    "Agreement",
    "DetectorModule",
    "Exported",
    "Format",
    "as_module",
    "describe",
    "export_detector",
    "open_answers",
    "open_file",
    "real_images",
    "relative_difference",
]
