"""The recommended scorer for each kind of model, with the recorded result that supports it.

README, docs/which-score.md and docs/faq.md recommend the same scorers, which a test checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from traj_ood.autoencoders import Autoencoder, check_autoencoder

ModelKind = Literal["autoencoder", "backbone"]


@dataclass(frozen=True)
class Recommendation:
    """A recommended scorer.

    Attributes:
        scorer: spec, see :func:`traj_ood.create_scorer`. It needs no class labels, which not every user has.
        record: path in the repository of the result that supports it.
    """

    scorer: str
    record: str


RECOMMENDED: dict[ModelKind, Recommendation] = {
    "autoencoder": Recommendation("field", "results/protocol/tables.md"),
    "backbone": Recommendation("mahalanobis:normalize=true", "results/natural/tables.md"),
}
"""Recommendations for an autoencoder of images, and for a frozen backbone with an autoencoder of its features. The
latter needs neither labels nor a classifier; where the backbone has one, ``nnguide`` was ahead in the same record."""


def recommended(model: Autoencoder) -> Recommendation:
    """The scorer to try first on a model; use ``traj-ood bench`` and ``compare`` to find the best one on your data.

    Args:
        model: the model; it has a backbone if its ``feature_dim`` is not 0.
    Raises:
        TrajOODError: it is no autoencoder; the message says how to make one of it.
    """
    check_autoencoder(model)
    return RECOMMENDED["backbone" if model.feature_dim else "autoencoder"]
