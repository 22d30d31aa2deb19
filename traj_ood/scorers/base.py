"""Scorer: one OOD scorer. HIGHER = MORE OOD everywhere inside traj_ood."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from traj_ood.autoencoders import VIEWS, FeatureView, View
from traj_ood.dynamics.trajectory import Trajectory
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.options import check_options, option_defaults, write_option
from traj_ood.io.tensor_file import open_tensors, write_tensors
from traj_ood.io.trees import as_json

ReconstructionKind = Literal["plain", "masked"]

WHOLE_PATH = 2**31
"""More steps than any limit: iterate until the sample settles."""


@dataclass(frozen=True)
class Needs:
    """What a scorer reads, so that one pass over the images computes just that, once, for all scorers.

    Attributes:
        features: latent views of z0, ``backbone`` for a frozen backbone's penultimate features, or ``entry`` for x
            itself and ``decoded`` for D(z0), both in the space of :meth:`traj_ood.Autoencoder.entry`.
        reconstruction: ``plain`` ‖x − D(E(x))‖² or ``masked``, the MAE's own task.
        distances: views in which the distance to the nearest attractor is measured along the path.
        steps: how much of the path beyond z0 is read; ``WHOLE_PATH`` is until it settles.
        points: (view, t): latent views of z_t for t >= 1, kept while fitting and scoring; ``decoded`` is D(z_t).
        attractors: views in which the attractors themselves are read, while fitting.
        train_path: while fitting, the training images' own trajectories, as far as ``steps``, with their distances to
            the attractors of the other training images. Such a scorer also asks for the feature ``tokens``.
        logits: the classifier's logits.
        head: the classifier's weight and bias, while fitting.
        labels: the training images' class labels, while fitting.
        divergence: of the field f(z) − z at z0; two evaluations of f beside the path.
    """

    features: frozenset[FeatureView] = frozenset()
    reconstruction: frozenset[ReconstructionKind] = frozenset()
    distances: frozenset[View] = frozenset()
    steps: int = 0
    points: frozenset[tuple[FeatureView, int]] = frozenset()
    attractors: frozenset[FeatureView] = frozenset()
    train_path: bool = False
    logits: bool = False
    head: bool = False
    labels: bool = False
    divergence: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.features | other.features,
            self.reconstruction | other.reconstruction,
            self.distances | other.distances,
            max(self.steps, other.steps),
            self.points | other.points,
            self.attractors | other.attractors,
            self.train_path or other.train_path,
            self.logits or other.logits,
            self.head or other.head,
            self.labels or other.labels,
            self.divergence or other.divergence,
        )


@dataclass(frozen=True)
class Evidence:
    """What one pass over B images collects for the scorers.

    Attributes:
        features: view → (B, d) float32 of z0 = E(x), or of the frozen backbone; (B, cells, d) for the views ``grid``,
            ``entry`` and ``decoded``.
        reconstruction: kind → (B,) float64 mean squared error per pixel.
        trajectory: residuals, steps and (while scoring) distances to the attractors.
        points: (view, t) → latent view of z_t, shaped as in ``features``; of a sample that settled before t, its end.
        attractors: view → (M, …) of the attractors that are finite; while fitting only.
        own: (B,) int64 place of each training image's own attractor among them, −1 where it is not; while fitting only.
        logits: (B, classes) float32 of the classifier.
        head: weight (classes, n) and bias (classes,) of the classifier; while fitting only.
        labels: (B,) int64 class labels 0 … C−1; while fitting only.
        divergence: (B,) float64 estimate of the trace of the Jacobian of f(z) − z at z0: one Hutchinson probe ε of
            signs, the same for all images, εᵀ (f(z0 + hε) − f(z0 − hε)) / 2h less the number of coordinates.
    """

    features: Mapping[FeatureView, Tensor] = field(default_factory=dict)
    reconstruction: Mapping[ReconstructionKind, Tensor] = field(default_factory=dict)
    trajectory: Trajectory | None = None
    points: Mapping[tuple[FeatureView, int], Tensor] = field(default_factory=dict)
    attractors: Mapping[FeatureView, Tensor] = field(default_factory=dict)
    own: Tensor | None = None
    logits: Tensor | None = None
    head: tuple[Tensor, Tensor] | None = None
    labels: Tensor | None = None
    divergence: Tensor | None = None

    def kept(self) -> Evidence:
        """The part that scorers learn from, on the CPU; trajectories are left out, since no scorer learns from them."""
        return Evidence.from_tensors(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """What scorers learn from as named tensors on the CPU, one row for each image."""
        named = {f"features/{view}": values for view, values in self.features.items()}
        named |= {f"reconstruction/{kind}": values for kind, values in self.reconstruction.items()}
        named |= {f"points/{view}/{t}": values for (view, t), values in self.points.items()}
        named |= {"logits": self.logits} if self.logits is not None else {}
        named |= {"divergence": self.divergence} if self.divergence is not None else {}
        return {name: values.cpu() for name, values in named.items()}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> Evidence:
        """The evidence in what :meth:`tensors` returned; other names are ignored."""
        parts: dict[str, dict[Any, Tensor]] = {"features": {}, "reconstruction": {}, "points": {}}
        for name, values in named.items():
            part, *key = name.split("/")
            if part in parts:
                parts[part][(key[0], int(key[1])) if part == "points" else key[0]] = values
        features, reconstruction, points = parts.values()
        return cls(
            features, reconstruction, points=points, logits=named.get("logits"), divergence=named.get("divergence")
        )

    @classmethod
    def join(cls, batches: Sequence[Evidence]) -> Evidence:
        """The evidence of several batches, made in the same way, as one."""
        each = [batch.tensors() for batch in batches]
        return cls.from_tensors({name: torch.cat([named[name] for named in each]) for name in each[0]})

    def path(self) -> Trajectory:
        """The trajectory.

        Raises:
            TrajOODError: the pass did not iterate f.
        """
        if self.trajectory is None:
            raise TrajOODError(
                "this scorer reads the trajectory, but the pass did not iterate f: declare it in needs()"
            )
        return self.trajectory

    def class_logits(self) -> Tensor:
        """(B, classes) float64 logits.

        Raises:
            TrajOODError: the pass kept none.
        """
        if self.logits is None:
            raise TrajOODError("this scorer reads logits, but the pass kept none: declare them in needs()")
        return self.logits.cpu().double()


@dataclass
class Scorer(ABC):
    """One scorer. Dataclass fields are its declared options; ``fit`` learns from ID training images alone.

    Life: ``scorer = KNN(k=5)``; ``scorer.fit(evidence)``; ``scorer.score(evidence)`` → (B,) float64, higher = more OOD.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    views: ClassVar[tuple[str, ...]] = VIEWS
    """Values of the option ``view``: scorers of the path know latent views alone, :class:`FeatureScorer` s more."""
    suite: ClassVar[dict[str, int]] = {"": 900}
    """What of it belongs to the suite ``all``: options, as in ``{"": 310, "view=cls": 420}``, and their place in it:
    from 100 scorers of the path, from 200 controls, from 300 static ones, from 400 further views, from 500 masked
    reconstruction, from 600 classifiers. Default: with its defaults, after all others."""
    bears_rounding: ClassVar[bool] = True
    """Whether a score moves by 1e-5 at most, relative, when the network's answers move by their rounding: few images
    are then judged in calls of few rows. False for what reads gaps that are as short as rounding itself."""

    at_least: ClassVar[Mapping[str, int]] = {}
    """The smallest value of options, such as ``{"k": 1}``; an option may be None as well, where that is its default."""
    above_0: ClassVar[tuple[str, ...]] = ()
    """Options that are positive finite numbers."""

    def __post_init__(self) -> None:
        self._state: dict[str, Tensor] | None = None
        view = getattr(self, "view", None)
        if view is not None and view not in self.views:
            raise unknown_name(f"view of scorer {self.name}", str(view), self.views)
        seed = getattr(self, "seed", 0)
        if not 0 <= seed < 2**32:
            raise TrajOODError(f"scorer {self.name}: expected a seed from 0 to {2**32 - 1}, got {seed}")
        # Else the label would recreate another scorer.
        check_options(type(self), vars(self), f"scorer {self.name}", reserved=":,")
        for option, least in self.at_least.items():
            value = getattr(self, option)
            if value is not None and value < least:
                raise TrajOODError(f"scorer {self.name}: {option} must be at least {least}, got {value}")
        for option in self.above_0:
            value = getattr(self, option)
            if value is not None and not 0 < value < math.inf:
                raise TrajOODError(f"scorer {self.name}: {option} must be a number above 0, got {value}")

    @abstractmethod
    def needs(self) -> Needs:
        """What :meth:`score` (and :meth:`fit`) read."""

    @abstractmethod
    def score(self, evidence: Evidence) -> Tensor:
        """(B,) float64, higher = more OOD; each image's score depends on that image alone."""

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        """The tensors that :meth:`score` needs, learnt from ID training images. Default: none."""
        return {}

    def check_training_size(self, count: int) -> None:
        """Refuse a number of training images that this scorer cannot learn from, before anything is computed.

        By default an option ``k`` is a number of neighbours, which cannot be more than the images.

        Raises:
            TrajOODError: too few for its options.
        """
        k = getattr(self, "k", None)
        if k is not None and k > count:
            raise TrajOODError(
                f"scorer {self.label}: k = {k} neighbours, but only {count} training images: use more training images "
                f"or k <= {count}"
            )

    def f_evaluations(self, evidence: Evidence) -> float:
        """Mean evaluations of f per scored image, beyond the one encoding that every scorer shares.

        They are as many as :meth:`needs` names; an image that settles before takes no more.
        """
        wanted = self.needs().steps
        return float(evidence.path().steps.clamp(max=wanted).double().mean()) if wanted else 0.0

    def fit(self, train: Evidence) -> Scorer:
        self._state = {name: _row_major(value) for name, value in self.learn(train).items()}
        return self

    @property
    def state(self) -> dict[str, Tensor]:
        """What :meth:`fit` learnt.

        Raises:
            TrajOODError: not fitted.
        """
        if self._state is None:
            raise TrajOODError(f"scorer {self.name} is not fitted: call fit with ID training images first")
        return self._state

    def with_state(self, state: Mapping[str, Tensor]) -> Scorer:
        """A copy that scores with these tensors: what :meth:`fit` learnt, kept elsewhere."""
        other = copy.copy(self)
        other._state = dict(state)
        return other

    def options(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def label(self) -> str:
        """The name with the options that differ from their defaults, as ``traj-ood bench --scorers`` takes it."""
        defaults = option_defaults(type(self))
        mine = {key: getattr(self, key) for key in defaults}
        return spec_text(self.name, {key: value for key, value in mine.items() if value != defaults[key]})

    def save(self, path: Path) -> None:
        """Write the learnt tensors and the options as one safetensors file, atomically."""
        write_tensors(path, self.state, {"scorer": self.name, "options": self.options()})

    def load(self, path: Path) -> Scorer:
        """Read what :meth:`save` wrote into this scorer.

        Raises:
            TrajOODError: unreadable, or written by another scorer or with other options.
        """
        mine = {"scorer": self.name, "options": as_json(self.options())}
        with open_tensors(path, "scorer file", "fit the scorer and save it again") as file:
            if file.header != mine:
                raise TrajOODError(f"{path}: expected a scorer file of {mine}, got one of {file.header}")
            self._state = file.tensors
        return self


def spec_text(name: str, options: Mapping[str, Any]) -> str:
    """The text from which :func:`traj_ood.create_scorer` makes a scorer with these options."""
    return ":".join([name, *(f"{key}={write_option(value)}" for key, value in options.items())])


@dataclass
class FeatureScorer(Scorer):
    """A static scorer: it reads one feature vector per image.

    On a model with a frozen backbone the command line reads that backbone's penultimate features unless a ``view`` is
    written out, because that is where the published forms of these scorers stand.
    """

    views: ClassVar[tuple[str, ...]] = (*VIEWS, "backbone")
    view: FeatureView = "mean"

    def needs(self) -> Needs:
        return Needs(features=frozenset({self.view}))

    def features(self, evidence: Evidence) -> Tensor:
        """(B, d) features of the declared view."""
        return evidence.features[self.view]


def _row_major(value: Tensor) -> Tensor:
    """The tensor in the layout in which a file holds it.

    BLAS takes another kernel, which rounds otherwise, for other strides: scores after loading would not be the same.
    ``contiguous`` is no help, because it leaves the strides of dimensions of size 1 as they are.
    """
    if value.stride() == torch.empty(value.shape, device="meta").stride():
        return value
    return value.clone(memory_format=torch.contiguous_format)
