"""Are untrained networks contractive? The variance of their outputs for N(0, I), relative to that of the inputs (Fig.
6).

The paper reports the ratio of the variance of all output numbers to the variance of the inputs. By that measure a
network that ignores its input may appear expansive, because its outputs differ from each other although they do not
differ between images. Therefore the variance between images is reported, too: the mean over outputs of the variance
across images. Only this one measures contraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from traj_ood.analysis.base import Answer, Question, register
from traj_ood.analysis.measures import finite, share
from traj_ood.analysis.workspace import Unit, Workspace
from traj_ood.errors import foreign_errors, unknown_name

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

BACKBONES = (
    "alexnet",
    "vgg11",
    "squeezenet1_1",
    "resnet18",
    "densenet121",
    "mobilenet_v2",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
)
"""Twelve of torchvision's classifiers, the smallest of as many families; the paper does not name its own."""
STATISTICS = ("running", "batch")
OUTPUTS = ("logits", "features")
KEYS = tuple(f"{s}_{o}_{name}" for s in STATISTICS for o in OUTPUTS for name in ("all", "between"))
_FIXED_SIZE_PREFIXES = ("vit_",)  # models that are built for a given image size
_MIN_SIZE = 64  # below it the inputs of some pooling layers are empty


@register
@dataclass(frozen=True)
class Contraction(Question):
    """Variance ratios of untrained classifiers.

    Attributes:
        models: names of torchvision's classifiers.
        runs: number of initialisations of each, with consecutive seeds from ``seed``.
        images: number of samples of N(0, I).
        size: side of the images in pixels.
        batch: maximum number of images per forward pass; passes are of nearly equal size. It affects the results with
            batch statistics.
    """

    name: ClassVar[str] = "contraction"
    figure: ClassVar[str] = "§2.1, Fig 6"
    summary: ClassVar[str] = "output variance over input variance of untrained torchvision backbones"
    choices: ClassVar[tuple[str, ...]] = (
        "The twelve backbones are not named: the smallest of twelve families of torchvision.",
        "Which output is not stated, so both are measured: the 1,000 logits, and the input of the last layer. "
        "torchvision gives many classifiers small weights of their own (ViT's are 0), which the logits' ratio shows; "
        "where a LayerNorm comes last (ConvNeXt, ViT) the features' own variance is 1 by construction.",
        "The images' size is not stated: --paper takes 224 pixels, torchvision's own.",
        "The batch, which decides batch statistics, is not stated: at most 32 images.",
        "The mode is not stated, so both are measured: 'running' is evaluation mode, where an untrained batch "
        "normalisation does nothing; 'batch' normalises by the batch, as the first training step does.",
        "Which variance is not stated: that of all output numbers, and beside it the variance between images.",
    )
    unstated: ClassVar[tuple[str, ...]] = ("models", "size", "batch")
    at_least: ClassVar = {"runs": 1}

    models: tuple[str, ...] = BACKBONES
    runs: int = 10
    images: int = 32
    size: int = 64
    batch: int = 32

    def __post_init__(self) -> None:
        different = len(set(self.models)) == len(self.models)
        self.expect(bool(self.models) and different, "models", "at least one name, and none twice")
        super().__post_init__()
        self.expect(self.images >= 2, "images", "at least 2: a variance needs two")
        self.expect(self.size >= _MIN_SIZE, "size", f"at least {_MIN_SIZE} pixels")
        self.expect(self.batch >= 2, "batch", "at least 2: batch statistics need two")
        alone = self.batch == 2 and self.images % 2 == 1
        self.expect(not alone, "batch", "at least 3 with an odd number of images, or one would be alone in its batch")

    @classmethod
    def paper(cls) -> Contraction:
        return cls(images=1000, size=224)

    def answer(self, work: Workspace) -> Answer:
        check_names(self.models)
        rows = []
        runs = list(product(self.models, range(self.seed, self.seed + self.runs)))
        for model, seed in work.track(runs, "contraction", "network"):
            key = self.settings("images", "size", "batch")
            key |= {"inputs": self.seed, "model": model, "seed": seed, "ratios": KEYS}
            unit = work.unit("contraction", key, partial(self._measure, model, seed, work.device))
            rows.append({"model": model, "seed": seed, **unit.notes})
        summary = [_summary(model, [r for r in rows if r["model"] == model]) for model in self.models]
        return Answer({"models": summary, "runs": rows}, _sentence(summary))

    def drawn(self, figures: Mapping[str, Any]) -> Mapping[str, Callable[[], Figure]]:
        return {"contraction.png": partial(_draw, figures["runs"])}

    def _measure(self, model: str, seed: int, device: torch.device) -> Unit:
        draws = torch.Generator().manual_seed(self.seed)
        inputs = torch.randn(self.images, 3, self.size, self.size, generator=draws)
        network = untrained(model, self.size, seed).to(device)
        notes: dict[str, float | None] = {}
        for statistics in STATISTICS:
            responses = respond(network, inputs.to(device), self.batch, statistics)
            for output, values in zip(OUTPUTS, responses, strict=True):
                ratios = variance_ratios(inputs, values)
                notes |= {f"{statistics}_{output}_{name}": ratio for name, ratio in ratios.items()}
        return Unit(notes=notes)


