"""The scorer to try first, by kind of model: declared here alone, each with the record that it follows.

README, docs/which-score.md and docs/faq.md name the same ones; a test holds them to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from traj_ood.autoencoders import Autoencoder

ModelKind = Literal["autoencoder", "backbone"]


@dataclass(frozen=True)
class Recommendation:
    """A scorer to try first.

    Attributes:
        scorer: spec, see :func:`traj_ood.create_scorer`. It needs no class labels, which not every user has.
        record: the file below the repository that says so, and how far it reaches.
    """

    scorer: str
    record: str


RECOMMENDED: dict[ModelKind, Recommendation] = {
    "autoencoder": Recommendation("field", "results/protocol/tables.md"),
    "backbone": Recommendation("field", "results/backbone/fashion--timm-fashion-resnet--seed0/result.json"),
}
"""By kind: an autoencoder of images, or a frozen backbone with an autoencoder of its features."""


def recommended(model: Autoencoder) -> Recommendation:
    """What to try first on a model; which one is best on your data, ``traj-ood bench`` and ``compare`` tell.

    Args:
        model: with ``feature_dim`` it stands on the features of a backbone.
    """
    return RECOMMENDED["backbone" if model.feature_dim else "autoencoder"]
