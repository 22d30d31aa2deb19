"""Scorer, the base class of all OOD scorers, and the evidence they read. HIGHER = MORE OOD everywhere in traj_ood."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from traj_ood.autoencoders import VIEWS, FeatureView, View
from traj_ood.dynamics.trajectory import Trajectory
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.extensions import own_code
from traj_ood.io.options import check_options, option_defaults, write_option
from traj_ood.io.tensor_file import open_tensors, write_tensors
from traj_ood.io.trees import as_json

ReconstructionKind = Literal["plain", "masked"]

WHOLE_PATH = 2**31
"""A number of steps above every step limit: iterate until the sample converges."""


@dataclass(frozen=True)
class Needs:
    """The inputs that a scorer declares, so that one pass over the images computes them once for all scorers.

    ``a | b`` is what two scorers read together.

    >>> both = Needs(features=frozenset({"mean"}), steps=1) | Needs(distances=frozenset({"tokens"}), steps=16)
    >>> both.steps, both.dictionary
    (16, True)

    Attributes:
        features: latent views of z0 = E(x) (``tokens``, ``cls``, ``mean``, see :meth:`traj_ood.Autoencoder.view`, or
            ``grid``), ``backbone`` for a frozen backbone's penultimate features, or ``entry`` for x itself and
            ``decoded`` for D(z0), both in the space of :meth:`traj_ood.Autoencoder.entry`.
        reconstruction: ``plain`` for ‖x − D(E(x))‖², ``masked`` for the masked autoencoder's own task.
        distances: views in which the distance to the nearest attractor is measured along the path.
        steps: number of steps read beyond z0; ``WHOLE_PATH`` reads until convergence.
        points: pairs (view, t): latent views of z_t for t >= 1, kept while fitting and scoring; ``decoded`` is D(z_t).
        attractors: views of the attractors that are read while fitting.
        train_path: whether fitting reads the training images' own trajectories, up to ``steps``, with their distances
            to the attractors of the other training images. Such a scorer must also declare the feature ``tokens``.
        logits: whether the classifier's logits are read.
        head: whether the classifier's weight and bias are read while fitting.
        labels: whether the training images' class labels are read while fitting.
        divergence: whether the divergence of the field f(z) − z at z0 is read; it takes two more evaluations of f.
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

    @property
    def attractors_read(self) -> bool:
        """Whether the score depends on attractors, directly or by distances to them."""
        return bool(self.distances or self.attractors)

    @property
    def dictionary(self) -> bool:
        """Whether end points of training images are computed: as attractors, or to follow their paths once more."""
        return self.attractors_read or self.train_path

    @property
    def decoder(self) -> bool:
        """Whether anything beyond z0 and the backbone's output is computed, for which D is called."""
        decoded = "decoded" in self.features or self.points or self.divergence
        return bool(decoded or self.reconstruction or self.steps or self.dictionary)

    def __or__(self, other: Needs) -> Needs:
        either = {f.name: getattr(self, f.name) | getattr(other, f.name) for f in fields(self) if f.name != "steps"}
        return Needs(**either, steps=max(self.steps, other.steps))


