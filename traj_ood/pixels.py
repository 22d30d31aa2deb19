"""From a PIL image to what a network takes, and the checks of it that autoencoders and backbones share."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor, nn

from traj_ood.errors import TrajOODError


def check_images(name: str, images: Tensor, shape: tuple[int, int, int], prepare: str) -> None:
    """Refuse what is not a finite float batch (B, C, H, W) of ``shape``; ``prepare`` says how to make one.

    Raises:
        TrajOODError: names the model, what it expected and what arrived.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not images.is_floating_point():
        raise TrajOODError(
            f"{name}: expected float images (B, {', '.join(map(str, shape))}), got {images.dtype} "
            f"of shape {tuple(images.shape)}: prepare them with {prepare}"
        )
    bad = (~images.flatten(1).isfinite().all(dim=1)).nonzero()[:, 0]
    if len(bad):
        raise TrajOODError(f"{name}: {len(bad)} image(s) hold NaN or infinite pixels, first at row {bad[0]}")


def network_input(name: str, images: Tensor, shape: tuple[int, int, int], prepare: str, module: nn.Module) -> Tensor:
    """Images as ``module`` takes them: checked, on its device, and of the type of its weights, since float64 or float16
    images are images of its shape, too. A module without weights says nothing of types, so they stay as they are; one
    with weights of several types takes float32, which is what transforms make.

    Raises:
        TrajOODError: as :func:`check_images`, numbers beyond the range of the weights' type included.
    """
    parameters = list(module.parameters())
    types = {p.dtype for p in parameters if p.is_floating_point()}
    if types and images.is_floating_point():
        images = images.to(types.pop() if len(types) == 1 else torch.float32)
    if parameters:
        images = images.to(parameters[0].device)
    check_images(name, images, shape, prepare)
    return images


def check_statistics(name: str, channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Refuse means and deviations that do not belong to the model's channels.

    Raises:
        TrajOODError: another number than ``channels``, one that is not finite, or a deviation that is not positive.
    """
    finite = all(math.isfinite(value) for value in (*mean, *std))
    if len(mean) != channels or len(std) != channels or not finite or not all(s > 0 for s in std):
        raise TrajOODError(
            f"{name}: expected a mean and a positive standard deviation for each of {channels} channels, got "
            f"mean {list(mean)} and std {list(std)}"
        )


def image_to_tensor(
    image: Image.Image,
    shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Tensor:
    """The transform the families share: channels (1 = ITU-R 601 luma, 3 = RGB), direct resize, (x/255 − mean)/std.

    Direct resize without a crop is what transformers' ViT-MAE image processor does; bilinear is its filter.
    """
    channels, height, width = shape
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, channels)
    scaled = pixels.permute(2, 0, 1).float() / 255
    return (scaled - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
