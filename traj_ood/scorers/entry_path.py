"""Scores of the path that starts at the input: x_0 = x, x_1 = D(E(x)), x_2 = D(E(x_1)), …, with attractors D(z*)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.index import NeighborIndex
from traj_ood.scorers.bank import SearchingScorer
from traj_ood.scorers.base import Evidence, Needs
from traj_ood.scorers.covariance import gaussian
from traj_ood.scorers.folds import folds
from traj_ood.scorers.gaussians import (
    distances_to_gaussians,
    learn_gaussians,
    named,
    squares_to,
    under,
    whitened,
)
from traj_ood.scorers.labels import classes_of
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows

PARTS = ("step", "attractors", "energy", "residual", "static")
_FOLDS = 5
_MIN_IMAGES = 2 * _FOLDS
_TINY = 1e-12


@register
@dataclass
class EntryPath(SearchingScorer):
    """Standardised statistics of the path of F = D∘E that starts at x: Σ over parts of (s − E[s]) / Std[s].

    Latent scorers start at z_0 = E(x), behind the bottleneck, and so cannot see what E discards of x. F maps the space
    of x into itself, x_{t+1} = D(z_t), so its path costs no more than that of f and starts one step earlier.

    The space is the backbone's features for a surrogate, and the image itself, pooled to cells, for other autoencoders
    (:meth:`traj_ood.Autoencoder.entry`). Points are scaled to the unit sphere and whitened by Ledoit–Wolf Gaussians of
    the training images, one per cell: y = W(x). With H = ``horizon`` the parts are

    * ``step``: ‖y_1 − y_0‖, which measures what E discards;
    * ``attractors``: the mean over t = 0 … H of the distance of y_t to the nearest whitened D(z*);
    * ``energy``: √(Σ_{t<H} ‖y_{t+1} − y_t‖²);
    * ``residual``: the Mahalanobis distance of y_1 − y_0 to its linear prediction from y_0, that is, what the step
      tells beyond the starting point;
    * ``static``: ‖y_0‖, class-free ``mahalanobis:normalize=true``, which needs no path.

    E[s] and Std[s] are estimated by five-fold cross-fitting: each fifth of the training images is measured with the
    Gaussians and attractors of the other four.

    It is a candidate, not the recommended scorer (docs/which-score.md).

    Cost: ``horizon`` − 1 evaluations of f, and one decoding per step.

    Args:
        parts: names of parts, joined by +. Default ``step+attractors``.
        horizon: H. Default 1: x and its reconstruction.
        read: how parts are combined. ``sum`` (default) is the sum above. ``two-sided`` sums |s − E[s]| / Std[s],
            because an OOD image may be reconstructed too well. ``density`` is the Mahalanobis distance of the vector of
            all log s to its Gaussian over held-out images.
        sphere: whether to L2-normalise the points first. Default true, as Mahalanobis++ does.
        classes: whether ``attractors`` measures the distance to attractors of the predicted class only, the class whose
            mean of y_0 over training images is nearest to y_0; it needs class labels. Default false, because most
            benchmarks have none, and no record shows that it helps. Only classes with a finite attractor are predicted.
    """

    name: ClassVar[str] = "entry-path"
    summary: ClassVar[str] = "path of D(E(x)) from x itself in whitened space: first step, attractors D(z*), energy"
    suite: ClassVar[dict[str, int]] = {
        "": 141,
        "parts=step": 142,
        "parts=step+attractors+static:read=density": 143,
    }
    at_least: ClassVar = {"horizon": 1}
    parts: str = "step+attractors"
    horizon: int = 1
    read: Literal["sum", "two-sided", "density"] = "sum"
    sphere: bool = True
    classes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._parts = tuple(self.parts.split("+"))
        for part in self._parts:
            if part not in PARTS:
                raise unknown_name(f"part of scorer {self.name}", part, PARTS)
        if len(set(self._parts)) < len(self._parts):
            raise TrajOODError(f"scorer {self.name}: expected each part once, got {self.parts!r}")
        if self.classes and "attractors" not in self._parts:
            raise TrajOODError(
                f"scorer {self.name}: classes=true chooses attractors, which {self.parts!r} does not read: add the "
                "part attractors, or leave classes out"
            )

    def needs(self) -> Needs:
        later = frozenset(("decoded", t) for t in range(1, self.horizon)) if self._is_long else frozenset()
        return Needs(
            features=frozenset({"entry"} if self._parts == ("static",) else {"entry", "decoded"}),
            points=later,  # type: ignore[arg-type]
            steps=self.horizon - 1 if self._is_long else 0,
            attractors=frozenset({"decoded"} if "attractors" in self._parts else ()),
            labels=self.classes,
        )

    def check_training_size(self, count: int) -> None:
        if count < _MIN_IMAGES:
            raise TrajOODError(
                f"scorer {self.label}: expected at least {_MIN_IMAGES} training images, got {count}: add images, since "
                "the fit splits them into five parts"
            )

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        points = self._points(train)
        classes = classes_of(self.label, train, len(points[0])) if self.classes else None
        fold = folds(points[0], _FOLDS)
        held_out = torch.zeros(len(fold), len(self._parts), dtype=torch.float64)
        for k in range(_FOLDS):
            state = self._measure_of(train, points, classes, fold != k)
            held_out[fold == k] = self._values(state, [p[fold == k] for p in points])
        state = self._measure_of(train, points, classes, torch.ones_like(fold, dtype=torch.bool))
        logs = held_out.clamp(min=_TINY).log()
        return state | named("read", learn_gaussians(logs) if self.read == "density" else _scales(held_out))

    def points(self) -> Tensor:
        return self.state.get("attractors", torch.zeros(1, 1))

    def score(self, evidence: Evidence) -> Tensor:
        values = self._values(self.state, self._points(evidence))
        read = under("read", self.state)
        if self.read == "density":
            return distances_to_gaussians(read, values.clamp(min=_TINY).log())[:, 0]
        offsets = (values - read["mean"]) / read["std"]
        return (offsets.abs() if self.read == "two-sided" else offsets).sum(dim=1)

    @property
    def _is_long(self) -> bool:
        return self.horizon > 1 and bool({"attractors", "energy"} & set(self._parts))

    def _points(self, evidence: Evidence) -> list[Tensor]:
        """x_0 … x_H, each (B, cells, d), on the CPU."""
        read = [evidence.features[view] for view in ("entry", "decoded") if view in self.needs().features]
        read += [evidence.points[view, t] for view, t in sorted(self.needs().points)]
        return [self._on_sphere(points.cpu()) for points in read]

    def _on_sphere(self, points: Tensor) -> Tensor:
        if not self.sphere:
            return points
        lengths = points.double().flatten(1).norm(dim=1).clamp(min=_TINY)
        return (points / lengths[:, None, None]).to(points.dtype)

    def _attractors(self, train: Evidence, kept: Tensor) -> tuple[Tensor, Tensor]:
        """D(z*), (M, cells, d), of the training images ``kept`` (N,) bool, and the indices (M,) of these images."""
        ends = self._on_sphere(train.attractors["decoded"].cpu())
        own = torch.arange(len(ends)) if train.own is None else train.own
        images = (kept & (own >= 0)).nonzero()[:, 0]
        if not len(images):
            raise TrajOODError(f"scorer {self.label}: the training images of one fold have no finite attractor")
        return ends[own[images]], images

    def _measure_of(
        self, train: Evidence, every: list[Tensor], classes: Tensor | None, kept: Tensor
    ) -> dict[str, Tensor]:
        """Fit what measures the parts to the training images ``kept`` (N,) bool: Gaussians of x_0, whitened attractors
        and their classes, the linear prediction of the step."""
        points = [p[kept] for p in every]
        state = named("white", learn_gaussians(points[0]))
        start = _whiten(state, points[0])
        if "attractors" in self._parts:
            attractors, images = self._attractors(train, kept)
            state["attractors"] = _whiten(state, attractors).flatten(1).float()
            if classes is not None:
                state |= classes_of_attractors(start.flatten(1), classes[kept], classes[images])
        if "residual" in self._parts:
            predicted, rest = linear_prediction(start, _whiten(state, points[1]) - start)
            state |= {"linear/map": predicted} | named("linear", learn_gaussians(rest))
        return state

    def _values(self, state: Mapping[str, Tensor], points: list[Tensor]) -> Tensor:
        """The parts s, (B, parts) float64."""
        white = [_whiten(state, p) for p in points]
        found = []
        for part in self._parts:
            if part == "static":
                found.append(white[0].flatten(1).norm(dim=1))
            elif part == "step":
                found.append((white[1] - white[0]).flatten(1).norm(dim=1))
            elif part == "energy":
                steps = [(b - a).flatten(1).norm(dim=1).square() for a, b in pairwise(white)]
                found.append(torch.stack(steps).sum(dim=0).sqrt())
            elif part == "residual":
                found.append(_prediction_distances(state, white[0], white[1] - white[0]))
            else:
                found.append(self._to_attractors(state, white))
        return torch.stack(found, dim=1)

    def _to_attractors(self, state: Mapping[str, Tensor], white: list[Tensor]) -> Tensor:
        if self.classes:
            return distances_to_own_class(state, torch.stack([w.flatten(1) for w in white], dim=1))
        index = self.index(torch.device("cpu")) if state is self._state else NeighborIndex(state["attractors"])
        each = [index.nearest(w.flatten(1).float()).distances[:, 0].cpu() for w in white]
        return torch.stack(each).mean(dim=0)


def _whiten(state: Mapping[str, Tensor], points: Tensor) -> Tensor:
    """y = W(x), (B, cells, d) float64, of points (B, cells, d)."""
    cells = under("white", state)
    return in_rows(lambda part: whitened(cells, part).transpose(0, 1), points)


def classes_of_attractors(start: Tensor, classes: Tensor, of: Tensor) -> dict[str, Tensor]:
    """Class means (C, n) of whitened starts (N, n), and the class (M,) in 0 … C − 1 of each attractor.

    Args:
        start: (N, n).
        classes: (N,) class of each start; classes without an attractor are left out.
        of: (M,) class of each attractor.
    """
    there, own = of.unique(return_inverse=True)
    means = [start[classes == c].mean(dim=0) for c in there]
    return {"classes/means": torch.stack(means), "classes/own": own}


def distances_to_own_class(state: Mapping[str, Tensor], white: Tensor) -> Tensor:
    """Mean over t of the distances of whitened points (B, t, n) to the nearest attractor of the predicted class, (B,).

    The predicted class is the one whose mean is nearest to the first point. The expanded square finds class and
    attractor; a direct difference gives the distance.
    """
    ends, own = state["attractors"].double(), state["classes/own"]

    def distances(part: Tensor) -> Tensor:
        predicted = squares_to(part[:, 0], state["classes/means"]).argmin(dim=1)
        each = []
        for points in part.unbind(dim=1):
            squares = squares_to(points, ends).masked_fill(own != predicted[:, None], torch.inf)
            nearest = torch.nn.functional.embedding(squares.argmin(dim=1), ends)
            each.append((points - nearest).norm(dim=1))
        return torch.stack(each).mean(dim=0)

    return in_rows(distances, white)


def linear_prediction(start: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Per cell the linear map A (cells, d, d) of the shrunk joint covariance; and step − start A, (N, cells, d)."""
    width, maps = start.shape[2], []
    for cell in torch.cat([start, step], dim=2).unbind(dim=1):
        _, joint = gaussian(cell, shrink=True)
        maps.append(torch.linalg.lstsq(joint[:width, :width], joint[:width, width:], driver="gelsd").solution)
    found = torch.stack(maps)
    return found, step - _predicted(found, start)


def _predicted(maps: Tensor, start: Tensor) -> Tensor:
    return (start.transpose(0, 1) @ maps).transpose(0, 1)


def _prediction_distances(state: Mapping[str, Tensor], start: Tensor, step: Tensor) -> Tensor:
    """(B,) Mahalanobis distance of the step to its prediction from the start."""
    linear = under("linear", state)
    return distances_to_gaussians(linear, step - _predicted(linear["map"], start)).square().sum(dim=1).sqrt()


def _scales(values: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation, (parts,) each, over held-out images."""
    return {"mean": values.mean(dim=0), "std": values.std(dim=0, correction=0).clamp(min=_TINY)}