@dataclass(frozen=True)
class Evidence:
    """The measurements of one pass over B images, which the scorers read. It holds what some scorer declared in its
    :class:`Needs`, and is the only input of scorers: they never call the model.

    Attributes:
        features: view → (B, d) of z0 = E(x), or of the frozen backbone; (B, cells, d) for the views ``grid``, ``entry``
            and ``decoded``. These, the points and the logits are float32, or float64 where the model is.
        reconstruction: kind → (B,) float64 mean squared error per pixel.
        trajectory: residuals, steps, norms and, while scoring, distances to the attractors, which are its measure
            ``distance/<view>``; None if no scorer reads the path.
        points: (view, t) → latent view of z_t, shaped as in ``features``; the end point for a sample that converged
            before t.
        attractors: view → (M, …) of the finite attractors; only while fitting.
        own: (B,) int64 index of each training image's own attractor among them, −1 where it is not finite; only while
            fitting.
        logits: (B, classes) of the classifier.
        head: weight (classes, n) and bias (classes,) of the classifier; only while fitting.
        labels: (B,) int64 class labels from 0; only while fitting.
        divergence: (B,) float64 estimate of the trace of the Jacobian of f(z) − z at z0, from one Hutchinson probe ε of
            random signs, the same for all images: εᵀ (f(z0 + hε) − f(z0 − hε)) / 2h minus the number of coordinates.
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

    def __len__(self) -> int:
        """B, the number of images; 0 if nothing was asked for."""
        known = list(self._named().values()) + ([] if self.trajectory is None else [self.trajectory.steps])
        return len(known[0]) if known else 0

    def _named(self) -> dict[str, Tensor]:
        """The part of :meth:`tensors`, where it is."""
        named = {f"features/{view}": values for view, values in self.features.items()}
        named |= {f"reconstruction/{kind}": values for kind, values in self.reconstruction.items()}
        named |= {f"points/{view}/{t}": values for (view, t), values in self.points.items()}
        named |= {"logits": self.logits} if self.logits is not None else {}
        return named | ({"divergence": self.divergence} if self.divergence is not None else {})

    def tensors(self) -> dict[str, Tensor]:
        """The part that is kept of each training image until the scorers are fitted, as named tensors on the CPU with
        one row per image.

        It is without the trajectory: scorers that learn from trajectories (:attr:`Needs.train_path`) get those of a
        second pass, whose distances leave out an image's own attractor.
        """
        return {name: values.cpu() for name, values in self._named().items()}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> Evidence:
        """The inverse of :meth:`tensors`; unknown names are ignored."""
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
        """Concatenate the evidence of several batches, which must hold the same parts."""
        each = [batch.tensors() for batch in batches]
        return cls.from_tensors({name: torch.cat([named[name] for named in each]) for name in each[0]})

    def first(self, count: int) -> Evidence:
        """The evidence of the first ``count`` images, where they are; without the parts that only fitting has."""
        kept = Evidence.from_tensors({name: values[:count] for name, values in self._named().items()})
        path = None if self.trajectory is None else self.trajectory.select(torch.arange(count))
        return replace(kept, trajectory=path)

    def path(self) -> Trajectory:
        """The trajectory.

        Raises:
            TrajOODError: the pass did not iterate f, as no scorer declared that it reads the path.
        """
        if self.trajectory is None:
            raise TrajOODError(
                "this scorer reads the trajectory, but the pass did not iterate f: declare it in needs()"
            )
        return self.trajectory

    def class_logits(self) -> Tensor:
        """The logits, (B, classes) float64 on the CPU.

        Raises:
            TrajOODError: the pass kept no logits, as no scorer declared that it reads them.
        """
        if self.logits is None:
            raise TrajOODError("this scorer reads logits, but the pass kept none: declare them in needs()")
        return self.logits.cpu().double()


@dataclass
class Scorer(ABC):
    """An OOD score: :meth:`fit` learns from ID training images alone, :meth:`score` returns (B,) float64, HIGHER =
    MORE OOD.

    A subclass is a dataclass, whose fields are its options, under the decorator :func:`traj_ood.register`. It defines
    ``name``, ``summary``, :meth:`needs` and :meth:`score`, and :meth:`learn` if it learns anything; a scorer of one
    feature vector per image derives from :class:`FeatureScorer`, which defines :meth:`needs`.

    >>> from traj_ood.scorers import KNN
    >>> scorer = KNN(k=1, normalize=False).fit(Evidence(features={"mean": torch.tensor([[0.0, 1.0], [1.0, 0.0]])}))
    >>> scorer.score(Evidence(features={"mean": torch.tensor([[0.0, 1.0], [0.0, 3.0]])}))
    tensor([0., 2.], dtype=torch.float64)
    >>> scorer.label
    'knn:k=1:normalize=false'

    A :class:`traj_ood.ScorerSet` collects the evidence of images, and fits and scores any number of scorers.

    Raises:
        TrajOODError: an option has an invalid value.
    """

    name: ClassVar[str]
    """The name in ``--scorers`` and tables: lower-case words joined by hyphens."""
    summary: ClassVar[str]
    """What it measures, in a line without full stop, for lists and tables."""
    views: ClassVar[tuple[str, ...]] = VIEWS
    """Allowed values of the option ``view``: latent views; :class:`FeatureScorer` adds ``backbone``."""
    suite: ClassVar[dict[str, int]] = {"": 900}
    """The variants in the suite ``all`` and their sort keys, as in ``{"": 310, "view=cls": 420}``. Keys from 100 are
    for scorers of the path, from 200 controls, from 300 static scorers, from 400 further views, from 500 masked
    reconstruction, from 600 classifiers. Default: the scorer with its default options, after all others."""
    bears_rounding: ClassVar[bool] = True
    """Whether rounding in the network's output changes a score by at most 1e-5, relative. If so, a few images may be
    scored in calls of few rows. False for scorers that read differences as small as that rounding."""
    graph_obstacle: ClassVar[str] = ""
    """Why :meth:`score` cannot be part of a graph of tensor operations with a fixed number of steps, as exported files
    and :meth:`traj_ood.Detector.as_module` have; completes "cannot be exported: ". Empty (default) if it can."""

    tried = False  # whether this fitted scorer has passed its trial, see traj_ood.scorers.trial; no field, no option

    at_least: ClassVar[Mapping[str, int]] = {}
    """Smallest allowed values of options, such as ``{"k": 1}``; None is allowed, too, where it is the default."""
    above_0: ClassVar[tuple[str, ...]] = ()
    """Options that must be positive."""
    below: ClassVar[Mapping[str, int]] = {}
    """Upper bounds, which are not allowed themselves, of options with a lower bound, such as ``{"share": 1}``."""

    def __post_init__(self) -> None:
        self._state: dict[str, Tensor] | None = None
        view = getattr(self, "view", None)
        if view is not None and view not in self.views:
            raise unknown_name(f"view of scorer {self.name}", str(view), self.views)
        seed = getattr(self, "seed", 0)
        if isinstance(seed, Integral) and not 0 <= int(seed) < 2**32:
            raise TrajOODError(f"scorer {self.name}: expected a seed from 0 to {2**32 - 1}, got {seed}")
        # Otherwise the label would not recreate this scorer.
        check_options(type(self), vars(self), f"scorer {self.name}", reserved=":,")
        for option in (*self.at_least, *self.above_0):
            value, least, end = getattr(self, option), self.at_least.get(option), self.below.get(option)
            if value is None:
                continue
            is_large = value > 0 if least is None else value >= least
            if not is_large or (end is not None and value >= end):
                bounds = "above 0" if least is None else f"at least {least}"
                bounds += "" if end is None else f" and below {end}"
                raise TrajOODError(f"scorer {self.name}: {option} must be {bounds}, got {value}")

    @abstractmethod
    def needs(self) -> Needs:
        """The inputs that :meth:`score` and :meth:`learn` read; they depend on the options alone."""

    @abstractmethod
    def score(self, evidence: Evidence) -> Tensor:
        """Scores of B images, higher = more OOD; each image's score depends on that image alone.

        Args:
            evidence: what :meth:`needs` declares, of the B images. What was learnt is in :attr:`state`.
        Returns:
            (B,) float64, on the CPU.
        """

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        """The learnt state that :meth:`score` needs, from ID training images. Default: none.

        Args:
            train: what :meth:`needs` declares, of the N training images.
        Returns:
            Tensors by name, which :attr:`state` then holds and files keep.
        """
        return {}

    def check_training_size(self, count: int) -> None:
        """Refuse too few training images, before anything is computed.

        By default an option ``k`` is a number of neighbours, which cannot exceed the number of images.

        Raises:
            TrajOODError: ``count`` is too small for this scorer's options.
        """
        k = getattr(self, "k", None)
        if k is not None and k > count:
            raise TrajOODError(
                f"scorer {self.label}: k = {k} neighbours, but only {count} training images: use more training images "
                f"or k <= {count}"
            )

    def f_evaluations(self, evidence: Evidence) -> float:
        """Mean number of evaluations of f per scored image, beyond the encoding that all scorers share.

        It is the number of steps that :meth:`needs` declares, or fewer for an image that converges before.
        """
        wanted = self.needs().steps
        return float(evidence.path().steps.clamp(max=wanted).double().mean()) if wanted else 0.0

    def graph_form(self, steps: int) -> Scorer:
        """The fitted scorer that a graph of ``steps`` evaluations of f computes in place of this fitted one.

        By default an option ``horizon`` that is None, the length of each path, becomes ``steps``, with which a sample
        stays at its end point after convergence. The step of convergence depends on the last bits of a residual, so
        that a mean over the path's own length would jump between runtimes. Any other scorer is its own form.

        A form reads what this scorer reads, or fewer steps of it. One that declares the same number of steps computes
        the same score, so that the detector's threshold holds for it.
        """
        if getattr(self, "horizon", 0) is not None:
            return self
        return replace(self, horizon=max(1, steps)).with_state(self.state)  # type: ignore[call-arg]

    def fit(self, train: Evidence) -> Scorer:
        """Learn from ID training images, by :meth:`learn`; returns this scorer.

        Args:
            train: what :meth:`needs` declares, of the training images.
        Raises:
            TrajOODError: too few training images, or :meth:`learn` fails or returns something other than tensors by
                name.
        """
        if len(train):
            self.check_training_size(len(train))
        with own_code(type(self), f"scorer {self.label}: learn()"):
            learnt = self.learn(train)
        if not isinstance(learnt, Mapping) or not all(isinstance(value, Tensor) for value in learnt.values()):
            raise TrajOODError(f"scorer {self.label}: expected learn() to return tensors by name, got {learnt!r:.80}")
        self._state = {name: _row_major(value) for name, value in learnt.items()}
        self.tried = False
        return self

    def scores_of(self, evidence: Evidence) -> Tensor:
        """:meth:`score`, checked: a user's class may return anything, or raise.

        Raises:
            TrajOODError: what it returns is not one number per image; or it raises, with the file and line.
        """
        with own_code(type(self), f"scorer {self.label}: score()"):
            scores: Any = self.score(evidence)
        count = len(evidence)
        if isinstance(scores, Tensor) and scores.is_floating_point() and scores.shape == (count or len(scores),):
            return scores
        got = f"{tuple(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else f"{scores!r:.80}"
        raise TrajOODError(
            f"scorer {self.label}: expected score() to return one float64 per image, ({count},), got {got}: correct it"
        )

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that :meth:`fit` learnt.

        Raises:
            TrajOODError: the scorer is not fitted.
        """
        if self._state is None:
            raise TrajOODError(f"scorer {self.name} is not fitted: call fit with ID training images first")
        return self._state

    def with_state(self, state: Mapping[str, Tensor]) -> Scorer:
        """A copy that scores with the given state, as :meth:`fit` learnt it."""
        other = copy.copy(self)
        other._state = dict(state)
        return other

    def options(self) -> dict[str, Any]:
        """All options by name."""
        return asdict(self)

    @property
    def label(self) -> str:
        """The name and the options that differ from their defaults, in the form that ``--scorers`` takes."""
        defaults = option_defaults(type(self))
        mine = {key: getattr(self, key) for key in defaults}
        return spec_text(self.name, {key: value for key, value in mine.items() if value != defaults[key]})

    def save(self, path: str | Path) -> None:
        """Write the learnt tensors and the options to one safetensors file, atomically."""
        write_tensors(path, self.state, {"scorer": self.name, "options": self.options()})

    def load(self, path: str | Path) -> Scorer:
        """Load the learnt tensors from a file that :meth:`save` wrote; returns this scorer.

        Raises:
            TrajOODError: the file is unreadable, or was written by another scorer or with other options.
        """
        mine = {"scorer": self.name, "options": as_json(self.options())}
        with open_tensors(path, "scorer file", "fit the scorer and save it again") as file:
            if file.header != mine:
                raise TrajOODError(f"{path}: expected a scorer file of {mine}, got one of {file.header}")
            self._state = file.tensors
        return self


