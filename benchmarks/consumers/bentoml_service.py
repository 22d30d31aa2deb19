"""A detector as a BentoML service:

    TRAJ_OOD_DETECTOR=my.detector bentoml serve benchmarks/consumers/bentoml_service.py:OutOfDistribution
    curl -F images=@photo.jpg http://127.0.0.1:3000/score

BentoML batches across clients. The answers are the decisions of `traj-ood serve` and `traj-ood score`.
"""

from __future__ import annotations

import os
from typing import Any

import bentoml
from PIL.Image import Image

from traj_ood import Detector


@bentoml.service(traffic={"timeout": 30, "max_concurrency": 64})
class OutOfDistribution:
    """One detector, loaded once."""

    def __init__(self) -> None:
        self.detector = Detector.load(os.environ["TRAJ_OOD_DETECTOR"])

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=5000)
    def score(self, images: list[Image]) -> list[dict[str, Any]]:
        """One decision for each image."""
        return [one.as_dict() for one in self.detector.decide(images)]
