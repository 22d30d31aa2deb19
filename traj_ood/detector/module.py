"""A detector as an nn.Module: pixels in, scores out, with a fixed number of steps and no control flow that depends on
the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from traj_ood.autoencoders import Autoencoder, Encoding, SurrogateAutoencoder
from traj_ood.data.preprocessing import PIXEL_SLACK, Preprocessing
from traj_ood.detector.dense_index import DenseIndex
from traj_ood.detector.fixed_steps import at_fixed_steps, check_exportable, one_scorer, steps_of
from traj_ood.detector.pinned_tensors import PinnedTensors, Tensors
from traj_ood.detector.step import Loop, RecordedStep, Step, lengths, plain_loop
from traj_ood.dynamics.fixed_function import float_type
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError
from traj_ood.scorers import Evidence
from traj_ood.scorers.bank import SearchingScorer

if TYPE_CHECKING:
    from traj_ood.detector.conformal import Calibration
    from traj_ood.scorers.scorer_set import ScorerSet


class DetectorModule(nn.Module):
    """Pixels (B, C, H, W) float32 in [0, 1] of the model's size → scores (B,) float64, higher = more OOD.

    The model's normalisation is inside. An image with a NaN, or with a pixel outside [0, 1], has the score NaN: a graph
    cannot raise. As a module, but not as a recorded graph, it takes uint8 pixels, floats of other widths and one image
    (C, H, W), too. One on which the model leaves the finite numbers has +inf, as in
    :class:`traj_ood.Judgement`. Scores follow the batch as far as rounding goes; those of a detector do not.

    Weights are those of the detector's own network, not copies: moving this module moves them. Attractors are buffers.
    The scorer's float64 statistics are buffers that stay on the CPU, as in the detector: not every device has float64.
    The module keeps no gradients; the network is in evaluation mode while it computes, whatever mode it was left in.

    Attributes:
        steps: evaluations of f. scorer: what is computed, with its options. preprocessing: see
            :class:`traj_ood.data.preprocessing.Preprocessing`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, autoencoder: Autoencoder, scorers: ScorerSet, steps: int | None = None) -> None:
        """See :func:`as_module`."""
        super().__init__()
        _check_model(autoencoder)
        scorer = one_scorer(scorers)
        check_exportable(scorer)
        self.steps = steps_of(scorers, steps)
        self.scorer = scorer = at_fixed_steps(scorer, self.steps)
        self.preprocessing = _declared(autoencoder)
        if isinstance(autoencoder, SurrogateAutoencoder):
            self.backbone = autoencoder.backbone.module
        for name, values in zip(("mean", "std"), self.preprocessing.affine, strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))
        self.statistics = PinnedTensors(scorer.state)
        self.searched = PinnedTensors({"points": scorer.points()} if isinstance(scorer, SearchingScorer) else {})
        self._autoencoder, self._check_weights = autoencoder, scorers.check_weights
        self._kept = sorted({view for view, _ in scorer.needs().points})
        self.step = Step(autoencoder, Tensors(_attractors(autoencoder, scorers)), self._kept, scorers.tol)
        self._loops: list[Loop] = [plain_loop(self.step)]
        self.to(autoencoder.device)
        self.training = False

    def train(self, mode: bool = True) -> DetectorModule:
        """Does nothing: the module stays in evaluation mode, since dropout and batch statistics have no place in a
        score."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float32 → (B,) float64. A graph recorded of it, and so an exported file, takes B >= 1.

        Raises:
            TrajOODError: another shape or type, weights that changed since the fit, or a graph recorded of a network in
                training mode.
        """
        shape = self.preprocessing.shape
        if not torch.compiler.is_compiling():
            images = images[None] if images.ndim == 3 else images
            images = images.float() / 255 if images.dtype == torch.uint8 else images
            images = images.float() if images.is_floating_point() else images
        if images.ndim != 4 or tuple(images.shape[1:]) != shape or images.dtype != torch.float32:
            raise TrajOODError(
                f"{self._autoencoder.name}: expected float32 pixels in [0, 1] of shape (B, {', '.join(map(str, shape))}"
                f"), got {images.dtype} of shape {tuple(images.shape)}"
            )
        if torch.compiler.is_compiling():  # whoever records the graph has gradients off: no operation for it
            if any(part.training for network in self._autoencoder.modules_used() for part in network.modules()):
                raise TrajOODError(
                    f"{self._autoencoder.name}: in training mode: call model.eval() before a graph is recorded"
                )
            return self._scores(images)
        if len(images) == 0:  # libraries reshape and search, and a graph's batch has no beginning
            return torch.empty(0, dtype=torch.float64, device=images.device)
        with self._autoencoder.fixed(), torch.no_grad():
            self._check_weights()
            return self._scores(images)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """For recording a graph: evaluation mode, and no weight that asks for gradients, which would be in it, too."""
        learnable = [p for p in self.parameters() if p.requires_grad]
        with self._autoencoder.fixed():
            for parameter in learnable:
                parameter.requires_grad_(False)
            try:
                yield
            finally:
                for parameter in learnable:
                    parameter.requires_grad_(True)

    def _scores(self, images: Tensor) -> Tensor:
        valid = ((images >= -PIXEL_SLACK) & (images <= 1 + PIXEL_SLACK)).flatten(1).all(dim=1)  # a NaN is neither
        pixels = torch.where(valid[:, None, None, None], images, 0.5)
        scorer = self.scorer.with_state(self.statistics.all())
        if isinstance(scorer, SearchingScorer):
            scorer = scorer.with_index(DenseIndex(self.searched.all()["points"]))
        scores = scorer.score(self._evidence((pixels - self.mean) / self.std)).to(images.device)
        return torch.where(valid, torch.where(scores.isfinite(), scores, torch.inf), torch.nan)

    def record_loop(self, images: Tensor) -> None:
        """Let a graph that is recorded from now on hold f once, and not once for each step.

        Args:
            images: (B, C, H, W), any pixels.
        """
        recorded = RecordedStep.of(self.step, self._examine((images - self.mean) / self.std).latents)
        self.constants = recorded.constants  # as buffers, which every file format knows
        self._loops.append(recorded.loop())

    # ------------------------------------------------------------------ what ScorerSet gathers, without chunks

    def _evidence(self, images: Tensor) -> Evidence:
        model, needs = self._autoencoder, self.scorer.needs()
        encoding = self._examine(images)
        reconstruction: dict[Any, Tensor] = {}
        if needs.reconstruction:
            difference = model.decode_batch(encoding.latents.clone()) - encoding.target
            reconstruction["plain"] = difference.flatten(1).square().mean(dim=1).cpu().double()
        trajectory: Trajectory | None = None
        points: dict[tuple[Any, int], Tensor] = {}
        if needs.steps or needs.distances:
            trajectory, points = self._walk(encoding.latents)
        features = {view: model.feature_view(encoding, view).cpu() for view in sorted(needs.features)}
        logits = encoding.logits.cpu() if needs.logits and encoding.logits is not None else None
        return Evidence(features, reconstruction, trajectory, points, logits=logits)

    def _examine(self, images: Tensor) -> Encoding:
        """``Autoencoder.examine`` of all rows at once, unchecked."""
        model = self._autoencoder
        if not isinstance(model, SurrogateAutoencoder):
            images = images.to(float_type(model.module) or images.dtype)
            return Encoding(
                latents=model.encode_batch(images.clone(memory_format=torch.contiguous_format)), target=images
            )
        seen = model.backbone.forward_batch(images.to(float_type(model.backbone.module) or images.dtype))
        target = model.network.standardise(seen.features.to(model.network.mean.dtype))
        return Encoding(model.network.encode(target), target, features=seen.features, logits=seen.logits)

    def _walk(self, start: Tensor) -> tuple[Trajectory, dict[tuple[Any, int], Tensor]]:
        """The trajectory for all steps, and the points that the scorer reads."""
        wanted, prepared = sorted(self.scorer.needs().points), self.step.prepare()
        running = lengths(start).isfinite()
        columns = [values[None] for values in self.step.measure(start, running, *prepared)]
        residuals, latents = columns[0][:0], start
        points: dict[tuple[Any, int], Tensor] = {}
        if self.steps:
            loop = self._loops[-1 if torch.compiler.is_compiling() else 0]
            latents, running, residuals, *rest = loop(start, running, self.steps, prepared)
            columns = [torch.cat([a, b]) for a, b in zip(columns, rest, strict=False)]  # the points come after
            kept = dict(zip(self._kept, rest[len(columns) :], strict=True))
            # A sample that has settled before t is at its end; so is each one whose t lies beyond the last step.
            points = {(view, t): kept[view][min(t, self.steps) - 1].cpu() for view, t in wanted}
        # Settled and not finite are told apart by their columns alone, which is all that scorers read.
        status = torch.where(running, int(Status.STEP_LIMIT), int(Status.CONVERGED))
        measures = {name: column.T.cpu() for name, column in zip(self.step.names, columns, strict=True)}
        steps = residuals.isfinite().sum(dim=0)
        path = Trajectory(steps.cpu(), status.cpu(), residuals.T.cpu(), latents, measures, max(1, self.steps))
        return path, points


