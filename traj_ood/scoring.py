"""One pass over images for any number of scorers: encode once, iterate once, and let every scorer read the evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from traj_ood.attractors import AttractorDictionary, NearestAttractor
from traj_ood.autoencoders import Autoencoder, View
from traj_ood.engine import Norm, Observer, iterate
from traj_ood.errors import TrajOODError
from traj_ood.index import Backend, NeighborIndex
from traj_ood.postprocessors import WHOLE_PATH, Evidence, Needs, Postprocessor, create_postprocessors

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Scored:
    """Scores of B images: label → (B,) float64, higher = more OOD, and the evidence they were read from."""

    scores: dict[str, Tensor]
    evidence: Evidence


class ScorerSet:
    """An autoencoder and scorers that share one pass over its images.

    >>> scorers = ScorerSet(autoencoder, ["trajectory", "knn"])         # doctest: +SKIP
    >>> scorers.fit(train_images).score(test_images).scores["knn"]      # doctest: +SKIP

    Args:
        autoencoder: the model.
        scorers: names with options (see :func:`traj_ood.create_postprocessor`), or ``all``.
        tol, max_steps: of :func:`traj_ood.iterate`; defaults are the paper's 1e-5 and 500.
        backend: of :class:`traj_ood.NeighborIndex`.
    Raises:
        TrajOODError: unknown scorers or options.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        scorers: Sequence[str],
        *,
        tol: float = 1e-5,
        max_steps: int = 500,
        backend: Backend = "auto",
    ) -> None:
        self.autoencoder = autoencoder
        self.scorers: list[Postprocessor] = create_postprocessors(scorers, autoencoder)
        self.tol, self.max_steps, self.backend = tol, max_steps, backend
        self.needs: Needs = reduce(lambda a, b: a | b, (s.needs() for s in self.scorers))
        self.dictionary: AttractorDictionary | None = None
        self._indices: dict[View, NeighborIndex] = {}

    @property
    def labels(self) -> list[str]:
        return [s.label for s in self.scorers]

    @property
    def needs_dictionary(self) -> bool:
        return bool(self.needs.distances)

    def check_training_size(self, count: int) -> None:
        """Refuse too few training images before anything is computed.

        Raises:
            TrajOODError: fewer than 2, or fewer than a scorer needs.
        """
        if count < 2:
            raise TrajOODError(f"fewer than 2 ID samples: expected at least 2 ID training images, got {count}")
        for scorer in self.scorers:
            scorer.check_training_size(count)

    def fit(self, images: Tensor, ids: Sequence[str] | None = None, on_step: OnStep | None = None) -> ScorerSet:
        """Learn from ID training images (N, C, H, W) in the model's normalised units (``autoencoder.transform``).

        Raises:
            TrajOODError: fewer than 2 images, or what a scorer refuses.
        """
        self.check_training_size(len(images))
        dictionary, evidence = self.explore(images, tuple(ids or map(str, range(len(images)))), on_step)
        return self.learn(dictionary, evidence)

    def explore(
        self, images: Tensor, ids: tuple[str, ...], on_step: OnStep | None = None
    ) -> tuple[AttractorDictionary | None, Evidence]:
        """The training pass over one batch: its end points (None when no scorer needs them) and its evidence."""
        start = self.autoencoder.encode(images)
        evidence = self._evidence(images, start, {}, WHOLE_PATH if self.needs_dictionary else 0, on_step)
        if not self.needs_dictionary:
            return None, evidence
        provenance = {"model": self.autoencoder.fingerprint(), "tol": self.tol, "max_steps": self.max_steps}
        return AttractorDictionary.from_trajectory(start, evidence.path(), ids, provenance), evidence

    def learn(self, dictionary: AttractorDictionary | None, train: Evidence) -> ScorerSet:
        """Fit every scorer on what :meth:`explore` returned.

        Raises:
            TrajOODError: fewer than 2 training images, or what a scorer refuses.
        """
        counts = [len(f) for f in train.features.values()] + ([len(dictionary)] if dictionary is not None else [])
        if counts:
            self.check_training_size(min(counts))
        self.dictionary = dictionary
        if dictionary is not None:
            self._indices = {
                view: dictionary.index(self.autoencoder, view, self.backend) for view in sorted(self.needs.distances)
            }
        for scorer in self.scorers:
            scorer.fit(train)
        return self

    def score(self, images: Tensor, on_step: OnStep | None = None) -> Scored:
        """Score images (B, C, H, W); each image's scores depend on that image alone.

        Raises:
            TrajOODError: not fitted, or images of the wrong shape.
        """
        if self.needs_dictionary and self.dictionary is None:
            raise TrajOODError("these scorers are not fitted: call fit with ID training images first")
        start = self.autoencoder.encode(images)
        evidence = self._evidence(images, start, self._indices, self.needs.steps, on_step)
        return Scored({s.label: s.score(evidence) for s in self.scorers}, evidence)

    def _evidence(
        self,
        images: Tensor,
        start: Tensor,
        indices: dict[View, NeighborIndex],
        steps: int,
        on_step: OnStep | None,
    ) -> Evidence:
        model = self.autoencoder
        reconstruction = {}
        if "plain" in self.needs.reconstruction:
            difference = model.decode(start) - images.to(model.device)
            reconstruction["plain"] = difference.flatten(1).square().mean(dim=1).cpu().double()
        if "masked" in self.needs.reconstruction:
            reconstruction["masked"] = model.reconstruct_masked(images)
        trajectory = None
        if steps or indices:
            observers: list[Observer] = [Norm()]
            observers += [NearestAttractor(model, index, view) for view, index in indices.items()]
            trajectory = iterate(
                model.self_map,
                start,
                tol=self.tol,
                max_steps=min(self.max_steps, max(1, steps)),  # one step still measures z0
                observers=observers,
                chunk=model.chunk,
                on_step=on_step,
            )
        features = {view: model.view(start, view).float() for view in sorted(self.needs.features)}
        return Evidence(features, reconstruction, trajectory)  # type: ignore[arg-type]


def join_evidence(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several batches as one; trajectories are left out, as no scorer learns from them."""
    first = parts[0]
    return Evidence(
        features={view: torch.cat([p.features[view] for p in parts]) for view in first.features},
        reconstruction={kind: torch.cat([p.reconstruction[kind] for p in parts]) for kind in first.reconstruction},
    )
