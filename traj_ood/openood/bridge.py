"""OpenOOD's postprocessor interface for one scorer of traj_ood."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from traj_ood.attractors import AttractorDictionary
from traj_ood.autoencoders import Autoencoder, SurrogateAutoencoder, SurrogateNetwork
from traj_ood.data.benchmark import sample_indices
from traj_ood.dynamics.fixed_function import KnownWeights
from traj_ood.errors import TrajOODError, warn
from traj_ood.openood.library import load_library
from traj_ood.openood.loaders import check_normalisation, count_of, ids_of, read
from traj_ood.openood.nets import AutoencoderNet, FeatureModel, backbone_of, device_of
from traj_ood.openood.settings import Settings
from traj_ood.scorers import Evidence, create_scorer
from traj_ood.scorers.explored import explored_part, joined_parts
from traj_ood.scorers.scorer_set import ScorerSet
from traj_ood.training.surrogate import fit_surrogate


class Bridge:
    """An OpenOOD postprocessor with one scorer. OpenOOD's base class is added by :func:`postprocessor_class`.

    ``setup`` fits the scorer once; ``inference`` returns (predictions, confidences, labels), with confidence = −score.

    With ``APS_mode`` all combinations of the sweep are scored in one pass over the validation sets and kept, so that a
    search computes every trajectory once, not once per combination.

    A pickle, as OpenOOD's scripts make it, contains the fit (training evidence, attractors, surrogate) but not the
    network; after unpickling, the first network used must have the same weights as the original.
    """

    _net: nn.Module | None
    _model: Autoencoder | None
    _weights: KnownWeights | None
    _val: list[Any]  # OpenOOD's two validation loaders
    _sets: dict[tuple[str, ...], ScorerSet]  # fitted scorers by their specs
    _searched: dict[int, tuple[Any, dict[str, Any], Any]]  # results of a search by id() of the loader
    _shape: tuple[int, ...]  # (C, H, W) of a classifier's images
    _surrogate: dict[str, Any] | None  # geometry and weights of the surrogate network
    _train: Evidence
    _dictionary: AttractorDictionary | None
    _fingerprint: str

    def __init__(self, config: Any) -> None:
        self.config = config
        self.settings = Settings.parse(config)
        self.APS_mode = self.settings.search
        self.hyperparam_search_done = False
        self.args_dict = dict(self.settings.sweep)
        self.setup_flag = False
        self._chosen: dict[str, Any] = {}
        self._forget_net()

    # ------------------------------------------------------------------ OpenOOD's interface

    def setup(self, net: nn.Module, id_loader_dict: Mapping[str, Any], ood_loader_dict: Mapping[str, Any]) -> None:
        """Fit the scorer on images of the ID training loader; further calls only check the network.

        For a scorer that reads trajectories or reconstructions, a classifier gets a surrogate autoencoder, trained on
        the features of all training images. The images are used as the loader's data set returns them: without
        augmentation in OpenOOD's Evaluator, with the random crops of training in its pipelines.
        """
        self._val, self._searched = [d["val"] for d in (id_loader_dict, ood_loader_dict) if d and "val" in d], {}
        if self.setup_flag:
            self._bind(net)
            return
        if not isinstance(net, nn.Module):
            raise TrajOODError(f"{self.settings.scorer}: expected one network, got a {type(net).__name__}")
        net.eval()  # OpenOOD does this only after setup
        if "train" not in id_loader_dict:
            raise TrajOODError(f"{self.settings.scorer}: expected a loader of ID training images, got none")
        loader = id_loader_dict["train"]
        count = count_of(loader)
        indices = sample_indices(count, min(self.settings.attractors, count), self.settings.seed, "train")
        self._keep_possible(len(indices))
        model = self._model_of(net, loader)
        self._learn(model, loader, indices)
        self._net, self._model, self._fingerprint = net, model, model.fingerprint()
        self._weights = KnownWeights(model)
        self.setup_flag = True

    def inference(
        self, net: nn.Module, data_loader: Any, progress: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Score all images of a loader: (N,) predicted classes (−1 without a classifier), (N,) confidences (HIGH = in
        distribution), (N,) labels."""
        self._bind(net)
        if self.APS_mode and not self.hyperparam_search_done and any(data_loader is v for v in self._val):
            predictions, scores, labels = self._search(data_loader, progress)
        else:
            predictions, scores, labels = self._pass(data_loader, [self._spec()], progress)
        return predictions, -scores[self._spec()], labels

    @torch.no_grad()
    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) predictions and (B,) float64 confidences of one batch (B, C, H, W); raises as :meth:`inference`."""
        self._bind(net)
        predictions, scores = self._score(self._scorers((self._spec(),)), data)
        return predictions, -scores[:, 0]

    def set_hyperparam(self, hyperparam: Sequence[Any]) -> None:
        """Set the scorer's options: one value for each option of the sweep, in its order."""
        if len(hyperparam) != len(self.settings.sweep):
            raise TrajOODError(
                f"{self.settings.scorer}: expected a value for each of {', '.join(self.settings.sweep) or 'no options'}"
                f", got {list(hyperparam)}"
            )
        chosen = dict(zip(self.settings.sweep, hyperparam, strict=True))
        create_scorer(self.settings.spec(**chosen))
        self._chosen = chosen

    def get_hyperparam(self) -> list[Any]:
        """The current values of the options of the sweep, in its order."""
        return [self._chosen.get(key, self.settings.options.get(key)) for key in self.settings.sweep]

    # ------------------------------------------------------------------ fit

    def _spec(self) -> str:
        return self.settings.spec(**self._chosen)

    def _keep_possible(self, count: int) -> None:
        """Remove values from the sweep for which ``count`` training images are too few, such as k = 100 for 50."""
        possible = {}
        for key, values in self.settings.sweep.items():
            possible[key] = [v for v in values if _refusal(self.settings.spec(**{key: v}), count) is None]
            if self.APS_mode and not possible[key]:
                raise TrajOODError(str(_refusal(self.settings.spec(**{key: values[0]}), count)))
        self.settings = replace(self.settings, sweep=possible)
        self.args_dict = dict(possible)

    def _model_of(self, net: nn.Module, loader: Any) -> Autoencoder:
        """The model for the scorer: the autoencoder itself, or a classifier with a surrogate if the scorer needs it."""
        self._surrogate = None
        if isinstance(net, AutoencoderNet):
            check_normalisation(loader, net.autoencoder)
            return net.autoencoder
        self._shape = tuple(next(read(loader, [0]))["data"].shape[1:])
        backbone = backbone_of(net, self._shape)
        needs = functools.reduce(lambda a, b: a | b, (create_scorer(s).needs() for s in self.settings.grid()))
        if not needs.decoder:
            return FeatureModel(backbone)
        parts = [backbone.extract(batch["data"]).features.cpu() for batch in read(loader, range(count_of(loader)))]
        model = fit_surrogate(backbone, torch.cat(parts), seed=self.settings.seed)
        weights = {key: value.cpu() for key, value in model.network.state_dict().items()}
        self._surrogate = {"geometry": model.network.geometry(), "weights": weights}
        return model

    def _learn(self, model: Autoencoder, loader: Any, indices: Sequence[int]) -> None:
        scorers = ScorerSet(model, self.settings.grid(), tol=self.settings.tol, max_steps=self.settings.max_steps)
        scorers.check_training_size(len(indices))
        parts, labels = [], []
        for batch in read(loader, indices):
            ids = ids_of(batch)
            parts.append(explored_part(ids, *scorers.explore(model.examine(batch["data"]), ids)))
            labels.append(batch["label"])
        self._dictionary, evidence = joined_parts(parts)
        self._train = replace(evidence, labels=torch.cat(labels))  # as the logits are numbered, though some may lack
        for warning in self._dictionary.health().warnings if self._dictionary is not None else ():
            warn(f"unhealthy attractors: {warning}", stacklevel=3)

    def _scorers(self, specs: tuple[str, ...]) -> ScorerSet:
        """The scorers of these specs, fitted on the training evidence."""
        if specs not in self._sets:
            assert self._model is not None  # every caller has bound a network
            made = ScorerSet(self._model, specs, tol=self.settings.tol, max_steps=self.settings.max_steps)
            unknown = made.needs.features - self._train.features.keys()
            if unknown or (made.needs.dictionary and self._dictionary is None):
                raise TrajOODError(
                    f"{specs[0]}: needs features that setup did not collect: give the options in the yml file, or set "
                    "them before setup"
                )
            self._sets[specs] = made.learn(self._dictionary if made.needs.dictionary else None, self._train)
        return self._sets[specs]

    # ------------------------------------------------------------------ scoring

    def _pass(self, loader: Any, specs: Sequence[str], progress: bool) -> tuple[Any, dict[str, Any], Any]:
        scorers = self._scorers(tuple(specs))
        predictions, scores, labels = [], [], []
        if isinstance(self._net, AutoencoderNet):
            check_normalisation(loader, self._net.autoencoder)
        for batch in tqdm(loader, disable=not progress):
            predicted, values = self._score(scorers, batch["data"])
            predictions.append(predicted)
            scores.append(values)
            labels.append(batch["label"])
        table = torch.cat(scores).numpy()
        whole = {spec: table[:, column] for column, spec in enumerate(specs)}
        return torch.cat(predictions).numpy().astype(int), whole, torch.cat(labels).numpy().astype(int)

    def _search(self, loader: Any, progress: bool) -> tuple[Any, dict[str, Any], Any]:
        """The scores of all combinations of the sweep on a validation loader, computed at the first call."""
        known = self._searched.get(id(loader))  # unique, because _val keeps the loaders alive
        if known is None or self._spec() not in known[1]:
            specs = list(dict.fromkeys([*self.settings.grid(), self._spec()]))
            known = self._searched[id(loader)] = self._pass(loader, specs, progress)
        return known

    def _score(self, scorers: ScorerSet, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) predictions and (B, scorers) float64 scores of images on any device."""
        encoding = scorers.autoencoder.examine(images.to(scorers.autoencoder.device))
        scored = scorers.score(encoding).scores
        table = torch.stack([scored[label].cpu().double() for label in scorers.labels], dim=1)
        for label, values in scored.items():
            if not bool(values.isfinite().all()):
                raise TrajOODError(f"scorer {label}: got scores that are not finite: check the model and preprocessor")
        none = torch.full((len(images),), -1)
        return none if encoding.logits is None else encoding.logits.argmax(dim=1).cpu(), table

    # ------------------------------------------------------------------ networks and pickles

    def _forget_net(self) -> None:
        self._net, self._model, self._val, self._sets, self._searched = None, None, [], {}, {}
        self._weights = None

    def _bind(self, net: nn.Module) -> None:
        """Use ``net`` from now on, which must be the network of setup or have equal weights."""
        if not self.setup_flag:
            raise TrajOODError(f"{self.settings.scorer}: call setup with OpenOOD's loaders first")
        if net is self._net and self._weights is not None:
            self._weights.check()
            return
        model = self._rebuilt(net.eval())
        if model.fingerprint() != self._fingerprint:
            raise TrajOODError(
                f"{self.settings.scorer}: was set up with other weights than those of this {type(net).__name__}: use "
                "the network of setup, or a new postprocessor"
            )
        self._net, self._model, self._sets, self._searched = net, model, {}, {}
        self._weights = KnownWeights(model)

    def _rebuilt(self, net: nn.Module) -> Autoencoder:
        if isinstance(net, AutoencoderNet):
            return net.autoencoder
        backbone = backbone_of(net, self._shape)
        if self._surrogate is None:
            return FeatureModel(backbone)
        network = SurrogateNetwork(**self._surrogate["geometry"])
        network.load_state_dict(self._surrogate["weights"])
        return SurrogateAutoencoder(backbone, network.to(device_of(net)))

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_net", "_model", "_val", "_sets", "_searched", "_weights")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_net()
        self.__dict__.update(state)


def __getattr__(name: str) -> Any:
    """``TrajOODPostprocessor``, created on first use; pickle looks it up in this module."""
    if name == "TrajOODPostprocessor":
        return postprocessor_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def postprocessor_class() -> type:
    """:class:`Bridge` with OpenOOD's base class, which its Evaluator requires."""
    base = load_library().postprocessors.BasePostprocessor
    return type("TrajOODPostprocessor", (Bridge, base), {"__module__": __name__, "__doc__": Bridge.__doc__})


def _refusal(spec: str, count: int) -> TrajOODError | None:
    """The reason why a scorer cannot be fitted on ``count`` images, or None."""
    try:
        create_scorer(spec).check_training_size(count)
    except TrajOODError as error:
        return error
    return None