def spec_text(name: str, options: Mapping[str, Any]) -> str:
    """The text ``name:key=value:…`` from which :func:`traj_ood.create_scorer` makes a scorer with these options."""
    return ":".join([name, *(f"{key}={write_option(value)}" for key, value in options.items())])


@dataclass
class FeatureScorer(Scorer):
    """A static scorer: it reads one feature vector per image and no path.

    On a model with a frozen backbone, scorers created by name read that backbone's penultimate features unless a
    ``view`` is given, because the published forms of these scorers do.
    """

    views: ClassVar[tuple[str, ...]] = (*VIEWS, "backbone")
    view: FeatureView = "mean"

    def needs(self) -> Needs:
        return Needs(features=frozenset({self.view}))

    def features(self, evidence: Evidence) -> Tensor:
        """(B, d) features of the declared view."""
        return evidence.features[self.view]


@dataclass
class UnitFeatureScorer(FeatureScorer):
    """A static scorer of L2-normalised features, or of features as they are if its option ``normalize`` is false."""

    def features(self, evidence: Evidence) -> Tensor:
        features = super().features(evidence)
        return normalize(features, dim=-1) if getattr(self, "normalize", True) else features


def _row_major(value: Tensor) -> Tensor:
    """The tensor in the memory layout it has when read from a file.

    With other strides BLAS chooses another kernel, which rounds differently, and scores would change by loading.
    ``contiguous`` does not suffice, because it keeps the strides of dimensions of size 1.
    """
    if value.stride() == torch.empty(value.shape, device="meta").stride():
        return value
    return value.clone(memory_format=torch.contiguous_format)
