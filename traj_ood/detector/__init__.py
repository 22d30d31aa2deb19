"""Detectors: a model, one fitted scorer and a calibrated threshold, saved together in one folder."""

from traj_ood.data.batches import Batch, Images, batches
from traj_ood.detector.core import Detector
from traj_ood.detector.decision import Decision, Judgement
from traj_ood.detector.folder import FILE_NAME, SCHEMA, refuse_inside

__all__ = ["FILE_NAME", "SCHEMA", "Batch", "Decision", "Detector", "Images", "Judgement", "batches", "refuse_inside"]
