"""Measures of memorisation of one model, shared by memorization, training, overfitting and regularizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from traj_ood.analysis.measures import finite, memorization_coefficients, rank_explaining, share
from traj_ood.analysis.models import settle
from traj_ood.attractors import AttractorDictionary
from traj_ood.autoencoders import ConvAutoencoder
from traj_ood.dynamics.trajectory import Status

if TYPE_CHECKING:
    from traj_ood.drawing.style import Figure

_SHOWN = 10  # maximum number of decoded attractors kept as images
_OF_ATTRACTORS = (
    "memorization",
    "memorization_std",
    "memorization_distinct",
    "memorization_converged",
    "own",
    "rank90",
    "rank90_unit",
    "distinct",
)


@dataclass(frozen=True)
class MeasuredImages:
    """The images that models are measured on, as pixels in [0, 1].

    Attributes:
        training: (N, C, H, W), all images that the model was trained on.
        starts: indices of the training images whose trajectories give the attractors.
        test: (M, C, H, W), held-out images.
    """

    training: Tensor
    starts: Tensor
    test: Tensor


def pixels(model: ConvAutoencoder, images: Tensor) -> Tensor:
    """Convert images in the model's normalised units to pixels; D's output may lie outside [0, 1]."""
    assert model.preprocessing is not None  # every ConvAutoencoder declares one
    return model.preprocessing.unnormalise(images).cpu()


def normalised(model: ConvAutoencoder, images: Tensor) -> Tensor:
    """Convert pixels in [0, 1] to the model's normalised units."""
    assert model.preprocessing is not None  # every ConvAutoencoder declares one
    return model.preprocessing.normalise(images)


def settle_images(model: ConvAutoencoder, images: Tensor, tol: float, max_steps: int) -> AttractorDictionary:
    """The end points of trajectories that start at images (N, C, H, W), pixels in [0, 1]."""
    return settle(model, model.encode(normalised(model, images)), tol=tol, max_steps=max_steps)[0]


def memory(
    model: ConvAutoencoder, images: MeasuredImages, dictionary: AttractorDictionary
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measures of one model as plain data, and images of its attractors, the end points in ``dictionary`` of the
    trajectories of ``images.starts`` (:func:`settle_images`).

    Returns:
        ``memorization``, ``memorization_std``: mean and standard deviation of mem(z*) over the end points of all
        starts; ``memorization_distinct``: mean over distinct attractors (cosine 0.99); ``memorization_converged``:
        mean over end points that met the tolerance, None without any; ``own``: share of end points whose closest
        training image is the one they started from; ``test_error``: mean squared error per pixel of D(E(x)) on test
        images; ``train_error``: the same on the starts; ``rank90``: of decoded attractors; ``rank90_unit``: of these
        scaled to length 1 each, so that a few end points far out do not count for all; ``distinct``, ``starts``,
        ``converged``, ``median_steps``; ``finite``: share of starts whose end point decodes to finite pixels. Those of
        attractors are None where there is none.
        Tensors ``decoded`` and ``closest`` (up to 10, C, H, W): distinct attractors and their closest training images.
    """
    known = dictionary.statuses != Status.NON_FINITE
    found: dict[str, Any] = dict.fromkeys(_OF_ATTRACTORS) | {
        "test_error": reconstruction_error(model, images.test),
        "train_error": reconstruction_error(model, images.training[images.starts]),
        "starts": len(dictionary),
        "converged": share(dictionary.statuses == Status.CONVERGED),
        "median_steps": float(dictionary.steps.double().median()),
        "finite": 0.0,
    }
    if not bool(known.any()):
        return found, {}
    decoded = pixels(model, model.decode(dictionary.usable()))
    drawn = decoded.flatten(1).isfinite().all(dim=1)  # D may overflow although its input is finite
    distinct = torch.zeros(len(decoded), dtype=torch.bool)
    distinct[dictionary.distinct()] = True
    found |= {"finite": float(drawn.sum()) / len(dictionary), "distinct": int(distinct.sum())}
    if not bool(drawn.any()):
        return found, {}
    decoded, distinct = decoded[drawn], distinct[drawn]
    cosines, closest = memorization_coefficients(decoded, images.training)
    found |= {
        "memorization": float(cosines.mean()),
        "memorization_std": float(cosines.std(unbiased=False)),
        "memorization_distinct": finite(cosines[distinct].mean()),
        "memorization_converged": finite(cosines[(dictionary.statuses[known] == Status.CONVERGED)[drawn]].mean()),
        "own": share(closest == images.starts[known][drawn]),
        "rank90": rank_explaining(decoded),
        "rank90_unit": rank_explaining(normalize(decoded.flatten(1).double(), dim=1)),
    }
    first = distinct.nonzero()[:_SHOWN, 0]
    return found, {"decoded": decoded[first], "closest": images.training[closest[first]]} if len(first) else {}


def reconstruction_error(model: ConvAutoencoder, images: Tensor) -> float | None:
    """Mean squared error per pixel of D(E(x)) for images (N, C, H, W), pixels in [0, 1]; None if it is not finite, as
    may happen with random weights."""
    back = pixels(model, model.decode(model.encode(normalised(model, images))))
    return finite((back - images).double().square().mean())


def reference(images: MeasuredImages) -> float:
    """Mean cosine of test images to their closest training image: the coefficient of images that were not memorised."""
    return float(memorization_coefficients(images.test, images.training)[0].mean())


def gallery(pictures: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Callable[[], Figure]]:
    """The figure ``attractors.png``: for each label decoded attractors above their closest training images (Fig. 2
    right), from tensors ``decoded`` and ``closest`` (K, C, H, W), pixels in [0, 1]. Labels without tensors are left
    out; if none has any, there is no figure."""

    def draw() -> Figure:
        from traj_ood.drawing.charts import PictureRow, picture_rows

        rows = []
        for label, shown in pictures.items():
            if shown:
                limits = torch.tensor([[0.0], [1.0]]).expand(2, shown["decoded"].shape[1]).numpy()
                rows.append(PictureRow(f"{label}\nD(z*)", shown["decoded"].numpy(), limits))
                rows.append(PictureRow("closest\ntraining", shown["closest"].numpy(), limits))
        return picture_rows(rows, "Decoded attractors, each above the training image closest to it")

    return {"attractors.png": draw} if any(pictures.values()) else {}