def as_module(detector: HasScorers, steps: int | None = None) -> DetectorModule:
    """A detector as an nn.Module for TorchServe, Triton, BentoML, or an export of your own.

    Args:
        detector: with one fitted scorer.
        steps: most evaluations of f, the same for every image. Default: what the scorer reads under the detector's
            own limit; scorers that read a path until it settles need a number, and those among them that average over
            a sample's own length become the same scorer with ``horizon = steps``.
    Raises:
        TrajOODError: a scorer or a model that no graph can hold, or no number of steps where one is needed.
    """
    return DetectorModule(detector.autoencoder, detector.scorers, steps)


class HasScorers(Protocol):
    """What is exported of a :class:`traj_ood.Detector`."""

    @property
    def autoencoder(self) -> Autoencoder: ...

    @property
    def scorers(self) -> ScorerSet: ...

    @property
    def calibration(self) -> Calibration | None: ...


def _attractors(autoencoder: Autoencoder, scorers: ScorerSet) -> dict[str, Tensor]:
    """(M, d) by view in which the scorer measures distances."""
    if scorers.dictionary is None:
        return {}
    ends = scorers.dictionary.usable().to(autoencoder.device)
    return {view: autoencoder.view(ends, view).clone() for view in sorted(scorers.needs.distances)}


def _declared(autoencoder: Autoencoder) -> Preprocessing:
    if autoencoder.preprocessing is None:
        raise TrajOODError(
            f"export: expected a model that declares its preprocessing, which a graph can take over, got a transform "
            f"of your own code: make {autoencoder.name} with preprocessing=traj_ood.Preprocessing(...)"
        )
    return autoencoder.preprocessing


def _check_model(autoencoder: Autoencoder) -> None:
    """Raises TrajOODError for a model that looks at images in a way of its own."""
    own = type(autoencoder).examine not in (Autoencoder.examine, SurrogateAutoencoder.examine)
    if own:
        raise TrajOODError(
            f"export: {autoencoder.name} ({autoencoder.family}) has an examine of its own, which no graph can follow: "
            "export autoencoders and surrogates"
        )