def check_names(models: Iterable[str]) -> None:
    """Raise ``TrajOODError`` unless torchvision has all of these classifiers."""
    from torchvision import models as library

    known = library.list_models(module=library)
    for model in models:
        if model not in known:
            raise unknown_name("torchvision classifier", model, known)


def untrained(model: str, size: int, seed: int) -> nn.Module:
    """Build a torchvision classifier with random weights, without a download.

    Raises:
        TrajOODError: it cannot be built for images of ``size`` pixels.
    """
    from torchvision import models as library

    sized = {"image_size": size} if model.startswith(_FIXED_SIZE_PREFIXES) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with foreign_errors(f"{model}: cannot be built for {size} × {size} images", ": change size"):
            network: nn.Module = library.get_model(model, weights=None, **sized)
    return network.requires_grad_(False)


def respond(network: nn.Module, inputs: Tensor, batch: int, statistics: str) -> tuple[Tensor, Tensor]:
    """Outputs (B, …) of a network for ``inputs`` (B, C, H, W), and inputs (B, …) of its last linear or convolutional
    layer; without dropout. The network is not changed.

    Args:
        batch: maximum number of rows per call. Sizes of calls differ by at most one, so that no call has a single row
            unless ``batch`` is 1, or 2 with an odd number of rows.
        statistics: statistics of batch normalisations: ``running`` or ``batch``.
    """
    network = deepcopy(network).eval()  # the caller's keeps its running statistics
    features: list[Tensor] = []
    *_, last = (module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    last.register_forward_pre_hook(lambda _, arguments: features.append(arguments[0]))
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(statistics == "batch")
    cuts, size = math.ceil(len(inputs) / batch), inputs.shape[-1]
    with (
        torch.inference_mode(),
        foreign_errors(f"{type(network).__name__}: fails on {size} × {size} images", ": change size"),
    ):
        logits = [network(part) for part in inputs.tensor_split(cuts)]
    return torch.cat(logits), torch.cat(features)


def variance_ratios(inputs: Tensor, outputs: Tensor) -> dict[str, float | None]:
    """Variance ratios of outputs (B, …) to inputs (B, …); None if the outputs are not finite.

    ``all`` is the ratio of the variances of all numbers, ``between`` that of the mean over coordinates of the variance
    across the B rows.
    """
    x, y = inputs.flatten(1).double().cpu(), outputs.flatten(1).double().cpu()
    return {"all": finite(y.var() / x.var()), "between": finite(y.var(dim=0).mean() / x.var(dim=0).mean())}


def _summary(model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation (n − 1) and share below 1 of each ratio over the runs of one model."""
    summary: dict[str, Any] = {"model": model}
    for key in KEYS:
        values = torch.tensor([math.nan if row[key] is None else row[key] for row in rows], dtype=torch.float64)
        deviation = values.std() if len(values) > 1 else math.nan
        summary[key] = {"mean": finite(values.mean()), "std": finite(deviation), "below_1": share(values < 1)}
    return summary


def _sentence(summary: list[dict[str, Any]]) -> str:
    def contractive(key: str) -> str:
        return f"{sum(row[key]['below_1'] == 1 for row in summary)}"

    return (
        f"Of {len(summary)} untrained backbones, below 1 in every run by the variance of all logits: "
        f"{contractive('running_logits_all')} in evaluation mode and {contractive('batch_logits_all')} with batch "
        f"statistics; by the variance between images, of the logits {contractive('running_logits_between')} and "
        f"{contractive('batch_logits_between')}, of the features before the classifier "
        f"{contractive('running_features_between')} and {contractive('batch_features_between')}."
    )


def _draw(rows: list[dict[str, Any]]) -> Figure:
    """Draw a row per backbone and a dot per run; left of the dotted line networks contract (Fig. 6)."""
    from traj_ood.drawing.charts import DotPanel, dots

    models = list(dict.fromkeys(row["model"] for row in rows))
    labels = {"all": "variance of all output numbers (Fig. 6)", "between": "variance between images"}
    least = 1e-12  # a constant output would be 0, which a logarithmic axis cannot show
    largest = 3 * max([30.0, *(x for row in rows for key in KEYS if (x := row[key]) is not None)])
    panels = []
    for statistics, mode in (("running", "evaluation mode"), ("batch", "batch statistics")):
        for output in OUTPUTS:
            series = {
                label: [[row[f"{statistics}_{output}_{ratio}"] for row in rows if row["model"] == m] for m in models]
                for ratio, label in labels.items()
            }
            panels.append(DotPanel(f"{output}, {mode}", series, 1, (least / 3, largest), least))
    title = f"Variance at initialisation: output over input, on N(0, I)\nA ratio of {least:g} is that or less"
    return dots(models, panels, 2, title)
