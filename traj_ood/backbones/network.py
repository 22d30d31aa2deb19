"""Base classes of the libraries' backbones: a frozen module with a declared preprocessing, tested on construction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from traj_ood.backbones.base import Backbone, Features, fits_head
from traj_ood.data.preprocessing import Preprocessing
from traj_ood.dynamics.fixed_function import trial_rows
from traj_ood.errors import TrajOODError, foreign_errors

PACKED_WEIGHTS = "backbone.safetensors"
"""File name of the weights of a packed backbone."""


class NetworkBackbone(Backbone):
    """A backbone around a library's network. Subclasses implement :meth:`forward_batch`.

    The constructor runs two random images through the network. It determines the widths and whether the head is linear,
    and refuses random outputs or a preprocessing that does not fit the network, before any data are read.

    ``options`` decide the features in addition to the weights: the library's settings of its transform, and the
    pooling. ``classifier`` is the linear layer that computes the logits, if any; it is checked against them.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        spec: str,
        preprocessing: Preprocessing,
        options: Mapping[str, Any],
        classifier: nn.Linear | None = None,
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.name, self.spec = name, spec
        self.preprocessing, self.input_shape, self._options = preprocessing, preprocessing.shape, dict(options)
        if self.input_shape[0] not in (1, 3):
            raise TrajOODError(f"{name}: expected a network of 1 or 3 input channels, got {self.input_shape[0]}")
        with self.fixed(), torch.inference_mode():
            answer = self._first_answer()
            self.feature_dim = answer.features.shape[1]
            self.classes = answer.logits.shape[1] if answer.logits is not None else 0
            self._classifier = classifier
            head = self.head()
            if head is not None and not fits_head(answer, head):
                self._classifier = None
            self.try_once()

    def _first_answer(self) -> Features:
        where = f"{self.name}: cannot process images of shape {self.input_shape}, as its preprocessing returns them"
        with foreign_errors(where):
            answer = self.forward_batch(trial_rows(self.input_shape, self.module))
        if answer.features.ndim != 2:
            raise TrajOODError(
                f"{self.name}: expected one feature vector per image, got shape {tuple(answer.features.shape)}"
            )
        return answer

    def options(self) -> dict[str, Any]:
        return self._options

    def head(self) -> tuple[Tensor, Tensor] | None:
        if self._classifier is None:
            return None
        weight, bias = self._classifier.weight.detach(), self._classifier.bias
        return weight, bias.detach() if bias is not None else weight.new_zeros(len(weight))


class ClassifierInputBackbone(NetworkBackbone):
    """A classifier whose features are the inputs of its last linear layer, captured by a forward hook. ``call`` maps
    images to logits, through ``module``."""

    def __init__(
        self, module: nn.Module, call: Callable[[Tensor], Tensor], classifier: nn.Linear, **settings: Any
    ) -> None:
        self._call, self._layer = call, classifier
        super().__init__(module, classifier=classifier, **settings)

    def forward_batch(self, images: Tensor) -> Features:
        caught: list[Tensor] = []
        with self._layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0])):
            logits = self._call(images)
        return Features(caught[-1].flatten(1), logits)


def find_classifier(
    name: str, module: nn.Module, call: Callable[[Tensor], Tensor], shape: tuple[int, int, int]
) -> nn.Linear:
    """The linear layer whose output is the network's output, found by running the network on images of ``shape``."""
    module.eval()
    made: list[tuple[nn.Module, Tensor]] = []
    with ExitStack() as hooks, torch.inference_mode():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                hooks.enter_context(layer.register_forward_hook(lambda own, _, output: made.append((own, output))))
        logits = call(trial_rows(shape, module))
    for layer, output in reversed(made):
        if isinstance(layer, nn.Linear) and output.shape == logits.shape and torch.equal(output, logits):
            return layer
    raise TrajOODError(
        f"{name}: its logits are not the output of one linear layer, so it has no penultimate features: use timm's "
        "version of the architecture, or traj_ood.backbones.CallableBackbone"
    )


def name_of(module: nn.Module, layer: nn.Module) -> str:
    """Dotted name of ``layer`` inside ``module``."""
    return next(name for name, found in module.named_modules() if found is layer)
