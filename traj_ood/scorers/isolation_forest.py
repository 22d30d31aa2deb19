"""Isolation forest over features, with its trees stored as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from traj_ood.scorers.base import Evidence, FeatureScorer
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows


@register
@dataclass
class IsolationForest(FeatureScorer):
    """2^(−mean depth / c(n)): large if few random splits isolate z (Liu et al. 2008, eq. 2).

    Equals −``score_samples`` of scikit-learn's forest. The trees are stored as tensors (children, feature, threshold,
    depth of the leaf), so a saved scorer needs neither pickle nor the same version of scikit-learn.

    Args:
        view: Default ``mean``.
        trees: number of trees. Default 100, each grown on n = 256 training images, or on all where there are fewer;
            both are the authors' values.
        seed: seed of the forest.
    """

    name: ClassVar[str] = "isolation-forest"
    summary: ClassVar[str] = "isolation forest of the training features (Liu et al. 2008)"
    suite: ClassVar[dict[str, int]] = {"": 370}
    graph_obstacle: ClassVar = (
        "its trees are descended until every sample reaches a leaf, which a fixed graph cannot do"
    )
    at_least: ClassVar = {"trees": 1}
    trees: int = 100
    seed: int = 0

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        from sklearn.ensemble import IsolationForest as Forest

        features = self.features(train).cpu().float().numpy()
        forest = Forest(n_estimators=self.trees, random_state=self.seed).fit(features)
        trees = [_tree(e.tree_) for e in forest.estimators_]
        width = max(len(t["left"]) for t in trees)
        state = {
            key: torch.stack([torch.nn.functional.pad(t[key], (0, width - len(t[key]))) for t in trees])
            for key in trees[0]
        }
        return state | {"expected": _unsuccessful_search(np.array([forest.max_samples_]))}

    def score(self, evidence: Evidence) -> Tensor:
        return in_rows(self._scores, self.features(evidence).cpu().float().double())

    def _scores(self, features: Tensor) -> Tensor:
        trees = self.state
        tree = torch.arange(len(trees["left"]))
        node = torch.zeros(len(features), len(tree), dtype=torch.int64)
        while True:
            left = trees["left"][tree, node]
            inner = left > 0  # 0 marks a leaf: the root is no node's child
            if not bool(inner.any()):
                break
            goes_left = features.gather(1, trees["feature"][tree, node]) <= trees["threshold"][tree, node]
            node = torch.where(inner, torch.where(goes_left, left, trees["right"][tree, node]), node)
        score = 2 ** (-trees["depth"][tree, node].mean(dim=1) / trees["expected"])
        return torch.where(features.isfinite().all(dim=1), score, torch.nan)


def _tree(tree: Any) -> dict[str, Tensor]:
    """The nodes of a scikit-learn tree; a leaf has left = right = feature = 0."""
    depth = tree.compute_node_depths() - 1.0  # scikit-learn gives the root a depth of 1
    return {
        "left": torch.from_numpy(tree.children_left.astype(np.int64)).clamp(min=0),
        "right": torch.from_numpy(tree.children_right.astype(np.int64)).clamp(min=0),
        "feature": torch.from_numpy(tree.feature.astype(np.int64)).clamp(min=0),
        "threshold": torch.from_numpy(tree.threshold.astype(np.float64)),
        "depth": torch.from_numpy(depth) + _unsuccessful_search(tree.n_node_samples),
    }


def _unsuccessful_search(counts: np.ndarray) -> Tensor:
    """c(n), the mean depth of an unsuccessful search in a binary search tree of n samples (Liu et al. 2008, eq. 1)."""
    n = torch.from_numpy(counts.astype(np.float64))
    large = 2 * ((n - 1).clamp(min=1).log() + np.euler_gamma) - 2 * (n - 1) / n
    return torch.where(n > 2, large, torch.where(n == 2, 1.0, 0.0).double())
