"""A scorer set as an nn.Module from pixels to scores, of a fixed number of steps and no data-dependent control flow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from traj_ood.autoencoders import Autoencoder, Encoding, FeatureView, SurrogateAutoencoder
from traj_ood.data.preprocessing import PIXEL_SLACK, Preprocessing
from traj_ood.dynamics.fixed_function import float_type
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError
from traj_ood.graph.dense_index import DenseIndex
from traj_ood.graph.fixed_steps import form_of, same_score, steps_of
from traj_ood.graph.step import Loop, PinnedTensors, PlainLoop, RecordedStep, Step, Tensors, lengths, where_rows
from traj_ood.scorers import Evidence
from traj_ood.scorers.bank import SearchingScorer
from traj_ood.scorers.scorer_set import ScorerSet


class DetectorModule(nn.Module):
    """Maps pixels (B, C, H, W) float32 in [0, 1], of the model's size, to scores (B,) float64; higher = more OOD.

    The model's normalisation is included. An image with a pixel that is NaN or outside [0, 1] has the score NaN, as a
    graph cannot raise; one on which the model's values become NaN or infinite has +inf, as in
    :class:`traj_ood.Judgement`. The module itself, unlike a recorded graph, also accepts uint8 pixels, floats of other
    precision and one image (C, H, W). Unlike a detector's, its scores depend on the batch by rounding.

    The weights are those of the detector's network, not copies: moving this module moves them. Attractors are buffers.
    The scorer's float64 statistics are buffers that stay on the CPU, as not every device supports float64. No gradients
    are computed, and the network runs in evaluation mode, whatever its mode outside.

    Attributes:
        steps: number of evaluations of f.
        scorer: the scorer that is computed, with its options.
        is_fitted: whether this is the score that was fitted, so that a threshold for it holds; not with fewer steps, or
            with a fixed number in place of a path's own length.
        preprocessing: see :class:`traj_ood.data.preprocessing.Preprocessing`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, autoencoder: Autoencoder, scorers: ScorerSet, steps: int | None = None) -> None:
        """See :func:`as_module`."""
        super().__init__()
        _check_model(autoencoder)
        self.steps = steps_of(scorers, steps)
        self.scorer = scorer = form_of(scorers, self.steps)
        self.is_fitted = same_score(scorers, self.steps)
        self.preprocessing = _declared(autoencoder)
        if isinstance(autoencoder, SurrogateAutoencoder):
            self.backbone = autoencoder.backbone.module
        for name, values in zip(("mean", "std"), self.preprocessing.affine, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))
        self.statistics = PinnedTensors(scorer.state)
        self.searched = PinnedTensors({"points": scorer.points()} if isinstance(scorer, SearchingScorer) else {})
        self._autoencoder, self._check_weights = autoencoder, scorers.check_weights
        self._kept: list[FeatureView] = sorted({view for view, _ in scorer.needs().points})
        self.step = Step(autoencoder, Tensors(_attractors(autoencoder, scorers)), self._kept, scorers.tol)
        self._loops: list[Loop] = [PlainLoop(self.step)]
        self.to(autoencoder.device)
        self.training = False

    def train(self, mode: bool = True) -> DetectorModule:
        """Has no effect: the module stays in evaluation mode, as a score must not depend on dropout or batch
        statistics."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B,) float64 of pixels (B, C, H, W) float32. A recorded graph, and an exported file, needs B >= 1."""
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
        if torch.compiler.is_compiling():  # gradients are turned off by the caller, not by an operation in the graph
            if any(part.training for network in self._autoencoder.modules_used() for part in network.modules()):
                raise TrajOODError(
                    f"{self._autoencoder.name}: in training mode: call model.eval() before a graph is recorded"
                )
            return self._scores(images)
        if len(images) == 0:  # some libraries' reshapes and searches fail on an empty batch
            return torch.empty(0, dtype=torch.float64, device=images.device)
        with self._autoencoder.fixed(), torch.no_grad():
            self._check_weights()
            return self._scores(images)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager for recording a graph: evaluation mode, and no weight requires gradients, which the graph
        would include."""
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
        valid = ((images >= -PIXEL_SLACK) & (images <= 1 + PIXEL_SLACK)).flatten(1).all(dim=1)  # false for NaN
        pixels = torch.where(valid[:, None, None, None], images, 0.5)
        scorer = self.scorer.with_state(self.statistics.all())
        if isinstance(scorer, SearchingScorer):
            scorer = scorer.with_index(DenseIndex(self.searched.all()["points"]))
        scores = scorer.score(self._evidence((pixels - self.mean) / self.std)).to(images.device)
        return torch.where(valid, torch.where(scores.isfinite(), scores, torch.inf), torch.nan)

    def record_loop(self, images: Tensor) -> None:
        """Make graphs that are recorded from now on contain f once, in a loop, instead of once per step; ``images`` (B,
        C, H, W) may have any pixels."""
        recorded = RecordedStep.of(self.step, self._examine((images - self.mean) / self.std).latents)
        self.constants = recorded.constants  # as buffers, which every file format supports
        self._loops.append(recorded.loop())

    # ------------------------------------------------------------------ the evidence of ScorerSet, without chunks

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
        views: list[FeatureView] = sorted(needs.features)
        features: dict[FeatureView, Tensor] = {view: model.feature_view(encoding, view).cpu() for view in views}
        logits = encoding.logits.cpu() if needs.logits and encoding.logits is not None else None
        return Evidence(features, reconstruction, trajectory, points, logits=logits)

    def _examine(self, images: Tensor) -> Encoding:
        """``Autoencoder.examine`` for all rows at once, without its checks."""
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
        """The trajectory over all steps, and the points that the scorer reads."""
        wanted, prepared = sorted(self.scorer.needs().points), self.step.prepare()
        running = lengths(start).isfinite()
        columns = [values[None] for values in self.step.measure(start, running, *prepared)]
        residuals, latents = columns[0][:0], where_rows(running, start, torch.nan)
        points: dict[tuple[Any, int], Tensor] = {}
        if self.steps:
            loop = self._loops[-1 if torch.compiler.is_compiling() else 0]
            latents, running, residuals, *rest = loop(latents, running, self.steps, prepared)
            columns = [torch.cat([a, b]) for a, b in zip(columns, rest, strict=False)]  # points follow the columns
            kept = dict(zip(self._kept, rest[len(columns) :], strict=True))
            # After convergence a sample stays at its end point; a t beyond the last step gives the last point.
            points = {(view, t): kept[view][min(t, self.steps) - 1].cpu() for view, t in wanted}
        ended = torch.where(lengths(latents).isfinite(), int(Status.CONVERGED), int(Status.NON_FINITE))
        status = torch.where(running, int(Status.STEP_LIMIT), ended)
        measures = {name: column.T.cpu() for name, column in zip(self.step.names, columns, strict=True)}
        steps = residuals.isfinite().sum(dim=0)
        path = Trajectory(steps.cpu(), status.cpu(), residuals.T.cpu(), latents, measures, max(1, self.steps))
        return path, points


def as_module(detector: HasScorers, steps: int | None = None) -> DetectorModule:
    """A detector as an nn.Module, for TorchServe, Triton, BentoML or your own export.

    Args:
        detector: a detector, or another object with one fitted scorer.
        steps: number of evaluations of f, the same for every image. Default: what the scorer reads, within the
            detector's limit. Scorers that iterate until convergence need a number, with which they compute
            their :meth:`traj_ood.Scorer.graph_form`.
    Raises:
        TrajOODError: the scorer or model cannot be computed by a graph, or the number of steps is needed and missing.
    """
    return DetectorModule(detector.autoencoder, detector.scorers, steps)


class HasScorers(Protocol):
    """The part of a :class:`traj_ood.Detector` that a module is made from."""

    @property
    def autoencoder(self) -> Autoencoder: ...

    @property
    def scorers(self) -> ScorerSet: ...


def _attractors(autoencoder: Autoencoder, scorers: ScorerSet) -> dict[str, Tensor]:
    """The attractors, (M, d), by the views in which the scorer measures distances."""
    if scorers.dictionary is None:
        return {}
    ends = scorers.dictionary.usable().to(autoencoder.device)
    return {view: autoencoder.view(ends, view).clone() for view in sorted(scorers.needs.distances)}


def _declared(autoencoder: Autoencoder) -> Preprocessing:
    if autoencoder.preprocessing is None:
        raise TrajOODError(
            f"export: expected a model with a declared preprocessing, which can be part of a graph, got a transform in "
            f"user code: make {autoencoder.name} with preprocessing=traj_ood.Preprocessing(...)"
        )
    return autoencoder.preprocessing


def _check_model(autoencoder: Autoencoder) -> None:
    """Raise a TrajOODError for a model that overrides ``examine``."""
    if type(autoencoder).examine not in (Autoencoder.examine, SurrogateAutoencoder.examine):
        raise TrajOODError(
            f"export: {autoencoder.name} ({autoencoder.family}) overrides examine, which a graph cannot include: "
            "export autoencoders and surrogates"
        )
