"""PatchCore: distance to a coreset of training patches (Roth et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from traj_ood.autoencoders import VIEWS, FeatureView
from traj_ood.errors import TrajOODError
from traj_ood.scorers.bank import SearchingScorer
from traj_ood.scorers.base import Evidence, FeatureScorer
from traj_ood.scorers.gaussians import in_cells
from traj_ood.scorers.registry import register

_DISTORTION = 0.9  # eps of the random projection in which patches are chosen: the authors' and anomalib's


@register
@dataclass
class PatchCore(SearchingScorer, FeatureScorer):
    """Weighted distance w · s of the image's farthest patch to a coreset of training patches.

    s is the largest distance of a patch to its nearest coreset patch m*. With the softmax of that patch's distances to
    the ``neighbours`` nearest coreset patches of m*, w is 1 minus its value at m* itself. PatchCore (Roth et al., CVPR
    2022) in anomalib's form: the coreset is chosen greedily in a sparse random projection, starting from a random patch
    and always adding the patch farthest from those already chosen.

    Args:
        view: Default ``grid``: pooled cells of the latent, at most 4 × 4 (the paper pools patches, too). With a view of
            one vector per image the coreset consists of images.
        share: share of the training patches in the coreset, which holds at least one. Default 0.1, anomalib's.
        neighbours: number of neighbours of m* in the coreset, m* included. Default 9, anomalib's; with 1 the score is
            s.
        seed: seed of the projection and the first patch.
    """

    name: ClassVar[str] = "patchcore"
    summary: ClassVar[str] = "distance of the farthest patch to a coreset of training patches (Roth et al. 2022)"
    suite: ClassVar[dict[str, int]] = {}  # not in ``all``: the coreset costs the square of the number of patches
    views: ClassVar[tuple[str, ...]] = ("grid", *(v for v in VIEWS if v != "tokens"), "backbone")
    view: FeatureView = "grid"
    at_least: ClassVar = {"neighbours": 1}
    share: float = 0.1
    neighbours: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise TrajOODError(f"scorer {self.name}: share must be above 0 and at most 1, got {self.share}")

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        patches = self._patches(train).flatten(0, 1).float()
        bank = patches[greedy_coreset(patches, max(1, int(len(patches) * self.share)), self.seed)]
        support = torch.cdist(bank.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return {"bank": bank, "support": support.topk(min(self.neighbours, len(bank)), largest=False).indices}

    def points(self) -> Tensor:
        return self.state["bank"]

    def score(self, evidence: Evidence) -> Tensor:
        patches = self._patches(evidence).float()
        found = self.index(evidence.features[self.view].device).nearest(patches.flatten(0, 1))
        distances = found.distances[:, 0].cpu().unflatten(0, patches.shape[:2])
        nearest = found.indices[:, 0].cpu().unflatten(0, patches.shape[:2])
        largest, farthest = distances.max(dim=1, keepdim=True)
        if self.state["support"].shape[1] == 1:
            return largest[:, 0]
        place = farthest[:, :, None].expand(-1, 1, patches.shape[2])
        patch = patches.gather(1, place).double()  # (B, 1, d)
        around = self.state["bank"].double()[self.state["support"][nearest.gather(1, farthest)[:, 0]]]
        weights = 1 - (patch - around).norm(dim=2).softmax(dim=1)[:, 0]
        return weights * largest[:, 0]

    def _patches(self, evidence: Evidence) -> Tensor:
        """The patches, (B, cells, d) on the CPU."""
        return in_cells(self.features(evidence).cpu())


def greedy_coreset(patches: Tensor, size: int, seed: int) -> Tensor:
    """Indices (size,) int64 of a greedy k-centre coreset of patches (N, d)."""
    projected = torch.from_numpy(_project(patches, seed))
    place = torch.randint(len(patches), (1,), generator=torch.Generator().manual_seed(seed))
    chosen = [int(place)]
    least = torch.full((len(patches),), torch.inf, dtype=torch.float64)
    for _ in range(size - 1):
        least = torch.minimum(least, (projected - projected[chosen[-1]]).norm(dim=1))
        least[chosen[-1]] = 0
        chosen.append(int(least.argmax()))
    return torch.tensor(chosen)


def _project(patches: Tensor, seed: int) -> np.ndarray:
    from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim

    values = patches.double().numpy()
    # No projection where it would not lower the dimension.
    if johnson_lindenstrauss_min_dim(len(values), eps=_DISTORTION) >= values.shape[1]:
        return values
    found: np.ndarray = SparseRandomProjection(eps=_DISTORTION, random_state=seed).fit_transform(values)
    return found
